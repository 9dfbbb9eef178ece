//! From an inode to the blocks of its contents, and the contents as a stream.

use std::io;

use super::{Image, Node, NodeKind, ReadAt, ReadError, check, damaged, read};
use crate::format::{EXTENT_MAGIC, get16, get32, index, inode_flag};

/// Deepest tree the kernel accepts.
const DEPTH_MAX: u16 = 5;
/// Longer extents than this are unwritten ones, whose length has this much added.
const WRITTEN_MAX: u64 = 32768;
const SYMLINK_MAX: u64 = 4095;

/// Blocks of a file that lie in a row; what no extent covers is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// First block within the file.
    pub file_block: u64,
    /// First block within the image.
    pub image_block: u64,
    /// Length in blocks.
    pub blocks: u64,
    /// Allocated but never written: reads as zeroes.
    pub is_unwritten: bool,
}

/// What a walk over an extent tree collects.
#[derive(Default)]
pub(super) struct Map {
    pub(super) extents: Vec<FileExtent>,
    /// Blocks of the tree itself.
    pub(super) tree_blocks: Vec<u64>,
}

impl<R: ReadAt> Image<R> {
    /// The extents of a file or directory, ascending by file block, disjoint in the file.
    ///
    /// # Errors
    /// If the map is damaged, or not made of extents.
    pub fn extents(&self, node: &Node) -> Result<Vec<FileExtent>, ReadError> {
        Ok(self.map(node)?.extents)
    }

    pub(super) fn map(&self, node: &Node) -> Result<Map, ReadError> {
        let mut map = Map::default();
        if node.flags & inode_flag::EXTENTS == 0 {
            if node.map.iter().all(|&b| b == 0) {
                return Ok(map);
            }
            return Err(ReadError::Unsupported { what: "block maps", bits: node.flags });
        }
        let depth = get16(&node.map, 6);
        if depth > DEPTH_MAX {
            return Err(damaged("extents of inode", node.ino.into(), "the tree is too deep"));
        }
        self.map_level(node, &node.map, depth, 0, &mut map)?;
        Ok(map)
    }

    /// Reads one node of the tree whose first block must be `least` or later.
    fn map_level(
        &self,
        node: &Node,
        bytes: &[u8],
        depth: u16,
        least: u64,
        map: &mut Map,
    ) -> Result<(), ReadError> {
        let wrong = |problem| damaged("extents of inode", node.ino.into(), problem);
        let count = usize::from(get16(bytes, 2));
        if get16(bytes, 0) != EXTENT_MAGIC || get16(bytes, 6) != depth {
            return Err(wrong("a node has no or a wrong header"));
        }
        let limit = usize::from(get16(bytes, 4));
        if count > limit || 12 + limit * 12 > bytes.len() {
            return Err(wrong("a node has more entries than room"));
        }
        for entry in bytes[12..12 + count * 12].as_chunks::<12>().0 {
            let file_block = u64::from(get32(entry, 0));
            let end = map.extents.last().map_or(0, |e| e.file_block + e.blocks);
            if file_block < end.max(least) {
                return Err(wrong("entries are out of order"));
            }
            if depth == 0 {
                map.extents
                    .push(self.leaf(entry, file_block).ok_or_else(|| {
                        wrong("an extent is empty or outside of the file system")
                    })?);
                continue;
            }
            let child = u64::from(get32(entry, 4)) | u64::from(get16(entry, 8)) << 32;
            let before = map.extents.len();
            let block = self.block(child)?;
            self.check_tree_block(node, child, &block)?;
            map.tree_blocks.push(child);
            self.map_level(node, &block, depth - 1, file_block, map)?;
            if map.extents.len() == before {
                return Err(wrong("a node of the tree is empty"));
            }
        }
        Ok(())
    }

    fn leaf(&self, entry: &[u8], file_block: u64) -> Option<FileExtent> {
        let length = u64::from(get16(entry, 4));
        let is_unwritten = length > WRITTEN_MAX;
        let blocks = if is_unwritten { length - WRITTEN_MAX } else { length };
        let image_block = u64::from(get32(entry, 8)) | u64::from(get16(entry, 6)) << 32;
        let is_inside = image_block + blocks <= self.superblock.blocks_count
            && file_block + blocks <= u64::from(u32::MAX);
        (blocks > 0 && is_inside).then_some(FileExtent {
            file_block,
            image_block,
            blocks,
            is_unwritten,
        })
    }

    fn check_tree_block(&self, node: &Node, number: u64, block: &[u8]) -> Result<(), ReadError> {
        let Some(seed) = self.inode_seed(node) else { return Ok(()) };
        let tail = 12 + usize::from(get16(block, 4)) * 12;
        let Some(covered) = block.get(..tail) else {
            return Err(damaged("extent block", number, "it claims more room than a block has"));
        };
        check("extent block", number, seed.and(covered).value() == get32(block, tail))
    }

    /// The contents of a file as a stream; holes read as zeroes.
    ///
    /// # Errors
    /// If `node` is not a regular file or its map is damaged.
    pub fn content(&self, node: &Node) -> Result<Content<'_, R>, ReadError> {
        if node.kind != NodeKind::File {
            return Err(ReadError::NoContent { ino: node.ino });
        }
        let extents = self.extents(node)?;
        Ok(Content { image: self, extents, size_bytes: node.size_bytes, position: 0, at: 0 })
    }

    /// Where a symlink points.
    ///
    /// # Errors
    /// If `node` is not a symlink, or its target is damaged.
    pub fn symlink_target(&self, node: &Node) -> Result<Vec<u8>, ReadError> {
        if node.kind != NodeKind::Symlink {
            return Err(ReadError::NoContent { ino: node.ino });
        }
        let wrong = |problem| damaged("symlink", node.ino.into(), problem);
        if node.size_bytes == 0 || node.size_bytes > SYMLINK_MAX {
            return Err(wrong("its length is impossible"));
        }
        let length = index(node.size_bytes);
        let target = if node.flags & inode_flag::EXTENTS == 0 {
            let short = node.map.get(..length).filter(|t| t.len() < node.map.len());
            short.ok_or_else(|| wrong("it is too long for the inode"))?.to_vec()
        } else {
            let extents = self.extents(node)?;
            let mut bytes = Vec::new();
            for extent in extents {
                if extent.file_block != bytes.len() as u64 / self.block_size
                    || bytes.len() >= length
                {
                    return Err(wrong("its blocks do not fit its length"));
                }
                bytes.extend(self.block(extent.image_block)?);
            }
            bytes.get(..length).ok_or_else(|| wrong("its blocks end early"))?.to_vec()
        };
        if target.contains(&0) {
            return Err(wrong("its target holds a NUL"));
        }
        Ok(target)
    }
}

/// The contents of a file; see [`Image::content`].
pub struct Content<'a, R> {
    image: &'a Image<R>,
    extents: Vec<FileExtent>,
    size_bytes: u64,
    position: u64,
    /// The first extent that may still matter.
    at: usize,
}

impl<R: ReadAt> io::Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let block_size = self.image.block_size;
        let left = self.size_bytes.saturating_sub(self.position);
        let wanted = left.min(buffer.len() as u64);
        let block = self.position / block_size;
        while self.extents.get(self.at).is_some_and(|e| e.file_block + e.blocks <= block) {
            self.at += 1;
        }
        let extent = self.extents.get(self.at).copied();
        let covering = extent.filter(|e| e.file_block <= block && !e.is_unwritten);
        let until = match (covering, extent) {
            (Some(e), _) => (e.file_block + e.blocks) * block_size,
            (None, Some(e)) if e.file_block > block => e.file_block * block_size,
            (None, Some(e)) => (e.file_block + e.blocks) * block_size,
            (None, None) => self.size_bytes,
        };
        let length = index(wanted.min(until.saturating_sub(self.position)));
        let target = &mut buffer[..length];
        match covering {
            Some(e) => {
                let within = self.position - e.file_block * block_size;
                let offset = e.image_block * block_size + within;
                read(&self.image.source, offset, target).map_err(io::Error::other)?;
            }
            None => target.fill(0),
        }
        self.position += length as u64;
        Ok(length)
    }
}
