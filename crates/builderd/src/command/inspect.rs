//! `builderd inspect`: superblock, tree, contents and checksums of an image, read by the
//! reader of the `ext4` crate: no mount, no root.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::ffi::OsStrExt as _;

use ext4::reader::{Image, Node, NodeKind, ReadError, WalkLimits};
use serde_json::{Value, json};

use super::args::InspectArgs;
use super::{Failure, text};
use crate::build::{format_uuid, hex};

/// Why an image cannot be shown.
#[derive(Debug, thiserror::Error)]
enum InspectError {
    #[error("cannot open {path}")]
    Open { path: String, source: io::Error },
    #[error("{path} cannot be read as ext4")]
    Image { path: String, source: ReadError },
    #[error("no `{path}` in the image")]
    Missing { path: String, source: ReadError },
    #[error("`{path}` is not a regular file")]
    NotAFile { path: String },
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
    #[error("the tree of the image is damaged")]
    Tree(#[from] ReadError),
}

impl From<InspectError> for Failure {
    fn from(error: InspectError) -> Self {
        let (code, hint) = match &error {
            // A reader that went away, as `head` does, is no failure of ours.
            InspectError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => (0, None),
            InspectError::Open { source, .. } if is_about_the_path(source) => (3, None),
            InspectError::Output(_) | InspectError::Open { .. } => (1, None),
            InspectError::Image { source: ReadError::NotExt4, .. } => {
                (3, Some("an image stored with --compression has to be unpacked first".to_owned()))
            }
            InspectError::Missing { .. } => (3, Some("list names with --tree".to_owned())),
            InspectError::Image { .. } | InspectError::NotAFile { .. } | InspectError::Tree(_) => {
                (3, None)
            }
        };
        Self { code, error: Box::new(error), hint }
    }
}

/// Whether the file is the problem, and not the disk.
fn is_about_the_path(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    [NotFound, PermissionDenied, NotADirectory].contains(&error.kind())
}

type Ext4Image = Image<File>;

pub(super) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let path = args.image.display().to_string();
    let file = File::open(&args.image)
        .map_err(|source| InspectError::Open { path: path.clone(), source })?;
    let image =
        Image::open(file).map_err(|source| InspectError::Image { path: path.clone(), source })?;
    if let Some(inner) = &args.cat {
        cat(&image, inner)?;
    } else if let Some(below) = &args.tree {
        tree(&image, below, args.json)?;
    } else {
        superblock(&image, args.json)?;
    }
    if args.verify {
        let found = image.verify().map_err(|source| InspectError::Image { path, source })?;
        let words = format!(
            "verified: {} inodes, {} directories, {} names, {} blocks in use; every checksum is right",
            found.inodes, found.directories, found.names, found.blocks
        );
        tell!("{words}");
    }
    Ok(())
}

fn superblock(image: &Ext4Image, as_json: bool) -> Result<(), InspectError> {
    let it = image.superblock();
    let block = image.block_size();
    let boot = image.boot_area();
    let end = boot.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let provenance = String::from_utf8_lossy(&boot[..end]);
    let mut out = io::stdout().lock();
    if as_json {
        let value = json!({
            "uuid": format_uuid(&it.uuid),
            "block_size": block,
            "blocks": it.blocks_count,
            "free_blocks": it.free_blocks,
            "inodes": it.inodes_count,
            "free_inodes": it.free_inodes,
            "journal": it.journal_inode != 0,
            "created_secs": it.created_secs,
            "features": {"compat": it.compat, "incompat": it.incompat, "ro_compat": it.ro_compat},
            "hash_seed": hex(&it.hash_seed),
            "provenance": serde_json::from_str::<Value>(&provenance).ok(),
        });
        writeln!(out, "{value}")?;
        return Ok(());
    }
    writeln!(out, "uuid        {}", format_uuid(&it.uuid))?;
    let (size, free) = (it.blocks_count * block, it.free_blocks * block);
    writeln!(out, "size        {}, {} free", text::bytes(size), text::bytes(free))?;
    let used = it.inodes_count.saturating_sub(it.free_inodes);
    writeln!(out, "inodes      {used} of {} in use", it.inodes_count)?;
    writeln!(out, "journal     {}", if it.journal_inode == 0 { "none" } else { "yes" })?;
    writeln!(out, "created     {} (seconds since 1970)", it.created_secs)?;
    writeln!(
        out,
        "features    compat {:#x}, incompat {:#x}, ro_compat {:#x}",
        it.compat, it.incompat, it.ro_compat
    )?;
    if !provenance.is_empty() {
        writeln!(out, "provenance  {}", text::printable(provenance.trim_end()))?;
    }
    Ok(())
}

fn find(image: &Ext4Image, path: &str) -> Result<Node, InspectError> {
    image
        .lookup(std::ffi::OsStr::new(path).as_bytes())
        .map_err(|source| InspectError::Missing { path: text::printable(path), source })
}

fn cat(image: &Ext4Image, path: &str) -> Result<(), InspectError> {
    let node = find(image, path)?;
    if node.kind != NodeKind::File {
        return Err(InspectError::NotAFile { path: text::printable(path) });
    }
    let mut out = BufWriter::with_capacity(1 << 20, io::stdout().lock());
    io::copy(&mut image.content(&node)?, &mut out)?;
    Ok(out.flush()?)
}

/// Every name at or below `below`, one line each, as `ls -l` orders its columns.
fn tree(image: &Ext4Image, below: &str, as_json: bool) -> Result<(), InspectError> {
    find(image, below)?;
    let mut below = below.trim_matches('/').as_bytes().to_vec();
    if !below.is_empty() {
        below.insert(0, b'/');
    }
    let mut out = BufWriter::new(io::stdout().lock());
    image.walk(WalkLimits::default(), |path: &[u8], node: &Node| {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let full = [b"/", path].concat();
        let inside = full.strip_prefix(below.as_slice());
        if !inside.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/")) {
            return Ok(());
        }
        let target = match node.kind {
            NodeKind::Symlink => Some(image.symlink_target(node)?),
            NodeKind::Directory
            | NodeKind::File
            | NodeKind::CharDevice { .. }
            | NodeKind::BlockDevice { .. }
            | NodeKind::Fifo
            | NodeKind::Socket => None,
        };
        if as_json {
            writeln!(out, "{}", json_line(image, &full, node, target.as_deref())?)?;
        } else {
            writeln!(out, "{}", text_line(&full, node, target.as_deref()))?;
        }
        Ok::<(), InspectError>(())
    })?;
    Ok(out.flush()?)
}

fn letter(kind: &NodeKind) -> char {
    match kind {
        NodeKind::Directory => 'd',
        NodeKind::File => '-',
        NodeKind::Symlink => 'l',
        NodeKind::CharDevice { .. } => 'c',
        NodeKind::BlockDevice { .. } => 'b',
        NodeKind::Fifo => 'p',
        NodeKind::Socket => 's',
    }
}

fn text_line(path: &[u8], node: &Node, target: Option<&[u8]>) -> String {
    let size = match node.kind {
        NodeKind::CharDevice { major, minor } | NodeKind::BlockDevice { major, minor } => {
            format!("{major},{minor}")
        }
        NodeKind::Directory
        | NodeKind::File
        | NodeKind::Symlink
        | NodeKind::Fifo
        | NodeKind::Socket => node.size_bytes.to_string(),
    };
    let arrow = target.map(|target| format!(" -> {}", target.escape_ascii())).unwrap_or_default();
    format!(
        "{}{:04o} {:>3} {:>5}:{:<5} {size:>12} {:>12} {}{arrow}",
        letter(&node.kind),
        node.permissions,
        node.links,
        node.uid,
        node.gid,
        node.mtime.secs,
        path.escape_ascii()
    )
}

fn json_line(
    image: &Ext4Image,
    path: &[u8],
    node: &Node,
    target: Option<&[u8]>,
) -> Result<Value, ReadError> {
    let xattrs: serde_json::Map<String, Value> = image
        .xattrs(node)?
        .into_iter()
        .map(|xattr| (String::from_utf8_lossy(&xattr.name).into_owned(), hex(&xattr.value).into()))
        .collect();
    Ok(json!({
        "path": path.escape_ascii().to_string(),
        "type": letter(&node.kind).to_string(),
        "mode": format!("{:04o}", node.permissions),
        "uid": node.uid,
        "gid": node.gid,
        "size": node.size_bytes,
        "links": node.links,
        "inode": node.ino,
        "mtime": node.mtime.secs,
        "mtime_nanos": node.mtime.nanos,
        "target": target.map(|target| target.escape_ascii().to_string()),
        "xattrs": xattrs,
    }))
}
