//! What the process of a build that somebody has taken over tells the one that has its commands run.
//! The first two bytes stand for the sizes of the files that it hands over.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|told: &[u8]| {
    let Some((sizes, text)) = told.split_at_checked(2) else { return };
    let sizes = [u64::from(sizes[0]) << 10, u64::from(sizes[1]) << 40];
    commands::testing::read_base(text, &sizes);
});
