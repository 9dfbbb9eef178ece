//! Paths and whiteouts over several layers.
//!
//! A line is an entry, its last byte the kind; an empty line starts the next layer.
#![no_main]

use libfuzzer_sys::fuzz_target;

const LAYERS_MAX: usize = 6;

fuzz_target!(|script: &[u8]| {
    let mut packs = Vec::new();
    let lines: Vec<&[u8]> = script.split(|byte| *byte == b'\n').collect();
    for layer in lines.split(|line| line.is_empty()).take(LAYERS_MAX) {
        let mut tar = Vec::new();
        for line in layer {
            let Some((last, path)) = line.split_last() else { continue };
            let kind = b"0052116"[usize::from(*last) % 7];
            // A link points at what an earlier half of the path names.
            let link = if matches!(kind, b'1' | b'2') { &path[path.len() / 2..] } else { b"" };
            tar.extend(fuzz::entry(kind, path, link));
        }
        match fuzz::pack_of(&tar) {
            Some(pack) => packs.push(pack),
            None => return,
        }
    }
    fuzz::image_of(&packs);
});
