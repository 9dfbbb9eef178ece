//! The measurer: counts what lies in a directory that no file system of its own holds to its size.
//!
//! It runs confined, with the users of the commands, and reaches nothing but that directory. Each
//! byte that it reads asks for one count. The commands work there meanwhile: what is gone when it
//! is looked at is not counted, and what is beyond the limits is not counted on. Files without a
//! name are not its business (`held`).

use std::collections::HashSet;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType};
use rustix::io::Errno;
use sandbox::Access;

use crate::order::{self, Line, MeasureOrder, Trouble};
use crate::unpack::{at, open_directory};

pub(crate) const ROLE: &str = "measure";
/// Blocks of `struct stat`: stat(2).
pub(crate) const STAT_BLOCK_BYTES: u64 = 512;
/// As deep as a layer may be; each level is an open directory.
const DEPTH_MAX: usize = crate::layer::DEPTH_MAX + 8;

/// The whole life of the process: the directory is its first file.
pub(crate) fn main() -> io::Result<()> {
    let order: MeasureOrder = order::receive(io::stdin().lock())?;
    let files = order::take(1)?;
    order::confine(&files[0], Access::Look, files.len() + DEPTH_MAX)?;
    let mut asked = [0];
    while io::stdin().lock().read(&mut asked)? > 0 {
        let mut found = Found::new(&order);
        let counted = open_directory(files[0].as_fd(), b".")
            .map_err(|error| at("open", b"", error))
            .and_then(|top| found.add(&top, 0));
        order::say(&match counted {
            Ok(()) => Line::Used { bytes: found.bytes, files: found.files },
            Err(Trouble { text, is_theirs }) => Line::Failed { text, is_theirs },
        })?;
    }
    Ok(())
}

struct Found<'a> {
    order: &'a MeasureOrder,
    bytes: u64,
    /// Names: a file that has two takes two.
    files: u64,
    /// Files with several names, whose bytes are counted once.
    linked: HashSet<u64>,
}

impl<'a> Found<'a> {
    fn new(order: &'a MeasureOrder) -> Self {
        Self { order, bytes: 0, files: 0, linked: HashSet::new() }
    }

    /// All that is in a directory, or so much of it that it is too much: who makes files faster
    /// than they are counted must not keep the count from its end.
    fn add(&mut self, directory: &OwnedFd, depth: usize) -> Result<(), Trouble> {
        if depth > DEPTH_MAX {
            let text = format!("the commands made directories more than {DEPTH_MAX} deep");
            return Err(Trouble::theirs(text));
        }
        let failed = |error: Errno| at("count", b"", error);
        for entry in Dir::read_from(directory).map_err(failed)? {
            if self.is_too_much() {
                return Ok(());
            }
            let entry = match entry {
                Ok(entry) => entry,
                // The directory itself is gone.
                Err(Errno::NOENT) => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(failed(error)),
            };
            self.files += 1;
            let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if stat.st_nlink > 1 && !is_directory && !self.linked.insert(stat.st_ino) {
                continue;
            }
            let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
            self.bytes = self.bytes.saturating_add(blocks.saturating_mul(STAT_BLOCK_BYTES));
            if is_directory {
                match open_directory(directory.as_fd(), name.to_bytes()) {
                    Ok(below) => self.add(&below, depth + 1)?,
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::AGAIN) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        Ok(())
    }

    fn is_too_much(&self) -> bool {
        self.bytes > self.order.bytes_max || self.files > self.order.files_max
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn count(directory: &std::path::Path, bytes_max: u64, files_max: u64) -> (u64, u64, usize) {
        let order = MeasureOrder { bytes_max, files_max };
        let mut found = Found::new(&order);
        found.add(&OwnedFd::from(File::open(directory).unwrap()), 0).unwrap();
        (found.bytes, found.files, found.linked.len())
    }

    #[test]
    fn each_name_is_counted_and_the_bytes_of_a_file_once() {
        let place = tempfile::tempdir_in(".").unwrap();
        let below = place.path().join("below");
        fs::create_dir(&below).unwrap();
        let (empty, _, _) = count(place.path(), u64::MAX, u64::MAX);
        fs::write(below.join("file"), vec![1; 1 << 20]).unwrap();
        for number in 0..10 {
            fs::hard_link(below.join("file"), below.join(number.to_string())).unwrap();
        }
        std::os::unix::fs::symlink("/", below.join("link")).unwrap();
        let (bytes, files, linked) = count(place.path(), u64::MAX, u64::MAX);
        assert_eq!((files, linked), (13, 1), "the directory, eleven names, a link that is one");
        assert!((1 << 20..3 << 20).contains(&(bytes - empty)), "{bytes}");
    }

    #[test]
    fn a_count_ends_where_it_is_too_much() {
        let place = tempfile::tempdir_in(".").unwrap();
        for number in 0..100 {
            let below = place.path().join(format!("{}/{number}", number % 7));
            fs::create_dir_all(below).unwrap();
        }
        assert_eq!(count(place.path(), u64::MAX, u64::MAX).1, 107);
        assert_eq!(count(place.path(), u64::MAX, 20).1, 21);
        fs::write(place.path().join("0/0/file"), vec![1; 1 << 20]).unwrap();
        fs::write(place.path().join("1/1/file"), vec![1; 1 << 20]).unwrap();
        let (bytes, files, _) = count(place.path(), 1 << 19, u64::MAX);
        assert!(bytes < 2 << 20 && files < 109, "{bytes} {files}");
    }
}
