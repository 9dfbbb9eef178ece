//! Layers over layers, as overlay mounts of Docker and containerd show them.

use ext4::{InodeId, Kind, Timestamp, Tree};
use rootfs::TreeLimits;

use crate::support::{
    Header, Image, Layer, flatten, flatten_error, header, pack_error, try_flatten_with,
};

fn base() -> Layer {
    Layer::new().dir("a").file("a/x", "1").file("a/y", "2").dir("a/sub").file("a/sub/z", "3")
}

#[test]
fn no_layers_are_an_empty_root() {
    let image = flatten(&[]);
    assert_eq!(image.tree.inode_count(), 1);
    let root = image.tree.inode(InodeId::ROOT);
    assert_eq!((root.permissions, root.uid, root.mtime), (0o755, 0, Timestamp::default()));
}

#[test]
fn upper_entries_are_added_to_lower_ones() {
    let image = flatten(&[base(), Layer::new().file("a/w", "4").file("b", "5")]);
    let expected = [
        "a dir",
        "a/sub dir",
        "a/sub/z file 3",
        "a/w file 4",
        "a/x file 1",
        "a/y file 2",
        "b file 5",
    ];
    assert_eq!(image.list(), expected);
}

#[test]
fn a_whiteout_deletes_a_file_of_a_lower_layer() {
    let image = flatten(&[base(), Layer::new().whiteout("a/x")]);
    assert_eq!(image.list(), ["a dir", "a/sub dir", "a/sub/z file 3", "a/y file 2"]);
}

#[test]
fn a_whiteout_deletes_a_directory_with_everything_below() {
    assert_eq!(flatten(&[base(), Layer::new().whiteout("a")]).list(), [""; 0]);
}

#[test]
fn a_whiteout_deletes_the_longest_name_though_its_own_is_longer() {
    let name = "n".repeat(255);
    let long = |path: String| Layer::new().long_name(format!("{path}\0").as_bytes());
    let lower = long(format!("d/{name}")).file("short", "1").file("d/x", "2");
    let image = flatten(&[lower.clone(), long(format!("d/.wh.{name}")).file("short", "")]);
    assert_eq!(image.list(), ["d dir", "d/x file 2"]);
    // One byte more no file can have.
    let beyond = long(format!("d/.wh.{name}n")).file("short", "").end();
    assert!(pack_error(&beyond).contains("longer than 255 bytes"));
    let below = long(format!(".wh.{name}/x")).file("short", "").end();
    assert!(pack_error(&below).contains("below a whiteout"));
    let target = long("y".to_owned()).long_link(format!(".wh.{name}\0").as_bytes());
    assert!(pack_error(&target.hard_link("y", "z").end()).contains("longer than 255 bytes"));
}

#[test]
fn a_whiteout_never_hits_an_entry_of_its_own_layer() {
    for upper in [
        Layer::new().whiteout("a/x").file("a/x", "new"),
        Layer::new().file("a/x", "new").whiteout("a/x"),
    ] {
        assert_eq!(flatten(&[base(), upper]).show("a/x"), "file new");
    }
}

#[test]
fn a_whited_out_directory_made_anew_is_empty_but_for_its_layer() {
    for upper in [
        Layer::new().whiteout("a").dir_mode("a", 0o700).file("a/n", "9"),
        Layer::new().dir_mode("a", 0o700).file("a/n", "9").whiteout("a"),
    ] {
        let image = flatten(&[base(), upper]);
        assert_eq!(image.list(), ["a dir", "a/n file 9"]);
        assert_eq!(image.inode("a").permissions, 0o700);
    }
}

#[test]
fn nested_redundant_whiteouts_delete_once() {
    for upper in [
        Layer::new().whiteout("a").whiteout("a/sub").whiteout("a/sub/z").opaque("a/sub"),
        Layer::new().whiteout("a/sub/z").opaque("a/sub").whiteout("a/sub").whiteout("a"),
    ] {
        assert_eq!(flatten(&[base(), upper]).list(), [""; 0]);
    }
}

#[test]
fn a_whiteout_of_what_is_not_there_does_nothing() {
    let image = flatten(&[base(), Layer::new().whiteout("a/none").whiteout("none")]);
    assert_eq!(image.list(), flatten(&[base()]).list());
}

#[test]
fn whiteouts_in_the_lowest_layer_do_nothing() {
    let image = flatten(&[base().whiteout("a/x").whiteout("a").opaque("a").whiteout("q")]);
    assert_eq!(image.list(), flatten(&[base()]).list());
}

#[test]
fn a_whiteout_implies_its_directory() {
    // The upper directory that containerd makes for it is seen through the mount.
    let image = flatten(&[base(), Layer::new().whiteout("n/m/x")]);
    assert_eq!((image.show("n").as_str(), image.show("n/m").as_str()), ("dir", "dir"));
    let image = flatten(&[base(), Layer::new().whiteout("a/x/y")]);
    assert_eq!(image.show("a/x"), "dir");
}

#[test]
fn an_opaque_directory_hides_lower_entries_wherever_its_marker_stands() {
    for upper in [
        Layer::new().dir("a").opaque("a").file("a/n", "9"),
        Layer::new().dir("a").file("a/n", "9").opaque("a"),
        Layer::new().opaque("a").file("a/n", "9"),
    ] {
        assert_eq!(flatten(&[base(), upper]).list(), ["a dir", "a/n file 9"]);
    }
}

#[test]
fn an_opaque_marker_alone_keeps_the_metadata_of_the_directory() {
    let lower = Layer::new().dir_mode("a", 0o1777).file("a/x", "1");
    let image = flatten(&[lower, Layer::new().opaque("a")]);
    assert_eq!(image.list(), ["a dir"]);
    assert_eq!(image.inode("a").permissions, 0o1777);
}

#[test]
fn an_opaque_root_hides_all_lower_layers() {
    for marker in [".wh..wh..opq", "./.wh..wh..opq", "/.wh..wh..opq"] {
        let upper = Layer::new().file("n", "9").file(marker, "");
        assert_eq!(flatten(&[base(), base(), upper]).list(), ["n file 9"]);
    }
}

#[test]
fn a_layer_above_an_opaque_one_is_not_hidden() {
    let image = flatten(&[base(), Layer::new().opaque("a"), Layer::new().file("a/x", "new")]);
    assert_eq!(image.list(), ["a dir", "a/x file new"]);
}

#[test]
fn bookkeeping_of_aufs_is_no_part_of_the_image() {
    let layer = base()
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/123.456", "x")
        .file(".wh..wh.aufs", "")
        .dir(".wh..wh.orph")
        .dir("a/.wh..wh.tmp");
    assert_eq!(flatten(&[layer]).list(), flatten(&[base()]).list());
}

#[test]
fn the_last_of_two_entries_with_one_path_counts() {
    let image = flatten(&[Layer::new().file("x", "1").file("./x", "2").symlink("/x", "t")]);
    assert_eq!(image.list(), ["x -> t"]);
    assert_eq!(image.tree.inode_count(), 2);
}

#[test]
fn a_directory_over_a_directory_of_its_layer_keeps_what_is_in_it() {
    let image = flatten(&[Layer::new().dir("a").file("a/x", "1").dir_mode("a", 0o700)]);
    assert_eq!(image.list(), ["a dir", "a/x file 1"]);
    assert_eq!(image.inode("a").permissions, 0o700);
}

#[test]
fn a_file_over_a_directory_of_its_layer_takes_the_subtree_with_it() {
    let image = flatten(&[Layer::new().dir("a").file("a/x", "1").file("a", "2")]);
    assert_eq!(image.list(), ["a file 2"]);
    let image = flatten(&[Layer::new().dir("a").file("a/x", "1").file("a", "2").dir("a")]);
    assert_eq!(image.list(), ["a dir"]);
}

#[test]
fn a_file_replaces_a_lower_directory_and_the_other_way_round() {
    let image = flatten(&[base(), Layer::new().file("a", "f")]);
    assert_eq!(image.list(), ["a file f"]);
    let image = flatten(&[base(), Layer::new().dir("a/x").file("a/x/in", "f")]);
    assert_eq!(image.show("a/x/in"), "file f");
    // And back again: nothing of the first layer returns.
    let image = flatten(&[base(), Layer::new().file("a", "f"), Layer::new().dir("a")]);
    assert_eq!(image.list(), ["a dir"]);
}

#[test]
fn a_directory_declared_again_has_new_metadata_and_its_old_children() {
    let lower =
        Layer::new().pax(&[("SCHILY.xattr.user.old", b"1")]).dir_mode("a", 0o700).file("a/x", "1");
    let upper = Layer::new()
        .pax(&[("SCHILY.xattr.user.new", b"2")])
        .entry(&header("a", b'5').mode(0o1770).owner(5, 6).mtime(77), &[]);
    let image = flatten(&[lower, upper]);
    let a = image.inode("a");
    assert_eq!((a.permissions, a.uid, a.gid, a.mtime.secs), (0o1770, 5, 6, 77));
    assert_eq!(image.xattrs("a"), [("user.new".to_owned(), b"2".to_vec())]);
    assert_eq!(image.show("a/x"), "file 1");
}

#[test]
fn a_missing_parent_is_made_and_is_roots() {
    let image = flatten(&[Layer::new().file("m/n/x", "1")]);
    let m = image.inode("m");
    assert_eq!((m.permissions, m.uid, m.gid, m.mtime), (0o755, 0, 0, Timestamp::default()));
}

#[test]
fn a_parent_that_only_a_lower_layer_has_keeps_its_metadata() {
    let lower = Layer::new()
        .pax(&[("SCHILY.xattr.user.k", b"v")])
        .entry(&header("a", b'5').mode(0o2750).owner(7, 8).mtime(99), &[]);
    let image = flatten(&[lower, Layer::new().file("a/x", "1")]);
    let a = image.inode("a");
    assert_eq!((a.permissions, a.uid, a.gid, a.mtime.secs), (0o2750, 7, 8, 99));
    assert_eq!(image.xattrs("a"), [("user.k".to_owned(), b"v".to_vec())]);
}

#[test]
fn a_parent_described_after_its_child_has_the_described_metadata() {
    let image = flatten(&[Layer::new().file("a/x", "1").dir_mode("a", 0o711)]);
    assert_eq!(image.inode("a").permissions, 0o711);
    assert_eq!(image.show("a/x"), "file 1");
}

#[test]
fn a_lower_symlink_used_as_a_parent_is_replaced_by_a_directory() {
    let lower = Layer::new().dir("real").file("real/x", "1").symlink("link", "real");
    let image = flatten(&[lower, Layer::new().file("link/y", "2")]);
    assert_eq!(image.list(), ["link dir", "link/y file 2", "real dir", "real/x file 1"]);
    assert_eq!(image.inode("link").permissions, 0o755);
}

#[test]
fn a_lower_file_used_as_a_parent_is_replaced_by_a_directory() {
    let image = flatten(&[Layer::new().file("f", "1"), Layer::new().file("f/y", "2")]);
    assert_eq!(image.list(), ["f dir", "f/y file 2"]);
}

#[test]
fn a_symlink_of_the_same_layer_used_as_a_parent_is_followed() {
    let layer = Layer::new().dir("real").symlink("link", "real").file("link/y", "2");
    assert_eq!(flatten(&[layer]).list(), ["link -> real", "real dir", "real/y file 2"]);
}

#[test]
fn a_followed_symlink_cannot_leave_the_root() {
    for target in ["../../../real", "/real", "/../../real", "x/../../real"] {
        let layer = Layer::new().dir("d").symlink("d/link", target).file("d/link/y", "2");
        let image = flatten(&[layer]);
        assert_eq!(image.show("real/y"), "file 2", "{target}");
        assert_eq!(image.show("d/link"), format!("-> {target}"));
        assert_eq!(image.paths().len(), 4, "{target} made something else");
    }
}

#[test]
fn a_dangling_symlink_used_as_a_parent_makes_its_target() {
    let layer = Layer::new().symlink("link", "n/m").file("link/y", "2");
    assert_eq!(flatten(&[layer]).list(), ["link -> n/m", "n dir", "n/m dir", "n/m/y file 2"]);
}

#[test]
fn a_symlink_is_not_followed_into_a_lower_layer() {
    // The upper directory has no `real`, so it is made there, over the lower one.
    let lower = Layer::new().dir("real").file("real/x", "1");
    let image = flatten(&[lower, Layer::new().symlink("link", "real").file("link/y", "2")]);
    assert_eq!(image.list(), ["link -> real", "real dir", "real/x file 1", "real/y file 2"]);
}

#[test]
fn a_ring_of_symlinks_used_as_a_parent_is_refused() {
    for layer in [
        Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", "1"),
        Layer::new().symlink("a", "a").file("a/x", "1"),
        Layer::new().symlink("a", "a/a").file("a/x", "1"),
    ] {
        let message = flatten_error(&[base(), layer]);
        assert_eq!(message, "a/x in layer 2: too many levels of symbolic links");
    }
}

#[test]
fn a_file_of_the_same_layer_used_as_a_parent_is_refused() {
    let message = flatten_error(&[Layer::new().file("f", "1").file("f/y", "2")]);
    assert_eq!(message, "f/y in layer 1: a part of the path is not a directory in the same layer");
}

#[test]
fn an_entry_over_a_symlink_replaces_it_even_if_it_is_a_directory() {
    let layer = Layer::new().dir("real").symlink("link", "real").dir("link").file("link/y", "1");
    assert_eq!(flatten(&[layer]).list(), ["link dir", "link/y file 1", "real dir"]);
}

#[test]
fn a_whiteout_behind_a_symlink_of_its_layer_deletes_where_the_link_leads() {
    let upper = Layer::new().dir("a").symlink("link", "a").whiteout("link/x");
    assert_eq!(flatten(&[base(), upper]).show("a/x"), "-");
}

#[test]
fn an_entry_for_the_root_describes_the_root() {
    for name in [".", "./", "/", ""] {
        let root = header(name, b'5').mode(0o1711).owner(3, 4).mtime(55);
        let image = flatten(&[base(), Layer::new().entry(&root, &[])]);
        let root = image.tree.inode(InodeId::ROOT);
        assert_eq!((root.permissions, root.uid, root.gid, root.mtime.secs), (0o1711, 3, 4, 55));
        assert_eq!(image.show("a/x"), "file 1");
    }
}

#[test]
fn the_root_has_attributes_too_and_keeps_them_below_an_opaque_layer() {
    let named = |value: &[u8]| Layer::new().pax(&[("SCHILY.xattr.user.root", value)]).dir("./");
    let value = |layers: &[Layer]| flatten(layers).xattrs("");
    let expected = |value: &[u8]| vec![("user.root".to_owned(), value.to_vec())];
    assert_eq!(value(&[named(b"1"), Layer::new().file("x", "")]), expected(b"1"));
    assert_eq!(value(&[named(b"1"), named(b"2")]), expected(b"2"));
    let opaque = Layer::new().file(".wh..wh..opq", "").file("x", "");
    assert_eq!(value(&[named(b"1"), opaque]), expected(b"1"));
    assert_eq!(value(&[named(b"1"), Layer::new().dir(".")]), []);
}

#[test]
fn a_directory_that_became_a_symlink_and_a_directory_again_is_empty() {
    let link = Layer::new().symlink("a", "real");
    let layers = [base(), link, Layer::new().dir_mode("a", 0o700)];
    let image = flatten(&layers);
    assert_eq!(image.list(), ["a dir"]);
    assert_eq!(image.inode("a").permissions, 0o700);
    // The same through a path that implies it.
    let image = flatten(&[&layers[..2], &[Layer::new().file("a/n", "9")]].concat());
    assert_eq!(image.list(), ["a dir", "a/n file 9"]);
}

#[test]
fn opaque_and_whiteout_in_one_layer_are_as_good_as_opaque() {
    for upper in [
        Layer::new().dir("a").opaque("a").whiteout("a/x").file("a/y", "new"),
        Layer::new().file("a/y", "new").whiteout("a/x").opaque("a").dir("a"),
    ] {
        assert_eq!(flatten(&[base(), upper]).list(), ["a dir", "a/y file new"]);
    }
}

#[test]
fn a_marker_deletes_whatever_kind_of_entry_it_is() {
    for kind in [b'5', b'2', b'1', b'6', b'3', b'7'] {
        let marker = |name: &str| header(name, kind).link("none").device(1, 3);
        let whiteout = Layer::new().entry(&marker("a/.wh.x"), &[]);
        assert_eq!(flatten(&[base(), whiteout]).show("a/x"), "-", "{kind}");
        let opaque = Layer::new().entry(&marker("a/.wh..wh..opq"), &[]);
        assert_eq!(flatten(&[base(), opaque]).list(), ["a dir"], "{kind}");
    }
    // With the slash that directories have.
    let whiteout = Layer::new().entry(&header("a/.wh.x/", b'5'), &[]);
    assert_eq!(flatten(&[base(), whiteout]).show("a/x"), "-");
    let opaque = Layer::new().entry(&header("a/.wh..wh..opq/", b'5'), &[]);
    assert_eq!(flatten(&[base(), opaque]).list(), ["a dir"]);
}

#[test]
fn a_whiteout_of_one_name_of_a_file_leaves_the_other_and_counts_it() {
    let lower = Layer::new().file("a/x", "1").hard_link("b/y", "a/x").hard_link("b/z", "a/x");
    let image = flatten(&[lower, Layer::new().whiteout("a/x").opaque("a")]);
    assert_eq!(image.list(), ["a dir", "b dir", "b/y file 1", "b/z file 1"]);
    assert_eq!((image.id("b/y"), image.inode("b/y").links), (image.id("b/z"), 2));
}

#[test]
fn a_device_0_0_is_a_whiteout_as_on_an_overlay_mount() {
    let image = flatten(&[base(), Layer::new().entry(&header("a/x", b'3').device(0, 0), &[])]);
    assert_eq!(image.show("a/x"), "-");
    let image = flatten(&[base(), Layer::new().entry(&header("a/x", b'3').device(1, 3), &[])]);
    assert_eq!(image.show("a/x"), "char 1:3");
}

#[test]
fn a_hard_link_is_another_name_of_one_file() {
    let image = flatten(&[Layer::new().file("x", "1").hard_link("y", "x").hard_link("z", "./y")]);
    assert_eq!((image.id("x"), image.id("x")), (image.id("y"), image.id("z")));
    assert_eq!(image.inode("x").links, 3);
    assert_eq!(image.tree.inode_count(), 2);
}

#[test]
fn a_hard_link_reaches_into_lower_layers() {
    let image = flatten(&[base(), Layer::new().hard_link("l", "a/x")]);
    assert_eq!(image.id("l"), image.id("a/x"));
    assert_eq!((image.inode("l").links, image.show("l").as_str()), (2, "file 1"));
}

#[test]
fn a_hard_link_keeps_the_content_when_its_target_is_deleted_or_replaced_later() {
    let lower = Layer::new().file("x", "1").hard_link("y", "x");
    let image = flatten(&[lower.clone(), Layer::new().whiteout("x")]);
    assert_eq!((image.list(), image.inode("y").links), (vec!["y file 1".to_owned()], 1));
    let image = flatten(&[lower.clone(), Layer::new().file("x", "2")]);
    assert_eq!(image.list(), ["x file 2", "y file 1"]);
    let image = flatten(&[Layer::new().file("x", "1").hard_link("y", "x").file("x", "2")]);
    assert_eq!(image.list(), ["x file 2", "y file 1"]);
    let linked_below = [Layer::new().file("x", "1"), Layer::new().hard_link("y", "x")];
    let image = flatten(&[&linked_below[..], &[Layer::new().whiteout("x")]].concat());
    assert_eq!(image.list(), ["y file 1"]);
}

#[test]
fn a_hard_link_may_come_before_its_target() {
    let layer = Layer::new().hard_link("z", "y").hard_link("y", "x").file("x", "1");
    let image = flatten(&[layer]);
    assert_eq!(image.list(), ["x file 1", "y file 1", "z file 1"]);
    assert_eq!(image.inode("x").links, 3);
}

#[test]
fn a_hard_link_before_its_target_wins_over_the_lower_file() {
    let lower = Layer::new().file("x", "lower");
    let image = flatten(&[lower, Layer::new().hard_link("y", "x").file("x", "upper")]);
    assert_eq!(image.list(), ["x file upper", "y file upper"]);
    assert_eq!(image.inode("x").links, 2);
}

#[test]
fn a_hard_link_to_a_symlink_names_the_symlink_itself() {
    let image = flatten(&[Layer::new().symlink("s", "nowhere").hard_link("t", "s")]);
    assert_eq!(image.list(), ["s -> nowhere", "t -> nowhere"]);
    assert_eq!(image.inode("s").links, 2);
}

#[test]
fn a_hard_link_finds_its_target_behind_symlinks_in_the_path() {
    let layer = Layer::new().dir("d").file("d/x", "1").symlink("l", "d").hard_link("y", "l/x");
    assert_eq!(flatten(&[layer]).show("y"), "file 1");
    let lower = Layer::new().dir("d").file("d/x", "1").symlink("l", "/d");
    let image = flatten(&[lower, Layer::new().hard_link("y", "l/x")]);
    assert_eq!((image.show("y").as_str(), image.show("l").as_str()), ("file 1", "-> /d"));
}

#[test]
fn a_hard_link_to_nothing_is_refused() {
    for layers in [
        vec![Layer::new().hard_link("y", "x")],
        vec![base(), Layer::new().hard_link("y", "x")],
        vec![Layer::new().hard_link("y", "y")],
        vec![Layer::new().hard_link("y", "x").hard_link("x", "y")],
        vec![Layer::new().file("x", "1"), Layer::new().whiteout("x").hard_link("y", "x")],
        vec![Layer::new().file("f", "1"), Layer::new().hard_link("y", "f/x")],
    ] {
        let message = flatten_error(&layers);
        assert!(message.contains("which neither its layer nor those below have"), "{message}");
        assert!(message.starts_with("y in layer "), "{message}");
    }
}

#[test]
fn a_hard_link_to_a_directory_is_refused() {
    for layers in [
        vec![base().hard_link("y", "a")],
        vec![base(), Layer::new().hard_link("y", "a")],
        vec![Layer::new().hard_link("y", "d").dir("d")],
        vec![base().hard_link("y", ".")],
    ] {
        let message = flatten_error(&layers);
        assert!(message.ends_with("which is a directory"), "{message}");
    }
}

#[test]
fn a_hard_link_to_itself_changes_nothing_where_the_file_is() {
    let image = flatten(&[Layer::new().file("x", "1").hard_link("x", "x")]);
    assert_eq!((image.list(), image.inode("x").links), (vec!["x file 1".to_owned()], 1));
    let image = flatten(&[Layer::new().file("x", "1"), Layer::new().hard_link("x", "x")]);
    assert_eq!((image.list(), image.inode("x").links), (vec!["x file 1".to_owned()], 1));
}

#[test]
fn a_hard_link_that_was_replaced_needs_no_target() {
    let upper = Layer::new().hard_link("y", "none").file("y", "1");
    assert_eq!(flatten(std::slice::from_ref(&upper)).list(), ["y file 1"]);
    assert_eq!(flatten(&[Layer::new(), upper]).list(), ["y file 1"]);
}

#[test]
fn metadata_of_a_hard_link_goes_to_the_file() {
    let link = header("y", b'1').link("x").mode(0o4755).owner(9, 9).mtime(5);
    let image = flatten(&[Layer::new().file("x", "1"), Layer::new().entry(&link, &[])]);
    let x = image.inode("x");
    assert_eq!((x.permissions, x.uid, x.mtime.secs, x.links), (0o4755, 9, 5, 2));
}

#[test]
fn of_two_hard_links_to_one_file_the_later_header_counts() {
    let link = |name, target, time| header(name, b'1').link(target).mtime(time);
    for (second, target) in [("a", "a"), ("c", "a"), ("c", "b")] {
        let upper =
            Layer::new().entry(&link("b", "a", 5), &[]).entry(&link(second, target, 6), &[]);
        let image = flatten(&[Layer::new().file("a", "1"), upper]);
        assert_eq!(image.inode("a").mtime.secs, 6, "{second} -> {target}");
        assert_eq!(image.id("a"), image.id("b"));
    }
}

#[test]
fn a_hard_link_below_a_replaced_directory_needs_no_target() {
    let upper = Layer::new().hard_link("a/b", "none").file("a", "1");
    assert_eq!(flatten(std::slice::from_ref(&upper)).list(), ["a file 1"]);
    assert_eq!(flatten(&[Layer::new(), upper]).list(), ["a file 1"]);
}

#[test]
fn a_later_header_without_attributes_leaves_them() {
    let lower = Layer::new().pax(&[("SCHILY.xattr.user.k", b"v")]).file("x", "1");
    let image = flatten(&[lower.clone().hard_link("y", "x"), Layer::new().hard_link("z", "y")]);
    assert_eq!(image.xattrs("z"), [("user.k".to_owned(), b"v".to_vec())]);
    // A file made anew has only its own.
    let image = flatten(&[lower, Layer::new().file("x", "2")]);
    assert_eq!(image.xattrs("x"), []);
}

/// One entry with attributes, each one letter of a name and its value.
fn described(layer: Layer, attributes: &[(&str, &str)], header: &Header) -> Layer {
    let name = |key: &str| match key {
        "c" => "SCHILY.xattr.security.capability".to_owned(),
        key => format!("SCHILY.xattr.user.{key}"),
    };
    let named: Vec<(String, &[u8])> =
        attributes.iter().map(|(key, value)| (name(key), value.as_bytes())).collect();
    let records: Vec<(&str, &[u8])> =
        named.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    layer.pax(&records).entry(header, &[])
}

fn attributes_of(image: &Image, path: &str) -> Vec<String> {
    let shown = |(name, value): (String, Vec<u8>)| {
        format!("{}={}", &name[name.len() - 1..], String::from_utf8_lossy(&value))
    };
    image.xattrs(path).into_iter().map(shown).collect()
}

#[test]
fn attributes_of_a_hard_link_join_those_of_the_file_and_its_chown_takes_the_capabilities() {
    let file = |layer| described(layer, &[("c", "x"), ("a", "1"), ("b", "2")], &header("f", b'0'));
    let link =
        |layer, given: &[(&str, &str)]| described(layer, given, &header("l", b'1').link("f"));
    for (given, expected) in [
        (&[][..], &["a=1", "b=2"][..]),
        (&[("b", "3"), ("d", "4")], &["a=1", "b=3", "d=4"]),
        (&[("c", "z")], &["y=z", "a=1", "b=2"]),
    ] {
        let one_layer = flatten(&[link(file(Layer::new()), given)]);
        let lower = flatten(&[file(Layer::new()), link(Layer::new(), given)]);
        let before = flatten(&[file(link(Layer::new(), given))]);
        for image in [one_layer, lower, before] {
            assert_eq!(attributes_of(&image, "f"), expected, "{given:?}");
            assert_eq!(image.id("l"), image.id("f"));
        }
    }
}

#[test]
fn attributes_of_links_that_wait_for_a_lower_file_join_in_the_order_of_their_headers() {
    let lower = described(Layer::new(), &[("a", "1"), ("c", "x")], &header("f", b'0'));
    let link =
        |layer, name, target, given| described(layer, given, &header(name, b'1').link(target));
    // The target of the first comes as the second, the lower file as the target of that one.
    let upper = link(Layer::new(), "k", "m", &[("a", "2"), ("b", "2"), ("c", "y")]);
    let upper = link(upper, "l", "m", &[("b", "3"), ("d", "3")]);
    let upper = link(upper, "m", "f", &[("d", "4")]);
    let image = flatten(&[lower, upper]);
    assert_eq!(attributes_of(&image, "f"), ["a=2", "b=3", "d=4"]);
    assert_eq!(image.inode("f").links, 4);
}

#[test]
fn a_directory_named_twice_by_its_layer_has_the_attributes_of_both_entries() {
    let named = |layer, given| described(layer, given, &header("d", b'5'));
    let twice = named(Layer::new(), &[("a", "1"), ("b", "2"), ("c", "x")]);
    let image = flatten(&[named(twice.clone(), &[("b", "3")])]);
    assert_eq!(attributes_of(&image, "d"), ["y=x", "a=1", "b=3"]);
    // An upper layer's directory hides the lower one's attributes, as on an overlay.
    let image = flatten(&[twice, named(Layer::new(), &[("b", "3")])]);
    assert_eq!(attributes_of(&image, "d"), ["b=3"]);
}

#[test]
fn attributes_joined_again_and_again_count_as_look_ups() {
    let value = "v".repeat(1000);
    let mut layer = described(Layer::new(), &[("a", &value)], &header("f", b'0'));
    for _ in 0..100 {
        layer = described(layer, &[("b", &value)], &header("l", b'1').link("f"));
    }
    let limits = |lookups_max| TreeLimits { lookups_max, ..TreeLimits::default() };
    let error = try_flatten_with(std::slice::from_ref(&layer), &limits(10_000)).err();
    assert!(error.unwrap().to_string().contains("look-ups"));
    assert!(try_flatten_with(&[layer], &limits(100_000)).is_ok());
}

#[test]
fn two_names_of_a_lower_file_stay_one_file_when_one_is_moved_by_whiteout_and_link() {
    let lower = Layer::new().file("x", "1").hard_link("y", "x");
    let image = flatten(&[lower, Layer::new().whiteout("x").hard_link("z", "y")]);
    assert_eq!(image.list(), ["y file 1", "z file 1"]);
    assert_eq!(image.inode("z").links, 2);
}

#[test]
fn more_names_than_ext4_can_count_are_refused() {
    let limits = rootfs::TreeLimits { links_max: 3, ..rootfs::TreeLimits::default() };
    let three = Layer::new().file("x", "1").hard_link("y", "x").hard_link("z", "x");
    assert!(try_flatten_with(std::slice::from_ref(&three), &limits).is_ok());
    let four = try_flatten_with(&[three, Layer::new().hard_link("w", "x")], &limits);
    assert_eq!(four.unwrap_err().to_string(), "w: it has 4 names, and 3 are possible");
}

#[test]
fn all_kinds_of_files_arrive_with_their_metadata() {
    let layer = Layer::new()
        .entry(&header("fifo", b'6').mode(0o622), &[])
        .entry(&header("char", b'3').device(4095, 1_048_575).mode(0o666), &[])
        .entry(&header("block", b'4').device(259, 300).owner(0, 6), &[])
        .entry(&header("suid", b'0').mode(0o7755).owner(65_536, 2_000_000), &[])
        .symlink("link", "\u{e4}/../x y");
    let image = flatten(&[layer]);
    assert_eq!(
        image.list(),
        [
            "block block 259:300",
            "char char 4095:1048575",
            "fifo fifo",
            "link -> \u{e4}/../x y",
            "suid file "
        ]
    );
    let suid = image.inode("suid");
    assert_eq!((suid.permissions, suid.uid, suid.gid), (0o7755, 65_536, 2_000_000));
    assert_eq!(image.inode("link").permissions, 0o777);
    assert!(matches!(image.inode("fifo").kind, Kind::Fifo));
}

#[test]
fn equal_trees_have_equal_numbers_however_they_were_layered() {
    let one = Layer::new().dir("b").file("b/x", "1").dir("a").file("a/y", "2");
    let two = [
        Layer::new().file("a/gone", "").file("b/x", "old").file("zzz", ""),
        Layer::new().dir("a").whiteout("a/gone").whiteout("zzz").dir("b").file("b/x", "1"),
        Layer::new().file("a/y", "2"),
    ];
    let (one, two) = (flatten(&[one]), flatten(&two));
    assert_eq!(one.paths(), two.paths());
}

#[test]
fn biggest_directories_are_summed_with_everything_below() {
    let layer = Layer::new()
        .file("usr/bin/x", &"x".repeat(5000))
        .file("usr/y", "y")
        .file("etc/z", "z")
        .hard_link("etc/y", "usr/y")
        .symlink("bin", "usr/bin")
        .dir("empty");
    let sizes = flatten(&[layer]).tree.biggest_directories(10);
    let text: Vec<_> = sizes
        .iter()
        .map(|size| (String::from_utf8_lossy(&size.path).into_owned(), size.bytes, size.files))
        .collect();
    // "etc" comes before "usr", so the shared file counts there.
    let expected = [("etc", 8192, 2), ("usr", 8192, 1), ("", 0, 1)];
    assert_eq!(text, expected.map(|(path, bytes, files)| (path.to_owned(), bytes, files)));
}
