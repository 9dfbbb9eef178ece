//! A file that does not exist until it is whole.
//!
//! Bytes go into a file without a name (`O_TMPFILE`, open(2)), so that a crash, a
//! kill or a full disk leaves nothing behind; [`Staged::publish`] gives it its name
//! in one step. Where the file system knows no nameless files, a hidden name under
//! an advisory lock serves; names whose writer died are swept by the next writer.
//!
//! This module does not know what the bytes mean, and it does not sync them: see
//! `docs/decisions/0004-durability-of-outputs.md`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use crate::private;

/// As far as the umask lets it.
const PUBLIC_MODE: u32 = 0o666;
const HIDDEN_PREFIX: &str = ".builderd-";
const HIDDEN_SUFFIX: &str = ".tmp";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A file being written, not yet visible under its final name.
#[derive(Debug)]
pub(crate) struct Staged {
    file: File,
    /// The hidden name, only where the file system refuses nameless files.
    hidden: Option<PathBuf>,
}

impl Staged {
    /// Opens a new empty file for reading and writing on the file system of `directory`.
    pub(crate) fn create_in(directory: &Path) -> io::Result<Self> {
        Self::create(directory, PUBLIC_MODE)
    }

    /// The same, for a file that other users of the machine may not open.
    pub(crate) fn create_private_in(directory: &Path) -> io::Result<Self> {
        Self::create(directory, private::FILE_MODE)
    }

    fn create(directory: &Path, mode: u32) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::openat(CWD, directory, flags, Mode::from_raw_mode(mode)) {
            Ok(fd) => Ok(Self { file: File::from(fd), hidden: None }),
            // EISDIR: a kernel or file system without O_TMPFILE sees a directory opened for writing.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                Self::create_hidden(directory, mode)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn create_hidden(directory: &Path, mode: u32) -> io::Result<Self> {
        sweep(directory)?;
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(mode);
        loop {
            let path = hidden_name(directory);
            match options.open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                opened => {
                    let file = opened?;
                    if lock_named(&file, &path)? {
                        return Ok(Self { file, hidden: Some(path) });
                    }
                }
            }
        }
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file the name `target`, replacing what has that name, and returns it still open.
    pub(crate) fn publish(mut self, target: &Path) -> io::Result<File> {
        let file = self.file.try_clone()?;
        if let Some(hidden) = &self.hidden {
            std::fs::rename(hidden, target)?;
            self.hidden = None;
            return Ok(file);
        }
        match self.link(target) {
            Err(rustix::io::Errno::EXIST) => {}
            other => return other.map(|()| file).map_err(io::Error::from),
        }
        // linkat(2) never replaces, rename(2) does: take a hidden name in between.
        let directory = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        sweep(directory)?;
        // Locked, or another writer would take it for a dead one's.
        self.file.lock()?;
        let hidden = loop {
            // Process ids repeat, so another's name may be there.
            let hidden = hidden_name(directory);
            match self.link(&hidden) {
                Err(rustix::io::Errno::EXIST) => {}
                other => break other.map(|()| hidden)?,
            }
        };
        std::fs::rename(&hidden, target).inspect_err(|_| {
            let _ = std::fs::remove_file(&hidden);
        })?;
        Ok(file)
    }

    fn link(&self, target: &Path) -> rustix::io::Result<()> {
        let itself = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        match rustix::fs::linkat(CWD, itself, CWD, target, AtFlags::SYMLINK_FOLLOW) {
            // Without /proc; needs CAP_DAC_READ_SEARCH.
            Err(rustix::io::Errno::NOENT) => {
                rustix::fs::linkat(&self.file, "", CWD, target, AtFlags::EMPTY_PATH)
            }
            other => other,
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(hidden) = self.hidden.take() {
            let _ = std::fs::remove_file(hidden);
        }
    }
}

/// Takes the lock of a file just made. False if its name is not its own any more: until the lock
/// it was a dead writer's to everybody else.
fn lock_named(file: &File, path: &Path) -> io::Result<bool> {
    file.lock()?;
    is_named(file, path)
}

/// Whether `path` is a name of this very file.
fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn hidden_name(directory: &Path) -> PathBuf {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    directory.join(format!("{HIDDEN_PREFIX}{}-{number}{HIDDEN_SUFFIX}", std::process::id()))
}

/// Removes hidden files whose writer is gone: a living writer holds the lock.
pub(crate) fn sweep(directory: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with(HIDDEN_PREFIX) && name.ends_with(HIDDEN_SUFFIX)) {
            continue;
        }
        if let Some(file) = open_regular(&entry.path())
            && file.try_lock().is_ok()
            // Another sweeper may have been here, and another writer have the name since.
            && is_named(&file, &entry.path()).unwrap_or(false)
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Whatever has the name, opening it must not wait or lead elsewhere.
pub(crate) fn open_regular(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    file.metadata().is_ok_and(|metadata| metadata.is_file()).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_dropped_file_was_never_there() {
        let directory = tempfile::tempdir().unwrap();
        let staged = Staged::create_in(directory.path()).unwrap();
        staged.file().write_all(b"half").unwrap();
        drop(staged);
        assert!(names(directory.path()).is_empty());
        let hidden = Staged::create_hidden(directory.path(), PUBLIC_MODE).unwrap();
        assert_eq!(names(directory.path()).len(), 1);
        drop(hidden);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn publishing_replaces_the_old_file_whole() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        for (text, hidden) in [("one", false), ("two", false), ("three", true)] {
            let staged = match hidden {
                true => Staged::create_hidden(directory.path(), PUBLIC_MODE).unwrap(),
                false => Staged::create_in(directory.path()).unwrap(),
            };
            staged.file().write_all(text.as_bytes()).unwrap();
            staged.publish(&target).unwrap();
            assert_eq!(std::fs::read_to_string(&target).unwrap(), text);
            assert_eq!(names(directory.path()), ["out"]);
        }
    }

    #[test]
    fn a_dead_writers_hidden_file_is_swept_and_a_living_ones_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let dead = directory.path().join(format!("{HIDDEN_PREFIX}1-0{HIDDEN_SUFFIX}"));
        std::fs::write(&dead, b"left over").unwrap();
        let living = Staged::create_hidden(directory.path(), PUBLIC_MODE).unwrap();
        assert!(!dead.exists());
        sweep(directory.path()).unwrap();
        assert!(living.hidden.as_ref().unwrap().exists());
    }

    #[test]
    fn a_file_whose_name_was_swept_before_its_lock_is_known_to_be_lost() {
        let directory = tempfile::tempdir().unwrap();
        let path = hidden_name(directory.path());
        let make = || File::options().write(true).create_new(true).open(&path).unwrap();
        let lost = make();
        sweep(directory.path()).unwrap();
        assert!(!lock_named(&lost, &path).unwrap(), "the name is gone");
        let other = make();
        assert!(!lock_named(&lost, &path).unwrap(), "the name is another's");
        assert!(lock_named(&other, &path).unwrap());
    }

    #[test]
    fn writers_that_sweep_at_any_moment_never_take_a_living_ones_name() {
        use std::sync::atomic::AtomicBool;
        let directory = tempfile::tempdir().unwrap();
        let (path, done) = (directory.path(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        sweep(path).unwrap();
                    }
                });
            }
            let lost = (0..3000).filter(|_| {
                let staged = Staged::create_hidden(path, PUBLIC_MODE).unwrap();
                staged.publish(&path.join("out")).is_err()
            });
            let lost = lost.count();
            done.store(true, Ordering::Relaxed);
            assert_eq!(lost, 0);
        });
    }

    #[test]
    fn what_is_no_file_is_neither_waited_for_nor_swept() {
        use rustix::fs::FileType;
        let directory = tempfile::tempdir().unwrap();
        let name = |what| directory.path().join(format!("{HIDDEN_PREFIX}{what}{HIDDEN_SUFFIX}"));
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(CWD, name("fifo"), FileType::Fifo, mode, 0).unwrap();
        let kept = directory.path().join("kept");
        std::fs::write(&kept, b"somebody's").unwrap();
        std::os::unix::fs::symlink(&kept, name("link")).unwrap();
        std::fs::create_dir(name("directory")).unwrap();
        let (swept, ended) = std::sync::mpsc::channel();
        let path = directory.path().to_owned();
        std::thread::spawn(move || swept.send(sweep(&path).is_ok()));
        let ended = ended.recv_timeout(std::time::Duration::from_secs(10));
        assert_eq!(ended, Ok(true), "the sweep waits");
        assert_eq!(names(directory.path()).len(), 4);
    }
}
