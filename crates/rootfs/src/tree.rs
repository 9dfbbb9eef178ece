//! The finished tree: inodes in the order of their paths, names of each directory side by
//! side and sorted. Knows nothing of layers but the number of the region where contents lie.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use ext4::{Entry, Inode, InodeId, Kind, Run, Tree, Xattr, XattrSetId};

use crate::table::{Body, Dentry, NONE, Node, Store};
use crate::upper::Level;
use crate::xattr::{self, Carrier, Pairs};
use crate::{BLOCK_BYTES, FlattenError, FlattenProblem, Folder, Pack, TreeLimits, path};

/// A name in a directory of the finished tree.
#[derive(Clone, Copy, Debug)]
struct Name {
    at: u32,
    inode: u32,
    length: u8,
}

/// The files of an image. Inodes are numbered in the order in which a walk that goes into
/// each directory, names sorted by their bytes, first meets them; so equal trees have equal
/// numbers, however they were layered.
#[derive(Debug)]
pub struct FileTree {
    nodes: Vec<Node>,
    names: Vec<Name>,
    store: Store,
    regions: u32,
}

/// How much one directory holds, everything below included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectorySize {
    /// Its path without a leading slash; empty for what lies in the root itself.
    pub path: Vec<u8>,
    /// Stored bytes of files, in whole blocks; a file with several names counts once.
    pub bytes: u64,
    /// Everything but directories, several names of one file counted once.
    pub files: u64,
}

impl FileTree {
    /// Folds `packs`, bottom first, into one tree. Contents of the pack with index `n` are
    /// region `n` of the tree.
    ///
    /// # Errors
    /// [`FlattenError`] names the layer and the path.
    pub fn flatten<P: Borrow<Pack>>(
        packs: impl IntoIterator<Item = P>,
        limits: &TreeLimits,
    ) -> Result<Self, FlattenError> {
        let mut folder = Folder::new(limits);
        for pack in packs {
            folder.add(pack.borrow())?;
        }
        folder.finish()
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> InodeId {
        InodeId::ROOT
    }

    /// How many regions there are: one for each layer.
    #[must_use]
    pub fn region_count(&self) -> u32 {
        self.regions
    }

    /// The inode at a clean path (as `usr/bin/env`; empty for the root). Symbolic links are not
    /// followed.
    #[must_use]
    pub fn lookup(&self, path: &[u8]) -> Option<InodeId> {
        let mut inode = 0;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let names = self.names_in(inode);
            let found = names.binary_search_by(|entry| self.name(entry).cmp(name)).ok()?;
            inode = names[found].inode;
        }
        Some(InodeId(inode))
    }

    /// A path that leads to an inode, for messages: looks at the whole tree.
    #[must_use]
    pub fn path_of(&self, id: InodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut inode = id.0;
        while inode != 0 {
            let Some(at) = self.names.iter().position(|name| name.inode == inode) else { break };
            names.push(self.name(&self.names[at]));
            let holds = |node: &Node| match node.body {
                Body::Directory { first, count, .. } => {
                    (first as usize..first as usize + count as usize).contains(&at)
                }
                Body::File { .. }
                | Body::Symlink { .. }
                | Body::CharDevice { .. }
                | Body::BlockDevice { .. }
                | Body::Fifo
                | Body::Pending { .. } => false,
            };
            let parent = self.nodes.iter().position(holds);
            inode = parent.and_then(|parent| u32::try_from(parent).ok()).unwrap_or(0);
        }
        names.reverse();
        names.join(&b'/')
    }

    /// The `n` directories in the root that hold most, largest first.
    #[must_use]
    pub fn biggest_directories(&self, n: usize) -> Vec<DirectorySize> {
        let mut sizes = vec![DirectorySize { path: Vec::new(), bytes: 0, files: 0 }];
        let mut counted = vec![false; self.nodes.len()];
        for top in self.names_in(0) {
            if self.nodes[top.inode as usize].is_directory() {
                sizes.push(DirectorySize { path: self.name(top).to_vec(), bytes: 0, files: 0 });
                self.count(top.inode, &mut sizes, &mut counted);
            } else {
                self.count_file(top.inode, &mut sizes[..1], &mut counted);
            }
        }
        sizes.retain(|size| size.files > 0);
        sizes.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.path.cmp(&b.path)));
        sizes.truncate(n);
        sizes
    }

    /// Adds everything below `directory` to the last of `sizes`.
    fn count(&self, directory: u32, sizes: &mut [DirectorySize], counted: &mut [bool]) {
        let mut directories = vec![directory];
        while let Some(directory) = directories.pop() {
            for name in self.names_in(directory) {
                if self.nodes[name.inode as usize].is_directory() {
                    directories.push(name.inode);
                } else {
                    self.count_file(name.inode, sizes, counted);
                }
            }
        }
    }

    fn count_file(&self, inode: u32, sizes: &mut [DirectorySize], counted: &mut [bool]) {
        if let Some(size) = sizes.last_mut()
            && !std::mem::replace(&mut counted[inode as usize], true)
        {
            size.files += 1;
            size.bytes +=
                self.runs(InodeId(inode)).map(|run| run.blocks).sum::<u64>() * BLOCK_BYTES;
        }
    }

    fn name(&self, name: &Name) -> &[u8] {
        self.store.name(name.at, name.length)
    }

    fn names_in(&self, directory: u32) -> &[Name] {
        match self.nodes[directory as usize].body {
            Body::Directory { first, count, .. } => {
                &self.names[first as usize..first as usize + count as usize]
            }
            Body::File { .. }
            | Body::Symlink { .. }
            | Body::CharDevice { .. }
            | Body::BlockDevice { .. }
            | Body::Fifo
            | Body::Pending { .. } => &[],
        }
    }

    /// Numbers what can be reached from `root` and forgets the rest.
    pub(crate) fn build(
        level: Level,
        root: u32,
        mut store: Store,
        regions: u32,
        limits: &TreeLimits,
    ) -> Result<Self, FlattenError> {
        let mut nodes = level.nodes;
        let dentries = level.dentries.into_list();
        unpack_attributes(&mut nodes, &mut store, limits)
            .map_err(|problem| FlattenError::Tree { path: "/".to_owned(), problem })?;
        store.sets.freeze();
        let mut numbering = Numbering {
            children: Children::new(&dentries, nodes.len()),
            dentries,
            old: nodes,
            store,
            numbers: Vec::new(),
            nodes: Vec::new(),
            names: Vec::new(),
        };
        numbering.run(root);
        let Numbering { nodes, names, store, .. } = numbering;
        let tree = Self { nodes, names, store, regions };
        tree.check_links(limits)?;
        Ok(tree)
    }

    fn check_links(&self, limits: &TreeLimits) -> Result<(), FlattenError> {
        let max = limits.links_max;
        let many = |node: &Node| node.links > max && !node.is_directory();
        let Some(inode) = self.nodes.iter().position(many) else { return Ok(()) };
        let links = self.nodes[inode].links;
        let id = InodeId(u32::try_from(inode).unwrap_or(0));
        let path = path::printable(&self.path_of(id));
        Err(FlattenError::Tree { path, problem: FlattenProblem::Links { links, max } })
    }
}

/// Leaves each file the attributes that it has where a layer is unpacked. Only here is it sure
/// what a file is: a hard link to what comes later brings attributes as well.
fn unpack_attributes(
    nodes: &mut [Node],
    store: &mut Store,
    limits: &TreeLimits,
) -> Result<(), FlattenProblem> {
    let mut known: BTreeMap<(Carrier, u16, u32), u32> = BTreeMap::new();
    for node in nodes.iter_mut().filter(|node| node.xattrs != NONE) {
        let carrier = match node.body {
            Body::Directory { .. } => Carrier::Directory,
            Body::File { .. } => Carrier::File,
            Body::Symlink { .. } => Carrier::Symlink,
            Body::CharDevice { .. } | Body::BlockDevice { .. } | Body::Fifo => Carrier::Special,
            Body::Pending { .. } => continue,
        };
        let key = (carrier, node.permissions & 0o777, node.xattrs);
        if let Some(set) = known.get(&key) {
            node.xattrs = *set;
            continue;
        }
        let unpacked = xattr::as_unpacked(key.0, key.1, store.sets.get(key.2));
        let too_many = FlattenProblem::Bytes(limits.bytes_max);
        let set = if unpacked.is_empty() {
            NONE
        } else {
            let (set, is_new) = store.sets.intern(&unpacked).ok_or(too_many.clone())?;
            if is_new && store.sets.bytes() > limits.bytes_max as usize {
                return Err(too_many);
            }
            set
        };
        known.insert(key, set);
        node.xattrs = set;
    }
    Ok(())
}

/// Live names by directory: names of directory `d` are `order[starts[d]..starts[d + 1]]`.
struct Children {
    starts: Vec<u32>,
    order: Vec<u32>,
}

impl Children {
    fn new(dentries: &[Dentry], nodes: usize) -> Self {
        let mut starts = vec![0_u32; nodes + 2];
        let live = || (0_u32..).zip(dentries).filter(|(_, dentry)| dentry.inode != NONE);
        for (_, dentry) in live() {
            starts[dentry.parent as usize + 2] += 1;
        }
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        let count = starts.last().copied().unwrap_or(0);
        let mut order = vec![0; count as usize];
        for (index, dentry) in live() {
            let next = &mut starts[dentry.parent as usize + 1];
            order[*next as usize] = index;
            *next += 1;
        }
        Self { starts, order }
    }

    fn of(&mut self, directory: u32) -> &mut [u32] {
        let start = self.starts[directory as usize] as usize;
        let end = self.starts[directory as usize + 1] as usize;
        &mut self.order[start..end]
    }
}

/// The walk that numbers inodes.
struct Numbering {
    children: Children,
    dentries: Vec<Dentry>,
    old: Vec<Node>,
    store: Store,
    /// New number of each old node.
    numbers: Vec<u32>,
    nodes: Vec<Node>,
    names: Vec<Name>,
}

impl Numbering {
    fn run(&mut self, root: u32) {
        self.numbers = vec![NONE; self.old.len()];
        self.names.reserve_exact(self.children.order.len());
        self.nodes.reserve_exact(self.children.order.len() + 1);
        let mut open = vec![self.enter(root, 0)];
        while let Some((directory, at, end)) = open.pop() {
            if at == end {
                continue;
            }
            open.push((directory, at + 1, end));
            let old = self.names[at].inode;
            let met = self.numbers[old as usize];
            if met != NONE {
                self.nodes[met as usize].links += 1;
                self.names[at].inode = met;
            } else if self.old[old as usize].is_directory() {
                self.nodes[directory as usize].links += 1;
                let below = self.enter(old, directory);
                self.names[at].inode = below.0;
                open.push(below);
            } else {
                self.names[at].inode = self.number(old, 1);
            }
        }
    }

    fn number(&mut self, old: u32, links: u32) -> u32 {
        // Fewer than the nodes before, so it fits.
        let id = u32::try_from(self.nodes.len()).unwrap_or(NONE);
        self.numbers[old as usize] = id;
        self.nodes.push(Node { links, ..self.old[old as usize] });
        id
    }

    /// Numbers a directory and lists its names, still with old numbers. Gives its number and
    /// the range of its names.
    fn enter(&mut self, old: u32, parent: u32) -> (u32, usize, usize) {
        let id = self.number(old, 2);
        let (dentries, store) = (&self.dentries, &self.store);
        let name = |index: &u32| {
            let dentry = &dentries[*index as usize];
            store.name(dentry.name_at, dentry.name_length)
        };
        let order = self.children.of(old);
        order.sort_unstable_by(|a, b| name(a).cmp(name(b)));
        let start = self.names.len();
        self.names.extend(order.iter().map(|index| {
            let dentry = &dentries[*index as usize];
            Name { at: dentry.name_at, inode: dentry.inode, length: dentry.name_length }
        }));
        let end = self.names.len();
        let first = u32::try_from(start).unwrap_or(NONE);
        let count = u32::try_from(end - start).unwrap_or(NONE);
        if let Body::Directory { depth, .. } = self.nodes[id as usize].body {
            self.nodes[id as usize].body = Body::Directory { parent, depth, first, count };
        }
        (id, start, end)
    }
}

impl Tree for FileTree {
    fn inode_count(&self) -> u32 {
        u32::try_from(self.nodes.len()).unwrap_or(NONE)
    }

    fn inode(&self, id: InodeId) -> Inode<'_> {
        let node = &self.nodes[id.0 as usize];
        let kind = match node.body {
            Body::Directory { .. } => Kind::Directory,
            Body::File { size_bytes, .. } => Kind::File { size_bytes },
            Body::Symlink { at, length } | Body::Pending { at, length } => {
                Kind::Symlink { target: self.store.target(at, length) }
            }
            Body::CharDevice { major, minor } => Kind::CharDevice { major, minor },
            Body::BlockDevice { major, minor } => Kind::BlockDevice { major, minor },
            Body::Fifo => Kind::Fifo,
        };
        Inode {
            kind,
            permissions: node.permissions,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            links: node.links,
            xattrs: (node.xattrs != NONE).then_some(XattrSetId(node.xattrs)),
        }
    }

    fn entries(&self, directory: InodeId) -> impl Iterator<Item = Entry<'_>> {
        self.names_in(directory.0)
            .iter()
            .map(|name| Entry { name: self.name(name), inode: InodeId(name.inode) })
    }

    fn xattrs(&self, set: XattrSetId) -> impl Iterator<Item = Xattr<'_>> {
        Pairs::new(self.store.sets.get(set.0)).map(|(name, value)| Xattr { name, value })
    }

    fn runs(&self, file: InodeId) -> impl Iterator<Item = Run> {
        let (mut size, mut region, mut region_block, mut list) = (0, 0, 0, &[][..]);
        if let Body::File { size_bytes, region: of, first_block, runs } =
            self.nodes[file.0 as usize].body
        {
            (region, region_block) = (of, u64::from(first_block));
            if runs == NONE {
                size = size_bytes.div_ceil(BLOCK_BYTES);
            } else {
                let (start, count) = self.store.run_lists[runs as usize];
                list = &self.store.runs[start as usize..start as usize + count as usize];
            }
        }
        let dense = (size > 0).then_some((0, size));
        let listed = list.iter().map(|(gap, blocks)| (u64::from(*gap), u64::from(*blocks)));
        let mut file_block = 0;
        dense.into_iter().chain(listed).map(move |(gap, blocks)| {
            file_block += gap;
            let run = Run { file_block, region, region_block, blocks };
            file_block += blocks;
            region_block += blocks;
            run
        })
    }
}
