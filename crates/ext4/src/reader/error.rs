//! Why an image cannot be read.

use std::io;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The source failed.
    #[error("cannot read the image at byte {offset}")]
    Io {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// There is no ext superblock.
    #[error("this is not an ext4 image")]
    NotExt4,
    /// The image was not unmounted: what it says may be old.
    #[error("the journal holds changes that are not in place: run e2fsck on the image first")]
    JournalNotReplayed,
    /// The image uses something this reader does not know.
    #[error("the image uses {what}, which this reader does not know ({bits:#x})")]
    Unsupported {
        /// What.
        what: &'static str,
        /// The feature or flag bits that say so.
        bits: u32,
    },
    /// A checksum is wrong.
    #[error("{what} {number} has a wrong checksum")]
    Checksum {
        /// What kind of structure.
        what: &'static str,
        /// Which: a group, inode or block number.
        number: u64,
    },
    /// Something contradicts itself or points where it must not.
    #[error("{what} {number} is damaged: {problem}")]
    Damaged {
        /// What kind of structure.
        what: &'static str,
        /// Which: a group, inode or block number.
        number: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// A path has no inode.
    #[error("{:?} does not exist in the image", path.escape_ascii().to_string())]
    NotFound {
        /// The whole path.
        path: Vec<u8>,
    },
    /// A directory was expected.
    #[error("inode {ino} is not a directory")]
    NotDirectory {
        /// The inode.
        ino: u32,
    },
    /// A file or symlink was expected.
    #[error("inode {ino} has no contents to read")]
    NoContent {
        /// The inode.
        ino: u32,
    },
    /// The image holds more than the caller allowed.
    #[error("the image holds more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
}
