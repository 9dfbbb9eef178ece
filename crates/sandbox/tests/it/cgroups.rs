//! Groups that the kernel holds to their limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sandbox::{CgroupLimits, CgroupRoot};

/// A place for this test alone; None where the host lets us make none.
fn root(name: &str) -> Option<CgroupRoot> {
    let name = format!("builderd-test-{name}-{}", std::process::id());
    match CgroupRoot::open(&name) {
        Ok(root) => Some(root),
        Err(error) => {
            println!("skipped: {error}: {}", error.source);
            None
        }
    }
}

/// A shell that waits for a line before it does anything.
fn shell(script: &str) -> Child {
    Command::new("sh")
        .args(["-c", &format!("read -r go; {script}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn go(child: &mut Child) {
    use std::io::Write as _;
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
}

#[test]
fn who_takes_more_memory_than_the_group_has_is_killed_and_counted() {
    let Some(root) = root("memory") else { return };
    let limits = CgroupLimits { memory_bytes_max: Some(32 << 20), ..CgroupLimits::default() };
    let group = root.create("hungry", &limits).unwrap();
    let mut child = shell("head -c 200000000 /dev/zero | tail -c 150000000");
    group.add(child.id()).unwrap();
    go(&mut child);
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(128 + 9), "{status}");
    let usage = group.usage();
    assert_eq!(usage.out_of_memory_kills, 1, "{usage:?}");
    assert!((30 << 20..=32 << 20).contains(&usage.memory_peak_bytes), "{usage:?}");
    drop(group);
    root.remove();
}

#[test]
fn a_fork_storm_is_bounded_and_ends_with_its_group() {
    let Some(root) = root("storm") else { return };
    let limits = CgroupLimits { pids_max: Some(24), ..CgroupLimits::default() };
    let group = root.create("storm", &limits).unwrap();
    let mut child = shell("trap '' TERM; f() { setsid sh -c 'sleep 60' & f; }; f; sleep 60");
    group.add(child.id()).unwrap();
    go(&mut child);
    let deadline = Instant::now() + Duration::from_secs(20);
    while group.usage().pids_refused == 0 {
        assert!(Instant::now() < deadline, "nothing was refused");
        std::thread::yield_now();
    }
    let directories: Vec<_> = group.directories().map(Path::to_owned).collect();
    let started = Instant::now();
    drop(group);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    child.wait().unwrap();
    for directory in directories {
        assert!(!directory.exists(), "{}", directory.display());
    }
    root.remove();
}

#[test]
fn what_a_dead_service_left_is_swept_and_nothing_else() {
    let Some(root) = root("left") else { return };
    let group = root.create("left", &CgroupLimits::default()).unwrap();
    let (mut inside, mut outside) = (shell("sleep 60"), shell("exit 7"));
    group.add(inside.id()).unwrap();
    // As if the process had been killed: nothing is dropped.
    std::mem::forget(group);
    assert_eq!(root.sweep(), ["left"]);
    assert!(!inside.wait().unwrap().success());
    assert!(root.sweep().is_empty());
    go(&mut outside);
    assert_eq!(outside.wait().unwrap().code(), Some(7));
    root.remove();
}

#[test]
fn places_that_nobody_uses_are_cleared_and_made_again_when_they_are_needed() {
    let (Some(old), Some(new)) = (root("idle"), root("fresh")) else { return };
    let is_there = |root: &CgroupRoot| root.places().all(Path::is_dir);
    assert!(!is_there(&old) && is_there(&new), "opening the second clears the first away");
    let group = old.create("late", &CgroupLimits::default()).unwrap();
    assert!(group.directories().all(Path::is_dir));
    let third = root("third").unwrap();
    assert!(group.directories().all(Path::is_dir), "one in use stays");
    drop(group);
    for root in [old, new, third] {
        root.remove();
    }
}

#[test]
fn a_group_takes_no_more_of_the_cpus_than_its_limit_and_ends_at_once_all_the_same() {
    let Some(root) = root("limit") else { return };
    let group = root.create("held", &CgroupLimits::default()).unwrap();
    let mut child = shell("while :; do :; done");
    group.add(child.id()).unwrap();
    group.set_cpu_limit(Some(20)).unwrap();
    go(&mut child);
    let taken = || {
        let before = group.usage().cpu_usecs;
        std::thread::sleep(Duration::from_secs(1));
        group.usage().cpu_usecs - before
    };
    let held = taken();
    group.set_cpu_limit(None).unwrap();
    let free = taken();
    assert!(free > 3 * held, "{held} and {free} µs");
    group.set_cpu_limit(Some(1)).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    group.kill();
    child.wait().unwrap();
    let limit = group.directories().find_map(|directory| {
        let v1 = fs::read_to_string(directory.join("cpu.cfs_quota_us"));
        v1.or_else(|_| fs::read_to_string(directory.join("cpu.max"))).ok()
    });
    let limit = limit.unwrap();
    assert!(limit.starts_with("-1") || limit.starts_with("max"), "{limit}");
    drop(group);
    root.remove();
}

#[test]
fn a_heavier_group_gets_more_of_a_cpu_that_both_want() {
    let Some(root) = root("weight") else { return };
    let group = |name: &str, weight| {
        let group = root.create(name, &CgroupLimits::default()).unwrap();
        group.set_cpu_weight(weight).unwrap();
        // Both on one CPU, or there would be one for each.
        let mut child = shell("taskset -p 1 $$; while :; do :; done");
        group.add(child.id()).unwrap();
        (group, child.stdin.take().unwrap(), child)
    };
    let mut all = [group("light", 1), group("heavy", 10_000)];
    for (_, stdin, _) in &mut all {
        use std::io::Write as _;
        stdin.write_all(b"go\n").unwrap();
    }
    std::thread::sleep(Duration::from_secs(1));
    let [light, heavy] = all.map(|(group, _, mut child)| {
        let taken = group.usage().cpu_usecs;
        drop(group);
        child.wait().unwrap();
        taken
    });
    // The first moments, until both have said where they run, are free.
    assert!(heavy > 3 * light, "{heavy} and {light} µs");
    root.remove();
}

/// What a group weighs beside others, as the kernel has it: `cpu.weight` or `cpu.shares`.
fn weight(group: &sandbox::Cgroup) -> u64 {
    let files = ["cpu.weight", "cpu.shares"];
    let mut files = group.directories().flat_map(|place| files.map(|file| place.join(file)));
    let file = files.find(|file| file.exists()).unwrap();
    fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

#[test]
fn a_group_that_is_ended_does_not_wait_for_the_cpu_behind_others() {
    let Some(root) = root("hurry") else { return };
    let group = root.create("slow", &CgroupLimits::default()).unwrap();
    group.set_cpu_weight(1).unwrap();
    let mut child = shell("sleep 60");
    group.add(child.id()).unwrap();
    let before = weight(&group);
    group.kill();
    assert!(weight(&group) >= 1000 * before, "{} and {before}", weight(&group));
    child.wait().unwrap();
    drop(group);
    root.remove();
}

#[test]
fn a_group_whose_name_was_used_before_begins_anew() {
    let Some(root) = root("anew") else { return };
    let limits = CgroupLimits { pids_max: Some(1), ..CgroupLimits::default() };
    let old = root.create("again", &limits).unwrap();
    let mut child = shell("true & true");
    old.add(child.id()).unwrap();
    go(&mut child);
    child.wait().unwrap();
    assert!(old.usage().pids_refused > 0, "{:?}", old.usage());
    old.kill();
    let hurried = weight(&old);
    // As if the service had been killed.
    std::mem::forget(old);
    let new = root.create("again", &CgroupLimits::default()).unwrap();
    assert_eq!(new.usage().pids_refused, 0);
    assert!(weight(&new) < hurried, "{}", weight(&new));
    drop(new);
    root.remove();
}

/// The group of this process where version 1 has a freezer: who is frozen there cannot be ended.
fn freezer() -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = groups.lines().find_map(|line| line.split_once(":freezer:/")).map(|(_, path)| path);
    let place = path.map(|path| Path::new("/sys/fs/cgroup/freezer").join(path));
    let place = place.filter(|place| place.join("cgroup.procs").exists());
    if place.is_none() {
        println!("skipped: this host has no freezer of version 1");
    }
    place
}

fn freeze(ice: &Path, child: &Child) {
    fs::create_dir_all(ice).unwrap();
    fs::write(ice.join("cgroup.procs"), child.id().to_string()).unwrap();
    fs::write(ice.join("freezer.state"), "FROZEN").unwrap();
    while fs::read_to_string(ice.join("freezer.state")).unwrap().trim() != "FROZEN" {
        std::thread::yield_now();
    }
}

/// Removes a directory once nobody is in it.
fn remove(ice: &Path) {
    let patience = Instant::now() + Duration::from_secs(20);
    while fs::remove_dir(ice).is_err() {
        assert!(Instant::now() < patience, "{}", ice.display());
        std::thread::yield_now();
    }
}

#[test]
fn a_group_of_which_somebody_lives_on_is_not_taken_for_ended() {
    let (Some(root), Some(freezer)) = (root("stuck"), freezer()) else { return };
    let group = root.create("stuck", &CgroupLimits::default()).unwrap();
    let mut child = shell("sleep 60");
    group.add(child.id()).unwrap();
    let ice = freezer.join(format!("builderd-test-ice-{}", std::process::id()));
    freeze(&ice, &child);
    let started = Instant::now();
    let error = group.end().unwrap_err();
    assert!(error.to_string().starts_with("cannot end the processes of the cgroup"), "{error}");
    // Nor does the next one of the name begin among its processes.
    let error = root.create("stuck", &CgroupLimits::default()).unwrap_err();
    assert_eq!(error.source.kind(), std::io::ErrorKind::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    fs::write(ice.join("freezer.state"), "THAWED").unwrap();
    assert!(!child.wait().unwrap().success());
    root.create("stuck", &CgroupLimits::default()).unwrap().end().unwrap();
    assert!(root.sweep().is_empty());
    remove(&ice);
    root.remove();
}

#[test]
fn who_was_left_frozen_by_a_runtime_is_ended_with_the_group() {
    let (Some(root), Some(freezer)) = (root("frozen"), freezer()) else { return };
    let group = root.create("frozen", &CgroupLimits::default()).unwrap();
    let mut child = shell("sleep 60");
    group.add(child.id()).unwrap();
    // Where a runtime makes the group as well.
    let place = freezer.join(root.places().next().unwrap().file_name().unwrap());
    freeze(&place.join("frozen"), &child);
    group.end().unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(!place.join("frozen").exists());
    remove(&place);
    root.remove();
}
