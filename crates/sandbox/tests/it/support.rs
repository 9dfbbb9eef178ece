//! Starts the attacker.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};

use sandbox::{Outcome, Pipes, Sandbox, Users};

/// What an attack came to.
pub(crate) struct Told {
    pub(crate) outcome: Outcome,
    pub(crate) said: String,
    pub(crate) complained: String,
}

pub(crate) fn start(attack: &str, files: &[BorrowedFd<'_>]) -> (Sandbox, Pipes) {
    let program = File::open(env!("CARGO_BIN_EXE_attacker")).unwrap();
    let attack = CString::new(attack).unwrap();
    Sandbox::spawn(&program, &[c"attacker", &attack], files).unwrap()
}

/// With users of its own, and a directory.
pub(crate) fn run_as(users: Users, attack: &str, directory: &File) -> Told {
    let program = File::open(env!("CARGO_BIN_EXE_attacker")).unwrap();
    let attack = CString::new(attack).unwrap();
    let arguments = [c"attacker", attack.as_c_str()];
    let started = Sandbox::spawn_as(users, &program, &arguments, &[directory.as_fd()]);
    let (sandbox, pipes) = started.unwrap();
    told(sandbox, pipes)
}

fn told(mut sandbox: Sandbox, mut pipes: Pipes) -> Told {
    drop(pipes.stdin);
    let (mut said, mut complained) = (String::new(), String::new());
    pipes.stdout.read_to_string(&mut said).unwrap();
    pipes.stderr.read_to_string(&mut complained).unwrap();
    Told { outcome: sandbox.wait().unwrap(), said, complained }
}

pub(crate) fn run(attack: &str, input: &str, file: &File) -> Told {
    let (mut sandbox, mut pipes) = start(attack, &[file.as_fd()]);
    pipes.stdin.write_all(input.as_bytes()).unwrap();
    drop(pipes.stdin);
    let (mut said, mut complained) = (String::new(), String::new());
    pipes.stdout.read_to_string(&mut said).unwrap();
    pipes.stderr.read_to_string(&mut complained).unwrap();
    Told { outcome: sandbox.wait().unwrap(), said, complained }
}
