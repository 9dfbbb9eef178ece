//! A strict reader of tars: V7, ustar, PAX, GNU and star headers. Gives one entry at a time
//! and its stored bytes; what an entry means for a tree is decided elsewhere.
//!
//! Where formats leave room, the reading of Go's `archive/tar` is taken, since Docker,
//! containerd, skopeo and umoci share it, and a second reading of the same bytes is how
//! layers get past scanners:
//! - a link, directory, device or fifo has no data, whatever its size field says;
//! - a global PAX header is checked and otherwise ignored, and so is what stands between the
//!   entry before it and itself;
//! - a GNU long name wins over a PAX path, and both apply to the next real entry only; an empty
//!   one says nothing;
//! - the name a sparse file has in its PAX header counts where the header has a sparse map;
//! - the end is two blocks of zeroes, one at the end of the stream, or none at all; a single
//!   block of zeroes before another header is an error; bytes after the end are not looked at.

use std::io::{BufRead, ErrorKind};

use ext4::Timestamp;

use crate::pax::Pax;
use crate::sparse::{self, BadMap, PaxVersion, Segment};
use crate::{Limits, PathProblem, path, xattr};

const BLOCK: usize = 512;

/// What is wrong with an entry of a tar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TarProblem {
    /// The stream ends within an entry.
    #[error("the stream ends within it")]
    Truncated,
    /// The stream could not be read on.
    #[error("the stream could not be read on")]
    Stream,
    /// The header checksum is wrong: damaged, or no tar at all.
    #[error("its header checksum is wrong (the layer is damaged, or not a tar)")]
    Checksum,
    /// One block of zeroes between two headers.
    #[error("a block of zeroes stands where its header should be")]
    LoneZeroBlock,
    /// A number field that is no number.
    #[error("its {0} field is not a number")]
    Number(&'static str),
    /// A type nobody can unpack.
    #[error("its type {} is not supported", .0.escape_ascii())]
    Type(u8),
    /// A negative or impossible size.
    #[error("its size is impossible")]
    Size,
    /// An owner that Linux cannot have.
    #[error("its owner or group is not a 32-bit number")]
    Owner,
    /// A device number beyond 12 bits of major and 20 bits of minor.
    #[error("its device number does not fit into 12 + 20 bits")]
    Device,
    /// A malformed PAX record.
    #[error("its PAX header holds a malformed record")]
    PaxRecord,
    /// A PAX record that should be a number.
    #[error("its PAX header holds a number that is none")]
    PaxNumber,
    /// A sparse map that does not describe the file.
    #[error("its sparse map does not fit the file")]
    SparseMap,
    /// A sparse format of unknown version.
    #[error("its sparse format has an unknown version")]
    SparseVersion,
    /// A link without a target, or a target no Linux path can hold.
    #[error("its link target is empty or longer than 4095 bytes")]
    LinkTarget,
    /// An extended attribute's name is empty, too long or holds a NUL.
    #[error("the name of an extended attribute is empty, longer than 255 bytes or holds a NUL")]
    XattrName,
    /// `Limits::xattr_bytes_max`.
    #[error("its extended attributes are larger than {0} bytes")]
    XattrBytes(usize),
    /// `Limits::xattrs_max`.
    #[error("it has more than {0} extended attributes")]
    Xattrs(usize),
    /// `Limits::header_bytes_max`.
    #[error("its PAX header, long name or sparse map is larger than {0} bytes")]
    HeaderBytes(u64),
    /// `Limits::file_bytes_max`.
    #[error("it is larger than {0} bytes")]
    FileBytes(u64),
    /// `Limits::entries_max`.
    #[error("the layer has more than {0} entries")]
    Entries(u64),
    /// A path no Linux file system can hold.
    #[error(transparent)]
    Path(#[from] PathProblem),
    /// A whiteout of nothing (`.wh.`), of the directory itself or of its parent.
    #[error("the whiteout names nothing that could be deleted")]
    WhiteoutName,
    /// An entry below a whiteout marker.
    #[error("it lies below a whiteout marker")]
    BelowWhiteout,
    /// The root is something else than a directory.
    #[error("it makes the root something else than a directory")]
    RootNotDirectory,
}

impl From<BadMap> for TarProblem {
    fn from(_: BadMap) -> Self {
        Self::SparseMap
    }
}

/// An entry of the layer's tar that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {entry} of the layer ({path}, at byte {offset} of the tar): {problem}")]
pub struct TarError {
    /// Number of the entry, from 1, header-only entries not counted.
    pub entry: u64,
    /// Where its header starts in the uncompressed layer.
    pub offset: u64,
    /// Its path as far as known, printable.
    pub path: String,
    /// What is wrong with it.
    pub problem: TarProblem,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    HardLink,
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// One real entry, all overrides applied.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// As written, not cleaned.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// Canonical form, empty for none.
    pub(crate) xattrs: Vec<u8>,
    /// Logical size, holes included; zero for all but files.
    pub(crate) size_bytes: u64,
    /// What is stored of a sparse file; `None` when all of it is.
    pub(crate) segments: Option<Vec<Segment>>,
    /// Target of a symbolic or hard link, as written.
    pub(crate) link: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// Header-only entries in front of a real one.
#[derive(Default)]
struct Extras {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

/// Reads entries one after the other.
pub(crate) struct TarReader<'l, R> {
    source: R,
    limits: &'l Limits,
    /// Bytes taken from the source.
    offset: u64,
    header_offset: u64,
    entries: u64,
    path: Vec<u8>,
    data_left: u64,
    padding: u64,
    ended: bool,
}

impl<'l, R: BufRead> TarReader<'l, R> {
    pub(crate) fn new(source: R, limits: &'l Limits) -> Self {
        Self {
            source,
            limits,
            offset: 0,
            header_offset: 0,
            entries: 0,
            path: Vec::new(),
            data_left: 0,
            padding: 0,
            ended: false,
        }
    }

    /// Puts a problem beside the entry read last.
    pub(crate) fn error(&self, problem: TarProblem) -> TarError {
        TarError {
            entry: self.entries + 1,
            offset: self.header_offset,
            path: if self.path.is_empty() {
                "path not known yet".to_owned()
            } else {
                path::printable(&self.path)
            },
            problem,
        }
    }

    /// The next real entry; what was left of the data of the one before is skipped.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let entry = self.read_entry().map_err(|problem| self.error(problem))?;
        self.ended = entry.is_none();
        Ok(entry)
    }

    /// The next stored bytes of the entry read last; empty at their end. [`Self::consume`]
    /// moves on.
    pub(crate) fn data(&mut self) -> Result<&[u8], TarError> {
        if self.data_left == 0 {
            return Ok(&[]);
        }
        let wanted = usize::try_from(self.data_left).unwrap_or(usize::MAX);
        let problem = match self.source.fill_buf() {
            Ok([]) => TarProblem::Truncated,
            Ok(chunk) => return Ok(&chunk[..chunk.len().min(wanted)]),
            Err(_) => TarProblem::Stream,
        };
        // Not `self.error`: the buffer is borrowed for as long as the answer lives.
        let (entry, offset) = (self.entries + 1, self.header_offset);
        Err(TarError { entry, offset, path: path::printable(&self.path), problem })
    }

    /// Takes `length` bytes of what [`Self::data`] showed.
    pub(crate) fn consume(&mut self, length: usize) {
        self.source.consume(length);
        self.offset += length as u64;
        self.data_left = self.data_left.saturating_sub(length as u64);
    }

    /// Counts the entry as done, for the numbers in errors.
    pub(crate) fn finish_entry(&mut self) {
        self.entries += 1;
    }

    /// Fills as much of `out` as the stream has; less only at its end.
    fn read_some(&mut self, out: &mut [u8]) -> Result<usize, TarProblem> {
        let mut filled = 0;
        while filled < out.len() {
            match self.source.read(&mut out[filled..]) {
                Ok(0) => break,
                Ok(length) => filled += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(TarProblem::Stream),
            }
        }
        self.offset += filled as u64;
        Ok(filled)
    }

    /// Moves over `length` bytes; `false` when the stream ends before.
    fn skip(&mut self, mut length: u64) -> Result<bool, TarProblem> {
        while length > 0 {
            let chunk = self.source.fill_buf().map_err(|_| TarProblem::Stream)?.len();
            if chunk == 0 {
                return Ok(false);
            }
            let step = usize::try_from(length).unwrap_or(usize::MAX).min(chunk);
            self.source.consume(step);
            self.offset += step as u64;
            length -= step as u64;
        }
        Ok(true)
    }

    /// To the next header. The padding after the very last data may be missing.
    fn skip_rest(&mut self) -> Result<(), TarProblem> {
        let data = std::mem::take(&mut self.data_left);
        if !self.skip(data)? {
            return Err(TarProblem::Truncated);
        }
        let padding = std::mem::take(&mut self.padding);
        self.skip(padding).map(|_| ())
    }

    /// The next header with a right checksum; `None` at the end of the tar.
    fn read_header(&mut self) -> Result<Option<[u8; BLOCK]>, TarProblem> {
        self.skip_rest()?;
        self.header_offset = self.offset;
        let mut block = [0; BLOCK];
        match self.read_some(&mut block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(TarProblem::Truncated),
        }
        if block.iter().all(|byte| *byte == 0) {
            return match self.read_some(&mut block)? {
                0 => Ok(None),
                BLOCK if block.iter().all(|byte| *byte == 0) => Ok(None),
                BLOCK => Err(TarProblem::LoneZeroBlock),
                _ => Err(TarProblem::Truncated),
            };
        }
        check_sum(&block)?;
        Ok(Some(block))
    }

    fn read_entry(&mut self) -> Result<Option<Entry>, TarProblem> {
        self.path.clear();
        let mut extras = Extras::default();
        loop {
            let Some(block) = self.read_header()? else { return Ok(None) };
            match block[156] {
                b'x' => extras.pax = Some(Pax::parse(&self.read_special(&block)?, self.limits)?),
                b'g' => {
                    Pax::parse(&self.read_special(&block)?, self.limits)?;
                    extras = Extras::default();
                }
                b'L' => extras.long_name = long(&self.read_special(&block)?),
                b'K' => extras.long_link = long(&self.read_special(&block)?),
                _ => return self.real_entry(&block, extras).map(Some),
            }
        }
    }

    /// The data of a header-only entry.
    fn read_special(&mut self, block: &[u8; BLOCK]) -> Result<Vec<u8>, TarProblem> {
        let size = size_field(block)?;
        if size > self.limits.header_bytes_max {
            return Err(TarProblem::HeaderBytes(self.limits.header_bytes_max));
        }
        self.start_data(size);
        let mut data = vec![0; usize::try_from(size).map_err(|_| TarProblem::Size)?];
        if self.read_some(&mut data)? < data.len() {
            return Err(TarProblem::Truncated);
        }
        self.data_left = 0;
        Ok(data)
    }

    fn start_data(&mut self, size: u64) {
        self.data_left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    fn real_entry(&mut self, block: &[u8; BLOCK], extras: Extras) -> Result<Entry, TarProblem> {
        let format = format_of(block);
        let pax = extras.pax.unwrap_or_default();
        let header_name = header_name(block, format);
        self.path = extras.long_name.or(pax.path).unwrap_or(header_name);
        if self.entries >= self.limits.entries_max {
            return Err(TarProblem::Entries(self.limits.entries_max));
        }
        let kind = kind_of(block, format, self.path.ends_with(b"/"))?;
        if block[156] != b'S' && pax.sparse.version().is_some() {
            if kind != EntryKind::File {
                return Err(TarProblem::SparseMap);
            }
            if let Some(name) = &pax.sparse.name {
                self.path.clone_from(name);
            }
        }
        let mode = number(&block[100..108], "mode")?;
        let header_uid = number(&block[108..116], "uid")?;
        let header_gid = number(&block[116..124], "gid")?;
        let header_mtime = Timestamp { secs: number(&block[136..148], "mtime")?, nanos: 0 };
        let header_size = size_field(block)?;
        let link = extras.long_link.or(pax.link_path);
        let mut entry = Entry {
            path: self.path.clone(),
            kind,
            permissions: u16::try_from(mode & 0o7777).unwrap_or(0),
            uid: owner(pax.uid, header_uid)?,
            gid: owner(pax.gid, header_gid)?,
            mtime: pax.mtime.unwrap_or(header_mtime),
            xattrs: xattr::encode(&pax.xattrs),
            size_bytes: 0,
            segments: None,
            link: link.unwrap_or_else(|| until_nul(&block[157..257]).to_vec()),
        };
        if matches!(kind, EntryKind::Symlink | EntryKind::HardLink)
            && (entry.link.is_empty() || entry.link.len() > 4095)
        {
            return Err(TarProblem::LinkTarget);
        }
        if kind == EntryKind::File {
            self.start_data(pax.size.unwrap_or(header_size));
            self.file_data(&mut entry, block, format, &pax.sparse)?;
        }
        Ok(entry)
    }

    /// Size and holes of a file whose stored data starts here.
    fn file_data(
        &mut self,
        entry: &mut Entry,
        block: &[u8; BLOCK],
        format: Format,
        records: &sparse::Records,
    ) -> Result<(), TarProblem> {
        entry.size_bytes = self.data_left;
        let segments = if block[156] == b'S' {
            if format != Format::Gnu {
                return Err(TarProblem::Type(b'S'));
            }
            entry.size_bytes = unsigned(&block[483..495], "real size")?;
            Some(self.old_gnu_map(block)?)
        } else {
            let real = records.size.or(records.real_size);
            match records.version() {
                None => None,
                Some(PaxVersion::Unknown) => return Err(TarProblem::SparseVersion),
                Some(PaxVersion::InRecords) => {
                    entry.size_bytes = real.unwrap_or(entry.size_bytes);
                    Some(records.segments()?)
                }
                Some(PaxVersion::InData) => {
                    entry.size_bytes = real.ok_or(TarProblem::SparseMap)?;
                    Some(self.map_in_data()?)
                }
            }
        };
        if entry.size_bytes > self.limits.file_bytes_max {
            return Err(TarProblem::FileBytes(self.limits.file_bytes_max));
        }
        if let Some(segments) = &segments {
            sparse::check(segments, entry.size_bytes, self.data_left)?;
        }
        entry.segments = segments;
        Ok(())
    }

    /// Old GNU: four segments in the header, then blocks of 21 while a flag says so. The
    /// blocks stand before the data and are not part of it.
    fn old_gnu_map(&mut self, block: &[u8; BLOCK]) -> Result<Vec<Segment>, TarProblem> {
        let mut segments = Vec::new();
        old_gnu_segments(&block[386..482], &mut segments)?;
        let mut more = block[482] != 0;
        let mut read = 0;
        while more {
            let mut extension = [0; BLOCK];
            read += BLOCK as u64;
            if read > self.limits.header_bytes_max {
                return Err(TarProblem::HeaderBytes(self.limits.header_bytes_max));
            }
            if self.read_some(&mut extension)? < BLOCK {
                return Err(TarProblem::Truncated);
            }
            old_gnu_segments(&extension[..504], &mut segments)?;
            more = extension[504] != 0;
        }
        Ok(segments)
    }

    /// PAX 1.0: a count, then offset and length of each segment, one decimal number per line,
    /// padded to whole blocks, as the first part of the data.
    fn map_in_data(&mut self) -> Result<Vec<Segment>, TarProblem> {
        let mut lines = Lines { read: 0, block: [0; BLOCK], at: BLOCK };
        let count = lines.number(self)?;
        // Each segment needs at least four bytes of map.
        if count > self.limits.header_bytes_max / 4 {
            return Err(TarProblem::HeaderBytes(self.limits.header_bytes_max));
        }
        let mut segments = Vec::new();
        for _ in 0..count {
            let (offset, length) = (lines.number(self)?, lines.number(self)?);
            segments.push(Segment { offset, length });
        }
        Ok(segments)
    }
}

/// Lines of a PAX 1.0 map, read block by block.
struct Lines {
    read: u64,
    block: [u8; BLOCK],
    at: usize,
}

impl Lines {
    fn number<R: BufRead>(&mut self, tar: &mut TarReader<'_, R>) -> Result<u64, TarProblem> {
        const DIGITS_MAX: usize = 20;
        let mut digits = Vec::with_capacity(DIGITS_MAX);
        loop {
            if self.at == BLOCK {
                self.next_block(tar)?;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return sparse::decimal(&digits).ok_or(TarProblem::SparseMap);
            }
            if digits.len() == DIGITS_MAX {
                return Err(TarProblem::SparseMap);
            }
            digits.push(byte);
        }
    }

    fn next_block<R: BufRead>(&mut self, tar: &mut TarReader<'_, R>) -> Result<(), TarProblem> {
        self.read += BLOCK as u64;
        if self.read > tar.limits.header_bytes_max {
            return Err(TarProblem::HeaderBytes(tar.limits.header_bytes_max));
        }
        if tar.data_left < BLOCK as u64 {
            return Err(TarProblem::SparseMap);
        }
        if tar.read_some(&mut self.block)? < BLOCK {
            return Err(TarProblem::Truncated);
        }
        tar.data_left -= BLOCK as u64;
        self.at = 0;
        Ok(())
    }
}

/// Sum of all bytes with the checksum field as spaces; bytes unsigned, or signed as some old
/// programs had it.
fn check_sum(block: &[u8; BLOCK]) -> Result<(), TarProblem> {
    let written = octal(&block[148..156]).ok_or(TarProblem::Checksum)?;
    let (mut unsigned, mut signed) = (0_i64, 0_i64);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    let written = i64::try_from(written).map_err(|_| TarProblem::Checksum)?;
    if written == unsigned || written == signed { Ok(()) } else { Err(TarProblem::Checksum) }
}

fn format_of(block: &[u8; BLOCK]) -> Format {
    match (&block[257..263], &block[263..265], &block[508..512]) {
        (b"ustar\0", _, b"tar\0") => Format::Star,
        (b"ustar\0", _, _) => Format::Ustar,
        (b"ustar ", b" \0", _) => Format::Gnu,
        _ => Format::V7,
    }
}

/// Name field, behind the prefix field where the format has one.
fn header_name(block: &[u8; BLOCK], format: Format) -> Vec<u8> {
    let name = until_nul(&block[..100]);
    let prefix = match format {
        Format::V7 => &[][..],
        Format::Ustar => until_nul(&block[345..500]),
        Format::Star => until_nul(&block[345..476]),
        Format::Gnu => mistaken_prefix(block),
    };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// Go before 1.8 sometimes wrote a prefix into GNU headers, over the two time fields. Taken,
/// as Go still does, when those fields hold text that cannot be numbers.
fn mistaken_prefix(block: &[u8; BLOCK]) -> &[u8] {
    let unreadable = |field: &[u8]| field[0] != 0 && number(field, "time").is_err();
    let prefix = until_nul(&block[345..500]);
    let times = unreadable(&block[345..357]) || unreadable(&block[357..369]);
    if times && prefix.is_ascii() { prefix } else { &[] }
}

fn kind_of(block: &[u8; BLOCK], format: Format, slash: bool) -> Result<EntryKind, TarProblem> {
    Ok(match block[156] {
        // Before POSIX there was no type for directories.
        0 if slash => EntryKind::Directory,
        0 | b'0' | b'7' | b'S' => EntryKind::File,
        b'1' => EntryKind::HardLink,
        b'2' => EntryKind::Symlink,
        b'3' => {
            let (major, minor) = device(block, format)?;
            EntryKind::CharDevice { major, minor }
        }
        b'4' => {
            let (major, minor) = device(block, format)?;
            EntryKind::BlockDevice { major, minor }
        }
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        other => return Err(TarProblem::Type(other)),
    })
}

/// Linux keeps 12 bits of major and 20 bits of minor.
fn device(block: &[u8; BLOCK], format: Format) -> Result<(u32, u32), TarProblem> {
    if format == Format::V7 {
        return Ok((0, 0));
    }
    let part = |field: &[u8], name, bits: u32| {
        let value = u32::try_from(number(field, name)?).map_err(|_| TarProblem::Device)?;
        if value >> bits == 0 { Ok(value) } else { Err(TarProblem::Device) }
    };
    Ok((part(&block[329..337], "major", 12)?, part(&block[337..345], "minor", 20)?))
}

fn old_gnu_segments(table: &[u8], segments: &mut Vec<Segment>) -> Result<(), TarProblem> {
    for entry in table.chunks_exact(24) {
        if entry[0] == 0 {
            break;
        }
        let offset = unsigned(&entry[..12], "sparse offset")?;
        let length = unsigned(&entry[12..], "sparse length")?;
        segments.push(Segment { offset, length });
    }
    Ok(())
}

/// The last number of all is nobody: `chown` takes it for "leave it as it is", so that whoever
/// unpacks such a file as root has made one of root's.
fn owner(pax: Option<u32>, header: i64) -> Result<u32, TarProblem> {
    let id = match pax {
        Some(id) => id,
        None => u32::try_from(header).map_err(|_| TarProblem::Owner)?,
    };
    Ok(if id == u32::MAX { 0 } else { id })
}

fn size_field(block: &[u8; BLOCK]) -> Result<u64, TarProblem> {
    unsigned(&block[124..136], "size")
}

fn unsigned(field: &[u8], name: &'static str) -> Result<u64, TarProblem> {
    u64::try_from(number(field, name)?).map_err(|_| TarProblem::Size)
}

/// A number field: octal text, or base-256 two's complement when the first bit is set.
fn number(field: &[u8], name: &'static str) -> Result<i64, TarProblem> {
    let value = if field[0] & 0x80 != 0 {
        base256(field)
    } else {
        octal(field).and_then(|value| i64::try_from(value).ok())
    };
    value.ok_or(TarProblem::Number(name))
}

/// Bit 7 of the first byte is the marker, bit 6 the sign.
fn base256(field: &[u8]) -> Option<i64> {
    let sign = if field[0] & 0x40 != 0 { 0xff } else { 0 };
    let mut value = 0_u64;
    for (at, byte) in field.iter().enumerate() {
        let byte = if at == 0 { (byte ^ sign) & 0x7f } else { byte ^ sign };
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).ok()?;
    Some(if sign == 0 { value } else { !value })
}

/// Octal digits between spaces and NULs; nothing at all is zero.
fn octal(field: &[u8]) -> Option<u64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let end = field.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    until_nul(&field[start..end]).iter().try_fold(0_u64, |value, digit| {
        let digit = matches!(digit, b'0'..=b'7').then(|| u64::from(digit - b'0'))?;
        value.checked_mul(8)?.checked_add(digit)
    })
}

/// What a GNU long name or link says.
fn long(data: &[u8]) -> Option<Vec<u8>> {
    Some(until_nul(data).to_vec()).filter(|name| !name.is_empty())
}

fn until_nul(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    &field[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_text_or_base_256() {
        let read = |field: &[u8]| number(field, "x").ok();
        assert_eq!(read(b"0000644\0"), Some(0o644));
        assert_eq!(read(b"  644 \0\0"), Some(0o644));
        assert_eq!(read(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(read(b"00006448"), None);
        assert_eq!(read(b"-0000644"), None);
        assert_eq!(read(b"\x80\0\0\0\0\x01\0\0"), Some(0x10000));
        assert_eq!(read(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(read(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), Some(-1));
        assert_eq!(read(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), Some(i64::MAX));
        assert_eq!(read(b"\x80\0\0\0\x80\0\0\0\0\0\0\0"), None);
        assert_eq!(read(b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0"), Some(i64::MIN));
        assert_eq!(read(b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff"), None);
        assert_eq!(read(b"\x80\x01\0\0\0\0\0\0\0\0\0\0"), None);
    }
}
