//! An ext4 image from anyone: open, verify, walk, read everything.
#![no_main]

use std::io::{self, Read};

use ext4::reader::{NodeKind, WalkLimits};
use ext4::{Image, ReadError};
use libfuzzer_sys::fuzz_target;

/// A sparse file may claim terabytes; what matters is seen at once.
const CONTENT_BYTES_MAX: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Ok(image) = Image::open(bytes) else { return };
    let _ = image.verify();
    let limits = WalkLimits { names_max: 10_000, depth_max: 64 };
    let _ = image.walk(limits, |path, node| {
        let _ = image.xattrs(node);
        match node.kind {
            NodeKind::File => {
                let mut content = image.content(node)?.take(CONTENT_BYTES_MAX);
                let _ = io::copy(&mut content, &mut io::sink());
            }
            NodeKind::Symlink => drop(image.symlink_target(node)),
            _ => {}
        }
        let _ = image.lookup(path);
        Ok::<(), ReadError>(())
    });
});
