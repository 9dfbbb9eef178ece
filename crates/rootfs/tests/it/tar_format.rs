//! Everything honest programs write into tars.

use ext4::{Kind, Timestamp, Tree};

use crate::support::{Header, Layer, flatten, header, pack, pack_error};

fn one(layer: Layer) -> crate::support::Image {
    flatten(&[layer])
}

#[test]
fn the_type_of_a_regular_file_may_be_0_7_or_nothing() {
    for kind in [b'0', b'7', 0] {
        assert_eq!(one(Layer::new().entry(&header("f", kind).size(1), b"x")).show("f"), "file x");
    }
}

#[test]
fn a_closing_slash_without_a_type_is_a_directory_as_in_v7() {
    let image = one(Layer::new().entry(&header("d/", 0).v7(), &[]).file("d/x", "1"));
    assert_eq!(image.list(), ["d dir", "d/x file 1"]);
}

#[test]
fn a_prefix_is_put_before_the_name() {
    let ustar = header("name", b'0').patch(345, "some/prefix");
    assert_eq!(one(Layer::new().entry(&ustar, &[])).show("some/prefix/name"), "file ");
    // GNU has times there, star has times behind 131 bytes of prefix.
    let gnu = header("name", b'0').gnu().patch(345, "00000001234");
    assert_eq!(one(Layer::new().entry(&gnu, &[])).show("name"), "file ");
    let prefix = "p".repeat(131);
    let star = header("n", b'0').patch(345, &prefix).patch(476, "00000001234").patch(508, "tar\0");
    assert_eq!(one(Layer::new().entry(&star, &[])).show(&format!("{prefix}/n")), "file ");
}

#[test]
fn a_prefix_that_early_go_wrote_into_a_gnu_header_is_read() {
    let odd = header("name", b'0').gnu().patch(345, "path/of/early/docker");
    assert_eq!(one(Layer::new().entry(&odd, &[])).show("path/of/early/docker/name"), "file ");
}

#[test]
fn full_name_fields_need_no_nul() {
    let name = "n".repeat(100);
    let prefix = "p".repeat(155);
    let image = one(Layer::new().entry(&header(&name, b'0').patch(345, &prefix), &[]));
    assert_eq!(image.show(&format!("{prefix}/{name}")), "file ");
}

#[test]
fn gnu_long_names_and_links_apply_to_the_next_entry_only() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let layer = Layer::new()
        .long_link(b"to/a/long/target\0")
        .long_name(format!("{long}\0").as_bytes())
        .symlink("short", "ignored")
        .symlink("next", "own");
    let image = one(layer);
    assert_eq!(image.show(&long), "-> to/a/long/target");
    assert_eq!(image.show("next"), "-> own");
}

#[test]
fn pax_applies_to_the_next_real_entry_also_across_gnu_long_names() {
    let layer = Layer::new()
        .pax(&[("uid", b"70000"), ("size", b"3"), ("path", b"pax")])
        .long_name(b"gnu\0")
        .entry(&header("f", b'0').size(0o777), b"abc")
        .file("g", "z");
    let image = one(layer);
    // Go lets the GNU name win; the size must not have been taken for the long name's own.
    assert_eq!(image.list(), ["g file z", "gnu file abc"]);
    assert_eq!((image.inode("gnu").uid, image.inode("g").uid), (70_000, 0));
}

#[test]
fn pax_overrides_size_owner_time_and_paths() {
    let layer = Layer::new()
        .pax(&[
            ("path", b"p/\xff\xfe"),
            ("size", b"5"),
            ("uid", b"4294967294"),
            ("gid", b"3000000000"),
            ("mtime", b"-1.5"),
        ])
        .entry(&header("f", b'0'), b"hello")
        .pax(&[("linkpath", b"t\xff")])
        .entry(&header("s", b'2').link("x"), &[]);
    let image = one(layer);
    let id = image.tree.lookup(b"p/\xff\xfe").unwrap();
    let inode = image.tree.inode(id);
    assert_eq!((inode.uid, inode.gid), (u32::MAX - 1, 3_000_000_000));
    assert_eq!(inode.mtime, Timestamp { secs: -2, nanos: 500_000_000 });
    assert_eq!(image.content(id), b"hello");
    assert_eq!(image.inode("s").kind, Kind::Symlink { target: b"t\xff" });
}

#[test]
fn a_global_pax_header_is_checked_and_ignored_as_docker_does() {
    let records = crate::support::pax_records(&[("comment", b"x"), ("uid", b"7"), ("path", b"q")]);
    let global = header("pax_global_header", b'g').size(records.len() as u64);
    let image = one(Layer::new().entry(&global, &records).file("f", "1"));
    assert_eq!(image.list(), ["f file 1"]);
    assert_eq!(image.inode("f").uid, 0);
    let broken = Layer::new().entry(&global, &records[1..]).end();
    assert!(pack_error(&broken).contains("malformed"));
}

#[test]
fn what_stands_before_a_global_header_is_not_for_the_entry_behind_it() {
    let global = header("pax_global_header", b'g');
    for extra in [
        Layer::new().pax(&[("path", b"other"), ("uid", b"7")]),
        Layer::new().long_name(b"other\0"),
        Layer::new().long_link(b"other\0"),
    ] {
        let image = one(extra.entry(&global, &[]).symlink("s", "own"));
        assert_eq!(image.list(), ["s -> own"]);
        assert_eq!(image.inode("s").uid, 0);
    }
}

#[test]
fn an_empty_long_name_or_link_says_nothing() {
    for empty in [&b"\0"[..], b""] {
        let layer = Layer::new().pax(&[("path", b"pax")]).long_name(empty).file("f", "1");
        assert_eq!(one(layer).list(), ["pax file 1"]);
        let layer = Layer::new().long_link(b"long\0").long_link(empty).symlink("s", "own");
        assert_eq!(one(layer).list(), ["s -> own"]);
    }
}

#[test]
fn the_owner_that_nobody_can_be_is_root() {
    // `chown` takes -1 for "leave it as it is".
    let pax = Layer::new().pax(&[("uid", b"4294967295"), ("gid", b"4294967295")]).file("pax", "");
    let all = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    let layer = pax.entry(&header("base256", b'0').patch(108, all).patch(116, all), &[]);
    let image = one(layer);
    for path in ["pax", "base256"] {
        assert_eq!((image.inode(path).uid, image.inode(path).gid), (0, 0), "{path}");
    }
}

#[test]
fn numbers_may_be_base_256() {
    let mut mtime = vec![0xff; 12];
    mtime[11] = 0xf6;
    let big = header("f", b'0')
        .patch(108, [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe])
        .patch(124, [&[0x80][..], &[0; 10], &[3]].concat())
        .patch(136, mtime);
    let image = one(Layer::new().entry(&big, b"abc"));
    let inode = image.inode("f");
    assert_eq!((inode.uid, inode.mtime.secs), (0xffff_fffe, -10));
    assert_eq!(image.show("f"), "file abc");
}

#[test]
fn a_checksum_of_signed_bytes_is_right_too() {
    let mut block = header(b"f\xff\xfe", b'0').bytes();
    block[148..156].fill(b' ');
    let sum: i32 = block.iter().map(|byte| i32::from(byte.cast_signed())).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let image = one(Layer::new().raw(&block));
    assert!(image.tree.lookup(b"f\xff\xfe").is_some());
}

#[test]
fn missing_end_blocks_are_no_error() {
    let layer = Layer::new().file("f", "abc");
    for end in [&[][..], &[0; 512], &[0; 1024], &[0; 10240]] {
        let blob = [layer.bytes.clone(), end.to_vec()].concat();
        assert_eq!(pack(&blob).unwrap().0.entries, 1);
    }
    // Nor is missing padding after the very last file.
    assert_eq!(pack(&layer.bytes[..515]).unwrap().0.entries, 1);
}

#[test]
fn bytes_after_the_end_are_hashed_and_not_looked_at() {
    let clean = Layer::new().file("f", "abc").end();
    let longer = [clean.clone(), Layer::new().file("g", "x").end(), vec![7; 100_001]].concat();
    let (clean, longer) = (pack(&clean).unwrap().0, pack(&longer).unwrap().0);
    assert_eq!((clean.entries, longer.entries), (1, 1));
    assert_ne!(clean.diff_id, longer.diff_id);
    assert_eq!(longer.tar_bytes, clean.tar_bytes + 2048 + 512 - 512 + 100_001);
}

#[test]
fn a_lone_block_of_zeroes_between_entries_is_refused() {
    let blob = Layer::new().file("f", "").raw(&[0; 512]).file("g", "").end();
    assert!(pack_error(&blob).contains("a block of zeroes"), "{}", pack_error(&blob));
}

#[test]
fn links_devices_and_directories_have_no_data_whatever_their_size_says() {
    let kinds: [fn(Header) -> Header; 5] = [
        |h| Header { kind: b'1', ..h }.link("f"),
        |h| Header { kind: b'2', ..h }.link("f"),
        |h| Header { kind: b'3', ..h }.device(1, 1),
        |h| Header { kind: b'5', ..h },
        |h| Header { kind: b'6', ..h },
    ];
    for kind in kinds {
        let odd = kind(header("odd", b'0').size(5000));
        let image = one(Layer::new().file("f", "1").entry(&odd, &[]).file("g", "2"));
        assert_eq!(image.show("g"), "file 2");
    }
}

#[test]
fn an_empty_blob_and_dockers_empty_layer_are_empty_packs() {
    for blob in [&[][..], &[0; 512], &[0; 1024]] {
        let (summary, bytes) = pack(blob).unwrap();
        assert_eq!((summary.entries, summary.data_bytes, bytes.len()), (0, 0, 128));
    }
    // sha256 of 1024 zeroes, as Docker knows it.
    let hex: String =
        pack(&[0; 1024]).unwrap().0.diff_id.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef");
}

#[test]
fn extended_attributes_arrive_as_they_are() {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    // Owner 6, user 1000 4, group 4, mask 4, others 4: as the mode of the file has it.
    let acl: Vec<u8> = [(1, 6, -1), (2, 4, 1000), (4, 4, -1), (16, 4, -1), (32, 4, -1)]
        .iter()
        .flat_map(|(tag, rights, id): &(u8, u8, i32)| {
            [&[*tag, 0, *rights, 0][..], &id.to_le_bytes()].concat()
        })
        .collect();
    let acl = [&[2, 0, 0, 0][..], &acl].concat();
    let layer = Layer::new()
        .pax(&[
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.bin", b"\0=\n\xff"),
            ("SCHILY.xattr.user.empty", b""),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("SCHILY.xattr.com.apple.quarantine", b"q"),
            ("SCHILY.xattr.trusted.k", b"v"),
            ("LIBARCHIVE.xattr.trusted.%6c", b"dg=="),
            ("SCHILY.xattr.system.posix_acl_access", &acl),
        ])
        .file("f", "1")
        .file("g", "2");
    let image = one(layer);
    let expected = [
        ("security.capability", capability.to_vec()),
        ("system.posix_acl_access", acl.clone()),
        ("trusted.k", b"v".to_vec()),
        ("user.bin", b"\0=\n\xff".to_vec()),
        ("user.empty", Vec::new()),
    ];
    assert_eq!(image.xattrs("f"), expected.map(|(name, value)| (name.to_owned(), value)));
    assert_eq!(image.inode("g").xattrs, None);
}

#[test]
fn attributes_that_linux_sets_on_no_such_file_are_left_out() {
    let records: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.user.u", b"1"),
        ("SCHILY.xattr.trusted.t", b"2"),
        ("SCHILY.xattr.system.posix_acl_default", &[2; 28]),
    ];
    let layer = Layer::new()
        .pax(records)
        .symlink("s", "t")
        .pax(records)
        .entry(&header("fifo", b'6'), &[])
        .pax(records)
        .entry(&header("null", b'3').device(1, 3), &[])
        .pax(records)
        .file("f", "1")
        .pax(records)
        .dir("d")
        // The link comes before what it names, which is a symbolic link.
        .pax(&[("SCHILY.xattr.user.late", b"3")])
        .hard_link("h", "late")
        .symlink("late", "t");
    let image = one(layer);
    let names = |path: &str| -> Vec<String> {
        image.xattrs(path).into_iter().map(|(name, _)| name).collect()
    };
    for path in ["s", "fifo", "null"] {
        assert_eq!(names(path), ["trusted.t"], "{path}");
    }
    assert_eq!(names("f"), ["trusted.t", "user.u"]);
    assert_eq!(names("d"), ["system.posix_acl_default", "trusted.t", "user.u"]);
    assert_eq!(names("h"), [""; 0]);
    assert_eq!(image.inode("h").xattrs, None);
}

#[test]
fn equal_attribute_sets_are_one_set_across_layers() {
    let layer = |path| {
        Layer::new()
            .pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"2")])
            .file(path, "")
    };
    let other = Layer::new().pax(&[("SCHILY.xattr.user.b", b"2")]).file("h", "");
    let image = flatten(&[layer("f"), other, layer("g")]);
    assert_eq!(image.inode("f").xattrs, image.inode("g").xattrs);
    assert_ne!(image.inode("f").xattrs, image.inode("h").xattrs);
}

/// Old GNU: 8192 bytes, data at 0..5 and 4096..4099.
fn old_gnu(header: Header) -> Header {
    header
        .gnu()
        .size(8)
        .patch(386, "00000000000\0")
        .patch(398, "00000000005\0")
        .patch(410, "00000010000\0")
        .patch(422, "00000000003\0")
        .patch(483, "00000020000\0")
}

fn sparse_content() -> Vec<u8> {
    let mut content = vec![0; 8192];
    content[..5].copy_from_slice(b"hello");
    content[4096..4099].copy_from_slice(b"abc");
    content
}

#[test]
fn old_gnu_sparse_files_have_their_real_size() {
    let layer = Layer::new().entry(&old_gnu(header("s", b'S')), b"helloabc").file("g", "2");
    let image = one(layer);
    assert_eq!(image.content(image.id("s")), sparse_content());
    assert_eq!(image.show("g"), "file 2");
}

#[test]
fn old_gnu_maps_may_go_on_in_further_blocks() {
    let mut header = header("s", b'S').gnu().size(6).patch(482, [1]).patch(483, "00001000000\0");
    for n in 0..4 {
        header = header.patch(386 + n * 24, format!("{:011o}\0{:011o}\0", n * 8192, 1));
    }
    let mut block = vec![0; 512];
    for n in 0..2 {
        let text = format!("{:011o}\0{:011o}\0", (n + 4) * 8192, 1);
        block[n * 24..n * 24 + 24].copy_from_slice(text.as_bytes());
    }
    let layer = Layer::new().raw(&header.bytes()).raw(&block).raw(b"abcdef").raw(&[0; 506]);
    let image = one(layer.file("g", "2"));
    let content = image.content(image.id("s"));
    assert_eq!(content.len(), 0o1_000_000);
    let set: Vec<_> = content.iter().enumerate().filter(|(_, b)| **b != 0).collect();
    let expected: Vec<_> = b"abcdef".iter().enumerate().map(|(n, b)| (n * 8192, b)).collect();
    assert_eq!(set, expected);
    assert_eq!(image.tree.runs(image.id("s")).count(), 6);
    assert_eq!(image.show("g"), "file 2");
}

#[test]
fn pax_sparse_files_of_all_versions_have_their_real_name_and_size() {
    let v00: &[(&str, &[u8])] = &[
        ("GNU.sparse.size", b"8192"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"0"),
        ("GNU.sparse.numbytes", b"5"),
        ("GNU.sparse.offset", b"4096"),
        ("GNU.sparse.numbytes", b"3"),
    ];
    let v01: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.size", b"8192"),
        ("GNU.sparse.map", b"0,5,4096,3"),
    ];
    let v10: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"8192"),
    ];
    let map = [&b"2\n0\n5\n4096\n3\n"[..], &[0; 499], b"helloabc"].concat();
    for (records, name, data) in [
        (v00, "s", &b"helloabc"[..]),
        (v01, "GNUSparseFile.1/s", b"helloabc"),
        (v10, "GNUSparseFile.1/s", &map),
    ] {
        let file = header(name, b'0').size(data.len() as u64);
        let image = one(Layer::new().pax(records).entry(&file, data).file("g", "2"));
        assert_eq!(image.content(image.id("s")), sparse_content());
        assert_eq!(image.list().len(), 2, "{:?}", image.list());
        assert_eq!(image.show("g"), "file 2");
    }
}

#[test]
fn the_name_of_a_sparse_file_counts_with_a_map_alone() {
    let layer = Layer::new()
        .pax(&[("GNU.sparse.name", b"other"), ("GNU.sparse.size", b"9")])
        .file("f", "1")
        .pax(&[("GNU.sparse.name", b"other")])
        .symlink("s", "t");
    assert_eq!(one(layer).list(), ["f file 1", "s -> t"]);
    let map: &[(&str, &[u8])] = &[("GNU.sparse.name", b"other"), ("GNU.sparse.map", b"0,0")];
    for kind in [b'2', b'5', b'6'] {
        let entry = header("x", kind).link("t");
        let message = pack_error(&Layer::new().pax(map).entry(&entry, &[]).end());
        assert!(message.contains("sparse map"), "{message}");
    }
}

#[test]
fn a_sparse_file_of_a_terabyte_costs_nothing() {
    let v01: &[(&str, &[u8])] = &[
        ("GNU.sparse.size", b"1099511627776"),
        ("GNU.sparse.map", b"1099511627000,3,1099511627776,0"),
    ];
    let layer = Layer::new().pax(v01).entry(&header("s", b'0').size(3), b"abc");
    let (summary, _) = pack(&layer.clone().end()).unwrap();
    assert_eq!(summary.data_bytes, 4096);
    let image = one(layer);
    assert_eq!(image.inode("s").kind, Kind::File { size_bytes: 1 << 40 });
    let run = image.tree.runs(image.id("s")).next().unwrap();
    assert_eq!((run.file_block, run.blocks), ((1 << 28) - 1, 1));
}

#[test]
fn long_runs_of_zeroes_become_holes() {
    let content = [vec![1; 4096], vec![0; 100_000], vec![2; 10]].concat();
    let layer = Layer::new().entry(&header("f", b'0').size(content.len() as u64), &content);
    let (summary, _) = pack(&layer.clone().end()).unwrap();
    assert_eq!(summary.data_bytes, 8192);
    let image = one(layer);
    assert_eq!(image.content(image.id("f")), content);
}
