//! A process that keeps a few directories and the network.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sandbox::Wall;

/// Nobody waits so long on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn can_narrow() -> bool {
    let can = rustix::process::geteuid().is_root() && sandbox::can_isolate();
    if !can {
        println!("skipped: this needs root and namespaces");
    }
    can
}

/// The words for who narrows, and the user it is before: root who stays root, root who goes on as a user
/// of its own, and a user that has nothing.
fn narrowed(processes: &str) -> [(String, Option<u32>); 3] {
    let of_its_own = format!("{processes}+users");
    [(processes.to_owned(), None), (of_its_own, None), (processes.to_owned(), Some(4321))]
}

fn attacker(user: Option<u32>, arguments: &[&str]) -> Command {
    let mut attacker = Command::new(env!("CARGO_BIN_EXE_attacker"));
    attacker.args(arguments);
    if let Some(user) = user {
        attacker.uid(user).gid(user);
    }
    attacker
}

/// What an attacker does and does not get done, and the walls of a worker that it starts; as
/// root, or as a user that has nothing.
struct Tried {
    done: Vec<String>,
    refused: Vec<String>,
    walls: String,
}

fn tried(processes: &str, user: Option<u32>) -> Tried {
    let directory = tempfile::tempdir().unwrap();
    let (kept, secret) = (directory.path().join("kept"), directory.path().join("secret"));
    fs::create_dir(&kept).unwrap();
    fs::write(&secret, b"x").unwrap();
    // Somebody with the same user and no more rights.
    let mut other = Command::new("sleep");
    if let Some(user) = user {
        std::os::unix::fs::chown(directory.path(), Some(user), None).unwrap();
        std::os::unix::fs::chown(&kept, Some(user), None).unwrap();
        other.uid(user).gid(user);
    }
    let mut other = other.arg("60").env("SECRET", "x").stdin(Stdio::null()).spawn().unwrap();
    let mut attacker = attacker(user, &["narrow", processes]);
    let output = attacker.args([&kept, &secret]).arg(other.id().to_string()).output();
    other.kill().unwrap();
    other.wait().unwrap();
    let output = output.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let mut tried = Tried { done: Vec::new(), refused: Vec::new(), walls: String::new() };
    for line in said.lines() {
        match line.split_once(' ').unwrap() {
            ("walls", stand) => tried.walls = stand.to_owned(),
            (name, "done") => tried.done.push(name.to_owned()),
            (name, _) => tried.refused.push(name.to_owned()),
        }
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // What was made is on the host, under the name it was given.
    assert!(kept.join("renamed").exists());
    tried
}

const DONE: [&str; 9] =
    ["write", "rename", "hosts", "null", "socket", "tcp", "udp", "addresses", "pair"];
const REFUSED: [&str; 13] = [
    "secret",
    "shadow",
    "root",
    "program",
    "sysctl",
    "mount",
    "unmount",
    "memory",
    "others",
    "environment",
    "trace",
    "key",
    "handle",
];
/// What is refused of other processes although they can be named.
const OF_OTHERS: [&str; 4] = ["second-number", "signal", "limits", "cpus"];
/// Ways to speak with other processes of the host, and to hand them files that are open.
const SOCKETS: [&str; 6] =
    ["unix-stream", "unix-datagram", "hypervisor", "audit", "loose-pair", "raw-pair"];
/// Ways to what the kernel has for all processes of a user or of the host, and what is mounted anew in a
/// user namespace: the host's settings and the group that holds a build, for who is root outside.
const OF_ALL: [&str; 10] = [
    "shared-memory",
    "queue",
    "notices",
    "fifo",
    "opened-anew",
    "tmpfs-anew",
    "magic-anew",
    "processes-anew",
    "settings",
    "groups-anew",
];
/// And what is not, but for the signal where landlock(7) knows signals.
const BY_NAME: [&str; 2] = ["signal-thread", "list"];

fn all_walls_stand(tried: &Tried) {
    let walls = &tried.walls;
    for wall in Wall::ALL.into_iter().filter(|wall| !Wall::AROUND_BUILDS.contains(wall)) {
        assert!(walls.contains(wall.as_str()) || Wall::NAMESPACES.contains(&wall), "{walls}");
    }
}

#[test]
fn who_speaks_to_the_network_keeps_its_directories_and_no_other_file() {
    if !can_narrow() {
        return;
    }
    for (view, user) in narrowed("all") {
        let mut tried = tried(&view, user);
        for names in [&mut tried.done, &mut tried.refused] {
            names.retain(|name| !BY_NAME.contains(&name.as_str()));
        }
        assert_eq!(tried.done, DONE, "{view} as {user:?}");
        let refused = [&REFUSED[..], &SOCKETS, &OF_OTHERS, &OF_ALL].concat();
        assert_eq!(tried.refused, refused, "{view} as {user:?}");
        all_walls_stand(&tried);
    }
}

#[test]
fn who_speaks_to_the_network_names_the_processes_that_it_starts_and_no_others() {
    if !can_narrow() {
        return;
    }
    for (view, user) in narrowed("own") {
        let tried = tried(&view, user);
        assert_eq!(tried.done, DONE, "{view} as {user:?}");
        let names = [&REFUSED[..], &OF_OTHERS, &BY_NAME, &SOCKETS, &OF_ALL].concat();
        let missing = names.iter().filter(|name| !tried.refused.contains(&(**name).to_owned()));
        assert_eq!(missing.collect::<Vec<_>>(), Vec::<&&str>::new(), "{view} as {user:?}");
        all_walls_stand(&tried);
    }
}

#[test]
fn who_can_name_other_processes_cannot_signal_them_where_landlock_knows_signals() {
    if !can_narrow() {
        return;
    }
    let version = attacker(None, &["landlock-version"]).output().unwrap().stdout;
    let version: u32 = String::from_utf8(version).unwrap().trim().parse().unwrap();
    if version < 6 {
        println!("landlock {version} of this kernel knows no signals");
        return;
    }
    for (view, user) in narrowed("all") {
        let tried = tried(&view, user);
        assert_eq!(tried.done.last().map(String::as_str), Some("list"), "it can name them");
        assert!(tried.refused.iter().any(|name| name == "signal-thread"), "{view}, {user:?}");
    }
}

fn runs(line: &str) -> bool {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let mut lines = all.map(|pid| fs::read(pid.path().join("cmdline")).unwrap_or_default());
    lines.any(|words| String::from_utf8_lossy(&words).replace('\0', " ").trim_end() == line)
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Starts an attacker and takes its first line.
fn started(mut command: Command) -> (Child, String) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (child, line.trim().to_owned())
}

#[test]
fn nothing_that_it_starts_outlives_the_one_that_was_started_whatever_it_does() {
    if !can_narrow() {
        return;
    }
    for (number, (view, user)) in narrowed("own").into_iter().enumerate() {
        let seconds = format!("7{}{number}", std::process::id());
        let sleep = format!("attacker sleep {seconds}");
        let (mut child, line) = started(attacker(user, &["outlive", &view, &seconds]));
        assert_eq!(line, "ready");
        eventually("it runs", || runs(&sleep));
        // By nobody's leave.
        child.kill().unwrap();
        child.wait().unwrap();
        eventually("it is gone", || !runs(&sleep));
        let itself = format!("{} outlive {view} {seconds}", env!("CARGO_BIN_EXE_attacker"));
        eventually("the attacker is gone", || !runs(&itself));
    }
}

#[test]
fn who_goes_on_among_its_own_processes_ends_outside_as_it_ends_inside() {
    if !can_narrow() {
        return;
    }
    for (view, user) in narrowed("own") {
        let status = attacker(user, &["end", &view, "7"]).status().unwrap();
        assert_eq!(status.code(), Some(7), "{view} as {user:?}");
        let status = attacker(user, &["end", &view, "abort"]).status().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{view} as {user:?}");
    }
}

#[test]
fn workers_of_two_builds_have_users_apart_though_their_numbers_are_the_same() {
    if !can_narrow() {
        return;
    }
    for view in ["own", "own+users"] {
        let keepers = [(); 2].map(|()| started(attacker(None, &["keep-worker", view])));
        let users: Vec<u32> = keepers.iter().map(|(_, user)| user.parse().unwrap()).collect();
        assert!(users.iter().all(|user| *user >= 0x6400_0000), "{view}: {users:?}");
        assert_ne!(users[0], users[1], "{view}");
        keepers.into_iter().for_each(|(keeper, _)| stop(keeper));
    }
}

fn stop(mut keeper: Child) {
    drop(keeper.stdin.take());
    assert!(keeper.wait().unwrap().success());
}

#[test]
fn descriptors_on_their_way_in_one_build_take_nothing_from_another() {
    if !can_narrow() {
        return;
    }
    const TOO_MANY: &str = "1000000";
    let full = libc::ETOOMANYREFS.to_string();
    // Of what has one user to the kernel the other gets nothing: else this test would show nothing.
    for (view, left) in [("own", format!("0 {full}")), ("own+users", "1 0".to_owned())] {
        let (first, line) = started(attacker(None, &["crowd", view, TOO_MANY]));
        assert!(line.ends_with(&full), "{view}: all that there is: {line}");
        let (second, line) = started(attacker(None, &["crowd", view, "1"]));
        assert_eq!(line, left, "{view}");
        stop(first);
        stop(second);
    }
}

#[test]
fn who_fetches_is_no_user_of_another_build_nor_root_and_its_files_are_roots() {
    if !can_narrow() {
        return;
    }
    let held = sandbox::Users::hold_few().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut attacker = attacker(None, &["change", "own+users"]);
    let output = attacker.arg(directory.path()).arg(held.users().first.to_string()).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = said.lines().skip(1).collect();
    // Root is what it is called itself; a namespace of its kind needs one more capability.
    let children = ["root-child refused", "other-child refused", "own-child done"];
    assert_eq!(lines[..3], children);
    assert_eq!(lines[3..], ["root done", "other refused", "own done"]);
    let first = said.lines().next().and_then(|line| line.strip_prefix("first ")).unwrap();
    assert_ne!(first.parse(), Ok(held.users().first));
    let made = fs::metadata(directory.path().join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (0, 0));
}
