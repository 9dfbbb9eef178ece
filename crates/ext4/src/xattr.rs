//! Extended attributes: name prefixes, POSIX ACLs, the entries in an inode and in a block.
//!
//! Source: the kernel's `fs/ext4/xattr.c`, `xattr.h` and `acl.c`. Knows nothing of inodes or
//! trees: one set of attributes in, bytes out.

use crate::error::XattrError;
use crate::format::{
    BLOCK, Block, Checksum, INLINE_XATTR_BYTES, XATTR_MAGIC, get16, get32, lo16, lo32, put16,
    put32, short, xattr_checksum,
};
use crate::tree::Xattr;

/// Name prefixes and their numbers, longest match first.
pub(crate) const PREFIXES: [(&[u8], u8); 6] = [
    (b"system.posix_acl_access", ACL_ACCESS),
    (b"system.posix_acl_default", ACL_DEFAULT),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
    (b"system.", 7),
];
pub(crate) const ACL_ACCESS: u8 = 2;
pub(crate) const ACL_DEFAULT: u8 = 3;

const HEADER: usize = 32;
const ENTRY: usize = 16;
/// Four zero bytes end a list of entries.
const END: usize = 4;

/// One set of attributes as ext4 stores it.
pub(crate) struct Encoded {
    /// What goes to the end of the inode, or nothing.
    pub(crate) inline: Option<[u8; INLINE_XATTR_BYTES]>,
    /// What goes to a block of its own, still without references and checksum.
    pub(crate) block: Option<Box<Block>>,
}

struct Attribute<'a> {
    prefix: u8,
    name: &'a [u8],
    value: Vec<u8>,
}

impl Attribute<'_> {
    fn bytes(&self) -> usize {
        ENTRY + self.name.len().next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }
}

/// Encodes a set: what fits goes into the inode in the given order, the rest into one block.
pub(crate) fn encode<'a>(set: impl Iterator<Item = Xattr<'a>>) -> Result<Encoded, XattrError> {
    let mut inline = Vec::new();
    let mut inline_room = INLINE_XATTR_BYTES - 4 - END;
    let mut rest = Vec::new();
    for xattr in set {
        let attribute = attribute(xattr)?;
        if attribute.bytes() <= inline_room {
            inline_room -= attribute.bytes();
            inline.push(attribute);
        } else {
            rest.push(attribute);
        }
    }
    refuse_duplicates(inline.iter().chain(&rest))?;
    Ok(Encoded {
        inline: (!inline.is_empty()).then(|| encode_inline(&inline)),
        block: if rest.is_empty() { None } else { Some(encode_block(rest)?) },
    })
}

fn attribute<'a>(xattr: Xattr<'a>) -> Result<Attribute<'a>, XattrError> {
    let bad_name = || XattrError::Name { name: xattr.name.to_vec() };
    for (prefix, number) in PREFIXES {
        let Some(name) = xattr.name.strip_prefix(prefix) else { continue };
        if number == ACL_ACCESS || number == ACL_DEFAULT {
            if !name.is_empty() {
                continue;
            }
            let acl = |problem| XattrError::Acl { name: xattr.name.to_vec(), problem };
            let value = acl_to_disk(xattr.value).map_err(acl)?;
            return Ok(Attribute { prefix: number, name, value });
        }
        // "system.data" is where ext4 keeps the contents of small files.
        let is_reserved = number == 7 && name == b"data";
        if name.is_empty() || name.len() > 255 || name.contains(&0) || is_reserved {
            return Err(bad_name());
        }
        return Ok(Attribute { prefix: number, name, value: xattr.value.to_vec() });
    }
    Err(bad_name())
}

fn refuse_duplicates<'a>(
    attributes: impl Iterator<Item = &'a Attribute<'a>>,
) -> Result<(), XattrError> {
    let mut names: Vec<_> = attributes.map(|a| (a.prefix, a.name)).collect();
    names.sort_unstable();
    let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) else { return Ok(()) };
    let prefix = PREFIXES.iter().find(|p| p.1 == twice[0].0).map_or(&b""[..], |p| p.0);
    Err(XattrError::Duplicate { name: [prefix, twice[0].1].concat() })
}

/// Puts entries from the front and values from the back of `bytes`; offsets of values count
/// from `origin`.
fn put_attributes(bytes: &mut [u8], first: usize, origin: usize, attributes: &[Attribute<'_>]) {
    let is_hashed = origin == 0;
    let mut at = first;
    let mut values = bytes.len();
    for attribute in attributes {
        let size = attribute.value.len();
        let hash = if is_hashed { entry_hash(attribute.name, &attribute.value) } else { 0 };
        bytes[at] = short(attribute.name.len());
        bytes[at + 1] = attribute.prefix;
        if size > 0 {
            values -= size.next_multiple_of(4);
            bytes[values..values + size].copy_from_slice(&attribute.value);
            put16(bytes, at + 2, lo16(lo32((values - origin) as u64)));
        }
        put32(bytes, at + 8, lo32(size as u64));
        put32(bytes, at + 12, hash);
        bytes[at + ENTRY..at + ENTRY + attribute.name.len()].copy_from_slice(attribute.name);
        at += ENTRY + attribute.name.len().next_multiple_of(4);
    }
}

fn encode_inline(attributes: &[Attribute<'_>]) -> [u8; INLINE_XATTR_BYTES] {
    let mut bytes = [0; INLINE_XATTR_BYTES];
    put32(&mut bytes, 0, XATTR_MAGIC);
    put_attributes(&mut bytes, 4, 4, attributes);
    bytes
}

fn encode_block(mut attributes: Vec<Attribute<'_>>) -> Result<Box<Block>, XattrError> {
    let bytes: usize = attributes.iter().map(Attribute::bytes).sum();
    let limit = BLOCK - HEADER - END;
    if bytes > limit {
        return Err(XattrError::TooLarge { bytes, limit });
    }
    attributes.sort_unstable_by_key(|a| (a.prefix, a.name.len(), a.name));
    let mut block = Box::new([0; BLOCK]);
    put32(&mut block[..], 0x00, XATTR_MAGIC);
    put32(&mut block[..], 0x08, 1);
    let hashes: Vec<_> = attributes.iter().map(|a| entry_hash(a.name, &a.value)).collect();
    put32(&mut block[..], 0x0C, block_hash(hashes.into_iter()));
    put_attributes(&mut block[..], HEADER, 0, &attributes);
    Ok(block)
}

/// Completes a block: how many inodes refer to it, and its checksum.
pub(crate) fn seal(block: &mut Block, seed: Checksum, block_number: u64, references: u32) {
    put32(block, 0x04, references);
    let sum = xattr_checksum(seed, block_number, block);
    put32(block, 0x10, sum);
}

/// `e_hash`: the name byte by byte, then the value word by word.
pub(crate) fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    let start = name.iter().fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    value.chunks(4).fold(start, |hash, chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}

/// `h_hash`: zero, which forbids sharing, if any entry's hash is zero.
pub(crate) fn block_hash(entries: impl Iterator<Item = u32>) -> u32 {
    let mut hash = 0_u32;
    for entry in entries {
        if entry == 0 {
            return 0;
        }
        hash = hash.rotate_left(16) ^ entry;
    }
    hash
}

mod tag {
    pub(super) const USER_OBJ: u16 = 0x01;
    pub(super) const USER: u16 = 0x02;
    pub(super) const GROUP_OBJ: u16 = 0x04;
    pub(super) const GROUP: u16 = 0x08;
    pub(super) const MASK: u16 = 0x10;
    pub(super) const OTHER: u16 = 0x20;
}

/// From the form of `getxattr(2)` (version 2, 8-byte entries) to ext4's own (version 1,
/// entries of 4 bytes where no id is needed), with the kernel's `posix_acl_valid` check.
fn acl_to_disk(value: &[u8]) -> Result<Vec<u8>, &'static str> {
    if value.len() < 4 || get32(value, 0) != 2 {
        return Err("it is not of version 2");
    }
    let (entries, torn) = value[4..].as_chunks::<8>();
    if !torn.is_empty() || entries.is_empty() {
        return Err("it does not consist of whole entries");
    }
    let mut disk = 1_u32.to_le_bytes().to_vec();
    let mut last = 0;
    let mut needs_mask = false;
    for entry in entries {
        let (tag, permissions) = (get16(entry, 0), get16(entry, 2));
        if permissions > 7 {
            return Err("an entry has unknown permissions");
        }
        let may_repeat = tag == tag::USER || tag == tag::GROUP;
        let is_known = tag.is_power_of_two() && tag <= tag::OTHER;
        if !is_known || tag < last || (tag == last && !may_repeat) {
            return Err("its entries are unknown or out of order");
        }
        let follows = match tag {
            tag::USER | tag::GROUP_OBJ => last >= tag::USER_OBJ,
            tag::GROUP | tag::MASK | tag::OTHER => last >= tag::GROUP_OBJ,
            _ => true,
        };
        if !follows {
            return Err("it lacks the entry of the owner or of the group");
        }
        needs_mask |= may_repeat;
        if tag == tag::OTHER && needs_mask && last != tag::MASK {
            return Err("it names users or groups but has no mask");
        }
        disk.extend_from_slice(&entry[..4]);
        if may_repeat {
            disk.extend_from_slice(&entry[4..]);
        }
        last = tag;
    }
    if last == tag::OTHER { Ok(disk) } else { Err("it lacks the entry of the others") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut value = 2_u32.to_le_bytes().to_vec();
        for &(tag, permissions, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    const NONE: u32 = u32::MAX;

    #[test]
    fn a_valid_acl_becomes_short_entries() {
        let full = acl(&[
            (1, 7, NONE),
            (2, 5, 1000),
            (4, 4, NONE),
            (8, 6, 7),
            (16, 7, NONE),
            (32, 0, NONE),
        ]);
        let disk = acl_to_disk(&full).unwrap();
        assert_eq!(disk.len(), 4 + 4 * 4 + 2 * 8);
    }

    #[test]
    fn an_acl_the_kernel_would_refuse_is_refused() {
        for bad in [
            acl(&[]),
            acl(&[(1, 7, NONE), (4, 7, NONE)]),
            acl(&[(4, 7, NONE), (1, 7, NONE), (32, 0, NONE)]),
            acl(&[(1, 7, NONE), (32, 0, NONE)]),
            acl(&[(1, 7, NONE), (2, 7, 5), (4, 7, NONE), (32, 0, NONE)]),
            acl(&[(1, 8, NONE), (4, 7, NONE), (32, 0, NONE)]),
            acl(&[(1, 7, NONE), (1, 7, NONE), (4, 7, NONE), (32, 0, NONE)]),
            acl(&[(1, 7, NONE), (4, 7, NONE), (32, 0, NONE), (64, 0, NONE)]),
            acl(&[(1, 7, NONE), (4, 7, NONE), (32, 0, NONE)])[..20].to_vec(),
            vec![1, 0, 0, 0],
            vec![],
        ] {
            assert!(acl_to_disk(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_outside_of_the_known_namespaces_are_refused() {
        for name in [&b"user."[..], b"foo.bar", b"", b"system.data", b"user", b"user.a\0b"] {
            let set = [Xattr { name, value: b"" }];
            assert!(encode(set.into_iter()).is_err(), "{}", name.escape_ascii());
        }
    }
}
