//! Why an image cannot be planned or written.

use std::io;

use crate::tree::{InodeId, XattrSetId};

/// Why a tree cannot become an image with the given options.
///
/// Variants name inodes by id; [`path_of`](crate::path_of) finds a path for people.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The options contradict themselves.
    #[error("option {option}: {problem}")]
    Option {
        /// The field of `Options`.
        option: &'static str,
        /// What is wrong with it, and what would be right.
        problem: &'static str,
    },
    /// Inode 0 is missing or no directory.
    #[error("inode 0 of the tree is not a directory")]
    RootNotDirectory,
    /// An entry points at an inode the tree does not have.
    #[error("directory {directory} names {inode}, which does not exist")]
    UnknownInode {
        /// The directory.
        directory: InodeId,
        /// What it names.
        inode: InodeId,
    },
    /// A name is empty, too long, `.`, `..`, or holds `/` or NUL.
    #[error("directory {directory} holds the unusable name {:?}", name.escape_ascii().to_string())]
    Name {
        /// The directory.
        directory: InodeId,
        /// The name.
        name: Vec<u8>,
    },
    /// Entries are not in ascending order of their bytes, or a name comes twice.
    #[error("directory {directory} is not sorted at {:?}", name.escape_ascii().to_string())]
    NameOrder {
        /// The directory.
        directory: InodeId,
        /// The name that is not greater than the one before.
        name: Vec<u8>,
    },
    /// A directory has more than one name, or contains itself.
    #[error("directory {inode} has more than one name")]
    DirectoryLinkedTwice {
        /// The directory.
        inode: InodeId,
    },
    /// More names than ext4 can count.
    #[error("inode {inode} has {links} names, ext4 allows 65000: replace hard links by copies")]
    TooManyLinks {
        /// The inode.
        inode: InodeId,
        /// Its names.
        links: u32,
    },
    /// The tree's own count of names is wrong.
    #[error("inode {inode} claims {claimed} names but has {found}")]
    LinkCount {
        /// The inode.
        inode: InodeId,
        /// What the tree says.
        claimed: u32,
        /// What its directories hold.
        found: u32,
    },
    /// `/lost+found` exists and is no directory.
    #[error("/lost+found must be a directory, {inode} is not: rename or remove it")]
    LostFoundNotDirectory {
        /// What has that name.
        inode: InodeId,
    },
    /// More names than an htree of two levels can index.
    #[error("directory {inode} with {entries} entries is larger than ext4 can index")]
    DirectoryTooLarge {
        /// The directory.
        inode: InodeId,
        /// Its entries.
        entries: usize,
    },
    /// A file longer than 2^32 - 1 blocks.
    #[error("file {inode} of {size_bytes} bytes is longer than ext4 allows")]
    FileTooLarge {
        /// The file.
        inode: InodeId,
        /// Its length.
        size_bytes: u64,
    },
    /// A symlink's target is empty, longer than 4095 bytes or holds a NUL.
    #[error("symlink {inode} has an unusable target of {length} bytes")]
    SymlinkTarget {
        /// The link.
        inode: InodeId,
        /// The target's length.
        length: usize,
    },
    /// A device number outside of 12 bits major, 20 bits minor.
    #[error("device {inode} has the number {major}:{minor}, Linux allows 4095:1048575")]
    Device {
        /// The device.
        inode: InodeId,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A run is empty, out of order, or outside of its file or region.
    #[error("file {inode} has an unusable run at its block {file_block}: {problem}")]
    Run {
        /// The file.
        inode: InodeId,
        /// Where the run begins.
        file_block: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// Extended attributes that ext4 cannot hold.
    #[error("attributes {set} of inode {inode} cannot be stored")]
    Xattr {
        /// An inode that has them.
        inode: InodeId,
        /// The set.
        set: XattrSetId,
        /// Why.
        source: XattrError,
    },
    /// The content does not fit into the requested size.
    #[error("the content needs an image of at least {needed_bytes} bytes, {size_bytes} were given")]
    TooSmall {
        /// The requested size.
        size_bytes: u64,
        /// The next size that fits.
        needed_bytes: u64,
    },
    /// More than 2^32 blocks or inodes.
    #[error("the image would need more than {limit} {what}")]
    TooLarge {
        /// Blocks or inodes.
        what: &'static str,
        /// How many are possible.
        limit: u64,
    },
}

impl LayoutError {
    /// The inode at fault, for [`path_of`](crate::path_of).
    #[must_use]
    pub fn inode(&self) -> Option<InodeId> {
        match *self {
            Self::RootNotDirectory
            | Self::Option { .. }
            | Self::TooSmall { .. }
            | Self::TooLarge { .. } => None,
            Self::Name { directory: inode, .. }
            | Self::NameOrder { directory: inode, .. }
            | Self::UnknownInode { directory: inode, .. }
            | Self::DirectoryLinkedTwice { inode }
            | Self::TooManyLinks { inode, .. }
            | Self::LinkCount { inode, .. }
            | Self::LostFoundNotDirectory { inode }
            | Self::DirectoryTooLarge { inode, .. }
            | Self::FileTooLarge { inode, .. }
            | Self::SymlinkTarget { inode, .. }
            | Self::Device { inode, .. }
            | Self::Run { inode, .. }
            | Self::Xattr { inode, .. } => Some(inode),
        }
    }
}

/// Why a set of extended attributes cannot be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    /// A name outside of the namespaces ext4 knows, empty after its prefix, or too long.
    #[error("the name {:?} is not one ext4 can store", name.escape_ascii().to_string())]
    Name {
        /// The full name.
        name: Vec<u8>,
    },
    /// The same name twice.
    #[error("the name {:?} comes twice", name.escape_ascii().to_string())]
    Duplicate {
        /// The full name.
        name: Vec<u8>,
    },
    /// A POSIX ACL that the kernel would refuse.
    #[error("{:?} is not a valid access control list: {problem}", name.escape_ascii().to_string())]
    Acl {
        /// The full name.
        name: Vec<u8>,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More than one block and the inode hold.
    #[error("names and values take {bytes} bytes beside the inode, one block holds {limit}")]
    TooLarge {
        /// What they take.
        bytes: usize,
        /// What there is.
        limit: usize,
    },
}

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The output failed.
    #[error("cannot write the image at byte {offset}")]
    Output {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The tree is not the one the layout was planned for.
    #[error("the tree differs from the one that was planned, at inode {inode}")]
    TreeChanged {
        /// The first inode that differs.
        inode: InodeId,
    },
}
