//! A tar builder that can also lie, and a tree with its contents side by side.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ext4::{InodeId, Kind, Tree};
use rootfs::{FileTree, FlattenError, Limits, Pack, PackError, PackSummary, TreeLimits, make_pack};

/// One header; every field can be set to what no honest program writes.
#[derive(Clone)]
pub(crate) struct Header {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) size: u64,
    pub(crate) mtime: u64,
    pub(crate) link: Vec<u8>,
    pub(crate) device: (u32, u32),
    pub(crate) magic: [u8; 8],
    /// Bytes put over the finished header, before the checksum is computed.
    pub(crate) patches: Vec<(usize, Vec<u8>)>,
}

pub(crate) fn header(name: impl AsRef<[u8]>, kind: u8) -> Header {
    Header {
        name: name.as_ref().to_vec(),
        kind,
        mode: if kind == b'5' { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        size: 0,
        mtime: 1_000,
        link: Vec::new(),
        device: (0, 0),
        magic: *b"ustar\x0000",
        patches: Vec::new(),
    }
}

impl Header {
    pub(crate) fn patch(mut self, at: usize, bytes: impl AsRef<[u8]>) -> Self {
        self.patches.push((at, bytes.as_ref().to_vec()));
        self
    }

    pub(crate) fn size(mut self, size: u64) -> Self {
        self.size = size;
        self
    }

    pub(crate) fn link(mut self, link: impl AsRef<[u8]>) -> Self {
        self.link = link.as_ref().to_vec();
        self
    }

    pub(crate) fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn mtime(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    pub(crate) fn device(mut self, major: u32, minor: u32) -> Self {
        self.device = (major, minor);
        self
    }

    pub(crate) fn gnu(mut self) -> Self {
        self.magic = *b"ustar  \0";
        self
    }

    pub(crate) fn v7(mut self) -> Self {
        self.magic = [0; 8];
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut block = vec![0; 512];
        let put = |block: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            block[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(&mut block, 0, &self.name[..self.name.len().min(100)]);
        put(&mut block, 100, format!("{:07o}\0", self.mode).as_bytes());
        put(&mut block, 108, format!("{:07o}\0", self.uid).as_bytes());
        put(&mut block, 116, format!("{:07o}\0", self.gid).as_bytes());
        put(&mut block, 124, format!("{:011o}\0", self.size).as_bytes());
        put(&mut block, 136, format!("{:011o}\0", self.mtime).as_bytes());
        block[156] = self.kind;
        put(&mut block, 157, &self.link[..self.link.len().min(100)]);
        put(&mut block, 257, &self.magic);
        if self.magic != [0; 8] {
            put(&mut block, 329, format!("{:07o}\0", self.device.0).as_bytes());
            put(&mut block, 337, format!("{:07o}\0", self.device.1).as_bytes());
        }
        for (at, bytes) in &self.patches {
            put(&mut block, *at, bytes);
        }
        put(&mut block, 148, b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        put(&mut block, 148, format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// A layer being written.
#[derive(Clone, Default)]
pub(crate) struct Layer {
    pub(crate) bytes: Vec<u8>,
}

impl Layer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A header and data of any length, padded to blocks.
    pub(crate) fn entry(self, header: &Header, data: &[u8]) -> Self {
        let padding = data.len().next_multiple_of(512) - data.len();
        self.raw(&header.bytes()).raw(data).raw(&vec![0; padding])
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        self.entry(&header(path, b'5'), &[])
    }

    pub(crate) fn dir_mode(self, path: &str, mode: u32) -> Self {
        self.entry(&header(path, b'5').mode(mode), &[])
    }

    pub(crate) fn file(self, path: &str, data: &str) -> Self {
        self.entry(&header(path, b'0').size(data.len() as u64), data.as_bytes())
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(&header(path, b'2').link(target), &[])
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(&header(path, b'1').link(target), &[])
    }

    /// `.wh.NAME` beside NAME.
    pub(crate) fn whiteout(self, path: &str) -> Self {
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        self.file(&format!("{directory}/.wh.{name}"), "")
    }

    pub(crate) fn opaque(self, path: &str) -> Self {
        self.file(&format!("{path}/.wh..wh..opq"), "")
    }

    /// PAX records for the next entry, with right lengths.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let data = pax_records(records);
        self.entry(&header("PaxHeaders/x", b'x').size(data.len() as u64), &data)
    }

    pub(crate) fn long_name(self, name: &[u8]) -> Self {
        self.entry(&header("././@LongLink", b'L').gnu().size(name.len() as u64), name)
    }

    pub(crate) fn long_link(self, name: &[u8]) -> Self {
        self.entry(&header("././@LongLink", b'K').gnu().size(name.len() as u64), name)
    }

    /// The two blocks that end a tar.
    pub(crate) fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }
}

pub(crate) fn pax_records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in records {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let length = (body.len() + 1..).find(|n| n.to_string().len() + body.len() == *n).unwrap();
        out.extend_from_slice(length.to_string().as_bytes());
        out.extend_from_slice(&body);
    }
    out
}

/// Packs a blob; the summary and the pack's bytes.
pub(crate) fn pack(blob: &[u8]) -> Result<(PackSummary, Vec<u8>), PackError> {
    pack_with(blob, &Limits::default())
}

pub(crate) fn pack_with(blob: &[u8], limits: &Limits) -> Result<(PackSummary, Vec<u8>), PackError> {
    let mut out = Vec::new();
    let summary = make_pack(blob, &mut out, limits)?;
    assert_eq!(summary.pack_bytes, out.len() as u64);
    assert_eq!(summary.blob_bytes, blob.len() as u64);
    Ok((summary, out))
}

/// What a blob must not be made into a pack for, as a person reads it.
pub(crate) fn pack_error(blob: &[u8]) -> String {
    full_message(&pack(blob).expect_err("the blob was accepted"))
}

pub(crate) fn full_message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        write!(text, ": {error}").unwrap();
        source = error.source();
    }
    text
}

/// A tree and the packs its contents lie in.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) tree: FileTree,
    pub(crate) packs: Vec<Vec<u8>>,
}

pub(crate) fn try_flatten(layers: &[Layer]) -> Result<Image, FlattenError> {
    try_flatten_with(layers, &TreeLimits::default())
}

pub(crate) fn try_flatten_with(
    layers: &[Layer],
    limits: &TreeLimits,
) -> Result<Image, FlattenError> {
    let packs: Vec<Vec<u8>> =
        layers.iter().map(|layer| pack(&layer.clone().end()).unwrap().1).collect();
    let opened = packs.iter().map(|bytes| Pack::open(bytes, bytes.len() as u64).unwrap());
    let tree = FileTree::flatten(opened, limits)?;
    let image = Image { tree, packs };
    image.check();
    Ok(image)
}

pub(crate) fn flatten(layers: &[Layer]) -> Image {
    try_flatten(layers).unwrap()
}

pub(crate) fn flatten_error(layers: &[Layer]) -> String {
    full_message(&try_flatten(layers).expect_err("the layers were accepted"))
}

impl Image {
    pub(crate) fn id(&self, path: &str) -> InodeId {
        self.tree.lookup(path.as_bytes()).unwrap_or_else(|| panic!("{path} is not there"))
    }

    pub(crate) fn inode(&self, path: &str) -> ext4::Inode<'_> {
        self.tree.inode(self.id(path))
    }

    pub(crate) fn xattrs(&self, path: &str) -> Vec<(String, Vec<u8>)> {
        let set = self.inode(path).xattrs;
        let pairs = set.into_iter().flat_map(|set| self.tree.xattrs(set));
        pairs.map(|it| (String::from_utf8_lossy(it.name).into_owned(), it.value.to_vec())).collect()
    }

    /// Bytes of a file, holes as zeroes.
    pub(crate) fn content(&self, id: InodeId) -> Vec<u8> {
        let Kind::File { size_bytes } = self.tree.inode(id).kind else { panic!("not a file") };
        let size = usize::try_from(size_bytes).unwrap();
        let mut out = vec![0; size.next_multiple_of(4096)];
        for run in self.tree.runs(id) {
            let region = &self.packs[run.region as usize];
            let from = usize::try_from(run.region_block * 4096).unwrap();
            let to = usize::try_from(run.file_block * 4096).unwrap();
            let length = usize::try_from(run.blocks * 4096).unwrap();
            out[to..to + length].copy_from_slice(&region[from..from + length]);
        }
        assert!(out[size..].iter().all(|byte| *byte == 0), "the last block is not padded");
        out.truncate(size);
        out
    }

    /// `dir`, `file CONTENT`, `-> TARGET`, … ; `-` when there is nothing.
    pub(crate) fn show(&self, path: &str) -> String {
        self.tree.lookup(path.as_bytes()).map_or("-".to_owned(), |id| self.show_inode(id))
    }

    fn show_inode(&self, id: InodeId) -> String {
        match self.tree.inode(id).kind {
            Kind::Directory => "dir".to_owned(),
            Kind::File { .. } => {
                format!("file {}", String::from_utf8_lossy(&self.content(id)))
            }
            Kind::Symlink { target } => format!("-> {}", String::from_utf8_lossy(target)),
            Kind::CharDevice { major, minor } => format!("char {major}:{minor}"),
            Kind::BlockDevice { major, minor } => format!("block {major}:{minor}"),
            Kind::Fifo => "fifo".to_owned(),
            Kind::Socket => "socket".to_owned(),
        }
    }

    /// All paths but the root, ascending, with what they are.
    pub(crate) fn paths(&self) -> BTreeMap<Vec<u8>, InodeId> {
        let mut out = BTreeMap::new();
        let mut open = vec![(Vec::new(), InodeId::ROOT)];
        while let Some((path, directory)) = open.pop() {
            for entry in self.tree.entries(directory) {
                let mut child = path.clone();
                if !child.is_empty() {
                    child.push(b'/');
                }
                child.extend_from_slice(entry.name);
                if matches!(self.tree.inode(entry.inode).kind, Kind::Directory) {
                    open.push((child.clone(), entry.inode));
                }
                out.insert(child, entry.inode);
            }
        }
        out
    }

    /// `ls` of everything, one line each.
    pub(crate) fn list(&self) -> Vec<String> {
        self.paths()
            .iter()
            .map(|(path, id)| format!("{} {}", String::from_utf8_lossy(path), self.show_inode(*id)))
            .collect()
    }

    /// What must hold for every tree.
    fn check(&self) {
        let tree = &self.tree;
        let mut names = vec![0_u32; tree.inode_count() as usize];
        for id in self.paths().values() {
            names[id.0 as usize] += 1;
        }
        assert_eq!(names[0], 0, "the root has a name");
        let mut blocks = std::collections::HashSet::new();
        for (id, names) in (0..).map(InodeId).zip(&names).skip(1) {
            let inode = tree.inode(id);
            if matches!(inode.kind, Kind::Directory) {
                assert_eq!(*names, 1, "a directory has {names} names");
                let children: Vec<&[u8]> = tree.entries(id).map(|entry| entry.name).collect();
                assert!(children.is_sorted_by(|a, b| a < b), "names are not sorted");
            } else {
                assert_eq!(inode.links, *names, "the link count is wrong");
            }
            let mut end = 0;
            for run in tree.runs(id) {
                assert!(run.file_block >= end && run.blocks > 0);
                end = run.file_block + run.blocks;
                for block in run.region_block..run.region_block + run.blocks {
                    assert!(blocks.insert((run.region, block)), "two files share a block");
                }
            }
            assert_eq!(tree.lookup(&tree.path_of(id)), Some(id));
        }
    }
}
