//! Where the commands' files lie: a nameless file that becomes a file system of its own, or a
//! directory of the host's that is watched; and how such a directory is removed, whatever lies
//! in it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;
use sandbox::Users;

use crate::unpack::open_directory;

/// The directory below that holds the image and what commands change.
pub(crate) const TREE: &str = "tree";
/// That of the overlay itself.
pub(crate) const WORK: &str = "work";

/// A file without a name: it is gone with its last user.
pub(crate) fn nameless_file(directory: &Path, bytes: u64) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// A directory that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct WatchedDirectory {
    path: PathBuf,
}

impl WatchedDirectory {
    /// Makes one that root alone can enter: what is below belongs to users that this host does not
    /// know, but may have set-id bits.
    pub(crate) fn create(parent: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let parent = parent.canonicalize()?;
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!(".builderd-commands-{}-{number}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                // Left by one that had this number before and was killed, or of one that has it
                // in another PID namespace.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.map(|()| Self { path }),
            }
        }
    }

    /// Makes the place of the tree, for its users, and opens it.
    pub(crate) fn tree(&self, users: Users) -> io::Result<File> {
        let tree = self.path.join(TREE);
        fs::DirBuilder::new().mode(0o755).create(&tree)?;
        chown(&tree, Some(users.first), Some(users.first))?;
        File::open(tree)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that the host's file system has left, and of how many.
    pub(crate) fn room(&self) -> io::Result<(u64, u64)> {
        let all = rustix::fs::statvfs(&self.path)?;
        let unit = if all.f_frsize == 0 { all.f_bsize } else { all.f_frsize };
        Ok((all.f_bavail.saturating_mul(unit), all.f_blocks.saturating_mul(unit)))
    }
}

impl Drop for WatchedDirectory {
    fn drop(&mut self) {
        // Who starts next clears the directory above.
        let _ = remove_tree(&self.path);
    }
}

/// Removes a directory and all below it, by names alone: nothing is opened but directories, and no
/// link is followed. However deep it goes, few descriptors are open at a time: what is not empty
/// is moved up first. No process may write there any more.
///
/// # Errors
/// When something could not be removed; one that is not there is removed already.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        // A file, or a link: the name is all there is to remove.
        Err(Errno::NOTDIR | Errno::LOOP) => return fs::remove_file(path),
        Err(error) => return Err(error.into()),
    };
    let mut moved = 0;
    empty(top.as_fd(), top.as_fd(), &mut moved)?;
    // What was moved up is at the top, and what is below it comes there in its turn.
    let mut next = 0;
    while next < moved {
        let name = moved_name(next);
        next += 1;
        let below = match open_directory(top.as_fd(), name.as_bytes()) {
            Ok(below) => below,
            // One of an earlier removal had this name, and has got another.
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        empty(below.as_fd(), top.as_fd(), &mut moved)?;
        rustix::fs::unlinkat(&top, name, AtFlags::REMOVEDIR)?;
    }
    fs::remove_dir(path)
}

/// A name at the top. A removal that was broken off may have left some.
fn moved_name(number: u64) -> String {
    format!(".builderd-moved-{number}")
}

/// Removes what is in `directory`; directories that are not empty are moved to `top`.
fn empty(directory: BorrowedFd<'_>, top: BorrowedFd<'_>, moved: &mut u64) -> io::Result<()> {
    for name in names(directory)? {
        match rustix::fs::unlinkat(directory, name.as_slice(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        match rustix::fs::unlinkat(directory, name.as_slice(), AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        move_up(directory, &name, top, moved)?;
    }
    Ok(())
}

/// Moves a directory that is not empty to the next name at the top that is free.
fn move_up(
    directory: BorrowedFd<'_>,
    name: &[u8],
    top: BorrowedFd<'_>,
    moved: &mut u64,
) -> io::Result<()> {
    loop {
        let to = moved_name(*moved);
        *moved += 1;
        match rustix::fs::renameat(directory, name, top, to) {
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            done => return Ok(done?),
        }
    }
}

fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn a_tree_deeper_than_there_are_descriptors_is_removed_and_no_link_is_followed() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "x").unwrap();
        let place = tempfile::tempdir().unwrap();
        let top = place.path().join("top");
        fs::create_dir(&top).unwrap();
        std::os::unix::fs::symlink(outside.path(), top.join("link")).unwrap();
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let deep = most.unwrap_or(1024).min(20_000) + 100;
        let mut below = OwnedFd::from(File::open(&top).unwrap());
        for _ in 0..deep {
            rustix::fs::mkdirat(&below, "d", Mode::RWXU).unwrap();
            rustix::fs::symlinkat(outside.path(), &below, "moved").unwrap();
            below = open_directory(below.as_fd(), b"d").unwrap();
        }
        drop(below);
        remove_tree(&top).unwrap();
        assert!(!top.exists());
        assert!(outside.path().join("kept").exists());
        remove_tree(&top).unwrap();
        let link = place.path().join("link");
        std::os::unix::fs::symlink(outside.path(), &link).unwrap();
        remove_tree(&link).unwrap();
        assert!(!link.is_symlink() && outside.path().join("kept").exists());
    }

    #[test]
    fn a_removal_that_was_broken_off_is_finished_by_the_next() {
        let place = tempfile::tempdir().unwrap();
        // Whichever of these a directory lists first, it is in the way of another.
        for names in [[0, 1, 2], [2, 1, 0], [1, 2, 4]] {
            let top = place.path().join("top");
            for name in names.map(moved_name).iter().map(String::as_str).chain(["tree", "a", "b"]) {
                fs::create_dir_all(top.join(name).join("below/deep")).unwrap();
                fs::write(top.join(name).join("below/file"), "x").unwrap();
            }
            fs::write(top.join(moved_name(3)), "a file").unwrap();
            remove_tree(&top).unwrap();
            assert!(!top.exists());
        }
    }

    #[test]
    fn what_was_left_under_the_same_number_is_in_nobodys_way() {
        let place = tempfile::tempdir().unwrap();
        for number in 0..100 {
            let left = format!(".builderd-commands-{}-{number}", std::process::id());
            fs::create_dir(place.path().join(left)).unwrap();
        }
        let watched = WatchedDirectory::create(place.path()).unwrap();
        drop(watched);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 100, "what is not its own stays");
    }

    #[test]
    fn a_watched_directory_is_roots_alone_and_goes_with_its_owner() {
        use std::os::unix::fs::PermissionsExt as _;
        let place = tempfile::tempdir().unwrap();
        let watched = WatchedDirectory::create(place.path()).unwrap();
        let path = watched.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o700);
        fs::create_dir_all(path.join("tree/lower/a/b")).unwrap();
        fs::write(path.join("tree/lower/a/b/file"), "x").unwrap();
        drop(watched);
        assert!(!path.exists());
    }
}
