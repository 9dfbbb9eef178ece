//! The reader: what commands have changed, as the tar of one more layer (OCI image specification,
//! "Image Layer Filesystem Changeset").
//!
//! It runs confined, with the users of the commands, and reaches nothing but the upper directory
//! of their overlay: a character device 0:0 there is a name that was removed, an attribute marks
//! a directory that hides what was below it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, OFlags, Stat};
use sandbox::Access;

use crate::order::{self, LayerOrder, Trouble};
use crate::tar::{self, Entry, Kind};
use crate::unpack::{at, open, open_directory};

pub(crate) const ROLE: &str = "layer";

const WRITE_BYTES: usize = 1 << 20;
/// Marks of the overlay file system, mounted with `userxattr` (kernel:
/// Documentation/filesystems/overlayfs.rst, "User xattr").
const OVERLAY: &[u8] = b"user.overlay.";
const OPAQUE: &[u8] = b"user.overlay.opaque";
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
/// A list of names, and a value, are not longer (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_BYTES_MAX: usize = 64 << 10;
/// Deeper than any image may be.
pub(crate) const DEPTH_MAX: usize = 256;

/// The whole life of the process: the upper directory is its first file, where the tar goes the
/// second.
pub(crate) fn main() -> io::Result<()> {
    let order: LayerOrder = order::receive(io::stdin().lock())?;
    let files = order::take(2)?;
    let (upper, out) = (&files[0], &files[1]);
    order::confine(upper, Access::Look, files.len())?;
    order::say_end(write(upper.as_fd(), out, order.bytes_max))
}

fn write(upper: BorrowedFd<'_>, out: &File, bytes_max: u64) -> Result<Vec<String>, Trouble> {
    let out = BufWriter::with_capacity(WRITE_BYTES, out);
    let mut writer = LayerWriter { out, names: HashMap::new(), bytes: 0, bytes_max, sockets: 0 };
    let root = open_directory(upper, b".").map_err(|error| at("open", b"", error))?;
    let stat = rustix::fs::fstat(&root).map_err(|error| at("look at", b"", error))?;
    let xattrs = writer.attributes(&root, b"")?;
    writer.entry(Kind::Directory, b"./", &[], 0, &stat, &xattrs.kept)?;
    writer.directory(&root, &mut Vec::new(), 0)?;
    tar::end(&mut writer.out).map_err(handing)?;
    Ok(match writer.sockets {
        0 => Vec::new(),
        count => vec![format!("{count} sockets that the commands left are not in the image")],
    })
}

fn handing(error: io::Error) -> Trouble {
    Trouble::of("hand the layer on", error)
}

/// Attributes of a file, without those of the overlay.
struct Attributes {
    kept: Vec<(Vec<u8>, Vec<u8>)>,
    is_opaque: bool,
}

struct LayerWriter<W: Write> {
    out: W,
    /// The first path of a file with more than one name.
    names: HashMap<(u64, u64), Vec<u8>>,
    bytes: u64,
    bytes_max: u64,
    sockets: u64,
}

impl<W: Write> LayerWriter<W> {
    /// Everything in a directory, names sorted, so that the same changes are the same layer.
    fn directory(
        &mut self,
        directory: &OwnedFd,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), Trouble> {
        if depth > DEPTH_MAX {
            let text = format!("the commands made directories more than {DEPTH_MAX} deep");
            return Err(Trouble::theirs(text));
        }
        let failed = |error| at("list", path, error);
        let mut names = Vec::new();
        for entry in Dir::read_from(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort();
        for name in names {
            let length = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            if name.starts_with(WHITEOUT) {
                return Err(Trouble::theirs(format!(
                    "a command made /{}: a layer cannot hold names that start with .wh.",
                    path.escape_ascii()
                )));
            }
            self.name(directory, &name, path, depth)?;
            path.truncate(length);
        }
        Ok(())
    }

    fn name(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), Trouble> {
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| at("look at", path, error))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let below = open_directory(directory.as_fd(), name)
                    .map_err(|error| at("open", path, error))?;
                let xattrs = self.attributes(&below, path)?;
                self.entry(Kind::Directory, path, &[], 0, &stat, &xattrs.kept)?;
                if xattrs.is_opaque {
                    self.mark(&[&path[..], b"/", OPAQUE_MARK].concat())?;
                }
                self.directory(&below, path, depth + 1)
            }
            FileType::CharacterDevice if stat.st_rdev == 0 => {
                let parent = &path[..path.len() - name.len()];
                self.mark(&[parent, WHITEOUT, name].concat())
            }
            FileType::RegularFile => self.file(directory, name, path, &stat),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(directory, name, Vec::new())
                    .map_err(|error| at("read", path, error))?;
                let xattrs = self.named_attributes(directory, name, path)?;
                if self.is_linked(path, &stat)? {
                    return Ok(());
                }
                self.entry(Kind::Symlink, path, target.to_bytes(), 0, &stat, &xattrs.kept)
            }
            FileType::Fifo => {
                let xattrs = self.named_attributes(directory, name, path)?;
                if self.is_linked(path, &stat)? {
                    return Ok(());
                }
                self.entry(Kind::Fifo, path, &[], 0, &stat, &xattrs.kept)
            }
            FileType::Socket => {
                self.sockets += 1;
                Ok(())
            }
            FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => {
                let text = format!("a command made the device /{}", path.escape_ascii());
                Err(Trouble::theirs(text))
            }
        }
    }

    fn file(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        path: &[u8],
        stat: &Stat,
    ) -> Result<(), Trouble> {
        if self.is_linked(path, stat)? {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = open(directory.as_fd(), name, flags).map_err(|error| at("open", path, error))?;
        let xattrs = self.attributes(&file, path)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.bytes_max {
            return Err(Trouble::theirs(format!(
                "the files that the commands made or changed have more than {} bytes, up to /{}",
                self.bytes_max,
                path.escape_ascii()
            )));
        }
        self.entry(Kind::File, path, &[], size, stat, &xattrs.kept)?;
        let mut contents = File::from(file).take(size);
        let copied =
            io::copy(&mut contents, &mut self.out).map_err(|error| at("read", path, error))?;
        if copied != size {
            return Err(at("read", path, io::Error::from(io::ErrorKind::UnexpectedEof)));
        }
        tar::pad(&mut self.out, size).map_err(handing)
    }

    /// Writes a link when the file was met before.
    fn is_linked(&mut self, path: &[u8], stat: &Stat) -> Result<bool, Trouble> {
        if stat.st_nlink < 2 {
            return Ok(false);
        }
        let key = (stat.st_dev, stat.st_ino);
        let Some(target) = self.names.get(&key).cloned() else {
            self.names.insert(key, path.to_vec());
            return Ok(false);
        };
        self.entry(Kind::HardLink, path, &target, 0, stat, &[])?;
        Ok(true)
    }

    fn entry(
        &mut self,
        kind: Kind,
        path: &[u8],
        target: &[u8],
        size_bytes: u64,
        stat: &Stat,
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), Trouble> {
        let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
        let entry = Entry {
            kind,
            path,
            target,
            size_bytes,
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: (stat.st_mtime, nanos),
            xattrs,
        };
        entry.write(&mut self.out).map_err(handing)
    }

    fn mark(&mut self, path: &[u8]) -> Result<(), Trouble> {
        Entry::mark(path).write(&mut self.out).map_err(handing)
    }

    fn attributes(&self, file: &OwnedFd, path: &[u8]) -> Result<Attributes, Trouble> {
        kept(
            path,
            |buffer| rustix::fs::flistxattr(file, buffer),
            |name, buffer| rustix::fs::fgetxattr(file, name, buffer),
        )
    }

    /// Of what cannot be opened without doing something.
    fn named_attributes(
        &self,
        directory: &OwnedFd,
        name: &[u8],
        path: &[u8],
    ) -> Result<Attributes, Trouble> {
        rustix::process::fchdir(directory).map_err(|error| at("enter", path, error))?;
        kept(
            path,
            |buffer| rustix::fs::llistxattr(name, buffer),
            |key, buffer| rustix::fs::lgetxattr(name, key, buffer),
        )
    }
}

/// The attributes of a file, sorted. The kernel gives capabilities of files in the form that they
/// have for root of this user namespace: version 2, as layers have them.
fn kept(
    path: &[u8],
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> rustix::io::Result<usize>,
) -> Result<Attributes, Trouble> {
    let failed = |error| at("read the attributes of", path, error);
    let mut names = vec![0; XATTR_BYTES_MAX];
    let mut found = Attributes { kept: Vec::new(), is_opaque: false };
    match list(&mut names) {
        Ok(length) => names.truncate(length),
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(found),
        Err(error) => return Err(failed(error)),
    }
    if names.is_empty() {
        return Ok(found);
    }
    let mut value = vec![0; XATTR_BYTES_MAX];
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let length = get(name, &mut value).map_err(failed)?;
        let value = &value[..length];
        if name == OPAQUE {
            found.is_opaque |= value == b"y";
        } else if !name.starts_with(OVERLAY) {
            found.kept.push((name.to_vec(), value.to_vec()));
        }
    }
    found.kept.sort();
    Ok(found)
}
