//! The accounts of one build: what the kernel counts for all processes of a user together, it counts
//! for the processes of that build alone.
//!
//! Descriptors on their way through sockets (unix(7)), watches of epoll(7) and inotify(7), processes,
//! signals that wait, keys and namespaces are counted by user, and one user's are shared by whoever is
//! that user. So a process gets users that nobody else has, in a user namespace of which they are all
//! there are: its capabilities lead to no other user, and so to no account of somebody else.
//! The kernel counts the namespace itself, and those made in it, for who has made it: the first of
//! the users.
//!
//! It does not know which users are free (`users.rs`), nor what the process does afterwards.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{Gid, LinkNameSpaceType, Uid};

use crate::{Users, spawn, users};

/// The users of one build, and the namespace in which there are no others.
pub(crate) struct Account {
    users: Users,
    namespace: File,
}

impl Account {
    /// To be called by the only thread, as root.
    pub(crate) fn open(users: Users) -> io::Result<Self> {
        Ok(Self { users, namespace: namespace(users, &map(users))? })
    }

    /// [`show_as_own`], by the namespace of these users.
    pub(crate) fn show_as_own(&self, tree: BorrowedFd<'_>) -> io::Result<()> {
        show_as_own(tree, &self.namespace)
    }

    /// Goes on as the first of the users, who is root of them alone. What it starts may have the others.
    ///
    /// To be called by the only thread, as root.
    pub(crate) fn enter(self) -> io::Result<()> {
        let user = Some(LinkNameSpaceType::User);
        rustix::thread::move_into_link_name_space(self.namespace.as_fd(), user)?;
        rustix::thread::set_thread_groups(&[])?;
        let (uid, gid) = (Uid::ROOT, Gid::ROOT);
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        // Its `/proc` is its own again, and with it what it starts. No other process is its user, so
        // nobody else can look into it that way; and a crash starts no program of the host: core(5).
        rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?;
        users::take(Users { first: self.users.first + 1, count: self.users.count - 1 });
        Ok(())
    }
}

/// Shows the files of a tree that is not mounted yet as those of the users outside to whom a user
/// namespace gives their numbers, and makes them the files of those numbers where such a user makes
/// them: mount_setattr(2), Linux 5.12.
pub(crate) fn show_as_own(tree: BorrowedFd<'_>, namespace: &File) -> io::Result<()> {
    /// `struct mount_attr`, linux/mount.h.
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let user_namespace = u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    let attr = MountAttr { set: libc::MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, user_namespace };
    // SAFETY: the kernel reads a path and a structure that live across the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A user namespace that the kernel counts for the first of the users, and with it what it has in it:
/// user_namespaces(7), namespaces(7).
pub(crate) fn namespace(users: Users, map: &str) -> io::Result<File> {
    as_user(users.first, || spawn::user_namespace(map))
}

/// Does what the kernel is to count for a user, or to do in its name and in that of the group of the same
/// number, with the capabilities of root.
pub(crate) fn as_user<T>(user: u32, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // Both are forgotten where the user changes: prctl(2).
    let with_parent = rustix::process::parent_process_death_signal()?;
    let dumpable = rustix::process::dumpable_behavior()?;
    let parent = rustix::process::getppid();
    let group = rustix::process::getegid();
    let all = rustix::thread::capabilities(None)?;
    rustix::thread::set_thread_res_gid(None, Gid::from_raw(user), None)?;
    rustix::thread::set_thread_res_uid(None, Uid::from_raw(user), None)?;
    let done = rustix::thread::set_capabilities(None, all).map_err(io::Error::from);
    let done = done.and_then(|()| work());
    rustix::thread::set_thread_res_uid(None, Uid::ROOT, None)?;
    rustix::thread::set_capabilities(None, all)?;
    rustix::thread::set_thread_res_gid(None, group, None)?;
    rustix::process::set_parent_process_death_signal(with_parent)?;
    rustix::process::set_dumpable_behavior(dumpable)?;
    match rustix::process::getppid() == parent {
        true => done,
        false => Err(io::Error::other("who started this process has ended")),
    }
}

/// Inside the first is root, and the others are called as they are outside.
fn map(users: Users) -> String {
    let Users { first, count } = users;
    format!("0 {first} 1\n{0} {0} {1}", first + 1, count - 1)
}

/// No cores, and none for a program of the host: the limit at which the kernel starts no such program is
/// 1, core(5).
pub(crate) fn without_cores() -> io::Result<()> {
    let limit = Rlimit { current: Some(1), maximum: Some(1) };
    Ok(rustix::process::setrlimit(Resource::Core, limit)?)
}
