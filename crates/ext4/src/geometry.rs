//! How an image of a given size is divided: groups, backups, inode tables, room for growth;
//! and the allocator that hands out metadata blocks around the backups.
//!
//! Knows nothing of what the blocks will hold.

use crate::format::{BLOCKS_PER_GROUP, DESCRIPTORS_PER_BLOCK, INODES_PER_BLOCK};

/// Blocks of a chunk, the unit in which regions are placed.
pub(crate) const CHUNK_BLOCKS: u64 = 128;
/// Most blocks of a file system whose descriptors are reached through the resize inode.
pub(crate) const BLOCKS_MAX: u64 = 1 << 32;
/// Fewest blocks of content room in the last group: a shorter one is not worth its backup.
const LAST_GROUP_ROOM: u64 = 64;
/// Most reserved descriptor blocks: one indirect block lists them.
const RESERVED_MAX: u64 = 1024;
const INODES_PER_GROUP_MAX: u64 = 32768;

/// The numbers that follow from the size of an image and its count of inodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) total_blocks: u64,
    pub(crate) groups: u64,
    pub(crate) inodes_per_group: u64,
    pub(crate) descriptor_blocks: u64,
    pub(crate) reserved_blocks: u64,
    /// Blocks a file system must have so that all wanted inodes find a group.
    pub(crate) blocks_for_inodes: u64,
}

impl Geometry {
    pub(crate) fn new(
        total_blocks: u64,
        inodes_used: u64,
        growth_factor: u64,
        bytes_per_inode: u64,
    ) -> Self {
        let groups = total_blocks.div_ceil(BLOCKS_PER_GROUP).max(1);
        let spare = (inodes_used / 10).max(1024);
        let wanted = (total_blocks * 4096).div_ceil(bytes_per_inode).max(inodes_used + spare);
        let inodes_per_group =
            wanted.div_ceil(groups).next_multiple_of(INODES_PER_BLOCK).min(INODES_PER_GROUP_MAX);
        let must = inodes_used + spare;
        let groups_for_inodes = must.div_ceil(INODES_PER_GROUP_MAX);
        let descriptor_blocks = groups.div_ceil(DESCRIPTORS_PER_BLOCK);
        let descriptors = |factor: u64| {
            let blocks = total_blocks.saturating_mul(factor).min(BLOCKS_MAX);
            blocks.div_ceil(BLOCKS_PER_GROUP).div_ceil(DESCRIPTORS_PER_BLOCK)
        };
        let goal = descriptors(growth_factor).max(descriptors(1024).min(CHUNK_BLOCKS - 1));
        // Never none: without a resize inode the kernel would turn to meta_bg.
        let reserved_blocks = goal.saturating_sub(descriptor_blocks).clamp(1, RESERVED_MAX);
        Self {
            total_blocks,
            groups,
            inodes_per_group,
            descriptor_blocks,
            reserved_blocks,
            blocks_for_inodes: (groups_for_inodes - 1) * BLOCKS_PER_GROUP + 1,
        }
    }

    /// Superblock, descriptors and reserved descriptors: what a group with a backup starts with.
    pub(crate) fn base_blocks(&self) -> u64 {
        1 + self.descriptor_blocks + self.reserved_blocks
    }

    pub(crate) fn inode_table_blocks(&self) -> u64 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    pub(crate) fn group_blocks(&self, group: u64) -> u64 {
        BLOCKS_PER_GROUP.min(self.total_blocks - group * BLOCKS_PER_GROUP)
    }

    pub(crate) fn groups_with_backup(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.groups).filter(|&g| has_backup(g))
    }

    /// When the last group is too short to be of use: where it begins, and the least size
    /// with which it is of use.
    pub(crate) fn short_last_group(&self) -> Option<(u64, u64)> {
        let start = (self.groups - 1) * BLOCKS_PER_GROUP;
        let base = if has_backup(self.groups - 1) { self.base_blocks() } else { 0 };
        let least = start + base + LAST_GROUP_ROOM;
        (self.total_blocks < least).then_some((start, least))
    }

    /// Whether a chunk of the image holds a backup, whole or in part.
    pub(crate) fn chunk_is_blocked(&self, chunk: u64) -> bool {
        let per_group = BLOCKS_PER_GROUP / CHUNK_BLOCKS;
        has_backup(chunk / per_group)
            && chunk % per_group < self.base_blocks().div_ceil(CHUNK_BLOCKS)
    }
}

/// `sparse_super`: backups live in groups 0 and 1 and the powers of 3, 5 and 7.
pub(crate) fn has_backup(group: u64) -> bool {
    let is_power_of = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || is_power_of(3) || is_power_of(5) || is_power_of(7)
}

/// Blocks in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) blocks: u64,
}

impl Span {
    pub(crate) fn end(self) -> u64 {
        self.start + self.blocks
    }
}

/// A list of blocks that is contiguous but for the backups it steps over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Area {
    spans: Vec<Span>,
}

impl Area {
    pub(crate) fn spans(&self) -> &[Span] {
        &self.spans
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.spans.iter().map(|s| s.blocks).sum()
    }

    fn add(&mut self, start: u64, blocks: u64) {
        match self.spans.last_mut() {
            Some(last) if last.end() == start => last.blocks += blocks,
            _ => self.spans.push(Span { start, blocks }),
        }
    }

    /// The spans of blocks `first..first + blocks`, in order.
    pub(crate) fn part(&self, first: u64, blocks: u64) -> impl Iterator<Item = Span> + '_ {
        let end = first + blocks;
        let mut position = 0;
        self.spans.iter().filter_map(move |span| {
            let (from, to) = (position.max(first), (position + span.blocks).min(end));
            let start = span.start + from.saturating_sub(position);
            position += span.blocks;
            (from < to).then(|| Span { start, blocks: to - from })
        })
    }

    /// The image block of block `n`; past the end, a block number no image has.
    pub(crate) fn block(&self, n: u64) -> u64 {
        self.part(n, 1).next().map_or(u64::MAX >> 12, |span| span.start)
    }

    /// Forgets the blocks from `blocks` on.
    pub(crate) fn truncate(&mut self, blocks: u64) {
        self.spans = self.part(0, blocks).collect();
    }
}

/// Hands out blocks in ascending order, stepping over the backups. It may run past the end
/// of the image: the end is decided afterwards.
pub(crate) struct Allocator<'a> {
    geometry: &'a Geometry,
    next: u64,
}

impl<'a> Allocator<'a> {
    pub(crate) fn new(geometry: &'a Geometry) -> Self {
        Self { geometry, next: geometry.base_blocks() }
    }

    /// First block not handed out.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// `blocks` blocks, in as few spans as the backups allow.
    pub(crate) fn take(&mut self, blocks: u64) -> Area {
        let mut area = Area::default();
        let mut left = blocks;
        while left > 0 {
            self.step_over_backup();
            let group_end = (self.next / BLOCKS_PER_GROUP + 1) * BLOCKS_PER_GROUP;
            let length = left.min(group_end - self.next);
            area.add(self.next, length);
            self.next += length;
            left -= length;
        }
        area
    }

    /// `blocks` blocks in one span; its start.
    pub(crate) fn take_whole(&mut self, blocks: u64) -> u64 {
        loop {
            self.step_over_backup();
            let mut groups = self.next / BLOCKS_PER_GROUP + 1..;
            let end = self.next + blocks;
            match groups.find(|&g| has_backup(g) || g * BLOCKS_PER_GROUP >= end) {
                Some(group) if group * BLOCKS_PER_GROUP < end => {
                    self.next = group * BLOCKS_PER_GROUP;
                }
                Some(_) | None => break,
            }
        }
        let start = self.next;
        self.next += blocks;
        start
    }

    fn step_over_backup(&mut self) {
        let offset = self.next % BLOCKS_PER_GROUP;
        let base = self.geometry.base_blocks();
        if offset < base && has_backup(self.next / BLOCKS_PER_GROUP) {
            self.next += base - offset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_lie_in_the_groups_of_sparse_super() {
        let groups: Vec<_> = (0..130).filter(|&g| has_backup(g)).collect();
        assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn an_area_steps_over_backups_and_whole_pieces_do_not_cross_them() {
        let geometry = Geometry::new(10 * BLOCKS_PER_GROUP, 100, 16, 16384);
        let mut allocator = Allocator::new(&geometry);
        let base = geometry.base_blocks();
        let area = allocator.take(BLOCKS_PER_GROUP);
        let first = Span { start: base, blocks: BLOCKS_PER_GROUP - base };
        let second = Span { start: BLOCKS_PER_GROUP + base, blocks: base };
        assert_eq!(area.spans(), [first, second]);
        assert_eq!(area.block(BLOCKS_PER_GROUP - base), BLOCKS_PER_GROUP + base);
        allocator.take(2 * BLOCKS_PER_GROUP - 2 * base - 10);
        assert_eq!(allocator.next(), 3 * BLOCKS_PER_GROUP - 10);
        assert_eq!(allocator.take_whole(11), 3 * BLOCKS_PER_GROUP + base);
    }
}
