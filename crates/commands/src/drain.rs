//! What a program says, for as long as it runs: what it leaves behind may keep its output open for
//! ever, and is not waited for. This side ends nothing and knows no lines.

use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

/// How long what is left of a program that has ended may go on to say something.
const GRACE: Duration = Duration::from_millis(250);
/// What lay in the pipe by then is no more than this: `/proc/sys/fs/pipe-max-size`, by default.
const LEFT_BYTES_MAX: usize = 1 << 20;

/// The output of a program: it ends with the pipe, or soon after the program has ended.
pub(crate) struct Drain {
    from: PipeReader,
    program: OwnedFd,
    has_ended: bool,
    /// How long it may still be waited for, and how much may still come, when it has.
    time: Duration,
    bytes: usize,
}

impl Drain {
    /// That of a program which nobody has waited for yet.
    pub(crate) fn of(program: &Child, from: PipeReader) -> io::Result<Self> {
        let program = rustix::process::pidfd_open(Pid::from_child(program), PidfdFlags::empty())?;
        Ok(Self { from, program, has_ended: false, time: GRACE, bytes: LEFT_BYTES_MAX })
    }

    /// Waits until something can be read, or nobody is left who could write. If neither comes in
    /// time, that is the answer.
    fn is_ready(&mut self) -> io::Result<bool> {
        if !self.has_ended {
            let all = [&self.from as &dyn std::os::fd::AsFd, &self.program];
            let [can_be_read, has_ended] = poll(all, None)?;
            self.has_ended = has_ended;
            if can_be_read {
                return Ok(true);
            }
        }
        let started = Instant::now();
        let [can_be_read] = poll([&self.from as &dyn std::os::fd::AsFd], Some(self.time))?;
        self.time = self.time.saturating_sub(started.elapsed());
        Ok(can_be_read)
    }
}

impl Read for Drain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.is_ready()? {
            return Ok(0);
        }
        let most = if self.has_ended { buffer.len().min(self.bytes) } else { buffer.len() };
        let count = self.from.read(&mut buffer[..most])?;
        if self.has_ended {
            self.bytes -= count;
        }
        Ok(count)
    }
}

/// Which of these have something to tell, as soon as one has, or `most` is over: poll(2). The process
/// behind a descriptor has when it has ended: pidfd_open(2).
fn poll<const N: usize>(
    all: [&dyn std::os::fd::AsFd; N],
    most: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut all = all.map(|file| PollFd::from_borrowed_fd(file.as_fd(), PollFlags::IN));
    let most = most.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut all, most.as_ref()))?;
    Ok(all.map(|file| !file.revents().is_empty()))
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::sync::mpsc;

    use super::*;

    /// More than lies in any pipe.
    const TOO_MUCH: u64 = 64 << 20;

    /// What is read of a script of the shell that writes to a pipe.
    fn drained(script: &str) -> Vec<u8> {
        let (from, to) = io::pipe().unwrap();
        let mut command = crate::host::command("/bin/sh".as_ref());
        let child = command.args(["-c", script]).stdin(Stdio::null()).stdout(to).spawn();
        let mut child = child.unwrap();
        drop(command);
        let drain = Drain::of(&child, from).unwrap();
        let (said, is_said) = mpsc::channel();
        std::thread::spawn(move || {
            let mut all = Vec::new();
            drain.take(TOO_MUCH).read_to_end(&mut all).map(|_| said.send(all))
        });
        let all = is_said.recv_timeout(Duration::from_secs(20));
        child.wait().unwrap();
        all.expect("it is waited for")
    }

    /// Ends the process whose number is on the first line, if it is still there.
    fn end_first(said: &[u8]) {
        let line = String::from_utf8_lossy(said);
        let number = line.lines().next().and_then(|line| line.parse().ok());
        let left = number.and_then(Pid::from_raw).unwrap();
        let _ = rustix::process::kill_process(left, rustix::process::Signal::KILL);
    }

    #[test]
    fn who_is_left_behind_and_says_nothing_is_not_waited_for() {
        let said = drained("sleep 1000 & echo $!; printf 'the last'");
        end_first(&said);
        assert!(said.ends_with(b"\nthe last"), "{said:?}");
    }

    #[test]
    fn who_is_left_behind_and_talks_for_ever_is_not_listened_to_for_ever() {
        let said = drained("sh -c 'echo $$; sleep 0.2; exec yes' & sleep 0.1");
        end_first(&said);
        assert!((said.len() as u64) < TOO_MUCH, "{}", said.len());
    }

    #[test]
    fn all_that_a_program_has_said_is_read_however_late() {
        let (from, to) = io::pipe().unwrap();
        let mut command = crate::host::command("/bin/sh".as_ref());
        let script = "sleep 5 & echo $!; head -c 60000 /dev/zero";
        let child = command.args(["-c", script]).stdin(Stdio::null()).stdout(to).spawn();
        let mut child = child.unwrap();
        drop(command);
        let mut drain = Drain::of(&child, from).unwrap();
        child.wait().unwrap();
        std::thread::sleep(2 * GRACE);
        let mut all = Vec::new();
        drain.read_to_end(&mut all).unwrap();
        end_first(&all);
        assert_eq!(all.iter().filter(|byte| **byte == 0).count(), 60_000);
    }
}
