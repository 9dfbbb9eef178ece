//! Where the files of an image archive are: a strict index of an uncompressed tar.
//!
//! Reads headers only and makes nothing on disk; names are mere keys. Formats: POSIX.1-2017
//! pax, ustar, GNU long names. Sparse files are refused: tools that write image archives make
//! none. It knows nothing of images, and is not the parser of layers.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

const BLOCK: u64 = 512;
const EXTENSION_BYTES_MAX: u64 = 1 << 20;
const NAME_BYTES_MAX: usize = 4096;
const LINKS_MAX: usize = 16;

/// Why an archive's tar is refused.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The file cannot be read.
    #[error("cannot read at byte {offset}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// A header is not one.
    #[error("no tar header at byte {0}")]
    Header(u64),
    /// A number in a header is none, or too large.
    #[error("a number in the tar header at byte {0} is not valid")]
    Number(u64),
    /// The archive ends within an entry.
    #[error("the tar ends within the entry at byte {0}")]
    Truncated(u64),
    /// An extended header is malformed or too long.
    #[error("the extended tar header at byte {0} is not valid")]
    Extension(u64),
    /// A kind of entry that image archives do not have.
    #[error("the tar entry at byte {offset} is of the unsupported kind {kind:?}")]
    Kind {
        /// Where.
        offset: u64,
        /// Its type flag.
        kind: char,
    },
    /// More entries than we accept.
    #[error("the tar has more than {0} entries")]
    TooMany(usize),
}

/// Where a file's bytes are in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) size_bytes: u64,
}

#[derive(Debug)]
enum Entry {
    File(Span),
    /// The name of another entry.
    Link(String),
}

/// The regular files and links of a tar by their cleaned names. Of equal names the last counts.
#[derive(Debug, Default)]
pub(crate) struct TarIndex(HashMap<String, Entry>);

/// What extended headers say about the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size_bytes: Option<u64>,
}

impl TarIndex {
    /// Whether a tar can begin like this, for those who have not got all of it yet.
    pub(crate) fn check_start(bytes: &[u8]) -> Result<(), TarError> {
        let header = match bytes.first_chunk::<512>() {
            Some(header) => header,
            None if bytes.is_empty() => return Err(TarError::Header(0)),
            None => return Err(TarError::Truncated(0)),
        };
        // Also a block of zeros, which ends a tar, has no right sum.
        check_sum(header, 0)
    }

    /// Reads all headers of the first `length_bytes` of a file.
    pub(crate) fn read(
        file: &File,
        length_bytes: u64,
        entries_max: usize,
    ) -> Result<TarIndex, TarError> {
        let mut index = TarIndex::default();
        let mut extended = Extended::default();
        let mut at: u64 = 0;
        let mut entries: usize = 0;
        while at < length_bytes {
            let header = block(file, at, length_bytes)?;
            if header.iter().all(|byte| *byte == 0) {
                return end(file, at, length_bytes).map(|()| index);
            }
            entries += 1;
            if entries > entries_max {
                return Err(TarError::TooMany(entries_max));
            }
            check_sum(&header, at)?;
            let is_extension = matches!(header[156], b'x' | b'g' | b'L' | b'K');
            let own_size = number(&header[124..136]).ok_or(TarError::Number(at))?;
            let pax_size = extended.size_bytes.filter(|_| !is_extension);
            let span = Span { offset: at + BLOCK, size_bytes: pax_size.unwrap_or(own_size) };
            let padded = span.size_bytes.checked_next_multiple_of(BLOCK);
            let next = padded.and_then(|padded| span.offset.checked_add(padded));
            let data_end = span.offset.saturating_add(span.size_bytes);
            let next = next.filter(|_| data_end <= length_bytes).ok_or(TarError::Truncated(at))?;
            if is_extension {
                extended.read(file, header[156], span, at)?;
            } else {
                index.add(&header, span, std::mem::take(&mut extended), at)?;
            }
            at = next;
        }
        if at == 0 { Err(TarError::Header(0)) } else { Ok(index) }
    }

    fn add(
        &mut self,
        header: &[u8; 512],
        span: Span,
        extended: Extended,
        at: u64,
    ) -> Result<(), TarError> {
        let name = extended.path.unwrap_or_else(|| header_name(header));
        let link = extended.link.unwrap_or_else(|| until_nul(&header[157..257]).to_vec());
        let kind = header[156];
        let has_no_data = span.size_bytes == 0;
        let entry = match kind {
            b'0' | 0 | b'7' => Some(Entry::File(span)),
            b'1' if has_no_data => clean(&link).map(Entry::Link),
            b'2' if has_no_data => beside(&name, &link).map(Entry::Link),
            b'3' | b'4' | b'5' | b'6' if has_no_data => None,
            _ => return Err(TarError::Kind { offset: at, kind: char::from(kind) }),
        };
        // A name that is no text, or leaves the archive, is one that nothing can ask for.
        if let (Some(name), Some(entry)) = (clean(&name), entry) {
            self.0.insert(name, entry);
        }
        Ok(())
    }

    /// The file of this name, through links, with the name it really has.
    pub(crate) fn find(&self, name: &str) -> Option<(&str, Span)> {
        let mut name = clean(name.as_bytes())?;
        for _ in 0..LINKS_MAX {
            let (key, entry) = self.0.get_key_value(&name)?;
            match entry {
                Entry::File(span) => return Some((key, *span)),
                Entry::Link(target) => name.clone_from(target),
            }
        }
        None
    }
}

impl Extended {
    fn read(&mut self, file: &File, kind: u8, span: Span, at: u64) -> Result<(), TarError> {
        if span.size_bytes > EXTENSION_BYTES_MAX {
            return Err(TarError::Extension(at));
        }
        let mut bytes = vec![0; usize::try_from(span.size_bytes).unwrap_or_default()];
        let failed = |source| TarError::Read { offset: span.offset, source };
        file.read_exact_at(&mut bytes, span.offset).map_err(failed)?;
        match kind {
            // pax wins over GNU, whatever the order.
            b'L' if self.path.is_none() => self.path = Some(until_nul(&bytes).to_vec()),
            b'K' if self.link.is_none() => self.link = Some(until_nul(&bytes).to_vec()),
            b'x' => self.read_pax(&bytes).ok_or(TarError::Extension(at))?,
            // A global header with names or sizes would change every entry: nobody means that.
            b'g' => {
                let mut global = Extended::default();
                global.read_pax(&bytes).ok_or(TarError::Extension(at))?;
                if global.path.is_some() || global.link.is_some() || global.size_bytes.is_some() {
                    return Err(TarError::Extension(at));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Records are `length key=value\n`, the length counting itself.
    fn read_pax(&mut self, mut bytes: &[u8]) -> Option<()> {
        while !bytes.is_empty() {
            let space = bytes.iter().position(|b| *b == b' ')?;
            let digits = std::str::from_utf8(bytes.get(..space)?).ok()?;
            let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            let length: usize = digits.parse().ok().filter(|_| is_number)?;
            let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
            bytes = bytes.get(length..)?;
            let equals = record.iter().position(|b| *b == b'=')?;
            let (key, value) = (record.get(..equals)?, record.get(equals + 1..)?);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size_bytes = Some(std::str::from_utf8(value).ok()?.parse().ok()?),
                key if key.starts_with(b"GNU.sparse.") => return None,
                _ => {}
            }
        }
        Some(())
    }
}

fn block(file: &File, at: u64, length_bytes: u64) -> Result<[u8; 512], TarError> {
    if length_bytes - at < BLOCK {
        return Err(TarError::Truncated(at));
    }
    let mut block = [0; 512];
    file.read_exact_at(&mut block, at).map_err(|source| TarError::Read { offset: at, source })?;
    Ok(block)
}

/// One block of zeros must be followed by another or by the end of the file.
fn end(file: &File, at: u64, length_bytes: u64) -> Result<(), TarError> {
    if at == 0 {
        return Err(TarError::Header(0));
    }
    if length_bytes - at < 2 * BLOCK {
        return Ok(());
    }
    let second = block(file, at + BLOCK, length_bytes)?;
    if second.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(TarError::Header(at)) }
}

fn check_sum(header: &[u8; 512], at: u64) -> Result<(), TarError> {
    let stored = number(&header[148..156]).ok_or(TarError::Header(at))?;
    let (mut unsigned, mut signed) = (0_u64, 0_i64);
    for (position, byte) in header.iter().enumerate() {
        let byte = if (148..156).contains(&position) { b' ' } else { *byte };
        unsigned += u64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    let fits = stored == unsigned || i64::try_from(stored).is_ok_and(|stored| stored == signed);
    if fits { Ok(()) } else { Err(TarError::Header(at)) }
}

/// Octal text, or GNU base-256 when the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if *first & 0x80 != 0 {
        let mut value = u64::from(*first & 0x7f);
        for byte in rest {
            value = value.checked_mul(256)?.checked_add(u64::from(*byte))?;
        }
        return Some(value);
    }
    let text = std::str::from_utf8(field).ok()?;
    let digits = text.trim_matches(|c| matches!(c, ' ' | '\0'));
    if digits.is_empty() {
        return Some(0);
    }
    if !digits.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
        return None;
    }
    u64::from_str_radix(digits, 8).ok()
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The name in a header, with the ustar prefix where there is one.
fn header_name(header: &[u8; 512]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    let prefix = until_nul(&header[345..500]);
    let is_posix = header[257..263] == *b"ustar\0";
    if is_posix && !prefix.is_empty() {
        return [prefix, b"/", name].concat();
    }
    name.to_vec()
}

/// A relative name without `.` parts; none if it is no text, empty or has `..` left to climb.
fn clean(name: &[u8]) -> Option<String> {
    if name.len() > NAME_BYTES_MAX {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in std::str::from_utf8(name).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// The target of a symbolic link as a name of the archive.
fn beside(name: &[u8], target: &[u8]) -> Option<String> {
    if target.starts_with(b"/") {
        return None;
    }
    let cleaned = clean(name)?;
    let parent = cleaned.rsplit_once('/').map_or("", |(parent, _)| parent);
    clean(&[parent.as_bytes(), b"/", target].concat())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<TarIndex, TarError> {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        TarIndex::read(&file, bytes.len() as u64, 1000)
    }

    /// A header with the right check sum.
    fn header(name: &[u8], kind: u8, size: &[u8]) -> Vec<u8> {
        let mut header = [0_u8; 512];
        header[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
        header[124..124 + size.len().min(12)].copy_from_slice(&size[..size.len().min(12)]);
        header[156] = kind;
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.to_vec()
    }

    #[test]
    fn names_are_keys_and_cannot_leave_the_archive() {
        for (name, cleaned) in [
            (&b"./a//b/./c"[..], Some("a/b/c")),
            (b"/a", Some("a")),
            (b"a/../b", Some("b")),
            (b"../a", None),
            (b"a/../../b", None),
            (b"", None),
            (b"./", None),
            (b"\xff", None),
        ] {
            assert_eq!(clean(name).as_deref(), cleaned);
        }
        assert_eq!(clean(&[b'a'; NAME_BYTES_MAX + 1]), None);
    }

    #[test]
    fn numbers_are_octal_or_base_256_and_never_wrap() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"\x80\0\0\x01\0"), Some(256));
        assert_eq!(number(&[0xff; 12]), None);
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"-000644\0"), None);
    }

    #[test]
    fn of_two_files_with_one_name_the_last_counts() {
        let block = |byte: u8| vec![byte; 512];
        let size = b"00000001000\0";
        let tar =
            [header(b"a", b'0', size), block(1), header(b"./a", b'0', size), block(2)].concat();
        let index = read(&tar).unwrap();
        assert_eq!(index.find("a"), Some(("a", Span { offset: 1536, size_bytes: 512 })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_index_panic_or_point_outside(
            entries in proptest::collection::vec(
                (
                    proptest::collection::vec(any::<u8>(), 0..100),
                    prop_oneof![Just(b'0'), Just(b'x'), Just(b'L'), Just(b'1'), Just(b'2'), any::<u8>()],
                    proptest::collection::vec(any::<u8>(), 0..12),
                    proptest::collection::vec(any::<u8>(), 0..700),
                ),
                0..6,
            ),
        ) {
            let mut tar = Vec::new();
            for (name, kind, size, data) in entries {
                let honest = format!("{:011o}\0", data.len());
                let size = if size.len() < 8 { honest.as_bytes() } else { &size };
                tar.extend(header(&name, kind, size));
                tar.extend(&data);
                tar.resize(tar.len().next_multiple_of(512), 0);
            }
            if let Ok(index) = read(&tar) {
                for name in index.0.keys() {
                    if let Some((_, span)) = index.find(name) {
                        prop_assert!(span.offset + span.size_bytes <= tar.len() as u64);
                    }
                }
            }
        }
    }
}
