//! The unpacker: the image's tree out of its layer packs into one directory.
//!
//! It runs confined ([`sandbox::confine_to`]), with users of its own, and reaches nothing but that
//! directory. It opens names one component at a time and never through a symbolic link. Nothing
//! but it writes there meanwhile.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use ext4::{Inode, InodeId, Kind, Tree as _};
use rootfs::{BLOCK_BYTES, FileTree, Folder, Pack, ReadAt};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use sandbox::{Access, Users};

use crate::order::{self, PackPart, Trouble, UnpackOrder};

pub(crate) const ROLE: &str = "unpack";
/// The tree itself.
pub(crate) const LOWER: &str = "lower";
/// An empty directory that looks like its root: for what changes.
pub(crate) const UPPER: &str = "upper";
/// Directories that the runtime mounts something on. Made where the image has none, so that the
/// runtime does not make them in the name of the commands.
pub(crate) const MOUNT_POINTS: [&str; 2] = ["dev", "proc"];
const COPY_BYTES: usize = 1 << 20;

/// The whole life of the process: the directory is its first file, those of the packs follow.
pub(crate) fn main() -> io::Result<()> {
    let order: UnpackOrder = order::receive(io::stdin().lock())?;
    let mut files = order::take(1 + order.files)?;
    let packs = files.split_off(1);
    let directory = &files[0];
    order::confine(directory, Access::Fill, files.len() + packs.len())?;
    order::say_end(unpack(&order, directory, &packs))
}

fn unpack(order: &UnpackOrder, directory: &File, files: &[File]) -> Result<Vec<String>, Trouble> {
    let missing = || Trouble::ours("a layer pack was not handed over");
    let mut folder = Folder::new(&order.tree_limits);
    let mut regions = Vec::with_capacity(order.packs.len());
    for PackPart { file, base, length } in order.packs.iter().cloned() {
        let region = Region { file: files.get(file).ok_or_else(missing)?, base };
        let pack = Pack::open(&region, length)
            .map_err(|error| Trouble::ours(format!("cannot read a layer pack: {error}")))?;
        folder.add(&pack).map_err(|error| Trouble::theirs(error.to_string()))?;
        regions.push(region);
    }
    let tree = folder.finish().map_err(|error| Trouble::theirs(error.to_string()))?;
    let mut unpacker = Unpacker {
        tree: &tree,
        regions,
        names: HashMap::new(),
        lower: None,
        buffer: vec![0; COPY_BYTES],
        skipped_attributes: 0,
    };
    unpacker.run(directory.as_fd())?;
    Ok(unpacker.warnings())
}

/// A pack within its file.
struct Region<'a> {
    file: &'a File,
    base: u64,
}

impl ReadAt for Region<'_> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let at = self.base.checked_add(offset).ok_or(io::ErrorKind::UnexpectedEof)?;
        FileExt::read_exact_at(self.file, buffer, at)
    }
}

struct Unpacker<'a> {
    tree: &'a FileTree,
    regions: Vec<Region<'a>>,
    /// The first path of files that have more.
    names: HashMap<InodeId, Vec<u8>>,
    lower: Option<OwnedFd>,
    buffer: Vec<u8>,
    skipped_attributes: u64,
}

impl Unpacker<'_> {
    fn run(&mut self, directory: BorrowedFd<'_>) -> Result<(), Trouble> {
        let failed = |error| Trouble::of("make the directory of the image", error);
        for name in [LOWER, UPPER] {
            rustix::fs::mkdirat(directory, name, Mode::RWXU).map_err(failed)?;
        }
        let lower = open_directory(directory, LOWER.as_bytes()).map_err(failed)?;
        self.lower = Some(lower.try_clone().map_err(failed_io("open the image's root"))?);
        for name in MOUNT_POINTS {
            match self.tree.lookup(name.as_bytes()).map(|id| self.tree.inode(id).kind) {
                Some(Kind::Directory) => {}
                // The runtime would follow a link, out of the tree as well.
                Some(_) => {
                    return Err(Trouble::theirs(format!(
                        "/{name} of the image is no directory: an image with commands needs one \
                         there, or nothing, as /dev and /proc of the commands are mounted on it"
                    )));
                }
                None => {
                    rustix::fs::mkdirat(&lower, name, Mode::from_raw_mode(0o755)).map_err(failed)?
                }
            }
        }
        self.fill(InodeId::ROOT, &lower, &mut Vec::new())?;
        let root = self.tree.inode(InodeId::ROOT);
        self.dress(&root, lower.as_fd(), b"")?;
        let upper = open_directory(directory, UPPER.as_bytes()).map_err(failed)?;
        self.dress(&root, upper.as_fd(), b"")
    }

    /// Makes what is in a directory; the depth was bounded when the tree was made.
    fn fill(
        &mut self,
        id: InodeId,
        directory: &OwnedFd,
        path: &mut Vec<u8>,
    ) -> Result<(), Trouble> {
        let tree = self.tree;
        for entry in tree.entries(id) {
            let length = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(entry.name);
            let inode = tree.inode(entry.inode);
            if inode.kind == Kind::Directory {
                let failed = |error| at("make", path, error);
                let mode = Mode::RWXU;
                rustix::fs::mkdirat(directory, entry.name, mode).map_err(failed)?;
                let below = open_directory(directory.as_fd(), entry.name).map_err(failed)?;
                self.fill(entry.inode, &below, path)?;
                self.dress(&inode, below.as_fd(), path)?;
            } else {
                self.make(entry.inode, &inode, directory, entry.name, path)?;
            }
            path.truncate(length);
        }
        Ok(())
    }

    fn make(
        &mut self,
        id: InodeId,
        inode: &Inode<'_>,
        directory: &OwnedFd,
        name: &[u8],
        path: &[u8],
    ) -> Result<(), Trouble> {
        let failed = |error| at("make", path, error);
        if let Some(known) = self.names.get(&id) {
            let Some(lower) = &self.lower else { return Ok(()) };
            return rustix::fs::linkat(lower, known.as_slice(), directory, name, AtFlags::empty())
                .map_err(failed);
        }
        match inode.kind {
            Kind::File { size_bytes } => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let file =
                    open(directory.as_fd(), name, flags | OFlags::NOFOLLOW).map_err(failed)?;
                let file = File::from(file);
                self.copy(id, size_bytes, &file).map_err(|error| at("write", path, error))?;
                self.dress(inode, file.as_fd(), path)?;
            }
            Kind::Symlink { target } => {
                rustix::fs::symlinkat(target, directory, name).map_err(failed)?;
                self.dress_name(inode, directory, name, path)?;
            }
            Kind::Fifo => {
                rustix::fs::mknodat(directory, name, FileType::Fifo, Mode::RUSR, 0)
                    .map_err(failed)?;
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fifo = open(directory.as_fd(), name, flags).map_err(failed)?;
                self.dress(inode, fifo.as_fd(), path)?;
            }
            // The image keeps its own, from its layers; commands have the runtime's.
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Socket => return Ok(()),
            Kind::Directory => {}
        }
        if inode.links > 1 {
            self.names.insert(id, path.to_vec());
        }
        Ok(())
    }

    fn copy(&mut self, id: InodeId, size_bytes: u64, file: &File) -> io::Result<()> {
        for run in self.tree.runs(id) {
            let region = usize::try_from(run.region).ok().and_then(|at| self.regions.get(at));
            let region = region.ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut to = run.file_block * BLOCK_BYTES;
            let mut from = run.region_block * BLOCK_BYTES;
            let end = (to + run.blocks * BLOCK_BYTES).min(size_bytes);
            while to < end {
                let most = usize::try_from(end - to).unwrap_or(COPY_BYTES).min(COPY_BYTES);
                let piece = &mut self.buffer[..most];
                region.read_exact_at(piece, from)?;
                file.write_all_at(piece, to)?;
                to += most as u64;
                from += most as u64;
            }
        }
        file.set_len(size_bytes)
    }

    /// Owner, mode, attributes and time of something that is open.
    fn dress(
        &mut self,
        inode: &Inode<'_>,
        file: BorrowedFd<'_>,
        path: &[u8],
    ) -> Result<(), Trouble> {
        let (uid, gid) = owner(inode, path)?;
        rustix::fs::fchown(file, Some(uid), Some(gid))
            .map_err(|error| at("give away", path, error))?;
        // Behind the change of owner, which takes set-id bits away.
        let mode = Mode::from_raw_mode(u32::from(inode.permissions));
        rustix::fs::fchmod(file, mode).map_err(|error| at("set the mode of", path, error))?;
        for xattr in inode.xattrs.into_iter().flat_map(|set| self.tree.xattrs(set)) {
            match rustix::fs::fsetxattr(file, xattr.name, xattr.value, XattrFlags::empty()) {
                Ok(()) => {}
                Err(error) if is_refused(error) => self.skipped_attributes += 1,
                Err(error) => return Err(at("set an attribute of", path, error)),
            }
        }
        rustix::fs::futimens(file, &times(inode))
            .map_err(|error| at("set the time of", path, error))
    }

    /// The same for a symbolic link, which cannot be opened.
    fn dress_name(
        &mut self,
        inode: &Inode<'_>,
        directory: &OwnedFd,
        name: &[u8],
        path: &[u8],
    ) -> Result<(), Trouble> {
        let (uid, gid) = owner(inode, path)?;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(directory, name, Some(uid), Some(gid), flags)
            .map_err(|error| at("give away", path, error))?;
        if let Some(set) = inode.xattrs {
            let failed = |error| at("set an attribute of", path, error);
            rustix::process::fchdir(directory).map_err(failed)?;
            for xattr in self.tree.xattrs(set) {
                match rustix::fs::lsetxattr(name, xattr.name, xattr.value, XattrFlags::empty()) {
                    Ok(()) => {}
                    Err(error) if is_refused(error) => self.skipped_attributes += 1,
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        rustix::fs::utimensat(directory, name, &times(inode), flags)
            .map_err(|error| at("set the time of", path, error))
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.skipped_attributes > 0 {
            warnings.push(format!(
                "commands do not see {} extended attributes that only the host's root may set; a \
                 file that a command changes loses them",
                self.skipped_attributes
            ));
        }
        warnings
    }
}

/// `trusted.*`, and what a security module keeps to itself, need rights on the host.
fn is_refused(error: rustix::io::Errno) -> bool {
    matches!(error, rustix::io::Errno::PERM | rustix::io::Errno::OPNOTSUPP)
}

fn owner(inode: &Inode<'_>, path: &[u8]) -> Result<(Uid, Gid), Trouble> {
    for id in [inode.uid, inode.gid] {
        if id >= Users::COUNT {
            return Err(Trouble::theirs(format!(
                "/{} belongs to the user or group {id}: an image with commands may have numbers \
                 below {}",
                path.escape_ascii(),
                Users::COUNT
            )));
        }
    }
    Ok((Uid::from_raw(inode.uid), Gid::from_raw(inode.gid)))
}

fn times(inode: &Inode<'_>) -> Timestamps {
    let time = Timespec { tv_sec: inode.mtime.secs, tv_nsec: i64::from(inode.mtime.nanos) };
    Timestamps { last_access: time, last_modification: time }
}

/// Opens or makes one component of a path, never a link and never outside.
pub(crate) fn open(
    directory: BorrowedFd<'_>,
    name: &[u8],
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let mode = if flags.contains(OFlags::CREATE) { Mode::RUSR | Mode::WUSR } else { Mode::empty() };
    rustix::fs::openat2(directory, name, flags, mode, resolve)
}

pub(crate) fn open_directory(
    directory: BorrowedFd<'_>,
    name: &[u8],
) -> rustix::io::Result<OwnedFd> {
    open(directory, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC)
}

fn failed_io(action: &'static str) -> impl Fn(io::Error) -> Trouble {
    move |error| Trouble::of(action, error)
}

pub(crate) fn at(action: &str, path: &[u8], error: impl Into<io::Error>) -> Trouble {
    Trouble::of(&format!("{action} /{}", path.escape_ascii()), error)
}
