//! Container layers become one file tree, in memory.
//!
//! Two steps, each a pure function:
//!
//! 1. [`make_pack`] turns one layer blob (a tar, compressed or not) into a *layer pack*:
//!    file contents aligned to 4 KiB blocks, beside a table of contents.
//! 2. [`FileTree::flatten`] folds the tables of contents of several packs, bottom first, into
//!    one [`FileTree`] as an overlay mount would show it. The tree implements
//!    [`ext4::Tree`]; file contents stay where they are, in the packs.
//!
//! # What this crate does not know
//!
//! No registry, manifest or digest of a blob (the caller hashes what he feeds), no path of
//! the host (nothing is ever unpacked), no clock, no environment, no on-disk format of a
//! file system. It trusts neither the blob nor the pack: every size is bounded by [`Limits`]
//! and [`TreeLimits`], and a limit reached is an error, never a silent cut.

mod build;
mod data;
mod flatten;
mod inflate;
mod limits;
mod pack;
mod path;
mod pax;
mod sparse;
mod table;
mod tally;
mod tar;
mod toc;
mod tree;
mod upper;
mod varint;
mod whiteout;
mod xattr;

pub use flatten::{FlattenError, FlattenProblem, Folder};
pub use inflate::Compression;
pub use limits::{Limits, TreeLimits};
pub use pack::{
    PACK_VERSION, Pack, PackError, PackReadError, PackSummary, ReadAt, make_pack, make_pack_of,
};
pub use path::PathProblem;
pub use tally::Tally;
pub use tar::{TarError, TarProblem};
pub use toc::{Blocks, Entries, Metadata, TocEntry, TocKind};
pub use tree::{DirectorySize, FileTree};

/// Size of a block of file contents, in packs and in trees.
pub const BLOCK_BYTES: u64 = 4096;

/// Counts the changes of the trees that [`FileTree::flatten`] makes of the same packs. What packs
/// say of the same layer is counted by [`PACK_VERSION`].
pub const TREE_REVISION: u32 = 1;
