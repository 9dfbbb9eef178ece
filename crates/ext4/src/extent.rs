//! Extent maps: runs become extents, extents become the sixty bytes of an inode and, when
//! four are not enough, tree blocks.
//!
//! Knows nothing of files; it is told where blocks lie.

use crate::format::{
    BLOCK, Block, Checksum, EXTENT_BLOCKS_MAX, EXTENT_MAGIC, EXTENTS_IN_BLOCK, EXTENTS_IN_INODE,
    hi16, hi32, index, lo16, lo32, put16, put32,
};

/// Blocks of a file that lie in a row in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) file_block: u64,
    pub(crate) start: u64,
    pub(crate) blocks: u64,
}

/// Joins adjacent pieces and cuts at the longest length an extent can have.
pub(crate) struct Merger<I> {
    pieces: I,
    pending: Option<Extent>,
}

impl<I: Iterator<Item = Extent>> Merger<I> {
    pub(crate) fn new(pieces: I) -> Self {
        Self { pieces, pending: None }
    }
}

impl<I: Iterator<Item = Extent>> Iterator for Merger<I> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        loop {
            let mut pending = self.pending.take().or_else(|| self.pieces.next())?;
            if pending.blocks > EXTENT_BLOCKS_MAX {
                let first = Extent { blocks: EXTENT_BLOCKS_MAX, ..pending };
                self.pending = Some(Extent {
                    file_block: pending.file_block + EXTENT_BLOCKS_MAX,
                    start: pending.start + EXTENT_BLOCKS_MAX,
                    blocks: pending.blocks - EXTENT_BLOCKS_MAX,
                });
                return Some(first);
            }
            let Some(piece) = self.pieces.next() else { return Some(pending) };
            if pending.file_block + pending.blocks == piece.file_block
                && pending.start + pending.blocks == piece.start
            {
                pending.blocks += piece.blocks;
                self.pending = Some(pending);
            } else {
                self.pending = Some(piece);
                return Some(pending);
            }
        }
    }
}

/// How many tree blocks a map of so many extents needs beside the inode.
pub(crate) fn tree_blocks(extents: u64) -> u64 {
    let mut level = extents;
    let mut blocks = 0;
    while level > EXTENTS_IN_INODE {
        level = level.div_ceil(EXTENTS_IN_BLOCK);
        blocks += level;
    }
    blocks
}

/// An entry of a tree block: an extent in a leaf, a child above.
#[derive(Clone, Copy)]
enum Node {
    Leaf(Extent),
    Child { file_block: u64, block: u64 },
}

impl Node {
    fn file_block(self) -> u64 {
        match self {
            Self::Leaf(extent) => extent.file_block,
            Self::Child { file_block, .. } => file_block,
        }
    }

    fn put(self, bytes: &mut [u8]) {
        put32(bytes, 0, lo32(self.file_block()));
        match self {
            Self::Leaf(extent) => {
                put16(bytes, 4, lo16(lo32(extent.blocks)));
                put16(bytes, 6, lo16(hi32(extent.start)));
                put32(bytes, 8, lo32(extent.start));
            }
            Self::Child { block, .. } => {
                put32(bytes, 4, lo32(block));
                put16(bytes, 8, lo16(hi32(block)));
            }
        }
    }
}

fn put_header(bytes: &mut [u8], entries: usize, limit: u64, depth: u16) {
    put16(bytes, 0, EXTENT_MAGIC);
    put16(bytes, 2, lo16(lo32(entries as u64)));
    put16(bytes, 4, lo16(lo32(limit)));
    put16(bytes, 6, depth);
}

/// Builds the map of one inode. `block` gives the image block of the tree's block `n`, in
/// `0..tree_blocks(extents)`; `emit` takes each finished tree block, ascending.
///
/// Leaves come first, then each level of indexes above.
pub(crate) fn build<E>(
    extents: &[Extent],
    inode_seed: Checksum,
    block: impl Fn(u64) -> u64,
    mut emit: impl FnMut(u64, &Block) -> Result<(), E>,
) -> Result<[u8; 60], E> {
    let mut level: Vec<Node> = extents.iter().copied().map(Node::Leaf).collect();
    let mut depth = 0;
    let mut next = 0;
    while level.len() > index(EXTENTS_IN_INODE) {
        let mut above = Vec::with_capacity(level.len().div_ceil(index(EXTENTS_IN_BLOCK)));
        for nodes in level.chunks(index(EXTENTS_IN_BLOCK)) {
            let mut bytes = [0; BLOCK];
            put_header(&mut bytes, nodes.len(), EXTENTS_IN_BLOCK, depth);
            for (node, place) in nodes.iter().zip(bytes[12..].chunks_exact_mut(12)) {
                node.put(place);
            }
            let sum = inode_seed.and(&bytes[..BLOCK - 4]).value();
            put32(&mut bytes, BLOCK - 4, sum);
            let at = block(next);
            emit(at, &bytes)?;
            above.push(Node::Child { file_block: nodes[0].file_block(), block: at });
            next += 1;
        }
        level = above;
        depth += 1;
    }
    let mut root = [0; 60];
    put_header(&mut root, level.len(), EXTENTS_IN_INODE, depth);
    for (node, place) in level.iter().zip(root[12..].chunks_exact_mut(12)) {
        node.put(place);
    }
    Ok(root)
}

/// The upper half of a block number, for fields that have sixteen bits for it.
pub(crate) fn high_half(block: u64) -> u16 {
    debug_assert_eq!(hi16(hi32(block)), 0, "block numbers have 48 bits");
    lo16(hi32(block))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(file_block: u64, start: u64, blocks: u64) -> Extent {
        Extent { file_block, start, blocks }
    }

    #[test]
    fn adjacent_pieces_join_and_long_ones_are_cut() {
        let pieces = [extent(0, 100, 30000), extent(30000, 30100, 10000), extent(50000, 40100, 1)];
        let merged: Vec<_> = Merger::new(pieces.into_iter()).collect();
        let expected = [extent(0, 100, 32768), extent(32768, 32868, 7232), extent(50000, 40100, 1)];
        assert_eq!(merged, expected);
    }

    #[test]
    fn a_tree_has_a_block_for_every_340_entries_of_the_level_below() {
        assert_eq!(tree_blocks(0), 0);
        assert_eq!(tree_blocks(4), 0);
        assert_eq!(tree_blocks(5), 1);
        assert_eq!(tree_blocks(340 * 4), 4);
        assert_eq!(tree_blocks(340 * 4 + 1), 5 + 1);
        assert_eq!(tree_blocks(340 * 340 * 4 + 1), 340 * 4 + 1 + 5 + 1);
    }

    #[test]
    fn building_emits_as_many_blocks_as_were_counted() {
        for count in [0, 4, 5, 341, 1361, 340 * 340 * 4 + 1] {
            let extents: Vec<_> = (0..count).map(|n| extent(n * 2, n * 2, 1)).collect();
            let mut emitted = 0;
            let built = build(
                &extents,
                Checksum::START,
                |n| n,
                |at, _| {
                    assert_eq!(at, emitted);
                    emitted += 1;
                    Ok::<_, ()>(())
                },
            );
            assert!(built.is_ok());
            assert_eq!(emitted, tree_blocks(count));
        }
    }
}
