//! Checks a whole image: every checksum, every count, and that every block has one owner.
//!
//! A second opinion beside `e2fsck`, for images that are at rest. It stops at the first
//! problem and repairs nothing.

use std::collections::HashMap;

use super::{Image, Node, NodeKind, ReadAt, ReadError, check, damaged};
use crate::format::{RESIZE_INO, ROOT_INO, feature, get16, get32, group_flag, index, lo32};
use crate::geometry::has_backup;

/// Larger images would need too much memory for the map of owners: one bit for a block.
const BLOCKS_MAX: u64 = 1 << 31;
/// Inodes below this one are the file system's own, but for the root.
const FIRST_ORDINARY: u32 = 11;

/// What a verified image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Inodes in use, reserved ones included.
    pub inodes: u64,
    /// Directories.
    pub directories: u64,
    /// Names in all directories, without the dots.
    pub names: u64,
    /// Blocks in use.
    pub blocks: u64,
}

/// What has been seen so far.
struct Seen {
    /// One bit for every block that has an owner.
    owned: Vec<u64>,
    /// Names by inode.
    names: HashMap<u32, u32>,
    /// `..` by directory, and the directory that names it.
    parents: HashMap<u32, (u32, u32)>,
    /// References to attribute blocks: so many, and so many the block claims.
    xattr_blocks: HashMap<u64, (u32, u32)>,
    /// Links and kind by inode.
    links: Vec<(u32, u16, bool)>,
    found: Verified,
}

impl Seen {
    fn own(&mut self, start: u64, blocks: u64) -> Result<(), ReadError> {
        for block in start..start + blocks {
            let word = self.owned.get_mut(index(block / 64));
            let word = word.ok_or(damaged("block", block, "it is outside of the file system"))?;
            if *word >> (block % 64) & 1 == 1 {
                return Err(damaged("block", block, "it has two owners"));
            }
            *word |= 1 << (block % 64);
        }
        Ok(())
    }

    fn is_owned(&self, block: u64) -> bool {
        self.owned.get(index(block / 64)).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }
}

impl<R: ReadAt> Image<R> {
    /// Checks everything: all checksums, bitmaps against owners, free counts, link counts,
    /// references to attribute blocks, `..` entries, and that all is reachable from the root.
    ///
    /// # Errors
    /// The first problem found; [`ReadError::Limit`] for images beyond 8 TiB.
    pub fn verify(&self) -> Result<Verified, ReadError> {
        let blocks = self.superblock.blocks_count;
        if blocks > BLOCKS_MAX {
            return Err(ReadError::Limit { what: "blocks", limit: BLOCKS_MAX });
        }
        let mut seen = Seen {
            owned: vec![0; index(blocks.div_ceil(64))],
            names: HashMap::new(),
            parents: HashMap::new(),
            xattr_blocks: HashMap::new(),
            links: Vec::new(),
            found: Verified::default(),
        };
        self.own_group_metadata(&mut seen)?;
        for group in 0..self.groups.len() {
            self.verify_inodes(group, &mut seen)?;
        }
        self.verify_names(&seen)?;
        for (&block, &(references, claimed)) in &seen.xattr_blocks {
            if references != claimed {
                return Err(damaged("attribute block", block, "its count of references is wrong"));
            }
        }
        self.verify_blocks(&mut seen)?;
        Ok(seen.found)
    }

    fn own_group_metadata(&self, seen: &mut Seen) -> Result<(), ReadError> {
        let s = &self.superblock;
        let descriptors = (self.groups.len() as u64 * u64::from(self.descriptor_size()))
            .div_ceil(self.block_size);
        let base = 1 + descriptors + u64::from(s.reserved_gdt_blocks);
        let table = u64::from(s.inodes_per_group) * u64::from(s.inode_size);
        let is_sparse = s.ro_compat & feature::SPARSE_SUPER != 0;
        for (group, descriptor) in self.groups.iter().enumerate() {
            if has_backup(group as u64) || !is_sparse {
                let start =
                    u64::from(s.first_data_block) + group as u64 * u64::from(s.blocks_per_group);
                seen.own(start, base.min(s.blocks_count - start))?;
            }
            seen.own(descriptor.block_bitmap, 1)?;
            seen.own(descriptor.inode_bitmap, 1)?;
            seen.own(descriptor.inode_table, table.div_ceil(self.block_size))?;
        }
        // With 1 KiB blocks, block 0 is before the first group and in no bitmap.
        Ok(())
    }

    fn verify_inodes(&self, group: usize, seen: &mut Seen) -> Result<(), ReadError> {
        let descriptor = &self.groups[group];
        let per_group = self.superblock.inodes_per_group;
        let number = group as u64;
        if descriptor.flags & group_flag::INODE_UNINIT != 0 {
            let is_right = descriptor.free_inodes == per_group;
            let problem = "it is untouched but its free inodes are not all";
            return if is_right { Ok(()) } else { Err(damaged("group", number, problem)) };
        }
        let bitmap = self.block(descriptor.inode_bitmap)?;
        if let Some(seed) = self.seed {
            let covered = bitmap.get(..per_group as usize / 8).unwrap_or(&bitmap);
            let sum = seed.and(covered).value();
            check("inode bitmap", number, self.is_sum(sum, descriptor.inode_bitmap_checksum))?;
        }
        let is_set = |n: u32| bitmap.get(n as usize / 8).is_some_and(|b| b >> (n % 8) & 1 == 1);
        let used = (0..per_group).filter(|&n| is_set(n)).count() as u64;
        if used + u64::from(descriptor.free_inodes) != per_group.into() {
            return Err(damaged("group", number, "its count of free inodes is wrong"));
        }
        let untouched = per_group.saturating_sub(descriptor.inodes_untouched);
        if (untouched..per_group).any(is_set) {
            return Err(damaged("group", number, "an inode it calls untouched is in use"));
        }
        seen.found.inodes += used;
        let before = seen.found.directories;
        for n in (0..per_group).filter(|&n| is_set(n)) {
            let ino = lo32(number) * per_group + n + 1;
            self.verify_inode(ino, seen)?;
        }
        if seen.found.directories - before != u64::from(descriptor.used_directories) {
            return Err(damaged("group", number, "its count of directories is wrong"));
        }
        Ok(())
    }

    /// Images without 64-bit descriptors keep the lower half of a bitmap's checksum.
    fn is_sum(&self, sum: u32, stored: u32) -> bool {
        if self.descriptor_size() >= 64 { sum == stored } else { sum & 0xFFFF == stored & 0xFFFF }
    }

    fn verify_inode(&self, ino: u32, seen: &mut Seen) -> Result<(), ReadError> {
        let record = self.inode_record(ino)?;
        let is_hidden = ino < FIRST_ORDINARY && ino != ROOT_INO;
        if is_hidden && get16(&record, 0) == 0 {
            return Ok(());
        }
        let node = self.node(ino, &record)?;
        if ino == RESIZE_INO {
            // Its other blocks are the reserved descriptors, owned already.
            let double = u64::from(get32(&node.map, 13 * 4));
            return if double == 0 { Ok(()) } else { seen.own(double, 1) };
        }
        let mut blocks = 0;
        if matches!(node.kind, NodeKind::File | NodeKind::Directory | NodeKind::Symlink) {
            let is_short_link =
                node.kind == NodeKind::Symlink && self.symlink_target(&node)?.len() < 60;
            if !is_short_link {
                blocks += self.own_map(&node, seen)?;
            }
        }
        if node.xattr_block != 0 {
            blocks += 1;
            self.verify_xattr_block(&node, seen)?;
        }
        self.xattrs(&node)?;
        if node.sectors != blocks * (self.block_size / 512) {
            return Err(damaged("inode", ino.into(), "its count of sectors is wrong"));
        }
        if is_hidden {
            return Ok(());
        }
        let is_directory = node.kind == NodeKind::Directory;
        seen.links.push((ino, node.links, is_directory));
        if is_directory {
            seen.found.directories += 1;
            self.verify_directory(&node, seen)?;
        }
        Ok(())
    }

    fn own_map(&self, node: &Node, seen: &mut Seen) -> Result<u64, ReadError> {
        let map = self.map(node)?;
        let mut blocks = 0;
        for extent in &map.extents {
            seen.own(extent.image_block, extent.blocks)?;
            blocks += extent.blocks;
        }
        for &block in &map.tree_blocks {
            seen.own(block, 1)?;
            blocks += 1;
        }
        let end = map.extents.last().map_or(0, |e| e.file_block + e.blocks);
        if end > node.size_bytes.div_ceil(self.block_size) {
            return Err(damaged("inode", node.ino.into(), "its blocks exceed its size"));
        }
        Ok(blocks)
    }

    fn verify_xattr_block(&self, node: &Node, seen: &mut Seen) -> Result<(), ReadError> {
        let claimed = get32(&self.xattr_block(node)?, 4);
        if !seen.xattr_blocks.contains_key(&node.xattr_block) {
            seen.own(node.xattr_block, 1)?;
        }
        seen.xattr_blocks.entry(node.xattr_block).or_insert((0, claimed)).0 += 1;
        Ok(())
    }

    fn verify_directory(&self, node: &Node, seen: &mut Seen) -> Result<(), ReadError> {
        let wrong = |problem| damaged("directory", node.ino.into(), problem);
        let mut dots = 0;
        self.for_each_name(node, |entry| {
            match entry.name {
                b"." if entry.ino == node.ino => dots += 1,
                b"." => return Err(wrong("its entry for itself is wrong")),
                b".." => {
                    dots += 1;
                    seen.parents.entry(node.ino).or_insert((0, 0)).0 = entry.ino;
                }
                _ => {
                    seen.found.names += 1;
                    *seen.names.entry(entry.ino).or_insert(0) += 1;
                    let is_directory = entry.file_type == 2;
                    if is_directory {
                        seen.parents.entry(entry.ino).or_insert((0, 0)).1 = node.ino;
                    }
                }
            }
            Ok(())
        })?;
        if dots == 2 { Ok(()) } else { Err(wrong("it lacks its own or its parent's entry")) }
    }

    fn verify_names(&self, seen: &Seen) -> Result<(), ReadError> {
        let mut subdirectories: HashMap<u32, u32> = HashMap::new();
        for (&ino, &(up, named_by)) in &seen.parents {
            let expected = if ino == ROOT_INO { ROOT_INO } else { named_by };
            if up != expected {
                return Err(damaged("directory", ino.into(), "its parent's entry is wrong"));
            }
            if ino != ROOT_INO {
                *subdirectories.entry(named_by).or_insert(0) += 1;
            }
        }
        for &(ino, links, is_directory) in &seen.links {
            let names = seen.names.get(&ino).copied().unwrap_or(0);
            let is_right = if is_directory {
                let below = subdirectories.get(&ino).copied().unwrap_or(0);
                let is_named = if ino == ROOT_INO { names == 0 } else { names == 1 };
                is_named && (u32::from(links) == below + 2 || links == 1)
            } else {
                names == u32::from(links)
            };
            if !is_right {
                return Err(damaged("inode", ino.into(), "its count of links is wrong"));
            }
        }
        if seen.names.len() + 1 != seen.links.len() {
            return Err(damaged("inode", 0, "a name points to an inode that is not in use"));
        }
        self.verify_reachable(seen)
    }

    /// Every directory leads up to the root.
    fn verify_reachable(&self, seen: &Seen) -> Result<(), ReadError> {
        let mut reached: HashMap<u32, bool> = HashMap::from([(ROOT_INO, true)]);
        for &ino in seen.parents.keys() {
            let mut way = Vec::new();
            let mut at = ino;
            while !reached.contains_key(&at) {
                reached.insert(at, false);
                way.push(at);
                at = seen.parents.get(&at).map_or(0, |parents| parents.0);
            }
            if reached.get(&at) != Some(&true) {
                return Err(damaged("directory", ino.into(), "it is not below the root"));
            }
            for step in way {
                reached.insert(step, true);
            }
        }
        Ok(())
    }

    fn verify_blocks(&self, seen: &mut Seen) -> Result<(), ReadError> {
        let s = &self.superblock;
        let (mut free_blocks, mut free_inodes) = (0, 0);
        for (group, descriptor) in self.groups.iter().enumerate() {
            let number = group as u64;
            let start = u64::from(s.first_data_block) + number * u64::from(s.blocks_per_group);
            let end = s.blocks_count.min(start + u64::from(s.blocks_per_group));
            let owned = (start..end).filter(|&b| seen.is_owned(b)).count() as u64;
            seen.found.blocks += owned;
            free_blocks += u64::from(descriptor.free_blocks);
            free_inodes += u64::from(descriptor.free_inodes);
            if owned + u64::from(descriptor.free_blocks) != end - start {
                return Err(damaged("group", number, "its count of free blocks is wrong"));
            }
            if descriptor.flags & group_flag::BLOCK_UNINIT != 0 {
                continue;
            }
            let bitmap = self.block(descriptor.block_bitmap)?;
            if let Some(seed) = self.seed {
                let sum = seed.and(&bitmap).value();
                check("block bitmap", number, self.is_sum(sum, descriptor.block_bitmap_checksum))?;
            }
            for bit in 0..u64::from(s.blocks_per_group) {
                let is_set = bitmap[index(bit / 8)] >> (bit % 8) & 1 == 1;
                let must_be = start + bit >= end || seen.is_owned(start + bit);
                if is_set != must_be {
                    let problem = "its bit and its owner disagree";
                    return Err(damaged("block", start + bit, problem));
                }
            }
        }
        let is_right = free_blocks == s.free_blocks && free_inodes == u64::from(s.free_inodes);
        if is_right { Ok(()) } else { Err(damaged("superblock", 0, "its free counts are wrong")) }
    }
}
