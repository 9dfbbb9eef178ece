//! File data through the page cache or past it, whichever is faster here and now.
//!
//! The page cache takes bytes at memory speed, unless its pages are fresh: in a
//! virtual machine the host must first give them, which costs more than the disk
//! does; and once too many are dirty, writers wait. Past the cache (O_DIRECT,
//! open(2)) bytes go at the speed of the disk and evict nothing. Which is better
//! depends on the machine and the moment, so a build tries both and keeps measuring;
//! the bytes in the files are the same.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

/// What every device in use accepts: addresses, offsets and lengths are multiples of it.
const ALIGNMENT: usize = 4096;
/// One write of a [`DiskWriter`].
const WRITE_BYTES: usize = 1 << 20;
/// How much each way is tried before they are compared.
const TRIAL_BYTES: u64 = 8 << 20;
/// One of so many accesses goes the slower way, to notice when it has become the faster;
const LOOK_AGAIN: u32 = 48;
/// more of them where the way that seems slow has more to gain.
const LOOK_AGAIN_SOON: u32 = 12;
/// Bytes that are written before a disk is called too slow, and how many times longer than writing
/// them once more it then takes to bring them there: it may be slow for a moment only.
const KNOWN_BYTES: u64 = 128 << 20;
const TIMES_LONGER: u128 = 4;

/// Memory that direct input and output accept.
pub(super) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    pub(super) fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGNMENT];
        let start = bytes.as_ptr().addr().next_multiple_of(ALIGNMENT) - bytes.as_ptr().addr();
        Self { bytes, start, length }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// One of the two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Cached,
    Direct,
}

/// What a caller has to gain beside time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Liking {
    /// Nothing.
    Faster,
    /// Bytes on the disk need not be moved later.
    Direct,
}

/// 100 MB in a second: waiting for such a disk costs less than a second copy.
const GOOD_ENOUGH: Pace = Pace { bytes: 100, nanos: 1_000 };

/// What was seen of one way; old sightings fade.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Pace {
    bytes: u64,
    nanos: u64,
}

impl Pace {
    fn note(&mut self, bytes: u64, took: Duration) {
        if self.bytes > 4 * TRIAL_BYTES {
            (self.bytes, self.nanos) = (self.bytes / 2, self.nanos / 2);
        }
        self.bytes += bytes;
        self.nanos += u64::try_from(took.as_nanos()).unwrap_or(u64::MAX / 2).max(1);
    }

    /// How long so many bytes would take; 0 when nothing was seen.
    fn nanos_for(&self, bytes: u64) -> u128 {
        u128::from(bytes) * u128::from(self.nanos) / u128::from(self.bytes.max(1))
    }

    fn is_faster_than(&self, other: &Self) -> bool {
        u128::from(self.bytes) * u128::from(other.nanos)
            > u128::from(other.bytes) * u128::from(self.nanos)
    }
}

/// What was seen of both ways, for reading or for writing.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Lane {
    cached: Pace,
    direct: Pace,
    accesses: u32,
    cached_bytes: u64,
    direct_bytes: u64,
}

impl Lane {
    /// The paces alone: what somebody else starts from.
    pub(super) fn without_bytes(&self) -> Self {
        Self { cached_bytes: 0, direct_bytes: 0, ..self.clone() }
    }

    /// Takes over what somebody else saw since, and the bytes that it moved: no more than can be,
    /// so that sums of them are numbers still.
    fn learn(&mut self, seen: &Self) {
        const MOST: u64 = 1 << 48;
        let pace = |pace: Pace| Pace { bytes: pace.bytes.min(MOST), nanos: pace.nanos.min(MOST) };
        *self = Self {
            cached: pace(seen.cached),
            direct: pace(seen.direct),
            accesses: seen.accesses,
            cached_bytes: seen.cached_bytes.saturating_add(self.cached_bytes).min(MOST),
            direct_bytes: seen.direct_bytes.saturating_add(self.direct_bytes).min(MOST),
        };
    }

    fn all_bytes(&self) -> u64 {
        self.cached_bytes + self.direct_bytes
    }

    /// How long it takes to bring what is still in the page cache to the disk, and how long to write
    /// everything once more through the page cache; in nanoseconds.
    fn to_finish_and_again(&self) -> (u128, u128) {
        (self.direct.nanos_for(self.cached_bytes), self.cached.nanos_for(self.all_bytes()))
    }

    fn choose(&mut self, liking: Liking) -> Way {
        self.accesses = self.accesses.wrapping_add(1);
        let direct_will_do = liking == Liking::Direct && self.direct.is_faster_than(&GOOD_ENOUGH);
        if self.direct.bytes < TRIAL_BYTES || direct_will_do {
            return Way::Direct;
        }
        if self.cached.bytes < TRIAL_BYTES {
            return Way::Cached;
        }
        let again = match liking {
            Liking::Faster => LOOK_AGAIN,
            Liking::Direct => LOOK_AGAIN_SOON,
        };
        match self.cached.is_faster_than(&self.direct) != self.accesses.is_multiple_of(again) {
            true => Way::Cached,
            false => Way::Direct,
        }
    }

    fn note(&mut self, way: Way, bytes: usize, took: Duration) {
        match way {
            Way::Cached => {
                self.cached.note(bytes as u64, took);
                self.cached_bytes += bytes as u64;
            }
            Way::Direct => {
                self.direct.note(bytes as u64, took);
                self.direct_bytes += bytes as u64;
            }
        }
    }
}

/// What a build has learnt about its disk; shared by its threads.
#[derive(Debug, Default)]
pub(super) struct Disk {
    reads: Mutex<Lane>,
    writes: Mutex<Lane>,
    /// By the number of a file, itself past the page cache; for who can open nothing any more.
    twins: Option<Vec<(RawFd, File)>>,
}

/// The same file, past the page cache. Not on every file system.
pub(super) fn direct_twin(file: &File) -> Option<File> {
    // Another open file description: the flag must not touch who else uses `file`. Who was given a
    // file to read must not get one to write.
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
    let open =
        |write| OpenOptions::new().read(true).write(write).custom_flags(flags).open(&itself).ok();
    match is_writable(file) {
        true => open(true).or_else(|| open(false)),
        false => open(false),
    }
}

/// Whether the file was opened to be written.
pub(super) fn is_writable(file: &File) -> bool {
    let flags = rustix::fs::fcntl_getfl(file);
    flags.is_ok_and(|flags| flags.intersects(OFlags::WRONLY | OFlags::RDWR))
}

impl Disk {
    /// For a process that was handed its files, and of some the twin past the page cache.
    pub(super) fn knowing(twins: Vec<(RawFd, File)>) -> Self {
        Self { twins: Some(twins), ..Self::default() }
    }

    /// What was seen of writing.
    pub(super) fn writes(&self) -> Lane {
        lock(&self.writes).clone()
    }

    /// Takes over what another process saw of writing.
    pub(super) fn learn(&self, writes: &Lane) {
        lock(&self.writes).learn(writes);
    }

    /// Whether bringing what is still in the page cache to the disk takes less time than
    /// writing everything once more through the page cache.
    pub(super) fn is_nearly_written(&self) -> bool {
        let (to_finish, again) = lock(&self.writes).to_finish_and_again();
        to_finish <= again
    }

    /// Whether enough was seen to say that it will not be.
    pub(super) fn is_too_slow(&self) -> bool {
        let writes = lock(&self.writes);
        let (to_finish, again) = writes.to_finish_and_again();
        writes.all_bytes() >= KNOWN_BYTES && to_finish > again * TIMES_LONGER
    }

    /// The same file, for access at any place either way.
    pub(super) fn attach<'a>(&'a self, file: &'a File, liking: Liking) -> DiskFile<'a> {
        let direct = match &self.twins {
            None => direct_twin(file),
            Some(twins) => {
                let twin = twins.iter().find(|(number, _)| *number == file.as_raw_fd());
                twin.and_then(|(_, twin)| twin.try_clone().ok())
            }
        };
        DiskFile { disk: self, file, liking, direct }
    }
}

/// A file whose data goes through the page cache or past it.
pub(super) struct DiskFile<'a> {
    disk: &'a Disk,
    file: &'a File,
    liking: Liking,
    /// Not on every file system.
    direct: Option<File>,
}

impl<'a> DiskFile<'a> {
    /// What is seen of it goes to `disk` instead.
    pub(super) fn counted_by(self, disk: &'a Disk) -> Self {
        Self { disk, ..self }
    }

    /// Fills `buffer` from byte `offset` on.
    pub(super) fn read(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let length = buffer.len();
        self.access(&self.disk.reads, length, offset, |file| file.read_exact_at(buffer, offset))
    }

    /// Writes all of `bytes` at byte `offset`.
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let length = bytes.len();
        self.access(&self.disk.writes, length, offset, |file| file.write_all_at(bytes, offset))
    }

    fn access(
        &self,
        lane: &Mutex<Lane>,
        length: usize,
        offset: u64,
        mut work: impl FnMut(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        let aligned = length.is_multiple_of(ALIGNMENT) && offset.is_multiple_of(ALIGNMENT as u64);
        let Some(direct) = self.direct.as_ref().filter(|_| aligned && length > 0) else {
            return work(self.file);
        };
        let way = lock(lane).choose(self.liking);
        let started = Instant::now();
        let result = work(if way == Way::Direct { direct } else { self.file });
        lock(lane).note(way, length, started.elapsed());
        match result {
            // A device that wants a larger alignment than every usual one.
            Err(error) if way == Way::Direct && error.kind() == io::ErrorKind::InvalidInput => {
                work(self.file)
            }
            other => other,
        }
    }
}

/// A poisoned lock means a thread panicked; its join reports that.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Buffers of a [`DiskWriter`] that wait for the disk while the next one is filled.
const WRITES_WAITING: usize = 2;

/// What a [`DiskWriter`] has beside its part.
pub(super) enum Beside<'a> {
    /// Nothing: what the part has no room for is an error.
    Nothing,
    /// A file that gets the same bytes, from its front on. The part is given up when it has no room, or when
    /// its disk is too slow: what would have to wait there before it can be shifted is rather copied.
    Copy(DiskFile<'a>),
    /// An empty file that gets everything, from its front on, if the part has no room for it: what is in the
    /// part by then is brought over.
    Spare(DiskFile<'a>),
}

/// Writes a part of a file from front to back in large aligned pieces; [`Write::flush`] ends it.
///
/// A thread of its own waits for the disk, so that who writes can go on meanwhile.
pub(super) struct DiskWriter<'a> {
    buffer: AlignedBuffer,
    filled: usize,
    to_disk: SyncSender<(AlignedBuffer, usize)>,
    from_disk: Receiver<io::Result<AlignedBuffer>>,
    /// How many buffers are at the disk.
    away: usize,
    is_given_up: &'a AtomicBool,
}

impl DiskWriter<'_> {
    /// Lets `work` write the bytes of `part`, and no others of `file`.
    pub(super) fn run<T>(
        file: DiskFile<'_>,
        beside: Beside<'_>,
        part: Range<u64>,
        work: impl FnOnce(&mut DiskWriter<'_>) -> T,
    ) -> T {
        let is_given_up = &AtomicBool::new(false);
        let (to_disk, to_write) = sync_channel::<(AlignedBuffer, usize)>(WRITES_WAITING);
        let (written, from_disk) = channel();
        let mut target = Target { file, beside, part, bytes: 0, is_given_up };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while let Ok((buffer, filled)) = to_write.recv() {
                    let result = target.write(&buffer.bytes()[..filled]);
                    let failed = result.is_err();
                    // Nobody waits for the answer of a writer that gave up.
                    let _ = written.send(result.map(|()| buffer));
                    if failed {
                        return;
                    }
                }
            });
            let mut writer = DiskWriter {
                buffer: AlignedBuffer::new(WRITE_BYTES),
                filled: 0,
                to_disk,
                from_disk,
                away: 0,
                is_given_up,
            };
            work(&mut writer)
        })
    }

    /// Whether the file beside has all that was written, and the part has not.
    pub(super) fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
    }

    /// Waits for the oldest write.
    fn written(&mut self) -> io::Result<AlignedBuffer> {
        let stopped = || io::Error::other("a write to this file failed before");
        let buffer = self.from_disk.recv().map_err(|_| stopped())??;
        self.away -= 1;
        Ok(buffer)
    }

    fn put(&mut self) -> io::Result<()> {
        let filled = std::mem::take(&mut self.filled);
        let empty = match self.away > WRITES_WAITING {
            true => self.written()?,
            false => AlignedBuffer::new(WRITE_BYTES),
        };
        let full = std::mem::replace(&mut self.buffer, empty);
        if self.to_disk.send((full, filled)).is_ok() {
            self.away += 1;
            return Ok(());
        }
        // The thread ends early only after it has said why.
        loop {
            self.written()?;
        }
    }
}

/// Where the bytes of a [`DiskWriter`] go.
struct Target<'a> {
    file: DiskFile<'a>,
    beside: Beside<'a>,
    part: Range<u64>,
    /// What was written.
    bytes: u64,
    /// Nothing is written to the part any more.
    is_given_up: &'a AtomicBool,
}

impl Target<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let at = self.part.start.saturating_add(self.bytes);
        if !self.is_given_up() {
            if self.part.end.saturating_sub(at) < bytes.len() as u64 {
                self.leave()?;
            } else {
                self.file.write(bytes, at)?;
                if matches!(self.beside, Beside::Copy(_)) && self.file.disk.is_too_slow() {
                    self.give_up();
                }
            }
        }
        let is_given_up = self.is_given_up();
        match &mut self.beside {
            Beside::Copy(copy) => copy.write(bytes, self.bytes)?,
            Beside::Spare(spare) if is_given_up => spare.write(bytes, self.bytes)?,
            Beside::Spare(_) | Beside::Nothing => {}
        }
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
    }

    fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// The part has no room for more.
    fn leave(&mut self) -> io::Result<()> {
        match &mut self.beside {
            Beside::Nothing => return Err(io::ErrorKind::FileTooLarge.into()),
            Beside::Copy(_) => {}
            Beside::Spare(spare) => {
                let mut buffer = AlignedBuffer::new(WRITE_BYTES);
                let mut moved = 0;
                while moved < self.bytes {
                    let left = usize::try_from(self.bytes - moved).unwrap_or(WRITE_BYTES);
                    let piece = &mut buffer.bytes_mut()[..left.min(WRITE_BYTES)];
                    self.file.read(piece, self.part.start + moved)?;
                    spare.write(piece, moved)?;
                    moved += piece.len() as u64;
                }
            }
        }
        self.give_up();
        Ok(())
    }
}

impl Write for DiskWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(WRITE_BYTES - self.filled);
        self.buffer.bytes_mut()[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
        self.filled += count;
        if self.filled == WRITE_BYTES {
            self.put()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.put()?;
        while self.away > 0 {
            self.written()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_whatever_its_length() {
        let directory = tempfile::tempdir_in(".").unwrap();
        for length in [0, 1, 4096, WRITE_BYTES, WRITE_BYTES + 1, 3 * WRITE_BYTES + 12_345] {
            let path = directory.path().join("file");
            let file =
                File::options().create(true).truncate(true).read(true).write(true).open(&path);
            let (file, disk) = (file.unwrap(), Disk::default());
            let bytes: Vec<u8> = (0..251u8).cycle().take(length).collect();
            let out = disk.attach(&file, Liking::Direct);
            DiskWriter::run(out, Beside::Nothing, 0..u64::MAX, |writer| {
                for part in bytes.chunks(100_000) {
                    writer.write_all(part).unwrap();
                }
                writer.flush().unwrap();
            });
            assert!(std::fs::read(&path).unwrap() == bytes, "{length}");
            let mut reader = disk.attach(&file, Liking::Direct);
            let mut buffer = AlignedBuffer::new(length.next_multiple_of(ALIGNMENT));
            reader.read(&mut buffer.bytes_mut()[..length], 0).unwrap();
            assert!(buffer.bytes()[..length] == bytes, "{length}");
        }
    }

    #[test]
    fn a_copy_has_the_bytes_of_the_part_from_its_front_on() {
        let files = [tempfile::tempfile_in(".").unwrap(), tempfile::tempfile_in(".").unwrap()];
        let (disk, aside) = (Disk::default(), Disk::default());
        let bytes: Vec<u8> = (0..251u8).cycle().take(2 * WRITE_BYTES + 12_345).collect();
        let out = disk.attach(&files[0], Liking::Direct);
        let copy = Beside::Copy(disk.attach(&files[1], Liking::Faster).counted_by(&aside));
        let base = 3 << 20;
        DiskWriter::run(out, copy, base..u64::MAX, |writer| {
            writer.write_all(&bytes).and_then(|()| writer.flush())
        })
        .unwrap();
        for (file, from) in files.iter().zip([base, 0]) {
            let mut found = vec![0; bytes.len()];
            file.read_exact_at(&mut found, from).unwrap();
            assert!(found == bytes, "from {from}");
            assert_eq!(file.metadata().unwrap().len(), from + bytes.len() as u64);
        }
        let counted = [&disk, &aside].map(|disk| disk.writes());
        let counted = counted.map(|writes| writes.cached_bytes + writes.direct_bytes);
        // What is no multiple of a block goes no way of choice.
        assert_eq!(counted, [2 * WRITE_BYTES as u64; 2]);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (out, copy) = (&files[0], Beside::Copy(disk.attach(&full, Liking::Faster)));
        let error =
            DiskWriter::run(disk.attach(out, Liking::Faster), copy, 0..u64::MAX, |writer| {
                writer.write_all(&bytes).and_then(|()| writer.flush())
            });
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::StorageFull, "nor is it less");
    }

    #[test]
    fn what_a_part_has_no_room_for_is_in_the_file_beside() {
        let bytes: Vec<u8> = (0..251u8).cycle().take(3 * WRITE_BYTES + 12_345).collect();
        let (base, all) = (3 << 20, bytes.len() as u64);
        for (room, fits) in
            [(all, true), (all - 1, false), (2 << 20, false), (4096, false), (0, false)]
        {
            for is_copy in [false, true] {
                let files = [(); 2].map(|()| tempfile::tempfile_in(".").unwrap());
                let [disk, aside] = [(); 2].map(|()| Disk::default());
                let [out, other] = files.each_ref().map(|file| disk.attach(file, Liking::Direct));
                let other = other.counted_by(&aside);
                let beside = if is_copy { Beside::Copy(other) } else { Beside::Spare(other) };
                let is_given_up = DiskWriter::run(out, beside, base..base + room, |writer| {
                    writer.write_all(&bytes).and_then(|()| writer.flush()).unwrap();
                    writer.is_given_up()
                });
                let what = format!("room {room}, copy: {is_copy}");
                assert_eq!(is_given_up, !fits, "{what}");
                let [end, beside_bytes] =
                    files.each_ref().map(|file| file.metadata().unwrap().len());
                assert!(end <= base + room, "{what}: {end}");
                let is_beside = is_copy || !fits;
                assert_eq!(beside_bytes, if is_beside { all } else { 0 }, "{what}");
                let (file, from) = if is_beside { (&files[1], 0) } else { (&files[0], base) };
                let mut found = vec![0; bytes.len()];
                file.read_exact_at(&mut found, from).unwrap();
                assert!(found == bytes, "{what}");
            }
        }
    }

    /// What was seen of so many megabytes each way, where one takes so many microseconds past the
    /// page cache and 500 through it.
    fn seen(megabytes: u32, direct_micros: u64) -> Disk {
        let disk = Disk::default();
        let mut writes = lock(&disk.writes);
        for _ in 0..megabytes {
            writes.note(Way::Direct, WRITE_BYTES, Duration::from_micros(direct_micros));
            writes.note(Way::Cached, WRITE_BYTES, Duration::from_micros(500));
        }
        drop(writes);
        disk
    }

    #[test]
    fn beside_a_copy_a_part_is_given_up_where_its_disk_is_too_slow() {
        assert!(!seen(63, 1_000_000).is_too_slow(), "it may only have begun slowly");
        assert!(seen(64, 1_000_000).is_too_slow());
        assert!(!seen(64, 3000).is_too_slow());
        let bytes: Vec<u8> = (0..251u8).cycle().take(20 * WRITE_BYTES + 12_345).collect();
        let written = |disk: &Disk, has_copy: bool| {
            let files = [tempfile::tempfile_in(".").unwrap(), tempfile::tempfile_in(".").unwrap()];
            let aside = Disk::default();
            let copy = disk.attach(&files[1], Liking::Faster).counted_by(&aside);
            let copy = if has_copy { Beside::Copy(copy) } else { Beside::Spare(copy) };
            let out = disk.attach(&files[0], Liking::Faster);
            let is_given_up = DiskWriter::run(out, copy, 0..u64::MAX, |writer| {
                writer.write_all(&bytes).and_then(|()| writer.flush()).unwrap();
                writer.is_given_up()
            });
            let [own, copy] = files.map(|file| file.metadata().unwrap().len());
            (is_given_up, own, copy)
        };
        let all = bytes.len() as u64;
        assert_eq!(written(&Disk::default(), true), (false, all, all), "too little is known");
        let piece = WRITE_BYTES as u64;
        assert_eq!(written(&seen(64, 1_000_000), true), (true, piece, all));
        assert_eq!(written(&seen(64, 1_000_000), false), (false, all, 0), "there is nothing else");
    }

    #[test]
    fn a_write_that_fails_is_told_and_nothing_is_written_beyond_the_part() {
        let file = File::open("/dev/null").unwrap();
        let disk = Disk::default();
        let piece = vec![1; WRITE_BYTES];
        let out = disk.attach(&file, Liking::Faster);
        let error = DiskWriter::run(out, Beside::Nothing, 0..u64::MAX, |writer| {
            (0..16).try_for_each(|_| writer.write_all(&piece)).and_then(|()| writer.flush())
        });
        assert_eq!(error.unwrap_err().raw_os_error(), Some(9), "EBADF: opened for reading");
        let file = tempfile::tempfile_in(".").unwrap();
        let part = 4096..WRITE_BYTES as u64;
        let out = disk.attach(&file, Liking::Faster);
        let error = DiskWriter::run(out, Beside::Nothing, part, |writer| {
            writer.write_all(&piece).and_then(|()| writer.flush())
        });
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn a_disk_that_was_slow_at_first_is_soon_written_to_again() {
        let (piece, mut lane) = (1 << 20, Lane::default());
        let mut direct = |micros, count| {
            let mut direct = 0;
            for _ in 0..count {
                let way = lane.choose(Liking::Direct);
                let micros = if way == Way::Cached { 500 } else { micros };
                lane.note(way, piece, Duration::from_micros(micros));
                direct += u32::from(way == Way::Direct);
            }
            direct
        };
        assert!(direct(40_000, 24) <= 10, "25 MB in a second are too few");
        direct(1_000, 600);
        assert_eq!(direct(1_000, 240), 240);
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_one_looked_at_now_and_then() {
        let piece = 1 << 20;
        let mut lane = Lane::default();
        let mut taken = |cached_micros, direct_micros, count| {
            let mut cached = 0;
            for _ in 0..count {
                let way = lane.choose(Liking::Faster);
                let micros = if way == Way::Cached { cached_micros } else { direct_micros };
                lane.note(way, piece, Duration::from_micros(micros));
                cached += u32::from(way == Way::Cached);
            }
            cached
        };
        assert_eq!(taken(100, 900, 16), 8, "both are tried");
        assert!(taken(100, 900, 480) >= 465, "the cache is faster");
        taken(5000, 900, 1000);
        assert!(taken(5000, 900, 480) <= 20, "the cache has become slower");
    }
}
