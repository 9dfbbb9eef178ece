//! The measurer: counts what lies in a directory that no file system of its own holds to its size.
//!
//! It runs confined, with the users of the commands, and reaches nothing but that directory. Each
//! byte that it reads asks for one count. The commands work there meanwhile: what is gone when it
//! is looked at is not counted. It does not know how much there may be.

use std::collections::HashSet;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType};
use rustix::io::Errno;
use sandbox::Access;

use crate::order::{self, Line, Trouble};
use crate::unpack::{at, open_directory};

pub(crate) const ROLE: &str = "measure";
/// Blocks of `struct stat`: stat(2).
const STAT_BLOCK_BYTES: u64 = 512;
/// As deep as a layer may be; each level is an open directory.
const DEPTH_MAX: usize = crate::layer::DEPTH_MAX + 8;

/// The whole life of the process: the directory is its first file.
pub(crate) fn main() -> io::Result<()> {
    let files = order::take(1)?;
    order::confine(&files[0], Access::Look, files.len() + DEPTH_MAX)?;
    let mut asked = [0];
    while io::stdin().lock().read(&mut asked)? > 0 {
        let mut found = Found::default();
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

#[derive(Default)]
struct Found {
    bytes: u64,
    files: u64,
    /// Files with several names, which are counted once.
    linked: HashSet<u64>,
}

impl Found {
    /// All that is in a directory.
    fn add(&mut self, directory: &OwnedFd, depth: usize) -> Result<(), Trouble> {
        if depth > DEPTH_MAX {
            let text = format!("the commands made directories more than {DEPTH_MAX} deep");
            return Err(Trouble::theirs(text));
        }
        let failed = |error: Errno| at("count", b"", error);
        for entry in Dir::read_from(directory).map_err(failed)? {
            let Ok(entry) = entry else { return Ok(()) };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(failed(error)),
            };
            if stat.st_nlink > 1
                && FileType::from_raw_mode(stat.st_mode) != FileType::Directory
                && !self.linked.insert(stat.st_ino)
            {
                continue;
            }
            let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
            self.bytes = self.bytes.saturating_add(blocks.saturating_mul(STAT_BLOCK_BYTES));
            self.files += 1;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                match open_directory(directory.as_fd(), name.to_bytes()) {
                    Ok(below) => self.add(&below, depth + 1)?,
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::AGAIN) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        Ok(())
    }
}
