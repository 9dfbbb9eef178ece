//! Measures planning and writing: `measure_writer FILES [PER_DIRECTORY [IMAGE]]`.
//!
//! The tree is made up as it is walked, so what is measured is the writer alone.

use std::time::Instant;

use ext4::{
    Entry, Inode, InodeId, Kind, Layout, Options, Output, Run, Size, Timestamp, Tree, Xattr,
    XattrSetId,
};

/// Files of one block each, so many to a directory.
struct Made {
    directories: u32,
    per_directory: u32,
    /// All names, of eight bytes each.
    names: Vec<[u8; 8]>,
}

impl Tree for Made {
    fn inode_count(&self) -> u32 {
        1 + self.directories * (1 + self.per_directory)
    }

    fn inode(&self, id: InodeId) -> Inode<'_> {
        let is_directory = id.0 <= self.directories;
        Inode {
            kind: if is_directory { Kind::Directory } else { Kind::File { size_bytes: 4096 } },
            permissions: if is_directory { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: Timestamp { secs: 1_700_000_000, nanos: 0 },
            links: 1,
            xattrs: None,
        }
    }

    fn entries(&self, directory: InodeId) -> impl Iterator<Item = Entry<'_>> {
        let (count, first) = if directory == InodeId::ROOT {
            (self.directories, 1)
        } else {
            (self.per_directory, 1 + self.directories + (directory.0 - 1) * self.per_directory)
        };
        let names = self.names.iter().zip(0..count);
        names.map(move |(name, n)| Entry { name, inode: InodeId(first + n) })
    }

    fn xattrs(&self, _: XattrSetId) -> impl Iterator<Item = Xattr<'_>> {
        std::iter::empty()
    }

    fn runs(&self, file: InodeId) -> impl Iterator<Item = Run> {
        let region_block = u64::from(file.0 - 1 - self.directories);
        std::iter::once(Run { file_block: 0, region: 0, region_block, blocks: 1 })
    }
}

/// Counts bytes, and writes them if there is a file.
struct Counted {
    file: Option<std::fs::File>,
    bytes: u64,
}

impl Output for Counted {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.bytes += bytes.len() as u64;
        match &mut self.file {
            Some(file) => Output::write_at(file, offset, bytes),
            None => Ok(()),
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |n: usize| arguments.get(n).map(|a| a.parse::<u32>()).transpose();
    let files = number(0)?.unwrap_or(100_000);
    let per_directory = number(1)?.unwrap_or(20).clamp(1, files.max(1));
    let directories = files.div_ceil(per_directory);
    let names = (0..per_directory.max(directories))
        .map(|n| {
            let mut name = *b"f0000000";
            name[1..].copy_from_slice(&format!("{n:07}").as_bytes()[..7]);
            name
        })
        .collect();
    let tree = Made { directories, per_directory, names };
    let mut options = Options::new([1; 16], [2; 16], Size::FreeSpace { bytes: 64 << 20 });
    options.created = Timestamp { secs: 1_700_000_000, nanos: 0 };
    let before = peak_kib();
    let started = Instant::now();
    let layout = Layout::plan(&tree, &options, &[u64::from(directories * per_directory)])?;
    let planned = started.elapsed();
    let file = arguments.get(2).map(std::fs::File::create).transpose()?;
    if let Some(file) = &file {
        file.set_len(layout.size_bytes())?;
    }
    let mut out = Counted { file, bytes: 0 };
    layout.write(&tree, &mut out)?;
    let written = started.elapsed() - planned;
    println!(
        "{files} files, {directories} directories: plan {planned:.1?}, write {written:.1?}, \
         {} MiB of metadata, {} KiB more memory",
        out.bytes >> 20,
        peak_kib().saturating_sub(before)
    );
    println!("{:?}", layout.summary());
    Ok(())
}

/// Peak memory of this process, or 0 where the kernel does not tell.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
