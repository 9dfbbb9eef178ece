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
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{Gid, LinkNameSpaceType, Uid};

use crate::{SandboxError, Users, spawn, users};

/// A user namespace. What is in it is not known.
#[derive(Debug)]
pub struct UserNamespace(File);

impl UserNamespace {
    /// One that the kernel counts for the first of the users, and with it what it has in it:
    /// user_namespaces(7), namespaces(7). By root.
    pub(crate) fn new(users: Users, map: &str) -> io::Result<Self> {
        Ok(Self(as_user(users.first, || spawn::user_namespace(map))?))
    }

    /// Shows the files of a tree that is not mounted yet as those of the users outside to whom this
    /// namespace gives their numbers, and makes them the files of those numbers where such a user makes
    /// them: mount_setattr(2), Linux 5.12.
    pub(crate) fn map_owners(&self, tree: BorrowedFd<'_>) -> io::Result<()> {
        /// `struct mount_attr`, linux/mount.h.
        #[repr(C)]
        struct MountAttr {
            set: u64,
            clear: u64,
            propagation: u64,
            user_namespace: u64,
        }
        let user_namespace = u64::try_from(self.0.as_raw_fd()).map_err(io::Error::other)?;
        let set = libc::MOUNT_ATTR_IDMAP;
        let attr = MountAttr { set, clear: 0, propagation: 0, user_namespace };
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

    /// Mounts a directory over itself if `is_good` says so when it is: in it files have the owners to whom
    /// this namespace gives the numbers that they have on the disk. Only those make files there: others,
    /// root too, have no number. What is mounted below is not seen any more. Needs root.
    ///
    /// False where the kernel or the file system has no such mounts, or they are no good; nothing is mounted
    /// then.
    ///
    /// # Errors
    /// [`SandboxError`] when something else is in the way; what is mounted then is of no use.
    pub fn show_owners(
        &self,
        directory: &Path,
        is_good: impl FnOnce() -> io::Result<bool>,
    ) -> Result<bool, SandboxError> {
        let cloned = || {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = rustix::mount::open_tree(CWD, directory, flags)?;
            self.map_owners(tree.as_fd())?;
            Ok(tree)
        };
        let mount = || {
            let tree = match cloned() {
                Err(error) if is_unknown(&error) => return Ok(false),
                cloned => cloned?,
            };
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(&tree, c"", CWD, directory, flags)?;
            let is_good = is_good()?;
            if !is_good {
                rustix::mount::unmount(directory, UnmountFlags::DETACH)?;
            }
            Ok(is_good)
        };
        mount().map_err(|source: io::Error| {
            SandboxError::new("show the owners of a directory as others", source)
        })
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a kernel says that does not know such mounts, or not of this file system, or may not make them.
fn is_unknown(error: &io::Error) -> bool {
    let unknown = [libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::EPERM];
    error.raw_os_error().is_some_and(|error| unknown.contains(&error))
}

/// The users of one build, and the namespace in which there are no others.
pub(crate) struct Account {
    users: Users,
    namespace: UserNamespace,
}

impl Account {
    /// As root.
    pub(crate) fn open(users: Users) -> io::Result<Self> {
        Ok(Self { users, namespace: UserNamespace::new(users, &map(users))? })
    }

    /// Where there are no others.
    pub(crate) fn namespace(&self) -> &UserNamespace {
        &self.namespace
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

/// Does what the kernel is to count for a user, or to do in its name and in that of the group of the same
/// number, with the capabilities of root. By a thread that is gone afterwards: nothing but its own user is
/// ever another, and the end of who started this process still ends it, prctl(2). Not within itself.
pub(crate) fn as_user<T: Send>(
    user: u32,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // What all threads have together changes with the user of one.
    let dumpable = rustix::process::dumpable_behavior()?;
    let become_user = || {
        let all = rustix::thread::capabilities(None)?;
        rustix::thread::set_thread_res_gid(None, Gid::from_raw(user), None)?;
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(user), None)?;
        rustix::thread::set_capabilities(None, all)
    };
    let done = std::thread::scope(|scope| {
        let thread = move || {
            let done = become_user().map_err(io::Error::from).and_then(|()| work());
            (rustix::thread::gettid(), done)
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, thread)?;
        thread.join().map_err(|_| io::Error::other("the thread of another user panicked"))
    });
    let restored = rustix::process::set_dumpable_behavior(dumpable);
    let (thread, done) = done?;
    let done = done?;
    restored?;
    // To the kernel it is one of this process's threads for a moment longer: setns(2), user namespaces.
    let thread = format!("/proc/self/task/{}", thread.as_raw_nonzero());
    while Path::new(&thread).exists() {
        std::thread::yield_now();
    }
    Ok(done)
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
