//! The sum of an artifact, as the service itself finds it: artifacts are filed, and shared, under it,
//! so the word of the process that made the file does not count. It is computed by a process of the
//! service's own in the build's group, `builderd build-sum`: the tenant's limits hold for it too.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use rustix::fs::SeekFrom;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::build::child::cpu_ms;
use crate::build::disk::{AlignedBuffer, Disk, Liking};
use crate::build::output::ImageSum;

const PIECE_BYTES: usize = 2 << 20;
/// Read while others are hashed.
const PIECES: usize = 3;

/// What such a process is told on its standard input.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SumOrder {
    pub(super) file: PathBuf,
    pub(super) size_bytes: u64,
}

/// Its answer: a line of two words.
#[derive(Debug)]
pub(super) struct Summed {
    /// In hex.
    pub(super) sha256: String,
    /// The CPU time that it took, in milliseconds.
    pub(super) cpu_ms: u64,
}

impl Summed {
    /// What a process said that has computed a sum; none if it has not.
    pub(super) fn said(output: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(output).ok()?;
        let (sha256, cpu_ms) = text.strip_suffix('\n')?.split_once(' ')?;
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let is_sum = sha256.len() == 64 && sha256.bytes().all(is_digit);
        let cpu_ms = cpu_ms.parse().ok()?;
        is_sum.then(|| Self { sha256: sha256.to_owned(), cpu_ms })
    }
}

/// `builderd build-sum`.
///
/// # Errors
/// When the order, or the file, cannot be read.
pub(crate) fn main() -> io::Result<()> {
    // Whoever started us may be killed at any moment; then nobody would want the result.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let order: SumOrder = serde_json::from_reader(io::stdin().lock())?;
    let sum = of_file(&order.file, order.size_bytes)?;
    writeln!(io::stdout().lock(), "{sum} {}", cpu_ms())
}

/// SHA-256 of the first `size_bytes` of the file at `path`, in hex.
fn of_file(path: &Path, size_bytes: u64) -> io::Result<String> {
    let file = File::open(path)?;
    if file.metadata()?.len() < size_bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (to_hasher, from_reader) = sync_channel::<Piece>(PIECES);
    let (to_reader, buffers) = channel();
    for _ in 0..PIECES {
        // Cannot fail: the other end is in scope.
        let _ = to_reader.send(AlignedBuffer::new(PIECE_BYTES));
    }
    std::thread::scope(|scope| {
        let file = &file;
        let reading = scope.spawn(move || read(file, size_bytes, &buffers, to_hasher));
        let mut sum = ImageSum::new();
        for piece in from_reader {
            sum.zeroes_to(piece.offset);
            sum.bytes(&piece.buffer.bytes()[..piece.length]);
            // The reader may be done.
            let _ = to_reader.send(piece.buffer);
        }
        reading.join().map_err(|_| io::Error::other("the reading thread panicked"))??;
        sum.zeroes_to(size_bytes);
        Ok(sum.finish())
    })
}

/// Some bytes of the file; between two of them is nothing but zeroes.
struct Piece {
    buffer: AlignedBuffer,
    offset: u64,
    length: usize,
}

/// Reads what is not a hole.
fn read(
    file: &File,
    size_bytes: u64,
    buffers: &Receiver<AlignedBuffer>,
    to_hasher: SyncSender<Piece>,
) -> io::Result<()> {
    let disk = Disk::default();
    let mut place = disk.attach(file, Liking::Faster);
    let mut offset = 0;
    while offset < size_bytes {
        offset = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // No data from here on.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(offset))?.min(size_bytes);
        while offset < end {
            let Ok(mut buffer) = buffers.recv() else { return Ok(()) };
            let length = usize::try_from(end - offset).unwrap_or(usize::MAX).min(PIECE_BYTES);
            place.read(&mut buffer.bytes_mut()[..length], offset)?;
            if to_hasher.send(Piece { buffer, offset, length }).is_err() {
                return Ok(());
            }
            offset += length as u64;
        }
    }
    Ok(())
}

/// Writes the sum where the metadata that lies beside an artifact has it.
pub(super) fn tell(metadata: &mut serde_json::Value, sha256: &str) {
    let artifact = metadata.get_mut("artifact").and_then(serde_json::Value::as_object_mut);
    if let Some(artifact) = artifact {
        artifact.insert("sha256".into(), sha256.into());
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::Advice;
    use rustix::io::{Errno, ReadWriteFlags};
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::build::disk::direct_twin;
    use crate::build::hex;

    #[test]
    fn the_sum_of_a_file_is_that_of_all_its_bytes_holes_too() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let path = directory.path().join("made");
        for more in [0, 1, 5000, 4096 * 3] {
            let mut bytes = vec![0; 5 * PIECE_BYTES + more];
            bytes[4096] = 1;
            bytes[PIECE_BYTES..3 * PIECE_BYTES + 100].fill(7);
            *bytes.last_mut().unwrap() = 2;
            let file = File::create(&path).unwrap();
            file.set_len(bytes.len() as u64).unwrap();
            for some in
                [4096..4097, PIECE_BYTES..3 * PIECE_BYTES + 100, bytes.len() - 1..bytes.len()]
            {
                let at = some.start as u64;
                std::os::unix::fs::FileExt::write_all_at(&file, &bytes[some], at).unwrap();
            }
            let all = bytes.len() as u64;
            assert_eq!(of_file(&path, all).unwrap(), hex(&Sha256::digest(&bytes)));
            let begin = &bytes[..PIECE_BYTES + 17];
            assert_eq!(of_file(&path, begin.len() as u64).unwrap(), hex(&Sha256::digest(begin)));
            assert_eq!(of_file(&path, 0).unwrap(), hex(&Sha256::digest(b"")));
            let error = of_file(&path, all + 1).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
        of_file(&directory.path().join("other"), 1).unwrap_err();
    }

    /// Whether a read in the middle would not have to wait for the disk (readv(2), `RWF_NOWAIT`); none
    /// where that cannot be asked. Who asks may have the file brought to the page cache.
    fn is_cached(file: &File) -> Option<bool> {
        let (mut byte, flags) = ([0], ReadWriteFlags::NOWAIT);
        let mut buffers = [io::IoSliceMut::new(&mut byte)];
        match rustix::io::preadv2(file, &mut buffers, PIECE_BYTES as u64, flags) {
            Ok(_) => Some(true),
            Err(Errno::AGAIN) => Some(false),
            Err(_) => None,
        }
    }

    #[test]
    fn a_file_that_is_not_in_the_page_cache_is_not_brought_there_to_be_summed() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let bytes = vec![7; 4 * PIECE_BYTES];
        let [(other, _), (file, path)] = ["other", "made"].map(|name| {
            let path = directory.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            let file = File::open(&path).unwrap();
            file.sync_all().unwrap();
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            (file, path)
        });
        if direct_twin(&other).is_none() || is_cached(&other) != Some(false) {
            println!(
                "skipped: this file system has no way past the page cache, or keeps all in it"
            );
            return;
        }
        let sum = of_file(&path, bytes.len() as u64).unwrap();
        assert_eq!(sum, hex(&Sha256::digest(&bytes)));
        assert_eq!(is_cached(&file), Some(false));
    }

    #[test]
    fn metadata_that_is_none_is_left_as_it_is() {
        for mut odd in [serde_json::json!(5), serde_json::json!({"artifact": []})] {
            let before = odd.clone();
            tell(&mut odd, "ab");
            assert_eq!(odd, before);
        }
        let mut made = serde_json::json!({"artifact": {"sha256": "lie", "size_bytes": 5}});
        tell(&mut made, "ab");
        assert_eq!(made, serde_json::json!({"artifact": {"sha256": "ab", "size_bytes": 5}}));
    }
}
