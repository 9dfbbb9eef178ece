//! The tree a caller gives to the writer: inodes, names, extended attributes and where
//! file contents lie.
//!
//! This module knows nothing of ext4 and nothing of where a tree comes from: a container
//! image, a directory and a test all implement [`Tree`] alike. Contents are never handed
//! over as bytes; a file names [`Run`]s of blocks in *regions*, the writer decides where
//! every run lies in the image, and the caller moves the bytes there
//! (see `Layout::moves`).

use std::fmt;

/// Names one inode of a [`Tree`]: `0..tree.inode_count()`; `0` is the root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(pub u32);

impl InodeId {
    /// The root directory of every tree.
    pub const ROOT: Self = Self(0);
}

/// Names one set of extended attributes. The tree interns them: equal ids mean equal sets
/// and equal sets mean equal ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct XattrSetId(pub u32);

/// A point in time, counted from 1970-01-01 00:00:00 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp {
    /// Whole seconds, negative before 1970.
    pub secs: i64,
    /// Nanoseconds after `secs`, `0..1_000_000_000`.
    pub nanos: u32,
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A directory; its names come from [`Tree::entries`].
    Directory,
    /// A regular file; its blocks come from [`Tree::runs`].
    File {
        /// Length in bytes, holes included.
        size_bytes: u64,
    },
    /// A symbolic link.
    Symlink {
        /// What the link says, without a closing NUL.
        target: &'a [u8],
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// Everything about one inode but its names and blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode<'a> {
    /// What it is.
    pub kind: Kind<'a>,
    /// The low twelve mode bits: set-id, sticky, rwx.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification; the writer uses it for the other three times too.
    pub mtime: Timestamp,
    /// How many names point here. Ignored for directories.
    pub links: u32,
    /// Extended attributes, if any.
    pub xattrs: Option<XattrSetId>,
}

/// One name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name: 1 to 255 bytes, any but `/` and NUL, never `.` or `..`.
    pub name: &'a [u8],
    /// What the name points to.
    pub inode: InodeId,
}

/// One extended attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// The full name, for example `security.capability`.
    pub name: &'a [u8],
    /// The value as `getxattr(2)` gives it.
    pub value: &'a [u8],
}

/// A run of a file's 4 KiB blocks that lies in a region; blocks no run covers are holes.
///
/// Region `r` is a blob of 4 KiB blocks whose block `n` is at byte `n * 4096`. The last
/// block of a file is already padded with zeroes. No two runs of a tree share a block of a
/// region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// First block within the file.
    pub file_block: u64,
    /// Which region.
    pub region: u32,
    /// First block within the region.
    pub region_block: u64,
    /// Length in blocks.
    pub blocks: u64,
}

/// A file tree, as the writer reads it. The writer walks it more than once, and every walk
/// must give the same.
pub trait Tree {
    /// How many inodes there are; valid ids are `0..inode_count()`.
    fn inode_count(&self) -> u32;

    /// The inode `id`.
    fn inode(&self, id: InodeId) -> Inode<'_>;

    /// The names in `directory` without `.` and `..`, sorted by their bytes. Every directory
    /// but the root is the child of exactly one directory.
    fn entries(&self, directory: InodeId) -> impl Iterator<Item = Entry<'_>>;

    /// The attributes of `set`, sorted by name.
    fn xattrs(&self, set: XattrSetId) -> impl Iterator<Item = Xattr<'_>>;

    /// Where the contents of `file` lie, ascending by `file_block`, disjoint.
    fn runs(&self, file: InodeId) -> impl Iterator<Item = Run>;
}

impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {}", self.0)
    }
}

impl fmt::Display for XattrSetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "set {}", self.0)
    }
}
