//! What the worker of a layer or an image says that somebody has taken over.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|lines: &[u8]| {
    builderd::testing::read_pack(lines);
    builderd::testing::read_image(lines);
});
