//! The names in a directory, read block by block; an index is only checked, not used.

use super::{Image, Node, NodeKind, ReadAt, ReadError, check, damaged};
use crate::format::{DIR_TAIL, DIR_TAIL_TYPE, get16, get32, index_checksum, inode_flag};

/// One name in a directory of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The inode it points to.
    pub ino: u32,
    /// The kind as the directory claims it, in the numbers of `d_type` within ext4.
    pub file_type: u8,
}

/// A name that has not been copied.
#[derive(Clone, Copy)]
pub(super) struct RawEntry<'a> {
    pub(super) name: &'a [u8],
    pub(super) ino: u32,
    pub(super) file_type: u8,
}

impl From<RawEntry<'_>> for NodeEntry {
    fn from(entry: RawEntry<'_>) -> Self {
        Self { name: entry.name.to_vec(), ino: entry.ino, file_type: entry.file_type }
    }
}

impl<R: ReadAt> Image<R> {
    /// The names in a directory but `.` and `..`, as they lie on disk.
    ///
    /// # Errors
    /// If `node` is not a directory, or it is damaged.
    pub fn entries(&self, node: &Node) -> Result<Vec<NodeEntry>, ReadError> {
        let mut entries = Vec::new();
        self.for_each_entry(node, |entry| {
            entries.push(entry.into());
            Ok(())
        })?;
        Ok(entries)
    }

    pub(super) fn for_each_entry(
        &self,
        node: &Node,
        mut visit: impl FnMut(RawEntry<'_>) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        self.for_each_name(node, |entry| {
            if entry.name == b"." || entry.name == b".." { Ok(()) } else { visit(entry) }
        })
    }

    /// All names, the dots included.
    pub(super) fn for_each_name(
        &self,
        node: &Node,
        mut visit: impl FnMut(RawEntry<'_>) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        if node.kind != NodeKind::Directory {
            return Err(ReadError::NotDirectory { ino: node.ino });
        }
        let wrong = |problem| damaged("directory", node.ino.into(), problem);
        let blocks = node.size_bytes / self.block_size;
        if !node.size_bytes.is_multiple_of(self.block_size) || blocks > self.superblock.blocks_count
        {
            return Err(wrong("its size is impossible"));
        }
        let mut next = 0;
        for extent in self.extents(node)? {
            if extent.file_block != next || extent.is_unwritten {
                return Err(wrong("it has a hole"));
            }
            next += extent.blocks;
            if next > blocks {
                return Err(wrong("its blocks exceed its size"));
            }
            for n in 0..extent.blocks {
                let block = self.block(extent.image_block + n)?;
                self.check_block(node, extent.file_block + n, &block)?;
                self.names_of_block(node, &block, &mut visit)?;
            }
        }
        if next == blocks && blocks > 0 { Ok(()) } else { Err(wrong("its blocks end early")) }
    }

    fn names_of_block(
        &self,
        node: &Node,
        block: &[u8],
        visit: &mut impl FnMut(RawEntry<'_>) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let wrong = |problem| damaged("directory", node.ino.into(), problem);
        let mut at = 0;
        while at < block.len() {
            let record = &block[at..];
            let length = usize::from(get16(record, 4));
            if length < 8 || length % 4 != 0 || length > record.len() {
                return Err(wrong("an entry has an impossible length"));
            }
            let ino = get32(record, 0);
            if ino != 0 {
                let name_length = usize::from(record[6]);
                let name = record[..length].get(8..8 + name_length).unwrap_or_default();
                if name.is_empty() || name.iter().any(|&b| b == 0 || b == b'/') {
                    return Err(wrong("a name is empty or holds a slash or NUL"));
                }
                if ino > self.superblock.inodes_count {
                    return Err(wrong("a name points to an inode that does not exist"));
                }
                visit(RawEntry { name, ino, file_type: record[7] })?;
            }
            at += length;
        }
        Ok(())
    }

    /// Checks the checksum of a block: of its index if it is one, or of its entries.
    fn check_block(&self, node: &Node, n: u64, block: &[u8]) -> Result<(), ReadError> {
        let Some(seed) = self.inode_seed(node) else { return Ok(()) };
        let is_indexed = node.flags & inode_flag::INDEX != 0;
        let is_node = get32(block, 0) == 0 && usize::from(get16(block, 4)) == block.len();
        let count_offset = match n {
            0 if is_indexed => Some(32),
            _ if is_indexed && is_node => Some(8),
            _ => None,
        };
        let wrong = |problem| damaged("directory", node.ino.into(), problem);
        if let Some(at) = count_offset {
            let (limit, count) = (get16(block, at), get16(block, at + 2));
            let tail = at + usize::from(limit) * 8;
            if count > limit || count == 0 || tail + 8 > block.len() {
                return Err(wrong("an index block claims impossible counts"));
            }
            let sum = index_checksum(seed, block, at, count, limit);
            return check("directory", node.ino.into(), sum == Some(get32(block, tail + 4)));
        }
        let tail = block.len() - DIR_TAIL;
        if get32(block, tail) != 0 || block[tail + 7] != DIR_TAIL_TYPE {
            return Err(wrong("a block has no checksum"));
        }
        let sum = seed.and(&block[..tail]).value();
        check("directory", node.ino.into(), sum == get32(block, tail + 8))
    }
}
