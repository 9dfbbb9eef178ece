//! One layer as the directory tree that containerd would unpack for an overlay mount: its own
//! entries, its whiteouts and opaque marks, and the directories its paths imply. Knows nothing
//! of the layers below.
//!
//! Entries come in the order of the tar. A path through a symbolic link that the layer itself
//! has made is followed, never out of the root; links of lower layers are not seen here.

use crate::table::{Body, Dentries, Dentry, NONE, Node, Store};
use crate::{Blocks, FlattenProblem, Limits, Metadata, TocEntry, TocKind, TreeLimits, path, xattr};

/// Nodes and names; a layer's own or those folded so far. Node 0 of a layer is its root.
#[derive(Debug)]
pub(crate) struct Level {
    pub(crate) nodes: Vec<Node>,
    pub(crate) dentries: Dentries,
}

/// One directory on the way to a path.
enum Hop<'a> {
    Existing(u32),
    Missing(&'a [u8]),
}

/// What the fold has cost so far; shared by all layers.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    behind_links: u64,
    lookups: u64,
    entries: u64,
}

/// To hash and compare so many bytes of a name costs about what finding its slot does.
const NAME_BYTES_PER_LOOKUP: u64 = 64;
/// Attributes are taken apart, joined, and compared with other sets.
const ATTRIBUTE_BYTES_PER_LOOKUP: u64 = 8;

impl Steps {
    /// Counts a component of a path that is looked up.
    fn look_up(&mut self, name: &[u8], limits: &TreeLimits) -> Result<(), FlattenProblem> {
        self.look_up_again(1 + name.len() as u64 / NAME_BYTES_PER_LOOKUP, limits)
    }

    /// Counts names that are hashed anew.
    pub(crate) fn look_up_again(
        &mut self,
        names: u64,
        limits: &TreeLimits,
    ) -> Result<(), FlattenProblem> {
        self.lookups += names;
        match self.lookups > limits.lookups_max {
            true => Err(FlattenProblem::Lookups(limits.lookups_max)),
            false => Ok(()),
        }
    }

    /// Counts an entry, or a directory that a path implies.
    fn enter(&mut self, limits: &TreeLimits) -> Result<(), FlattenProblem> {
        self.entries += 1;
        match self.entries > limits.entries_max {
            true => Err(FlattenProblem::Entries(limits.entries_max)),
            false => Ok(()),
        }
    }

    /// Counts a component of a path behind a symbolic link.
    fn step(&mut self, limits: &TreeLimits) -> Result<(), FlattenProblem> {
        self.behind_links += 1;
        match self.behind_links > limits.symlink_steps_max {
            true => Err(FlattenProblem::SymlinkSteps(limits.symlink_steps_max)),
            false => Ok(()),
        }
    }
}

impl Level {
    pub(crate) fn new(key: [u8; 32]) -> Self {
        Self { nodes: vec![Node::implicit(0, 0)], dentries: Dentries::new(key) }
    }

    pub(crate) fn node(&self, id: u32) -> &Node {
        &self.nodes[id as usize]
    }

    pub(crate) fn node_mut(&mut self, id: u32) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    pub(crate) fn add_node(
        &mut self,
        node: Node,
        limits: &TreeLimits,
    ) -> Result<u32, FlattenProblem> {
        let id = u32::try_from(self.nodes.len()).unwrap_or(NONE);
        if id >= limits.inodes_max {
            return Err(FlattenProblem::Inodes(limits.inodes_max));
        }
        self.nodes.push(node);
        Ok(id)
    }

    /// The inode of a name that is there.
    pub(crate) fn child(&self, store: &Store, directory: u32, name: &[u8]) -> Option<u32> {
        let dentry = self.dentries.at(self.dentries.find(store, directory, name)?);
        (dentry.inode != NONE).then_some(dentry.inode)
    }

    /// Makes a child directory that no entry describes.
    fn add_directory(
        &mut self,
        store: &mut Store,
        parent: u32,
        name: &[u8],
        limits: &TreeLimits,
        steps: &mut Steps,
    ) -> Result<u32, FlattenProblem> {
        steps.enter(limits)?;
        let depth = self.depth(parent) + 1;
        if depth > limits.depth_max {
            return Err(FlattenProblem::Depth(limits.depth_max));
        }
        let id = self.add_node(Node::implicit(parent, depth), limits)?;
        let dentry = self.dentry(store, parent, name, limits)?;
        self.dentries.at_mut(dentry).inode = id;
        Ok(id)
    }

    pub(crate) fn depth(&self, directory: u32) -> u32 {
        match self.node(directory).body {
            Body::Directory { depth, .. } => depth,
            Body::File { .. }
            | Body::Symlink { .. }
            | Body::CharDevice { .. }
            | Body::BlockDevice { .. }
            | Body::Fifo
            | Body::Pending { .. } => 0,
        }
    }

    /// The place of a name, made if it was not there.
    fn dentry(
        &mut self,
        store: &mut Store,
        parent: u32,
        name: &[u8],
        limits: &TreeLimits,
    ) -> Result<u32, FlattenProblem> {
        if let Some(found) = self.dentries.find(store, parent, name) {
            return Ok(found);
        }
        if self.dentries.len() >= limits.inodes_max as usize {
            return Err(FlattenProblem::Inodes(limits.inodes_max));
        }
        let name_at = append(&mut store.names, name, limits)?;
        let name_length = u8::try_from(name.len()).map_err(|_| FlattenProblem::Name)?;
        let dentry = Dentry { parent, inode: NONE, name_at, name_length, whiteout: false };
        Ok(self.dentries.insert(store, dentry))
    }

    /// The directories on the way along `path` from `root`, all links followed. `..` in a link
    /// goes up one directory and stays at the root.
    fn locate<'a>(
        &self,
        store: &'a Store,
        root: u32,
        path: &'a [u8],
        limits: &TreeLimits,
        steps: &mut Steps,
    ) -> Result<Vec<Hop<'a>>, FlattenProblem> {
        let mut hops = vec![Hop::Existing(root)];
        let mut rests = vec![path];
        let mut links = 0;
        while let Some(rest) = rests.pop() {
            let slash = rest.iter().position(|byte| *byte == b'/');
            let name = &rest[..slash.unwrap_or(rest.len())];
            if let Some(slash) = slash {
                rests.push(&rest[slash + 1..]);
            }
            steps.look_up(name, limits)?;
            if links > 0 {
                steps.step(limits)?;
            }
            let directory = match (name, hops.last()) {
                (b"" | b".", _) => continue,
                (b"..", _) => {
                    hops.truncate((hops.len() - 1).max(1));
                    continue;
                }
                (_, Some(Hop::Existing(directory))) => *directory,
                (_, Some(Hop::Missing(_)) | None) => {
                    hops.push(Hop::Missing(name));
                    continue;
                }
            };
            let Some(child) = self.child(store, directory, name) else {
                hops.push(Hop::Missing(name));
                continue;
            };
            match self.node(child).body {
                Body::Directory { .. } => hops.push(Hop::Existing(child)),
                Body::Symlink { at, length } => {
                    links += 1;
                    if links > limits.symlinks_max {
                        return Err(FlattenProblem::SymlinkLoop);
                    }
                    let target = store.target(at, length);
                    if target.starts_with(b"/") {
                        hops.truncate(1);
                    }
                    rests.push(target);
                }
                Body::File { .. }
                | Body::CharDevice { .. }
                | Body::BlockDevice { .. }
                | Body::Fifo
                | Body::Pending { .. } => return Err(FlattenProblem::ParentNotDirectory),
            }
        }
        Ok(hops)
    }

    /// The place of `path`, links in its directory part followed; `None` if it is not there.
    pub(crate) fn lookup(
        &self,
        store: &Store,
        root: u32,
        path: &[u8],
        limits: &TreeLimits,
        steps: &mut Steps,
    ) -> Result<Option<u32>, FlattenProblem> {
        let (directory, name) = path::split(path);
        let hops = match self.locate(store, root, directory, limits, steps) {
            Ok(hops) => hops,
            Err(FlattenProblem::ParentNotDirectory) => return Ok(None),
            Err(problem) => return Err(problem),
        };
        let Some(Hop::Existing(directory)) = hops.last() else { return Ok(None) };
        let found = self.dentries.find(store, *directory, name);
        Ok(found.filter(|found| self.dentries.at(*found).inode != NONE))
    }

    /// The path of a name, for messages: slow.
    pub(crate) fn path_of(&self, store: &Store, dentry: u32) -> Vec<u8> {
        let mut names = Vec::new();
        let mut next = Some(self.dentries.at(dentry));
        while let Some(dentry) = next {
            names.push(store.name(dentry.name_at, dentry.name_length));
            let named = |it: &&Dentry| it.inode == dentry.parent && names.len() < 1024;
            next = self.dentries.all().iter().find(named).copied();
        }
        names.reverse();
        names.join(&b'/')
    }
}

/// The attributes of a node with those of an entry that describes it, first or again.
pub(crate) fn attributes(
    store: &mut Store,
    node: &Node,
    entry: u32,
    limits: &TreeLimits,
    steps: &mut Steps,
) -> Result<u32, FlattenProblem> {
    if node.xattrs == NONE {
        return Ok(entry);
    }
    let before = store.sets.get(node.xattrs);
    let given = if entry == NONE { &[][..] } else { store.sets.get(entry) };
    let bytes = before.len() + given.len();
    steps.look_up_again(1 + bytes as u64 / ATTRIBUTE_BYTES_PER_LOOKUP, limits)?;
    let joined = xattr::described_again(before, given, node.is_directory());
    intern(store, &joined, limits)
}

/// The number of a set; `NONE` of an empty one.
fn intern(store: &mut Store, encoded: &[u8], limits: &TreeLimits) -> Result<u32, FlattenProblem> {
    if encoded.is_empty() {
        return Ok(NONE);
    }
    let too_many = FlattenProblem::Bytes(limits.bytes_max);
    match store.sets.intern(encoded) {
        Some((_, true)) if store.sets.bytes() > limits.bytes_max as usize => Err(too_many),
        Some((set, _)) => Ok(set),
        None => Err(too_many),
    }
}

/// Adds bytes to an arena; gives where they start.
pub(crate) fn append(
    arena: &mut Vec<u8>,
    bytes: &[u8],
    limits: &TreeLimits,
) -> Result<u32, FlattenProblem> {
    let at = u32::try_from(arena.len()).map_err(|_| FlattenProblem::Bytes(limits.bytes_max))?;
    if arena.len() + bytes.len() > limits.bytes_max as usize {
        return Err(FlattenProblem::Bytes(limits.bytes_max));
    }
    arena.extend_from_slice(bytes);
    Ok(at)
}

/// A layer being read.
pub(crate) struct Upper<'f> {
    pub(crate) level: Level,
    store: &'f mut Store,
    limits: &'f TreeLimits,
    steps: &'f mut Steps,
    region: u32,
    /// Directories of the path before: where each ends in the path, and its node.
    ancestors: Vec<(usize, u32)>,
    /// Attribute sets of the pack, as the store numbers them.
    sets: Vec<u32>,
    /// Hard links whose target was not there when they came.
    pub(crate) pending: Vec<u32>,
}

impl<'f> Upper<'f> {
    pub(crate) fn new(
        key: [u8; 32],
        region: u32,
        store: &'f mut Store,
        limits: &'f TreeLimits,
        steps: &'f mut Steps,
    ) -> Self {
        Self {
            level: Level::new(key),
            store,
            limits,
            steps,
            region,
            ancestors: Vec::new(),
            sets: Vec::new(),
            pending: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, entry: &TocEntry<'_>) -> Result<(), FlattenProblem> {
        self.steps.enter(self.limits)?;
        // A directory ending before the shared bytes end is one of this path too.
        while self.ancestors.last().is_some_and(|(end, _)| *end >= entry.shared) {
            self.ancestors.pop();
        }
        if matches!(entry.kind, TocKind::Opaque) {
            let directory = self.directory(entry.path)?;
            self.level.node_mut(directory).flags |= Node::OPAQUE;
            return Ok(());
        }
        if entry.path.is_empty() {
            return self.root(entry);
        }
        let (directory, name) = path::split(entry.path);
        let directory = self.directory(directory)?;
        if is_whiteout(&entry.kind) {
            let dentry = self.level.dentry(self.store, directory, name, self.limits)?;
            let deletes_own = matches!(entry.kind, TocKind::CharDevice { .. });
            let dentry = self.level.dentries.at_mut(dentry);
            dentry.whiteout = true;
            if deletes_own {
                dentry.inode = NONE;
            }
            return Ok(());
        }
        self.mark_real(directory);
        let dentry = self.level.dentry(self.store, directory, name, self.limits)?;
        self.put(entry, directory, dentry)
    }

    fn root(&mut self, entry: &TocEntry<'_>) -> Result<(), FlattenProblem> {
        let TocKind::Directory(metadata) = entry.kind else {
            return Err(FlattenProblem::RootNotDirectory);
        };
        self.describe(0, metadata, entry.xattrs)
    }

    /// Puts an entry at its place; whatever the layer had there before is gone.
    fn put(
        &mut self,
        entry: &TocEntry<'_>,
        directory: u32,
        dentry: u32,
    ) -> Result<(), FlattenProblem> {
        let there = self.level.dentries.at(dentry).inode;
        let is_directory = there != NONE && self.level.node(there).is_directory();
        let (metadata, body) = match &entry.kind {
            TocKind::Directory(metadata) if is_directory => {
                return self.describe(there, *metadata, entry.xattrs);
            }
            TocKind::HardLink { metadata, target } => {
                return self.link(dentry, *metadata, entry.xattrs, target);
            }
            TocKind::Directory(metadata) => {
                let depth = self.level.depth(directory) + 1;
                if depth > self.limits.depth_max {
                    return Err(FlattenProblem::Depth(self.limits.depth_max));
                }
                (metadata, Body::Directory { parent: directory, depth, first: 0, count: 0 })
            }
            TocKind::File { metadata, size_bytes, blocks } => {
                (metadata, self.file(*size_bytes, blocks)?)
            }
            TocKind::Symlink { metadata, target } => {
                let (at, length) = self.target(target)?;
                (metadata, Body::Symlink { at, length })
            }
            TocKind::CharDevice { metadata, major, minor } => {
                (metadata, Body::CharDevice { major: *major, minor: *minor })
            }
            TocKind::BlockDevice { metadata, major, minor } => {
                (metadata, Body::BlockDevice { major: *major, minor: *minor })
            }
            TocKind::Fifo(metadata) => (metadata, Body::Fifo),
            // Not put anywhere, see `add`.
            TocKind::Whiteout | TocKind::Opaque => return Ok(()),
        };
        let node = Node { body, ..Node::implicit(0, 0) };
        let id = self.level.add_node(node, self.limits)?;
        self.level.dentries.at_mut(dentry).inode = id;
        self.describe(id, *metadata, entry.xattrs)
    }

    fn file(&mut self, size_bytes: u64, blocks: &Blocks<'_>) -> Result<Body, FlattenProblem> {
        let too_large = |_| FlattenProblem::FileBytes;
        if size_bytes > Limits::default().file_bytes_max {
            return Err(FlattenProblem::FileBytes);
        }
        let first_block = u32::try_from(blocks.first()).map_err(too_large)?;
        let mut runs = NONE;
        if blocks.dense().is_none() {
            let start = u32::try_from(self.store.runs.len()).map_err(too_large)?;
            let mut count = 0;
            let runs_max = self.limits.bytes_max as usize / size_of::<(u32, u32)>();
            for (gap, length) in blocks.iter() {
                if self.store.runs.len() >= runs_max {
                    return Err(FlattenProblem::Bytes(self.limits.bytes_max));
                }
                let gap = u32::try_from(gap).map_err(too_large)?;
                self.store.runs.push((gap, u32::try_from(length).map_err(too_large)?));
                count += 1;
            }
            runs = u32::try_from(self.store.run_lists.len()).map_err(too_large)?;
            self.store.run_lists.push((start, count));
        }
        Ok(Body::File { size_bytes, region: self.region, first_block, runs })
    }

    fn target(&mut self, target: &[u8]) -> Result<(u32, u16), FlattenProblem> {
        let length = u16::try_from(target.len()).map_err(|_| FlattenProblem::Name)?;
        Ok((append(&mut self.store.targets, target, self.limits)?, length))
    }

    /// Another name for what the layer has at `target` now, or will have.
    fn link(
        &mut self,
        dentry: u32,
        metadata: Metadata,
        xattrs: &[u8],
        target: &[u8],
    ) -> Result<(), FlattenProblem> {
        if target.is_empty() {
            return Err(FlattenProblem::LinkToDirectory(path::printable(target)));
        }
        let found = self.level.lookup(self.store, 0, target, self.limits, self.steps)?;
        let id = match found {
            Some(found) => {
                let id = self.level.dentries.at(found).inode;
                if self.level.node(id).is_directory() {
                    return Err(FlattenProblem::LinkToDirectory(path::printable(target)));
                }
                id
            }
            None => {
                let (at, length) = self.target(target)?;
                let node = Node { body: Body::Pending { at, length }, ..Node::implicit(0, 0) };
                let id = self.level.add_node(node, self.limits)?;
                self.pending.push(id);
                id
            }
        };
        self.level.dentries.at_mut(dentry).inode = id;
        self.describe(id, metadata, xattrs)
    }

    /// Gives a node the metadata of an entry. A node described before keeps the attributes that the
    /// later entry does not name.
    fn describe(
        &mut self,
        id: u32,
        metadata: Metadata,
        xattrs: &[u8],
    ) -> Result<(), FlattenProblem> {
        let set = self.set_of(metadata, xattrs)?;
        let set = self.joined(id, set)?;
        apply(self.level.node_mut(id), metadata, set);
        if self.level.node(id).is_directory() {
            self.mark_real(id);
        }
        Ok(())
    }

    fn set_of(&mut self, metadata: Metadata, xattrs: &[u8]) -> Result<u32, FlattenProblem> {
        let Some(id) = metadata.xattrs else { return Ok(NONE) };
        if let Some(known) = self.sets.get(id as usize) {
            return Ok(*known);
        }
        let set = intern(self.store, xattrs, self.limits)?;
        self.sets.push(set);
        Ok(set)
    }

    /// Directory nodes up to the root have something to show.
    fn mark_real(&mut self, mut directory: u32) {
        loop {
            let node = self.level.node_mut(directory);
            if node.has(Node::REAL) {
                return;
            }
            node.flags |= Node::REAL;
            match node.body {
                Body::Directory { parent, .. } => directory = parent,
                Body::File { .. }
                | Body::Symlink { .. }
                | Body::CharDevice { .. }
                | Body::BlockDevice { .. }
                | Body::Fifo
                | Body::Pending { .. } => return,
            }
        }
    }

    /// The directory at a clean path; what is missing on the way is made.
    fn directory(&mut self, path: &[u8]) -> Result<u32, FlattenProblem> {
        let (mut end, mut directory) = self.ancestors.last().copied().unwrap_or((0, 0));
        while end < path.len() {
            let start = if end == 0 { 0 } else { end + 1 };
            let slash = path[start..].iter().position(|byte| *byte == b'/');
            end = slash.map_or(path.len(), |slash| start + slash);
            let name = &path[start..end];
            self.steps.look_up(name, self.limits)?;
            directory = match self.level.child(self.store, directory, name) {
                None => self.add_directory(directory, name)?,
                Some(child) => match self.level.node(child).body {
                    Body::Directory { .. } => child,
                    Body::Symlink { .. } => return self.directory_behind_links(path),
                    Body::File { .. }
                    | Body::CharDevice { .. }
                    | Body::BlockDevice { .. }
                    | Body::Fifo
                    | Body::Pending { .. } => return Err(FlattenProblem::ParentNotDirectory),
                },
            };
            self.ancestors.push((end, directory));
        }
        Ok(directory)
    }

    fn directory_behind_links(&mut self, path: &[u8]) -> Result<u32, FlattenProblem> {
        self.ancestors.clear();
        let hops = self.level.locate(self.store, 0, path, self.limits, self.steps)?;
        let mut directory = 0;
        let mut missing = Vec::new();
        for hop in &hops {
            match hop {
                Hop::Existing(id) => directory = *id,
                Hop::Missing(name) => missing.push(name.to_vec()),
            }
        }
        for name in missing {
            directory = self.add_directory(directory, &name)?;
        }
        Ok(directory)
    }

    fn add_directory(&mut self, parent: u32, name: &[u8]) -> Result<u32, FlattenProblem> {
        self.level.add_directory(self.store, parent, name, self.limits, self.steps)
    }

    /// Finds targets of hard links that came later in the layer. What is still pending after
    /// this can only be in a lower layer.
    pub(crate) fn settle(&mut self) -> Result<(), (u32, FlattenProblem)> {
        if self.pending.is_empty() {
            return Ok(());
        }
        // For each pending node: not looked at, being looked at, or its final node.
        let mut settled = vec![None; self.level.nodes.len()];
        for start in self.pending.clone() {
            let mut chain = vec![start];
            let mut id = start;
            // Links to links: each is looked at once, a ring ends at the first seen again.
            while self.level.node(id).is_pending() && settled[id as usize].is_none() {
                settled[id as usize] = Some(id);
                let next = self.target_of(id).map_err(|problem| (id, problem))?;
                let Some(next) = next else { break };
                id = next;
                chain.push(id);
            }
            let last = settled[id as usize].unwrap_or(id);
            for link in chain {
                if self.level.node(link).is_pending() {
                    settled[link as usize] = Some(last);
                }
            }
        }
        self.adopt(&settled)
    }

    /// What the layer itself has at the target of a pending link.
    fn target_of(&mut self, id: u32) -> Result<Option<u32>, FlattenProblem> {
        let Body::Pending { at, length } = self.level.node(id).body else { return Ok(None) };
        let target = self.store.target(at, length).to_vec();
        let found = self.level.lookup(self.store, 0, &target, self.limits, self.steps)?;
        let Some(found) = found else { return Ok(None) };
        let next = self.level.dentries.at(found).inode;
        if self.level.node(next).is_directory() {
            return Err(FlattenProblem::LinkToDirectory(path::printable(&target)));
        }
        Ok(Some(next))
    }

    /// Lets the names of settled links point to what they mean.
    fn adopt(&mut self, settled: &[Option<u32>]) -> Result<(), (u32, FlattenProblem)> {
        for dentry in self.level.dentries.all_mut() {
            if dentry.inode != NONE
                && let Some(last) = settled[dentry.inode as usize]
            {
                dentry.inode = last;
            }
        }
        let pending = std::mem::take(&mut self.pending);
        let means = |id: &u32| settled[*id as usize].filter(|last| last != id).map(|it| (*id, it));
        // Of several headers the later describes the file.
        let (earlier, later): (Vec<_>, Vec<_>) = pending
            .iter()
            .filter_map(means)
            .partition(|(id, last)| last > id && self.level.node(*last).is_pending());
        for (id, last) in later {
            let link = *self.level.node(id);
            let set = self.joined(last, link.xattrs).map_err(|problem| (id, problem))?;
            apply(self.level.node_mut(last), metadata_of(&link), set);
        }
        for (id, last) in earlier.into_iter().rev() {
            let given = self.level.node(last).xattrs;
            let set = self.joined(id, given).map_err(|problem| (id, problem))?;
            self.level.node_mut(last).xattrs = set;
        }
        let level = &self.level;
        self.pending = pending;
        self.pending
            .retain(|id| settled[*id as usize] == Some(*id) && level.node(*id).is_pending());
        Ok(())
    }

    /// The attributes of a node with those of one more entry that describes it.
    fn joined(&mut self, id: u32, entry: u32) -> Result<u32, FlattenProblem> {
        attributes(self.store, self.level.node(id), entry, self.limits, self.steps)
    }
}

/// On an overlay mount a device 0:0 in an upper directory *is* a whiteout.
fn is_whiteout(kind: &TocKind<'_>) -> bool {
    matches!(kind, TocKind::Whiteout | TocKind::CharDevice { major: 0, minor: 0, .. })
}

pub(crate) fn metadata_of(node: &Node) -> Metadata {
    let Node { permissions, uid, gid, mtime, .. } = *node;
    Metadata { permissions, uid, gid, mtime, xattrs: None }
}

/// Owner, permissions, time and attributes.
pub(crate) fn apply(node: &mut Node, metadata: Metadata, set: u32) {
    // Linux knows no permissions of symbolic links.
    let is_symlink = matches!(node.body, Body::Symlink { .. });
    node.permissions = if is_symlink { 0o777 } else { metadata.permissions };
    (node.uid, node.gid, node.mtime) = (metadata.uid, metadata.gid, metadata.mtime);
    node.xattrs = set;
    node.flags |= Node::EXPLICIT;
}
