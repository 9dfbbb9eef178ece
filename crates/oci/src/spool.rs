//! Temporary copies of what cannot be read twice: pipes and compressed archives.
//!
//! The file has no name, so nothing is left behind, whatever ends the process. It does not
//! know what it copies.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::options::Limits;

/// Why a temporary copy could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The temporary file cannot be made.
    #[error("cannot make a temporary file")]
    Create(#[source] std::io::Error),
    /// The original cannot be read, or not be decompressed.
    #[error("cannot read the original")]
    Read(#[source] std::io::Error),
    /// The copy cannot be written.
    #[error("cannot write the temporary file")]
    Write(#[source] std::io::Error),
    /// The original is larger than we accept.
    #[error("the original is larger than the limit of {0} bytes")]
    TooLarge(u64),
    /// The original is compressed more than any image is.
    #[error("{spooled_bytes} bytes came out of {read_bytes}, no image is compressed like that")]
    Ratio {
        /// Bytes that came out of it so far.
        spooled_bytes: u64,
        /// Bytes of it that were read.
        read_bytes: u64,
    },
}

/// Counts what is read of an original.
pub(crate) struct Counted<'a, R> {
    pub(crate) inner: R,
    pub(crate) bytes: &'a Cell<u64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.bytes.set(self.bytes.get() + read as u64);
        Ok(read)
    }
}

/// Copies everything into a file without a name in `dir`. Of the original, `read_bytes` have
/// been read: fewer than `from` gives if it decompresses.
pub(crate) fn spool<R: Read>(
    mut from: R,
    read_bytes: &Cell<u64>,
    dir: &Path,
    limits: &Limits,
) -> Result<File, SpoolError> {
    let mut file = temporary(dir).map_err(SpoolError::Create)?;
    let mut buffer = vec![0; 256 << 10];
    let mut copied: u64 = 0;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(file),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(SpoolError::Read(error)),
        };
        copied += read as u64;
        check(copied, read_bytes.get(), limits)?;
        file.write_all(buffer.get(..read).unwrap_or_default()).map_err(SpoolError::Write)?;
    }
}

fn check(spooled_bytes: u64, read_bytes: u64, limits: &Limits) -> Result<(), SpoolError> {
    if spooled_bytes > limits.spool_bytes_max {
        return Err(SpoolError::TooLarge(limits.spool_bytes_max));
    }
    let is_bomb = spooled_bytes > limits.spool_ratio_free_bytes
        && spooled_bytes / read_bytes.max(1) > limits.spool_ratio_max;
    if is_bomb { Err(SpoolError::Ratio { spooled_bytes, read_bytes }) } else { Ok(()) }
}

fn temporary(dir: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => named_then_unlinked(dir),
        Err(errno) => Err(errno.into()),
    }
}

/// For file systems without `O_TMPFILE`.
fn named_then_unlinked(dir: &Path) -> std::io::Result<File> {
    let process = std::process::id();
    for attempt in 0..10_000_u32 {
        let path = dir.join(format!(".oci-spool-{process}-{attempt}"));
        match File::options().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::Error::other("no free name for a temporary file"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_spooled_copy_is_whole_and_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..=255).cycle().take(600_000).collect();
        let (read, limits) = (Cell::new(600_000), Limits::default());
        for file in [spool(bytes.as_slice(), &read, dir.path(), &limits).unwrap(), {
            let mut file = named_then_unlinked(dir.path()).unwrap();
            file.write_all(&bytes).unwrap();
            file
        }] {
            let mut back = vec![0; bytes.len()];
            file.read_exact_at(&mut back, 0).unwrap();
            assert_eq!(back, bytes);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn more_than_the_limit_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { spool_bytes_max: 1 << 20, ..Limits::default() };
        let copied = spool(std::io::repeat(0), &Cell::new(1), dir.path(), &limits);
        assert!(matches!(copied, Err(SpoolError::TooLarge(_))));
    }

    #[test]
    fn a_ratio_is_looked_at_when_enough_has_come() {
        let limits =
            Limits { spool_ratio_free_bytes: 1000, spool_ratio_max: 10, ..Limits::default() };
        for (spooled, read, is_fine) in
            [(1000, 0, true), (1001, 0, false), (1099, 100, true), (1100, 100, false)]
        {
            assert_eq!(check(spooled, read, &limits).is_ok(), is_fine, "{spooled} of {read}");
        }
    }
}
