//! What several fuzz targets share: from layers to a checked image, all in memory.
//!
//! Makes no random bytes itself; the fuzzer does.

use std::io;

use ext4::{Image, Layout, Options, ReadError, Size};
use rootfs::{FileTree, Limits, Pack, TreeLimits, make_pack};

/// Images larger than this are not worth the fuzzer's time.
const IMAGE_BYTES_MAX: u64 = 32 << 20;

/// Limits small enough that running into them is cheap.
pub fn limits() -> Limits {
    Limits { tar_bytes_max: 8 << 20, data_bytes_max: 8 << 20, ..Limits::default() }
}

/// The pack of one blob and its bytes; `None` when the blob is refused.
pub fn pack_of(blob: &[u8]) -> Option<(Pack, Vec<u8>)> {
    let mut bytes = Vec::new();
    make_pack(blob, &mut bytes, &limits()).ok()?;
    let length = bytes.len() as u64;
    let pack = Pack::open(&bytes, length).expect("a pack just made opens");
    pack.verify_data(&bytes).expect("a pack just made is sound");
    Some((pack, bytes))
}

/// Folds packs, writes the image and reads it back with the independent reader: whatever the
/// layers were, a tree that comes out of them must make a sound image of as many names.
pub fn image_of(packs: &[(Pack, Vec<u8>)]) {
    let plain: Vec<&Pack> = packs.iter().map(|(pack, _)| pack).collect();
    let Ok(tree) = FileTree::flatten(plain.iter().copied(), &TreeLimits::default()) else { return };
    let regions: Vec<u64> = plain.iter().map(|pack| pack.data_blocks()).collect();
    let mut options = Options::new([1; 16], [2; 16], Size::FreeSpace { bytes: 0 });
    options.journal = false;
    let Ok(layout) = Layout::plan(&tree, &options, &regions) else { return };
    if layout.size_bytes() > IMAGE_BYTES_MAX {
        return;
    }
    let mut image = vec![0; layout.size_bytes() as usize];
    layout.write(&tree, &mut image).expect("a planned image can be written");
    for movement in layout.moves() {
        let from = (movement.region_block * ext4::BLOCK_SIZE) as usize;
        let to = (movement.image_block * ext4::BLOCK_SIZE) as usize;
        let length = (movement.blocks * ext4::BLOCK_SIZE) as usize;
        let data = &packs[movement.region as usize].1[from..from + length];
        image[to..to + length].copy_from_slice(data);
    }
    let reader = Image::open(&image).expect("our reader opens what our writer wrote");
    reader.verify().expect("our reader finds every checksum right");
    reader
        .walk(Default::default(), |path, node| {
            assert!(!path.windows(5).any(|w| w == b"/.wh."), "a whiteout became a name");
            if node.kind == ext4::reader::NodeKind::File {
                let mut content = reader.content(node)?;
                io::copy(&mut content, &mut io::sink()).expect("content can be read");
            }
            Ok::<(), ReadError>(())
        })
        .expect("our reader walks what our writer wrote");
}

/// A tar entry of a file with these contents, padded.
pub fn file(path: &[u8], content: &[u8]) -> Vec<u8> {
    let mut entry = entry(b'0', path, b"");
    entry[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    seal(&mut entry);
    entry.extend(content);
    entry.resize(entry.len().next_multiple_of(512), 0);
    entry
}

/// Puts the right sum into a header.
fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A tar entry: `kind` is its type flag, `path` at most 100 bytes, `link` likewise.
pub fn entry(kind: u8, path: &[u8], link: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &path[..path.len().min(100)]);
    put(100, b"0000644\x000000000\x000000000\x0000000000000\x0000000000001\x00        ");
    put(156, &[kind]);
    put(157, &link[..link.len().min(100)]);
    put(257, b"ustar\x0000");
    seal(&mut block);
    block
}
