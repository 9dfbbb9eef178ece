//! Nodes become bytes: superblocks, descriptors, bitmaps, inodes, directories, attributes,
//! links and the journal, each at the place the plan gave it.
//!
//! Contents of files are not written here: the caller moves them. The walk over inodes is
//! the one the survey made, and every cursor advances as it was counted there.

use crate::directory::{self, Identity, Name, file_type};
use crate::error::WriteError;
use crate::extent::{self, Extent, tree_blocks};
use crate::format::{
    BLOCK, BLOCK_SIZE, BLOCKS_PER_GROUP, Block, Checksum, DESCRIPTOR_SIZE, ERRORS_REMOUNT_RO,
    EXTRA_ISIZE, FIRST_INO, FLAG_UNSIGNED_HASH, GroupDescriptor, HASH_HALF_MD4, INLINE_XATTR_BYTES,
    INLINE_XATTR_OFFSET, INODE_SIZE, JOURNAL_INO, LINKS_MAX, MOUNT_XATTR_AND_ACL, RESIZE_INO,
    ROOT_INO, SUPERBLOCK_OFFSET, Superblock, XATTR_REFS_MAX, encode_device, encode_time, feature,
    group_flag, hi16, hi32, index, inode_checksum, inode_flag, lo16, lo32, mode, put16, put32,
};
use crate::geometry::Span;
use crate::journal;
use crate::layout::{Layout, area_extents, journal_blocks};
use crate::output::{Output, Stream};
use crate::survey::{LONG_SYMLINK, LOST_FOUND, LOST_FOUND_BLOCKS};
use crate::tree::{InodeId, Kind, Timestamp, Tree};
use crate::xattr;

/// Sectors of 512 bytes in a block, the unit of `i_blocks`.
const SECTORS: u64 = 8;
/// Block numbers in an indirect block.
const ADDRESSES: u64 = 1024;
/// 2^4 groups make a flexible group, as `mke2fs` chooses.
const LOG_GROUPS_PER_FLEX: u8 = 4;

impl Layout {
    /// Writes every block of metadata; blocks of zeroes are left out, so the output must
    /// start as one hole of [`size_bytes`](Self::size_bytes).
    ///
    /// # Errors
    /// If the output fails, or `tree` is not the planned one.
    pub fn write<T: Tree>(&self, tree: &T, out: &mut impl Output) -> Result<(), WriteError> {
        let seed = Checksum::of_file_system(&self.options.uuid);
        let writer = Writer { layout: self, tree, seed };
        let journal_map = writer.write_inodes(out)?;
        writer.write_directories(out)?;
        writer.write_xattrs(out)?;
        writer.write_resize_blocks(out)?;
        writer.write_journal(out)?;
        writer.write_groups(out, &journal_map)
    }
}

struct Writer<'a, T> {
    layout: &'a Layout,
    tree: &'a T,
    seed: Checksum,
}

/// What an inode record says.
struct Record {
    mode: u16,
    uid: u32,
    gid: u32,
    size: u64,
    links: u16,
    /// Blocks in use: contents, maps and attributes.
    blocks: u64,
    flags: u32,
    /// Four extents, a short link, or a device number.
    map: [u8; 60],
    xattr_block: u64,
    time: Timestamp,
    inline_xattrs: Option<[u8; INLINE_XATTR_BYTES]>,
}

impl Record {
    fn hidden(mode: u16, time: Timestamp) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            links: 1,
            blocks: 0,
            flags: 0,
            map: [0; 60],
            xattr_block: 0,
            time,
            inline_xattrs: None,
        }
    }

    fn encode(&self, ino: u32, seed: Checksum) -> [u8; INODE_SIZE] {
        let mut b = [0; INODE_SIZE];
        let sectors = self.blocks * SECTORS;
        let (secs, extra) = encode_time(self.time.secs, self.time.nanos);
        put16(&mut b, 0x00, self.mode);
        put16(&mut b, 0x02, lo16(self.uid));
        put32(&mut b, 0x04, lo32(self.size));
        for at in [0x08, 0x0C, 0x10, 0x90] {
            put32(&mut b, at, secs);
        }
        put16(&mut b, 0x18, lo16(self.gid));
        put16(&mut b, 0x1A, self.links);
        put32(&mut b, 0x1C, lo32(sectors));
        put32(&mut b, 0x20, self.flags);
        b[0x28..0x64].copy_from_slice(&self.map);
        put32(&mut b, 0x68, lo32(self.xattr_block));
        put32(&mut b, 0x6C, hi32(self.size));
        put16(&mut b, 0x74, lo16(hi32(sectors)));
        put16(&mut b, 0x76, extent::high_half(self.xattr_block));
        put16(&mut b, 0x78, hi16(self.uid));
        put16(&mut b, 0x7A, hi16(self.gid));
        put16(&mut b, 0x80, EXTRA_ISIZE);
        for at in [0x84, 0x88, 0x8C, 0x94] {
            put32(&mut b, at, extra);
        }
        if let Some(xattrs) = &self.inline_xattrs {
            b[INLINE_XATTR_OFFSET..].copy_from_slice(xattrs);
        }
        let sum = inode_checksum(seed, ino, &b);
        put16(&mut b, 0x7C, lo16(sum));
        put16(&mut b, 0x82, hi16(sum));
        b
    }
}

/// How far the walk over inodes has come in each area, and what it has buffered.
struct Cursors {
    directory: usize,
    directory_block: u64,
    extent_block: u64,
    symlink_block: u64,
    /// References given out so far, by shared set.
    xattr_references: Vec<u32>,
    inodes: Stream,
    extents: Stream,
    symlinks: Stream,
}

impl<T: Tree> Writer<'_, T> {
    fn time(&self, time: Timestamp) -> Timestamp {
        self.layout.options.clamped(time)
    }

    fn created(&self) -> Timestamp {
        self.time(self.layout.options.created)
    }

    /// Writes all inodes, the extent trees and the long links; gives the journal's map.
    fn write_inodes(&self, out: &mut impl Output) -> Result<[u8; 60], WriteError> {
        let mut cursors = Cursors {
            directory: 0,
            directory_block: 0,
            extent_block: 0,
            symlink_block: 0,
            xattr_references: vec![0; self.layout.survey.shared_sets.len()],
            inodes: Stream::new(),
            extents: Stream::new(),
            symlinks: Stream::new(),
        };
        let lost_found = if self.layout.survey.makes_lost_found {
            Some(self.lost_found(&mut cursors, out)?)
        } else {
            None
        };
        let mut order = self.layout.survey.order.iter();
        let mut journal_map = [0; 60];
        for ino in 1..FIRST_INO {
            let record = match ino {
                ROOT_INO => match order.next() {
                    Some(&root) => Some(self.node(root, ino, &mut cursors, out)?),
                    None => None,
                },
                RESIZE_INO => Some(self.resize_inode()),
                JOURNAL_INO if self.layout.options.journal => {
                    let record = self.journal_inode(&mut cursors, out)?;
                    journal_map = record.map;
                    Some(record)
                }
                _ => None,
            };
            let bytes = record.map_or([0; INODE_SIZE], |record| record.encode(ino, self.seed));
            self.put_inode(&mut cursors, out, ino, &bytes)?;
        }
        if let Some(record) = lost_found {
            let bytes = record.encode(FIRST_INO, self.seed);
            self.put_inode(&mut cursors, out, FIRST_INO, &bytes)?;
        }
        for &id in order {
            let ino = self.layout.survey.number(id);
            let record = self.node(id, ino, &mut cursors, out)?;
            self.put_inode(&mut cursors, out, ino, &record.encode(ino, self.seed))?;
        }
        cursors.inodes.flush(out)?;
        cursors.extents.flush(out)?;
        cursors.symlinks.flush(out)?;
        Ok(journal_map)
    }

    fn put_inode(
        &self,
        cursors: &mut Cursors,
        out: &mut impl Output,
        ino: u32,
        record: &[u8; INODE_SIZE],
    ) -> Result<(), WriteError> {
        let plan = &self.layout.plan;
        let at = u64::from(ino - 1);
        let group = at / plan.geometry.inodes_per_group;
        let within = at % plan.geometry.inodes_per_group;
        let table = plan.areas.inode_tables[index(group)];
        let offset = table * BLOCK_SIZE + within * INODE_SIZE as u64;
        cursors.inodes.push(out, offset, record)
    }

    fn node(
        &self,
        id: InodeId,
        ino: u32,
        cursors: &mut Cursors,
        out: &mut impl Output,
    ) -> Result<Record, WriteError> {
        let inode = self.tree.inode(id);
        let mut record = Record::hidden(0, self.time(inode.mtime));
        record.uid = inode.uid;
        record.gid = inode.gid;
        record.links = lo16(inode.links);
        let kind_mode = match inode.kind {
            Kind::Directory => {
                self.fill_directory(id, ino, &mut record, cursors, out)?;
                mode::DIRECTORY
            }
            Kind::File { size_bytes } => {
                let extents: Vec<_> = self.layout.plan.file_extents(self.tree, id).collect();
                record.size = size_bytes;
                self.map_blocks(ino, &extents, &mut record, cursors, out)?;
                mode::FILE
            }
            Kind::Symlink { target } => {
                record.size = target.len() as u64;
                if target.len() < LONG_SYMLINK {
                    record.map[..target.len()].copy_from_slice(target);
                } else {
                    self.write_target((id, ino), target, &mut record, cursors, out)?;
                }
                mode::SYMLINK
            }
            Kind::CharDevice { major, minor } => {
                put_device(&mut record.map, major, minor);
                mode::CHAR
            }
            Kind::BlockDevice { major, minor } => {
                put_device(&mut record.map, major, minor);
                mode::BLOCK
            }
            Kind::Fifo => mode::FIFO,
            Kind::Socket => mode::SOCKET,
        };
        record.mode = kind_mode | inode.permissions & 0o7777;
        if let Some(set) = inode.xattrs {
            self.fill_xattrs(id, set, &mut record, cursors)?;
        }
        Ok(record)
    }

    /// Stores the map of a file's blocks, with tree blocks where four extents do not do.
    fn map_blocks(
        &self,
        ino: u32,
        extents: &[Extent],
        record: &mut Record,
        cursors: &mut Cursors,
        out: &mut impl Output,
    ) -> Result<(), WriteError> {
        let seed = self.seed.of_inode(ino, 0);
        let area = &self.layout.plan.areas.extents;
        let first = cursors.extent_block;
        let stream = &mut cursors.extents;
        record.flags |= inode_flag::EXTENTS;
        record.map = extent::build(
            extents,
            seed,
            |n| area.block(first + n),
            |block, bytes| stream.push(out, block * BLOCK_SIZE, bytes),
        )?;
        let tree_blocks = tree_blocks(extents.len() as u64);
        cursors.extent_block += tree_blocks;
        record.blocks += extents.iter().map(|e| e.blocks).sum::<u64>() + tree_blocks;
        Ok(())
    }

    fn fill_directory(
        &self,
        id: InodeId,
        ino: u32,
        record: &mut Record,
        cursors: &mut Cursors,
        out: &mut impl Output,
    ) -> Result<(), WriteError> {
        let directory = self.layout.survey.directories.get(cursors.directory);
        let Some(directory) = directory.filter(|d| d.inode == id) else {
            return Err(WriteError::TreeChanged { inode: id });
        };
        cursors.directory += 1;
        let links = directory.subdirectories.saturating_add(2);
        record.links = if links > LINKS_MAX { 1 } else { lo16(links) };
        if directory.blocks > 1 {
            record.flags |= inode_flag::INDEX;
        }
        self.map_directory(ino, directory.blocks, record, cursors, out)
    }

    fn map_directory(
        &self,
        ino: u32,
        blocks: u64,
        record: &mut Record,
        cursors: &mut Cursors,
        out: &mut impl Output,
    ) -> Result<(), WriteError> {
        let area = &self.layout.plan.areas.directories;
        let extents: Vec<_> = area_extents(area, cursors.directory_block, blocks).collect();
        cursors.directory_block += blocks;
        record.size = blocks * BLOCK_SIZE;
        self.map_blocks(ino, &extents, record, cursors, out)
    }

    fn lost_found(
        &self,
        cursors: &mut Cursors,
        out: &mut impl Output,
    ) -> Result<Record, WriteError> {
        let mut record = Record::hidden(mode::DIRECTORY | 0o700, self.created());
        record.links = 2;
        self.map_directory(FIRST_INO, LOST_FOUND_BLOCKS, &mut record, cursors, out)?;
        Ok(record)
    }

    fn write_target(
        &self,
        (id, ino): (InodeId, u32),
        target: &[u8],
        record: &mut Record,
        cursors: &mut Cursors,
        out: &mut impl Output,
    ) -> Result<(), WriteError> {
        if target.len() >= BLOCK {
            return Err(WriteError::TreeChanged { inode: id });
        }
        let start = self.layout.plan.areas.symlinks.block(cursors.symlink_block);
        cursors.symlink_block += 1;
        let mut block = [0; BLOCK];
        block[..target.len()].copy_from_slice(target);
        cursors.symlinks.push(out, start * BLOCK_SIZE, &block)?;
        let extent = Extent { file_block: 0, start, blocks: 1 };
        self.map_blocks(ino, &[extent], record, cursors, out)
    }

    fn fill_xattrs(
        &self,
        id: InodeId,
        set: crate::tree::XattrSetId,
        record: &mut Record,
        cursors: &mut Cursors,
    ) -> Result<(), WriteError> {
        let encoded = xattr::encode(self.tree.xattrs(set))
            .map_err(|_| WriteError::TreeChanged { inode: id })?;
        record.inline_xattrs = encoded.inline;
        let Some(place) = self.layout.survey.shared_set(set) else { return Ok(()) };
        let shared = &self.layout.survey.shared_sets[place];
        let references = &mut cursors.xattr_references[place];
        let nth = u64::from(*references / XATTR_REFS_MAX);
        *references += 1;
        record.xattr_block = self.layout.plan.areas.xattrs.block(shared.first_block + nth);
        record.blocks += 1;
        Ok(())
    }

    fn resize_inode(&self) -> Record {
        let geometry = &self.layout.plan.geometry;
        let backups = geometry.groups_with_backup().count() as u64;
        let mut record = Record::hidden(mode::FILE | 0o600, self.created());
        record.size = (ADDRESSES * ADDRESSES + ADDRESSES + 12) * BLOCK_SIZE;
        record.blocks = 1 + geometry.reserved_blocks * backups;
        put32(&mut record.map, 13 * 4, lo32(self.layout.plan.areas.resize.block(0)));
        record
    }

    fn journal_inode(
        &self,
        cursors: &mut Cursors,
        out: &mut impl Output,
    ) -> Result<Record, WriteError> {
        let area = &self.layout.plan.areas.journal;
        let extents: Vec<_> = area_extents(area, 0, area.blocks()).collect();
        let mut record = Record::hidden(mode::FILE | 0o600, self.created());
        record.size = area.blocks() * BLOCK_SIZE;
        self.map_blocks(JOURNAL_INO, &extents, &mut record, cursors, out)?;
        Ok(record)
    }

    fn write_directories(&self, out: &mut impl Output) -> Result<(), WriteError> {
        let survey = &self.layout.survey;
        let area = &self.layout.plan.areas.directories;
        let mut stream = Stream::new();
        let mut next = 0;
        if survey.makes_lost_found {
            let seed = self.seed.of_inode(FIRST_INO, 0);
            let identity = Identity { ino: FIRST_INO, parent: ROOT_INO, seed };
            for n in 0..LOST_FOUND_BLOCKS {
                let block = directory::write_empty(identity, n);
                stream.push(out, area.block(n) * BLOCK_SIZE, &block)?;
            }
            next += LOST_FOUND_BLOCKS;
        }
        for directory in &survey.directories {
            let changed = || WriteError::TreeChanged { inode: directory.inode };
            let ino = survey.number(directory.inode);
            let seed = self.seed.of_inode(ino, 0);
            let identity = Identity { ino, parent: directory.parent_ino, seed };
            let end = next + directory.blocks;
            let mut emit = |block: &Block| {
                if next >= end {
                    return Err(changed());
                }
                let at = area.block(next) * BLOCK_SIZE;
                next += 1;
                stream.push(out, at, block)
            };
            if directory.blocks == 1 {
                let entries = self.names(directory.inode).map(|n| n.name.len());
                if !directory::is_linear(entries.map(directory::entry_bytes).sum()) {
                    return Err(changed());
                }
                emit(&directory::write_linear(identity, self.names(directory.inode)))?;
            } else {
                let names: Vec<_> = self.names(directory.inode).collect();
                let hash_seed = &self.layout.options.hash_seed;
                directory::write_indexed(identity, &names, hash_seed, emit)?
                    .map_err(|_| changed())?;
            }
            if next != end {
                return Err(changed());
            }
        }
        stream.flush(out)
    }

    /// The names of a directory with the numbers and types they point to.
    fn names(&self, directory: InodeId) -> impl Iterator<Item = Name<'_>> {
        let survey = &self.layout.survey;
        let is_made = directory == InodeId::ROOT && survey.makes_lost_found;
        let made = is_made.then_some(Name {
            name: LOST_FOUND,
            ino: FIRST_INO,
            file_type: file_type::DIRECTORY,
        });
        let entries = self.tree.entries(directory).map(|entry| Name {
            name: entry.name,
            ino: survey.number(entry.inode),
            file_type: match self.tree.inode(entry.inode).kind {
                Kind::Directory => file_type::DIRECTORY,
                Kind::File { .. } => file_type::FILE,
                Kind::Symlink { .. } => file_type::SYMLINK,
                Kind::CharDevice { .. } => file_type::CHAR,
                Kind::BlockDevice { .. } => file_type::BLOCK,
                Kind::Fifo => file_type::FIFO,
                Kind::Socket => file_type::SOCKET,
            },
        });
        made.into_iter().chain(entries)
    }

    fn write_xattrs(&self, out: &mut impl Output) -> Result<(), WriteError> {
        let area = &self.layout.plan.areas.xattrs;
        let mut stream = Stream::new();
        for shared in &self.layout.survey.shared_sets {
            let encoded = xattr::encode(self.tree.xattrs(shared.set)).ok();
            let Some(mut block) = encoded.and_then(|e| e.block) else {
                return Err(WriteError::TreeChanged { inode: InodeId::ROOT });
            };
            let mut left = shared.references;
            let mut at = shared.first_block;
            while left > 0 {
                let references = left.min(XATTR_REFS_MAX);
                let number = area.block(at);
                xattr::seal(&mut block, self.seed, number, references);
                stream.push(out, number * BLOCK_SIZE, &block[..])?;
                left -= references;
                at += 1;
            }
        }
        stream.flush(out)
    }

    /// The resize inode maps the reserved descriptor blocks: those of the first group are
    /// indirect blocks that list the copies in the groups with backups.
    fn write_resize_blocks(&self, out: &mut impl Output) -> Result<(), WriteError> {
        let plan = &self.layout.plan;
        let geometry = &plan.geometry;
        let mut stream = Stream::new();
        let mut double = [0; BLOCK];
        for n in 0..geometry.reserved_blocks {
            let within = 1 + geometry.descriptor_blocks + n;
            let slot = (geometry.descriptor_blocks + n) % ADDRESSES;
            put32(&mut double, index(slot) * 4, lo32(within));
            let mut copies = [0; BLOCK];
            for (at, group) in geometry.groups_with_backup().skip(1).enumerate() {
                put32(&mut copies, at * 4, lo32(group * BLOCKS_PER_GROUP + within));
            }
            stream.push(out, within * BLOCK_SIZE, &copies)?;
        }
        stream.push(out, plan.areas.resize.block(0) * BLOCK_SIZE, &double)?;
        stream.flush(out)
    }

    fn write_journal(&self, out: &mut impl Output) -> Result<(), WriteError> {
        if !self.layout.options.journal {
            return Ok(());
        }
        let plan = &self.layout.plan;
        let block = journal::superblock(journal_blocks(plan), &self.layout.options.uuid);
        let mut stream = Stream::new();
        stream.push(out, plan.areas.journal.block(0) * BLOCK_SIZE, &block)?;
        stream.flush(out)
    }

    /// Bitmaps and descriptors, then superblocks and descriptors in every group with a copy.
    fn write_groups(
        &self,
        out: &mut impl Output,
        journal_map: &[u8; 60],
    ) -> Result<(), WriteError> {
        let geometry = &self.layout.plan.geometry;
        let areas = &self.layout.plan.areas;
        let directories = self.directories_by_group();
        let mut spans = BitmapWalk { spans: self.layout.used_spans(), left: None };
        let (mut block_bitmaps, mut inode_bitmaps) = (Stream::new(), Stream::new());
        let mut descriptors = Vec::with_capacity(index(geometry.groups) * DESCRIPTOR_SIZE);
        let mut free_blocks = 0;
        for group in 0..geometry.groups {
            let (bitmap, used) = spans.group(group, geometry.group_blocks(group));
            let mut descriptor = GroupDescriptor {
                block_bitmap: areas.block_bitmaps.block(group),
                inode_bitmap: areas.inode_bitmaps.block(group),
                inode_table: areas.inode_tables[index(group)],
                free_blocks: lo32(geometry.group_blocks(group) - used),
                used_directories: directories[index(group)],
                flags: group_flag::INODE_ZEROED,
                ..GroupDescriptor::default()
            };
            free_blocks += geometry.group_blocks(group) - used;
            let has_backup = crate::geometry::has_backup(group);
            let base = if has_backup { geometry.base_blocks() } else { 0 };
            if used == base && group + 1 < geometry.groups {
                descriptor.flags |= group_flag::BLOCK_UNINIT;
            } else {
                descriptor.block_bitmap_checksum = self.seed.and(&bitmap).value();
                block_bitmaps.push(out, descriptor.block_bitmap * BLOCK_SIZE, &bitmap)?;
            }
            if let Some(bitmap) = self.inode_bitmap(group, &mut descriptor) {
                inode_bitmaps.push(out, descriptor.inode_bitmap * BLOCK_SIZE, &bitmap)?;
            }
            descriptors.extend(descriptor.encode(self.seed, lo32(group)));
        }
        block_bitmaps.flush(out)?;
        inode_bitmaps.flush(out)?;
        let superblock = self.superblock(free_blocks, journal_map);
        self.write_copies(out, superblock, &descriptors)
    }

    fn directories_by_group(&self) -> Vec<u32> {
        let geometry = &self.layout.plan.geometry;
        let survey = &self.layout.survey;
        let mut counts = vec![0; index(geometry.groups)];
        counts[0] += u32::from(survey.makes_lost_found);
        for directory in &survey.directories {
            let at = u64::from(survey.number(directory.inode) - 1);
            counts[index(at / geometry.inodes_per_group)] += 1;
        }
        counts
    }

    /// Fills the inode part of a descriptor; gives the bitmap if any inode is in use.
    fn inode_bitmap(&self, group: u64, descriptor: &mut GroupDescriptor) -> Option<Block> {
        let per_group = self.layout.plan.geometry.inodes_per_group;
        let last = u64::from(self.layout.survey.last_number());
        let used = last.saturating_sub(group * per_group).min(per_group);
        descriptor.free_inodes = lo32(per_group - used);
        descriptor.inodes_untouched = lo32(per_group - used);
        if used == 0 {
            descriptor.flags |= group_flag::INODE_UNINIT;
            return None;
        }
        let mut bitmap = [0; BLOCK];
        set_bits(&mut bitmap, 0, used);
        set_bits(&mut bitmap, per_group, BLOCKS_PER_GROUP);
        let sum = self.seed.and(&bitmap[..index(per_group / 8)]);
        descriptor.inode_bitmap_checksum = sum.value();
        Some(bitmap)
    }

    fn superblock(&self, free_blocks: u64, journal_map: &[u8; 60]) -> Superblock {
        let options = &self.layout.options;
        let geometry = &self.layout.plan.geometry;
        let inodes = geometry.groups * geometry.inodes_per_group;
        let created_secs = u64::try_from(self.created().secs).unwrap_or(0).min((1 << 40) - 1);
        let mut journal_backup = [0; 68];
        if options.journal {
            let size = self.layout.plan.areas.journal.blocks() * BLOCK_SIZE;
            journal_backup[..60].copy_from_slice(journal_map);
            put32(&mut journal_backup, 60, hi32(size));
            put32(&mut journal_backup, 64, lo32(size));
        }
        let journal = if options.journal { feature::HAS_JOURNAL } else { 0 };
        Superblock {
            inodes_count: lo32(inodes),
            blocks_count: geometry.total_blocks,
            reserved_blocks: 0,
            free_blocks,
            free_inodes: lo32(inodes - u64::from(self.layout.survey.last_number())),
            first_data_block: 0,
            log_block_size: 2,
            blocks_per_group: lo32(BLOCKS_PER_GROUP),
            inodes_per_group: lo32(geometry.inodes_per_group),
            mounted_secs: 0,
            // Never, as e2fsck would object to a creation that the image's maker says is to come.
            written_secs: 0,
            created_secs,
            state: 1,
            errors: ERRORS_REMOUNT_RO,
            first_inode: FIRST_INO,
            inode_size: lo16(lo32(INODE_SIZE as u64)),
            block_group: 0,
            compat: feature::EXT_ATTR | feature::RESIZE_INODE | feature::DIR_INDEX | journal,
            incompat: feature::FILETYPE | feature::EXTENTS | feature::BIT64 | feature::FLEX_BG,
            ro_compat: feature::SPARSE_SUPER
                | feature::LARGE_FILE
                | feature::HUGE_FILE
                | feature::DIR_NLINK
                | feature::EXTRA_ISIZE
                | feature::METADATA_CSUM,
            uuid: options.uuid,
            label: options.label,
            reserved_gdt_blocks: lo16(lo32(geometry.reserved_blocks)),
            journal_inode: if options.journal { JOURNAL_INO } else { 0 },
            hash_seed: options.hash_seed,
            hash_version: HASH_HALF_MD4,
            descriptor_size: lo16(lo32(DESCRIPTOR_SIZE as u64)),
            mount_options: MOUNT_XATTR_AND_ACL,
            journal_backup,
            flags: FLAG_UNSIGNED_HASH,
            log_groups_per_flex: LOG_GROUPS_PER_FLEX,
        }
    }

    /// The superblock lies 1,024 bytes into block 0, and at the start of its block elsewhere.
    fn write_copies(
        &self,
        out: &mut impl Output,
        mut superblock: Superblock,
        descriptors: &[u8],
    ) -> Result<(), WriteError> {
        let mut stream = Stream::new();
        for group in self.layout.plan.geometry.groups_with_backup() {
            let mut block = [0; BLOCK];
            let at = if group == 0 { SUPERBLOCK_OFFSET } else { 0 };
            superblock.block_group = lo16(lo32(group));
            let bytes = superblock.encode();
            block[at..at + bytes.len()].copy_from_slice(&bytes);
            if group == 0 {
                let boot = &self.layout.options.boot_area;
                block[..boot.len()].copy_from_slice(boot);
            }
            let start = group * BLOCKS_PER_GROUP;
            stream.push(out, start * BLOCK_SIZE, &block)?;
            stream.push(out, (start + 1) * BLOCK_SIZE, descriptors)?;
            stream.flush(out)?;
            superblock.state = 0; // as mke2fs does: who falls back to a copy must check
        }
        Ok(())
    }
}

fn put_device(map: &mut [u8; 60], major: u32, minor: u32) {
    let (old, new) = encode_device(major, minor);
    put32(map, 0, old);
    put32(map, 4, new);
}

fn set_bits(bitmap: &mut Block, from: u64, to: u64) {
    let mut at = from;
    while at < to {
        if at.is_multiple_of(8) && to - at >= 8 {
            let whole = index(at / 8)..index(to / 8);
            at += whole.len() as u64 * 8;
            bitmap[whole].fill(0xFF);
        } else {
            bitmap[index(at / 8)] |= 1 << (at % 8);
            at += 1;
        }
    }
}

/// Turns ascending spans into one bitmap for each group.
struct BitmapWalk<I> {
    spans: I,
    left: Option<Span>,
}

impl<I: Iterator<Item = Span>> BitmapWalk<I> {
    /// The bitmap of a group, bits past its end set, and how many of its blocks are in use.
    fn group(&mut self, group: u64, blocks: u64) -> (Block, u64) {
        let start = group * BLOCKS_PER_GROUP;
        let end = start + BLOCKS_PER_GROUP;
        let mut bitmap = [0; BLOCK];
        let mut used = 0;
        while let Some(span) = self.left.take().or_else(|| self.spans.next()) {
            if span.start >= end {
                self.left = Some(span);
                break;
            }
            let stop = span.end().min(end);
            set_bits(&mut bitmap, span.start - start, stop - start);
            used += stop - span.start;
            if span.end() > end {
                self.left = Some(Span { start: end, blocks: span.end() - end });
                break;
            }
        }
        set_bits(&mut bitmap, blocks, BLOCKS_PER_GROUP);
        (bitmap, used)
    }
}
