//! Runtimes that leave something behind, or whose output nobody takes: scripts in the place of one.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use commands::Scratch;

use crate::support::{Layer, Run};

/// What a script finds out first: `bundle` is what it is told, `tree` is where commands would work.
const ARGUMENTS: &str = r#"#!/bin/sh
case "$*" in
--version) echo script version 1; exit;;
*" run "*) ;;
*" delete "*) sleep 1000 & exit;;
esac
for word; do
    case $previous in --bundle) bundle=$word tree=$(dirname "$word")/merged;; esac
    previous=$word
done
"#;

/// A runtime that does what the script says; none where this host can run no commands.
fn runtime(place: &Path, script: &str) -> Option<PathBuf> {
    let path = place.join("runtime");
    fs::write(&path, format!("{ARGUMENTS}{script}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    match commands::check(path.to_str().unwrap(), &[]) {
        Ok(found) => Some(found.program),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

fn run(runtime: PathBuf, commands: &[&str]) -> Run {
    Run::by(runtime, vec![Layer::new().file("file", 0o644, b"x").bytes()], commands)
}

#[test]
fn what_a_runtime_leaves_behind_does_not_hold_up_who_waits_for_its_output() {
    let place = tempfile::tempdir().unwrap();
    // Whoever it leaves has its output, and errors, open.
    // It makes files as runtimes do: as root of the commands, from within.
    let script = "echo first; sleep 1000 &
        user=$(grep -o 'hostID\":[0-9]*' $bundle/config.json | head -n 1 | cut -d : -f 2)
        setpriv --reuid $user --regid $user --clear-groups sh -c 'echo made > $0/made' $tree
        echo last >&2";
    let Some(runtime) = runtime(place.path(), script) else { return };
    let mut run = run(runtime, &["one", "two"]);
    run.order.limits.secs_max = Some(20);
    let ended = run.end().well();
    assert_eq!(ended.output(), ["first", "last", "first", "last"]);
    assert_eq!(ended.changed()["made"].contents, b"made\n");
}

#[test]
fn a_runtime_gets_no_file_but_its_own_streams() {
    let place = tempfile::tempdir().unwrap();
    let script = "for file in /proc/$$/fd/*; do readlink $file; done; true";
    let Some(runtime) = runtime(place.path(), script) else { return };
    let run = run(runtime, &["list"]);
    let packs = run.directory.path().to_str().unwrap().to_owned();
    let ended = run.end().well();
    let output = ended.output();
    assert!(output.contains(&"/dev/null"), "{output:?}");
    // Nor the pipe of the layer.
    let pipes = output.iter().filter(|file| file.starts_with("pipe:"));
    assert_eq!(pipes.collect::<std::collections::BTreeSet<_>>().len(), 1, "{output:?}");
    assert!(!output.iter().any(|file| file.starts_with(&packs)), "{output:?}");
}

/// Bytes on disk below a directory.
fn used(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|entry| {
        let found = entry.path().symlink_metadata().ok()?;
        let below = if found.is_dir() { used(&entry.path()) } else { 0 };
        Some(found.blocks() * 512 + below)
    });
    sizes.sum()
}

/// Whether a process has this word among those that it was started with.
fn runs(word: &str) -> bool {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let lines = all.map(|pid| fs::read(pid.path().join("cmdline")).unwrap_or_default());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned()).any(|line| line.contains(word))
}

#[test]
fn a_watched_disk_is_held_to_its_size_though_nobody_listens() {
    const DISK_BYTES: u64 = 48 << 20;
    let place = tempfile::tempdir().unwrap();
    let mark = place.path().to_str().unwrap();
    // More than fits into all the pipes on the way, and then the disk.
    let script = "seq 1 400000 & while [ ${i:=0} -lt 40 ]; do
        dd if=/dev/zero of=$tree/$i bs=1M count=8 2>/dev/null; i=$((i + 1)); sleep 0.1; done
        echo > \"$(dirname $0)/done\"; sleep 1000";
    let Some(runtime) = runtime(place.path(), script) else { return };
    let mut run = run(runtime, &["flood"]);
    run.order.scratch = Scratch::Watched;
    run.order.disk_bytes = DISK_BYTES;
    let deaf = run.directory.path().join("deaf");
    fs::write(&deaf, "").unwrap();
    let mut build = run.start();
    let until = Instant::now() + Duration::from_secs(60);
    let (mut most, mut has_begun) = (0, false);
    while !has_begun || runs(mark) {
        has_begun |= runs(mark);
        most = most.max(used(run.place.path()));
        let is_over = most > 4 * DISK_BYTES || Instant::now() > until;
        if is_over || place.path().join("done").exists() {
            build.kill().unwrap();
            build.wait().unwrap();
            panic!("{most} bytes, and it went on");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    fs::remove_file(deaf).unwrap();
    assert!(build.wait_with_output().unwrap().status.success());
    let error = fs::read_to_string(run.directory.path().join("error")).unwrap();
    assert!(error.ends_with("needs more disk than commands may have"), "{error}");
}

#[test]
fn the_place_of_groups_stays_as_long_as_a_build_may_need_it() {
    let directory = tempfile::tempdir().unwrap();
    // What another build does that ends meanwhile.
    let script =
        "group=$(grep -E '[:,]memory[:,]|^0::' /proc/self/cgroup | head -n 1 | cut -d : -f 3-)
        for place in /sys/fs/cgroup$group/commands /sys/fs/cgroup/memory$group/commands; do
            rmdir $place 2> /dev/null
            test -d $place && echo kept
        done; true";
    let Some(runtime) = runtime(directory.path(), script) else { return };
    let ended = run(runtime, &["one"]).end().well();
    assert_eq!(ended.output(), ["kept"]);
}
