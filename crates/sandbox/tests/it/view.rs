//! A process that keeps a few directories and the network.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use sandbox::Wall;

/// What an attacker does and does not get done, and the walls of a worker that it starts; as
/// root, or as a user that has nothing.
fn tried(user: Option<u32>) -> (Vec<String>, Vec<String>, String) {
    let directory = tempfile::tempdir().unwrap();
    let (kept, secret) = (directory.path().join("kept"), directory.path().join("secret"));
    fs::create_dir(&kept).unwrap();
    fs::write(&secret, b"x").unwrap();
    // Somebody with the same user and no more rights.
    let mut other = Command::new("sleep");
    let mut attacker = Command::new(env!("CARGO_BIN_EXE_attacker"));
    if let Some(user) = user {
        std::os::unix::fs::chown(directory.path(), Some(user), None).unwrap();
        std::os::unix::fs::chown(&kept, Some(user), None).unwrap();
        for command in [&mut other, &mut attacker] {
            command.uid(user).gid(user);
        }
    }
    let mut other = other.arg("60").env("SECRET", "x").stdin(Stdio::null()).spawn().unwrap();
    let output = attacker.arg("narrow").args([&kept, &secret]).arg(other.id().to_string()).output();
    other.kill().unwrap();
    other.wait().unwrap();
    let output = output.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let (mut done, mut refused, mut walls) = (Vec::new(), Vec::new(), String::new());
    for line in said.lines() {
        match line.split_once(' ').unwrap() {
            ("walls", stand) => walls = stand.to_owned(),
            (name, "done") => done.push(name.to_owned()),
            (name, _) => refused.push(name.to_owned()),
        }
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // What was made is on the host, under the name it was given.
    assert!(kept.join("renamed").exists());
    (done, refused, walls)
}

const DONE: [&str; 5] = ["write", "rename", "hosts", "null", "socket"];
const REFUSED: usize = 13;

#[test]
fn who_speaks_to_the_network_keeps_its_directories_and_no_other_file() {
    if !rustix::process::geteuid().is_root() || !sandbox::can_isolate() {
        println!("skipped: this needs root and namespaces");
        return;
    }
    for user in [None, Some(4321)] {
        let (done, refused, walls) = tried(user);
        assert_eq!(done, DONE, "as {user:?}");
        assert_eq!(refused.len(), REFUSED, "{refused:?}, as {user:?}");
        for wall in Wall::ALL.into_iter().filter(|wall| !Wall::AROUND_BUILDS.contains(wall)) {
            assert!(walls.contains(wall.as_str()) || Wall::NAMESPACES.contains(&wall), "{walls}");
        }
    }
}
