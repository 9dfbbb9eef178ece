//! Entries of a layer's tar: ustar headers, with PAX records for all that does not fit into one
//! (POSIX.1-2017, pax, "pax Interchange Format").

use std::io::{self, Write};

const BLOCK: usize = 512;
/// The largest size and id that the octal fields hold.
const SIZE_MAX: u64 = 0o77_777_777_777;
const ID_MAX: u32 = 0o7_777_777;

/// What an entry is: its type flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Directory,
    Fifo,
}

/// One entry, without its contents.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) kind: Kind,
    pub(crate) path: &'a [u8],
    /// Of links.
    pub(crate) target: &'a [u8],
    pub(crate) size_bytes: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

impl<'a> Entry<'a> {
    /// An empty file of root, as whiteouts are.
    pub(crate) fn mark(path: &'a [u8]) -> Self {
        Self {
            kind: Kind::File,
            path,
            target: &[],
            size_bytes: 0,
            mode: 0o600,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: &[],
        }
    }

    /// Writes the headers; `size_bytes` of contents and [`pad`] are to follow.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut records = Vec::new();
        record(&mut records, b"path", self.path);
        record(&mut records, b"mtime", time(self.mtime).as_bytes());
        if matches!(self.kind, Kind::HardLink | Kind::Symlink) {
            record(&mut records, b"linkpath", self.target);
        }
        for (name, number, max) in [
            (b"size", self.size_bytes, SIZE_MAX),
            (b"uid ", u64::from(self.uid), u64::from(ID_MAX)),
            (b"gid ", u64::from(self.gid), u64::from(ID_MAX)),
        ] {
            if number > max {
                record(&mut records, name.trim_ascii_end(), number.to_string().as_bytes());
            }
        }
        for (name, value) in self.xattrs {
            record(&mut records, &[&b"SCHILY.xattr."[..], name].concat(), value);
        }
        out.write_all(&header(b'x', b"pax", &[], records.len() as u64, 0o600, 0, 0, 0))?;
        out.write_all(&records)?;
        pad(out, records.len() as u64)?;
        let flag = match self.kind {
            Kind::File => b'0',
            Kind::HardLink => b'1',
            Kind::Symlink => b'2',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        let secs = u64::try_from(self.mtime.0).unwrap_or(0);
        let (uid, gid) = (self.uid.min(ID_MAX), self.gid.min(ID_MAX));
        let size = self.size_bytes.min(SIZE_MAX);
        out.write_all(&header(flag, self.path, self.target, size, self.mode, uid, gid, secs))
    }
}

/// Fills up the last block of so many bytes.
pub(crate) fn pad(out: &mut impl Write, bytes: u64) -> io::Result<()> {
    let rest = usize::try_from(bytes % BLOCK as u64).unwrap_or(0);
    if rest == 0 { Ok(()) } else { out.write_all(&[0; BLOCK][rest..]) }
}

/// Ends the archive.
pub(crate) fn end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])?;
    out.flush()
}

/// `LENGTH KEY=VALUE\n`, the length of all of it included.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// Decimal seconds; the fraction of a negative time counts down from it.
fn time((secs, nanos): (i64, u32)) -> String {
    match (secs, nanos) {
        (secs, 0) => secs.to_string(),
        (secs, nanos) if secs < 0 => {
            format!("-{}.{:09}", (secs + 1).unsigned_abs(), 1_000_000_000 - nanos)
        }
        (secs, nanos) => format!("{secs}.{nanos:09}"),
    }
}

#[expect(clippy::too_many_arguments, reason = "the fields of a header, in their order")]
fn header(
    flag: u8,
    path: &[u8],
    target: &[u8],
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: u64,
) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    // The record has the whole.
    put(0, &path[..path.len().min(100)]);
    put(100, format!("{:07o}", mode & 0o7777).as_bytes());
    put(108, format!("{uid:07o}").as_bytes());
    put(116, format!("{gid:07o}").as_bytes());
    put(124, format!("{size:011o}").as_bytes());
    put(136, format!("{:011o}", mtime.min(SIZE_MAX)).as_bytes());
    put(148, b"        ");
    put(156, &[flag]);
    put(157, &target[..target.len().min(100)]);
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        for value in [0, 1, 5, 80, 88, 89, 90, 985, 986, 987, 988] {
            let mut out = Vec::new();
            record(&mut out, b"path", &vec![b'x'; value]);
            let text = String::from_utf8(out.clone()).unwrap();
            let (length, _) = text.split_once(' ').unwrap();
            assert_eq!(length.parse::<usize>().unwrap(), out.len());
        }
    }

    #[test]
    fn times_before_1970_count_down() {
        assert_eq!(time((5, 0)), "5");
        assert_eq!(time((5, 1)), "5.000000001");
        assert_eq!(time((-1, 500_000_000)), "-0.500000000");
        assert_eq!(time((-2, 750_000_000)), "-1.250000000");
        assert_eq!(time((-2, 0)), "-2");
    }
}
