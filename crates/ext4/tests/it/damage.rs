//! The reader meets damaged images: an error each time, never a panic.

use ext4::reader::{NodeKind, WalkLimits};
use ext4::{Image, ReadAt, ReadError};
use std::io::Read;

use crate::support::{ImageFile, options};
use crate::writer::a_bit_of_everything;

fn bytes() -> Vec<u8> {
    let mut options = options();
    options.journal = false;
    options.size = ext4::Size::FreeSpace { bytes: 0 };
    std::fs::read(ImageFile::build(&a_bit_of_everything(), &options).path).unwrap()
}

/// Reads whatever can be read.
fn read_all(image: &Image<impl ReadAt>) -> Result<(), ReadError> {
    image.walk(WalkLimits::default(), |_, node| {
        image.xattrs(node)?;
        match node.kind {
            NodeKind::File if node.size_bytes < 1 << 24 => {
                image
                    .content(node)?
                    .read_to_end(&mut Vec::new())
                    .map_err(|source| ReadError::Io { offset: 0, source })?;
            }
            NodeKind::Symlink => drop(image.symlink_target(node)?),
            _ => {}
        }
        Ok(())
    })
}

#[test]
fn a_flipped_bit_anywhere_in_the_metadata_is_found() {
    let good = bytes();
    let image = Image::open(&good).unwrap();
    image.verify().unwrap();
    read_all(&image).unwrap();
    let mut state = 1_u64;
    let mut missed = Vec::new();
    // Metadata lies in front; what is a hole there is free, reserved or padding.
    for _ in 0..500 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let at = (state >> 20) as usize % (good.len() / 3);
        if good[at] == 0 || at < 1024 {
            continue;
        }
        let mut bad = good.clone();
        bad[at] ^= 1 << (state >> 60 & 7);
        let result = Image::open(&bad).and_then(|image| {
            read_all(&image)?;
            image.verify()
        });
        if result.is_ok() {
            missed.push(at / 4096);
        }
    }
    // Only file contents, long links and descriptor copies carry no checksum.
    let allowed = data_blocks(&image);
    missed.retain(|block| !allowed.contains(&(*block as u64)));
    assert_eq!(missed, [] as [usize; 0]);
}

fn data_blocks(image: &Image<impl ReadAt>) -> std::collections::HashSet<u64> {
    let mut blocks = std::collections::HashSet::new();
    image
        .walk(WalkLimits::default(), |_, node| {
            if matches!(node.kind, NodeKind::File | NodeKind::Symlink) && node.sectors > 0 {
                for extent in image.extents(node).into_iter().flatten() {
                    blocks.extend(extent.image_block..extent.image_block + extent.blocks);
                }
            }
            Ok::<_, ReadError>(())
        })
        .unwrap();
    blocks
}

#[test]
fn garbage_in_an_image_without_checksums_never_panics() {
    let mut good = bytes();
    // Without the feature no checksum protects the parsers.
    good[1024 + 0x64 + 1] &= !4;
    assert!(Image::open(&good).is_ok());
    let mut state = 7_u64;
    for _ in 0..150 {
        let mut bad = good.clone();
        for _ in 0..200 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = 2048 + (state >> 20) as usize % (bad.len() / 3);
            bad[at] = if state >> 63 == 0 { 0xFF } else { (state >> 50) as u8 };
        }
        if let Ok(image) = Image::open(&bad) {
            let _ = read_all(&image);
            let _ = image.verify();
            for ino in 1..500 {
                let Ok(node) = image.inode(ino) else { continue };
                let _ = (image.xattrs(&node), image.entries(&node), image.extents(&node));
            }
        }
    }
}

#[test]
fn no_more_can_be_free_than_there_is() {
    let mut good = bytes();
    // Without the feature no checksum protects the numbers.
    good[1024 + 0x64 + 1] &= !4;
    // Free blocks, low and high, and free inodes.
    for at in [0x0C, 0x158, 0x10] {
        let mut bad = good.clone();
        bad[1024 + at..1024 + at + 4].fill(0xFF);
        assert!(matches!(Image::open(&bad), Err(ReadError::Damaged { .. })), "{at:#x}");
    }
}

#[test]
fn a_walk_keeps_its_limits() {
    let image = Image::open(bytes()).unwrap();
    let walk = |limits| image.walk(limits, |_, _| Ok::<_, ReadError>(()));
    let names_max = image.verify().unwrap().names;
    assert!(walk(WalkLimits { names_max, ..WalkLimits::default() }).is_ok());
    let less = WalkLimits { names_max: names_max - 1, ..WalkLimits::default() };
    assert!(matches!(walk(less), Err(ReadError::Limit { what: "names", .. })));
    let flat = WalkLimits { depth_max: 2, ..WalkLimits::default() };
    assert!(matches!(walk(flat), Err(ReadError::Limit { what: "nested directories", .. })));
}

#[test]
fn what_is_no_image_is_told_so() {
    for bytes in [vec![], vec![0; 2047], vec![0; 1 << 20]] {
        assert!(matches!(Image::open(&bytes), Err(ReadError::NotExt4)));
    }
    let good = bytes();
    let cut = &good[..good.len() - 4096];
    assert!(matches!(Image::open(cut), Err(ReadError::Damaged { .. })));
}

#[test]
fn a_lookup_tells_what_is_missing() {
    let image = Image::open(bytes()).unwrap();
    assert_eq!(image.lookup(b"/").unwrap().ino, 2);
    assert_eq!(image.lookup(b"etc/deep/file-7").unwrap().size_bytes, 7 * 97);
    assert!(matches!(image.lookup(b"/etc/nothing"), Err(ReadError::NotFound { .. })));
    assert!(matches!(image.lookup(b"/etc/passwd/x"), Err(ReadError::NotDirectory { .. })));
}
