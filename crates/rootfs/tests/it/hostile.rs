//! Layers made to hurt. Each ends in an error that names the entry, and none takes long.

use std::time::{Duration, Instant};

use rootfs::{Limits, Pack, PackError, Tally, TreeLimits};

use crate::support::{
    Layer, flatten, flatten_error, full_message, header, pack, pack_error, pack_with, try_flatten,
    try_flatten_with,
};

#[test]
fn dot_dot_never_leaves_the_root() {
    let layer = Layer::new()
        .file("../../../etc/a", "1")
        .file("/b", "2")
        .file("x/../../c", "3")
        .file("..", "")
        .end();
    let message = pack_error(&layer);
    assert!(message.contains("entry 4") && message.contains("the root"), "{message}");
    let layer = Layer::new().file("../../../etc/a", "1").file("/b", "2").file("x/../../c", "3");
    assert_eq!(flatten(&[layer]).list(), ["b file 2", "c file 3", "etc dir", "etc/a file 1"]);
}

#[test]
fn an_error_names_entry_and_path_and_escapes_them() {
    let blob = Layer::new().file("ok", "").entry(&header("bad\x1b[2J\n\u{7f}", b'Z'), &[]).end();
    assert_eq!(
        pack_error(&blob),
        "entry 2 of the layer (bad\\u{1b}[2J\\n\\u{7f}, at byte 512 of the tar): its type Z is not supported"
    );
}

#[test]
fn a_root_that_is_no_directory_is_refused() {
    for kind in [b'0', b'1', b'2', b'3', b'6'] {
        for name in [".", "/", "a/.."] {
            let blob = Layer::new().entry(&header(name, kind).link("x").device(1, 1), &[]).end();
            assert!(pack_error(&blob).contains("the root something else than a directory"));
        }
    }
}

#[test]
fn meaningless_whiteouts_are_refused() {
    for name in [".wh.", "a/.wh.", ".wh..", "a/.wh...", "a/.wh.."] {
        let message = pack_error(&Layer::new().file(name, "").end());
        assert!(message.contains("names nothing that could be deleted"), "{name}: {message}");
    }
    let message = pack_error(&Layer::new().file(".wh.a/b", "").end());
    assert!(message.contains("below a whiteout"), "{message}");
}

#[test]
fn headers_that_lie_are_refused() {
    let cases = [
        (header("f", b'0').patch(124, "0000000x"), "size field is not a number"),
        (header("f", b'0').patch(124, [0xff; 12]), "size is impossible"),
        (header("f", b'0').patch(108, [0xff; 8]), "owner or group"),
        (header("f", b'0').patch(108, [0x80, 0, 0, 1, 0, 0, 0, 0]), "owner or group"),
        (header("f", b'0').patch(136, [0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), "mtime field"),
        (header("f", b'3').device(4096, 0), "device number"),
        (header("f", b'4').device(0, 1 << 20), "device number"),
        (header("f", b'2'), "link target is empty"),
        (header("f", b'1'), "link target is empty"),
        (header("f", b'S'), "type S is not supported"),
        (header("f", b'V').gnu(), "type V is not supported"),
    ];
    for (header, expected) in cases {
        let message = pack_error(&Layer::new().entry(&header, &[]).end());
        assert!(message.contains(expected), "{message}");
    }
    let mut blob = Layer::new().file("f", "").end();
    blob[3] ^= 1;
    assert!(pack_error(&blob).contains("checksum"));
}

#[test]
fn paths_no_file_system_can_hold_are_refused() {
    let long = Layer::new().long_name(&b"ab/".repeat(2000)).file("f", "").end();
    assert!(pack_error(&long).contains("longer than 4096 bytes"));
    let deep = Layer::new().long_name(&b"a/".repeat(257)).file("f", "").end();
    assert!(pack_error(&deep).contains("deeper than 256"));
    let wide = Layer::new().long_name(&[b'a'; 256]).file("f", "").end();
    assert!(pack_error(&wide).contains("longer than 255 bytes"));
    let nul = Layer::new().pax(&[("path", b"a\0b")]).file("f", "").end();
    assert!(pack_error(&nul).contains("malformed record"));
    let link = Layer::new().long_link(&[b'a'; 4096]).symlink("f", "x").end();
    assert!(pack_error(&link).contains("link target"));
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let maps: [&[u8]; 6] =
        [b"0,4", b"0,5,4,0", b"8190,5", b"9000,0,0,5", b"18446744073709551615,5", b"0,5,"];
    for map in maps {
        let layer = Layer::new().pax(&[("GNU.sparse.size", b"8192"), ("GNU.sparse.map", map)]);
        let message = pack_error(&layer.entry(&header("s", b'0').size(5), b"hello").end());
        assert!(message.contains("sparse map"), "{}: {message}", map.escape_ascii());
    }
    let huge = Layer::new()
        .pax(&[("GNU.sparse.size", b"9223372036854775807"), ("GNU.sparse.map", b"0,5")])
        .entry(&header("s", b'0').size(5), b"hello");
    assert!(pack_error(&huge.end()).contains("larger than"));
    for data in ["", "5", "1\n", "99999999999\n", "1\nx\n5\n", "1\n-0\n5\n"] {
        let layer = Layer::new().pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", b"8192"),
        ]);
        let mut block = data.as_bytes().to_vec();
        block.resize(512, 0);
        let blob = layer.entry(&header("s", b'0').size(512), &block).end();
        assert!(pack(&blob).is_err(), "{data:?}");
    }
}

#[test]
fn every_limit_of_a_layer_is_an_error() {
    let default = Limits::default;
    let layer = Layer::new()
        .pax(&[("SCHILY.xattr.user.a", b"0123456789"), ("SCHILY.xattr.user.b", b"")])
        .file("some/path/to", "content")
        .file("b", "")
        .end();
    let cases = [
        (Limits { entries_max: 1, ..default() }, "more than 1 entries"),
        (Limits { path_bytes_max: 11, ..default() }, "longer than 11 bytes"),
        (Limits { component_bytes_max: 3, ..default() }, "longer than 3 bytes"),
        (Limits { depth_max: 2, ..default() }, "deeper than 2"),
        (Limits { tar_bytes_max: 1000, ..default() }, "larger than 1000 bytes"),
        (Limits { data_bytes_max: 4095, ..default() }, "need more than 4095 bytes"),
        (Limits { file_bytes_max: 6, ..default() }, "larger than 6 bytes"),
        (Limits { header_bytes_max: 10, ..default() }, "larger than 10 bytes"),
        (Limits { xattr_bytes_max: 20, ..default() }, "larger than 20 bytes"),
        (Limits { xattrs_max: 1, ..default() }, "more than 1 extended"),
        (Limits { toc_bytes_max: 30, ..default() }, "need more than 30 bytes"),
    ];
    for (limits, expected) in cases {
        let message = full_message(&pack_with(&layer, &limits).unwrap_err());
        assert!(message.contains(expected), "{expected}: {message}");
    }
    assert!(pack(&layer).is_ok());
}

#[test]
fn every_limit_of_a_tree_is_an_error() {
    let default = TreeLimits::default;
    let layers = [
        Layer::new().dir("d/e").file("d/e/f", "1").symlink("l", "d/e/../e").file("l/g", "2"),
        Layer::new().symlink("m", "x/y/z").file("m/h", "3"),
    ];
    let cases = [
        (TreeLimits { layers_max: 1, ..default() }, "more than 1 layers"),
        (TreeLimits { entries_max: 6, ..default() }, "m/h in layer 2: there are more than 6"),
        (TreeLimits { toc_bytes_max: 60, ..default() }, "with layer 2, names and metadata"),
        (TreeLimits { lookups_max: 4, ..default() }, "l/g in layer 1: to find the names of all"),
        (TreeLimits { inodes_max: 4, ..default() }, "more than 4 files"),
        (TreeLimits { depth_max: 2, ..default() }, "deeper than 2"),
        (TreeLimits { symlinks_max: 0, ..default() }, "too many levels"),
        (TreeLimits { symlink_steps_max: 5, ..default() }, "lead over more than 5"),
        (TreeLimits { bytes_max: 8, ..default() }, "need more than 8 bytes"),
    ];
    for (limits, expected) in cases {
        let message = full_message(&try_flatten_with(&layers, &limits).unwrap_err());
        assert!(message.contains(expected), "{expected}: {message}");
    }
    assert!(try_flatten(&layers).is_ok());
}

#[test]
fn the_layers_of_an_image_have_limits_together() {
    let default = Limits::default;
    let layer = Layer::new().file("a", &"x".repeat(8192)).end();
    let bytes = layer.len() as u64;
    let cases = [
        (Limits { image_tar_bytes_max: 3 * bytes, ..default() }, "together are larger than"),
        (Limits { image_data_bytes_max: 3 * 8192, ..default() }, "together need more than 24576"),
        (
            Limits { image_ratio_free_bytes: 3 * bytes, ratio_max: 0, ..default() },
            "together look like a decompression bomb",
        ),
    ];
    for (limits, expected) in cases {
        let tally = Tally::default();
        let make = || rootfs::make_pack_of(&layer[..], &mut Vec::new(), &limits, &tally);
        let made = make().unwrap();
        tally.add(made.blob_bytes, made.tar_bytes, made.data_bytes, &limits).unwrap();
        assert!(make().is_ok(), "{expected}");
        let message = full_message(&make().unwrap_err());
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(tally.add(1, 1, 1, &limits).is_err(), "{expected}: known layers count as well");
    }
}

#[test]
fn a_small_layer_named_often_cannot_take_any_time() {
    let deep = "a/".repeat(240);
    let mut links = Layer::new().long_name(format!("{deep}f\0").as_bytes()).file("x", "");
    for _ in 0..500 {
        links = links.long_link(format!("{deep}f\0").as_bytes()).hard_link("z", "x");
    }
    let limits = TreeLimits { lookups_max: 300_000, ..TreeLimits::default() };
    assert!(try_flatten_with(&[links.clone(), links.clone()], &limits).is_ok());
    let often = [links.clone(), links.clone(), links];
    let message = full_message(&try_flatten_with(&often, &limits).unwrap_err());
    assert!(message.contains("z in layer 3: to find the names of all layers takes"), "{message}");
    // Directories that paths imply count as entries.
    let mut implied = Layer::new();
    for n in 0..20 {
        implied = implied.long_name(format!("{n}/{deep}f\0").as_bytes()).file("x", "");
    }
    let limits = TreeLimits { entries_max: 10_000, ..TreeLimits::default() };
    assert!(try_flatten_with(&[implied.clone(), implied.clone()], &limits).is_ok());
    let often = [implied.clone(), implied.clone(), implied];
    let message = full_message(&try_flatten_with(&often, &limits).unwrap_err());
    assert!(message.contains("in layer 3: there are more than 10000 entries"), "{message}");
}

#[test]
fn maps_of_files_with_holes_are_limited_in_all() {
    let map: Vec<String> = (0..100).map(|n| format!("{},1", n * 8192)).collect();
    let layer = Layer::new()
        .pax(&[("GNU.sparse.size", b"819200"), ("GNU.sparse.map", map.join(",").as_bytes())])
        .entry(&header("s", b'0').size(100), &[1; 100]);
    let layers = [layer.clone(), layer.clone(), layer];
    let limits = TreeLimits { bytes_max: 2000, ..TreeLimits::default() };
    let message = full_message(&try_flatten_with(&layers, &limits).unwrap_err());
    assert!(message.contains("s in layer 3: "), "{message}");
    assert!(try_flatten(&layers).is_ok());
}

#[test]
fn symlinks_cannot_build_a_directory_of_any_depth() {
    let mut layer = Layer::new().long_name(&b"d/".repeat(250)).dir("x").symlink("s0", "/");
    let deep = "d/".repeat(250);
    layer = layer.long_link(deep.as_bytes()).symlink("s", "x");
    layer = layer.file("s/e/e/e/f", "").file("s/e/e/e/e/e/e/e/f", "");
    let message = flatten_error(&[layer]);
    assert!(message.contains("deeper than 256 directories, links followed"), "{message}");
}

#[test]
fn paths_through_many_links_stop_in_time() {
    // Each use of `l39` walks 40 links of 500 steps.
    let mut layer = Layer::new().dir("d");
    let steps = "./d/../".repeat(150);
    for n in 0..39 {
        let next = if n == 0 { "d".to_owned() } else { format!("l{}", n - 1) };
        layer = layer.long_link(format!("{steps}{next}").as_bytes()).symlink(&format!("l{n}"), "x");
    }
    for n in 0..3000 {
        layer = layer.file(&format!("l38/{n}"), "");
    }
    let start = Instant::now();
    let message = flatten_error(&[layer]);
    assert!(message.contains("lead over more than"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_chain_of_forward_hard_links_is_followed_in_linear_time() {
    let mut layer = Layer::new();
    for n in 0..20_000 {
        layer = layer.hard_link(&format!("l{n}"), &format!("l{}", n + 1));
    }
    let start = Instant::now();
    let image = flatten(&[layer.clone().file("l20000", "end")]);
    assert_eq!(image.inode("l0").links, 20_001);
    let message = flatten_error(&[layer]);
    assert!(message.contains("a hard link to l20000"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_tar_cut_anywhere_is_never_a_panic_and_only_whole_when_it_is() {
    let layer = Layer::new()
        .pax(&[("path", b"long"), ("SCHILY.xattr.user.a", b"1")])
        .file("f", &"x".repeat(700))
        .long_name(b"name\0")
        .symlink("s", "t")
        .hard_link("h", "long");
    let whole = layer.clone().end();
    let entries = |bytes: &[u8]| pack(bytes).map(|(summary, _)| summary.entries);
    assert_eq!(entries(&whole).unwrap(), 3);
    for cut in 0..whole.len() {
        match entries(&whole[..cut]) {
            Ok(3) => assert!(cut >= layer.bytes.len(), "cut at {cut}"),
            Ok(_) | Err(PackError::Tar(_)) => {}
            Err(other) => panic!("cut at {cut}: {other}"),
        }
    }
}

#[test]
fn a_tar_with_any_byte_changed_is_never_a_panic() {
    let whole = Layer::new()
        .pax(&[("GNU.sparse.size", b"8192"), ("GNU.sparse.map", b"0,5,4096,3")])
        .entry(&header("s", b'0').size(8), b"helloabc")
        .file("a/b", "x")
        .hard_link("h", "a/b")
        .whiteout("q")
        .end();
    for at in 0..whole.len() {
        for flip in [0x01, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            if let Ok((_, pack)) = pack(&bytes) {
                let opened = Pack::open(&pack, pack.len() as u64).unwrap();
                let _ = rootfs::FileTree::flatten([opened], &TreeLimits::default());
            }
        }
    }
}
