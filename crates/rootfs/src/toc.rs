//! The table of contents of a pack: one record per entry, in the order of the tar.
//!
//! Record: kind and flags (one byte), shared bytes with the path before (varint), rest of the
//! path (length, bytes); then, but for markers: permissions, uid, gid, seconds of the mtime as
//! a difference to the entry before (zigzag), nanoseconds if flagged, attribute set if flagged
//! (0: a new one follows as length and canonical form; n: the set n - 1); then by kind: size
//! and, if flagged, count of runs and gap and blocks of each; link target; major and minor.
//! Numbers are varints. Contents lie in the data area in the order of the records, so that no
//! record needs an offset.
//!
//! Knows nothing of trees. A reader believes nothing: paths, sets and sums are checked.

use std::ops::Range;

use ext4::Timestamp;

use crate::data::StoredRun;
use crate::varint::{Cursor, Malformed, put, unzigzag, zigzag};
use crate::xattr::{self, Sets};
use crate::{BLOCK_BYTES, Limits, PackReadError, path};

const DIRECTORY: u8 = 0;
const FILE: u8 = 1;
const SYMLINK: u8 = 2;
const HARD_LINK: u8 = 3;
const CHAR_DEVICE: u8 = 4;
const BLOCK_DEVICE: u8 = 5;
const FIFO: u8 = 6;
const WHITEOUT: u8 = 7;
const OPAQUE: u8 = 8;
const KIND_MASK: u8 = 0x0f;

const HAS_NANOS: u8 = 0x10;
const HAS_XATTRS: u8 = 0x20;
const HAS_RUNS: u8 = 0x40;

/// Owner, permissions and time of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The low twelve mode bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Timestamp,
    /// Attribute set, numbered within the pack in order of first sight; what is in it, see
    /// [`TocEntry::xattrs`].
    pub xattrs: Option<u32>,
}

/// Where the contents of a file lie in the pack's data area.
#[derive(Clone, Debug)]
pub struct Blocks<'a> {
    first: u64,
    runs: Runs<'a>,
}

#[derive(Clone, Debug)]
enum Runs<'a> {
    /// All blocks of the file, one after the other.
    Dense(u64),
    /// So many pairs of gap and length.
    Listed(u64, Cursor<'a>),
}

impl Blocks<'_> {
    /// The file's first block in the data area, counted in blocks.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The number of blocks when the file has no holes.
    #[must_use]
    pub fn dense(&self) -> Option<u64> {
        match self.runs {
            Runs::Dense(blocks) => Some(blocks),
            Runs::Listed(..) => None,
        }
    }

    /// Each run: blocks of hole before it, then blocks stored.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let (mut left, mut cursor) = match &self.runs {
            Runs::Dense(blocks) => (0, Err(*blocks)),
            Runs::Listed(count, cursor) => (*count, Ok(cursor.clone())),
        };
        std::iter::from_fn(move || match &mut cursor {
            Err(0) => None,
            Err(blocks) => Some((0, std::mem::take(blocks))),
            Ok(_) if left == 0 => None,
            Ok(cursor) => {
                left -= 1;
                Some((cursor.u64().ok()?, cursor.u64().ok()?))
            }
        })
    }
}

/// What an entry is.
#[derive(Clone, Debug)]
pub enum TocKind<'a> {
    /// A directory; the empty path is the root.
    Directory(Metadata),
    /// A regular file.
    File {
        /// Owner, permissions, time.
        metadata: Metadata,
        /// Length in bytes, holes included.
        size_bytes: u64,
        /// Its contents.
        blocks: Blocks<'a>,
    },
    /// A symbolic link.
    Symlink {
        /// Owner, permissions, time.
        metadata: Metadata,
        /// What it says, as written.
        target: &'a [u8],
    },
    /// Another name of a file.
    HardLink {
        /// Owner, permissions, time as the link's own header has them.
        metadata: Metadata,
        /// Clean path of the file.
        target: &'a [u8],
    },
    /// A character device.
    CharDevice {
        /// Owner, permissions, time.
        metadata: Metadata,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Owner, permissions, time.
        metadata: Metadata,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo(Metadata),
    /// The entry at this path is deleted from the layers below.
    Whiteout,
    /// The directory at this path hides what the layers below have in it.
    Opaque,
}

impl TocKind<'_> {
    /// Owner, permissions and time; markers have none.
    #[must_use]
    pub fn metadata(&self) -> Option<Metadata> {
        match self {
            Self::Directory(metadata)
            | Self::Fifo(metadata)
            | Self::File { metadata, .. }
            | Self::Symlink { metadata, .. }
            | Self::HardLink { metadata, .. }
            | Self::CharDevice { metadata, .. }
            | Self::BlockDevice { metadata, .. } => Some(*metadata),
            Self::Whiteout | Self::Opaque => None,
        }
    }
}

/// One entry of a table of contents.
#[derive(Clone, Debug)]
pub struct TocEntry<'a> {
    /// Clean path: no leading or closing slash, no `.` or `..`; empty for the root.
    pub path: &'a [u8],
    /// At least so many first bytes are those of the entry before.
    pub shared: usize,
    /// What it is.
    pub kind: TocKind<'a>,
    /// Canonical form of its attribute set.
    pub(crate) xattrs: &'a [u8],
}

impl<'a> TocEntry<'a> {
    /// Names and values of its extended attributes, ascending by name.
    pub fn xattrs(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        xattr::Pairs::new(self.xattrs)
    }
}

/// What the writer puts into one record.
pub(crate) enum NewKind<'a> {
    Directory,
    File { size_bytes: u64, runs: &'a [StoredRun] },
    Symlink(&'a [u8]),
    HardLink(&'a [u8]),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// Owner and the rest of a new record; attributes in canonical form.
pub(crate) struct NewMetadata<'a> {
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) xattrs: &'a [u8],
}

/// Builds a table of contents in memory.
#[derive(Default)]
pub(crate) struct TocWriter {
    bytes: Vec<u8>,
    entries: u64,
    last_path: Vec<u8>,
    last_secs: i64,
    sets: Sets,
}

impl TocWriter {
    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn whiteout(&mut self, path: &[u8]) {
        self.start(WHITEOUT, path);
    }

    pub(crate) fn opaque(&mut self, path: &[u8]) {
        self.start(OPAQUE, path);
    }

    pub(crate) fn entry(&mut self, path: &[u8], metadata: &NewMetadata<'_>, kind: &NewKind<'_>) {
        let nanos = if metadata.mtime.nanos > 0 { HAS_NANOS } else { 0 };
        let xattrs = if metadata.xattrs.is_empty() { 0 } else { HAS_XATTRS };
        let flags = nanos | xattrs;
        match kind {
            NewKind::Directory => self.start_with(DIRECTORY | flags, path, metadata),
            NewKind::File { size_bytes, runs } => {
                self.file(flags, path, metadata, *size_bytes, runs)
            }
            NewKind::Symlink(target) => {
                self.start_with(SYMLINK | flags, path, metadata);
                self.put_bytes(target);
            }
            NewKind::HardLink(target) => {
                self.start_with(HARD_LINK | flags, path, metadata);
                self.put_bytes(target);
            }
            NewKind::CharDevice { major, minor } => {
                self.start_with(CHAR_DEVICE | flags, path, metadata);
                self.put_device(*major, *minor);
            }
            NewKind::BlockDevice { major, minor } => {
                self.start_with(BLOCK_DEVICE | flags, path, metadata);
                self.put_device(*major, *minor);
            }
            NewKind::Fifo => self.start_with(FIFO | flags, path, metadata),
        }
    }

    fn file(
        &mut self,
        flags: u8,
        path: &[u8],
        metadata: &NewMetadata<'_>,
        size_bytes: u64,
        runs: &[StoredRun],
    ) {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        let dense = match runs {
            [] => blocks == 0,
            [run] => run.gap == 0 && run.blocks == blocks,
            _ => false,
        };
        if dense {
            self.start_with(FILE | flags, path, metadata);
            put(&mut self.bytes, size_bytes);
            return;
        }
        self.start_with(FILE | HAS_RUNS | flags, path, metadata);
        put(&mut self.bytes, size_bytes);
        put(&mut self.bytes, runs.len() as u64);
        for run in runs {
            put(&mut self.bytes, run.gap);
            put(&mut self.bytes, run.blocks);
        }
    }

    fn start(&mut self, head: u8, path: &[u8]) {
        let shared = self.last_path.iter().zip(path).take_while(|(a, b)| a == b).count();
        self.bytes.push(head);
        put(&mut self.bytes, shared as u64);
        self.put_bytes(&path[shared..]);
        self.last_path.truncate(shared);
        self.last_path.extend_from_slice(&path[shared..]);
        self.entries += 1;
    }

    fn start_with(&mut self, head: u8, path: &[u8], metadata: &NewMetadata<'_>) {
        self.start(head, path);
        put(&mut self.bytes, u64::from(metadata.permissions));
        put(&mut self.bytes, u64::from(metadata.uid));
        put(&mut self.bytes, u64::from(metadata.gid));
        let secs = metadata.mtime.secs;
        put(&mut self.bytes, zigzag(secs.wrapping_sub(self.last_secs)));
        self.last_secs = secs;
        if metadata.mtime.nanos > 0 {
            put(&mut self.bytes, u64::from(metadata.mtime.nanos));
        }
        if !metadata.xattrs.is_empty() {
            self.put_xattrs(metadata.xattrs);
        }
    }

    fn put_xattrs(&mut self, encoded: &[u8]) {
        match self.sets.intern(encoded) {
            Some((id, false)) => put(&mut self.bytes, u64::from(id) + 1),
            // 2^32 sets cannot be: the table of contents is far smaller.
            Some((_, true)) | None => {
                put(&mut self.bytes, 0);
                self.put_bytes(encoded);
            }
        }
    }

    fn put_device(&mut self, major: u32, minor: u32) {
        put(&mut self.bytes, u64::from(major));
        put(&mut self.bytes, u64::from(minor));
    }

    fn put_bytes(&mut self, bytes: &[u8]) {
        put(&mut self.bytes, bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
    }
}

/// Reads a table of contents record by record.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    toc: &'a [u8],
    cursor: Cursor<'a>,
    entries_left: u64,
    data_blocks: u64,
    next_block: u64,
    path: Vec<u8>,
    secs: i64,
    sets: Vec<Range<usize>>,
    read: u64,
}

impl<'a> Entries<'a> {
    pub(crate) fn new(toc: &'a [u8], entries: u64, data_blocks: u64) -> Self {
        Self {
            toc,
            cursor: Cursor::new(toc),
            entries_left: entries,
            data_blocks,
            next_block: 0,
            path: Vec::new(),
            secs: 0,
            sets: Vec::new(),
            read: 0,
        }
    }

    /// The next entry, or `None` after the last. Not an `Iterator`, since the path is only
    /// lent.
    ///
    /// # Errors
    /// [`PackReadError::Entry`] for a record that is malformed or breaks a rule of the format.
    pub fn next_entry(&mut self) -> Result<Option<TocEntry<'_>>, PackReadError> {
        let number = self.read + 1;
        if self.entries_left == 0 {
            let whole = self.cursor.is_at_end() && self.next_block == self.data_blocks;
            return if whole { Ok(None) } else { Err(PackReadError::Entry(number)) };
        }
        self.entries_left -= 1;
        self.read = number;
        match self.record() {
            Ok((shared, kind)) => {
                let xattrs = self.xattrs_of(&kind);
                Ok(Some(TocEntry { path: &self.path, shared, kind, xattrs }))
            }
            Err(Malformed) => Err(PackReadError::Entry(number)),
        }
    }

    fn xattrs_of(&self, kind: &TocKind<'a>) -> &'a [u8] {
        let id = kind.metadata().and_then(|metadata| metadata.xattrs);
        let range = id.and_then(|id| self.sets.get(id as usize));
        range.map_or(&[], |range| &self.toc[range.clone()])
    }

    fn record(&mut self) -> Result<(usize, TocKind<'a>), Malformed> {
        let head = self.cursor.byte()?;
        let shared = self.read_path()?;
        let kind = head & KIND_MASK;
        match (kind, head) {
            (WHITEOUT, WHITEOUT) if !self.path.is_empty() => {
                return Ok((shared, TocKind::Whiteout));
            }
            (OPAQUE, OPAQUE) => return Ok((shared, TocKind::Opaque)),
            _ => {}
        }
        let metadata = self.read_metadata(head)?;
        if head & HAS_RUNS != 0 && kind != FILE || head & 0x80 != 0 {
            return Err(Malformed);
        }
        if self.path.is_empty() && kind != DIRECTORY {
            return Err(Malformed);
        }
        let kind = match kind {
            DIRECTORY => TocKind::Directory(metadata),
            FILE => self.read_file(metadata, head & HAS_RUNS != 0)?,
            SYMLINK => TocKind::Symlink { metadata, target: self.read_symlink()? },
            HARD_LINK => TocKind::HardLink { metadata, target: self.read_link()? },
            CHAR_DEVICE => {
                let (major, minor) = (self.cursor.u32()?, self.cursor.u32()?);
                TocKind::CharDevice { metadata, major, minor }
            }
            BLOCK_DEVICE => {
                let (major, minor) = (self.cursor.u32()?, self.cursor.u32()?);
                TocKind::BlockDevice { metadata, major, minor }
            }
            FIFO => TocKind::Fifo(metadata),
            _ => return Err(Malformed),
        };
        Ok((shared, kind))
    }

    fn read_path(&mut self) -> Result<usize, Malformed> {
        let shared = self.cursor.usize()?;
        let rest = self.cursor.bytes()?;
        if shared > self.path.len() || shared + rest.len() > Limits::PATH_BYTES_MAX {
            return Err(Malformed);
        }
        self.path.truncate(shared);
        let slash = self.path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        self.path.extend_from_slice(rest);
        if path::is_clean(&self.path, slash) { Ok(shared) } else { Err(Malformed) }
    }

    fn read_metadata(&mut self, head: u8) -> Result<Metadata, Malformed> {
        let permissions = u16::try_from(self.cursor.u64()?).map_err(|_| Malformed)?;
        let (uid, gid) = (self.cursor.u32()?, self.cursor.u32()?);
        self.secs = self.secs.wrapping_add(unzigzag(self.cursor.u64()?));
        let nanos = if head & HAS_NANOS != 0 { self.cursor.u32()? } else { 0 };
        if permissions > 0o7777 || nanos >= 1_000_000_000 {
            return Err(Malformed);
        }
        let xattrs = if head & HAS_XATTRS != 0 { Some(self.read_xattrs()?) } else { None };
        let mtime = Timestamp { secs: self.secs, nanos };
        Ok(Metadata { permissions, uid, gid, mtime, xattrs })
    }

    fn read_xattrs(&mut self) -> Result<u32, Malformed> {
        let known = u32::try_from(self.sets.len()).map_err(|_| Malformed)?;
        let id = self.cursor.u32()?;
        if id > 0 {
            return if id <= known { Ok(id - 1) } else { Err(Malformed) };
        }
        let encoded = self.cursor.bytes()?;
        if !xattr::is_canonical(encoded) {
            return Err(Malformed);
        }
        let end = self.cursor.position();
        self.sets.push(end - encoded.len()..end);
        Ok(known)
    }

    fn read_file(&mut self, metadata: Metadata, listed: bool) -> Result<TocKind<'a>, Malformed> {
        let size_bytes = self.cursor.u64()?;
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        let first = self.next_block;
        if !listed {
            self.take_blocks(blocks)?;
            let blocks = Blocks { first, runs: Runs::Dense(blocks) };
            return Ok(TocKind::File { metadata, size_bytes, blocks });
        }
        let count = self.cursor.u64()?;
        let list = self.cursor.clone();
        let mut end = 0_u64;
        for _ in 0..count {
            let (gap, length) = (self.cursor.u64()?, self.cursor.u64()?);
            if length == 0 {
                return Err(Malformed);
            }
            end = end.checked_add(gap).and_then(|end| end.checked_add(length)).ok_or(Malformed)?;
            self.take_blocks(length)?;
        }
        if end > blocks {
            return Err(Malformed);
        }
        let blocks = Blocks { first, runs: Runs::Listed(count, list) };
        Ok(TocKind::File { metadata, size_bytes, blocks })
    }

    /// Contents follow one another in the data area.
    fn take_blocks(&mut self, blocks: u64) -> Result<(), Malformed> {
        let end = self.next_block.checked_add(blocks).ok_or(Malformed)?;
        if end > self.data_blocks {
            return Err(Malformed);
        }
        self.next_block = end;
        Ok(())
    }

    fn read_symlink(&mut self) -> Result<&'a [u8], Malformed> {
        let target = self.cursor.bytes()?;
        let fits = !target.is_empty() && target.len() <= 4095 && !target.contains(&0);
        if fits { Ok(target) } else { Err(Malformed) }
    }

    fn read_link(&mut self) -> Result<&'a [u8], Malformed> {
        let target = self.cursor.bytes()?;
        let fits = target.len() <= Limits::PATH_BYTES_MAX && path::is_clean(target, 0);
        if fits { Ok(target) } else { Err(Malformed) }
    }
}
