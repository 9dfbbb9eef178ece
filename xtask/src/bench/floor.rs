//! The floor: the least that any builder must do with an image's bytes, and nothing more.
//!
//! Download every layer, inflate it on all cores (largest first), hash it before and after, and
//! write the bytes of its files once. No tree, no whiteouts, no file system: the result is good
//! for nothing but the clock.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::{Context as _, Result, bail};
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use crate::http;

const MANIFEST_BYTES_MAX: u64 = 4 << 20;
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
                      application/vnd.docker.distribution.manifest.v2+json";

/// Buffers between two stages, and how many of them may wait.
const BUFFER_BYTES: usize = 256 * 1024;
const BUFFERS_WAITING_MAX: usize = 4;

/// Bytes written at once.
const SLOT_BYTES: usize = 1 << 20;

/// A tar header's size.
const HEADER_BYTES: usize = 512;

#[derive(Clone)]
struct Layer {
    digest: String,
    diff_id: String,
    size_bytes: u64,
}

/// Where an image lies: `127.0.0.1:5000/name:tag`.
struct Place {
    address: String,
    name: String,
    tag: String,
}

impl Place {
    fn parse(reference: &str) -> Result<Self> {
        let (address, rest) = reference.split_once('/').context("wanted HOST:PORT/NAME:TAG")?;
        let (name, tag) = rest.rsplit_once(':').context("wanted HOST:PORT/NAME:TAG")?;
        Ok(Self { address: address.into(), name: name.into(), tag: tag.into() })
    }

    fn blob(&self, digest: &str) -> String {
        format!("/v2/{}/blobs/{digest}", self.name)
    }
}

/// `xtask floor REFERENCE OUTPUT`
pub(crate) fn run(reference: &str, output: &Path) -> Result<()> {
    let place = Place::parse(reference)?;
    let mut layers = layers(&place)?;
    layers.sort_by_key(|layer| std::cmp::Reverse(layer.size_bytes));
    let sink = Sink { file: File::create(output)?, next: AtomicU64::new(0) };
    let turn = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let workers = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(layer) = layers.get(turn.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = transfer(&place, layer, &sink)
                        && let Ok(mut slot) = failure.lock()
                    {
                        *slot = Some(error.context(layer.digest.clone()));
                    }
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().ok().flatten() {
        return Err(error);
    }
    println!("{} bytes of files", sink.next.load(Ordering::Relaxed));
    Ok(())
}

fn layers(place: &Place) -> Result<Vec<Layer>> {
    let json = |path: &str, accept: &str| -> Result<serde_json::Value> {
        let bytes = http::get_bytes(&place.address, path, accept, MANIFEST_BYTES_MAX)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    let manifest = json(&format!("/v2/{}/manifests/{}", place.name, place.tag), ACCEPT)?;
    let config = manifest["config"]["digest"].as_str().context("no config digest")?;
    let config = json(&place.blob(config), "*/*")?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array().context("no diff_ids")?;
    let listed = manifest["layers"].as_array().context("no layers")?;
    if listed.len() != diff_ids.len() {
        bail!("{} layers but {} diff_ids", listed.len(), diff_ids.len());
    }
    let layer = |(layer, diff_id): (&serde_json::Value, &serde_json::Value)| {
        Some(Layer {
            digest: layer["digest"].as_str()?.to_owned(),
            diff_id: diff_id.as_str()?.to_owned(),
            size_bytes: layer["size"].as_u64()?,
        })
    };
    listed.iter().zip(diff_ids).map(layer).collect::<Option<_>>().context("a malformed manifest")
}

/// Three stages on three threads: fetch and hash, inflate, hash and write.
fn transfer(place: &Place, layer: &Layer, sink: &Sink) -> Result<()> {
    let (compressed_in, compressed_out) = sync_channel::<Vec<u8>>(BUFFERS_WAITING_MAX);
    let (plain_in, plain_out) = sync_channel::<Vec<u8>>(BUFFERS_WAITING_MAX);
    std::thread::scope(|scope| {
        let fetched = scope.spawn(|| fetch(place, layer, compressed_in));
        let inflated = scope.spawn(|| inflate(compressed_out, plain_in));
        let written = write(&plain_out, &layer.diff_id, sink);
        // A stage that stops early closes its channel; the first cause is the one to show.
        drop(plain_out);
        let fetched = fetched.join().map_err(|_| anyhow::anyhow!("the fetcher panicked"))?;
        let inflated = inflated.join().map_err(|_| anyhow::anyhow!("the inflater panicked"))?;
        inflated.and(fetched).and(written)
    })
}

fn fetch(place: &Place, layer: &Layer, out: SyncSender<Vec<u8>>) -> Result<()> {
    let mut body = http::get(&place.address, &place.blob(&layer.digest), "*/*")?;
    let mut hash = Sha256::new();
    loop {
        let mut buffer = vec![0; BUFFER_BYTES];
        let count = body.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        buffer.truncate(count);
        hash.update(&buffer);
        out.send(buffer).context("the inflater stopped")?;
    }
    check("blob", hash, &layer.digest)
}

fn inflate(input: Receiver<Vec<u8>>, out: SyncSender<Vec<u8>>) -> Result<()> {
    let mut source = ChannelReader { input, buffer: Vec::new(), used: 0 };
    let gzip = source.fill_buf()?.starts_with(&[0x1f, 0x8b]);
    let mut reader: Box<dyn Read> =
        if gzip { Box::new(MultiGzDecoder::new(source)) } else { Box::new(source) };
    loop {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut filled = 0;
        while filled < buffer.len() {
            let count = reader.read(&mut buffer[filled..])?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        if filled == 0 {
            return Ok(());
        }
        buffer.truncate(filled);
        out.send(buffer).context("the writer stopped")?;
    }
}

fn write(input: &Receiver<Vec<u8>>, diff_id: &str, sink: &Sink) -> Result<()> {
    let mut hash = Sha256::new();
    let mut contents = Contents::default();
    let mut slot = Vec::with_capacity(SLOT_BYTES);
    for buffer in input {
        hash.update(&buffer);
        contents.feed(&buffer, |bytes| sink.push(&mut slot, bytes))?;
    }
    sink.flush(&mut slot)?;
    check("diff_id", hash, diff_id)
}

fn check(what: &str, hash: Sha256, wanted: &str) -> Result<()> {
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if wanted != format!("sha256:{hex}") {
        bail!("{what}: expected {wanted}, found sha256:{hex}");
    }
    Ok(())
}

/// The one output file; whoever has a full slot takes the next place.
struct Sink {
    file: File,
    next: AtomicU64,
}

impl Sink {
    fn push(&self, slot: &mut Vec<u8>, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(SLOT_BYTES - slot.len()));
            slot.extend_from_slice(now);
            bytes = later;
            if slot.len() == SLOT_BYTES {
                self.flush(slot)?;
            }
        }
        Ok(())
    }

    fn flush(&self, slot: &mut Vec<u8>) -> io::Result<()> {
        let at = self.next.fetch_add(slot.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(slot, at)?;
        slot.clear();
        Ok(())
    }
}

/// Skips headers and padding of a tar stream, passes the rest on. Trusts its input.
#[derive(Default)]
struct Contents {
    header: Vec<u8>,
    content: u64,
    padding: u64,
}

impl Contents {
    fn feed(
        &mut self,
        mut bytes: &[u8],
        mut file_bytes: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.content > 0 {
                let (now, later) = split(bytes, self.content);
                file_bytes(now)?;
                self.content -= now.len() as u64;
                bytes = later;
            } else if self.padding > 0 {
                let (now, later) = split(bytes, self.padding);
                self.padding -= now.len() as u64;
                bytes = later;
            } else {
                let (now, later) = split(bytes, (HEADER_BYTES - self.header.len()) as u64);
                self.header.extend_from_slice(now);
                bytes = later;
                if self.header.len() == HEADER_BYTES {
                    self.content = content_bytes(&self.header);
                    self.padding = self.content.next_multiple_of(512) - self.content;
                    self.header.clear();
                }
            }
        }
        Ok(())
    }
}

fn split(bytes: &[u8], limit: u64) -> (&[u8], &[u8]) {
    bytes.split_at(usize::try_from(limit).map_or(bytes.len(), |limit| limit.min(bytes.len())))
}

/// The size field (offset 124, 12 octal digits), base-256 when the first bit is set.
fn content_bytes(header: &[u8]) -> u64 {
    let field = &header[124..136];
    if field[0] & 0x80 != 0 {
        return field[4..].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    }
    let digits = field.iter().filter(|byte| (b'0'..=b'7').contains(byte));
    digits.fold(0, |sum, digit| sum * 8 + u64::from(digit - b'0'))
}

/// Buffers from a channel as one stream.
struct ChannelReader {
    input: Receiver<Vec<u8>>,
    buffer: Vec<u8>,
    used: usize,
}

impl BufRead for ChannelReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.buffer.len()
            && let Ok(buffer) = self.input.recv()
        {
            self.buffer = buffer;
            self.used = 0;
        }
        Ok(&self.buffer[self.used..])
    }

    fn consume(&mut self, count: usize) {
        self.used += count;
    }
}

impl Read for ChannelReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(out)?;
        self.consume(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_content_of_files_is_passed_on_however_the_stream_is_cut() {
        let mut tar = vec![0; 512];
        tar[124..136].copy_from_slice(b"00000000005\0");
        tar.extend_from_slice(b"hello");
        tar.resize(512 * 4, 0);
        for step in [1, 7, 512, 4096] {
            let mut found = Vec::new();
            let mut contents = Contents::default();
            for part in tar.chunks(step) {
                contents
                    .feed(part, |bytes| {
                        found.extend_from_slice(bytes);
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(found, b"hello");
        }
    }
}
