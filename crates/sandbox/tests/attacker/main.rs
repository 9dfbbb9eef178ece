//! An attacker that has taken over a confined worker. Tries one thing, by name, and tells what
//! the kernel answered.

#![expect(unsafe_code, reason = "attacks are system calls")]
#![expect(clippy::unwrap_used, reason = "an attacker may fall over")]
#![expect(clippy::disallowed_methods, reason = "an attacker starts programs")]

mod narrow;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::FromRawFd as _;

use narrow::View;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use sandbox::{Access, SandboxPolicy};

fn main() {
    let attack = std::env::args().nth(1).unwrap_or_default();
    let word = |number: usize| std::env::args().nth(number).unwrap();
    let policy = SandboxPolicy {
        memory_bytes_max: Some(64 << 20),
        file_bytes_max: Some(1 << 20),
        files_max: 32,
        threads_max: 8,
    };
    match attack.as_str() {
        "narrow" => {
            let [kept, secret, other] = [3, 4, 5].map(word);
            let view = View::of(&word(2));
            let other = other.parse().unwrap();
            return narrow::narrow(view, kept.as_ref(), secret.as_ref(), other);
        }
        "outlive" => return narrow::outlive(View::of(&word(2)), &word(3)),
        "end" => return narrow::end(View::of(&word(2)), &word(3)),
        "keep-worker" => return narrow::keep_worker(View::of(&word(2))),
        "crowd" => return narrow::crowd(View::of(&word(2)), word(3).parse().unwrap()),
        "change" => {
            return narrow::change(View::of(&word(2)), word(3).as_ref(), word(4).parse().unwrap());
        }
        "sleep" => return narrow::sleep(&word(2)),
        "landlock-version" => return narrow::landlock_version(),
        "notices" => return notices(),
        "look" => return reach(&policy, Access::Look),
        "fill" => return reach(&policy, Access::Fill),
        _ => {}
    }
    let walls = sandbox::confine(&policy).unwrap();
    match attack.as_str() {
        "walls" => println!("{}", walls.iter().map(|w| w.as_str()).collect::<Vec<_>>().join(" ")),
        "work" => work(),
        "wait" => drop(std::io::stdin().read(&mut [0])),
        "memory" => memory(),
        "threads" => threads(),
        "disk" => disk(),
        "files" => files(),
        "limits" => limits(),
        other => println!("{}", answer(other)),
    }
}

/// What can be done with the directory that was handed over, and what beside it.
fn reach(policy: &SandboxPolicy, access: Access) {
    // SAFETY: the test hands a directory over as descriptor 3, which nobody else uses.
    let directory = unsafe { File::from_raw_fd(3) };
    sandbox::confine_to(policy, std::os::fd::AsFd::as_fd(&directory), access).unwrap();
    let (at, mode) = (&directory, Mode::RWXU);
    let open = |name: &str| rustix::fs::openat(at, name, OFlags::RDONLY, Mode::empty()).map(drop);
    let give = |name: &str| {
        let (uid, gid) = (Some(Uid::from_raw(5)), Some(Gid::from_raw(6)));
        rustix::fs::chownat(at, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
    };
    let above = |flags: OFlags| {
        let above = rustix::fs::openat(at, "../..", flags, Mode::empty())?;
        let place = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let is_here = place(rustix::fs::fstat(&above)?) == place(rustix::fs::fstat(at)?);
        if is_here { Err(rustix::io::Errno::NOENT) } else { Ok(()) }
    };
    let device = rustix::fs::makedev(1, 3);
    let create = OFlags::WRONLY | OFlags::CREATE;
    for (name, result) in [
        ("read", open("private")),
        ("make", rustix::fs::mkdirat(at, "made", mode)),
        ("give", give("made")),
        ("write", rustix::fs::openat(at, "written", create, mode).map(drop)),
        ("out", open("out")),
        ("up", above(OFlags::RDONLY)),
        // Landlock does not ask about what is opened only to be named.
        ("above", above(OFlags::PATH)),
        ("root", open("/")),
        ("device", rustix::fs::mknodat(at, "null", FileType::CharacterDevice, mode, device)),
        ("remove", rustix::fs::unlinkat(at, "private", AtFlags::empty())),
        ("rename", rustix::fs::renameat(at, "private", at, "public")),
    ] {
        println!("{name} {}", if result.is_ok() { "done" } else { "refused" });
    }
}

/// Takes as many instances of inotify(7) as there are, as root of the namespace that was handed over;
/// keeps them as long as somebody listens.
fn notices() {
    // SAFETY: the test hands a namespace over as descriptor 3, which nobody else uses.
    let namespace = unsafe { File::from_raw_fd(3) };
    let user = Some(rustix::thread::LinkNameSpaceType::User);
    let namespace = std::os::fd::AsFd::as_fd(&namespace);
    rustix::thread::move_into_link_name_space(namespace, user).unwrap();
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).unwrap();
    let mut count = 0;
    // SAFETY: no memory is passed; what is made ends with this process.
    while unsafe { libc::inotify_init1(0) } >= 0 {
        count += 1;
    }
    println!("{count} {}", std::io::Error::last_os_error().raw_os_error().unwrap());
    drop(std::io::stdin().read(&mut [0]));
}

/// What a worker does: reads its input, uses its files, starts threads, tells.
fn work() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    let length = std::thread::spawn(move || text.len()).join().unwrap();
    // SAFETY: the test hands a file over as descriptor 3, which nobody else uses.
    let mut file = unsafe { File::from_raw_fd(3) };
    file.write_all(length.to_string().as_bytes()).unwrap();
    file.set_len(4096).unwrap();
    println!("{}", file.metadata().unwrap().len());
}

fn memory() {
    let mut kept: Vec<Vec<u8>> = Vec::new();
    loop {
        let mut more = Vec::new();
        if more.try_reserve_exact(8 << 20).is_err() {
            println!("refused after {} MiB", kept.len() * 8);
            return;
        }
        more.resize(8 << 20, 1);
        kept.push(more);
    }
}

fn threads() {
    let mut count = 0;
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Arc::new(std::sync::Mutex::new(held));
    while count < 1000 {
        let held = held.clone();
        let body = move || drop(held.lock().map(|held| held.recv()));
        match std::thread::Builder::new().stack_size(64 << 10).spawn(body) {
            Ok(_) => count += 1,
            Err(error) => {
                println!("refused after {count}: {error}");
                break;
            }
        }
    }
    drop(hold);
}

fn disk() {
    // SAFETY: as above.
    let mut file = unsafe { File::from_raw_fd(3) };
    loop {
        if let Err(error) = file.write_all(&[1; 65536]) {
            std::process::exit(error.raw_os_error().unwrap_or(1));
        }
    }
}

fn files() {
    let is_open = |number: &i32| {
        // SAFETY: asks for the flags of a descriptor, whatever it is.
        unsafe { libc::fcntl(*number, libc::F_GETFD) >= 0 }
    };
    println!("{:?}", (3..1024).filter(is_open).collect::<Vec<_>>());
}

/// Soft limits: of core files, the first stack, waiting signals.
fn limits() {
    use rustix::process::{Resource, getrlimit};
    let limits = [Resource::Core, Resource::Stack, Resource::Sigpending];
    println!("{:?}", limits.map(|resource| getrlimit(resource).current.unwrap_or(u64::MAX)));
}

/// Maps memory that can be written, `flags` says of which kind.
///
/// # Safety
/// `flags` must not ask for a place where something lies.
unsafe fn map(protection: libc::c_int, flags: libc::c_int) -> libc::c_long {
    let (null, none) = (std::ptr::null::<libc::c_void>(), -1);
    let protection = protection | libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses where; nobody uses what is mapped.
    unsafe { libc::syscall(libc::SYS_mmap, null, 4096, protection, flags, none, 0) }
}

/// Gives the file that was handed over other blocks than were written, or more than it may have.
///
/// # Safety
/// Descriptor 3 must be a file of nobody else.
unsafe fn allocate(attack: &str) -> libc::c_long {
    let way = match attack {
        "blocks-moved-away" => libc::FALLOC_FL_INSERT_RANGE,
        "blocks-cut-out" => libc::FALLOC_FL_COLLAPSE_RANGE,
        "blocks-punched" => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        "blocks-given" => 0,
        _ => libc::FALLOC_FL_KEEP_SIZE,
    };
    // SAFETY: no memory is passed.
    unsafe { libc::syscall(libc::SYS_fallocate, 3, way, 0, 1 << 20) }
}

/// One system call, and what came of it: `ok`, or the error's name.
fn answer(attack: &str) -> String {
    let path = c"/etc/passwd".as_ptr();
    let null = std::ptr::null::<libc::c_void>();
    // SAFETY: system calls with constant strings, null pointers and numbers; each either fails or
    // changes this process alone, which ends right after.
    let result = unsafe {
        match attack {
            "open" => libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, 0),
            "open-root" => libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), 0),
            "stat" => {
                let mut stat: libc::stat = std::mem::zeroed();
                libc::syscall(libc::SYS_newfstatat, libc::AT_FDCWD, path, &raw mut stat, 0)
            }
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "unix-socket" => libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0),
            "fork" => libc::syscall(libc::SYS_clone, libc::SIGCHLD, null, null, null, null),
            "namespace" => libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER),
            "setns" => libc::syscall(libc::SYS_setns, 3, 0),
            "mount" => libc::syscall(libc::SYS_mount, path, path, null, libc::MS_BIND, null),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, 1, null, null),
            "kill" => libc::syscall(libc::SYS_kill, -1, libc::SIGKILL),
            "exec" => libc::syscall(libc::SYS_execve, c"/bin/sh".as_ptr(), null, null),
            "keyctl" => libc::syscall(libc::SYS_keyctl, 0, 0, 0, 0, 0),
            "bpf" => libc::syscall(libc::SYS_bpf, 0, null, 0),
            "io_uring" => libc::syscall(libc::SYS_io_uring_setup, 8, null),
            "userfaultfd" => libc::syscall(libc::SYS_userfaultfd, 0),
            "perf" => libc::syscall(libc::SYS_perf_event_open, null, 0, 0, 0, 0),
            "chroot" => libc::syscall(libc::SYS_chroot, c"/".as_ptr()),
            "raise-limit" => {
                let limit = libc::rlimit { rlim_cur: 1 << 40, rlim_max: 1 << 40 };
                libc::syscall(libc::SYS_prlimit64, 0, libc::RLIMIT_DATA, &raw const limit, null)
            }
            "traceable" => libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1),
            "executable-memory" => map(libc::PROT_EXEC, libc::MAP_PRIVATE),
            "shared-memory" => map(0, libc::MAP_SHARED),
            "growing-memory" => map(0, libc::MAP_PRIVATE | libc::MAP_GROWSDOWN),
            "nameless-memory" => libc::syscall(libc::SYS_memfd_create, c"x".as_ptr(), 0),
            // Were it allowed, the kernel would find it makes no sense.
            "odd-thread" => {
                libc::syscall(libc::SYS_clone, libc::CLONE_THREAD, null, null, null, null)
            }
            "signal" => libc::syscall(libc::SYS_tgkill, 2, 2, libc::SIGKILL),
            "signals-by-file" => libc::syscall(libc::SYS_fcntl, 0, libc::F_SETOWN, 1),
            "flags-of-a-file" => libc::syscall(libc::SYS_fcntl, 3, libc::F_SETFL, libc::O_APPEND),
            _ if attack.starts_with("blocks-") => allocate(attack),
            "lease" => libc::syscall(libc::SYS_fcntl, 3, libc::F_SETLEASE, libc::F_UNLCK),
            "lock" => libc::syscall(libc::SYS_fcntl, 3, libc::F_SETLK, null),
            "flock" => libc::syscall(libc::SYS_flock, 3, libc::LOCK_SH),
            "limits-of-others" => {
                let mut limit: libc::rlimit = std::mem::zeroed();
                let old = &raw mut limit;
                libc::syscall(libc::SYS_prlimit64, 2, libc::RLIMIT_NOFILE, null, old)
            }
            "control" => libc::syscall(libc::SYS_ioctl, 0, libc::FIONREAD, null),
            "splice" => libc::syscall(libc::SYS_splice, 0, null, 1, null, 1, 0),
            "send" => libc::syscall(libc::SYS_sendmsg, 1, null, 0),
            "memory-of-others" => libc::syscall(libc::SYS_process_vm_readv, 1, null, 0, null, 0, 0),
            "files-of-others" => libc::syscall(libc::SYS_pidfd_getfd, 0, 0, 0),
            "open-process" => libc::syscall(libc::SYS_pidfd_open, 1, 0),
            "later-writes" => libc::syscall(libc::SYS_io_setup, 1, null),
            "personality" => libc::syscall(libc::SYS_personality, 0x0040_0000),
            "filter" => libc::syscall(libc::SYS_seccomp, 0, 0, null),
            other => return format!("no attack is called {other}"),
        }
    };
    match result {
        -1 => match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EPERM) => "EPERM".to_owned(),
            Some(libc::ENOENT) => "ENOENT".to_owned(),
            Some(other) => format!("errno {other}"),
            None => "no error".to_owned(),
        },
        _ => "ok".to_owned(),
    }
}
