//! Where data lies: whole chunks, equal in different images, nothing dead.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use ext4::{BLOCK_SIZE, InodeId, Layout, Run, Size};

use crate::support::{BLOCK, Content, ImageFile, MemoryTree, options};
use crate::writer::judge;

const ROOT: InodeId = InodeId::ROOT;
const CHUNK: u64 = 128;

fn two_layers(base_bytes: u64, files_above: u32) -> MemoryTree {
    let mut tree = MemoryTree::new();
    tree.regions[0].seed = 42;
    tree.regions[0].is_thin = true;
    for n in 0..8 {
        tree.file(ROOT, format!("base-{n}"), 0, base_bytes / 8);
    }
    let above = tree.region(u64::from(files_above));
    for n in 0..files_above {
        tree.file(ROOT, format!("above-{n}"), above, 10_000);
    }
    tree
}

#[test]
fn equal_base_layers_give_equal_chunks_in_images_over_two_gigabytes() {
    let images: Vec<_> = [10, 20_000]
        .map(|files| {
            let tree = two_layers(2300 << 20, files);
            let mut options = options();
            options.uuid[0] ^= u8::from(files == 10);
            let layout = tree.plan(&options).unwrap();
            let image = if files == 10 {
                judge(&tree, &options)
            } else {
                ImageFile::build(&tree, &options)
            };
            image.assert_clean();
            assert!(image.summary.image_bytes > 2 << 30);
            (tree, layout, image)
        })
        .into_iter()
        .collect();
    let base = &images[0].0.regions[0];
    let mut places = Vec::new();
    let zeroes = vec![0; (CHUNK as usize - 1) * BLOCK];
    for (_, layout, image) in &images {
        let file = std::fs::File::open(&image.path).unwrap();
        let place = places_of_base(layout);
        let mut bytes = vec![0; CHUNK as usize * BLOCK];
        for (n, &at) in &place {
            file.read_exact_at(&mut bytes, at * CHUNK * BLOCK_SIZE).unwrap();
            assert!(bytes[..BLOCK] == base.block(n * CHUNK), "chunk {n} lies elsewhere");
            assert!(bytes[BLOCK..] == zeroes, "chunk {n} is not whole");
        }
        assert_eq!(place.len() as u64, base.blocks / CHUNK);
        places.push(place);
    }
    assert_ne!(places[0], places[1], "the images do not differ in their metadata");
    for (_, layout, _) in &images {
        for step in layout.moves() {
            assert_eq!(step.image_block % CHUNK, step.region_block % CHUNK);
        }
    }
}

/// The image chunk of each chunk of region 0.
fn places_of_base(layout: &Layout) -> BTreeMap<u64, u64> {
    let mut places = BTreeMap::new();
    for step in layout.moves().filter(|m| m.region == 0) {
        for n in (0..step.blocks).filter(|n| (step.region_block + n).is_multiple_of(CHUNK)) {
            places.insert((step.region_block + n) / CHUNK, (step.image_block + n) / CHUNK);
        }
    }
    places
}

#[test]
fn dead_blocks_are_holes_and_dead_chunks_take_no_place() {
    let mut tree = MemoryTree::new();
    // Blocks 0..1000 of the region are alive but for 10..20, and for all of chunk 2 and 3.
    tree.allocate(0, 1000);
    let run =
        |file_block, region_block, blocks| Run { file_block, region: 0, region_block, blocks };
    let runs = vec![run(0, 0, 10), run(10, 20, 236), run(246, 512, 488)];
    tree.add(ROOT, "file", Content::File { size_bytes: 734 * 4096, runs });
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 0 };
    let layout = tree.plan(&options).unwrap();
    let moves: Vec<_> = layout.moves().collect();
    let first = moves[0].image_block;
    let places: Vec<_> =
        moves.iter().map(|m| (m.region_block, m.image_block - first, m.blocks)).collect();
    assert_eq!(places, [(0, 0, 10), (20, 20, 236), (512, 256, 488)]);
    let image = judge(&tree, &options);
    let bytes = std::fs::read(&image.path).unwrap();
    for dead in (10..20).chain(256..512) {
        let canary = tree.regions[0].block(dead);
        assert!(!bytes.windows(64).step_by(64).any(|w| w == &canary[..64]), "block {dead}");
    }
}

#[test]
fn data_steps_over_the_backups_of_groups_one_and_three() {
    let mut tree = MemoryTree::new();
    tree.regions[0].is_thin = true;
    tree.file(ROOT, "huge", 0, 3 << 30);
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 0 };
    let layout = tree.plan(&options).unwrap();
    let gaps: Vec<_> = layout.moves().map(|m| m.image_block + m.blocks).collect();
    for group in [1, 3, 5, 7, 9] {
        assert!(gaps.contains(&(group * 32768)), "{gaps:?}");
    }
    judge(&tree, &options);
}
