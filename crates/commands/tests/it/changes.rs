//! What commands change is what the layer says.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Layer, Run, can_run, first_user, sleeping};

#[test]
fn what_a_command_makes_changes_and_removes_is_the_layer_and_nothing_else_is() {
    if !can_run() {
        return;
    }
    let lower = Layer::busybox()
        .file("etc/kept", 0o644, b"kept")
        .file("etc/gone", 0o644, b"gone")
        .file("etc/changed", 0o640, b"old")
        .file("var/deep/file", 0o644, b"below")
        .file("var/again/old", 0o644, b"old");
    let script = "echo new > /etc/changed && rm /etc/gone && rm -r /var/again && mkdir /var/again \
                  && echo fresh > /var/again/fresh && rm -r /var/deep \
                  && ln -s /etc/changed /link && ln /etc/changed /etc/hard && mkfifo /pipe \
                  && chown 7:8 /etc/changed && chmod 4711 /etc/changed && echo x > '/etc/a name'";
    let ended = Run::on(vec![lower.bytes()], &[script]).end().well();
    let changed = ended.changed();
    let paths: Vec<&str> = changed.keys().map(String::as_str).collect();
    assert_eq!(
        paths,
        [
            "./",
            "etc",
            "etc/.wh.gone",
            "etc/a name",
            "etc/changed",
            "etc/hard",
            "link",
            "pipe",
            "var",
            "var/.wh.deep",
            "var/again",
            "var/again/.wh..wh..opq",
            "var/again/fresh",
        ]
    );
    let file = &changed["etc/changed"];
    assert_eq!((file.kind, file.mode, file.owner), ('0', 0o4711, (7, 8)));
    assert_eq!(file.contents, b"new\n");
    let hard = &changed["etc/hard"];
    assert_eq!((hard.kind, hard.target.as_str()), ('1', "etc/changed"));
    assert_eq!((changed["link"].kind, changed["link"].target.as_str()), ('2', "/etc/changed"));
    assert_eq!(changed["pipe"].kind, '6');
    assert_eq!(changed["var/again"].owner, (0, 0));
}

#[test]
fn commands_see_owners_modes_links_devices_and_attributes_as_the_image_has_them() {
    if !can_run() {
        return;
    }
    use tar::EntryType;
    // VFS_CAP_REVISION_2, cap_net_raw+ep (linux/capability.h).
    let capability: Vec<u8> =
        [0x0200_0001_u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    let lower = Layer::busybox()
        .entry("owned", EntryType::Regular, 0o2640, (1000, 65_534), b"mine", "")
        .entry("second", EntryType::Link, 0o2640, (1000, 65_534), b"", "owned")
        .entry("fifo", EntryType::Fifo, 0o622, (5, 6), b"", "")
        .entry("zero", EntryType::Char, 0o666, (0, 0), b"", "")
        .entry("private", EntryType::Directory, 0o700, (33, 33), b"", "")
        .file("private/file", 0o600, b"x")
        .attribute("security.capability", &capability)
        .attribute("user.note", b"hello")
        .file("ping", 0o755, b"#!");
    let commands = [
        "stat -c '%n %a %u %g %h' /owned /second /fifo /private",
        "ls / | grep -c zero; cat /private/file; echo; echo $COLOUR $HOME",
        "echo more >> /ping",
    ];
    let ended = Run::on(vec![lower.bytes()], &commands).end().well();
    assert_eq!(
        ended.output(),
        [
            "/owned 2640 1000 65534 2",
            "/second 2640 1000 65534 2",
            "/fifo 622 5 6 1",
            "/private 700 33 33 2",
            "0",
            "x",
            "red /root",
        ]
    );
    // The last command took the capability away, as a write does, but not the note. A device that
    // was not shown was not removed.
    let changed = ended.changed();
    assert_eq!(changed["ping"].attributes.keys().collect::<Vec<_>>(), ["user.note"]);
    assert_eq!(ended.paths(), ["./", "ping"]);

    let lower = Layer::busybox().attribute("security.capability", &capability);
    let lower = lower.file("ping", 0o755, b"#!");
    let ended = Run::on(vec![lower.bytes()], &["chmod 750 /ping"]).end().well();
    let ping = &ended.changed()["ping"];
    assert_eq!(ping.mode, 0o750);
    assert_eq!(ping.attributes["security.capability"], capability, "version 2, no root id");
}

#[test]
fn a_command_that_changes_nothing_makes_a_layer_of_the_root_alone() {
    if !can_run() {
        return;
    }
    // No /proc, no /dev: the runtime's mount points are nobody's change.
    let first = Run::busybox(&["true", "cat /etc/none || true"]).end().well();
    assert_eq!(first.paths(), ["./"]);
    let second = Run::busybox(&["true"]).end().well();
    assert_eq!(first.tar, second.tar, "no clock, no number of a process in it");
}

#[test]
fn layers_are_folded_before_commands_see_them() {
    if !can_run() {
        return;
    }
    let upper = Layer::new().file("etc/.wh.old", 0o644, b"").file("etc/new", 0o644, b"new");
    let lower = Layer::busybox().file("etc/old", 0o644, b"old");
    let run = Run::on(vec![lower.bytes(), upper.bytes()], &["ls /etc"]);
    assert_eq!(run.end().well().output(), ["new"]);
}

#[test]
fn what_scripts_write_to_their_standard_streams_by_name_is_output() {
    if !can_run() {
        return;
    }
    let script = "echo one > /dev/stdout; echo two > /dev/stderr; echo three >> /proc/self/fd/1";
    let ended = Run::busybox(&[script]).end().well();
    let mut output = ended.output();
    // Each stream has its order, both together have none.
    output.sort_unstable();
    assert_eq!(output, ["one", "three", "two"]);
}

/// The loop device whose file lies in a directory.
fn device(directory: &Path) -> Option<PathBuf> {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let is_it = |device: &fs::DirEntry| {
        let file = fs::read_to_string(device.path().join("loop/backing_file"));
        file.is_ok_and(|file| Path::new(&file).starts_with(directory))
    };
    devices.into_iter().find(is_it).map(|device| Path::new("/dev").join(device.file_name()))
}

#[test]
fn owners_on_the_disk_of_commands_are_the_images_own_and_theirs_to_whoever_looks() {
    if !can_run() {
        return;
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if release.split('.').next().is_none_or(|major| major.parse::<u32>().is_ok_and(|n| n < 6)) {
        eprintln!("SKIPPED: overlays above idmapped mounts are of Linux 6.0, this is {release}");
        return;
    }
    let file = tar::EntryType::Regular;
    let lower = Layer::busybox().entry("etc/theirs", file, 0o644, (1000, 65_534), b"x", "");
    let mark = format!("8{}", std::process::id());
    let command =
        format!("echo > /etc/new; chown 7:8 /etc/new; echo > /etc/roots; sync; sleep {mark}");
    let run = Run::on(vec![lower.bytes()], &[&command]);
    let mut build = run.start();
    let process = sleeping(&mark);
    let first = first_user(&process);
    for (path, (user, group)) in [
        ("etc/new", (7, 8)),
        ("etc/roots", (0, 0)),
        ("etc/theirs", (1000, 65_534)),
        ("bin/busybox", (0, 0)),
    ] {
        let seen = fs::metadata(process.join("root").join(path)).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (first + user, first + group), "{path}");
    }
    // Another program's eyes, before which no mount stands.
    let device = device(&run.place.path().canonicalize().unwrap()).unwrap();
    let owner = |path: &str| {
        let asked = format!("stat /tree/{path}");
        let told = Command::new("debugfs").args(["-R", &asked]).arg(&device).output().unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        let number = |name: &str| -> Option<u32> {
            told.split_once(name)?.1.split_whitespace().next()?.parse().ok()
        };
        Some((number("User:")?, number("Group:")?))
    };
    for (path, wanted) in [
        ("upper/etc/new", (7, 8)),
        ("upper/etc/roots", (0, 0)),
        ("upper/etc", (0, 0)),
        ("lower/etc/theirs", (1000, 65_534)),
        ("lower/bin/busybox", (0, 0)),
        // Nobody's: the tree's name is not the commands' to change.
        ("..", (sandbox::Users::COUNT, sandbox::Users::COUNT)),
    ] {
        assert_eq!(owner(path), Some(wanted), "{path}");
    }
    build.kill().unwrap();
    build.wait().unwrap();
}

#[test]
fn an_access_control_list_is_still_there_when_a_command_has_changed_its_file() {
    if !can_run() {
        return;
    }
    // Version 2: tag, permissions, who (linux/posix_acl_xattr.h): besides the owner the user 1000 reads.
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, who) in [
        (0x01_u16, 6_u16, u32::MAX),
        (0x02, 4, 1000),
        (0x04, 4, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(who.to_le_bytes());
    }
    let lower = Layer::busybox().attribute("system.posix_acl_access", &list);
    let lower = lower.file("listed", 0o640, b"x");
    let ended = Run::on(vec![lower.bytes()], &["echo more >> /listed"]).end().well();
    assert_eq!(ended.changed()["listed"].attributes["system.posix_acl_access"], list);
}
