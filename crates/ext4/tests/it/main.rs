//! Images judged by `e2fsck`, the kernel, `resize2fs` and the crate's own reader.

mod kernel;
mod support;
mod writer;
