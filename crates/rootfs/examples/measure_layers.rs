//! Packs layer blobs, lowest first, folds them into one tree and prints how long each took:
//! `cargo run --release -p rootfs --example measure_layers -- LAYER…`

use std::error::Error;
use std::fs::File;
use std::time::Instant;

use ext4::Tree;
use rootfs::{FileTree, Limits, Pack, TreeLimits, make_pack};

fn main() -> Result<(), Box<dyn Error>> {
    let mut packs = Vec::new();
    for path in std::env::args_os().skip(1) {
        let mut out = tempfile::tempfile()?;
        let start = Instant::now();
        let summary = make_pack(File::open(&path)?, &mut out, &Limits::default())?;
        let took = start.elapsed();
        println!(
            "{}: {:?}; {} bytes became {}, {} of them contents; {} entries in {} bytes",
            path.display(),
            took,
            summary.blob_bytes,
            summary.tar_bytes,
            summary.data_bytes,
            summary.entries,
            summary.toc_bytes
        );
        packs.push((out, summary.pack_bytes));
    }
    let start = Instant::now();
    let packs = packs.iter().map(|(file, length)| Pack::open(file, *length));
    let tree = FileTree::flatten(packs.collect::<Result<Vec<_>, _>>()?, &TreeLimits::default())?;
    println!("{} inodes folded in {:?}", tree.inode_count(), start.elapsed());
    for size in tree.biggest_directories(5) {
        println!("  /{}: {} bytes in {} files", size.path.escape_ascii(), size.bytes, size.files);
    }
    Ok(())
}
