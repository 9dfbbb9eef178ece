//! From sealed chunks to plain ones, from anywhere.

use std::ops::Range;
use std::sync::Arc;

use aws_lc_rs::aead::{Aad, LessSafeKey};

use crate::header::{BOUND_BYTES, Header};
use crate::{KEY_BYTES, SealedError, TAG_BYTES};

/// A sealed file whose header is true.
pub struct Opener {
    header: Header,
    bound: [u8; BOUND_BYTES],
    key: LessSafeKey,
}

impl Opener {
    /// Checks the header of the file that is kept under `name`.
    ///
    /// # Errors
    /// [`SealedError::Forged`]
    pub fn new(header: Header, key: &[u8; KEY_BYTES], name: &str) -> Result<Self, SealedError> {
        let (key, bound) = (header.derive(key, name)?, header.bound());
        let mut tag = header.tag;
        key.open_in_place(header.own_nonce(), Aad::from(&bound), &mut tag)
            .map_err(|_| SealedError::Forged)?;
        Ok(Self { header, bound, key })
    }

    /// Bytes of the plain file.
    pub fn plain_bytes(&self) -> u64 {
        self.header.plain_bytes
    }

    /// Bytes of the sealed file.
    pub fn sealed_bytes(&self) -> u64 {
        self.header.sealed_bytes()
    }

    fn open<'a>(&self, chunk: u64, sealed: &'a mut [u8]) -> Result<&'a mut [u8], SealedError> {
        let nonce = self.header.chunk_nonce(chunk)?;
        self.key
            .open_in_place(nonce, Aad::from(&self.bound), sealed)
            .map_err(|_| SealedError::Chunk { chunk })
    }
}

/// A part of a sealed file that is being read: plain bytes come out only of chunks that opened.
pub struct Part {
    file: Arc<Opener>,
    /// Where the wanted bytes are in the plain file.
    wanted: Range<u64>,
    /// The chunk that comes next, and the one behind the last.
    chunks: Range<u64>,
    /// The beginning of the next chunk.
    waiting: Vec<u8>,
}

impl Part {
    /// Wants the bytes of `range`, as far as the plain file has them. An empty file, wanted whole,
    /// has a chunk to be read all the same.
    pub fn new(file: Arc<Opener>, range: Range<u64>) -> Self {
        let header = &file.header;
        let end = range.end.min(header.plain_bytes);
        let wanted = range.start.min(end)..end;
        let size = header.chunk_bytes();
        let chunks = match (wanted.is_empty(), header.plain_bytes) {
            (true, 0) => 0..1,
            (true, _) => 0..0,
            (false, _) => wanted.start / size..wanted.end.div_ceil(size),
        };
        Self { file, wanted, chunks, waiting: Vec::new() }
    }

    /// The bytes of the sealed file that are needed, all of them and in order.
    pub fn sealed(&self) -> Range<u64> {
        let header = &self.file.header;
        let behind = header.offset_of(self.chunks.end).min(header.sealed_bytes());
        header.offset_of(self.chunks.start).min(behind)..behind
    }

    /// Takes the next bytes of [`Self::sealed`], however many they are; returns the plain bytes
    /// that are sure now.
    ///
    /// # Errors
    /// [`SealedError::Chunk`]; nothing more may be fed then.
    pub fn feed(&mut self, piece: &[u8]) -> Result<Vec<u8>, SealedError> {
        self.waiting.extend_from_slice(piece);
        let (mut plain, mut done) = (Vec::new(), 0);
        while self.chunks.start < self.chunks.end {
            let chunk = self.chunks.start;
            let length = self.file.header.plain_in(chunk) + TAG_BYTES;
            let Some(sealed) = self.waiting.get_mut(done..done + length) else { break };
            let opened = self.file.open(chunk, sealed)?;
            let first = chunk * self.file.header.chunk_bytes();
            plain.extend_from_slice(cut(opened, first, &self.wanted));
            done += length;
            self.chunks.start += 1;
        }
        self.waiting.drain(..done);
        Ok(plain)
    }

    /// Whether all of it was there.
    ///
    /// # Errors
    /// [`SealedError::Cut`]
    pub fn finish(self) -> Result<(), SealedError> {
        match self.chunks.is_empty() {
            true => Ok(()),
            false => Err(SealedError::Cut { chunk: self.chunks.start }),
        }
    }
}

/// What of a chunk, whose first byte is `first`, is wanted.
fn cut<'a>(opened: &'a [u8], first: u64, wanted: &Range<u64>) -> &'a [u8] {
    let inside = |offset: u64| {
        let offset = usize::try_from(offset.saturating_sub(first)).unwrap_or(usize::MAX);
        offset.min(opened.len())
    };
    opened.get(inside(wanted.start)..inside(wanted.end)).unwrap_or_default()
}
