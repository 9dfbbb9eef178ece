//! The first walk over a tree: checks every inode, numbers them, counts what the metadata
//! will need and notes which region blocks are alive.
//!
//! Knows nothing of where things will lie.

use std::collections::HashMap;

use crate::directory::{TooLarge, entry_bytes, indexed_blocks, is_linear};
use crate::error::LayoutError;
use crate::format::{
    BLOCK_SIZE, EXTENT_BLOCKS_MAX, FIRST_INO, LINKS_MAX, ROOT_INO, XATTR_REFS_MAX,
};
use crate::geometry::BLOCKS_MAX;
use crate::options::Options;
use crate::tree::{Entry, Inode, InodeId, Kind, Run, Tree, XattrSetId};
use crate::xattr;

/// The name of the directory into which `e2fsck` puts what it finds.
pub(crate) const LOST_FOUND: &[u8] = b"lost+found";
/// Blocks a made `lost+found` has from the start, as `mke2fs` gives it.
pub(crate) const LOST_FOUND_BLOCKS: u64 = 4;
/// Shortest target that does not fit into the inode, and the longest there may be.
pub(crate) const LONG_SYMLINK: usize = 60;
const SYMLINK_MAX: usize = 4095;
const FILE_BLOCKS_MAX: u64 = (1 << 32) - 1;

/// One directory of the tree.
pub(crate) struct Directory {
    pub(crate) inode: InodeId,
    pub(crate) parent_ino: u32,
    pub(crate) subdirectories: u32,
    pub(crate) blocks: u64,
}

/// An attribute set that needs a block, and who uses it.
pub(crate) struct SharedSet {
    pub(crate) set: XattrSetId,
    pub(crate) references: u32,
    /// First of its blocks within the area of attribute blocks.
    pub(crate) first_block: u64,
}

/// Which blocks of a region belong to a file.
pub(crate) struct Live {
    bits: Vec<u64>,
    pub(crate) blocks: u64,
}

impl Live {
    fn new(blocks: u64) -> Self {
        Self { bits: vec![0; crate::format::index(blocks.div_ceil(64))], blocks }
    }

    /// Marks blocks; says whether all of them were unmarked.
    fn mark(&mut self, start: u64, blocks: u64) -> bool {
        let end = start + blocks;
        let mut at = start;
        let mut is_new = true;
        while at < end {
            let count = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            let word = &mut self.bits[crate::format::index(at / 64)];
            is_new &= *word & mask == 0;
            *word |= mask;
            at += count;
        }
        is_new
    }

    /// The bits of chunk `n`, lowest first.
    pub(crate) fn chunk(&self, n: usize) -> u128 {
        let word = |at| u128::from(self.bits.get(at).copied().unwrap_or(0));
        word(2 * n) | word(2 * n + 1) << 64
    }

    pub(crate) fn chunks(&self) -> usize {
        self.bits.len().div_ceil(2)
    }
}

/// What the first walk found.
pub(crate) struct Survey {
    /// Inodes in the order of their numbers, the root first.
    pub(crate) order: Vec<InodeId>,
    /// Inode number by id; 0 for what no directory names.
    numbers: Vec<u32>,
    /// Directories in the order of their numbers, the root first.
    pub(crate) directories: Vec<Directory>,
    /// Whether `lost+found` has to be made.
    pub(crate) makes_lost_found: bool,
    /// By set: its place in `shared_sets`, or nothing if the inode holds it all.
    set_places: HashMap<XattrSetId, Option<u32>>,
    pub(crate) shared_sets: Vec<SharedSet>,
    pub(crate) xattr_blocks: u64,
    pub(crate) directory_blocks: u64,
    pub(crate) symlink_blocks: u64,
    pub(crate) data_blocks: u64,
    pub(crate) live: Vec<Live>,
    /// Files that may need more than four extents.
    pub(crate) fragmented: Vec<InodeId>,
    /// Names found so far, by id.
    links: Vec<u32>,
}

impl Survey {
    pub(crate) fn new<T: Tree>(
        tree: &T,
        options: &Options,
        region_blocks: &[u64],
    ) -> Result<Self, LayoutError> {
        let count = tree.inode_count();
        if count == 0 || tree.inode(InodeId::ROOT).kind != Kind::Directory {
            return Err(LayoutError::RootNotDirectory);
        }
        if region_blocks.iter().any(|&blocks| blocks > BLOCKS_MAX) {
            return Err(LayoutError::TooLarge { what: "blocks of a region", limit: BLOCKS_MAX });
        }
        if count > u32::MAX - 4096 {
            return Err(LayoutError::TooLarge { what: "inodes", limit: u32::MAX.into() });
        }
        let mut survey = Self {
            order: Vec::with_capacity(count as usize),
            numbers: vec![0; count as usize],
            directories: Vec::new(),
            makes_lost_found: needs_lost_found(tree)?,
            set_places: HashMap::new(),
            shared_sets: Vec::new(),
            xattr_blocks: 0,
            directory_blocks: 0,
            symlink_blocks: 0,
            data_blocks: 0,
            live: region_blocks.iter().map(|&blocks| Live::new(blocks)).collect(),
            fragmented: Vec::new(),
            links: vec![0; count as usize],
        };
        if survey.makes_lost_found {
            survey.directory_blocks = LOST_FOUND_BLOCKS;
        }
        survey.enter(tree, InodeId::ROOT, tree.inode(InodeId::ROOT), ROOT_INO)?;
        let mut next = 0;
        while next < survey.directories.len() {
            survey.scan(tree, options, next)?;
            next += 1;
        }
        survey.check_links(tree)?;
        survey.place_shared_sets();
        Ok(survey)
    }

    /// The number of an inode; 0 if no directory names it.
    pub(crate) fn number(&self, inode: InodeId) -> u32 {
        self.numbers.get(inode.0 as usize).copied().unwrap_or(0)
    }

    /// The highest inode number in use.
    pub(crate) fn last_number(&self) -> u32 {
        let before = if self.makes_lost_found { FIRST_INO } else { FIRST_INO - 1 };
        before + crate::format::lo32(self.order.len() as u64 - 1)
    }

    /// Where the blocks of a set are, if it needs any.
    pub(crate) fn shared_set(&self, set: XattrSetId) -> Option<usize> {
        self.set_places.get(&set).copied().flatten().map(|place| place as usize)
    }

    /// Reads the names of a directory, numbering what is new among them.
    fn scan<T: Tree>(&mut self, tree: &T, options: &Options, at: usize) -> Result<(), LayoutError> {
        let directory = self.directories[at].inode;
        let ino = self.number(directory);
        let is_lost_found_here = directory == InodeId::ROOT && self.makes_lost_found;
        let mut bytes = if is_lost_found_here { entry_bytes(LOST_FOUND.len()) } else { 0 };
        let mut subdirectories = u32::from(is_lost_found_here);
        let mut entries = 0;
        let mut last: &[u8] = b"";
        for entry in tree.entries(directory) {
            check_name(directory, entry, last)?;
            last = entry.name;
            bytes += entry_bytes(entry.name.len());
            entries += 1;
            let Some(links) = self.links.get_mut(entry.inode.0 as usize) else {
                return Err(LayoutError::UnknownInode { directory, inode: entry.inode });
            };
            *links = links.saturating_add(1);
            let is_first = *links == 1;
            let inode = tree.inode(entry.inode);
            let is_directory = inode.kind == Kind::Directory;
            if is_directory && (!is_first || entry.inode == InodeId::ROOT) {
                return Err(LayoutError::DirectoryLinkedTwice { inode: entry.inode });
            }
            subdirectories += u32::from(is_directory);
            if is_first {
                self.enter(tree, entry.inode, inode, ino)?;
            }
        }
        let blocks = if is_linear(bytes) {
            1
        } else {
            let made = is_lost_found_here.then_some(LOST_FOUND);
            let names = made.into_iter().chain(tree.entries(directory).map(|e| e.name));
            let too_large = |TooLarge| LayoutError::DirectoryTooLarge { inode: directory, entries };
            indexed_blocks(names, &options.hash_seed).map_err(too_large)?
        };
        self.directories[at].blocks = blocks;
        self.directories[at].subdirectories = subdirectories;
        self.directory_blocks += blocks;
        Ok(())
    }

    /// Numbers an inode that is seen for the first time, and checks it.
    fn enter<T: Tree>(
        &mut self,
        tree: &T,
        id: InodeId,
        inode: Inode<'_>,
        parent_ino: u32,
    ) -> Result<(), LayoutError> {
        self.order.push(id);
        let number = if id == InodeId::ROOT { ROOT_INO } else { self.last_number() };
        self.numbers[id.0 as usize] = number;
        match inode.kind {
            Kind::Directory => self.directories.push(Directory {
                inode: id,
                parent_ino,
                subdirectories: 0,
                blocks: 0,
            }),
            Kind::File { size_bytes } => self.enter_file(tree, id, size_bytes)?,
            Kind::Symlink { target } => {
                if target.is_empty() || target.len() > SYMLINK_MAX || target.contains(&0) {
                    return Err(LayoutError::SymlinkTarget { inode: id, length: target.len() });
                }
                self.symlink_blocks += u64::from(target.len() >= LONG_SYMLINK);
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                if major >= 1 << 12 || minor >= 1 << 20 {
                    return Err(LayoutError::Device { inode: id, major, minor });
                }
            }
            Kind::Fifo | Kind::Socket => {}
        }
        let Some(set) = inode.xattrs else { return Ok(()) };
        self.enter_xattrs(tree, id, set)
    }

    fn enter_file<T: Tree>(
        &mut self,
        tree: &T,
        inode: InodeId,
        size_bytes: u64,
    ) -> Result<(), LayoutError> {
        let file_blocks = size_bytes.div_ceil(BLOCK_SIZE);
        if file_blocks > FILE_BLOCKS_MAX {
            return Err(LayoutError::FileTooLarge { inode, size_bytes });
        }
        let (mut end, mut runs, mut blocks) = (0, 0_u64, 0);
        for run in tree.runs(inode) {
            let wrong = |problem| LayoutError::Run { inode, file_block: run.file_block, problem };
            if run.blocks == 0 || run.file_block < end {
                return Err(wrong("it is empty or out of order"));
            }
            end = run.file_block.saturating_add(run.blocks);
            if end > file_blocks {
                return Err(wrong("it reaches past the end of the file"));
            }
            self.mark(run).map_err(wrong)?;
            runs += 1;
            blocks += run.blocks;
        }
        self.data_blocks += blocks;
        // Two runs of up to 128 MiB meet at most one backup each: never more than 4 extents.
        if runs > 2 || blocks > EXTENT_BLOCKS_MAX {
            self.fragmented.push(inode);
        }
        Ok(())
    }

    fn mark(&mut self, run: Run) -> Result<(), &'static str> {
        let live = self.live.get_mut(run.region as usize).ok_or("there is no such region")?;
        let end = run.region_block.checked_add(run.blocks);
        if end.is_none_or(|end| end > live.blocks) {
            return Err("it reaches past the end of the region");
        }
        if live.mark(run.region_block, run.blocks) {
            Ok(())
        } else {
            Err("it shares blocks of the region with another run")
        }
    }

    fn enter_xattrs<T: Tree>(
        &mut self,
        tree: &T,
        inode: InodeId,
        set: XattrSetId,
    ) -> Result<(), LayoutError> {
        if !self.set_places.contains_key(&set) {
            let encoded = xattr::encode(tree.xattrs(set)).map_err(|source| LayoutError::Xattr {
                inode,
                set,
                source,
            })?;
            let place = encoded.block.map(|_| crate::format::lo32(self.shared_sets.len() as u64));
            if place.is_some() {
                self.shared_sets.push(SharedSet { set, references: 0, first_block: 0 });
            }
            self.set_places.insert(set, place);
        }
        if let Some(place) = self.shared_set(set) {
            self.shared_sets[place].references += 1;
        }
        Ok(())
    }

    fn check_links<T: Tree>(&mut self, tree: &T) -> Result<(), LayoutError> {
        let links = std::mem::take(&mut self.links);
        for (&found, id) in links.iter().zip(0..) {
            let inode = InodeId(id);
            if found == 0 || tree.inode(inode).kind == Kind::Directory {
                continue;
            }
            if found > LINKS_MAX {
                return Err(LayoutError::TooManyLinks { inode, links: found });
            }
            let claimed = tree.inode(inode).links;
            if claimed != found {
                return Err(LayoutError::LinkCount { inode, claimed, found });
            }
        }
        Ok(())
    }

    fn place_shared_sets(&mut self) {
        for shared in &mut self.shared_sets {
            shared.first_block = self.xattr_blocks;
            self.xattr_blocks += u64::from(shared.references.div_ceil(XATTR_REFS_MAX));
        }
    }
}

fn needs_lost_found<T: Tree>(tree: &T) -> Result<bool, LayoutError> {
    let Some(entry) = tree.entries(InodeId::ROOT).find(|e| e.name == LOST_FOUND) else {
        return Ok(true);
    };
    if entry.inode.0 < tree.inode_count() && tree.inode(entry.inode).kind != Kind::Directory {
        return Err(LayoutError::LostFoundNotDirectory { inode: entry.inode });
    }
    Ok(false)
}

fn check_name(directory: InodeId, entry: Entry<'_>, last: &[u8]) -> Result<(), LayoutError> {
    let name = entry.name;
    let is_bad = |&b: &u8| b == b'/' || b == 0;
    if name.is_empty()
        || name.len() > 255
        || name.iter().any(is_bad)
        || name == b"."
        || name == b".."
    {
        return Err(LayoutError::Name { directory, name: name.to_vec() });
    }
    if name <= last {
        return Err(LayoutError::NameOrder { directory, name: name.to_vec() });
    }
    Ok(())
}
