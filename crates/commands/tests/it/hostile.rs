//! Commands and images that mean harm.

use commands::{Event, Joins};

use crate::support::{Layer, Run, can_run, sleeping};

#[test]
fn commands_are_root_of_nothing_but_their_tree() {
    if !can_run() {
        return;
    }
    let script = "id -u; hostname; grep -c . /proc/net/dev; \
                  mount -t tmpfs x /tmp 2>&1 | grep -c -i -e permi -e denied; \
                  unshare -U true 2>&1 | grep -c -i permi; \
                  mknod /dev/disk b 7 0 2>&1 | grep -c -i permi; \
                  echo 1 2>&1 > /proc/sys/kernel/panic || echo read-only; \
                  grep -e CapEff -e NoNewPrivs -e Seccomp: /proc/self/status | tr '\\t' ' '; \
                  ls /proc | grep -c '^[0-9]*$'";
    let ended = Run::busybox(&[script]).end().well();
    let output = ended.output();
    let at = |place: usize| *output.get(place).unwrap_or(&"");
    assert_eq!(at(0), "0");
    assert_eq!(at(1), "build");
    assert_eq!(at(2), "3", "two lines of headings, and loopback: {output:?}");
    assert_eq!(&output[3..6], ["1", "1", "1"], "mount, unshare, mknod: {output:?}");
    assert!(output.contains(&"read-only"), "{output:?}");
    // Nine, in its own user namespace.
    assert!(output.contains(&"CapEff: 00000000800400fb"), "{output:?}");
    assert!(output.contains(&"NoNewPrivs: 1"), "{output:?}");
    assert!(output.contains(&"Seccomp: 2"), "{output:?}");
}

#[test]
fn there_is_no_network() {
    if !can_run() {
        return;
    }
    let script = "nc -w 2 192.0.2.1 80 2>&1; true";
    let ended = Run::busybox(&[script]).end().well();
    assert!(ended.output().iter().any(|line| line.contains("unreachable")), "{:?}", ended.output());
}

#[test]
fn links_of_an_image_do_not_lead_the_unpacker_out() {
    if !can_run() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let lower = Layer::busybox()
        .entry("out", tar::EntryType::Symlink, 0o777, (0, 0), b"", target)
        .file("out/pwned", 0o644, b"x");
    Run::on(vec![lower.bytes()], &["true"]).end().well();
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn an_image_without_a_directory_that_is_mounted_on_is_refused_by_its_path() {
    if !can_run() {
        return;
    }
    // Whoever likes to may write there.
    let outside = tempfile::tempdir().unwrap();
    let anybody = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
    std::fs::set_permissions(outside.path(), anybody).unwrap();
    let out = outside.path().to_str().unwrap();
    let up = format!("/../../..{out}");
    let (link, file) = (tar::EntryType::Symlink, tar::EntryType::Regular);
    for (name, kind, target) in [
        ("proc", link, "/etc"),
        ("proc", file, ""),
        ("proc", tar::EntryType::Fifo, ""),
        ("dev", link, "etc"),
        ("dev", link, out),
        ("dev", link, &up),
        ("dev", file, ""),
    ] {
        let lower = Layer::busybox().entry(name, kind, 0o777, (0, 0), b"", target);
        let error = Run::on(vec![lower.bytes()], &["true"]).end().error.unwrap_or_default();
        // The runtime that is tried here makes links where such a link leads.
        let made: Vec<_> = std::fs::read_dir(outside.path()).unwrap().flatten().collect();
        assert!(made.is_empty(), "{name} {kind:?} {target}: {made:?}");
        let said = format!("theirs: /{name} of the image is no directory");
        assert!(error.starts_with(&said), "{kind:?} {target}: {error}");
    }
    // What nothing is mounted on may be what it likes.
    let lower = Layer::busybox().entry("sys", link, 0o777, (0, 0), b"", "/etc");
    Run::on(vec![lower.bytes()], &["true"]).end().well();
}

#[test]
fn a_link_that_a_taken_over_unpacker_leaves_leads_nowhere() {
    if !can_run() {
        return;
    }
    for name in ["lower", "upper", "dev", "proc"] {
        let mut run = Run::busybox(&["true"]);
        let program = run.directory.path().join(format!("taken-over-{name}"));
        std::fs::copy(&run.program, &program).unwrap();
        run.program = program;
        let error = run.end().error.unwrap_or_default();
        assert!(error.contains(&format!("the unpacker left no /{name}")), "{error}");
    }
}

#[test]
fn users_of_commands_are_nobody_elses_while_they_run() {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    if !can_run() {
        return;
    }
    let mark = format!("7{}", std::process::id());
    let run = Run::busybox(&[&format!("sleep {mark}")]);
    let mut child = run.start();
    // As this host sees them: the first inside, the first outside, how many.
    let map = std::fs::read_to_string(sleeping(&mark).join("uid_map")).unwrap();
    let map: Vec<u32> = map.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let number = (map[1] - 0x6500_0000) / sandbox::Users::COUNT;
    assert_eq!(map, [0, 0x6500_0000 + number * sandbox::Users::COUNT, sandbox::Users::COUNT]);
    // The name by which a range has one holder.
    let name = SocketAddr::from_abstract_name(format!("builderd-users-many-{number}")).unwrap();
    let taken = UnixDatagram::bind_addr(&name).unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    child.kill().unwrap();
    child.wait().unwrap();
    // Gone with its holder, unless somebody else holds it already.
    drop(UnixDatagram::bind_addr(&name));
}

#[test]
fn a_command_cannot_forge_marks_of_a_layer() {
    if !can_run() {
        return;
    }
    let error = Run::busybox(&["echo > /etc/.wh.passwd"]).end().error.unwrap();
    assert!(error.starts_with("theirs: a command made /etc/.wh.passwd"), "{error}");
    let error = Run::busybox(&["mkdir /etc/x && echo > /etc/x/.wh..wh..opq"]).end().error.unwrap();
    assert!(error.contains(".wh..wh..opq"), "{error}");
}

#[test]
fn a_long_output_does_not_hold_up_or_fill_the_log() {
    if !can_run() {
        return;
    }
    let script = "head -c 30000000 /dev/zero | tr '\\0' 'x' | dd bs=1000 cbs=1000 conv=unblock \
                  2>/dev/null || while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done \
                  | head -n 100000";
    let ended =
        Run::busybox(&[script, "printf '\\033[31mred\\033[0m\\n' 2>/dev/null"]).end().well();
    let bytes: usize = ended.output().iter().map(|line| line.len()).sum();
    assert!((1 << 18..2 << 20).contains(&bytes), "{bytes}");
    let is_told =
        |event: &Event| matches!(event, Event::Warning { message } if message.contains("left out"));
    assert_eq!(ended.events.iter().filter(|event| is_told(event)).count(), 1);
}

#[test]
fn an_image_cannot_steer_the_overlay_above_it() {
    if !can_run() {
        return;
    }
    let directory = tar::EntryType::Directory;
    let lower = Layer::busybox()
        .attribute("user.overlay.protattr", b"i")
        .attribute("user.overlay.opaque", b"x")
        .entry("srv", directory, 0o755, (0, 0), b"", "")
        .attribute("user.overlay.whiteout", b"")
        .file("srv/hidden", 0o644, b"")
        .attribute("user.overlay.protattr", b"i")
        .attribute("user.kept", b"1")
        .file("srv/fixed", 0o644, b"");
    let script = "ls /srv; chmod 700 /srv; echo x > /srv/fixed; echo y > /srv/new";
    let ended = Run::on(vec![lower.bytes()], &[script]).end().well();
    assert_eq!(ended.output(), ["fixed", "hidden"]);
    let changed = ended.changed();
    assert_eq!(ended.paths(), ["./", "srv", "srv/fixed", "srv/new"]);
    assert_eq!(changed["srv/fixed"].attributes.keys().collect::<Vec<_>>(), ["user.kept"]);
}

#[test]
fn a_crash_starts_no_program_of_the_host() {
    if !can_run() {
        return;
    }
    // A limit of 1 alone keeps the kernel from it; lowering it is no way around.
    let limit = "grep core /proc/self/limits | tr -s ' ' | cut -d' ' -f5,6";
    let script = format!("{limit}; ulimit -c 0 && {limit}; ulimit -n 100 && ulimit -n");
    let ended = Run::busybox(&[&script]).end().well();
    assert_eq!(ended.output(), ["1 1", "1 1", "100"], "other limits can be set");
}

#[test]
fn the_host_cannot_be_changed_or_read_through_proc_and_dev() {
    if !can_run() {
        return;
    }
    let scripts = [
        "date -s 2001-01-01 2>&1 | grep -c -i permitted",
        "hostname other 2>&1 | grep -c -i permitted",
        "dmesg 2>&1 | grep -c -i permitted",
        "for f in kcore keys timer_list interrupts cmdline modules partitions diskstats; do \
         head -c 1 /proc/$f 2>/dev/null | wc -c; done | sort -u | tr '\\n' ' '",
        "for f in sysrq-trigger sys/kernel/core_pattern sys/kernel/modprobe irq/x bus/x fs/x; do \
         echo x 2>/dev/null > /proc/$f && echo wrote $f; done; ls /sys 2>/dev/null | wc -l",
        "ls /dev | sort | tr '\\n' ' '",
        "mknod /null c 1 3 2>&1 | grep -c -i permitted; mknod /etc/gone c 0 0 2>&1 \
         | grep -c -i permitted",
    ];
    let ended = Run::busybox(&scripts).end().well();
    let expected = [
        "1",
        "1",
        "1",
        "0",
        "0",
        "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero",
        "1",
        "1",
    ];
    assert_eq!(ended.output(), expected);
    assert!(!ended.paths().iter().any(|path| path.contains("gone")), "{:?}", ended.paths());
}

#[test]
fn a_working_directory_in_proc_leads_nowhere() {
    if !can_run() {
        return;
    }
    for number in 3..12 {
        let link = format!("/proc/self/fd/{number}");
        let kind = tar::EntryType::Symlink;
        let lower = Layer::busybox().entry("work", kind, 0o777, (0, 0), b"", &link).bytes();
        for directory in [link.as_str(), "/work"] {
            let script = "ls ../../../../../etc/hostname && echo out";
            let mut run = Run::on(vec![lower.clone()], &[script]);
            run.base.working_directory = directory.to_owned();
            let ended = run.end();
            assert!(ended.error.is_some(), "{directory}: {:?}", ended.events);
            assert!(!ended.output().contains(&"out"), "{directory}: {:?}", ended.events);
        }
    }
}

#[test]
fn what_a_command_leaves_running_is_gone_before_the_next_begins() {
    if !can_run() {
        return;
    }
    let mark = format!("9{}", std::process::id());
    let leave = format!("(trap '' TERM HUP; setsid sleep {mark}) > /dev/null 2>&1 & sleep 0.2");
    let ended = Run::busybox(&[&leave, "echo next"]).end().well();
    assert_eq!(ended.output(), ["next"]);
    let line = format!("sleep\0{mark}\0").into_bytes();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = all.map(|pid| std::fs::read(pid.path().join("cmdline")).unwrap_or_default());
    assert_eq!(lines.filter(|words| *words == line).count(), 0);
}

#[test]
fn odd_names_and_kinds_of_files_come_into_the_layer_as_they_are() {
    if !can_run() {
        return;
    }
    let script = "cd /tmp; echo 1 > \"$(printf 'a\\nb')\"; echo 2 > \"$(printf '\\001\\377')\"; \
                  echo 3 > -rf; ln -s \"$(printf 'x\\ny')\" link; ln link same; mkfifo p; ln p q; \
                  cp /bin/busybox s; chmod 6755 s; touch -d 1901-12-14 old; touch -d 2400-01-01 new; \
                  d=; for i in $(seq 60); do d=$d/dddddddddddddddddddd; done; mkdir -p /tmp$d";
    let ended = Run::busybox(&[script]).end().well();
    let mut archive = tar::Archive::new(&ended.tar[..]);
    let paths: Vec<Vec<u8>> =
        archive.entries().unwrap().map(|entry| entry.unwrap().path_bytes().to_vec()).collect();
    let has = |path: &[u8]| paths.iter().any(|found| found == path);
    assert!(has(b"tmp/a\nb") && has(b"tmp/\x01\xff") && has(b"tmp/-rf"), "{paths:?}");
    assert!(paths.iter().any(|path| path.len() > 1200), "a path beyond the header's field");
    let mut pack = Vec::new();
    rootfs::make_pack(&ended.tar[..], &mut pack, &rootfs::Limits::default()).unwrap();
    let text = String::from_utf8_lossy(&ended.tar);
    assert!(text.contains("linkpath=x\ny\n"), "a link's target with a newline");
    assert_eq!(paths.iter().filter(|path| path.starts_with(b"tmp/s")).count(), 2);
}

#[test]
fn a_builds_commands_share_its_own_user_namespace() {
    if !can_run() {
        return;
    }
    // One that their keeper has made as their user. A runtime makes one for each, and as root: what the
    // kernel counts for the owner of a namespace all builds would share then.
    let ask = "readlink /proc/self/ns/user";
    let ended = Run::busybox(&[ask, ask]).end().well();
    let output = ended.output();
    assert_eq!(output.len(), 2, "{output:?}");
    assert_eq!(output[0], output[1]);
    assert_ne!(output[0], std::fs::read_link("/proc/self/ns/user").unwrap().to_str().unwrap());
    // With a way out as well, where the runtime is one that can.
    let run = Run::busybox(&[ask, ask]);
    let joins = run.order.joins;
    std::fs::write(run.directory.path().join("door"), "").unwrap();
    let ended = run.end().well();
    let output = ended.output();
    assert_eq!(output[0] == output[1], joins == Joins::Last, "{output:?}");
}

#[test]
fn commands_take_so_many_terminals_and_leave_the_rest_to_others() {
    if !can_run() {
        return;
    }
    // Each call has one more open than who called it.
    let script = "f() { n=$1; [ $n -ge 200 ] || f $((n + 1)) < /dev/ptmx; }; f 0; echo $n";
    let ended = Run::busybox(&[script]).end().well();
    assert_eq!(ended.output().last(), Some(&"64"), "{:?}", ended.output());
}
