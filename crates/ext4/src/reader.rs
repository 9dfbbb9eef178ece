//! Reads ext4 images, trusting nothing in them.
//!
//! Shares the offsets and checksums of `format` with the writer and nothing else, so it can
//! judge what the writer made. Every structure is checked before use: checksums where the
//! image has them, ranges always. A damaged or hostile image gives an error, never a panic
//! and never an endless loop; what may grow with the image's own claims has a limit.
//!
//! It does not replay journals, knows no encryption, compression, inline data or block maps
//! from before extents, and never follows a symlink.

mod attributes;
mod error;
mod map;
mod names;
mod source;
mod verify;

pub use attributes::NodeXattr;
pub use error::ReadError;
pub use map::{Content, FileExtent};
pub use names::NodeEntry;
pub use source::ReadAt;
pub use verify::Verified;

use std::collections::HashSet;

use crate::format::{
    Checksum, GroupDescriptor, MAGIC, ROOT_INO, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock,
    decode_device, decode_time, descriptor_checksum, feature, get16, get32, index, inode_checksum,
    inode_flag, lo16, lo32, mode,
};
use crate::tree::Timestamp;

/// Enough for 128 TiB with blocks of 4 KiB; their descriptors take 64 MiB.
const GROUPS_MAX: u64 = 1 << 20;

/// An opened image: superblock and group descriptors are checked and kept.
pub struct Image<R> {
    source: R,
    superblock: Superblock,
    boot_area: [u8; SUPERBLOCK_OFFSET],
    block_size: u64,
    groups: Vec<GroupDescriptor>,
    /// The seed of all checksums, if the image has them.
    seed: Option<Checksum>,
}

/// What an inode of an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// One inode of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub ino: u32,
    /// What it is.
    pub kind: NodeKind,
    /// The low twelve mode bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Names that point here; for a directory with very many subdirectories 1.
    pub links: u16,
    /// Sectors of 512 bytes in use, maps and attributes included.
    pub sectors: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Last modification of the contents.
    pub mtime: Timestamp,
    /// Creation.
    pub crtime: Timestamp,
    flags: u32,
    generation: u32,
    map: [u8; 60],
    xattr_block: u64,
    inline_xattrs: Vec<u8>,
}

/// How far [`Image::walk`] goes before it gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkLimits {
    /// Names in all.
    pub names_max: u64,
    /// Directories within directories.
    pub depth_max: usize,
}

impl Default for WalkLimits {
    fn default() -> Self {
        Self { names_max: 1 << 24, depth_max: 4096 }
    }
}

impl<R: ReadAt> Image<R> {
    /// Opens an image: reads and checks the superblock and all group descriptors.
    ///
    /// # Errors
    /// If it cannot be read, is not ext4, has features this reader does not know, contradicts
    /// itself, or fails a checksum.
    pub fn open(source: R) -> Result<Self, ReadError> {
        let size = source.size_bytes().map_err(|source| ReadError::Io { offset: 0, source })?;
        if size < (SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE) as u64 {
            return Err(ReadError::NotExt4);
        }
        let mut boot_area = [0; SUPERBLOCK_OFFSET];
        read(&source, 0, &mut boot_area)?;
        let mut bytes = [0; SUPERBLOCK_SIZE];
        read(&source, SUPERBLOCK_OFFSET as u64, &mut bytes)?;
        if get16(&bytes, 0x38) != MAGIC {
            return Err(ReadError::NotExt4);
        }
        let superblock = Superblock::decode(&bytes);
        let has_checksums = superblock.ro_compat & feature::METADATA_CSUM != 0;
        if has_checksums {
            let sum = Checksum::START.and(&bytes[..0x3FC]).value();
            check("superblock", 0, sum == get32(&bytes, 0x3FC))?;
        }
        check_features(&superblock)?;
        let block_size = 1024_u64 << superblock.log_block_size;
        let descriptors = check_geometry(&superblock, block_size, size)?;
        let mut image = Self {
            source,
            boot_area,
            block_size,
            groups: Vec::new(),
            seed: has_checksums.then(|| Checksum::of_file_system(&superblock.uuid)),
            superblock,
        };
        image.groups = image.read_descriptors(descriptors)?;
        Ok(image)
    }

    fn read_descriptors(&self, count: u64) -> Result<Vec<GroupDescriptor>, ReadError> {
        let length = usize::from(self.descriptor_size());
        let mut bytes = vec![0; index(count) * length];
        let start = u64::from(self.superblock.first_data_block) + 1;
        read(&self.source, start * self.block_size, &mut bytes)?;
        let mut groups = Vec::with_capacity(index(count));
        for (group, record) in bytes.chunks_exact(length).enumerate() {
            let number = lo32(group as u64);
            if let Some(seed) = self.seed {
                let sum = descriptor_checksum(seed, number, record);
                check("group descriptor", number.into(), sum == get16(record, 0x1E))?;
            }
            let descriptor = GroupDescriptor::decode(record);
            let table =
                self.superblock.inodes_per_group as u64 * u64::from(self.superblock.inode_size);
            let ends = [
                descriptor.block_bitmap.checked_add(1),
                descriptor.inode_bitmap.checked_add(1),
                descriptor.inode_table.checked_add(table.div_ceil(self.block_size)),
            ];
            let is_inside =
                |end: Option<u64>| end.is_some_and(|e| e <= self.superblock.blocks_count);
            if !ends.into_iter().all(is_inside) {
                let problem = "it points outside of the file system";
                return Err(damaged("group descriptor", number.into(), problem));
            }
            groups.push(descriptor);
        }
        Ok(groups)
    }

    fn descriptor_size(&self) -> u16 {
        if self.superblock.incompat & feature::BIT64 == 0 {
            32
        } else {
            self.superblock.descriptor_size
        }
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The 1,024 bytes before the superblock.
    pub fn boot_area(&self) -> &[u8; 1024] {
        &self.boot_area
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// The root directory.
    ///
    /// # Errors
    /// As [`inode`](Self::inode), and if it is no directory.
    pub fn root(&self) -> Result<Node, ReadError> {
        let root = self.inode(ROOT_INO)?;
        if root.kind == NodeKind::Directory {
            Ok(root)
        } else {
            Err(ReadError::NotDirectory { ino: ROOT_INO })
        }
    }

    /// The inode `ino`.
    ///
    /// # Errors
    /// If there is no such inode, it is unused, damaged, or of a kind this reader does not
    /// know.
    pub fn inode(&self, ino: u32) -> Result<Node, ReadError> {
        let record = self.inode_record(ino)?;
        self.node(ino, &record)
    }

    /// The bytes of an inode, checksum checked unless they are all zero.
    fn inode_record(&self, ino: u32) -> Result<Vec<u8>, ReadError> {
        if ino == 0 || ino > self.superblock.inodes_count {
            return Err(damaged("inode", ino.into(), "there is no inode of that number"));
        }
        let per_group = self.superblock.inodes_per_group;
        let group = &self.groups[((ino - 1) / per_group) as usize];
        let within = u64::from((ino - 1) % per_group) * u64::from(self.superblock.inode_size);
        let mut record = vec![0; usize::from(self.superblock.inode_size)];
        read(&self.source, group.inode_table * self.block_size + within, &mut record)?;
        if let Some(seed) = self.seed.filter(|_| record.iter().any(|&b| b != 0)) {
            let sum = inode_checksum(seed, ino, &record);
            let has_high = record.len() > 128 && get16(&record, 0x80) >= 4;
            let is_right = lo16(sum) == get16(&record, 0x7C)
                && (!has_high || sum >> 16 == u32::from(get16(&record, 0x82)));
            check("inode", ino.into(), is_right)?;
        }
        Ok(record)
    }

    fn node(&self, ino: u32, record: &[u8]) -> Result<Node, ReadError> {
        let raw_mode = get16(record, 0x00);
        let flags = get32(record, 0x20);
        let device = decode_device(get32(record, 0x28), get32(record, 0x2C));
        let kind = match raw_mode & mode::TYPE {
            mode::DIRECTORY => NodeKind::Directory,
            mode::FILE => NodeKind::File,
            mode::SYMLINK => NodeKind::Symlink,
            mode::CHAR => NodeKind::CharDevice { major: device.0, minor: device.1 },
            mode::BLOCK => NodeKind::BlockDevice { major: device.0, minor: device.1 },
            mode::FIFO => NodeKind::Fifo,
            mode::SOCKET => NodeKind::Socket,
            _ => return Err(damaged("inode", ino.into(), "it is unused or of an unknown kind")),
        };
        if flags & (inode_flag::EA_INODE | inode_flag::INLINE_DATA) != 0 {
            return Err(ReadError::Unsupported {
                what: "inline data or attribute inodes",
                bits: flags,
            });
        }
        let extra = if record.len() > 128 { get16(record, 0x80) } else { 0 };
        let inline_at = 128 + usize::from(extra);
        if inline_at > record.len() || extra % 4 != 0 {
            return Err(damaged("inode", ino.into(), "its extra size is impossible"));
        }
        let time = |at: usize, extra_at: usize| {
            let has_extra = extra_at + 4 <= inline_at;
            let more = if has_extra { get32(record, extra_at) } else { 0 };
            let (secs, nanos) = decode_time(get32(record, at), more);
            Timestamp { secs, nanos }
        };
        let mut map = [0; 60];
        map.copy_from_slice(&record[0x28..0x64]);
        let wide = |low, high| u32::from(get16(record, low)) | u32::from(get16(record, high)) << 16;
        let sectors = u64::from(get32(record, 0x1C)) | u64::from(get16(record, 0x74)) << 32;
        let is_in_blocks = flags & inode_flag::HUGE_FILE != 0;
        let is_long = matches!(kind, NodeKind::File | NodeKind::Directory);
        let size_high = if is_long { get32(record, 0x6C) } else { 0 };
        Ok(Node {
            ino,
            kind,
            permissions: raw_mode & 0o7777,
            uid: wide(0x02, 0x78),
            gid: wide(0x18, 0x7A),
            size_bytes: u64::from(get32(record, 0x04)) | u64::from(size_high) << 32,
            links: get16(record, 0x1A),
            sectors: if is_in_blocks { sectors * (self.block_size / 512) } else { sectors },
            atime: time(0x08, 0x8C),
            ctime: time(0x0C, 0x84),
            mtime: time(0x10, 0x88),
            crtime: if inline_at >= 0x98 { time(0x90, 0x94) } else { Timestamp::default() },
            flags,
            generation: get32(record, 0x64),
            map,
            xattr_block: u64::from(get32(record, 0x68)) | u64::from(get16(record, 0x76)) << 32,
            inline_xattrs: record[inline_at..].to_vec(),
        })
    }

    /// The inode at `path`, whose components are separated by `/`. A symlink on the way is
    /// not followed: only directories have something below them.
    ///
    /// # Errors
    /// [`ReadError::NotFound`] if a component does not exist.
    pub fn lookup(&self, path: &[u8]) -> Result<Node, ReadError> {
        let mut node = self.root()?;
        for component in path.split(|&b| b == b'/').filter(|c| !c.is_empty()) {
            let mut found = None;
            self.for_each_entry(&node, |entry| {
                if entry.name == component {
                    found = Some(entry.ino);
                }
                Ok(())
            })?;
            let Some(ino) = found else {
                return Err(ReadError::NotFound { path: path.to_vec() });
            };
            node = self.inode(ino)?;
        }
        Ok(node)
    }

    /// Calls `visit` with the absolute path and the inode of everything in the image, parents
    /// first, names of a directory in the order of their bytes.
    ///
    /// # Errors
    /// What `visit` returns, damage, a directory that has two names, or a limit.
    pub fn walk<E: From<ReadError>>(
        &self,
        limits: WalkLimits,
        mut visit: impl FnMut(&[u8], &Node) -> Result<(), E>,
    ) -> Result<(), E> {
        let root = self.root()?;
        visit(b"/", &root)?;
        let mut path = Vec::new();
        let mut directories = HashSet::from([root.ino]);
        let mut names = 0;
        let mut stack = vec![(0, self.sorted_entries(&root, &mut names, limits)?.into_iter())];
        while let Some((length, entries)) = stack.last_mut() {
            path.truncate(*length);
            let Some(entry) = entries.next() else {
                stack.pop();
                continue;
            };
            path.push(b'/');
            path.extend_from_slice(&entry.name);
            let node = self.inode(entry.ino)?;
            visit(&path, &node)?;
            if node.kind != NodeKind::Directory {
                continue;
            }
            if !directories.insert(node.ino) {
                let problem = "the directory has more than one name";
                return Err(damaged("inode", node.ino.into(), problem).into());
            }
            if stack.len() >= limits.depth_max {
                let limit = limits.depth_max as u64;
                return Err(ReadError::Limit { what: "nested directories", limit }.into());
            }
            let entries = self.sorted_entries(&node, &mut names, limits)?;
            stack.push((path.len(), entries.into_iter()));
        }
        Ok(())
    }

    /// The names of one directory, as long as all names so far keep within the limit.
    fn sorted_entries(
        &self,
        node: &Node,
        names: &mut u64,
        limits: WalkLimits,
    ) -> Result<Vec<NodeEntry>, ReadError> {
        let mut entries: Vec<NodeEntry> = Vec::new();
        self.for_each_entry(node, |entry| {
            *names += 1;
            if *names > limits.names_max {
                return Err(ReadError::Limit { what: "names", limit: limits.names_max });
            }
            entries.push(entry.into());
            Ok(())
        })?;
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn inode_seed(&self, node: &Node) -> Option<Checksum> {
        self.seed.map(|seed| seed.of_inode(node.ino, node.generation))
    }

    /// Reads one block that must lie within the file system.
    fn block(&self, number: u64) -> Result<Vec<u8>, ReadError> {
        if number >= self.superblock.blocks_count {
            return Err(damaged("block", number, "it is outside of the file system"));
        }
        let mut bytes = vec![0; index(self.block_size)];
        read(&self.source, number * self.block_size, &mut bytes)?;
        Ok(bytes)
    }
}

fn read(source: &impl ReadAt, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
    source.read_at(offset, buffer).map_err(|source| ReadError::Io { offset, source })
}

fn check(what: &'static str, number: u64, is_right: bool) -> Result<(), ReadError> {
    if is_right { Ok(()) } else { Err(ReadError::Checksum { what, number }) }
}

fn damaged(what: &'static str, number: u64, problem: &'static str) -> ReadError {
    ReadError::Damaged { what, number, problem }
}

fn check_features(superblock: &Superblock) -> Result<(), ReadError> {
    const KNOWN: u32 = feature::FILETYPE | feature::EXTENTS | feature::BIT64 | feature::FLEX_BG;
    const BIGALLOC: u32 = 0x200;
    if superblock.incompat & feature::RECOVER != 0 {
        return Err(ReadError::JournalNotReplayed);
    }
    let needed = feature::FILETYPE | feature::EXTENTS;
    if superblock.incompat & !KNOWN != 0 || superblock.incompat & needed != needed {
        return Err(ReadError::Unsupported {
            what: "incompatible features",
            bits: superblock.incompat,
        });
    }
    if superblock.ro_compat & BIGALLOC != 0 {
        return Err(ReadError::Unsupported { what: "clusters", bits: superblock.ro_compat });
    }
    if superblock.log_block_size > 2 {
        let bits = superblock.log_block_size;
        return Err(ReadError::Unsupported { what: "blocks of more than 4 KiB", bits });
    }
    Ok(())
}

/// Whether the numbers of the superblock can be true; how many groups they make.
fn check_geometry(s: &Superblock, block_size: u64, size: u64) -> Result<u64, ReadError> {
    let bits = block_size * 8;
    let first = u64::from(s.first_data_block);
    let per_group = u64::from(s.inodes_per_group);
    let descriptor_is_right =
        s.incompat & feature::BIT64 == 0 || (s.descriptor_size == 64 || s.descriptor_size == 128);
    let is_possible = u64::from(s.blocks_per_group) == bits
        && first == u64::from(block_size == 1024)
        && s.blocks_count > first
        && s.free_blocks <= s.blocks_count
        && s.free_inodes <= s.inodes_count
        && s.blocks_count.checked_mul(block_size).is_some_and(|bytes| bytes <= size)
        && (1..=bits).contains(&per_group)
        && s.inode_size.is_power_of_two()
        && (128..=block_size).contains(&u64::from(s.inode_size))
        && descriptor_is_right;
    let groups = (s.blocks_count - first.min(s.blocks_count)).div_ceil(bits);
    if groups > GROUPS_MAX {
        return Err(ReadError::Limit { what: "groups", limit: GROUPS_MAX });
    }
    if !is_possible || groups * per_group != u64::from(s.inodes_count) {
        return Err(damaged(
            "superblock",
            0,
            "its numbers contradict each other or the file's size",
        ));
    }
    Ok(groups)
}
