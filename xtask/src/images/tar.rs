//! A writer of tar streams that also writes what no ordinary tool would.
//!
//! Source of the format: POSIX.1-2017 `pax`. Checks nothing: hostile layers are made with it.

use std::io::{self, Write};

const BLOCK_BYTES: usize = 512;
/// What fits in the seven octal digits of an owner field.
const OWNER_MAX: u32 = 0o7_777_777;

/// What an entry is.
#[derive(Clone, Debug)]
pub(crate) enum What {
    File(Vec<u8>),
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// One entry; the modes and times that matter in a test are set on top of plain defaults.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    what: What,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: Vec<(String, Vec<u8>)>,
}

/// 2020-01-02 03:04:05, so that nothing depends on the day of the test.
const MTIME_DEFAULT: i64 = 1_577_934_245;

impl Node {
    pub(crate) fn new(what: What) -> Self {
        let mode = if matches!(what, What::Directory) { 0o755 } else { 0o644 };
        Self { what, mode, owner: (0, 0), mtime: (MTIME_DEFAULT, 0), xattrs: Vec::new() }
    }

    pub(crate) fn file(content: impl Into<Vec<u8>>) -> Self {
        Self::new(What::File(content.into()))
    }

    pub(crate) fn directory() -> Self {
        Self::new(What::Directory)
    }

    pub(crate) fn symlink(target: impl Into<Vec<u8>>) -> Self {
        Self::new(What::Symlink(target.into())).mode(0o777)
    }

    pub(crate) fn link(target: impl Into<Vec<u8>>) -> Self {
        Self::new(What::HardLink(target.into()))
    }

    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = (uid, gid);
        self
    }

    pub(crate) fn mtime(mut self, secs: i64, nanos: u32) -> Self {
        self.mtime = (secs, nanos);
        self
    }

    pub(crate) fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name.to_owned(), value.into()));
        self
    }
}

/// A tar stream being written.
pub(crate) struct Tar<W: Write> {
    out: W,
}

impl<W: Write> Tar<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out }
    }

    pub(crate) fn add(&mut self, path: impl AsRef<[u8]>, node: &Node) -> io::Result<()> {
        let path = path.as_ref();
        let (flag, content, link, device): (u8, &[u8], &[u8], (u32, u32)) = match &node.what {
            What::File(content) => (b'0', content, b"", (0, 0)),
            What::Directory => (b'5', b"", b"", (0, 0)),
            What::Symlink(target) => (b'2', b"", target, (0, 0)),
            What::HardLink(target) => (b'1', b"", target, (0, 0)),
            What::CharDevice(major, minor) => (b'3', b"", b"", (*major, *minor)),
            What::BlockDevice(major, minor) => (b'4', b"", b"", (*major, *minor)),
            What::Fifo => (b'6', b"", b"", (0, 0)),
        };
        let records = records(path, link, node);
        if !records.is_empty() {
            let plain = Node::file(Vec::new());
            self.header(b"pax", b"", b'x', &plain, records.len(), (0, 0))?;
            self.content(&records)?;
        }
        self.header(path, link, flag, node, content.len(), device)?;
        self.content(content)
    }

    /// A deletion marker for `path`.
    pub(crate) fn whiteout(&mut self, path: &str) -> io::Result<()> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let slash = if parent.is_empty() { "" } else { "/" };
        self.add(format!("{parent}{slash}.wh.{name}"), &Node::file(Vec::new()).mode(0))
    }

    /// A marker that hides everything lower layers have in `directory` (empty: the root).
    pub(crate) fn opaque(&mut self, directory: &str) -> io::Result<()> {
        let slash = if directory.is_empty() { "" } else { "/" };
        self.add(format!("{directory}{slash}.wh..wh..opq"), &Node::file(Vec::new()).mode(0))
    }

    /// Bytes as they are, for streams that no entry describes.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    /// The two zero blocks of the end.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK_BYTES])?;
        Ok(self.out)
    }

    fn content(&mut self, content: &[u8]) -> io::Result<()> {
        self.out.write_all(content)?;
        let padding = content.len().next_multiple_of(BLOCK_BYTES) - content.len();
        self.out.write_all(&[0; BLOCK_BYTES][..padding])
    }

    fn header(
        &mut self,
        path: &[u8],
        link: &[u8],
        flag: u8,
        node: &Node,
        size: usize,
        device: (u32, u32),
    ) -> io::Result<()> {
        let mut block = [0; BLOCK_BYTES];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &path[..path.len().min(100)]);
        put(100, format!("{:07o}", node.mode).as_bytes());
        put(108, format!("{:07o}", node.owner.0.min(OWNER_MAX)).as_bytes());
        put(116, format!("{:07o}", node.owner.1.min(OWNER_MAX)).as_bytes());
        put(124, format!("{size:011o}").as_bytes());
        put(136, format!("{:011o}", node.mtime.0.clamp(0, 0o77_777_777_777)).as_bytes());
        put(148, b"        ");
        put(156, &[flag]);
        put(157, &link[..link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", device.0).as_bytes());
        put(337, format!("{:07o}", device.1).as_bytes());
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.out.write_all(&block)
    }
}

/// The PAX records that an entry needs because its header cannot hold the values.
fn records(path: &[u8], link: &[u8], node: &Node) -> Vec<u8> {
    let mut out = Vec::new();
    let mut add = |key: &str, value: &[u8]| {
        // The length counts its own digits.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while rest + length.to_string().len() != length {
            length = rest + length.to_string().len();
        }
        out.extend_from_slice(format!("{length} {key}=").as_bytes());
        out.extend_from_slice(value);
        out.push(b'\n');
    };
    if path.len() > 100 {
        add("path", path);
    }
    if link.len() > 100 {
        add("linkpath", link);
    }
    for (key, id) in [("uid", node.owner.0), ("gid", node.owner.1)] {
        if id > OWNER_MAX {
            add(key, id.to_string().as_bytes());
        }
    }
    let (secs, nanos) = node.mtime;
    if nanos != 0 || !(0..=0o77_777_777_777).contains(&secs) {
        add("mtime", decimal(secs, nanos).as_bytes());
    }
    for (name, value) in &node.xattrs {
        add(&format!("SCHILY.xattr.{name}"), value);
    }
    out
}

/// Seconds and nanoseconds as one signed decimal number.
fn decimal(secs: i64, nanos: u32) -> String {
    if secs >= 0 || nanos == 0 {
        return format!("{secs}.{nanos:09}");
    }
    // -1.25 s is second -2 and 750 million nanoseconds.
    let whole = secs + 1;
    let sign = if whole == 0 { "-" } else { "" };
    format!("{sign}{whole}.{:09}", 1_000_000_000 - nanos)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::process::Program;

    #[test]
    fn gnu_tar_reads_what_is_written() {
        let long = "d/".repeat(80) + "name";
        let mut tar = Tar::new(Vec::new());
        tar.add("a", &Node::file("hello").mtime(-2, 750_000_000)).unwrap();
        tar.add(&long, &Node::file("deep").owner(3_000_000_000, 7)).unwrap();
        tar.whiteout("x/y").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tar");
        std::fs::write(&file, tar.finish().unwrap()).unwrap();
        let gnu = |mode: &str| Program::new("tar").arg(mode).arg(&file).dir(dir.path());
        gnu("-xf").args(["a", "x"]).run().unwrap();
        let metadata = dir.path().join("a").metadata().unwrap();
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (-2, 750_000_000));
        assert!(dir.path().join("x/.wh.y").exists());
        let listed = gnu("-tf").args(["--verbose", "--numeric-owner"]).text().unwrap();
        assert!(listed.contains("3000000000/7") && listed.contains(&long), "{listed}");
    }
}
