//! Deterministic ext4 images: a pure writer and an independent reader.

mod tree;

pub use tree::{Entry, Inode, InodeId, Kind, Run, Timestamp, Tree, Xattr, XattrSetId};
