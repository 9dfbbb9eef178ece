//! What a kernel sees in a mounted image, compared with the tree.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use ext4::{BLOCK_SIZE, InodeId, Tree};

use crate::support::{Attributes, Content, ImageFile, MemoryTree};

/// Compares everything: names, types, modes, owners, times, links, attributes, contents.
pub(crate) fn assert_mounts_as(image: &ImageFile, tree: &MemoryTree) {
    let Some(mount) = image.mount("ro") else { return };
    let mut seen = HashMap::new();
    compare(tree, InodeId::ROOT, mount.path(), &mut seen);
}

fn compare(tree: &MemoryTree, id: InodeId, path: &Path, seen: &mut HashMap<u64, InodeId>) {
    let node = &tree.nodes[id.0 as usize];
    let found = path.symlink_metadata().unwrap();
    let context = path.display();
    assert_eq!(found.mode() & 0o7777, u32::from(node.permissions), "mode of {context}");
    assert_eq!((found.uid(), found.gid()), (node.uid, node.gid), "owner of {context}");
    let time = (node.mtime.secs, i64::from(node.mtime.nanos));
    assert_eq!((found.mtime(), found.mtime_nsec()), time, "mtime of {context}");
    assert_eq!((found.atime(), found.atime_nsec()), time, "atime of {context}");
    assert_eq!((found.ctime(), found.ctime_nsec()), time, "ctime of {context}");
    assert_eq!(attributes(path), tree.attributes(id), "attributes of {context}");
    assert_eq!(*seen.entry(found.ino()).or_insert(id), id, "{context} is another inode");
    if !matches!(node.content, Content::Directory(_)) {
        assert_eq!(found.nlink(), u64::from(node.links), "links of {context}");
    }
    let kind = found.file_type();
    let device = |major: u32, minor: u32| rustix::fs::makedev(major, minor);
    match &node.content {
        Content::Directory(_) => compare_directory(tree, id, path, seen),
        Content::File { size_bytes, runs } => {
            assert!(kind.is_file(), "{context}");
            assert_eq!(found.size(), *size_bytes, "size of {context}");
            let blocks: u64 = runs.iter().map(|r| r.blocks).sum();
            assert!(found.blocks() * 512 >= blocks * BLOCK_SIZE, "{context} lacks blocks");
            if *size_bytes < 1 << 28 {
                assert!(std::fs::read(path).unwrap() == tree.content(id), "bytes of {context}");
            }
        }
        Content::Symlink(target) => {
            let found = std::fs::read_link(path).unwrap();
            assert_eq!(found.as_os_str().as_bytes(), target, "target of {context}");
        }
        Content::Char(major, minor) => {
            assert!(kind.is_char_device() && found.rdev() == device(*major, *minor), "{context}");
        }
        Content::Block(major, minor) => {
            assert!(kind.is_block_device() && found.rdev() == device(*major, *minor), "{context}");
        }
        Content::Fifo => assert!(kind.is_fifo(), "{context}"),
        Content::Socket => assert!(kind.is_socket(), "{context}"),
    }
}

fn compare_directory(
    tree: &MemoryTree,
    id: InodeId,
    path: &Path,
    seen: &mut HashMap<u64, InodeId>,
) {
    let mut names: Vec<Vec<u8>> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
        .collect();
    names.sort_unstable();
    let mut expected: Vec<_> = tree.entries(id).map(|e| e.name.to_vec()).collect();
    if id == InodeId::ROOT && !expected.iter().any(|n| n == b"lost+found") {
        expected.push(b"lost+found".to_vec());
        expected.sort_unstable();
    }
    assert_eq!(names, expected, "names in {}", path.display());
    let is_directory =
        |id: InodeId| matches!(tree.nodes[id.0 as usize].content, Content::Directory(_));
    let lost_found =
        u64::from(id == InodeId::ROOT && tree.entries(id).all(|e| e.name != b"lost+found"));
    let subdirectories =
        tree.entries(id).filter(|e| is_directory(e.inode)).count() as u64 + lost_found;
    let links = if subdirectories + 2 > 65_000 { 1 } else { subdirectories + 2 };
    assert_eq!(path.symlink_metadata().unwrap().nlink(), links, "links of {}", path.display());
    for entry in tree.entries(id) {
        compare(tree, entry.inode, &path.join(OsStr::from_bytes(entry.name)), seen);
    }
}

pub(crate) fn attributes(path: &Path) -> Attributes {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(&path, &mut names[..]).unwrap();
    let mut found = Attributes::new();
    for name in names[..length].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let key = CString::new(name).unwrap();
        let length = rustix::fs::lgetxattr(&path, &key, &mut value[..]).unwrap();
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    found
}
