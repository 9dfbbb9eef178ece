//! An attacker that has taken over a process which speaks to the network.

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::mount::MountFlags;
use sandbox::{HeldUsers, Pipes, Processes, Sandbox, Users};

/// Which processes it can name afterwards, and whether it goes on as a user of its own.
#[derive(Clone, Copy)]
pub(crate) struct View {
    processes: Processes,
    has_own_users: bool,
}

impl View {
    pub(crate) fn of(words: &str) -> Self {
        let (processes, users) = words.split_once('+').unwrap_or((words, ""));
        let processes = match processes {
            "own" => Processes::Own,
            "all" => Processes::All,
            other => panic!("no processes are called {other}"),
        };
        Self { processes, has_own_users: users == "users" }
    }

    /// What holds the users stays open, here alone: nobody else knows how long they are needed.
    fn narrow(self, kept: &[&Path]) -> Option<Users> {
        let held = self.has_own_users.then(|| Users::hold_few().unwrap());
        let users = held.as_ref().map(HeldUsers::users);
        std::mem::forget(held);
        sandbox::narrow(kept, self.processes, users).unwrap();
        users
    }
}

/// Narrows the view to a directory, then tries what should and should not work. Beside the
/// directory lies a file `secret`; the arguments are both, and the number of another process.
pub(crate) fn narrow(view: View, kept: &Path, secret: &Path, other: u32) {
    let program = File::open("/proc/self/exe").unwrap();
    let had_hosts = Path::new("/etc/hosts").exists();
    let shared = || fs::read_link("/proc/self/ns/ipc").unwrap();
    let of_host = shared();
    view.narrow(&[kept]);
    let sysctl = "/proc/sys/kernel/core_pattern";
    let no_path = std::ptr::null::<libc::c_char>();
    // SAFETY: system calls without memory of this process.
    let (trace, key, namespace) = unsafe {
        (
            libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, other, 0, 0) == 0,
            libc::syscall(libc::SYS_keyctl, 0, -3, 1) >= 0,
            libc::syscall(libc::SYS_open_by_handle_at, -1, no_path, 0) >= 0,
        )
    };
    let inside = kept.join("made");
    let tmpfs = rustix::mount::mount("none", kept, "tmpfs", MountFlags::empty(), None);
    let mut all = vec![
        ("write", fs::write(&inside, b"x").is_ok()),
        ("rename", fs::rename(&inside, kept.join("renamed")).is_ok()),
        ("hosts", !had_hosts || fs::read("/etc/hosts").is_ok()),
        ("null", fs::write("/dev/null", b"x").is_ok()),
        ("socket", std::net::TcpListener::bind("127.0.0.1:0").is_ok()),
        ("secret", fs::read(secret).is_ok()),
        ("shadow", fs::read("/etc/shadow").is_ok()),
        ("root", File::create("/made").is_ok()),
        ("program", File::create("/usr/made").is_ok()),
        ("sysctl", OpenOptions::new().write(true).open(sysctl).is_ok()),
        ("mount", tmpfs.is_ok()),
        ("unmount", rustix::mount::unmount(kept, rustix::mount::UnmountFlags::DETACH).is_ok()),
        ("memory", File::open(format!("/proc/{other}/mem")).is_ok()),
        ("others", fs::read_dir(format!("/proc/{other}/root/")).is_ok()),
        ("environment", fs::read(format!("/proc/{other}/environ")).is_ok()),
        ("trace", trace),
        ("key", key),
        ("handle", namespace),
    ];
    all.extend(sockets());
    all.extend(reached(other));
    all.push(("shared-memory", shared() == of_host));
    all.extend(taken(kept));
    all.extend(mounted(kept));
    for (name, is_done) in all {
        println!("{name} {}", if is_done { "done" } else { "refused" });
    }
    // It can still start workers that are as shut in as ever.
    let (mut worker, mut pipes) = Sandbox::spawn(&program, &[c"attacker", c"walls"], &[]).unwrap();
    drop(pipes.stdin);
    let mut said = String::new();
    pipes.stdout.read_to_string(&mut said).unwrap();
    worker.wait().unwrap();
    println!("walls {}", said.trim());
}

/// What can be done to another process, and by numbers of calls that nobody uses.
fn reached(other: u32) -> [(&'static str, bool); 6] {
    let thread = i32::try_from(other).unwrap();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let one_cpu = [1u64; 16];
    let (limit, cpus) = (&raw mut limit, one_cpu.as_ptr());
    let none = std::ptr::null::<libc::rlimit>();
    // SAFETY: the kernel reads and writes memory that lives across the calls; the signal is none.
    unsafe {
        let is_done = |result: libc::c_long| result == 0;
        let second = libc::syscall(libc::SYS_getpid | 0x4000_0000);
        let is_refused = std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM);
        [
            ("second-number", second != -1 || !is_refused),
            ("signal", is_done(libc::syscall(libc::SYS_kill, thread, 0))),
            ("signal-thread", is_done(libc::syscall(libc::SYS_tgkill, thread, thread, 0))),
            (
                "limits",
                is_done(libc::syscall(libc::SYS_prlimit64, thread, libc::RLIMIT_CPU, none, limit)),
            ),
            (
                "cpus",
                is_done(libc::syscall(
                    libc::SYS_sched_setaffinity,
                    thread,
                    size_of_val(&one_cpu),
                    cpus,
                )),
            ),
            ("list", Path::new(&format!("/proc/{other}")).exists()),
        ]
    }
}

/// What the kernel gives to all processes of a user together, and a file that who opens it waits for.
fn taken(kept: &Path) -> [(&'static str, bool); 3] {
    let fifo = CString::new(kept.join("fifo").into_os_string().into_vec()).unwrap();
    let queue = c"builderd-attacker".as_ptr();
    // SAFETY: the names live across the calls; what is opened ends with this process.
    unsafe {
        let opened = libc::syscall(
            libc::SYS_mq_open,
            queue,
            libc::O_CREAT | libc::O_RDWR,
            0o600,
            std::ptr::null::<libc::c_void>(),
        );
        libc::syscall(libc::SYS_mq_unlink, queue);
        libc::mknod(fifo.as_ptr(), libc::S_IFIFO | 0o600, 0);
        #[cfg(target_arch = "x86_64")]
        libc::syscall(libc::SYS_mknod, fifo.as_ptr(), libc::S_IFIFO | 0o600, 0);
        [
            ("queue", opened >= 0),
            ("notices", libc::inotify_init1(0) >= 0),
            ("fifo", kept.join("fifo").exists()),
        ]
    }
}

/// What a process that it starts mounts as root of a user namespace, and what it then gets done with
/// that itself, as who is root outside.
fn mounted(kept: &Path) -> [(&'static str, bool); 6] {
    let place = CString::new(kept.as_os_str().as_bytes()).unwrap();
    let write = |at: Option<OwnedFd>, name: &str| {
        at.is_some_and(|at| {
            rustix::fs::openat(&at, name, OFlags::WRONLY, rustix::fs::Mode::empty()).is_ok()
        })
    };
    let anew = |kind: &CStr, flags| mounted_inside(&place, kind, Some(flags));
    [
        ("opened-anew", mounted_inside(&place, c"tmpfs", None).is_some()),
        ("tmpfs-anew", anew(c"tmpfs", 0).is_some()),
        // The kernel takes these bits for no flags at all.
        ("magic-anew", anew(c"tmpfs", libc::MS_MGC_VAL).is_some()),
        ("processes-anew", anew(c"proc", 0).is_some()),
        ("settings", write(anew(c"proc", 0), "sys/kernel/core_pattern")),
        ("groups-anew", write(anew(c"cgroup2", 0), "cgroup.procs")),
    ]
}

/// A file system that a child has mounted in namespaces of its own, and has opened for both; without
/// flags it is to be mounted by another call.
fn mounted_inside(place: &CStr, kind: &CStr, flags: Option<libc::c_ulong>) -> Option<OwnedFd> {
    let namespaces =
        libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWCGROUP;
    let careful = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: without a stack and without CLONE_VM it is a fork of the only thread; the child calls
    // nothing that allocates and ends. What it has opened is this process's as well.
    unsafe {
        let with = libc::c_long::from(namespaces | libc::CLONE_FILES | libc::SIGCHLD);
        let child = libc::syscall(libc::SYS_clone, with, none, none, none, none);
        if child == 0 {
            let (kind, place) = (kind.as_ptr(), place.as_ptr());
            let opened = match flags {
                Some(flags) if libc::mount(kind, place, kind, flags | careful, none) == 0 => {
                    libc::open(place, libc::O_PATH | libc::O_DIRECTORY)
                }
                Some(_) => -1,
                None => i32::try_from(libc::syscall(libc::SYS_fsopen, kind, 0)).unwrap_or(-1),
            };
            libc::_exit(opened.max(0));
        }
        if child < 0 {
            return None;
        }
        let mut status = 0;
        libc::waitpid(i32::try_from(child).unwrap(), &raw mut status, 0);
        let opened = libc::WEXITSTATUS(status);
        (libc::WIFEXITED(status) && opened > 0).then(|| OwnedFd::from_raw_fd(opened))
    }
}

/// Sockets that programs use which fetch, and those by which files that are open are handed to
/// processes of the host.
fn sockets() -> [(&'static str, bool); 10] {
    use libc::{AF_INET, AF_NETLINK, AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM};
    let made = |family: libc::c_int, kind: libc::c_int, protocol: libc::c_int| {
        // SAFETY: no memory is passed; the socket ends with this process.
        unsafe { libc::socket(family, kind, protocol) >= 0 }
    };
    let paired = |kind: libc::c_int| {
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two numbers.
        unsafe { libc::socketpair(AF_UNIX, kind, 0, ends.as_mut_ptr()) == 0 }
    };
    [
        ("tcp", made(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 6)),
        ("udp", made(libc::AF_INET6, SOCK_DGRAM, 0) || !Path::new("/proc/net/if_inet6").exists()),
        ("addresses", made(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, libc::NETLINK_ROUTE)),
        ("pair", paired(SOCK_STREAM | SOCK_CLOEXEC)),
        ("unix-stream", made(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)),
        ("unix-datagram", made(AF_UNIX, SOCK_DGRAM, 0)),
        ("hypervisor", made(libc::AF_VSOCK, SOCK_STREAM, 0)),
        ("audit", made(AF_NETLINK, SOCK_RAW, libc::NETLINK_AUDIT)),
        ("loose-pair", paired(SOCK_DGRAM | SOCK_CLOEXEC)),
        ("raw-pair", paired(SOCK_RAW)),
    ]
}

/// Starts a program that would outlive it, does not want to be ended with its parent, says so, and
/// waits.
pub(crate) fn outlive(view: View, seconds: &str) {
    view.narrow(&[]);
    rustix::process::set_parent_process_death_signal(None).unwrap();
    // The one program that is certainly there.
    let mut sleep = Command::new("/proc/self/exe");
    let sleep = sleep.arg0("attacker").args(["sleep", seconds]).stdin(Stdio::null());
    let mut sleep = sleep.stdout(Stdio::null()).spawn().unwrap();
    println!("ready");
    sleep.wait().unwrap();
}

/// The program that it starts: in a session of its own.
pub(crate) fn sleep(seconds: &str) {
    rustix::process::setsid().unwrap();
    std::thread::sleep(Duration::from_secs(seconds.parse().unwrap()));
}

/// The version of landlock(7) that this kernel has.
pub(crate) fn landlock_version() {
    const VERSION: libc::c_long = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: asked for the version the kernel reads no memory: landlock_create_ruleset(2).
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, VERSION) };
    println!("{}", version.max(0));
}

/// Ends in a way that should be told outside.
pub(crate) fn end(view: View, how: &str) {
    view.narrow(&[]);
    match how {
        "7" => std::process::exit(7),
        _ => std::process::abort(),
    }
}

/// Starts a worker, says which user it is outside, and keeps it as long as somebody listens.
pub(crate) fn keep_worker(view: View) {
    let program = File::open("/proc/self/exe").unwrap();
    view.narrow(&[]);
    let (worker, pipes) = Sandbox::spawn(&program, &[c"attacker", c"wait"], &[]).unwrap();
    let map = fs::read_to_string(format!("/proc/{}/uid_map", worker.pid())).unwrap();
    println!("{}", map.split_whitespace().nth(1).unwrap());
    drop(std::io::stdin().read(&mut [0]));
    let Pipes { stdin, .. } = pipes;
    drop((stdin, worker));
}

/// Lets as many descriptors be on their way through sockets as the kernel lets a user have there, or
/// `most`; says how many it could send in one message at least, as long as somebody listens.
pub(crate) fn crowd(view: View, most: usize) {
    /// More than those that it sends at once: the kernel lets a user have as many on their way as
    /// one process may have open.
    const OPEN_MAX: u64 = 300;
    const AT_ONCE: usize = 250;
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(OPEN_MAX), maximum: Some(OPEN_MAX) },
    )
    .unwrap();
    let null = File::open("/dev/null").unwrap();
    view.narrow(&[]);
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two numbers.
    assert_eq!(
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()) },
        0
    );
    let files = vec![std::os::fd::AsRawFd::as_raw_fd(&null); AT_ONCE.min(most)];
    let (mut sent, mut refused) = (0, None);
    while sent < most && refused.is_none() {
        match send(ends[0], &files) {
            Ok(()) => sent += files.len(),
            Err(error) => refused = error.raw_os_error(),
        }
    }
    println!("{sent} {}", refused.unwrap_or(0));
    drop(io::stdin().read(&mut [0]));
}

/// Sends a byte and files with it: unix(7).
fn send(to: libc::c_int, files: &[libc::c_int]) -> io::Result<()> {
    let mut byte = [1u8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let size = size_of_val(files);
    // Aligned as the header is.
    let mut space = vec![0u64; 256];
    // SAFETY: the message leads to memory that lives across the call; the space is larger than a header
    // and 250 numbers of files.
    unsafe {
        let size = u32::try_from(size).unwrap();
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = space.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size) as _;
        std::ptr::copy_nonoverlapping(files.as_ptr(), libc::CMSG_DATA(header).cast(), files.len());
        match libc::sendmsg(to, &raw const message, libc::MSG_DONTWAIT) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// Says which user it is outside, by a file that it makes, and whether it or a child of its can be
/// another one.
pub(crate) fn change(view: View, kept: &Path, other: u32) {
    let users = view.narrow(&[kept]);
    fs::write(kept.join("made"), b"x").unwrap();
    println!("first {}", users.map_or(0, |users| users.first));
    let names = [("root", 0), ("other", other), ("own", users.map_or(0, |users| users.first + 9))];
    for (name, user) in names {
        println!("{name}-child {}", if child_is(user) { "done" } else { "refused" });
    }
    for (name, user) in names {
        // SAFETY: no memory is passed.
        let is_it = unsafe { libc::syscall(libc::SYS_setresuid, -1, user, -1) } == 0;
        println!("{name} {}", if is_it { "done" } else { "refused" });
    }
}

/// Whether a child can be a user in a namespace of its own.
fn child_is(user: u32) -> bool {
    let none = std::ptr::null::<libc::c_void>();
    let (mut wait, mut go) = io::pipe().unwrap();
    // SAFETY: without a stack and without CLONE_VM it is a fork of the only thread; the child reads one
    // byte and ends.
    unsafe {
        let with = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
        let child = libc::syscall(libc::SYS_clone, with, none, none, none, none);
        if child == 0 {
            let _ = wait.read(&mut [0]);
            libc::_exit(0);
        }
        let is_mapped = fs::write(format!("/proc/{child}/uid_map"), format!("0 {user} 1")).is_ok();
        go.write_all(&[1]).unwrap();
        libc::waitpid(i32::try_from(child).unwrap(), std::ptr::null_mut(), 0);
        is_mapped
    }
}
