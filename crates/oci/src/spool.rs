//! Temporary copies of what cannot be read twice: pipes and compressed archives.
//!
//! The file has no name, so nothing is left behind, whatever ends the process. It does not
//! know what it copies.

use std::fs::File;
use std::io::{Read, Write as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

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
}

/// Copies everything into a file without a name in `dir`.
pub(crate) fn spool<R: Read>(mut from: R, dir: &Path, bytes_max: u64) -> Result<File, SpoolError> {
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
        if copied > bytes_max {
            return Err(SpoolError::TooLarge(bytes_max));
        }
        file.write_all(buffer.get(..read).unwrap_or_default()).map_err(SpoolError::Write)?;
    }
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
        for file in [spool(bytes.as_slice(), dir.path(), 600_000).unwrap(), {
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
        let copied = spool(std::io::repeat(0), dir.path(), 1 << 20);
        assert!(matches!(copied, Err(SpoolError::TooLarge(_))));
    }
}
