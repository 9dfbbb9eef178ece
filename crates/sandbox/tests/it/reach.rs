//! A process that keeps one directory, and one that keeps others.

use std::fs::{self, File, Permissions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::Command;
use std::time::{Duration, Instant};

use sandbox::{LoopDevice, Outcome, Sandbox, Users};

use crate::support::run_as;

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root() && sandbox::can_isolate();
    if !is_root {
        println!("skipped: this needs root and namespaces");
    }
    is_root
}

/// Done and refused of what was tried in a directory of `users`.
fn tried(users: Users, access: &str) -> (Vec<String>, Vec<String>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let owner = (Some(users.first), Some(users.first));
    fs::write(place.join("private"), b"x").unwrap();
    fs::set_permissions(place.join("private"), Permissions::from_mode(0o000)).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", place.join("out")).unwrap();
    for path in [place.to_owned(), place.join("private")] {
        std::os::unix::fs::chown(path, owner.0, owner.1).unwrap();
    }
    let handed = sandbox::without_parent(File::open(place).unwrap().as_fd()).unwrap();
    let told = run_as(users, access, &handed);
    assert_eq!(told.outcome, Outcome::Exited(0), "{}", told.complained);
    let lines = told.said.lines().map(|line| line.split_once(' ').unwrap());
    let (done, refused): (Vec<_>, Vec<_>) = lines.partition(|(_, end)| *end == "done");
    let names = |lines: Vec<(&str, &str)>| lines.iter().map(|(name, _)| (*name).into()).collect();
    (names(done), names(refused), directory)
}

#[test]
fn who_looks_reads_what_is_in_its_directory_and_nothing_else() {
    if !is_root() {
        return;
    }
    let held = Users::hold().unwrap();
    let (done, refused, _) = tried(held.users(), "look");
    assert_eq!(done, ["read"]);
    assert_eq!(refused.len(), 10, "{refused:?}");
}

#[test]
fn who_fills_makes_and_gives_away_and_reaches_nothing_else() {
    if !is_root() {
        return;
    }
    let held = Users::hold().unwrap();
    let users = held.users();
    let (done, refused, directory) = tried(users, "fill");
    assert_eq!(done, ["read", "make", "give", "write"]);
    assert_eq!(refused, ["out", "up", "above", "root", "device", "remove", "rename"]);
    let made = directory.path().join("made").metadata().unwrap();
    assert_eq!((made.uid(), made.gid()), (users.first + 5, users.first + 6));
}

#[test]
fn with_a_keeper_ends_all_that_it_started_and_mounted() {
    if !is_root() {
        return;
    }
    let mark = format!("9{}", std::process::id());
    let script = format!(
        "mount --make-rprivate / && mount -t tmpfs {mark} /mnt && setsid sleep {mark} & sleep {mark}"
    );
    let shell = File::open("/bin/sh").unwrap();
    let script = std::ffi::CString::new(format!("PATH=/bin:/sbin:/usr/bin; {script}")).unwrap();
    let arguments = [c"sh", c"-c", script.as_c_str()];
    let (keeper, mut pipes) = Sandbox::spawn_keeper(&shell, &arguments, &[]).unwrap();
    pipes.stdin.write_all(b"").unwrap();
    let running = || {
        let found = Command::new("pgrep").args(["-f", &format!("^sleep {mark}$")]).output();
        found.unwrap().stdout.iter().filter(|byte| **byte == b'\n').count()
    };
    let patience = Instant::now() + Duration::from_secs(20);
    while running() < 2 {
        assert!(Instant::now() < patience, "they never ran");
        std::thread::yield_now();
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&mark), "its mounts are its own");
    drop(keeper);
    assert_eq!(running(), 0);
}

#[test]
fn a_loop_device_writes_past_the_page_cache_and_goes_with_its_last_user() {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    if !is_root() || !LoopDevice::is_there() {
        return;
    }
    let file = tempfile::tempfile_in(".").unwrap();
    file.set_len(1 << 20).unwrap();
    let device = LoopDevice::attach(&file).unwrap();
    let name = device.path().file_name().unwrap().to_owned();
    let size = std::path::Path::new("/sys/block").join(&name).join("size");
    assert_eq!(fs::read_to_string(&size).unwrap().trim(), "2048");
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    if fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(itself).is_ok() {
        let flag = size.with_file_name("loop").join("dio");
        assert_eq!(fs::read_to_string(flag).unwrap().trim(), "1");
    }
    let strict = size.with_file_name("bdi").join("strict_limit");
    let queue = |file| {
        fs::read_to_string(size.with_file_name("queue").join(file)).unwrap().trim().to_owned()
    };
    // Linux 6.2 and later.
    let is_bounded = strict.exists();
    if is_bounded {
        assert_eq!(fs::read_to_string(&strict).unwrap().trim(), "1");
        let most = fs::read_to_string(strict.with_file_name("max_bytes")).unwrap();
        let most: u64 = most.trim().parse().unwrap();
        assert!((60 << 20..=65 << 20).contains(&most), "{most}: the kernel rounds");
        assert_eq!(queue("nr_requests"), "4");
        assert_eq!(queue("max_sectors_kb"), "256");
        LoopDevice::unbound_free();
        assert_eq!(fs::read_to_string(&strict).unwrap().trim(), "1", "somebody has it");
        assert_eq!(queue("nr_requests"), "4", "somebody has it");
    }
    drop(device);
    let patience = Instant::now() + Duration::from_secs(20);
    // Somebody else may have it by then, but not with this file's size.
    while fs::read_to_string(&size).is_ok_and(|size| size.trim() == "2048") {
        assert!(Instant::now() < patience, "it is still there");
        std::thread::yield_now();
    }
    let is_still =
        || fs::read_to_string(&strict).unwrap().trim() == "1" || queue("nr_requests") == "4";
    while is_bounded && is_still() {
        assert!(Instant::now() < patience, "whoever has it next is bounded as well");
        LoopDevice::unbound_free();
    }
}

#[test]
fn what_is_counted_for_the_owner_of_a_namespace_is_counted_for_one_build_alone() {
    if !is_root() {
        return;
    }
    let most = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_instances").unwrap();
    let all = format!("{} {}\n", most.trim(), libc::EMFILE);
    let program = File::open(env!("CARGO_BIN_EXE_attacker")).unwrap();
    let held = [(); 2].map(|()| Users::hold().unwrap());
    let takers = held.each_ref().map(|held| {
        let namespace = held.users().namespace().unwrap();
        let arguments = [c"attacker", c"notices"];
        let (taker, pipes) =
            Sandbox::spawn_beside(&program, &arguments, &[namespace.as_fd()]).unwrap();
        let mut line = String::new();
        BufReader::new(&pipes.stdout).read_line(&mut line).unwrap();
        (taker, pipes, line)
    });
    for (_, _, line) in &takers {
        assert_eq!(*line, all, "each has as many as one user may have");
    }
}

#[test]
fn owners_are_shown_as_those_of_a_namespace_until_that_is_found_no_good() {
    if !is_root() {
        return;
    }
    let held = Users::hold().unwrap();
    let first = held.users().first;
    let namespace = held.users().namespace().unwrap();
    // Where mounts of this kind are known since Linux 5.12.
    let directory = tempfile::tempdir_in(".").unwrap();
    let place = directory.path().canonicalize().unwrap();
    fs::set_permissions(&place, Permissions::from_mode(0o755)).unwrap();
    fs::write(place.join("roots"), "x").unwrap();
    let owner = |name: &str| fs::metadata(place.join(name)).unwrap().uid();
    let is_mounted = || {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(4) == place.to_str())
    };

    let refused = namespace.show_owners(&place, || {
        assert_eq!(owner("roots"), first);
        Ok(false)
    });
    assert!(!refused.unwrap() && !is_mounted() && owner("roots") == 0, "nothing is left of it");
    assert!(namespace.show_owners(&place, || Ok(true)).unwrap());
    let by_root = fs::write(place.join("refused"), "x").unwrap_err();
    let by_first = held.users().as_first(|| fs::write(place.join("made"), "x"));
    rustix::mount::unmount(&place, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(by_root.raw_os_error(), Some(libc::EOVERFLOW));
    by_first.unwrap();
    assert_eq!((owner("made"), owner("roots")), (0, 0), "on the disk they are root's");
}

#[test]
fn what_is_done_as_another_user_leaves_the_process_as_it_was() {
    if !is_root() {
        return;
    }
    let held = Users::hold().unwrap();
    let state = || {
        let signal = rustix::process::parent_process_death_signal().unwrap();
        (rustix::process::geteuid(), signal, rustix::process::dumpable_behavior().unwrap())
    };
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let before = state();
    let inside = held.users().as_first(|| Ok(rustix::process::geteuid().as_raw())).unwrap();
    assert_eq!(inside, held.users().first);
    held.users().as_first(|| Err::<(), _>(std::io::Error::other("no"))).unwrap_err();
    assert_eq!(state(), before);
    rustix::process::set_parent_process_death_signal(None).unwrap();
}
