//! Trees of every kind become images that every judge accepts.

use ext4::{InodeId, Size, Timestamp};

use crate::kernel::assert_mounts_as;
use crate::support::{Content, ImageFile, MemoryTree, options};

const ROOT: InodeId = InodeId::ROOT;

#[test]
fn an_empty_root_is_an_image() {
    let tree = MemoryTree::new();
    for journal in [true, false] {
        for bytes in [0, 1 << 20, 1 << 30] {
            let mut options = options();
            options.journal = journal;
            options.size = Size::FreeSpace { bytes };
            let image = ImageFile::build(&tree, &options);
            image.assert_clean();
            assert_mounts_as(&image, &tree);
        }
    }
}

pub(crate) fn a_bit_of_everything() -> MemoryTree {
    let mut tree = MemoryTree::new();
    let etc = tree.directory(ROOT, "etc");
    let deep = tree.directory(etc, "deep");
    for n in 0..300_u64 {
        tree.file(deep, format!("file-{n}"), 0, n * 97);
    }
    let file = tree.file(etc, "passwd", 0, 12345);
    tree.link(deep, "hard", file);
    tree.node(file).permissions = 0o4755;
    tree.node(file).uid = 1_000_000;
    tree.node(file).gid = 70_000;
    tree.holey(etc, "holey", 0, 5000);
    for length in [1, 59, 60, 61, 4095] {
        tree.add(etc, format!("link-{length}"), Content::Symlink(vec![b'x'; length]));
    }
    tree.add(etc, "null", Content::Char(1, 3));
    tree.add(etc, "wide", Content::Char(300, 70_000));
    tree.add(etc, "disk", Content::Block(8, 300));
    tree.add(etc, "fifo", Content::Fifo);
    tree.add(etc, "socket", Content::Socket);
    tree.add(etc, [b'n'; 255], Content::Fifo);
    tree.add(etc, b"not \xFF\xFE utf-8\n", Content::Fifo);
    tree.add(etc, "sparse", Content::File { size_bytes: 1 << 40, runs: vec![] });
    for (name, secs) in [("old", -86_400), ("late", 1 << 33), ("y2038", 1 << 31)] {
        let file = tree.add(etc, name, Content::File { size_bytes: 0, runs: vec![] });
        tree.node(file).mtime = Timestamp { secs, nanos: 999_999_999 };
    }
    let mut net_bind = [0; 20];
    (net_bind[3], net_bind[5]) = (2, 4); // version 2, CAP_NET_BIND_SERVICE
    let capability = tree.set(&[(b"security.capability", &net_bind)]);
    tree.node(file).xattrs = Some(capability);
    let many: Vec<_> = (0..20).map(|n| (format!("user.attribute-{n}"), vec![n; 100])).collect();
    let many: Vec<_> = many.iter().map(|(n, v)| (n.as_bytes(), v.as_slice())).collect();
    let many = tree.set(&many);
    tree.node(etc).xattrs = Some(many);
    tree
}

#[test]
fn a_bit_of_everything_is_clean_and_mounts_as_it_was_given() {
    let tree = a_bit_of_everything();
    let image = ImageFile::build(&tree, &options());
    image.assert_clean();
    assert_mounts_as(&image, &tree);
}
