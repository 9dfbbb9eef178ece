//! A tree in memory, images in temporary files, and the judges.

#![expect(
    clippy::disallowed_methods,
    reason = "the judges are programs, and one test size is a variable"
)]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ext4::{
    BLOCK_SIZE, Entry, Inode, InodeId, Kind, Layout, LayoutError, Options, Output, Run, Size,
    Summary, Timestamp, Tree, Xattr, XattrSetId,
};
use tempfile::TempDir;

pub(crate) const BLOCK: usize = 4096;
pub(crate) type Attributes = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Directory(BTreeMap<Vec<u8>, InodeId>),
    File { size_bytes: u64, runs: Vec<Run> },
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) content: Content,
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) links: u32,
    pub(crate) xattrs: Option<XattrSetId>,
}

/// A region whose bytes follow from its seed: every block is different.
#[derive(Clone, Debug, Default)]
pub(crate) struct Region {
    pub(crate) seed: u64,
    pub(crate) blocks: u64,
    /// Only the first block of each chunk holds anything: for images of many gigabytes.
    pub(crate) is_thin: bool,
    /// Blocks that end a file: how many of their bytes are not padding.
    tails: HashMap<u64, usize>,
}

impl Region {
    pub(crate) fn block(&self, n: u64) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        if self.is_thin && !n.is_multiple_of(128) {
            return bytes;
        }
        let mut state = self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (n + 1);
        for word in bytes.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        if let Some(&length) = self.tails.get(&n) {
            bytes[length..].fill(0);
        }
        bytes
    }
}

#[derive(Clone, Debug)]
pub(crate) struct MemoryTree {
    pub(crate) nodes: Vec<Node>,
    sets: Vec<Vec<(Vec<u8>, Vec<u8>)>>,
    pub(crate) regions: Vec<Region>,
}

impl MemoryTree {
    pub(crate) fn new() -> Self {
        let mut tree = Self { nodes: Vec::new(), sets: Vec::new(), regions: Vec::new() };
        tree.push(Content::Directory(BTreeMap::new()));
        tree.region(1);
        tree
    }

    pub(crate) fn region(&mut self, seed: u64) -> u32 {
        self.regions.push(Region { seed, ..Region::default() });
        self.regions.len() as u32 - 1
    }

    fn push(&mut self, content: Content) -> InodeId {
        let permissions = if matches!(content, Content::Directory(_)) { 0o755 } else { 0o644 };
        let mtime = Timestamp { secs: 1_700_000_000 + self.nodes.len() as i64, nanos: 123_456_789 };
        self.nodes.push(Node {
            content,
            permissions,
            uid: 0,
            gid: 0,
            mtime,
            links: 0,
            xattrs: None,
        });
        InodeId(self.nodes.len() as u32 - 1)
    }

    pub(crate) fn node(&mut self, id: InodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    pub(crate) fn link(&mut self, parent: InodeId, name: impl AsRef<[u8]>, id: InodeId) {
        let Content::Directory(entries) = &mut self.node(parent).content else {
            panic!("parent is no directory")
        };
        assert!(entries.insert(name.as_ref().to_vec(), id).is_none(), "a name comes twice");
        self.node(id).links += 1;
    }

    pub(crate) fn add(
        &mut self,
        parent: InodeId,
        name: impl AsRef<[u8]>,
        content: Content,
    ) -> InodeId {
        let id = self.push(content);
        self.link(parent, name, id);
        id
    }

    pub(crate) fn directory(&mut self, parent: InodeId, name: impl AsRef<[u8]>) -> InodeId {
        self.add(parent, name, Content::Directory(BTreeMap::new()))
    }

    /// A file without holes, whose blocks follow what the region holds so far.
    pub(crate) fn file(
        &mut self,
        parent: InodeId,
        name: impl AsRef<[u8]>,
        region: u32,
        size_bytes: u64,
    ) -> InodeId {
        let blocks = size_bytes.div_ceil(BLOCK_SIZE);
        let runs = self.allocate(region, blocks).map(|mut run| {
            run.file_block = 0;
            run
        });
        let tail = (size_bytes % BLOCK_SIZE) as usize;
        if tail > 0 {
            let target = &mut self.regions[region as usize];
            target.tails.insert(target.blocks - 1, tail);
        }
        self.add(parent, name, Content::File { size_bytes, runs: runs.into_iter().collect() })
    }

    /// Takes blocks from the end of a region.
    pub(crate) fn allocate(&mut self, region: u32, blocks: u64) -> Option<Run> {
        let target = &mut self.regions[region as usize];
        let region_block = target.blocks;
        target.blocks += blocks;
        (blocks > 0).then_some(Run { file_block: 0, region, region_block, blocks })
    }

    /// A file of `runs` single blocks with a hole after each.
    pub(crate) fn holey(
        &mut self,
        parent: InodeId,
        name: impl AsRef<[u8]>,
        region: u32,
        runs: u64,
    ) -> InodeId {
        let runs: Vec<_> = (0..runs)
            .filter_map(|n| {
                let run = self.allocate(region, 1)?;
                Some(Run { file_block: 2 * n, ..run })
            })
            .collect();
        let size_bytes = runs.len() as u64 * 2 * BLOCK_SIZE;
        self.add(parent, name, Content::File { size_bytes, runs })
    }

    pub(crate) fn set(&mut self, attributes: &[(&[u8], &[u8])]) -> XattrSetId {
        let map: Attributes = attributes.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
        let set: Vec<_> = map.into_iter().collect();
        let at = self.sets.iter().position(|s| *s == set).unwrap_or_else(|| {
            self.sets.push(set);
            self.sets.len() - 1
        });
        XattrSetId(at as u32)
    }

    pub(crate) fn attributes(&self, id: InodeId) -> Attributes {
        let set = self.nodes[id.0 as usize].xattrs;
        set.map(|s| self.sets[s.0 as usize].iter().cloned().collect()).unwrap_or_default()
    }

    pub(crate) fn content(&self, id: InodeId) -> Vec<u8> {
        let Content::File { size_bytes, runs } = &self.nodes[id.0 as usize].content else {
            panic!("no file")
        };
        let mut bytes = vec![0; size_bytes.next_multiple_of(BLOCK_SIZE) as usize];
        for run in runs {
            for n in 0..run.blocks {
                let at = (run.file_block + n) as usize * BLOCK;
                let block = self.regions[run.region as usize].block(run.region_block + n);
                bytes[at..at + BLOCK].copy_from_slice(&block);
            }
        }
        bytes.truncate(*size_bytes as usize);
        bytes
    }

    pub(crate) fn region_blocks(&self) -> Vec<u64> {
        self.regions.iter().map(|r| r.blocks).collect()
    }

    pub(crate) fn plan(&self, options: &Options) -> Result<Layout, LayoutError> {
        Layout::plan(self, options, &self.region_blocks())
    }
}

impl Tree for MemoryTree {
    fn inode_count(&self) -> u32 {
        self.nodes.len() as u32
    }

    fn inode(&self, id: InodeId) -> Inode<'_> {
        let node = &self.nodes[id.0 as usize];
        let kind = match &node.content {
            Content::Directory(_) => Kind::Directory,
            Content::File { size_bytes, .. } => Kind::File { size_bytes: *size_bytes },
            Content::Symlink(target) => Kind::Symlink { target },
            Content::Char(major, minor) => Kind::CharDevice { major: *major, minor: *minor },
            Content::Block(major, minor) => Kind::BlockDevice { major: *major, minor: *minor },
            Content::Fifo => Kind::Fifo,
            Content::Socket => Kind::Socket,
        };
        Inode {
            kind,
            permissions: node.permissions,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            links: node.links,
            xattrs: node.xattrs,
        }
    }

    fn entries(&self, directory: InodeId) -> impl Iterator<Item = Entry<'_>> {
        let Content::Directory(entries) = &self.nodes[directory.0 as usize].content else {
            panic!("no directory")
        };
        entries.iter().map(|(name, &inode)| Entry { name, inode })
    }

    fn xattrs(&self, set: XattrSetId) -> impl Iterator<Item = Xattr<'_>> {
        self.sets[set.0 as usize].iter().map(|(name, value)| Xattr { name, value })
    }

    fn runs(&self, file: InodeId) -> impl Iterator<Item = Run> {
        let Content::File { runs, .. } = &self.nodes[file.0 as usize].content else {
            panic!("no file")
        };
        runs.iter().copied()
    }
}

pub(crate) fn options() -> Options {
    let mut options = Options::new(
        *b"builderd-ext4-id",
        *b"seed of the hash",
        Size::FreeSpace { bytes: 8 << 20 },
    );
    options.created = Timestamp { secs: 1_600_000_000, nanos: 0 };
    options.label[..6].copy_from_slice(b"rootfs");
    options
}

/// An image in a file of its own temporary directory.
pub(crate) struct ImageFile {
    pub(crate) directory: TempDir,
    pub(crate) path: PathBuf,
    pub(crate) summary: Summary,
}

/// Every write of the writer is checked for the promises of `Output`.
struct Checked<'a> {
    file: &'a mut File,
    written: BTreeMap<u64, u64>,
    size: u64,
}

impl Output for Checked<'_> {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let end = offset + bytes.len() as u64;
        let is_whole = offset.is_multiple_of(BLOCK_SIZE) && end.is_multiple_of(BLOCK_SIZE);
        assert!(is_whole, "{offset}..{end}");
        assert!(end <= self.size, "{offset}..{end} is outside of the image");
        let before = self.written.range(..end).next_back();
        assert!(before.is_none_or(|(_, &e)| e <= offset), "{offset}..{end} is written twice");
        self.written.insert(offset, end);
        Output::write_at(self.file, offset, bytes)
    }
}

impl ImageFile {
    pub(crate) fn build(tree: &MemoryTree, options: &Options) -> Self {
        let layout = tree.plan(options).unwrap_or_else(|e| panic!("{e:?}"));
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("image.ext4");
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(layout.size_bytes()).unwrap();
        let mut out =
            Checked { file: &mut file, written: BTreeMap::new(), size: layout.size_bytes() };
        layout.write(tree, &mut out).unwrap();
        let mut last = 0;
        for step in layout.moves() {
            assert!(step.image_block >= last, "moves are not ascending");
            last = step.image_block + step.blocks;
            assert!(last * BLOCK_SIZE <= layout.size_bytes());
            let written = out.written.range(..last * BLOCK_SIZE).next_back();
            assert!(written.is_none_or(|(_, &e)| e <= step.image_block * BLOCK_SIZE));
            let region = &tree.regions[step.region as usize];
            for n in 0..step.blocks {
                if region.is_thin && (step.region_block + n) % 128 != 0 {
                    continue;
                }
                let bytes = region.block(step.region_block + n);
                out.file.write_all_at(&bytes, (step.image_block + n) * BLOCK_SIZE).unwrap();
            }
        }
        Self { directory, path, summary: layout.summary() }
    }

    /// `e2fsck -fn` must end with 0 and complain of nothing.
    pub(crate) fn assert_clean(&self) {
        if !has("e2fsck") {
            return;
        }
        let output = Command::new("e2fsck").args(["-fn"]).arg(&self.path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_quiet = text
            .lines()
            .all(|line| line.is_empty() || line.starts_with("Pass ") || line.contains(" files ("));
        assert!(output.status.success() && is_quiet, "e2fsck: {text}");
    }

    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Option<String> {
        if !has(program) {
            return None;
        }
        let mut command = Command::new(program);
        let output = command.args(arguments).arg(&self.path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
        Some(text)
    }

    /// Mounts the image, or says why not.
    pub(crate) fn mount(&self, options: &str) -> Option<Mount> {
        if !rustix::process::geteuid().is_root() {
            skip("a kernel mount needs root");
            return None;
        }
        let path = self.directory.path().join("mount");
        std::fs::create_dir_all(&path).unwrap();
        let mut command = Command::new("mount");
        let status = command
            .args(["-t", "ext4", "-o", &format!("loop,{options}")])
            .args([&self.path, &path])
            .status()
            .unwrap();
        assert!(status.success(), "the kernel does not mount the image");
        Some(Mount { path })
    }
}

pub(crate) struct Mount {
    path: PathBuf,
}

impl Mount {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The block device behind the mount.
    pub(crate) fn device(&self) -> String {
        let output =
            Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(&self.path).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.path).status();
        let is_gone = status.is_ok_and(|s| s.success());
        assert!(is_gone || std::thread::panicking(), "the image cannot be unmounted");
    }
}

pub(crate) fn has(program: &str) -> bool {
    let is_there = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|o| o.status.success());
    if !is_there {
        skip(&format!("{program} is not installed"));
    }
    is_there
}

/// A judge that is missing is always told: one line for each, which a runner can count.
pub(crate) fn skip(why: &str) {
    println!("SKIPPED JUDGE: {why}");
    eprintln!("SKIPPED JUDGE: {why}");
}

/// The full sizes are for `EXT4_TEST_SIZE=full`; the size taken is printed.
pub(crate) fn size(reduced: u32, full: u32) -> u32 {
    let is_full = std::env::var("EXT4_TEST_SIZE").is_ok_and(|v| v == "full");
    let size = if is_full { full } else { reduced };
    println!("test size: {size} of {full}");
    size
}

/// Half MD4 with the default seed, written from the kernel's description for this test alone.
pub(crate) fn half_md4(name: &[u8]) -> u32 {
    assert!(name.len() <= 28, "one block of the hash is enough here");
    let pad = name.len() as u32 * 0x0101_0101;
    let mut x = [pad; 8];
    for (word, part) in x.iter_mut().zip(name.chunks(4)) {
        for &byte in part {
            *word = (*word << 8) + u32::from(byte);
        }
    }
    let [mut a, mut b, mut c, mut d] = [0x6745_2301_u32, 0xEFCD_AB89, 0x98BA_DCFE, 0x1032_5476];
    let before = b;
    let mut round = |f: &dyn Fn(u32, u32, u32) -> u32, k: u32, order: [usize; 8], s: [u32; 4]| {
        for half in order.chunks(4) {
            a = a
                .wrapping_add(f(b, c, d))
                .wrapping_add(x[half[0]])
                .wrapping_add(k)
                .rotate_left(s[0]);
            d = d
                .wrapping_add(f(a, b, c))
                .wrapping_add(x[half[1]])
                .wrapping_add(k)
                .rotate_left(s[1]);
            c = c
                .wrapping_add(f(d, a, b))
                .wrapping_add(x[half[2]])
                .wrapping_add(k)
                .rotate_left(s[2]);
            b = b
                .wrapping_add(f(c, d, a))
                .wrapping_add(x[half[3]])
                .wrapping_add(k)
                .rotate_left(s[3]);
        }
    };
    round(&|x, y, z| z ^ (x & (y ^ z)), 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]);
    let g = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    round(&g, 0x5A82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]);
    round(&|x, y, z| x ^ y ^ z, 0x6ED9_EBA1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]);
    before.wrapping_add(b) & !1
}
