//! A process that speaks to the network, and what it keeps of the host meanwhile: a few
//! directories, and the right to start confined workers.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::account::{Account, without_cores};
use crate::confine::{EMPTY, MOUNT_POINTS, drop_capabilities, keep_to_itself};
use crate::{SandboxError, Users, apart, seccomp, users};

/// What a program needs to run, to look names up and to check certificates; where it is there.
const READ: [&str; 18] = [
    "/etc/ca-certificates",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
    "/etc/pki/ca-trust",
    "/etc/pki/tls/certs",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl/cert.pem",
    "/etc/ssl/certs",
    "/gnu/store",
    "/lib",
    "/lib64",
    "/nix/store",
    "/run/systemd/resolve",
    "/usr",
];

/// Written to by whoever likes to.
const DEVICES: [&str; 4] = ["/dev/null", "/dev/random", "/dev/urandom", "/dev/zero"];

/// Which processes a narrowed one can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processes {
    /// Those that it starts.
    Own,
    /// Those that it could name before.
    All,
}

/// With these the host itself can be changed by whoever is its root, without a capability:
/// proc(5), and what OCI runtimes keep from containers.
const PROC_READ_ONLY: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/bus",
    "/proc/driver",
    "/proc/dynamic_debug",
    "/proc/fs",
    "/proc/irq",
    "/proc/mtrr",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/tty",
];

/// What root keeps: to write what is another user's in its directories, and to give workers
/// users of their own (user_namespaces(7)).
const ROOT_KEEPS: CapabilitySet =
    CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::SETUID).union(CapabilitySet::SETGID);

/// Calls that neither a build nor its workers have any use for: to reach other processes, the
/// kernel's insides and its clocks, to mount what is not mounted yet, and to use up what the kernel
/// gives to all processes of a user together.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_inotify_init1,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ioprio_set,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_kill,
    libc::SYS_migrate_pages,
    libc::SYS_mknodat,
    libc::SYS_move_pages,
    libc::SYS_mq_open,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_setns,
    libc::SYS_setpriority,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_inotify_init,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
];

/// Leaves this process the directories `kept`, which it may write in as far as their modes let it,
/// and of all other files what a program needs to run and to use the network. It loses the
/// capabilities that are not needed to start [confined processes](crate::Sandbox::spawn), gains no
/// new privileges, and system calls that reach other processes or the kernel's insides are refused.
/// Its sockets are those of the internet: by others it could speak with processes of this host, and
/// hand them files that are open; queues and memory that processes share by a number or a name are
/// its own. What it or a process that it starts mounts is what it sees already, elsewhere.
///
/// With [`Processes::Own`] it goes on as another process, in a PID namespace, and sees `/proc` of that
/// alone. The one that called waits outside and ends as this one does; when it is ended, this one and
/// all that it has started are ended by the kernel.
///
/// With `users`, which [somebody else holds](Users::hold_few), who is root goes on as the first of them
/// and as root of them alone: what the kernel counts by user it counts for this process and its
/// workers, and no capability reaches another user. What is root's in `kept` is its own, and what it
/// makes there is root's. For that the file systems of `kept` must know idmapped mounts, and a
/// program of the host is not started when it crashes. Who is not root has one user in any case.
///
/// To be called before the first thread is started, with absolute paths. Descriptors that are open
/// stay open. The working directory is `/` afterwards.
///
/// # Errors
/// [`SandboxError`] when this host does not let it; the process is not to go on then, since part
/// of it may be done.
pub fn narrow(
    kept: &[&Path],
    processes: Processes,
    users: Option<Users>,
) -> Result<(), SandboxError> {
    let failed = |action: &'static str| move |source: io::Error| SandboxError::new(action, source);
    let is_root = rustix::process::geteuid().is_root();
    let account = users.filter(|_| is_root).map(Account::open).transpose();
    let account = account.map_err(failed("have users of its own"))?;
    own_namespaces(is_root, processes).map_err(failed(match processes {
        Processes::Own => "have mounts and processes of its own",
        Processes::All => "have mounts of its own",
    }))?;
    if processes == Processes::Own {
        apart::go_inside().map_err(failed("go on among processes of its own"))?;
    }
    let seen = see_only(kept, is_root, processes, account.as_ref());
    seen.map_err(failed("leave the host's files"))?;
    let has_account = account.is_some();
    if let Some(account) = account {
        without_cores()
            .and_then(|()| account.enter())
            .map_err(failed("go on as a user of its own"))?;
    }
    let keeps = if is_root { ROOT_KEEPS } else { CapabilitySet::empty() };
    drop_capabilities(keeps).map_err(failed("give up capabilities"))?;
    if is_root && !has_account {
        // Others of its kind are root with the same capabilities: they must not reach its memory.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(|source| SandboxError::new("refuse to be traced", source))?;
    }
    rustix::thread::set_no_new_privs(true)
        .map_err(|source| SandboxError::new("give up new privileges", source))?;
    keep_to_itself();
    if !has_account {
        users::hold_own().map_err(failed("find users that nobody else has"))?;
    }
    seccomp::refuse(REFUSED).map_err(failed("filter system calls"))
}

/// The same directory once more, from which no way leads up. `..` of a directory that is handed over leads
/// through the mounts of whoever has opened it, past the root of who has it now (path_resolution(7)); this
/// one is mounted nowhere. Needs root.
///
/// # Errors
/// [`SandboxError`] when the kernel refuses.
pub fn without_parent(directory: BorrowedFd<'_>) -> Result<File, SandboxError> {
    let opened = || {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(directory, c"", flags)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&tree, c".", flags, Mode::empty())
    };
    let opened = opened().map(File::from);
    opened.map_err(|source| SandboxError::new("open a directory without what is above it", source))
}

/// Mounts that nobody else sees, what ipc(7) has of its own, and perhaps a PID namespace for the next
/// child. Who is not root needs a user namespace for that, and is the same user in it.
fn own_namespaces(is_root: bool, processes: Processes) -> io::Result<()> {
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC;
    flags.set(UnshareFlags::NEWPID, processes == Processes::Own);
    flags.set(UnshareFlags::NEWUSER, !is_root);
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: this process has one thread still, and stays the same user; nothing but its mounts, its
    // queues, and the namespace of its next child, becomes its own.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    if !is_root {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/gid_map", format!("{0} {0} 1", gid.as_raw()))?;
        fs::write("/proc/self/uid_map", format!("{0} {0} 1", uid.as_raw()))?;
    }
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    Ok(rustix::mount::mount_change("/", private)?)
}

/// A copy of what is mounted at a path, not mounted anywhere yet.
struct Part {
    path: PathBuf,
    tree: OwnedFd,
    is_dir: bool,
    is_read_only: bool,
}

impl Part {
    fn of(path: &Path, is_deep: bool, is_read_only: bool) -> io::Result<Self> {
        let is_dir = fs::metadata(path)?.is_dir();
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if is_deep {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = rustix::mount::open_tree(CWD, path, flags)?;
        Ok(Self { path: path.to_owned(), tree, is_dir, is_read_only })
    }

    /// Mounts it below `root` where it was below the old one.
    fn place(&self, root: &Path) -> io::Result<()> {
        let place = root.join(self.path.strip_prefix("/").map_err(io::Error::other)?);
        let mut dirs = DirBuilder::new();
        dirs.recursive(true).mode(0o755);
        if self.is_dir {
            dirs.create(&place)?;
        } else {
            place.parent().map_or(Ok(()), |parent| dirs.create(parent))?;
            File::create(&place)?;
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&self.tree, c"", CWD, &place, flags)?;
        if self.is_read_only { read_only(&place) } else { Ok(()) }
    }
}

/// Makes what is mounted there read-only, and nothing in it a way to more rights.
fn read_only(place: &Path) -> io::Result<()> {
    // In a user namespace what the host has set must be said again: mount_namespaces(7).
    let set = rustix::fs::statvfs(place)?.f_flag;
    let mut flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    for (is, say) in [
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ] {
        flags.set(say, set.contains(is));
    }
    Ok(rustix::mount::mount_remount(place, flags, "")?)
}

/// A new root with the directories in it, in place of the host's.
fn see_only(
    kept: &[&Path],
    is_root: bool,
    processes: Processes,
    account: Option<&Account>,
) -> io::Result<()> {
    // What is mounted below a directory cannot be left out in a user namespace.
    let is_deep = !is_root;
    let mut parts = Vec::new();
    for path in READ.iter().map(Path::new).filter(|path| path.exists()) {
        parts.push(Part::of(path, is_deep, true)?);
    }
    if processes == Processes::All {
        parts.push(Part::of(Path::new("/proc"), true, false)?);
    }
    for device in DEVICES {
        parts.push(Part::of(Path::new(device), false, false)?);
    }
    for path in kept {
        let part = Part::of(path, is_deep, false).map_err(named(path))?;
        let own = |account: &Account| account.namespace().map_owners(part.tree.as_fd());
        let own = account.map_or(Ok(()), own);
        own.map_err(|error| no_idmapped_mount(path, &error))?;
        parts.push(part);
    }
    // A directory before what lies in it.
    parts.sort_by_key(|part| part.path.components().count());
    let root = MOUNT_POINTS.into_iter().map(Path::new).find(|path| path.is_dir());
    let root = root.ok_or(io::ErrorKind::NotFound)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("none", root, "tmpfs", flags, Some(c"size=256k,mode=0755"))?;
    // Who goes on as another user must be able to go through what is made here, whatever the files of this
    // process are.
    let umask = rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let furnished = furnish(root, &parts, processes);
    rustix::process::umask(umask);
    furnished?;
    rustix::process::chdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::mount::mount_remount("/", flags | MountFlags::RDONLY, "")?;
    Ok(rustix::process::chdir("/")?)
}

/// What is to be seen in the new root.
fn furnish(root: &Path, parts: &[Part], processes: Processes) -> io::Result<()> {
    let nothing = root.join(EMPTY.strip_prefix('/').unwrap_or(EMPTY));
    DirBuilder::new().mode(0o555).create(nothing)?;
    parts.iter().try_for_each(|part| part.place(root))?;
    match processes {
        Processes::Own => own_proc(root).map_err(named(Path::new("/proc"))),
        Processes::All => proc_read_only(root),
    }
}

fn no_idmapped_mount(path: &Path, error: &io::Error) -> io::Error {
    let path = path.display();
    io::Error::new(error.kind(), format!("{path}: its file system has no idmapped mounts: {error}"))
}

fn named(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The processes of this namespace and nothing of the host: proc(5), `subset=pid`, Linux 5.8.
fn own_proc(root: &Path) -> io::Result<()> {
    let place = root.join("proc");
    DirBuilder::new().mode(0o755).create(&place)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount("proc", &place, "proc", flags, Some(c"subset=pid"))?)
}

/// Where the host's own is kept.
fn proc_read_only(root: &Path) -> io::Result<()> {
    for path in PROC_READ_ONLY.map(Path::new) {
        let place = root.join(path.strip_prefix("/").map_err(io::Error::other)?);
        if place.exists() {
            rustix::mount::mount_bind_recursive(&place, &place)?;
            read_only(&place)?;
        }
    }
    Ok(())
}
