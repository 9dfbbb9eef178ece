//! The making of a pack: two threads, one that inflates and one that hashes, parses and writes.
//! Knows neither registries nor files; a blob comes in, a pack goes out.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use sha2::{Digest, Sha256};

use crate::data::{DataError, DataWriter, StoredRun};
use crate::inflate::Inflate;
use crate::pack::{Footer, PackSummary, chunk_bytes, write_tail};
use crate::tar::{Entry, EntryKind, TarReader};
use crate::toc::{NewKind, NewMetadata, TocWriter};
use crate::whiteout::{self, Meaning, WhiteoutProblem};
use crate::{Compression, Limits, PackError, Tally, TarError, TarProblem, path};

/// Small enough to stay in a core's cache between the two threads.
const BUFFER: usize = 256 << 10;
/// In flight between the threads; two more are being worked on.
const QUEUED: usize = 4;

/// What the inflating thread sends.
enum Message {
    Bytes(Vec<u8>),
    /// The stream ended as it should.
    End,
}

/// What the inflating thread knows when it is done.
struct Inflated {
    blob_bytes: u64,
    compression: Compression,
}

pub(crate) fn make_pack(
    blob: impl Read + Send,
    out: &mut impl Write,
    limits: &Limits,
    tally: &Tally,
) -> Result<PackSummary, PackError> {
    let (full, filled) = sync_channel(QUEUED);
    let (empty, emptied) = channel();
    for _ in 0..QUEUED + 2 {
        // Cannot fail: the other end is in scope.
        let _ = empty.send(vec![0; BUFFER]);
    }
    thread::scope(|scope| {
        let inflating = scope.spawn(move || inflate(blob, limits, tally, &full, &emptied));
        let mut stream = Stream::new(filled, empty);
        let packed = pack_stream(&mut stream, out, limits, tally);
        let hashed = packed.and_then(|packed| {
            let (diff_id, tar_bytes) = stream.drain()?;
            Ok((packed, diff_id, tar_bytes))
        });
        // Without this the other thread would wait for buffers for ever.
        drop(stream);
        let inflated = match inflating.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let ((toc, data_bytes, chunk_crcs), diff_id, tar_bytes) = hashed?;
        let footer = Footer {
            data_bytes,
            toc_bytes: toc.len(),
            entries: toc.entries(),
            tar_bytes,
            blob_bytes: inflated.blob_bytes,
            diff_id,
            toc_crc: 0,
            chunks_crc: crc32c::crc32c(&chunk_bytes(&chunk_crcs)),
        };
        finish(out, toc, &chunk_crcs, footer, inflated.compression)
    })
}

fn finish(
    out: &mut impl Write,
    toc: TocWriter,
    chunk_crcs: &[u32],
    mut footer: Footer,
    compression: Compression,
) -> Result<PackSummary, PackError> {
    let toc = toc.into_bytes();
    footer.toc_crc = crc32c::crc32c(&toc);
    let tail_bytes =
        write_tail(out, &toc, chunk_crcs, &footer).map_err(|source| PackError::Write { source })?;
    Ok(PackSummary {
        diff_id: footer.diff_id,
        compression,
        blob_bytes: footer.blob_bytes,
        tar_bytes: footer.tar_bytes,
        data_bytes: footer.data_bytes,
        toc_bytes: footer.toc_bytes,
        pack_bytes: footer.data_bytes + tail_bytes,
        entries: footer.entries,
    })
}

/// The inflating thread. Ends early, without an error, when nobody listens any more.
fn inflate(
    blob: impl Read,
    limits: &Limits,
    tally: &Tally,
    full: &SyncSender<Message>,
    empty: &Receiver<Vec<u8>>,
) -> Result<Inflated, PackError> {
    let mut inflate = Inflate::new(blob, limits, tally)?;
    while let Ok(mut buffer) = empty.recv() {
        buffer.resize(BUFFER, 0);
        let length = inflate.fill(&mut buffer)?;
        buffer.truncate(length);
        let message = if length == 0 { Message::End } else { Message::Bytes(buffer) };
        if full.send(message).is_err() || length == 0 {
            break;
        }
    }
    Ok(Inflated { blob_bytes: inflate.blob_bytes(), compression: inflate.compression() })
}

/// The uncompressed layer as the hashing thread sees it: every buffer is hashed when it comes.
struct Stream {
    filled: Receiver<Message>,
    empty: Sender<Vec<u8>>,
    buffer: Vec<u8>,
    at: usize,
    hasher: Sha256,
    bytes: u64,
    ended: bool,
}

impl Stream {
    fn new(filled: Receiver<Message>, empty: Sender<Vec<u8>>) -> Self {
        let hasher = Sha256::new();
        Self { filled, empty, buffer: Vec::new(), at: 0, hasher, bytes: 0, ended: false }
    }

    /// Hashes what the tar parser did not want. Gives the diff id and the length.
    fn drain(&mut self) -> Result<([u8; 32], u64), PackError> {
        loop {
            let length = match self.fill_buf() {
                Ok(chunk) => chunk.len(),
                // The inflating thread's own error takes the place of this one.
                Err(source) => return Err(PackError::Blob { blob_bytes: 0, source }),
            };
            if length == 0 {
                return Ok((self.hasher.clone().finalize().into(), self.bytes));
            }
            self.consume(length);
        }
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let chunk = self.fill_buf()?;
        let length = chunk.len().min(out.len());
        out[..length].copy_from_slice(&chunk[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.buffer.len() && !self.ended {
            let used = std::mem::take(&mut self.buffer);
            if used.capacity() > 0 {
                // The other thread may have ended already.
                let _ = self.empty.send(used);
            }
            self.at = 0;
            match self.filled.recv() {
                Ok(Message::Bytes(buffer)) => {
                    self.hasher.update(&buffer);
                    self.bytes += buffer.len() as u64;
                    self.buffer = buffer;
                }
                Ok(Message::End) => self.ended = true,
                Err(_) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        Ok(&self.buffer[self.at..])
    }

    fn consume(&mut self, length: usize) {
        self.at = (self.at + length).min(self.buffer.len());
    }
}

/// Writes the data area; the table of contents stays in memory.
fn pack_stream(
    stream: &mut Stream,
    out: &mut impl Write,
    limits: &Limits,
    tally: &Tally,
) -> Result<(TocWriter, u64, Vec<u32>), PackError> {
    let mut packer = Packer {
        tar: TarReader::new(stream, limits),
        data: DataWriter::new(out, limits, tally),
        toc: TocWriter::default(),
        path: Vec::new(),
        limits,
    };
    while let Some(entry) = packer.tar.next_entry()? {
        packer.add(&entry)?;
        packer.tar.finish_entry();
        if packer.toc.len() > limits.toc_bytes_max {
            return Err(PackError::TocBytes(limits.toc_bytes_max));
        }
    }
    let (data_bytes, crcs) = packer.data.finish().map_err(|error| data_error(error, limits))?;
    Ok((packer.toc, data_bytes, crcs))
}

struct Packer<'a, R, W> {
    tar: TarReader<'a, R>,
    data: DataWriter<'a, W>,
    toc: TocWriter,
    path: Vec<u8>,
    limits: &'a Limits,
}

impl<R: BufRead, W: Write> Packer<'_, R, W> {
    fn add(&mut self, entry: &Entry) -> Result<(), PackError> {
        let mut path = std::mem::take(&mut self.path);
        path::clean_entry(&entry.path, self.limits, &mut path)
            .map_err(|it| self.error(it.into()))?;
        let meaning = whiteout::meaning(&path).map_err(|problem| {
            self.error(match problem {
                WhiteoutProblem::NoName => TarProblem::WhiteoutName,
                WhiteoutProblem::Below => TarProblem::BelowWhiteout,
            })
        })?;
        match meaning {
            Meaning::Skipped => {}
            Meaning::Whiteout(deleted) => self.toc.whiteout(&deleted),
            Meaning::Opaque(directory) => self.toc.opaque(&directory),
            Meaning::Plain => self.add_plain(entry, &path)?,
        }
        self.path = path;
        Ok(())
    }

    fn add_plain(&mut self, entry: &Entry, path: &[u8]) -> Result<(), PackError> {
        if path.is_empty() && entry.kind != EntryKind::Directory {
            return Err(self.error(TarProblem::RootNotDirectory).into());
        }
        let metadata = NewMetadata {
            permissions: entry.permissions,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: &entry.xattrs,
        };
        let mut target = Vec::new();
        let runs;
        let kind = match entry.kind {
            EntryKind::Directory => NewKind::Directory,
            EntryKind::File => {
                runs = self.store(entry)?;
                NewKind::File { size_bytes: entry.size_bytes, runs: &runs }
            }
            EntryKind::Symlink => NewKind::Symlink(&entry.link),
            EntryKind::HardLink => {
                path::clean(&entry.link, self.limits, &mut target)
                    .map_err(|problem| self.error(problem.into()))?;
                NewKind::HardLink(&target)
            }
            EntryKind::CharDevice { major, minor } => NewKind::CharDevice { major, minor },
            EntryKind::BlockDevice { major, minor } => NewKind::BlockDevice { major, minor },
            EntryKind::Fifo => NewKind::Fifo,
        };
        self.toc.entry(path, &metadata, &kind);
        Ok(())
    }

    /// Moves the contents of a file into the data area.
    fn store(&mut self, entry: &Entry) -> Result<Vec<StoredRun>, PackError> {
        match &entry.segments {
            None => self.copy(entry.size_bytes)?,
            Some(segments) => {
                let mut at = 0;
                for segment in segments {
                    self.hole(segment.offset - at)?;
                    self.copy(segment.length)?;
                    at = segment.offset + segment.length;
                }
                self.hole(entry.size_bytes - at)?;
            }
        }
        self.data.end_file().map_err(|error| data_error(error, self.limits))
    }

    fn hole(&mut self, length: u64) -> Result<(), PackError> {
        self.data.hole(length).map_err(|error| data_error(error, self.limits))
    }

    fn copy(&mut self, mut length: u64) -> Result<(), PackError> {
        while length > 0 {
            let chunk = self.tar.data()?;
            let step = chunk.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            if step == 0 {
                return Err(self.error(TarProblem::Truncated).into());
            }
            self.data.write(&chunk[..step]).map_err(|error| data_error(error, self.limits))?;
            self.tar.consume(step);
            length -= step as u64;
        }
        Ok(())
    }

    fn error(&self, problem: TarProblem) -> TarError {
        self.tar.error(problem)
    }
}

fn data_error(error: DataError, limits: &Limits) -> PackError {
    match error {
        DataError::Write(source) => PackError::Write { source },
        DataError::Limit => PackError::DataBytes(limits.data_bytes_max),
        DataError::ImageLimit => PackError::ImageDataBytes(limits.image_data_bytes_max),
    }
}
