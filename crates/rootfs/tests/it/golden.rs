//! What packs and trees are, to the last byte: whoever changes them says so by a number.

use ext4::{InodeId, Tree};
use sha2::{Digest, Sha256};

use crate::support::{Image, Layer, flatten, header, pack};

/// Each version with the SHA-256 over the packs of [`layers`]. When packs change on purpose, be it
/// by what is read out of a tar, a line with the next version is added; the lines before it stay.
const PACKS: &[(u32, &str)] = &[
    (2, "02ec3f73e52e03717cf124b90d18352347d7f7da7d1cfebab6ba90d6bf50e4fc"),
    (3, "f0093b302e7c9dda8c907dd64e1da0c7875915160e3825e27a39e2cf94c26fed"),
];

/// The same of the tree that the packs make, as [`told`] tells it.
const TREES: &[(u32, &str)] =
    &[(1, "93f0a3b742e21bee7ca45f298e3313431c26a6f43244fb4a3c4ef550a64a3c11")];

const ACL: &[u8] = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x05\0\xe8\x03\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x07\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";

/// Something of all that layers can say.
fn layers() -> [Layer; 3] {
    let bottom = Layer::new()
        .dir_mode("./", 0o711)
        .dir("usr")
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("mtime", b"-5.25"), ("uid", b"3000000000")])
        .file("usr/a", &"abc".repeat(5000))
        .pax(&[("SCHILY.xattr.security.capability", &[1; 20])])
        .file("usr/b", "b")
        .pax(&[("GNU.sparse.size", b"81920"), ("GNU.sparse.map", b"0,5,40960,3")])
        .entry(&header("s", b'0').size(8), b"helloabc")
        .symlink("l", "usr/a")
        .pax(&[("SCHILY.xattr.user.on-a-link", b"1"), ("LIBARCHIVE.xattr.user.other", b"eA==")])
        .symlink("attributed", "usr/a")
        .hard_link("h", "usr/b")
        .hard_link("early", "late")
        .pax(&[("SCHILY.xattr.system.posix_acl_access", ACL)])
        .entry(&header("late", b'0').mode(0o6751).owner(u64::from(u32::MAX >> 11), 5), &[])
        .entry(&header("c", b'3').device(1, 3), &[])
        .entry(&header("k", b'4').device(8, 1), &[])
        .entry(&header("p", b'6').mode(0o600).mtime(7), &[])
        .pax(&[("SCHILY.xattr.user.d", b"1"), ("SCHILY.xattr.trusted.overlay.opaque", b"y")])
        .dir("opt")
        .file("opt/gone", "1")
        .file("was/a-directory", "1")
        .long_name(&[b'n'; 200])
        .file("cut", "long");
    let middle = Layer::new()
        .whiteout("usr/gone")
        .opaque("opt")
        .file("opt/stays", "2")
        .pax(&[("SCHILY.xattr.user.b", b"2")])
        .hard_link("linked", "usr/a")
        .file("l/inside", "3")
        .file("implied/by/this", "4");
    let top = Layer::new()
        .dir_mode("usr", 0o1777)
        .pax(&[("SCHILY.xattr.user.d", b"2")])
        .dir_mode("usr", 0o1770)
        .whiteout("c")
        .entry(&header("k", b'3'), &[])
        .file("was", "now a file")
        .file("implied/by/that", &"x".repeat(4097));
    [bottom, middle, top]
}

fn sum(parts: &[Vec<u8>]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One line for each name: whose inode, what it is, its metadata and where its blocks lie.
fn told(image: &Image) -> String {
    let tree = &image.tree;
    let mut lines = vec![line(image, "/", InodeId::ROOT)];
    for (path, id) in image.paths() {
        lines.push(line(image, &path.escape_ascii().to_string(), id));
    }
    lines.push(format!("{} inodes, {} regions", tree.inode_count(), tree.region_count()));
    lines.join("\n")
}

fn line(image: &Image, path: &str, id: InodeId) -> String {
    let inode = image.tree.inode(id);
    let attributes: Vec<_> = inode
        .xattrs
        .into_iter()
        .flat_map(|set| image.tree.xattrs(set))
        .map(|it| format!("{}={}", it.name.escape_ascii(), it.value.escape_ascii()))
        .collect();
    let runs: Vec<_> = image.tree.runs(id).collect();
    let ext4::Inode { kind, permissions, uid, gid, mtime, links, xattrs: _ } = inode;
    format!(
        "{path} {id:?} {kind:?} {permissions:o} {uid}:{gid} {mtime:?} {links} {attributes:?} {runs:?}"
    )
}

#[test]
fn packs_change_with_their_version_alone() {
    let packs = layers().map(|layer| pack(&layer.end()).unwrap().1);
    assert!(PACKS.is_sorted_by(|a, b| a.0 < b.0 && a.1 != b.1));
    assert_eq!(
        PACKS.last(),
        Some(&(rootfs::PACK_VERSION, sum(&packs).as_str())),
        "the packs are not those of this version: was that meant, then it is the next one"
    );
}

#[test]
fn trees_change_with_their_revision_alone() {
    let tree = told(&flatten(&layers()));
    assert!(TREES.is_sorted_by(|a, b| a.0 < b.0 && a.1 != b.1));
    assert_eq!(
        TREES.last(),
        Some(&(rootfs::TREE_REVISION, sum(&[tree.clone().into_bytes()]).as_str())),
        "the tree is not that of this revision: was that meant, then it is the next one\n{tree}"
    );
}
