//! Trees of every kind become images that every judge accepts.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use ext4::{InodeId, Options, Run, Size, Timestamp};

use crate::kernel::assert_mounts_as;
use crate::reread::assert_reads_as;
use crate::support::{Content, ImageFile, MemoryTree, options, size};

const ROOT: InodeId = InodeId::ROOT;

/// All judges at once; gives the image for more.
pub(crate) fn judge(tree: &MemoryTree, options: &Options) -> ImageFile {
    let image = ImageFile::build(tree, options);
    image.assert_clean();
    assert_reads_as(&image, tree);
    assert_mounts_as(&image, tree);
    image
}

#[test]
fn an_empty_root_is_an_image() {
    let tree = MemoryTree::new();
    for journal in [true, false] {
        for bytes in [0, 1 << 20, 1 << 30] {
            let mut options = options();
            options.journal = journal;
            options.size = Size::FreeSpace { bytes };
            judge(&tree, &options);
        }
    }
}

#[test]
fn an_image_from_the_future_is_no_less_clean() {
    let mut tree = MemoryTree::new();
    let file = tree.file(ROOT, "file", 0, 5000);
    // 2106, the year 4000 and the year 9999.
    for secs in [4_291_747_200, 64_060_588_800, 253_370_764_800] {
        tree.node(file).mtime = Timestamp { secs, nanos: 0 };
        let mut options = options();
        options.created = Timestamp { secs, nanos: 0 };
        ImageFile::build(&tree, &options).assert_clean();
    }
}

pub(crate) fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for &(tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
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
    tree.add(etc, "widest", Content::Block(4095, 0xF_FFFF));
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
    let mut many: Vec<_> = many.iter().map(|(n, v)| (n.as_bytes(), v.as_slice())).collect();
    let none = u32::MAX;
    let named = acl(&[(1, 7, none), (2, 5, 77), (4, 5, none), (16, 5, none), (32, 5, none)]);
    many.push((b"system.posix_acl_access", &named));
    many.push((b"system.posix_acl_default", &named));
    many.push((b"user.empty", b""));
    many.push((b"trusted.\xE9\xFF", b"a name that is not UTF-8"));
    let many = tree.set(&many);
    tree.node(etc).xattrs = Some(many);
    for (name, content) in [("short", vec![b's'; 20]), ("long", vec![b'l'; 200])] {
        let link = tree.add(deep, name, Content::Symlink(content));
        let set = tree.set(&[(b"trusted.note", &[7; 300])]);
        tree.node(link).xattrs = Some(set);
    }
    tree
}

#[test]
fn a_bit_of_everything_is_clean_and_mounts_as_it_was_given() {
    let tree = a_bit_of_everything();
    let image = judge(&tree, &options());
    let mut options = options();
    options.journal = false;
    judge(&tree, &options);
    if let Some(text) = image.run("dumpe2fs", &[]) {
        for expected in [
            "Filesystem volume name:   rootfs",
            "Filesystem features:      has_journal ext_attr resize_inode dir_index filetype extent 64bit flex_bg sparse_super large_file huge_file dir_nlink extra_isize metadata_csum",
            "Filesystem flags:         unsigned_directory_hash",
            "Default mount options:    user_xattr acl",
            "Errors behavior:          Remount read-only",
            "Checksum type:            crc32c",
            "Journal inode:            8",
            "Reserved block count:     0",
        ] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
    }
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let tree = a_bit_of_everything();
    let (first, second) =
        (ImageFile::build(&tree, &options()), ImageFile::build(&tree, &options()));
    assert!(std::fs::read(&first.path).unwrap() == std::fs::read(&second.path).unwrap());
    let mut other = options();
    other.uuid[0] ^= 1;
    let third = ImageFile::build(&tree, &other);
    assert!(std::fs::read(&first.path).unwrap() != std::fs::read(&third.path).unwrap());
}

#[test]
fn times_after_the_clamp_become_the_clamp() {
    let mut tree = MemoryTree::new();
    let mut options = options();
    options.clamp_mtime = Some(1_000_000_000);
    let early = tree.add(ROOT, "early", Content::Fifo);
    tree.node(early).mtime = Timestamp { secs: 999_999_999, nanos: 5 };
    let late = tree.add(ROOT, "late", Content::Fifo);
    tree.node(late).mtime = Timestamp { secs: 1_000_000_000, nanos: 1 };
    let image = ImageFile::build(&tree, &options);
    tree.node(late).mtime = Timestamp { secs: 1_000_000_000, nanos: 0 };
    tree.node(ROOT).mtime = Timestamp { secs: 1_000_000_000, nanos: 0 };
    assert_reads_as(&image, &tree);
}

#[test]
fn a_directory_of_very_many_files_has_an_index_of_two_levels() {
    let mut tree = MemoryTree::new();
    let big = tree.directory(ROOT, "big");
    // Long names fill the index with few files.
    let count = size(20_000, 200_000);
    for n in 0..count {
        let name = format!("{n:0>200}");
        let kind =
            if n % 2 == 0 { Content::Fifo } else { Content::File { size_bytes: 0, runs: vec![] } };
        tree.add(big, name, kind);
    }
    let image = judge(&tree, &options());
    if let Some(text) = image.run("debugfs", &["-R", "htree_dump /big"]) {
        assert!(text.contains("Indirect levels: 1"), "{}", &text[..600.min(text.len())]);
        assert!(text.contains("Hash Version: 1"));
    }
}

#[test]
fn a_directory_of_many_subdirectories_has_one_link() {
    let mut tree = MemoryTree::new();
    let wide = tree.directory(ROOT, "wide");
    for n in 0..64_999 {
        tree.directory(wide, format!("{n:x}"));
    }
    let full = tree.directory(ROOT, "full");
    for n in 0..size(1000, 64_998) {
        tree.directory(full, format!("{n:x}"));
    }
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 0 };
    judge(&tree, &options);
}

#[test]
fn names_with_equal_hashes_may_spread_over_leaves() {
    let colliding = colliding_names();
    let mut tree = MemoryTree::new();
    // Different fillers put the ends of leaves elsewhere: in some directory a pair is torn.
    for d in 0..60 {
        let directory = tree.directory(ROOT, format!("{d}"));
        for name in &colliding {
            tree.add(directory, name, Content::Fifo);
        }
        for n in 0..400 {
            tree.add(directory, format!("{d}-{n:0>100}"), Content::Fifo);
        }
    }
    let mut options = options();
    options.hash_seed = [0; 16];
    let image = judge(&tree, &options);
    // An odd hash in the index says that the leaf before ends with the same one.
    let dumps = (0..60).filter_map(|d| image.run("debugfs", &["-R", &format!("htree_dump /{d}")]));
    let dumps: Vec<_> = dumps.collect();
    let is_torn = |line: &&str| {
        let hash = line.split_once("Hash 0x").and_then(|(_, rest)| rest.split_once(','));
        line.contains("block")
            && hash.is_some_and(|(h, _)| h.ends_with(['1', '3', '5', '7', '9', 'b', 'd', 'f']))
    };
    let torn = dumps.iter().flat_map(|d| d.lines()).filter(is_torn).count();
    assert!(torn > 0 || dumps.is_empty(), "no pair was torn: {}", dumps[0]);
}

/// Pairs of names whose hashes are equal, found by birthday among very many.
fn colliding_names() -> Vec<Vec<u8>> {
    let mut by_hash: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut found = Vec::new();
    for n in 0..200_000_u32 {
        let name = format!("c{n}").into_bytes();
        let hash = crate::support::half_md4(&name);
        if let Some(other) = by_hash.insert(hash, name.clone()) {
            found.push(other);
            found.push(name);
        }
    }
    assert!(found.len() >= 4, "no collisions to test with");
    found
}

#[test]
fn attribute_names_of_any_bytes_are_hashed_as_e2fsck_expects() {
    let mut tree = MemoryTree::new();
    let file = tree.add(ROOT, "file", Content::File { size_bytes: 0, runs: vec![] });
    let set = tree.set(&[(b"trusted.\xE9\xFF\x80x", &[1; 200]), (b"user.\xC3\xA9", &[2; 201])]);
    tree.node(file).xattrs = Some(set);
    judge(&tree, &options());
}

#[test]
fn an_image_of_a_tebibyte_takes_no_time() {
    let tree = MemoryTree::new();
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 1 << 40 };
    let image = judge(&tree, &options);
    // A resize inode reaches 8 TiB beyond what the image has.
    assert!(image.summary.growth_bytes_max >= 9 << 40, "{:?}", image.summary);
}

#[test]
fn an_image_beyond_8_tebibytes_is_clean() {
    // From there on the resize inode's list of blocks begins anew. The largest file of the test
    // machine's ext4 is one block short of 2^32.
    let tree = a_bit_of_everything();
    let sizes = [9 << 40, ((1 << 32) - 1) * 4096];
    for bytes in sizes.into_iter().take(size(1, 2) as usize) {
        let mut options = options();
        options.size = Size::Exact { bytes };
        let image = ImageFile::build(&tree, &options);
        assert_eq!(image.summary.image_bytes, bytes);
        assert_eq!(image.summary.growth_bytes_max, 16 << 40);
        image.assert_clean();
        assert_mounts_as(&image, &tree);
    }
}

#[test]
fn holes_may_be_at_both_ends_of_a_file_of_any_length() {
    let mut tree = MemoryTree::new();
    let longest = u64::from(u32::MAX);
    for (name, blocks, at) in [
        ("last", longest, longest - 1),
        ("first", longest, 0),
        ("middle", 1 << 30, 1 << 20),
        ("short", 3, 1),
    ] {
        let run = tree.allocate(0, 1).unwrap();
        let runs = vec![Run { file_block: at, ..run }];
        tree.add(ROOT, name, Content::File { size_bytes: blocks * 4096, runs });
    }
    // Its end is no block's.
    let run = tree.allocate(0, 1).unwrap();
    let size_bytes = (1 << 33) + 1;
    tree.add(ROOT, "odd", Content::File { size_bytes, runs: vec![run] });
    let image = judge(&tree, &options());
    let Some(mount) = image.mount("ro") else { return };
    let mut bytes = [0; 4096];
    let last = std::fs::File::open(mount.path().join("last")).unwrap();
    last.read_exact_at(&mut bytes, (longest - 1) * 4096).unwrap();
    assert!(bytes == tree.regions[0].block(0));
    last.read_exact_at(&mut bytes, (longest - 2) * 4096).unwrap();
    assert!(bytes == [0; 4096]);
}

#[test]
fn a_fragmented_file_has_a_tree_of_any_depth() {
    let mut tree = MemoryTree::new();
    for runs in [4, 5, 340 * 4, 340 * 4 + 1, size(20_000, 480_000).into()] {
        tree.holey(ROOT, format!("holey-{runs}"), 0, runs);
    }
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 0 };
    judge(&tree, &options);
}

#[test]
fn runs_that_lie_side_by_side_become_one_extent() {
    let mut tree = MemoryTree::new();
    let region = tree.region(9);
    let whole = tree.allocate(region, 300).unwrap();
    let runs: Vec<_> = (0..300)
        .map(|n| Run { file_block: n, region, region_block: whole.region_block + n, blocks: 1 })
        .collect();
    tree.add(ROOT, "joined", Content::File { size_bytes: 300 * 4096, runs });
    let image = judge(&tree, &options());
    let image = ext4::Image::open(std::fs::File::open(&image.path).unwrap()).unwrap();
    let node = image.lookup(b"/joined").unwrap();
    assert_eq!(image.extents(&node).unwrap().len(), 1);
}

#[test]
fn attributes_of_every_length_go_where_they_fit() {
    let mut tree = MemoryTree::new();
    // Around the 88 bytes beside an inode, alone and in company, and around those of a block.
    for length in (40..=90).chain(4000..=4040) {
        let value = vec![7; length];
        let alone = tree.set(&[(b"user.a", &value)]);
        let company = tree.set(&[(b"security.s", b"x"), (b"user.a", &value), (b"user.b", &[1; 9])]);
        for (kind, set) in [("alone", alone), ("company", company)] {
            let content = Content::File { size_bytes: 0, runs: vec![] };
            let file = tree.add(ROOT, format!("{kind}-{length}"), content);
            tree.node(file).xattrs = Some(set);
        }
    }
    let of_root = tree.set(&[(b"trusted.root", &[1; 500])]);
    tree.node(ROOT).xattrs = Some(of_root);
    judge(&tree, &options());
}

#[test]
fn an_attribute_block_is_shared_by_up_to_1024_inodes() {
    let mut tree = MemoryTree::new();
    let shared = tree.set(&[(b"trusted.shared", &[5; 500])]);
    for n in 0..2500 {
        let file = tree.add(ROOT, format!("{n}"), Content::Fifo);
        tree.node(file).xattrs = Some(shared);
    }
    let alone = tree.set(&[(b"trusted.alone", &[5; 4000])]);
    let file = tree.add(ROOT, "alone", Content::Fifo);
    tree.node(file).xattrs = Some(alone);
    let image = judge(&tree, &options());
    let image = ext4::Image::open(std::fs::File::open(&image.path).unwrap()).unwrap();
    image.verify().unwrap();
}

#[test]
fn a_lost_found_of_the_tree_is_used() {
    let mut tree = MemoryTree::new();
    let own = tree.directory(ROOT, "lost+found");
    tree.node(own).permissions = 0o711;
    tree.node(own).uid = 5;
    tree.add(own, "found", Content::Fifo);
    judge(&tree, &options());
}

#[test]
fn the_boot_area_comes_before_the_superblock() {
    let mut options = options();
    options.boot_area = (0..1024).map(|n| n as u8).collect();
    let image = judge(&MemoryTree::new(), &options);
    let read = ext4::Image::open(std::fs::File::open(&image.path).unwrap()).unwrap();
    assert_eq!(read.boot_area().as_slice(), options.boot_area);
}

#[test]
fn a_tree_of_many_small_files_gets_the_groups_its_inodes_need() {
    let mut tree = MemoryTree::new();
    for d in 0..10 {
        let directory = tree.directory(ROOT, format!("{d}"));
        for n in 0..7000 {
            tree.add(directory, format!("{n}"), Content::Fifo);
        }
    }
    let mut options = options();
    options.size = Size::FreeSpace { bytes: 0 };
    let image = judge(&tree, &options);
    assert!(image.summary.inodes >= 70_000 + 7_000, "{:?}", image.summary);
}

#[test]
fn free_space_is_what_an_unprivileged_user_sees() {
    let tree = a_bit_of_everything();
    for bytes in [1 << 20, 100 << 20, 3 << 30] {
        let mut options = options();
        options.size = Size::FreeSpace { bytes };
        let image = ImageFile::build(&tree, &options);
        image.assert_clean();
        let Some(mount) = image.mount("rw") else { return };
        let found = rustix::fs::statvfs(mount.path()).unwrap();
        let available = found.f_bavail * found.f_frsize;
        assert!(available >= bytes, "{available} of {bytes}");
        assert!(available < bytes + (1 << 20), "{available} is much more than {bytes}");
    }
}
