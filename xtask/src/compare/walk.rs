//! A directory tree as data: everything a kernel tells about it. Knows nothing of images.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// One name in a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    /// Names of the inode; 0 for directories, where file systems differ.
    pub(crate) links: u64,
    /// The first name (in byte order) of the same inode.
    pub(crate) twin: Vec<u8>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File { size: u64, sha256: [u8; 32] },
    Symlink { target: Vec<u8> },
    CharDevice { device: u64 },
    BlockDevice { device: u64 },
    Fifo,
    Socket,
}

/// Paths relative to the root (the root itself is empty) with what lies there.
pub(crate) type Tree = BTreeMap<Vec<u8>, Entry>;

/// Reads a whole tree. Extended attributes of root alone are seen by root alone.
pub(crate) fn walk(root: &Path) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut names_of: HashMap<(u64, u64), Vec<Vec<u8>>> = HashMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        // Joining an empty path would add a slash, which follows a link.
        let path = if relative.as_os_str().is_empty() { root.into() } else { root.join(&relative) };
        let metadata =
            path.symlink_metadata().with_context(|| format!("cannot stat {}", path.display()))?;
        let name = relative.as_os_str().as_bytes().to_vec();
        if metadata.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                todo.push(relative.join(entry?.file_name()));
            }
        } else if metadata.nlink() > 1 {
            let inode = (metadata.dev(), metadata.ino());
            names_of.entry(inode).or_default().push(name.clone());
        }
        let entry =
            entry(&path, &metadata).with_context(|| format!("cannot read {}", path.display()))?;
        tree.insert(name, entry);
    }
    for mut names in names_of.into_values() {
        names.sort();
        for name in &names {
            if let Some(entry) = tree.get_mut(name) {
                entry.twin.clone_from(&names[0]);
            }
        }
    }
    Ok(tree)
}

fn entry(path: &Path, metadata: &Metadata) -> Result<Entry> {
    let kind = metadata.file_type();
    let kind = if kind.is_dir() {
        Kind::Directory
    } else if kind.is_file() {
        Kind::File { size: metadata.len(), sha256: sha256_of(path)? }
    } else if kind.is_symlink() {
        Kind::Symlink { target: std::fs::read_link(path)?.into_os_string().into_vec() }
    } else if kind.is_char_device() {
        Kind::CharDevice { device: metadata.rdev() }
    } else if kind.is_block_device() {
        Kind::BlockDevice { device: metadata.rdev() }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else {
        Kind::Socket
    };
    Ok(Entry {
        links: if kind == Kind::Directory { 0 } else { metadata.nlink() },
        kind,
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        twin: Vec::new(),
        xattrs: xattrs(path)?,
    })
}

/// SHA-256 of a file's content.
pub(crate) fn sha256_of(path: &Path) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 128 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
    }
    Ok(hash.finalize().into())
}

/// All extended attributes of a path, links not followed.
pub(crate) fn xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0_u8; 64 * 1024];
    let count = rustix::fs::llistxattr(path, &mut names[..])?;
    let mut found = BTreeMap::new();
    for name in names[..count].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0_u8; 64 * 1024];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..])?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
