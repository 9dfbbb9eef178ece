//! Images judged by `e2fsck`, the kernel, `resize2fs` and the crate's own reader.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::wildcard_enum_match_arm,
    reason = "helpers of tests fail like tests do, on numbers the tests choose"
)]

mod chunks;
mod damage;
mod golden;
mod growth;
mod kernel;
mod limits;
mod random;
mod reread;
mod support;
mod writer;
