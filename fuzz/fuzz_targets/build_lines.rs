//! What the process of a build says that somebody has taken over.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|lines: &[u8]| builderd::testing::read_build(lines));
