//! What a worker can do that somebody has taken over: nothing.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use sandbox::{Outcome, Wall};

use crate::support::{run, start};

#[test]
fn all_walls_stand_on_a_host_that_has_them() {
    let file = tempfile::tempfile().unwrap();
    let told = run("walls", "", &file);
    assert_eq!(told.outcome, Outcome::Exited(0), "{}", told.complained);
    let mut stand: Vec<Wall> = told.said.split_whitespace().filter_map(Wall::named).collect();
    if !sandbox::can_isolate() {
        println!("skipped in part: this host gives no namespaces");
        return;
    }
    stand.extend(Wall::NAMESPACES);
    let missing: Vec<Wall> = Wall::ALL.into_iter().filter(|wall| !stand.contains(wall)).collect();
    assert_eq!(missing, Wall::AROUND_BUILDS);
}

#[test]
fn a_worker_reads_its_input_and_writes_the_file_it_was_handed() {
    let file = tempfile::tempfile().unwrap();
    let told = run("work", "eleven bytes", &file);
    assert_eq!(told.outcome, Outcome::Exited(0), "{}", told.complained);
    assert_eq!(told.said, "4096\n");
    let mut content = String::new();
    std::io::Seek::rewind(&mut &file).unwrap();
    (&file).take(2).read_to_string(&mut content).unwrap();
    assert_eq!(content, "12");
}

#[test]
fn no_file_that_somebody_left_open_gets_in() {
    let secret = tempfile::tempfile().unwrap();
    // Without the flag that closes it when another program starts.
    let careless = rustix::io::dup(&secret).unwrap();
    let told = run("files", "", &tempfile::tempfile().unwrap());
    assert_eq!(told.said, "[3]\n", "{}", told.complained);
    drop(careless);
}

#[test]
fn every_system_call_that_reaches_out_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let mut let_through = Vec::new();
    for attack in [
        "open",
        "open-root",
        "socket",
        "unix-socket",
        "fork",
        "namespace",
        "setns",
        "mount",
        "ptrace",
        "kill",
        "exec",
        "keyctl",
        "bpf",
        "io_uring",
        "userfaultfd",
        "perf",
        "chroot",
        "raise-limit",
        "traceable",
        "executable-memory",
        "shared-memory",
        "growing-memory",
        "nameless-memory",
        "odd-thread",
        "signal",
        "signals-by-file",
        "flags-of-a-file",
        "blocks-behind-the-end",
        "blocks-moved-away",
        "blocks-given",
        "blocks-punched",
        "blocks-cut-out",
        "lease",
        "lock",
        "flock",
        "limits-of-others",
        "control",
        "splice",
        "send",
        "memory-of-others",
        "files-of-others",
        "open-process",
        "later-writes",
        "personality",
        "filter",
    ] {
        let told = run(attack, "", &file);
        if told.said != "EPERM\n" {
            let_through.push(format!("{attack}: {}{}", told.said, told.complained));
        }
    }
    assert_eq!(let_through, Vec::<String>::new());
    // Allowed by the filter, since it is also how the size of an open file is asked for; but
    // there is no file.
    let told = run("stat", "", &file);
    let wanted = if sandbox::can_isolate() { "ENOENT\n" } else { "ok\n" };
    assert_eq!(told.said, wanted);
}

#[test]
fn memory_threads_and_file_size_end_where_the_policy_says() {
    let file = tempfile::tempfile().unwrap();
    let told = run("memory", "", &file);
    let refused: u64 = told.said.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!((24..=64).contains(&refused), "{}", told.said);
    if rustix::process::geteuid().is_root() && sandbox::can_isolate() {
        let told = run("threads", "", &file);
        assert!(told.said.starts_with("refused after 7:"), "{}{}", told.said, told.complained);
    }
    // The first process of a namespace outlives SIGXFSZ; its write fails all the same.
    let told = run("disk", "", &file);
    let isolated = told.outcome == Outcome::Exited(27);
    assert!(
        isolated || told.outcome == Outcome::Killed(25),
        "{}: {}",
        told.outcome,
        told.complained
    );
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn nothing_is_left_without_a_limit_that_data_does_not_count() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // As much as may be: what is inherited must not be what is limited.
    let maximum = getrlimit(Resource::Stack).maximum;
    setrlimit(Resource::Stack, Rlimit { current: maximum, maximum }).unwrap();
    let told = run("limits", "", &tempfile::tempfile().unwrap());
    let limits: Vec<u64> =
        told.said.trim_matches(['[', ']', '\n']).split(", ").map(|n| n.parse().unwrap()).collect();
    let [core, stack, signals] = limits[..] else { panic!("{}{}", told.said, told.complained) };
    assert!(core == 0 && stack <= 8 << 20 && signals <= 64, "{limits:?}");
}

#[test]
fn a_worker_that_gets_no_namespaces_leaves_everybody_their_root_directory() {
    if !rustix::process::geteuid().is_root() || !sandbox::can_isolate() {
        println!("skipped: this needs root and namespaces");
        return;
    }
    // The mounts of this shell are nobody else's, whatever comes of them.
    let script = format!("{} walls; test -x /bin/sh && echo here", env!("CARGO_BIN_EXE_attacker"));
    let shell = Command::new("unshare").args(["--mount", "/bin/sh", "-c", &script]).output();
    let said = String::from_utf8(shell.unwrap().stdout).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    let [walls, "here"] = lines[..] else { panic!("the root directory is gone: {said}") };
    assert!(walls.contains("empty-root"), "{walls}");
}

#[test]
fn who_waits_for_a_while_waits_no_longer() {
    let (mut sandbox, pipes) = start("wait", &[]);
    assert!(!sandbox.ends_within(Duration::from_millis(20)));
    drop(pipes);
    assert!(sandbox.ends_within(Duration::from_secs(20)));
    assert!(sandbox.ends_within(Duration::ZERO), "it is not waited for yet");
    assert_eq!(sandbox.wait().unwrap(), Outcome::Exited(0));
}

#[test]
fn a_dropped_sandbox_is_gone_at_once() {
    let (sandbox, pipes) = start("wait", &[]);
    let pid = sandbox.pid();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    let started = Instant::now();
    drop(sandbox);
    drop(pipes);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_program_that_cannot_run_is_an_error_of_the_start() {
    let script = tempfile::NamedTempFile::new().unwrap();
    let program = std::fs::File::open(script.path()).unwrap();
    let error = sandbox::Sandbox::spawn(&program, &[c"nothing"], &[]).unwrap_err();
    assert_eq!(error.source.kind(), std::io::ErrorKind::PermissionDenied, "{error:?}");
}

#[test]
fn a_process_that_is_held_does_nothing_until_it_goes_on() {
    let file = tempfile::tempfile().unwrap();
    let shell = std::fs::File::open("/bin/sh").unwrap();
    let arguments = [c"sh", c"-c", c"while :; do echo x >&3; done"];
    let (sandbox, _pipes) = sandbox::Sandbox::spawn(&shell, &arguments, &[file.as_fd()]).unwrap();
    let written = || file.metadata().unwrap().len();
    let grows = |from: u64| {
        let started = std::time::Instant::now();
        while written() == from {
            assert!(started.elapsed().as_secs() < 60, "it stands still");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    };
    grows(0);
    for _ in 0..20 {
        let (before, after) = sandbox
            .while_held(|| {
                let before = written();
                std::thread::sleep(std::time::Duration::from_millis(10));
                (before, written())
            })
            .unwrap();
        assert_eq!(before, after);
        grows(after);
    }
    sandbox.kill();
    assert!(sandbox.ends_within(std::time::Duration::from_secs(60)));
    assert!(sandbox.while_held(|| ()).is_err(), "there is nobody to hold");
}
