//! A process goes on among processes of its own: it can name those that it starts and no others,
//! and none of them outlives who started it.
//!
//! | where | what |
//! |---|---|
//! | outside | the process that was started: it waits, and ends as the one that works does |
//! | the first inside | ended with the one outside; with it the kernel ends all that are inside |
//! | the one that works | goes on from the call |
//!
//! Only a child gets into a new PID namespace (pid_namespaces(7)), so there is one outside. The first
//! inside is none that reads foreign bytes: who works could shed the signal of its parent's death,
//! or leave children that never had it. Both that wait hold nothing open and run nothing but this.

use std::io;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};

/// By convention of shells: the code of what a signal ended.
const SIGNALLED: i32 = 128;
/// The code of a process whose end nobody could be told of.
const LOST: i32 = 126;

/// Goes on in the PID namespace that the next child of this process gets into. Who called does not
/// return from here; it ends as the one that does, by the same code or signal.
///
/// To be called by the only thread.
///
/// # Errors
/// When a process cannot be had, in whichever process found out.
pub(crate) fn go_inside() -> io::Result<()> {
    let with_parent = rustix::process::parent_process_death_signal()?;
    // SAFETY: the default action is no function. Where ends of children are ignored, nobody could
    // wait for them.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    if let Some(first) = fork()? {
        // Forgotten where rights change: prctl(2).
        let _ = rustix::process::set_parent_process_death_signal(with_parent);
        let_go();
        end_as(code(end_of(first)));
    }
    if let Some(works) = fork()? {
        let_go();
        // A signal does not end the first of a namespace that it sends itself.
        exit(code(end_of(works)));
    }
    Ok(())
}

/// The copy of this process that is ended with it; none in the copy itself.
fn fork() -> io::Result<Option<Pid>> {
    let itself = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    // SAFETY: this process has one thread, so the copy lacks none that it could wait for.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            let mut parent = [PollFd::new(&itself, PollFlags::IN)];
            // Readable if it has ended, before anybody would have been told: pidfd_open(2).
            let has_ended = rustix::event::poll(&mut parent, Some(&Timespec::default()))? > 0;
            if has_ended {
                exit(LOST);
            }
            Ok(None)
        }
        child => Ok(Pid::from_raw(child)),
    }
}

/// Waits for the end of a child, and meanwhile for those that were left to this process.
fn end_of(child: Pid) -> Option<WaitStatus> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended == child => return Some(status),
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

fn code(status: Option<WaitStatus>) -> i32 {
    let Some(status) = status else { return LOST };
    let signal = status.terminating_signal().map(|signal| SIGNALLED + signal);
    signal.or(status.exit_status()).unwrap_or(LOST)
}

/// Who waits for a pipe's end must not wait for this process, nor may it be looked into.
fn let_go() {
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = rustix::process::chdir("/");
    // SAFETY: whatever owned a descriptor is not used or dropped any more: this process runs nothing
    // but the lines behind the only calls of this function, and they end it.
    unsafe {
        let (first, last): (libc::c_ulong, libc::c_ulong) = (0, u32::MAX.into());
        libc::syscall(libc::SYS_close_range, first, last, 0);
    }
}

/// Ends this process with a code, or by the signal that the code stands for.
fn end_as(code: i32) -> ! {
    let signal = code - SIGNALLED;
    if signal > 0 {
        // SAFETY: the default action of a signal is no function, and there is one thread.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    exit(code)
}

fn exit(code: i32) -> ! {
    // SAFETY: ends the process; what others have half written in their copies stays theirs.
    unsafe { libc::_exit(code) }
}
