//! The bytes themselves: whoever changes them says so by the revision.

use ext4::{InodeId, Options, Size, Timestamp};
use sha2::{Digest, Sha256};

use crate::support::{Content, ImageFile, MemoryTree};

/// Each revision with the SHA-256 over the images of [`everything`]. When the bytes change on
/// purpose, a line with the next revision is added; the lines before it stay.
const HISTORY: &[(u32, &str)] =
    &[(1, "8fe7a51ccf6d4fc143ea51a0817ab20691a4d57a0cfd21453a4c9dfc349dc4d6")];

/// A file owner with all rights, a named user, the group, the mask and others, as `setxattr` has it.
const ACL: &[u8] = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x05\0\xe8\x03\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x05\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";

/// Something of all that the writer knows how to write.
fn everything() -> MemoryTree {
    let mut tree = MemoryTree::new();
    let root = InodeId::ROOT;
    let upper = tree.region(2);
    for (at, size_bytes) in [0, 1, 4095, 4096, 4097, 600_000].into_iter().enumerate() {
        tree.file(root, format!("file-{at}"), (at % 2) as u32 * upper, size_bytes);
    }
    let shared = tree.file(root, "shared", upper, 9000);
    let many = tree.directory(root, "many");
    for n in 0..3000 {
        let id = tree.file(many, format!("a-name-of-some-length-{n}"), 0, 10);
        tree.node(id).uid = n;
    }
    let full = tree.directory(many, "\u{fc}ber");
    for n in 0..70 {
        tree.directory(full, n.to_string());
    }
    tree.link(full, "again", shared);
    tree.holey(root, "few-holes", 0, 4);
    tree.holey(root, "holes", upper, 1000);
    for length in [59, 60, 4095] {
        let link = Content::Symlink(vec![b'l'; length]);
        tree.add(root, format!("link-{length}"), link);
    }
    tree.add(root, "char", Content::Char(300, 70_000));
    tree.add(root, "block", Content::Block(8, 1));
    tree.add(root, "pipe", Content::Fifo);
    tree.add(root, "socket", Content::Socket);
    let small = tree.set(&[(b"user.a", b"1"), (b"security.capability", &[7; 20])]);
    let large =
        tree.set(&[(b"user.large", &[7; 3000]), (b"trusted.t", b""), (b"user.b", &[8; 80])]);
    let strange = tree.set(&[(b"user.\xff\x80", b"1"), (b"user.\xfe\x80", &[9; 500])]);
    let listed = tree.set(&[(b"system.posix_acl_access", ACL)]);
    for (n, set) in [small, large, large, strange, listed].into_iter().enumerate() {
        let id = tree.file(root, format!("attributes-{n}"), 0, 5);
        tree.node(id).xattrs = Some(set);
        tree.node(id).permissions = 0o6754;
    }
    for (n, secs) in
        [i64::MIN, -1, 0, 0x7fff_ffff, 0x8000_0000, 9_000_000_000, i64::MAX].into_iter().enumerate()
    {
        let id = tree.add(root, format!("time-{n}"), Content::Fifo);
        tree.node(id).mtime = Timestamp { secs, nanos: 999_999_999 };
    }
    tree
}

#[test]
fn the_bytes_change_with_the_revision_alone() {
    let tree = everything();
    let mut hash = Sha256::new();
    let sizes = [Size::FreeSpace { bytes: 0 }, Size::Exact { bytes: 160 << 20 }];
    for (size, journal) in sizes.into_iter().flat_map(|size| [(size, true), (size, false)]) {
        let mut options = Options::new([1; 16], [2; 16], size);
        options.journal = journal;
        options.boot_area = b"who made it".to_vec();
        options.clamp_mtime = journal.then_some(2_000_000_000);
        let image = ImageFile::build(&tree, &options);
        image.assert_clean();
        hash.update(std::fs::read(&image.path).unwrap());
    }
    let sum: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(HISTORY.is_sorted_by(|a, b| a.0 < b.0 && a.1 != b.1));
    assert_eq!(
        HISTORY.last(),
        Some(&(ext4::REVISION, sum.as_str())),
        "the bytes are not those of this revision: was that meant, then it is the next one"
    );
}
