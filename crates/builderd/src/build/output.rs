//! Bytes into the image file: metadata from memory, file data from the layer packs.
//!
//! Where the file system can share blocks (XFS, btrfs) copy_file_range(2) makes the
//! image refer to the blocks of the packs; elsewhere the data is copied, past the
//! page cache while that pays (see `disk`). This module does not know where anything
//! belongs: the layout told.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::ScopedJoinHandle;

use ext4::{BLOCK_SIZE, Layout, Move};
use rustix::fs::SeekFrom;
use sha2::{Digest as _, Sha256};

use super::disk::{AlignedBuffer, Disk, DiskFile, Liking, lock};
use super::layers::hex;
use super::{BuildEvent, Compression, Observer};
use crate::packs::OpenPack;

/// Most blocks moved by one read and one write.
const PIECE_BLOCKS: u64 = 512;
const PIECE_BYTES: usize = 512 * 4096;
/// Dead blocks between two moves that are rather read along than stepped over; they are not written.
const GAP_BLOCKS: u64 = 16;
/// Threads that read for the one that hashes, each every other piece: one alone waits for the disk
/// too often.
const READERS: usize = 2;
/// Pieces in flight between a reader, the hasher and the writer.
const PARCELS: usize = 3;
/// Copying threads when nothing is hashed: they wait for the disk, not for a CPU.
const COPIERS: usize = 2;
const GAP_BUFFER_BYTES: usize = 256 << 10;
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

/// Moves every live data run to its place and, when wanted, hashes the file meanwhile.
///
/// The metadata must already be in `image`. Returns the SHA-256 of the whole file in hex.
pub(super) fn write_data(
    layout: &Layout,
    packs: &[OpenPack],
    image: &File,
    data_is_in_place: bool,
    hash: bool,
    disk: &Disk,
    observer: &dyn Observer,
) -> io::Result<Option<String>> {
    let job = Job { packs, image, disk, observer, total_bytes: layout.summary().data_bytes };
    let mut in_place = data_is_in_place;
    if !in_place && can_share(image) {
        in_place = job.share(layout)?;
    }
    if hash {
        return job.copy_and_hash(layout, in_place).map(Some);
    }
    if !in_place {
        job.copy(layout)?;
    }
    Ok(None)
}

/// SHA-256 of the first `bytes` of a file, in hex.
pub(super) fn sum(file: &File, bytes: u64) -> io::Result<String> {
    let mut sum = ImageSum::new();
    sum.file(file, bytes)?;
    Ok(sum.finish())
}

/// Whether copy_file_range(2) shares blocks on this file system instead of copying them.
pub(super) fn can_share(file: &File) -> bool {
    /// `XFS_SUPER_MAGIC` and `BTRFS_SUPER_MAGIC` of linux/magic.h.
    const SHARING: [u64; 2] = [0x5846_5342, 0x9123_683e];
    magic(file).is_some_and(|magic| SHARING.contains(&magic))
}

pub(super) fn magic(file: &File) -> Option<u64> {
    rustix::fs::fstatfs(file).ok().and_then(|stat| u64::try_from(stat.f_type).ok())
}

/// Moves that are read at once, with the dead blocks between them, and written each to its place.
#[derive(Default)]
struct Piece {
    moves: Vec<Move>,
}

impl Piece {
    fn first(&self) -> Option<&Move> {
        self.moves.first()
    }

    fn blocks(&self) -> u64 {
        match (self.moves.first(), self.moves.last()) {
            (Some(first), Some(last)) => last.region_block + last.blocks - first.region_block,
            _ => 0,
        }
    }

    /// Whether `next` lies so near behind that it can go with this piece.
    fn takes(&self, next: &Move) -> bool {
        let (Some(first), Some(last)) = (self.moves.first(), self.moves.last()) else {
            return true;
        };
        let same_way = first.region == next.region
            && next.region_block > last.region_block
            && next.region_block - first.region_block == next.image_block - first.image_block;
        let gap = next.region_block.saturating_sub(last.region_block + last.blocks);
        same_way
            && gap <= GAP_BLOCKS
            && next.region_block + next.blocks - first.region_block <= PIECE_BLOCKS
    }
}

/// The moves, cut to at most [`PIECE_BLOCKS`] and gathered to pieces.
struct Pieces<I> {
    moves: I,
    rest: Option<Move>,
}

impl<I: Iterator<Item = Move>> Pieces<I> {
    fn next_move(&mut self) -> Option<Move> {
        let whole = self.rest.take().or_else(|| self.moves.next())?;
        let blocks = whole.blocks.min(PIECE_BLOCKS);
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

impl<I: Iterator<Item = Move>> Iterator for Pieces<I> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let mut piece = Piece { moves: vec![self.next_move()?] };
        while let Some(next) = self.next_move() {
            if !piece.takes(&next) {
                // Cut or whole, it is at most a piece: putting it back loses nothing.
                let behind = self.rest.take();
                self.rest = Some(match behind {
                    Some(behind) => Move { blocks: next.blocks + behind.blocks, ..next },
                    None => next,
                });
                break;
            }
            piece.moves.push(next);
        }
        Some(piece)
    }
}

struct Job<'a> {
    packs: &'a [OpenPack],
    image: &'a File,
    disk: &'a Disk,
    observer: &'a dyn Observer,
    total_bytes: u64,
}

/// A piece's bytes on their way from reader to hasher to writer; dead ones are zeroes.
struct Parcel {
    buffer: AlignedBuffer,
    offset: u64,
    length: usize,
    /// Which of the bytes are live, ascending.
    live: Vec<Range<usize>>,
}

impl Parcel {
    fn bytes(&self) -> &[u8] {
        &self.buffer.bytes()[..self.length]
    }

    fn live_bytes(&self) -> u64 {
        self.live.iter().map(|part| part.len() as u64).sum()
    }

    /// Writes what is live; what lies between stays a hole.
    fn write(&self, image: &mut DiskFile<'_>) -> io::Result<()> {
        let live = self.live.iter();
        live.map(|part| (&self.bytes()[part.clone()], self.offset + part.start as u64))
            .try_for_each(|(bytes, offset)| image.write(bytes, offset))
    }
}

impl Job<'_> {
    fn pack(&self, region: u32) -> io::Result<&OpenPack> {
        let region = usize::try_from(region).map_err(io::Error::other)?;
        self.packs.get(region).ok_or_else(|| io::Error::other("a layer without a pack"))
    }

    fn tell(&self, bytes: u64) {
        let total_bytes = self.total_bytes;
        self.observer.event(&BuildEvent::WriteProgress { bytes, total_bytes });
    }

    /// Returns false if the file system refuses, as it does when a pack lies on another one; then
    /// all is to be copied.
    fn share(&self, layout: &Layout) -> io::Result<bool> {
        for whole in layout.moves() {
            let pack = self.pack(whole.region)?;
            let mut source = pack.base + whole.region_block * BLOCK_SIZE;
            let mut target = whole.image_block * BLOCK_SIZE;
            let end = source + whole.blocks * BLOCK_SIZE;
            while source < end {
                let want = usize::try_from(end - source).unwrap_or(usize::MAX);
                let result = rustix::fs::copy_file_range(
                    &pack.file,
                    Some(&mut source),
                    self.image,
                    Some(&mut target),
                    want,
                );
                let count = match result {
                    Err(
                        rustix::io::Errno::XDEV
                        | rustix::io::Errno::OPNOTSUPP
                        | rustix::io::Errno::INVAL,
                    ) => return Ok(false),
                    other => other?,
                };
                if count == 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "a layer pack ends before its content",
                    ));
                }
            }
        }
        Ok(true)
    }

    /// Several threads, each reading and writing: a disk likes to have more than one thing to do.
    fn copy(&self, layout: &Layout) -> io::Result<()> {
        let pieces = Mutex::new(Pieces { moves: layout.moves(), rest: None });
        let copied = Mutex::new(0);
        let copier = || {
            let mut reader = Reader::new(self, false);
            let mut image = self.disk.attach(self.image, Liking::Faster);
            let mut buffer = AlignedBuffer::new(PIECE_BYTES);
            loop {
                let Some(piece) = lock(&pieces).next() else { return Ok(()) };
                let parcel = reader.read(&piece, buffer)?;
                parcel.write(&mut image)?;
                // Told under the lock, or the sums would come out of order.
                let mut sum = lock(&copied);
                *sum += parcel.live_bytes();
                self.tell(*sum);
                buffer = parcel.buffer;
            }
        };
        std::thread::scope(|scope| {
            let copiers: Vec<_> = (0..COPIERS).map(|_| scope.spawn(copier)).collect();
            copiers.into_iter().try_for_each(joined)
        })
    }

    /// Some threads read, this one hashes, one writes: the hash, which no thread can share, sets
    /// the pace. Data that is in its place already is read from there and not written.
    fn copy_and_hash(&self, layout: &Layout, in_place: bool) -> io::Result<String> {
        let (to_writer, from_hasher) = sync_channel::<Parcel>(PARCELS * READERS);
        std::thread::scope(|scope| {
            let (mut from_readers, mut to_readers) = (Vec::new(), Vec::new());
            for reader in 0..READERS {
                let (to_hasher, from_reader) = sync_channel(PARCELS);
                let (to_reader, buffers) = channel();
                for _ in 0..PARCELS {
                    // Cannot fail: the other end is in scope.
                    let _ = to_reader.send(AlignedBuffer::new(PIECE_BYTES));
                }
                scope.spawn(move || self.read(layout, reader, in_place, &buffers, &to_hasher));
                from_readers.push(from_reader);
                to_readers.push(to_reader);
            }
            let writer = scope.spawn(move || self.write(in_place, &from_hasher, &to_readers));
            let sum = self.hash(layout.size_bytes(), from_readers, to_writer);
            // A writer that failed explains a hasher that found nobody to hand on to.
            joined(writer)?;
            sum
        })
    }

    /// Reads the pieces whose turn it is; ends early when nobody wants more.
    fn read(
        &self,
        layout: &Layout,
        turn: usize,
        in_place: bool,
        buffers: &Receiver<AlignedBuffer>,
        to_hasher: &SyncSender<io::Result<Parcel>>,
    ) {
        let mut reader = Reader::new(self, in_place);
        let pieces = Pieces { moves: layout.moves(), rest: None };
        for piece in pieces.skip(turn).step_by(READERS) {
            let Ok(buffer) = buffers.recv() else { return };
            if to_hasher.send(reader.read(&piece, buffer)).is_err() {
                return;
            }
        }
    }

    /// Writes what was hashed and gives the buffers back, in turn as they came.
    fn write(
        &self,
        in_place: bool,
        from_hasher: &Receiver<Parcel>,
        to_readers: &[Sender<AlignedBuffer>],
    ) -> io::Result<()> {
        let mut image = self.disk.attach(self.image, Liking::Faster);
        let (mut copied, mut turns) = (0, to_readers.iter().cycle());
        while let Ok(parcel) = from_hasher.recv() {
            if !in_place {
                parcel.write(&mut image)?;
            }
            copied += parcel.live_bytes();
            self.tell(copied);
            if let Some(reader) = turns.next() {
                // The reader may be done.
                let _ = reader.send(parcel.buffer);
            }
        }
        Ok(())
    }

    fn hash(
        &self,
        size_bytes: u64,
        from_readers: Vec<Receiver<io::Result<Parcel>>>,
        to_writer: SyncSender<Parcel>,
    ) -> io::Result<String> {
        let mut sum = ImageSum::new();
        // The reader whose turn it is has no more: nor have the others.
        for parcel in from_readers.iter().cycle().map_while(|reader| reader.recv().ok()) {
            let parcel = parcel?;
            sum.file(self.image, parcel.offset)?;
            sum.bytes(parcel.bytes());
            if to_writer.send(parcel).is_err() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
        drop(to_writer);
        sum.file(self.image, size_bytes)?;
        Ok(sum.finish())
    }
}

/// The hash of the image up to `offset`.
pub(super) struct ImageSum {
    hasher: Sha256,
    offset: u64,
    buffer: Vec<u8>,
}

impl ImageSum {
    pub(super) fn new() -> Self {
        Self { hasher: Sha256::new(), offset: 0, buffer: vec![0; GAP_BUFFER_BYTES] }
    }

    /// The sum of what was hashed, in hex.
    pub(super) fn finish(self) -> String {
        hex(&self.hasher.finalize())
    }

    /// Hashes these bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.offset += bytes.len() as u64;
    }

    /// Hashes zeroes up to `offset`.
    pub(super) fn zeroes_to(&mut self, offset: u64) {
        self.zeroes(offset.saturating_sub(self.offset));
    }

    /// Hashes what already stands in the file up to `end`; holes are not read.
    fn file(&mut self, image: &File, end: u64) -> io::Result<()> {
        while self.offset < end {
            let data = match rustix::fs::seek(image, SeekFrom::Data(self.offset)) {
                Ok(data) => data.min(end),
                // No data from here on.
                Err(rustix::io::Errno::NXIO) => end,
                Err(error) => return Err(error.into()),
            };
            self.zeroes_to(data);
            if data == end {
                break;
            }
            let hole = rustix::fs::seek(image, SeekFrom::Hole(data))?.min(end);
            while self.offset < hole {
                let left = usize::try_from(hole - self.offset).unwrap_or(usize::MAX);
                let part = &mut self.buffer[..left.min(GAP_BUFFER_BYTES)];
                image.read_exact_at(part, self.offset)?;
                self.hasher.update(&*part);
                self.offset += part.len() as u64;
            }
        }
        Ok(())
    }

    fn zeroes(&mut self, mut count: u64) {
        self.offset += count;
        if count > 0 {
            self.buffer.fill(0);
        }
        while count > 0 {
            let part = usize::try_from(count).unwrap_or(usize::MAX).min(GAP_BUFFER_BYTES);
            self.hasher.update(&self.buffer[..part]);
            count -= part as u64;
        }
    }
}

/// Reads pieces from the packs, or from where they are in the image; one open file at a time.
struct Reader<'a> {
    job: &'a Job<'a>,
    in_place: bool,
    current: Option<(u32, DiskFile<'a>)>,
}

impl<'a> Reader<'a> {
    fn new(job: &'a Job<'a>, in_place: bool) -> Self {
        Self { job, in_place, current: None }
    }

    fn read(&mut self, piece: &Piece, mut buffer: AlignedBuffer) -> io::Result<Parcel> {
        let first = piece.first().ok_or_else(|| io::Error::other("an empty piece"))?;
        let pack = self.job.pack(first.region)?;
        let region = if self.in_place { 0 } else { first.region };
        let file = match &mut self.current {
            Some((current, file)) if *current == region => file,
            _ => {
                let file = if self.in_place { self.job.image } else { &pack.file };
                &mut self.current.insert((region, self.job.disk.attach(file, Liking::Faster))).1
            }
        };
        let offset = match self.in_place {
            true => first.image_block * BLOCK_SIZE,
            false => pack.base + first.region_block * BLOCK_SIZE,
        };
        let length = usize::try_from(piece.blocks() * BLOCK_SIZE).map_err(io::Error::other)?;
        let bytes = &mut buffer.bytes_mut()[..length];
        file.read(bytes, offset)?;
        let mut live: Vec<Range<usize>> = Vec::with_capacity(piece.moves.len());
        for run in &piece.moves {
            let at = |block: u64| {
                usize::try_from((block - first.region_block) * BLOCK_SIZE).map_err(io::Error::other)
            };
            let (start, end) = (at(run.region_block)?, at(run.region_block + run.blocks)?);
            match live.last_mut() {
                Some(last) if last.end == start => last.end = end,
                last => {
                    // What an upper layer deleted must not reach the image, nor its sum.
                    bytes[last.map_or(0, |last| last.end)..start].fill(0);
                    live.push(start..end);
                }
            }
        }
        Ok(Parcel { buffer, offset: first.image_block * BLOCK_SIZE, length, live })
    }
}

fn joined(thread: ScopedJoinHandle<'_, io::Result<()>>) -> io::Result<()> {
    thread.join().map_err(|_| io::Error::other("a copying thread panicked"))?
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
            let zstd = || {
                let mut encoder = zstd::Encoder::new(sink, ZSTD_LEVEL)?;
                encoder.include_checksum(true)?;
                // With one worker or many the library cuts the same jobs; with none it would not.
                encoder.multithread(u32::try_from(jobs.clamp(1, 64)).unwrap_or(1))?;
                copy_through(source, encoder, zstd::Encoder::finish)
            };
            zstd().map_err(known_by_its_kind)?
        }
    };
    Ok(Compressed {
        size_bytes: sink.bytes,
        sha256: sink.hasher.map(|hasher| hex(&hasher.finalize())),
    })
}

/// The library tells a want of memory by its words alone (zstd's `ZSTD_error_memory_allocation`).
fn known_by_its_kind(error: io::Error) -> io::Error {
    match error.kind() == io::ErrorKind::Other && error.to_string().contains("not enough memory") {
        true => io::Error::new(io::ErrorKind::OutOfMemory, error),
        false => error,
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::disk::{Beside, DiskWriter};
    use crate::build::shift::{Shift, can_shift, runs};
    use rootfs::{FileTree, Folder, Limits, TreeLimits};

    #[test]
    fn a_compressor_without_memory_says_so_by_the_kind_of_its_error() {
        let kind = |text: &str| known_by_its_kind(io::Error::other(text)).kind();
        assert_eq!(kind("Allocation error : not enough memory"), io::ErrorKind::OutOfMemory);
        assert_eq!(kind("Src size is incorrect"), io::ErrorKind::Other);
        let full = known_by_its_kind(io::ErrorKind::StorageFull.into());
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }

    struct Deaf;

    impl Observer for Deaf {
        fn event(&self, _: &BuildEvent) {}
    }

    /// Names with sizes; no size is a whiteout.
    fn layer(names: &[(String, Option<usize>)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (number, (name, size)) in names.iter().enumerate() {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(size.unwrap_or(0) as u64);
            let content: Vec<u8> =
                (0..=250u8).cycle().skip(number).step_by(7).take(size.unwrap_or(0)).collect();
            tar.append_data(&mut header, name, &content[..]).unwrap();
        }
        tar.into_inner().unwrap()
    }

    /// Many small files, some large ones; the upper layer deletes and replaces every third.
    fn layers() -> [Vec<u8>; 2] {
        let size = |number: usize| match number.is_multiple_of(50) {
            true => 3_000_000,
            false => number * 97 % 20_000,
        };
        let name = |number: usize| format!("d{}/f{number}", number % 7);
        let lower: Vec<_> = (0..300).map(|number| (name(number), Some(size(number)))).collect();
        let upper: Vec<_> = (0..300)
            .step_by(3)
            .map(|number| match number % 2 {
                0 => (format!("d{}/.wh.f{number}", number % 7), None),
                _ => (name(number), Some(5000)),
            })
            .collect();
        [layer(&lower), layer(&upper)]
    }

    /// All packs in one file, as `--no-cache` has them, or each in its own.
    fn packs(one_file: Option<&File>, slab: u64) -> Vec<OpenPack> {
        let disk = Disk::default();
        let pack = |(index, tar): (usize, Vec<u8>)| {
            let own = tempfile::tempfile_in(".").unwrap();
            let (file, base) = match one_file {
                Some(file) => (file, index as u64 * slab),
                None => (&own, 0),
            };
            let out = disk.attach(file, Liking::Direct);
            let summary = DiskWriter::run(out, Beside::Nothing, base..base + slab, |out| {
                rootfs::make_pack(&tar[..], out, &Limits::default()).unwrap()
            });
            OpenPack::new(file.try_clone().unwrap(), base, summary.pack_bytes).unwrap()
        };
        layers().into_iter().enumerate().map(pack).collect()
    }

    fn plan(packs: &[OpenPack]) -> (FileTree, ext4::Options) {
        let mut folder = Folder::new(&TreeLimits::default());
        for pack in packs {
            folder.add(&pack.load().unwrap()).unwrap();
        }
        let size = ext4::Size::FreeSpace { bytes: 8 << 20 };
        (folder.finish().unwrap(), ext4::Options::new([7; 16], [9; 16], size))
    }

    /// Metadata and data into `image`; the sum, and what a second reading says.
    fn write(packs: &[OpenPack], image: &File, in_place: bool) -> (Option<String>, String) {
        let (tree, options) = plan(packs);
        let regions: Vec<u64> = packs.iter().map(|pack| pack.data_blocks).collect();
        let layout = Layout::plan(&tree, &options, &regions).unwrap();
        if in_place {
            let runs = runs(&layout, packs).unwrap().unwrap();
            let shifted = Shift::of(Some(image)).take(&runs).unwrap();
            assert!(shifted.unwrap(), "the file system said it can");
        }
        image.set_len(layout.size_bytes()).unwrap();
        layout.write(&tree, &mut ImageFile(image)).unwrap();
        let disk = Disk::default();
        let sum = write_data(&layout, packs, image, in_place, true, &disk, &Deaf).unwrap();
        let mut bytes = vec![0; usize::try_from(layout.size_bytes()).unwrap()];
        image.read_exact_at(&mut bytes, 0).unwrap();
        (sum, hex(&Sha256::digest(&bytes)))
    }

    #[test]
    fn data_that_is_copied_and_data_that_is_shifted_make_the_same_image() {
        let slab = 1 << 30;
        let image = tempfile::tempfile_in(".").unwrap();
        let copied = write(&packs(None, slab), &image, false);
        assert_eq!(copied.0.as_ref(), Some(&copied.1), "the sum is the file's");
        let slabs = tempfile::tempfile_in(".").unwrap();
        if !can_shift(&slabs, 2 * slab) {
            eprintln!("skipped: the file system here cannot shift; only copying was checked");
            return;
        }
        let shifted = write(&packs(Some(&slabs), slab), &slabs, true);
        assert_eq!(shifted, copied);
    }

    /// Remembers what was told of the writing.
    #[derive(Default)]
    struct Listener(Mutex<Vec<(u64, u64)>>);

    impl Observer for Listener {
        fn event(&self, event: &BuildEvent) {
            if let BuildEvent::WriteProgress { bytes, total_bytes } = event {
                lock(&self.0).push((*bytes, *total_bytes));
            }
        }
    }

    /// The dead blocks between live ones, as ranges of bytes of the image.
    fn gaps(layout: &Layout) -> Vec<Range<u64>> {
        let moves: Vec<Move> = layout.moves().collect();
        let between = |pair: &[Move]| {
            let (one, next) = (&pair[0], &pair[1]);
            let together = one.region == next.region
                && next.region_block - one.region_block == next.image_block - one.image_block;
            let gap = one.image_block + one.blocks..next.image_block;
            (together && !gap.is_empty()).then_some(gap.start * BLOCK_SIZE..gap.end * BLOCK_SIZE)
        };
        moves.windows(2).filter_map(between).collect()
    }

    #[test]
    fn deleted_blocks_are_holes_and_progress_counts_live_bytes_alone() {
        let packs = packs(None, 1 << 30);
        let (tree, options) = plan(&packs);
        let regions: Vec<u64> = packs.iter().map(|pack| pack.data_blocks).collect();
        let layout = Layout::plan(&tree, &options, &regions).unwrap();
        let gaps = gaps(&layout);
        assert!(gaps.len() > 50, "{}", gaps.len());
        for hash in [true, false] {
            let image = tempfile::tempfile_in(".").unwrap();
            image.set_len(layout.size_bytes()).unwrap();
            layout.write(&tree, &mut ImageFile(&image)).unwrap();
            let (disk, listener) = (Disk::default(), Listener::default());
            write_data(&layout, &packs, &image, false, hash, &disk, &listener).unwrap();
            for gap in &gaps {
                let data = rustix::fs::seek(&image, SeekFrom::Data(gap.start)).unwrap();
                assert!(data >= gap.end, "{gap:?} is no hole: data at {data}");
            }
            let told = lock(&listener.0).clone();
            let all = layout.summary().data_bytes;
            assert_eq!(told.last(), Some(&(all, all)), "hash: {hash}");
            assert!(told.is_sorted(), "hash: {hash}");
        }
    }
}
