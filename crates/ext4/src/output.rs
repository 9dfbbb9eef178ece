//! Where the image's bytes go: the [`Output`] trait and the buffer in front of it.
//!
//! Knows nothing of ext4 beyond the block size. Blocks of zeroes are never written: the
//! output starts as one hole.

use std::io;

use crate::error::WriteError;
use crate::format::{BLOCK, BLOCK_SIZE};

/// Takes the bytes of an image, at any offset, in any order. Offsets and lengths are
/// multiples of [`BLOCK_SIZE`], and no two writes overlap.
pub trait Output {
    /// Writes all of `bytes` at `offset` bytes from the start of the image.
    ///
    /// # Errors
    /// Whatever the destination reports.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

impl<O: Output + ?Sized> Output for &mut O {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, bytes)
    }
}

#[cfg(unix)]
impl Output for std::fs::File {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }
}

/// Writes into memory; the vector must already have the size of the image.
impl Output for Vec<u8> {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.get_mut(start..end).ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(bytes);
        Ok(())
    }
}

/// Joins adjacent pieces into writes of up to a mebibyte. The output is lent to each call, so
/// that several streams can fill different areas at once.
pub(crate) struct Stream {
    offset: u64,
    buffer: Vec<u8>,
}

impl Stream {
    const CAPACITY: usize = 1 << 20;

    pub(crate) fn new() -> Self {
        Self { offset: 0, buffer: Vec::new() }
    }

    /// Appends `bytes`, which go to `offset`.
    pub(crate) fn push(
        &mut self,
        out: &mut impl Output,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), WriteError> {
        let end = self.offset + self.buffer.len() as u64;
        if end != offset || self.buffer.len() + bytes.len() > Self::CAPACITY {
            self.flush(out)?;
            self.offset = offset;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes what is buffered, filled up to a whole block, leaving out blocks of zeroes.
    pub(crate) fn flush(&mut self, out: &mut impl Output) -> Result<(), WriteError> {
        let padded = self.buffer.len().next_multiple_of(BLOCK);
        self.buffer.resize(padded, 0);
        let blocks = padded / BLOCK;
        let is_zero = |n: usize| self.buffer[n * BLOCK..][..BLOCK] == [0; BLOCK];
        let mut next = 0;
        while next < blocks {
            let Some(start) = (next..blocks).find(|&n| !is_zero(n)) else { break };
            let end = (start..blocks).find(|&n| is_zero(n)).unwrap_or(blocks);
            let offset = self.offset + start as u64 * BLOCK_SIZE;
            out.write_at(offset, &self.buffer[start * BLOCK..end * BLOCK])
                .map_err(|source| WriteError::Output { offset, source })?;
            next = end;
        }
        self.buffer.clear();
        Ok(())
    }
}
