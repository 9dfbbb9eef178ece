//! Deterministic ext4 images: a pure writer and an independent reader.
//!
//! A caller describes files as a [`Tree`]; [`Layout::plan`] decides how large the image is and
//! where everything lies; [`Layout::write`] produces the metadata, and [`Layout::moves`] says
//! which runs of file contents to bring where. The same tree and [`Options`] give the same
//! bytes, always.
//!
//! The crate knows nothing of containers, layers, files of the host or time. It needs no
//! privileges, starts no program and contains no `unsafe`. `docs/ext4.md` describes the images.

mod directory;
mod error;
mod extent;
mod format;
mod geometry;
mod hash;
mod journal;
mod layout;
mod options;
mod output;
mod placement;
pub mod reader;
mod survey;
mod tree;
mod writer;
mod xattr;

pub use error::{LayoutError, WriteError, XattrError};
pub use format::{BLOCK_SIZE, Superblock};
pub use layout::{Layout, Summary, path_of};
pub use options::{Options, Size};
pub use output::Output;
pub use placement::Move;
pub use reader::{Image, ReadAt, ReadError};
pub use tree::{Entry, Inode, InodeId, Kind, Run, Timestamp, Tree, Xattr, XattrSetId};

/// Counts the changes of the bytes that [`Layout::write`] and [`Layout::moves`] make of a tree and
/// options. Images of one revision are equal where these are; between revisions they need not be.
pub const REVISION: u32 = 1;
