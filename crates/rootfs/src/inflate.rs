//! A layer blob becomes the stream of its tar: gzip, zstd or as it is, recognised by its
//! first bytes. Knows nothing of tars.
//!
//! The blob is read to its end, also past the end of the compressed data, so that a caller who
//! hashes it sees all of it.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, BufReader, Chain, Cursor, ErrorKind, Read};
use std::rc::Rc;

use flate2::bufread::GzDecoder;

use crate::{Limits, PackError, Tally};

const READ_BUFFER: usize = 256 << 10;
/// Members without content cost time and bring nothing; builders write one at most.
const EMPTY_MEMBERS_MAX: u32 = 1024;

/// How a layer blob is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip (RFC 1952), of one or several members; eStargz too.
    Gzip,
    /// Zstandard (RFC 8878), of one or several frames; zstd:chunked too.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// Counts what is read and keeps the reader's own error apart from the decoder's.
struct Counted<R> {
    inner: R,
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    bytes: Cell<u64>,
    failed: Cell<bool>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.inner.read(buffer) {
                Ok(length) => {
                    self.state.bytes.set(self.state.bytes.get() + length as u64);
                    return Ok(length);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.state.failed.set(true);
                    return Err(error);
                }
            }
        }
    }
}

enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Box<Members<R>>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
}

/// The blob behind its first bytes, which were looked at already.
type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, Counted<R>>>;

/// The uncompressed layer.
pub(crate) struct Inflate<'t, R: Read> {
    decoder: Decoder<Input<R>>,
    compression: Compression,
    state: Rc<State>,
    limits: Limits,
    out_bytes: u64,
    tally: &'t Tally,
    /// Bytes of the blob that the tally knows of.
    tallied_bytes: u64,
}

impl<'t, R: Read> Inflate<'t, R> {
    pub(crate) fn new(blob: R, limits: &Limits, tally: &'t Tally) -> Result<Self, PackError> {
        let state = Rc::new(State::default());
        let mut counted = Counted { inner: blob, state: Rc::clone(&state) };
        let magic = first_bytes(&mut counted)
            .map_err(|source| PackError::Blob { blob_bytes: state.bytes.get(), source })?;
        let compression = detect(&magic)?;
        let input = BufReader::with_capacity(READ_BUFFER, Cursor::new(magic).chain(counted));
        let decoder = match compression {
            Compression::None => Decoder::Plain(input),
            Compression::Gzip => Decoder::Gzip(Box::new(Members::new(input))),
            Compression::Zstd => zstd::stream::read::Decoder::with_buffer(input)
                .and_then(|mut decoder| {
                    decoder.window_log_max(limits.zstd_window_log_max)?;
                    Ok(Decoder::Zstd(decoder))
                })
                .map_err(|source| PackError::Inflate { compression, blob_bytes: 0, source })?,
        };
        let limits = limits.clone();
        Ok(Self { decoder, compression, state, limits, out_bytes: 0, tally, tallied_bytes: 0 })
    }

    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    pub(crate) fn blob_bytes(&self) -> u64 {
        self.state.bytes.get()
    }

    /// Fills `buffer`; shorter only at the end of the stream, zero after it.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, PackError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let length = self.read(&mut buffer[filled..])?;
            if length == 0 {
                break;
            }
            filled += length;
        }
        self.out_bytes += filled as u64;
        self.check_limits()?;
        let read = self.blob_bytes() - self.tallied_bytes;
        self.tallied_bytes += read;
        self.tally.inflated(read, filled as u64, &self.limits)?;
        Ok(filled)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, PackError> {
        let result = match &mut self.decoder {
            Decoder::Plain(input) => input.read(buffer),
            Decoder::Gzip(members) => members.read(buffer),
            Decoder::Zstd(decoder) => decoder.read(buffer),
        };
        result.map_err(|source| {
            let blob_bytes = self.blob_bytes();
            if self.state.failed.get() {
                PackError::Blob { blob_bytes, source }
            } else {
                PackError::Inflate { compression: self.compression, blob_bytes, source }
            }
        })
    }

    fn check_limits(&self) -> Result<(), PackError> {
        let limits = &self.limits;
        if self.out_bytes > limits.tar_bytes_max {
            return Err(PackError::TarBytes(limits.tar_bytes_max));
        }
        let in_bytes = self.blob_bytes().max(1);
        if self.out_bytes > limits.ratio_free_bytes && self.out_bytes / in_bytes > limits.ratio_max
        {
            return Err(PackError::Ratio { tar_bytes: self.out_bytes, blob_bytes: in_bytes });
        }
        Ok(())
    }
}

/// The first six bytes, fewer when there are no more; a reader may give them one by one.
fn first_bytes(blob: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut first = Vec::with_capacity(6);
    blob.take(6).read_to_end(&mut first)?;
    Ok(first)
}

fn detect(magic: &[u8]) -> Result<Compression, PackError> {
    match magic {
        [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41] => {
            Err(PackError::UnsupportedCompression("bzip2"))
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Err(PackError::UnsupportedCompression("xz")),
        _ => Ok(Compression::None),
    }
}

/// All members of a gzip file, one after the other, then perhaps zeroes.
struct Members<R> {
    /// `None` after the end.
    member: Option<GzDecoder<R>>,
    member_bytes: u64,
    empty_members: u32,
}

impl<R: BufRead> Members<R> {
    fn new(input: R) -> Self {
        Self { member: Some(GzDecoder::new(input)), member_bytes: 0, empty_members: 0 }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let length = member.read(buffer)?;
            self.member_bytes += length as u64;
            if length > 0 {
                return Ok(length);
            }
            self.next_member()?;
        }
        Ok(0)
    }

    fn next_member(&mut self) -> io::Result<()> {
        let Some(member) = self.member.take() else { return Ok(()) };
        if std::mem::take(&mut self.member_bytes) == 0 {
            self.empty_members += 1;
            if self.empty_members > EMPTY_MEMBERS_MAX {
                let text = format!("more than {EMPTY_MEMBERS_MAX} empty gzip members");
                return Err(io::Error::new(ErrorKind::InvalidData, text));
            }
        }
        let mut input = member.into_inner();
        match input.fill_buf()? {
            [] => Ok(()),
            [0, ..] => only_zeroes(&mut input),
            [0x1f, ..] => {
                self.member = Some(GzDecoder::new(input));
                Ok(())
            }
            [_, ..] => Err(trailing()),
        }
    }
}

/// `gzip` pads to the block size of a tape.
fn only_zeroes(input: &mut impl BufRead) -> io::Result<()> {
    loop {
        let chunk = input.fill_buf()?;
        if chunk.is_empty() {
            return Ok(());
        }
        if chunk.iter().any(|byte| *byte != 0) {
            return Err(trailing());
        }
        let length = chunk.len();
        input.consume(length);
    }
}

fn trailing() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "bytes that are no gzip follow the end of the gzip data")
}
