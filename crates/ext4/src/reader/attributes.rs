//! Extended attributes of an inode, in the form of `getxattr(2)`.

use super::{Image, Node, ReadAt, ReadError, check, damaged};
use crate::format::{XATTR_MAGIC, get16, get32, xattr_checksum};

const ENTRY: usize = 16;
const HEADER: usize = 32;

const ACL_USER: u16 = 2;
const ACL_GROUP: u16 = 8;

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeXattr {
    /// The full name, for example `security.capability`.
    pub name: Vec<u8>,
    /// The value as `getxattr(2)` gives it.
    pub value: Vec<u8>,
}

impl<R: ReadAt> Image<R> {
    /// The extended attributes of an inode, sorted by name.
    ///
    /// # Errors
    /// If they are damaged, or use attribute inodes.
    pub fn xattrs(&self, node: &Node) -> Result<Vec<NodeXattr>, ReadError> {
        let mut found = Vec::new();
        if get32(&node.inline_xattrs, 0) == XATTR_MAGIC {
            let entries = &node.inline_xattrs[4..];
            read_entries(node, entries, 0, &mut found)?;
        }
        if node.xattr_block != 0 {
            let block = self.xattr_block(node)?;
            read_entries(node, &block, HEADER, &mut found)?;
        }
        found.sort_unstable();
        if found.windows(2).any(|pair| pair[0].name == pair[1].name) {
            return Err(damaged("attributes of inode", node.ino.into(), "a name comes twice"));
        }
        Ok(found)
    }

    /// The attribute block of an inode, header and checksum checked.
    pub(super) fn xattr_block(&self, node: &Node) -> Result<Vec<u8>, ReadError> {
        let block = self.block(node.xattr_block)?;
        if get32(&block, 0) != XATTR_MAGIC || get32(&block, 8) != 1 {
            return Err(damaged("attribute block", node.xattr_block, "it has no header"));
        }
        if let Some(seed) = self.seed {
            let sum = xattr_checksum(seed, node.xattr_block, &block);
            check("attribute block", node.xattr_block, sum == get32(&block, 0x10))?;
        }
        Ok(block)
    }
}

/// Reads entries from `first` on; offsets of values count from the start of `bytes`.
fn read_entries(
    node: &Node,
    bytes: &[u8],
    first: usize,
    found: &mut Vec<NodeXattr>,
) -> Result<(), ReadError> {
    let wrong = |problem| damaged("attributes of inode", node.ino.into(), problem);
    let mut at = first;
    loop {
        let entry = bytes.get(at..).unwrap_or_default();
        if entry.len() < 4 {
            return Err(wrong("the list has no end"));
        }
        if get32(entry, 0) == 0 {
            return Ok(());
        }
        if entry.len() < ENTRY {
            return Err(wrong("the list has no end"));
        }
        let name_length = usize::from(entry[0]);
        let name = entry.get(ENTRY..ENTRY + name_length);
        let name = name.ok_or_else(|| wrong("a name reaches past its end"))?;
        if get32(entry, 4) != 0 {
            return Err(ReadError::Unsupported { what: "attribute inodes", bits: get32(entry, 4) });
        }
        let start = usize::from(get16(entry, 2));
        let size = get32(entry, 8) as usize;
        let value = if size == 0 { Some(&[][..]) } else { bytes.get(start..start + size) };
        let value = value.ok_or_else(|| wrong("a value reaches past its end"))?;
        found.push(named(entry[1], name, value).ok_or_else(|| wrong("a name or ACL is unknown"))?);
        at += ENTRY + name_length.next_multiple_of(4);
    }
}

/// The full name and the value as a program sees them.
fn named(number: u8, name: &[u8], value: &[u8]) -> Option<NodeXattr> {
    let prefix: &[u8] = match number {
        1 => b"user.",
        2 => b"system.posix_acl_access",
        3 => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        7 => b"system.",
        _ => return None,
    };
    let is_acl = matches!(number, 2 | 3);
    if is_acl != name.is_empty() || name.contains(&0) {
        return None;
    }
    let value = if is_acl { acl(value)? } else { value.to_vec() };
    Some(NodeXattr { name: [prefix, name].concat(), value })
}

/// From ext4's own form to the one of `getxattr(2)`, where every entry has an id.
fn acl(disk: &[u8]) -> Option<Vec<u8>> {
    let (version, mut rest) = disk.split_at_checked(4)?;
    if get32(version, 0) != 1 {
        return None;
    }
    let mut value = 2_u32.to_le_bytes().to_vec();
    while !rest.is_empty() {
        let tag = get16(rest, 0);
        let length = if tag == ACL_USER || tag == ACL_GROUP { 8 } else { 4 };
        let (entry, after) = rest.split_at_checked(length)?;
        value.extend_from_slice(&entry[..4]);
        value.extend_from_slice(entry.get(4..8).unwrap_or(&[0xFF; 4]));
        rest = after;
    }
    Some(value)
}
