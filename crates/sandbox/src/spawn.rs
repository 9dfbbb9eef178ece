//! The parent's half: a program in new namespaces, with no file but those it is handed.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

use crate::users::{self, Users};
use crate::{Outcome, SandboxError, Wall};

/// A confined process that runs. Dropped, it is ended and waited for.
#[derive(Debug)]
pub struct Sandbox {
    process: OwnedFd,
    pid: u32,
    is_isolated: bool,
    outcome: Option<Outcome>,
}

/// The parent's ends of the standard streams.
#[derive(Debug)]
pub struct Pipes {
    /// What is written here the process reads.
    pub stdin: PipeWriter,
    /// What it writes.
    pub stdout: PipeReader,
    /// What it complains.
    pub stderr: PipeReader,
}

/// Whether this host lets this process start others in namespaces of their own. Tried once.
pub fn can_isolate() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| try_namespaces().is_ok())
}

/// Starts a process that ends at once, in all namespaces, and gives it a user.
fn try_namespaces() -> io::Result<()> {
    let (started, release) = start(NAMESPACES, &Image::nothing())?;
    let mut sandbox = started;
    map_users(sandbox.pid)?;
    drop(release);
    sandbox.wait().map(drop)
}

/// A user namespace in which nobody is, with this map of users and of groups. It belongs to the user that
/// this process is now.
pub(crate) fn user_namespace(map: &str) -> io::Result<File> {
    let flags = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    let (mut sandbox, release) = start(flags, &Image::nothing())?;
    let place = format!("/proc/{}", sandbox.pid);
    std::fs::write(format!("{place}/gid_map"), map)?;
    std::fs::write(format!("{place}/uid_map"), map)?;
    let namespace = File::open(format!("{place}/ns/user"))?;
    drop(release);
    sandbox.wait()?;
    Ok(namespace)
}

const NAMESPACES: u64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWNS)
    .unsigned_abs() as u64;

/// The namespaces of a keeper: what it mounts and whom it starts ends with it, and none of them
/// has a network.
const KEEPER_NAMESPACES: u64 =
    (libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWNET)
        .unsigned_abs() as u64;

impl Sandbox {
    /// Starts `program` with `arguments` (the first is its own name) and an empty environment, in
    /// namespaces of its own where the host allows. The process has its standard streams as
    /// descriptors 0 to 2 and `files`, in their order, from 3 on; no other.
    ///
    /// # Errors
    /// [`SandboxError`] when the process could not be started.
    pub fn spawn(
        program: &File,
        arguments: &[&CStr],
        files: &[BorrowedFd<'_>],
    ) -> Result<(Self, Pipes), SandboxError> {
        let flags = if can_isolate() { NAMESPACES } else { 0 };
        Self::spawn_in(flags, None, program, arguments, files)
    }

    /// As [`Self::spawn`], but in the namespaces of this process, with its user and rights.
    ///
    /// # Errors
    /// [`SandboxError`] when the process could not be started.
    pub fn spawn_beside(
        program: &File,
        arguments: &[&CStr],
        files: &[BorrowedFd<'_>],
    ) -> Result<(Self, Pipes), SandboxError> {
        Self::spawn_in(0, None, program, arguments, files)
    }

    /// As [`Self::spawn`], but root inside is the first of `users`, and may give files to the
    /// others. Never without namespaces; needs root.
    ///
    /// # Errors
    /// [`SandboxError`] when the process could not be started.
    pub fn spawn_as(
        users: Users,
        program: &File,
        arguments: &[&CStr],
        files: &[BorrowedFd<'_>],
    ) -> Result<(Self, Pipes), SandboxError> {
        Self::spawn_in(NAMESPACES, Some(users), program, arguments, files)
    }

    /// Starts one that keeps others: with the rights of this process, but with mounts of its own,
    /// without a network, and as the first process of a PID namespace. When it ends, however it
    /// ends, every process below it is ended by the kernel and every mount is gone. Until it makes
    /// them private, its mounts may still go to whom the host shares its own with. Needs root.
    ///
    /// # Errors
    /// [`SandboxError`] when the process could not be started.
    pub fn spawn_keeper(
        program: &File,
        arguments: &[&CStr],
        files: &[BorrowedFd<'_>],
    ) -> Result<(Self, Pipes), SandboxError> {
        Self::spawn_in(KEEPER_NAMESPACES, None, program, arguments, files)
    }

    fn spawn_in(
        flags: u64,
        users: Option<Users>,
        program: &File,
        arguments: &[&CStr],
        files: &[BorrowedFd<'_>],
    ) -> Result<(Self, Pipes), SandboxError> {
        let failed = |source: io::Error| SandboxError::new("start a confined process", source);
        let (theirs_in, stdin) = io::pipe().map_err(failed)?;
        let (stdout, theirs_out) = io::pipe().map_err(failed)?;
        let (stderr, theirs_err) = io::pipe().map_err(failed)?;
        let mut all = vec![theirs_in.as_fd(), theirs_out.as_fd(), theirs_err.as_fd()];
        all.extend_from_slice(files);
        let is_isolated = has_own_user(flags);
        let (failure, mut error) = io::pipe().map(|(read, write)| (write, read)).map_err(failed)?;
        let image = Image::new(program, arguments, &all, &failure).map_err(failed)?;
        // One at a time: two that wait would hold each other's pipes open if this process died.
        static STARTING: Mutex<()> = Mutex::new(());
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut sandbox, mut release) = start(flags, &image).map_err(failed)?;
        sandbox.is_isolated = is_isolated;
        // Our copies of its ends, or no pipe would ever end.
        drop((image, failure, theirs_in, theirs_out, theirs_err));
        match users {
            Some(users) => map_range(sandbox.pid, users).map_err(failed)?,
            None if is_isolated => map_users(sandbox.pid).map_err(failed)?,
            None => {}
        }
        release.write_all(&[1]).map_err(failed)?;
        // Empty when the program has taken over: exec closes the pipe.
        let mut code = [0; 4];
        match error.read(&mut code).map_err(failed)? {
            0 => Ok((sandbox, Pipes { stdin, stdout, stderr })),
            _ => Err(failed(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))),
        }
    }

    /// The walls that were raised around the process before it ran.
    #[must_use]
    pub fn walls(&self) -> &'static [Wall] {
        if self.is_isolated { &Wall::NAMESPACES } else { &[] }
    }

    /// Its process id, as this process sees it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends it, and with it every process it has started. Does not wait.
    pub fn kill(&self) {
        // One that has ended already is as dead as it can be.
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Does `work` while none of its threads runs. What they had begun to write is written by then.
    ///
    /// # Errors
    /// When it has ended, or cannot be stopped; `work` is not done then.
    pub fn while_held<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        rustix::process::pidfd_send_signal(&self.process, Signal::STOP)?;
        let stopped = loop {
            // It is still to be waited for, if this is its end.
            let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match rustix::process::waitid(WaitId::PidFd(self.process.as_fd()), options) {
                Ok(Some(status)) => break status.stopped(),
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        if !stopped {
            return Err(io::Error::other("it has ended"));
        }
        let done = work();
        // One that has been ended meanwhile stays so.
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::CONT);
        Ok(done)
    }

    /// What ends it for somebody else than who waits for it.
    ///
    /// # Errors
    /// When this process may have no more files open.
    pub fn ender(&self) -> io::Result<Ender> {
        self.process.try_clone().map(Ender)
    }

    /// Whether it has ended, or does so within `most`. It is still to be waited for.
    #[must_use]
    pub fn ends_within(&self, most: Duration) -> bool {
        ends_within(&self.process, most)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the system does not know it any more.
    pub fn wait(&mut self) -> io::Result<Outcome> {
        if let Some(outcome) = self.outcome {
            return Ok(outcome);
        }
        let status = loop {
            let id = WaitId::PidFd(self.process.as_fd());
            match rustix::process::waitid(id, WaitIdOptions::EXITED) {
                Ok(Some(status)) => break status,
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let outcome = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Outcome::Exited(code),
            (None, signal) => Outcome::Killed(signal.unwrap_or(0)),
        };
        self.outcome = Some(outcome);
        Ok(outcome)
    }
}

/// Ends one [`Sandbox`] while somebody else waits for it.
#[derive(Debug)]
pub struct Ender(OwnedFd);

impl Ender {
    /// Ends it, and says whether it has ended within `most`: no file is open any more that it had.
    pub fn end(&self, most: Duration) -> bool {
        // One that has ended already is as dead as it can be.
        let _ = rustix::process::pidfd_send_signal(&self.0, Signal::KILL);
        ends_within(&self.0, most)
    }
}

fn ends_within(process: &OwnedFd, most: Duration) -> bool {
    let deadline = Instant::now() + most;
    loop {
        // Readable when it has ended: pidfd_open(2).
        let mut process = [PollFd::new(process, PollFlags::IN)];
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        match rustix::event::poll(&mut process, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            ended => return ended.is_ok_and(|count| count > 0),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.outcome.is_none() {
            self.kill();
            let _ = self.wait();
        }
    }
}

/// Gives the process a user of its own, as root inside. Who is not root can only give it the one
/// it has: user_namespaces(7), "Defining user and group ID mappings".
fn map_users(pid: u32) -> io::Result<()> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let write = |file: &str, text: String| std::fs::write(format!("/proc/{pid}/{file}"), text);
    if uid.is_root() {
        let user = users::next()?;
        write("gid_map", format!("0 {user} 1"))?;
        return write("uid_map", format!("0 {user} 1"));
    }
    write("setgroups", "deny".to_owned())?;
    write("gid_map", format!("0 {} 1", gid.as_raw()))?;
    write("uid_map", format!("0 {} 1", uid.as_raw()))
}

/// Gives the process many users. Only root can.
fn map_range(pid: u32, users: Users) -> io::Result<()> {
    let map = format!("0 {} {}", users.first, users.count);
    std::fs::write(format!("/proc/{pid}/gid_map"), &map)?;
    std::fs::write(format!("/proc/{pid}/uid_map"), &map)
}

fn has_own_user(flags: u64) -> bool {
    flags & u64::from(libc::CLONE_NEWUSER.unsigned_abs()) != 0
}

/// All that the child needs between clone3(2) and execveat(2), where it must not allocate.
struct Image {
    program: Option<OwnedFd>,
    arguments: Vec<CString>,
    /// Copies above every number they will have in the child.
    files: Vec<OwnedFd>,
    failure: Option<OwnedFd>,
}

impl Image {
    fn new(
        program: &File,
        arguments: &[&CStr],
        files: &[BorrowedFd<'_>],
        failure: &PipeWriter,
    ) -> io::Result<Self> {
        let above = RawFd::try_from(files.len()).map_err(io::Error::other)? + 1;
        let copy = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, above);
        Ok(Self {
            program: Some(copy(program.as_fd())?),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            files: files.iter().map(|&file| copy(file)).collect::<Result<_, _>>()?,
            failure: Some(copy(failure.as_fd())?),
        })
    }

    /// Of a process that ends at once.
    fn nothing() -> Self {
        Self { program: None, arguments: Vec::new(), files: Vec::new(), failure: None }
    }
}

/// A pipe whose numbers are above those that a child with so many files overwrites. No other
/// descriptor leads to it: a child that waits for its end must not keep it open itself.
fn pipe_above(files: usize) -> io::Result<(OwnedFd, PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    let above = RawFd::try_from(files).map_err(io::Error::other)? + 1;
    let copy = rustix::io::fcntl_dupfd_cloexec(&reader, above)?;
    Ok((copy, PipeWriter::from(rustix::io::fcntl_dupfd_cloexec(&writer, above)?)))
}

/// Clones this process. The child waits until something is written to the returned pipe, then
/// becomes `image`; when the pipe is closed unwritten it ends.
fn start(flags: u64, image: &Image) -> io::Result<(Sandbox, PipeWriter)> {
    let (waiting, release) = pipe_above(image.files.len())?;
    let arguments: Vec<*const libc::c_char> =
        image.arguments.iter().map(|a| a.as_ptr()).chain([std::ptr::null()]).collect();
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    let has_own_user = has_own_user(flags);
    let mut pidfd: RawFd = -1;
    // SAFETY: all zeroes is a valid clone_args: no flags, no stack, no set of ids.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | u64::from(libc::CLONE_PIDFD.unsigned_abs());
    args.pidfd = (&raw mut pidfd).expose_provenance() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    // SAFETY: clone3(2) without CLONE_VM and without a stack is a fork: the child has its own copy
    // of all memory. `args` lives across the call and `pidfd` is written by the kernel before it
    // returns.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: this is the only thread of the child. It calls nothing that allocates, locks
            // or unwinds, and does not return.
            unsafe {
                become_image(image, &arguments, &environment, &waiting, &release, has_own_user)
            }
        }
        pid => {
            let pid = u32::try_from(pid).map_err(io::Error::other)?;
            // SAFETY: the kernel has just made this descriptor for us.
            let process = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let sandbox = Sandbox { process, pid, is_isolated: false, outcome: None };
            Ok((sandbox, release))
        }
    }
}

/// The child between clone3(2) and execveat(2).
///
/// # Safety
/// Must be called in a fresh copy of a process, by its only thread. `arguments` and `environment`
/// must end in a null pointer and point to strings that live.
unsafe fn become_image(
    image: &Image,
    arguments: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    waiting: &OwnedFd,
    release: &PipeWriter,
    has_own_user: bool,
) -> ! {
    // SAFETY: plain system calls on descriptors and pointers that are valid as said above; each is
    // async-signal-safe (signal-safety(7)).
    unsafe {
        // With our own copy open the pipe would never end.
        libc::close(release.as_raw_fd());
        // Also while it waits. It is forgotten when the user changes: prctl(2).
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut byte = 0u8;
        if libc::read(waiting.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
            libc::_exit(0);
        }
        let Some(program) = &image.program else { libc::_exit(0) };
        if has_own_user && !become_root_inside() {
            give_up(image);
        }
        let signal = libc::SIGKILL;
        libc::prctl(libc::PR_SET_PDEATHSIG, signal);
        for (number, file) in (0..).zip(&image.files) {
            if libc::dup2(file.as_raw_fd(), number) < 0 {
                give_up(image);
            }
        }
        // Whatever else somebody left open ends with this program: close_range(2), Linux 5.11.
        let first = libc::c_ulong::try_from(image.files.len()).unwrap_or(libc::c_ulong::MAX);
        let flags = libc::CLOSE_RANGE_CLOEXEC;
        libc::syscall(libc::SYS_close_range, first, libc::c_ulong::from(u32::MAX), flags);
        libc::execveat(
            program.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr().cast_mut().cast(),
            environment.as_ptr().cast_mut().cast(),
            libc::AT_EMPTY_PATH,
        );
        give_up(image)
    }
}

/// Takes user and group 0 of the new namespace and no other group. Raw calls: the C library's
/// would look for other threads.
///
/// # Safety
/// As [`become_image`].
unsafe fn become_root_inside() -> bool {
    // SAFETY: no pointer is passed but a null one with a length of 0.
    unsafe {
        // Refused where the map was written without privilege; then there is nothing to drop.
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>());
        libc::syscall(libc::SYS_setresgid, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_setresuid, 0, 0, 0) == 0
    }
}

/// Tells the parent the last error and ends.
///
/// # Safety
/// As [`become_image`].
unsafe fn give_up(image: &Image) -> ! {
    // SAFETY: errno is this thread's own; the buffer lives on the stack.
    unsafe {
        let code = (*libc::__errno_location()).to_ne_bytes();
        if let Some(failure) = &image.failure {
            libc::write(failure.as_raw_fd(), code.as_ptr().cast(), code.len());
        }
        libc::_exit(126)
    }
}

/// The process of a number, for those who only have that.
pub(crate) fn pid(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().and_then(Pid::from_raw)
}

/// The files that this confined process was handed, in their order. Once: afterwards, and where
/// there are fewer, the answer is none. Programs that it starts do not get them.
pub fn take_files(count: usize) -> Option<Vec<File>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    const FIRST: RawFd = 3;
    let end = RawFd::try_from(count).ok()?.checked_add(FIRST)?;
    if TAKEN.swap(true, Ordering::SeqCst) {
        return None;
    }
    let are_open = (FIRST..end).all(|number| {
        // SAFETY: sets the flags of a descriptor, whatever it is.
        unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) >= 0 }
    });
    // SAFETY: the process was started with these descriptors open, nobody else knows their numbers,
    // and they are given out once.
    are_open.then(|| (FIRST..end).map(|number| unsafe { File::from_raw_fd(number) }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_whose_parent_dies_before_it_runs_ends_too() {
        let file = File::open("/dev/null").unwrap();
        let (failure, _) = io::pipe().map(|(read, write)| (write, read)).unwrap();
        let files = [file.as_fd(), file.as_fd(), file.as_fd(), file.as_fd()];
        let image = Image::new(&file, &[c"nothing"], &files, &failure).unwrap();
        let (mut sandbox, release) = start(0, &image).unwrap();
        // As its death would: all that leads to the child is closed.
        drop(release);
        let process = sandbox.process.try_clone().unwrap();
        let (ended, is_over) = std::sync::mpsc::channel();
        std::thread::spawn(move || ended.send(sandbox.wait()));
        let outcome = is_over.recv_timeout(std::time::Duration::from_secs(10));
        // Or the test itself would never end.
        let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
        assert_eq!(outcome.expect("it waits for ever").unwrap(), Outcome::Exited(0));
    }
}
