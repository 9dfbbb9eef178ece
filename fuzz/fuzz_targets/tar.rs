//! A layer blob, compressed or not: from bytes to a pack to an image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|blob: &[u8]| {
    if let Some(pack) = fuzz::pack_of(blob) {
        fuzz::image_of(&[pack]);
    }
});
