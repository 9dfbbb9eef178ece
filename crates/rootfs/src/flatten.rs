//! Layers become one tree, as an overlay mount of them would show it (kernel documentation
//! `filesystems/overlayfs.rst`, with `index=on`), each layer unpacked as containerd does.
//!
//! Each layer is first read into a tree of its own (see `upper.rs`), then laid over what the
//! layers below have become. So whiteouts and opaque marks act on lower layers only, wherever
//! in the layer they stand.
//!
//! Rules where tools differ:
//! - A directory that a path implies but no entry describes keeps the metadata it has in a
//!   lower layer; else it is 0755, root, with a time of 0. A symbolic link or file of a lower
//!   layer in its place is replaced.
//! - A whiteout implies its directory too, unless that one is itself deleted by the layer and
//!   has nothing else in it: deleting twice deletes.
//! - Of two entries with one path, the later counts; two directories are one.
//! - A hard link names the file that its layer has at the target when the link comes; else the
//!   one the layer has there at its end; else the one of the layers below. The link's own header
//!   describes the file again, as Docker and containerd do it with `link`, `chown`, `setxattr` and
//!   `chmod`: attributes it does not name stay, but for the capabilities, which a `chown` takes
//!   away. umoci and GNU tar leave the file alone.
//! - A directory that its layer names again keeps the attributes that the later entry does not name.
//!   umoci removes them.
//! - A file has the attributes that Linux would have set on it: `user.*` on files and directories
//!   alone, no ACL on a symbolic link, a default ACL on directories alone. An access ACL follows
//!   the mode, which Docker and containerd set last; one that only repeats a mode is none.
//!
//! Knows no blob, no path of the host and no file system format.

use crate::table::{Body, Dentry, NONE, Node, Store};
use crate::upper::{Level, Steps, Upper, apply, attributes, metadata_of};
use crate::{FileTree, Pack, PackReadError, TreeLimits, path};

/// What is wrong with an entry, seen beside the others.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlattenProblem {
    /// The layer itself has something else than a directory where a parent should be.
    #[error("a part of the path is not a directory in the same layer")]
    ParentNotDirectory,
    /// More links in one path than `TreeLimits::symlinks_max`.
    #[error("too many levels of symbolic links")]
    SymlinkLoop,
    /// `TreeLimits::symlink_steps_max`.
    #[error("symbolic links in the paths of the layers lead over more than {0} directories")]
    SymlinkSteps(u64),
    /// `TreeLimits::lookups_max`.
    #[error("to find the names of all layers takes more than {0} look-ups")]
    Lookups(u64),
    /// `TreeLimits::entries_max`.
    #[error("there are more than {0} entries in the layers")]
    Entries(u64),
    /// `TreeLimits::depth_max`.
    #[error("it is deeper than {0} directories, links followed")]
    Depth(u32),
    /// A hard link to something no layer has.
    #[error("a hard link to {0}, which neither its layer nor those below have")]
    LinkTarget(String),
    /// A hard link to a directory.
    #[error("a hard link to {0}, which is a directory")]
    LinkToDirectory(String),
    /// The root is something else than a directory.
    #[error("the root is not a directory")]
    RootNotDirectory,
    /// Beyond 16 TiB, or beyond 2^32 blocks of contents.
    #[error("its contents are too large for any image")]
    FileBytes,
    /// A name or target of impossible length.
    #[error("its name or target is too long")]
    Name,
    /// `TreeLimits::inodes_max`.
    #[error("there are more than {0} files in the layers")]
    Inodes(u32),
    /// `TreeLimits::bytes_max`.
    #[error("names, links, attributes or holes of all files need more than {0} bytes")]
    Bytes(u32),
    /// `TreeLimits::links_max`.
    #[error("it has {links} names, and {max} are possible")]
    Links {
        /// Names it has.
        links: u32,
        /// Names it may have.
        max: u32,
    },
}

/// Why layers could not become one tree.
#[derive(Debug, thiserror::Error)]
pub enum FlattenError {
    /// The table of contents of a layer's pack.
    #[error("cannot read the table of contents of layer {}", .layer + 1)]
    Pack {
        /// Index of the layer, from the bottom, from 0.
        layer: usize,
        /// What the reader says.
        source: PackReadError,
    },
    /// An entry of a layer.
    #[error("{path} in layer {}: {problem}", .layer + 1)]
    Entry {
        /// Index of the layer, from the bottom, from 0.
        layer: usize,
        /// Its path, printable.
        path: String,
        /// What is wrong with it.
        problem: FlattenProblem,
    },
    /// A file of the finished tree.
    #[error("{path}: {problem}")]
    Tree {
        /// Its path, printable.
        path: String,
        /// What is wrong with it.
        problem: FlattenProblem,
    },
    /// `TreeLimits::layers_max`.
    #[error("there are more than {0} layers")]
    Layers(u32),
    /// `TreeLimits::toc_bytes_max`.
    #[error(
        "with layer {}, names and metadata of all layers need more than {bytes_max} bytes",
        .layer + 1
    )]
    TocBytes {
        /// Index of the layer, from the bottom, from 0.
        layer: usize,
        /// What they may need.
        bytes_max: u64,
    },
}

/// Folds layers, bottom first, one at a time: no more than one pack need be open.
#[derive(Debug)]
pub struct Folder {
    limits: TreeLimits,
    layers: u32,
    toc_bytes: u64,
    store: Store,
    steps: Steps,
    /// `None` before the first layer.
    lower: Option<Lower>,
}

#[derive(Debug)]
struct Lower {
    level: Level,
    root: u32,
}

impl Lower {
    fn empty() -> Self {
        Self { level: Level::new([0; 32]), root: 0 }
    }
}

impl Folder {
    /// A folder without layers: an empty root directory.
    #[must_use]
    pub fn new(limits: &TreeLimits) -> Self {
        Self {
            limits: limits.clone(),
            layers: 0,
            toc_bytes: 0,
            store: Store::default(),
            steps: Steps::default(),
            lower: None,
        }
    }

    /// Lays the next layer over those before. Its contents become the region with the number
    /// of the layer, counted from 0.
    ///
    /// # Errors
    /// [`FlattenError`]; the folder is of no use afterwards.
    pub fn add(&mut self, pack: &Pack) -> Result<(), FlattenError> {
        if self.layers >= self.limits.layers_max {
            return Err(FlattenError::Layers(self.limits.layers_max));
        }
        let (region, layer) = (self.layers, self.layers as usize);
        self.toc_bytes = self.toc_bytes.saturating_add(pack.toc_bytes());
        let bytes_max = self.limits.toc_bytes_max;
        if self.toc_bytes > bytes_max {
            return Err(FlattenError::TocBytes { layer, bytes_max });
        }
        let mut upper =
            Upper::new(pack.diff_id(), region, &mut self.store, &self.limits, &mut self.steps);
        // A record needs at least eight bytes, so a forged count reserves nothing much.
        let expected = pack.entry_count().min(pack.toc_bytes() / 8);
        let expected = usize::try_from(expected).unwrap_or(0).min(self.limits.inodes_max as usize);
        upper.level.nodes.reserve_exact(expected);
        upper.level.dentries.reserve(expected);
        let mut entries = pack.entries();
        while let Some(entry) =
            entries.next_entry().map_err(|source| FlattenError::Pack { layer, source })?
        {
            upper.add(&entry).map_err(|problem| {
                let path = path::printable(entry.path);
                FlattenError::Entry { layer, path, problem }
            })?;
        }
        let settled = upper.settle();
        let (mut level, pending) = (upper.level, upper.pending);
        settled.map_err(|(id, problem)| self.link_error(&level, layer, id, problem))?;
        let lower = match self.lower.take() {
            // The layer becomes the tree as it is.
            None if pending.is_empty() => {
                forget_deletions(&mut level);
                Lower { level, root: 0 }
            }
            None => self.lay(Lower::empty(), &level, pack.diff_id())?,
            Some(lower) => self.lay(lower, &level, pack.diff_id())?,
        };
        self.lower = Some(lower);
        self.layers += 1;
        Ok(())
    }

    /// The finished tree.
    ///
    /// # Errors
    /// [`FlattenError::Tree`] for a file with too many names.
    pub fn finish(self) -> Result<FileTree, FlattenError> {
        let lower = self.lower.unwrap_or_else(Lower::empty);
        FileTree::build(lower.level, lower.root, self.store, self.layers, &self.limits)
    }

    /// One layer over the others.
    fn lay(&mut self, lower: Lower, upper: &Level, key: [u8; 32]) -> Result<Lower, FlattenError> {
        let mut laying = Laying {
            places: vec![NONE; upper.nodes.len()],
            lower,
            upper,
            store: &mut self.store,
            limits: &self.limits,
            links: Vec::new(),
        };
        laying.lower.level.dentries.offer_key(key);
        let layer = self.layers as usize;
        let in_tree = |problem| FlattenError::Entry { layer, path: "/".to_owned(), problem };
        laying.root().map_err(in_tree)?;
        for index in 0..upper.dentries.len() {
            laying.dentry(upper.dentries.all()[index]).map_err(in_tree)?;
        }
        let Laying { mut lower, mut places, links, .. } = laying;
        let rekeyed = lower.level.dentries.take_rekeyed();
        self.steps.look_up_again(rekeyed, &self.limits).map_err(in_tree)?;
        // In the order of the tar, so that of two links to one file the later describes it.
        let mut pending: Vec<u32> = links.iter().map(|(_, dentry)| dentry.inode).collect();
        pending.sort_unstable();
        pending.dedup();
        for id in pending {
            places[id as usize] = self.file_below(&mut lower, upper, id)?;
        }
        for (parent, dentry) in links {
            let file = places[dentry.inode as usize];
            name(&mut lower.level, &self.store, parent, dentry, file, &self.limits)
                .map_err(in_tree)?;
        }
        Ok(lower)
    }

    /// The file of the layers below that a pending hard link means. It gets the metadata of
    /// the link's header, under all its names.
    fn file_below(
        &mut self,
        lower: &mut Lower,
        upper: &Level,
        id: u32,
    ) -> Result<u32, FlattenError> {
        let layer = self.layers as usize;
        let link = upper.node(id);
        let Body::Pending { at, length } = link.body else { return Ok(NONE) };
        let target = self.store.target(at, length).to_vec();
        let found = lower
            .level
            .lookup(&self.store, lower.root, &target, &self.limits, &mut self.steps)
            .map_err(|problem| self.link_error(upper, layer, id, problem))?;
        let Some(found) = found else { return Err(self.missing(upper, id)) };
        let file = lower.level.dentries.at(found).inode;
        let node = *lower.level.node(file);
        if node.is_directory() {
            let problem = FlattenProblem::LinkToDirectory(path::printable(&target));
            return Err(self.link_error(upper, layer, id, problem));
        }
        let set = attributes(&mut self.store, &node, link.xattrs, &self.limits, &mut self.steps)
            .map_err(|problem| self.link_error(upper, layer, id, problem))?;
        apply(lower.level.node_mut(file), metadata_of(link), set);
        Ok(file)
    }

    fn missing(&self, level: &Level, id: u32) -> FlattenError {
        let problem = match level.node(id).body {
            Body::Pending { at, length } => {
                FlattenProblem::LinkTarget(path::printable(self.store.target(at, length)))
            }
            Body::Directory { .. }
            | Body::File { .. }
            | Body::Symlink { .. }
            | Body::CharDevice { .. }
            | Body::BlockDevice { .. }
            | Body::Fifo => FlattenProblem::Name,
        };
        self.link_error(level, self.layers as usize, id, problem)
    }

    fn link_error(
        &self,
        level: &Level,
        layer: usize,
        id: u32,
        problem: FlattenProblem,
    ) -> FlattenError {
        let dentry = level.dentries.all().iter().position(|dentry| dentry.inode == id);
        let dentry = dentry.and_then(|dentry| u32::try_from(dentry).ok());
        let path = dentry.map_or(Vec::new(), |dentry| level.path_of(&self.store, dentry));
        FlattenError::Entry { layer, path: path::printable(&path), problem }
    }
}

/// Deleted by its own layer, and nothing but deletions in it.
fn is_nothing(dentry: &Dentry, node: &Node) -> bool {
    dentry.whiteout && node.is_directory() && !node.has(Node::REAL)
}

/// Below the lowest layer there is nothing that whiteouts could delete.
fn forget_deletions(level: &mut Level) {
    let nodes = &level.nodes;
    for dentry in level.dentries.all_mut() {
        if dentry.inode != NONE && is_nothing(dentry, &nodes[dentry.inode as usize]) {
            dentry.inode = NONE;
        }
        dentry.whiteout = false;
    }
}

/// Lets a name of the folded tree point to an inode.
fn name(
    level: &mut Level,
    store: &Store,
    parent: u32,
    dentry: Dentry,
    inode: u32,
    limits: &TreeLimits,
) -> Result<(), FlattenProblem> {
    let bytes = store.name(dentry.name_at, dentry.name_length);
    if let Some(found) = level.dentries.find(store, parent, bytes) {
        level.dentries.at_mut(found).inode = inode;
        return Ok(());
    }
    if level.dentries.len() >= limits.inodes_max as usize {
        return Err(FlattenProblem::Inodes(limits.inodes_max));
    }
    level.dentries.insert(store, Dentry { parent, inode, whiteout: false, ..dentry });
    Ok(())
}

/// One layer on its way over the others.
struct Laying<'a> {
    lower: Lower,
    upper: &'a Level,
    store: &'a mut Store,
    limits: &'a TreeLimits,
    /// What each node of the layer has become; `NONE` for what cannot be reached.
    places: Vec<u32>,
    /// Names of hard links into lower layers, with their directory.
    links: Vec<(u32, Dentry)>,
}

impl Laying<'_> {
    fn root(&mut self) -> Result<(), FlattenProblem> {
        let root = self.directory(0, self.lower.root, 0, Some(self.lower.root))?;
        self.lower.root = root;
        self.places[0] = root;
        Ok(())
    }

    /// Names come in an order in which every directory comes before what is in it.
    fn dentry(&mut self, dentry: Dentry) -> Result<(), FlattenProblem> {
        let parent = self.places[dentry.parent as usize];
        if parent == NONE {
            return Ok(());
        }
        let bytes = self.store.name(dentry.name_at, dentry.name_length);
        let found = self.lower.level.dentries.find(self.store, parent, bytes);
        if dentry.whiteout
            && let Some(found) = found
        {
            self.lower.level.dentries.at_mut(found).inode = NONE;
        }
        if dentry.inode == NONE {
            return Ok(());
        }
        let node = *self.upper.node(dentry.inode);
        if is_nothing(&dentry, &node) {
            return Ok(());
        }
        let below = found.map(|found| self.lower.level.dentries.at(found).inode);
        let below = below.filter(|below| *below != NONE);
        let place = match node.body {
            Body::Pending { .. } => {
                self.links.push((parent, dentry));
                return Ok(());
            }
            Body::Directory { depth, .. } => self.directory(dentry.inode, parent, depth, below)?,
            Body::File { .. }
            | Body::Symlink { .. }
            | Body::CharDevice { .. }
            | Body::BlockDevice { .. }
            | Body::Fifo => match self.places[dentry.inode as usize] {
                NONE => self.lower.level.add_node(node, self.limits)?,
                // Another name of a file already placed.
                place => place,
            },
        };
        self.places[dentry.inode as usize] = place;
        name(&mut self.lower.level, self.store, parent, dentry, place, self.limits)
    }

    /// A directory of the layer over what is below.
    fn directory(
        &mut self,
        id: u32,
        parent: u32,
        depth: u32,
        below: Option<u32>,
    ) -> Result<u32, FlattenProblem> {
        let node = *self.upper.node(id);
        let below = below.filter(|below| self.lower.level.node(*below).is_directory());
        let body = Body::Directory { parent, depth, first: 0, count: 0 };
        let Some(below) = below else {
            return self.lower.level.add_node(Node { body, ..node }, self.limits);
        };
        let old = *self.lower.level.node(below);
        let merged = if node.has(Node::EXPLICIT) { Node { body: old.body, ..node } } else { old };
        if node.has(Node::OPAQUE) {
            // Names are kept by directory: under a new number nothing of the old is found.
            return self.lower.level.add_node(Node { body, ..merged }, self.limits);
        }
        *self.lower.level.node_mut(below) = merged;
        Ok(below)
    }
}
