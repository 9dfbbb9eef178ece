//! A user namespace by itself, without a process in it: for whoever is to go there, and as the list by
//! which a mount shows owners on a disk as other users (idmapped mounts, mount_setattr(2)).
//!
//! It does not know who has which users (`users.rs`), nor what lies in the directories that are shown.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::account::as_user;
use crate::{SandboxError, Users, spawn};

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
