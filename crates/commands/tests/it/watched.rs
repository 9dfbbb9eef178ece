//! Commands where the host has no loop devices: their disk is a directory that is watched.

use std::os::unix::fs::MetadataExt as _;

use commands::Scratch;

use crate::debian::layers;
use crate::support::{Layer, Run, can_run, first_user, sleeping};

fn watched(commands: &[&str]) -> Run {
    let mut run = Run::busybox(commands);
    run.order.scratch = Scratch::Watched;
    run
}

/// What is left beside the files of the test itself.
fn left(run: &std::path::Path) -> Vec<String> {
    let names = std::fs::read_dir(run).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_watched_directory_gives_the_same_layer_and_nothing_of_it_stays() {
    if !can_run() {
        return;
    }
    let script =
        "mkdir -p /var/a && echo new > /var/a/file && rm /etc/old && chmod 4755 /var/a/file";
    let make = |scratch| {
        let lower = Layer::busybox().file("etc/old", 0o644, b"old");
        let mut run = Run::on(
            vec![lower.bytes()],
            &[script, "touch -d 2001-01-01 /var /var/a/file /var/a /etc /"],
        );
        run.order.scratch = scratch;
        let place = tempfile::tempdir().unwrap();
        run.order.scratch_directory = place.path().to_owned();
        let ended = run.end().well();
        assert_eq!(left(place.path()), Vec::<String>::new());
        ended
    };
    let (one, other) = (make(Scratch::Sized), make(Scratch::Watched));
    assert_eq!(one.changed(), other.changed());
    assert!(other.paths().contains(&"etc/.wh.old".to_owned()), "{:?}", other.paths());
}

#[test]
fn owners_in_a_watched_directory_are_never_the_hosts_own() {
    if !can_run() {
        return;
    }
    let mark = format!("9{}", std::process::id());
    let mut run = watched(&[&format!("echo > /etc/new; chmod 4755 /etc/new; sleep {mark}")]);
    let place = tempfile::tempdir().unwrap();
    run.order.scratch_directory = place.path().to_owned();
    let mut build = run.start();
    let first = first_user(&sleeping(&mark));
    let [watched] = &left(place.path())[..] else { panic!("one directory") };
    let watched = place.path().join(watched);
    let mode = std::fs::metadata(&watched).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o700, "nobody but root goes where their programs are");
    let tree = watched.join("tree");
    for path in ["upper/etc/new", "upper/etc", "lower/bin/busybox"] {
        let found = std::fs::symlink_metadata(tree.join(path)).unwrap();
        assert_eq!((found.uid(), found.gid()), (first, first), "{path}");
    }
    build.kill().unwrap();
    build.wait().unwrap();
}

#[test]
fn commands_that_outgrow_a_watched_directory_are_ended_for_it() {
    if !can_run() {
        return;
    }
    let wanted = "needs more disk than commands may have";
    for (script, words) in [
        // Never done by itself.
        (
            "i=0; while :; do dd if=/dev/zero of=/f$i bs=1M count=8 2>/dev/null; i=$((i+1)); sleep 0.05; done",
            wanted,
        ),
        ("i=0; while :; do echo > /tmp/f$i; i=$((i+1)); done", wanted),
        ("dd if=/dev/zero of=/big bs=1M count=100 2>/dev/null; exit $?", wanted),
        ("cd /tmp; while :; do mkdir d && cd d; done", "deep"),
    ] {
        let mut run = watched(&[script]);
        run.order.disk_bytes = 48 << 20;
        let place = tempfile::tempdir().unwrap();
        run.order.scratch_directory = place.path().to_owned();
        let ended = run.end();
        let error = ended.error.unwrap();
        assert!(error.starts_with("theirs: ") && error.contains(words), "{script}: {error}");
        assert_eq!(left(place.path()), Vec::<String>::new(), "{script}");
    }
}

#[test]
fn files_that_commands_remove_and_still_hold_are_counted() {
    if !can_run() {
        return;
    }
    let hold = |count: u32| {
        let script = format!(
            "for n in $(seq 3 {}); do eval \"exec $n> /tmp/f; rm /tmp/f\"; \
             dd if=/dev/zero bs=1M count=8 >&$n 2>/dev/null; done; sleep 3; ls /tmp | wc -l",
            count + 2
        );
        let mut run = watched(&[&script]);
        run.order.disk_bytes = 48 << 20;
        run.end()
    };
    let few = hold(3).well();
    assert_eq!(few.output(), ["0"], "they take their share, and nobody minds");
    let error = hold(7).error.unwrap();
    assert!(error.contains("needs more disk than commands may have"), "{error}");
}

#[test]
fn a_disk_is_not_taken_at_once_where_it_is_only_watched() {
    if !can_run() {
        return;
    }
    let Some(layers) = layers() else {
        eprintln!("SKIPPED: no target/images/small: cargo xtask images");
        return;
    };
    // FS_IOC_RESVSP, linux/falloc.h: the same by another call.
    let reserve = r#"perl -e 'open F, ">", "/g"; my $to = pack("s s x4 q q l L l4", 0, 0, 0, 1e6);
                  print ioctl(F, 0x40305828, $to) ? "done\n" : "$!\n"; ioctl(F, 0x5421, $to)
                  or print "another call: $!\n"' 2>&1"#;
    for (scratch, words) in [
        (Scratch::Sized, ["done", "done"]),
        (Scratch::Watched, ["not supported", "Inappropriate ioctl"]),
    ] {
        let commands = ["fallocate -l 1000000 /f 2>&1 && echo done; true", reserve];
        let mut run = Run::on(layers.clone(), &commands);
        run.order.scratch = scratch;
        run.base.environment.clear();
        run.order.disk_bytes = 4 << 30;
        let ended = run.end().well();
        let output = ended.output();
        assert_eq!(output.len(), 2, "{scratch:?}: {output:?}");
        let has_both = output.iter().zip(words).all(|(line, words)| line.contains(words));
        assert!(has_both, "{scratch:?}: {output:?}");
    }
}

#[test]
fn an_image_that_is_larger_than_the_watched_disk_is_refused() {
    if !can_run() {
        return;
    }
    let lower = Layer::busybox().file("big", 0o644, &vec![7; 32 << 20]);
    let mut run = Run::on(vec![lower.bytes()], &["while :; do :; done"]);
    run.order.scratch = Scratch::Watched;
    run.order.disk_bytes = 8 << 20;
    let error = run.end().error.unwrap();
    assert!(error.starts_with("theirs: ") && error.contains("more disk"), "{error}");
}
