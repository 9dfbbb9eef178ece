//! Images judged by `e2fsck`, the kernel, `resize2fs` and the crate's own reader.

mod chunks;
mod damage;
mod growth;
mod kernel;
mod limits;
mod random;
mod reread;
mod support;
mod writer;
