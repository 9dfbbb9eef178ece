//! Bytes into the image file: metadata from memory, file data from the layer packs.
//!
//! Data moves inside the kernel (copy_file_range(2), which on XFS and btrfs shares
//! the blocks instead of copying) and falls back to reading and writing where a
//! file system refuses. This module does not know where anything belongs: the
//! layout told.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use ext4::{BLOCK_SIZE, Layout, Move};
use rustix::fs::FallocateFlags;
use sha2::{Digest as _, Sha256};

use super::layers::hex;
use super::{BuildEvent, Compression, Observer};
use crate::packs::OpenPack;

/// Most bytes moved by one call: small enough for even progress, large enough for speed.
const PIECE_BYTES: u64 = 16 << 20;
const HASH_BUFFER_BYTES: usize = 256 << 10;
const COPY_BUFFER_BYTES: usize = 1 << 20;
/// Level of the compressed forms: the speed/size middle both libraries default to.
const ZSTD_LEVEL: i32 = 3;
const GZIP_LEVEL: u32 = 6;

/// The image file as the ext4 writer sees it.
pub(super) struct ImageFile<'a>(pub(super) &'a File);

impl ext4::Output for ImageFile<'_> {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
}

/// How the data is to be moved.
#[derive(Clone, Copy)]
pub(super) struct MoveOptions {
    /// Hash the image behind the copier.
    pub(super) hash: bool,
    /// Nobody needs the packs after this: give their blocks back while copying.
    pub(super) consume: bool,
    /// Threads that may copy.
    pub(super) jobs: usize,
}

/// Moves every live data run to its place and, when wanted, hashes the file behind the copier.
///
/// The metadata must already be in `image`. Returns the SHA-256 of the whole file in hex.
pub(super) fn write_data(
    layout: &Layout,
    packs: &[OpenPack],
    image: &File,
    options: MoveOptions,
    observer: &dyn Observer,
) -> io::Result<Option<String>> {
    let hash = options.hash;
    let pieces = Pieces { moves: Box::new(layout.moves()), rest: None };
    let work = Mutex::new(Work {
        pieces,
        copied_bytes: 0,
        total_bytes: layout.summary().data_bytes,
        failed: false,
    });
    let progress = Progress::default();
    // The hasher follows one copier in file order; without it the copiers share the work.
    let copiers = if hash { 1 } else { options.jobs.clamp(1, 8) };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..copiers)
            .map(|_| {
                scope.spawn(|| {
                    let mut copier =
                        Copier { in_kernel: true, consume: options.consume, buffer: Vec::new() };
                    let result =
                        copy_pieces(&mut copier, &work, packs, image, &progress, observer);
                    if result.is_err() {
                        lock(&work).failed = true;
                    }
                    progress.advance(u64::MAX);
                    result
                })
            })
            .collect();
        let sum = hash.then(|| hash_behind(image, layout.size_bytes(), &progress));
        for copier in running {
            copier.join().map_err(|_| io::Error::other("a copying thread panicked"))??;
        }
        sum.transpose()
    })
}

struct Work<'a> {
    pieces: Pieces<'a>,
    copied_bytes: u64,
    total_bytes: u64,
    failed: bool,
}

/// The moves, cut to pieces of at most [`PIECE_BYTES`].
struct Pieces<'a> {
    moves: Box<dyn Iterator<Item = Move> + Send + 'a>,
    rest: Option<Move>,
}

impl Iterator for Pieces<'_> {
    type Item = Move;

    fn next(&mut self) -> Option<Move> {
        let whole = self.rest.take().or_else(|| self.moves.next())?;
        let blocks = whole.blocks.min(PIECE_BYTES / BLOCK_SIZE);
        if blocks < whole.blocks {
            self.rest = Some(Move {
                region: whole.region,
                region_block: whole.region_block + blocks,
                image_block: whole.image_block + blocks,
                blocks: whole.blocks - blocks,
            });
        }
        Some(Move { blocks, ..whole })
    }
}

/// Up to which byte the file is complete.
#[derive(Default)]
struct Progress {
    complete_to: Mutex<u64>,
    moved: Condvar,
}

impl Progress {
    fn advance(&self, offset: u64) {
        *lock(&self.complete_to) = offset;
        self.moved.notify_all();
    }

    fn wait_beyond(&self, offset: u64) -> u64 {
        let complete = lock(&self.complete_to);
        *self
            .moved
            .wait_while(complete, |complete| *complete <= offset)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A poisoned lock means a thread panicked; its join reports that.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn copy_pieces(
    copier: &mut Copier,
    work: &Mutex<Work<'_>>,
    packs: &[OpenPack],
    image: &File,
    progress: &Progress,
    observer: &dyn Observer,
) -> io::Result<()> {
    loop {
        let piece = {
            let mut work = lock(work);
            match work.pieces.next() {
                Some(piece) if !work.failed => piece,
                _ => return Ok(()),
            }
        };
        let to = piece.image_block * BLOCK_SIZE;
        // Pieces ascend: what lies before this one is written, or is a hole.
        progress.advance(to);
        let length = piece.blocks * BLOCK_SIZE;
        let region = usize::try_from(piece.region).map_err(io::Error::other)?;
        let pack = packs.get(region).ok_or_else(|| io::Error::other("a layer without a pack"))?;
        copier.copy(&pack.file, piece.region_block * BLOCK_SIZE, image, to, length)?;
        let mut work = lock(work);
        work.copied_bytes += length;
        let (bytes, total_bytes) = (work.copied_bytes, work.total_bytes);
        drop(work);
        observer.event(&BuildEvent::WriteProgress { bytes, total_bytes });
    }
}

struct Copier {
    in_kernel: bool,
    consume: bool,
    buffer: Vec<u8>,
}

impl Copier {
    fn copy(&mut self, from: &File, at: u64, to: &File, offset: u64, length: u64) -> io::Result<()> {
        let mut done = 0;
        while done < length && self.in_kernel {
            let (mut source, mut target) = (at + done, offset + done);
            let want = usize::try_from(length - done).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), want) {
                Ok(0) => return Err(ends_early()),
                Ok(count) => done += count as u64,
                Err(rustix::io::Errno::INTR) => {}
                // Different file systems, or one that does not know the call.
                Err(
                    rustix::io::Errno::XDEV
                    | rustix::io::Errno::OPNOTSUPP
                    | rustix::io::Errno::NOSYS
                    | rustix::io::Errno::INVAL,
                ) => self.in_kernel = false,
                Err(error) => return Err(error.into()),
            }
        }
        self.buffer.resize(if done < length { COPY_BUFFER_BYTES } else { 0 }, 0);
        while done < length {
            let want = usize::try_from(length - done).unwrap_or(usize::MAX).min(self.buffer.len());
            let buffer = &mut self.buffer[..want];
            from.read_exact_at(buffer, at + done)?;
            to.write_all_at(buffer, offset + done)?;
            done += want as u64;
        }
        if self.consume {
            // The pages go straight into the next piece of the output, the blocks back to the
            // disk. A file system that cannot do it frees them when the pack is closed.
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            self.consume = rustix::fs::fallocate(from, flags, at, length).is_ok();
        }
        Ok(())
    }
}

fn ends_early() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "a layer pack ends before its content")
}

fn hash_behind(image: &File, size_bytes: u64, progress: &Progress) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; HASH_BUFFER_BYTES];
    let mut offset = 0;
    while offset < size_bytes {
        let complete = progress.wait_beyond(offset).min(size_bytes);
        while offset < complete {
            let left = usize::try_from(complete - offset).unwrap_or(usize::MAX);
            let part = &mut buffer[..left.min(HASH_BUFFER_BYTES)];
            image.read_exact_at(part, offset)?;
            hasher.update(&*part);
            offset += part.len() as u64;
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// Size and sum of a compressed image.
pub(super) struct Compressed {
    pub(super) size_bytes: u64,
    pub(super) sha256: Option<String>,
}

/// Writes the compressed form of `image` to `target`. The bytes do not depend on `jobs`.
pub(super) fn compress(
    image: &File,
    size_bytes: u64,
    target: &File,
    compression: Compression,
    hash: bool,
    jobs: usize,
) -> io::Result<Compressed> {
    let sink = HashingSink { file: target, hasher: hash.then(Sha256::new), bytes: 0 };
    let source = FileFrom { file: image, offset: 0, end: size_bytes };
    let sink = match compression {
        Compression::None => copy_through(source, sink, Ok)?,
        Compression::Gzip => {
            let level = flate2::Compression::new(GZIP_LEVEL);
            let encoder = flate2::write::GzEncoder::new(sink, level);
            copy_through(source, encoder, flate2::write::GzEncoder::finish)?
        }
        Compression::Zstd => {
            let mut encoder = zstd::Encoder::new(sink, ZSTD_LEVEL)?;
            encoder.include_checksum(true)?;
            // With one worker or many the library cuts the same jobs; with none it would not.
            encoder.multithread(u32::try_from(jobs.clamp(1, 64)).unwrap_or(1))?;
            copy_through(source, encoder, zstd::Encoder::finish)?
        }
    };
    Ok(Compressed {
        size_bytes: sink.bytes,
        sha256: sink.hasher.map(|hasher| hex(&hasher.finalize())),
    })
}

fn copy_through<W: Write, T>(
    mut source: FileFrom<'_>,
    mut encoder: W,
    finish: impl FnOnce(W) -> io::Result<T>,
) -> io::Result<T> {
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    loop {
        match source.read(&mut buffer)? {
            0 => return finish(encoder),
            count => encoder.write_all(&buffer[..count])?,
        }
    }
}

struct FileFrom<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for FileFrom<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let want = left.min(buffer.len());
        let count = self.file.read_at(&mut buffer[..want], self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

struct HashingSink<'a> {
    file: &'a File,
    hasher: Option<Sha256>,
    bytes: u64,
}

impl Write for HashingSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.bytes)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
