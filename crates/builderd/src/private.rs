//! Files and directories of ours that other users of the machine may not open: layers of private
//! images, the database. It does not know what is in them.
//!
//! What is made here is made so under every umask, and in a directory that everybody may enter.
//! Who is in our group may read.

use std::fs::{DirBuilder, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Of a file; a umask may take more away.
pub(crate) const FILE_MODE: u32 = 0o640;
const DIRECTORY_MODE: u32 = 0o750;
/// What nobody but us has any business with.
const NOT_OURS_ALONE: u32 = 0o027;

/// Makes a directory, and those above it, where there are none.
///
/// # Errors
/// Those of the system.
pub(crate) fn make_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
        make_directory(parent)?;
    }
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.and_then(|()| open_to_its_maker(path)),
    }
}

/// A umask can take from a directory what even who makes it needs of it. Root does without; who is root
/// no more does not.
fn open_to_its_maker(path: &Path) -> io::Result<()> {
    const MAKERS: u32 = 0o700;
    let mut permissions = std::fs::metadata(path)?.permissions();
    match permissions.mode() & MAKERS {
        MAKERS => Ok(()),
        _ => {
            permissions.set_mode(permissions.mode() | MAKERS);
            std::fs::set_permissions(path, permissions)
        }
    }
}

/// The same below `place`, which somebody may have made for whom he likes: open to all who may look
/// into that one.
///
/// # Errors
/// Those of the system.
pub(crate) fn make_directory_below(place: &Path, path: &Path) -> io::Result<()> {
    match is_open(place)? {
        true => std::fs::create_dir_all(path),
        false => make_directory(path),
    }
}

/// Makes a directory that nobody else has any business with, also where it is there and open.
///
/// # Errors
/// Those of the system; not when one that is there is another user's.
pub(crate) fn make_own_directory(path: &Path) -> io::Result<()> {
    make_directory(path)?;
    if let Err(error) = close(path) {
        let path = path.display();
        tracing::warn!(%path, %error, "other users may look into this directory: that cannot be changed");
    }
    Ok(())
}

/// Options to open a file with that is made if need be, and keeps what is in it.
pub(crate) fn file_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(FILE_MODE);
    options
}

/// Makes an empty file where there is none, also where a link leads to none. One that is there is not
/// even opened: its locks would be lost to this process (fcntl(2)).
///
/// # Errors
/// Those of the system.
pub(crate) fn make_file(path: &Path) -> io::Result<()> {
    match file_options().create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match path.try_exists()? {
            true => Ok(()),
            false => file_options().open(path).map(drop),
        },
        made => made.map(drop),
    }
}

/// Whether others than its owner and its group may do anything with a file or directory.
///
/// # Errors
/// Those of the system.
pub(crate) fn is_open(path: &Path) -> io::Result<bool> {
    Ok(path.metadata()?.mode() & 0o007 != 0)
}

/// Takes from all others what they may do with a file or directory of ours beyond what they may
/// with those that are made here; gives whether there was anything to take. Where there is none, or a
/// link (who made it has chosen the place), there is not.
///
/// # Errors
/// Those of the system; also if it is another user's.
pub(crate) fn close(path: &Path) -> io::Result<bool> {
    // Not opened but named: a file that is opened and closed loses the locks that this process has
    // on it (fcntl(2)), and what is changed must be what was looked at.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(false),
        opened => std::fs::File::from(opened?),
    };
    let found = file.metadata()?;
    if found.is_symlink() || found.mode() & NOT_OURS_ALONE == 0 {
        return Ok(false);
    }
    let less = Permissions::from_mode(found.mode() & 0o7777 & !NOT_OURS_ALONE);
    std::fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), less)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        path.symlink_metadata().unwrap().mode() & 0o7777
    }

    #[test]
    fn what_others_may_do_is_taken_and_nothing_is_given() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, b"text").unwrap();
        for (before, after) in [(0o666, 0o640), (0o644, 0o640), (0o604, 0o600), (0o2775, 0o2750)] {
            std::fs::set_permissions(&file, Permissions::from_mode(before)).unwrap();
            assert!(close(&file).unwrap(), "{before:o}");
            assert_eq!(mode(&file), after, "{before:o}");
            assert!(!close(&file).unwrap(), "{before:o} twice");
        }
        for private in [0o640, 0o400, 0o700, 0o000] {
            std::fs::set_permissions(&file, Permissions::from_mode(private)).unwrap();
            assert!(!close(&file).unwrap());
            assert_eq!(mode(&file), private);
        }
        assert!(!close(&directory.path().join("none")).unwrap());
    }

    #[test]
    fn a_directory_is_as_open_as_the_one_it_is_made_in_unless_it_is_ours_alone() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (place, most) in [(0o750, 0o750), (0o700, 0o750), (0o755, 0o777)] {
            std::fs::set_permissions(directory.path(), Permissions::from_mode(place)).unwrap();
            let below = at(&format!("{place:o}"));
            make_directory_below(directory.path(), &below).unwrap();
            assert_eq!(mode(&below) & !most, 0, "{place:o}");
            assert_eq!(is_open(&below).unwrap(), place == 0o755);
        }
        for name in ["755", "new"] {
            make_own_directory(&at(name)).unwrap();
            assert_eq!(mode(&at(name)) & NOT_OURS_ALONE, 0, "{name}");
        }
    }

    #[test]
    fn a_link_is_not_followed_and_what_it_names_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&file, b"text").unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(!close(&link).unwrap());
        assert_eq!(mode(&file), 0o644);
    }

    #[test]
    fn what_a_link_promises_is_made_as_private_as_everything() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::os::unix::fs::symlink("file", &link).unwrap();
        make_file(&link).unwrap();
        assert_eq!(mode(&file) & NOT_OURS_ALONE, 0);
        std::fs::write(&file, b"text").unwrap();
        make_file(&link).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"text");
        let nowhere = directory.path().join("nowhere");
        std::os::unix::fs::symlink("no/such/place", &nowhere).unwrap();
        make_file(&nowhere).unwrap_err();
    }

    #[test]
    fn a_file_that_is_there_keeps_what_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        make_file(&file).unwrap();
        assert_eq!(mode(&file) & NOT_OURS_ALONE, 0);
        std::fs::write(&file, b"text").unwrap();
        make_file(&file).unwrap();
        drop(file_options().open(&file).unwrap());
        assert_eq!(std::fs::read(&file).unwrap(), b"text");
        make_directory(&directory.path().join("a/b")).unwrap();
        make_directory(&directory.path().join("a/b")).unwrap();
        for made in ["a", "a/b"] {
            assert_eq!(mode(&directory.path().join(made)) & NOT_OURS_ALONE, 0, "{made}");
        }
    }
}
