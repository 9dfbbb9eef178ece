//! Directory blocks: one block is a plain list, more are an htree (`fs/ext4/namei.c`).
//!
//! Knows names, inode numbers and file types; not where the blocks lie. The same packing is
//! run to count the blocks and to write them.

use std::ops::Range;

use crate::format::{
    BLOCK, Block, Checksum, DIR_TAIL, DIR_TAIL_TYPE, HASH_HALF_MD4, index_checksum, lo16, lo32,
    put16, put32, short,
};
use crate::hash::half_md4;

/// `d_type` numbers.
pub(crate) mod file_type {
    pub(crate) const FILE: u8 = 1;
    pub(crate) const DIRECTORY: u8 = 2;
    pub(crate) const CHAR: u8 = 3;
    pub(crate) const BLOCK: u8 = 4;
    pub(crate) const FIFO: u8 = 5;
    pub(crate) const SOCKET: u8 = 6;
    pub(crate) const SYMLINK: u8 = 7;
}

/// Bytes for entries in a block, before the checksum.
const ROOM: usize = BLOCK - DIR_TAIL;
/// Bytes of `.` and `..`.
const DOTS: usize = 24;
/// How full the leaves of an htree are made: room for a guest's first names without splits.
const LEAF_FILL: usize = 3584;
/// Index entries of the root block and of a node block, without the one the checksum takes.
const ROOT_LIMIT: usize = (BLOCK - 32) / 8 - 1;
const NODE_LIMIT: usize = (BLOCK - 8) / 8 - 1;
/// How full nodes are made where the root has room for that many.
const NODE_FILL: usize = 440;

/// One entry to write.
#[derive(Clone, Copy)]
pub(crate) struct Name<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) ino: u32,
    pub(crate) file_type: u8,
}

/// What the packing needs to know of a name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    hash: u32,
    order: u32,
    entry_bytes: u32,
}

/// Bytes of an entry with a name of that length.
pub(crate) fn entry_bytes(name_length: usize) -> usize {
    (8 + name_length).next_multiple_of(4)
}

/// Whether names whose entries take so many bytes in all fit into one block.
pub(crate) fn is_linear(bytes_of_entries: usize) -> bool {
    bytes_of_entries <= ROOM - DOTS
}

/// More entries than an index of two levels reaches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TooLarge;

/// The leaves of an htree, and how they are indexed.
struct Packing {
    keys: Vec<Key>,
    /// Ranges of `keys`, one for each leaf.
    leaves: Vec<Range<usize>>,
    /// Leaves under each node, or none if the root points at the leaves.
    leaves_per_node: Option<usize>,
}

impl Packing {
    fn new<'a>(names: impl Iterator<Item = &'a [u8]>, seed: &[u8; 16]) -> Result<Self, TooLarge> {
        let mut keys = Vec::new();
        for (order, name) in names.enumerate() {
            keys.push(Key {
                hash: half_md4(name, seed),
                order: lo32(order as u64),
                entry_bytes: lo32(entry_bytes(name.len()) as u64),
            });
        }
        keys.sort_unstable();
        let mut leaves = Vec::new();
        let (mut start, mut filled) = (0, 0);
        for (at, key) in keys.iter().enumerate() {
            if filled + key.entry_bytes as usize > LEAF_FILL {
                leaves.push(start..at);
                (start, filled) = (at, 0);
            }
            filled += key.entry_bytes as usize;
        }
        leaves.push(start..keys.len());
        let leaves_per_node = match leaves.len() {
            0..=ROOT_LIMIT => None,
            count if count <= ROOT_LIMIT * NODE_FILL => Some(NODE_FILL),
            count if count <= ROOT_LIMIT * NODE_LIMIT => Some(NODE_LIMIT),
            _ => return Err(TooLarge),
        };
        Ok(Self { keys, leaves, leaves_per_node })
    }

    fn nodes(&self) -> usize {
        self.leaves_per_node.map_or(0, |per_node| self.leaves.len().div_ceil(per_node))
    }

    fn blocks(&self) -> usize {
        1 + self.nodes() + self.leaves.len()
    }

    /// What the index says of a leaf: the hash it begins with, the lowest bit set if the leaf
    /// before ends with the same hash; and the leaf's block within the directory.
    fn index_entry(&self, leaf: usize) -> (u32, u32) {
        let start = self.leaves[leaf].start;
        let hash = self.keys[start].hash;
        let is_continued = start > 0 && self.keys[start - 1].hash == hash;
        (hash | u32::from(is_continued), lo32((1 + self.nodes() + leaf) as u64))
    }
}

/// How many blocks an indexed directory of these names takes.
pub(crate) fn indexed_blocks<'a>(
    names: impl Iterator<Item = &'a [u8]>,
    seed: &[u8; 16],
) -> Result<u64, TooLarge> {
    Packing::new(names, seed).map(|packing| packing.blocks() as u64)
}

/// A directory's own number, its parent's, and the seed of its checksums.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) ino: u32,
    pub(crate) parent: u32,
    pub(crate) seed: Checksum,
}

/// A block that is being filled with entries.
struct Filling {
    bytes: Block,
    last: usize,
    next: usize,
}

impl Filling {
    fn new() -> Self {
        Self { bytes: [0; BLOCK], last: 0, next: 0 }
    }

    fn dots(identity: Identity) -> Self {
        let mut filling = Self::new();
        let directory = file_type::DIRECTORY;
        filling.push(Name { name: b".", ino: identity.ino, file_type: directory });
        filling.push(Name { name: b"..", ino: identity.parent, file_type: directory });
        filling
    }

    fn push(&mut self, name: Name<'_>) {
        let at = self.next;
        let length = entry_bytes(name.name.len());
        put32(&mut self.bytes, at, name.ino);
        put16(&mut self.bytes, at + 4, lo16(lo32(length as u64)));
        self.bytes[at + 6] = short(name.name.len());
        self.bytes[at + 7] = name.file_type;
        self.bytes[at + 8..at + 8 + name.name.len()].copy_from_slice(name.name);
        self.last = at;
        self.next = at + length;
    }

    /// Stretches the last entry and adds the checksum. An empty block is one unused entry.
    fn finish(mut self, seed: Checksum) -> Block {
        put16(&mut self.bytes, self.last + 4, lo16(lo32((ROOM - self.last) as u64)));
        put16(&mut self.bytes, ROOM + 4, lo16(lo32(DIR_TAIL as u64)));
        self.bytes[ROOM + 7] = DIR_TAIL_TYPE;
        let sum = seed.and(&self.bytes[..ROOM]).value();
        put32(&mut self.bytes, ROOM + 8, sum);
        self.bytes
    }
}

/// Writes a directory that fits into one block.
pub(crate) fn write_linear<'a>(identity: Identity, names: impl Iterator<Item = Name<'a>>) -> Block {
    let mut filling = Filling::dots(identity);
    for name in names {
        filling.push(name);
    }
    filling.finish(identity.seed)
}

/// Writes block `n` of an empty directory: the first holds the dots, others nothing.
pub(crate) fn write_empty(identity: Identity, n: u64) -> Block {
    let filling = if n == 0 { Filling::dots(identity) } else { Filling::new() };
    filling.finish(identity.seed)
}

/// Writes an indexed directory, its blocks in order: root, nodes, leaves.
pub(crate) fn write_indexed<'a, E>(
    identity: Identity,
    names: &[Name<'a>],
    hash_seed: &[u8; 16],
    mut emit: impl FnMut(&Block) -> Result<(), E>,
) -> Result<Result<(), TooLarge>, E> {
    let packing = match Packing::new(names.iter().map(|n| n.name), hash_seed) {
        Ok(packing) => packing,
        Err(too_large) => return Ok(Err(too_large)),
    };
    let all: Vec<_> = (0..packing.leaves.len()).map(|leaf| packing.index_entry(leaf)).collect();
    let nodes: Vec<_> = match packing.leaves_per_node {
        Some(per_node) => all.chunks(per_node).collect(),
        None => Vec::new(),
    };
    if nodes.is_empty() {
        emit(&root_block(identity, 0, &all))?;
    } else {
        let children: Vec<_> =
            nodes.iter().zip(1..).map(|(leaves, block)| (leaves[0].0, block)).collect();
        emit(&root_block(identity, 1, &children))?;
    }
    for leaves in nodes {
        emit(&node_block(identity, leaves))?;
    }
    for leaf in &packing.leaves {
        let mut filling = Filling::new();
        for key in &packing.keys[leaf.clone()] {
            filling.push(names[key.order as usize]);
        }
        emit(&filling.finish(identity.seed))?;
    }
    Ok(Ok(()))
}

fn root_block(identity: Identity, levels: u8, entries: &[(u32, u32)]) -> Block {
    let mut bytes = Filling::dots(identity).bytes;
    put16(&mut bytes, 12 + 4, lo16(lo32((BLOCK - 12) as u64))); // ".." hides the index
    bytes[28] = HASH_HALF_MD4;
    bytes[29] = 8; // length of this header
    bytes[30] = levels;
    put_index(&mut bytes, 32, ROOT_LIMIT, entries, identity.seed);
    bytes
}

fn node_block(identity: Identity, entries: &[(u32, u32)]) -> Block {
    let mut bytes = [0; BLOCK];
    put16(&mut bytes, 4, lo16(lo32(BLOCK as u64))); // one unused entry hides the index
    put_index(&mut bytes, 8, NODE_LIMIT, entries, identity.seed);
    bytes
}

/// The first entry's hash is implied; its place holds limit and count.
fn put_index(bytes: &mut Block, at: usize, limit: usize, entries: &[(u32, u32)], seed: Checksum) {
    for (n, &(hash, block)) in entries.iter().enumerate() {
        put32(bytes, at + n * 8, hash);
        put32(bytes, at + n * 8 + 4, block);
    }
    let (limit, count) = (lo16(lo32(limit as u64)), lo16(lo32(entries.len() as u64)));
    put16(bytes, at, limit);
    put16(bytes, at + 2, count);
    if let Some(sum) = index_checksum(seed, bytes, at, count, limit) {
        put32(bytes, at + usize::from(limit) * 8 + 4, sum);
    }
}
