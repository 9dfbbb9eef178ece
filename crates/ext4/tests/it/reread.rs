//! What the crate's own reader sees, compared with the tree.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;

use ext4::reader::{Node, NodeKind, WalkLimits};
use ext4::{BLOCK_SIZE, Image, InodeId, ReadAt, ReadError, Tree};

use crate::support::{Attributes, Content, ImageFile, MemoryTree};

/// Compares everything, and has the reader check all checksums, counts and owners.
pub(crate) fn assert_reads_as(image: &ImageFile, tree: &MemoryTree) {
    let image_file = Image::open(File::open(&image.path).unwrap()).unwrap();
    let verified = image_file.verify().unwrap();
    let summary = &image.summary;
    assert_eq!(verified.inodes, summary.inodes_used);
    assert_eq!(verified.directories, summary.directories);
    assert_eq!(verified.blocks, summary.blocks - summary.blocks_free);
    assert_eq!(image_file.superblock().free_blocks, summary.blocks_free);
    let expected = paths(tree);
    let mut inodes = HashMap::new();
    let mut count = 0;
    image_file
        .walk(WalkLimits::default(), |path, node| {
            if path == b"/lost+found" && !expected.contains_key(path) {
                assert_eq!((node.permissions, node.uid, node.gid), (0o700, 0, 0));
                assert_eq!(image_file.entries(node)?, []);
                return Ok(());
            }
            let context = path.escape_ascii().to_string();
            let id = *expected.get(path).unwrap_or_else(|| panic!("{context} is not in the tree"));
            assert_eq!(*inodes.entry(node.ino).or_insert(id), id, "{context} is another inode");
            count += 1;
            compare(&image_file, tree, id, node, &context)
        })
        .unwrap_or_else(|e: ReadError| panic!("{e}"));
    assert_eq!(count, expected.len(), "paths are missing");
}

fn paths(tree: &MemoryTree) -> HashMap<Vec<u8>, InodeId> {
    let mut paths = HashMap::from([(b"/".to_vec(), InodeId::ROOT)]);
    let mut stack = vec![(Vec::new(), InodeId::ROOT)];
    while let Some((path, directory)) = stack.pop() {
        for entry in tree.entries(directory) {
            let path = [&path, &b"/"[..], entry.name].concat();
            if matches!(tree.nodes[entry.inode.0 as usize].content, Content::Directory(_)) {
                stack.push((path.clone(), entry.inode));
            }
            paths.insert(path, entry.inode);
        }
    }
    paths
}

fn compare<R: ReadAt>(
    image: &Image<R>,
    tree: &MemoryTree,
    id: InodeId,
    found: &Node,
    context: &str,
) -> Result<(), ReadError> {
    let node = &tree.nodes[id.0 as usize];
    assert_eq!(found.permissions, node.permissions, "mode of {context}");
    assert_eq!((found.uid, found.gid), (node.uid, node.gid), "owner of {context}");
    for time in [found.atime, found.ctime, found.mtime, found.crtime] {
        assert_eq!(time, node.mtime, "times of {context}");
    }
    let attributes: Attributes =
        image.xattrs(found)?.into_iter().map(|x| (x.name, x.value)).collect();
    assert_eq!(attributes, tree.attributes(id), "attributes of {context}");
    if found.kind != NodeKind::Directory {
        assert_eq!(u32::from(found.links), node.links, "links of {context}");
    }
    match &node.content {
        Content::Directory(_) => assert_eq!(found.kind, NodeKind::Directory, "{context}"),
        Content::File { size_bytes, runs } => {
            assert_eq!(found.size_bytes, *size_bytes, "size of {context}");
            let blocks: u64 = image.extents(found)?.iter().map(|e| e.blocks).sum();
            assert_eq!(blocks, runs.iter().map(|r| r.blocks).sum::<u64>(), "{context}");
            if *size_bytes < 1 << 28 {
                let mut bytes = Vec::new();
                image.content(found)?.read_to_end(&mut bytes).unwrap();
                assert!(bytes == tree.content(id), "bytes of {context}");
            }
            assert!(found.sectors * 512 >= blocks * BLOCK_SIZE);
        }
        Content::Symlink(target) => {
            assert_eq!(&image.symlink_target(found)?, target, "target of {context}");
        }
        Content::Char(major, minor) => {
            let kind = NodeKind::CharDevice { major: *major, minor: *minor };
            assert_eq!(found.kind, kind, "{context}");
        }
        Content::Block(major, minor) => {
            let kind = NodeKind::BlockDevice { major: *major, minor: *minor };
            assert_eq!(found.kind, kind, "{context}");
        }
        Content::Fifo => assert_eq!(found.kind, NodeKind::Fifo, "{context}"),
        Content::Socket => assert_eq!(found.kind, NodeKind::Socket, "{context}"),
    }
    Ok(())
}
