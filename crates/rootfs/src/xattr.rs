//! Sets of extended attributes: which names are kept, one canonical byte form per set, and
//! a store that keeps each set once. Knows nothing of how a file system lays them out.
//!
//! Canonical form: for each attribute, ascending by name: name length (varint), name, value
//! length (varint), value.

use std::collections::BTreeMap;

use crate::varint::{Cursor, Malformed, put};

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
const CAPABILITY: &[u8] = b"security.capability";

/// Whether an attribute of a layer belongs into an image.
///
/// Kept: `security.*`, `user.*`, `trusted.*`, `system.posix_acl_access` and `_default`.
/// Dropped: `trusted.overlay.*` and `user.overlay.*`, by which a layer could steer an overlay
/// mount of the host, and namespaces that Linux does not have.
pub(crate) fn is_kept(name: &[u8]) -> bool {
    if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
        return false;
    }
    if matches!(name, ACL_ACCESS | ACL_DEFAULT) {
        return true;
    }
    [&b"security."[..], b"user.", b"trusted."]
        .iter()
        .any(|namespace| name.len() > namespace.len() && name.starts_with(namespace))
}

/// What kind of file would carry an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Carrier {
    Directory,
    File,
    Symlink,
    /// A device or a pipe.
    Special,
}

/// Whether Linux lets an attribute be set on such a file. Where it does not, a layer may say
/// what it likes: nobody who unpacks it shows the attribute, and Docker goes on without.
fn is_settable(carrier: Carrier, name: &[u8], value: &[u8]) -> bool {
    match name {
        ACL_ACCESS => carrier != Carrier::Symlink && !acl::is_only_a_mode(value),
        ACL_DEFAULT => carrier == Carrier::Directory && !acl::is_empty(value),
        name if name.starts_with(b"user.") => {
            matches!(carrier, Carrier::Directory | Carrier::File)
        }
        _ => true,
    }
}

/// The canonical form of what a file with these permissions has of a set once it is unpacked;
/// empty where that is nothing.
pub(crate) fn as_unpacked(carrier: Carrier, permissions: u16, encoded: &[u8]) -> Vec<u8> {
    let pairs = Pairs::new(encoded).filter(|(name, value)| is_settable(carrier, name, value));
    let unpacked = pairs.map(|(name, value)| {
        let value = match name {
            ACL_ACCESS => acl::after_chmod(value, permissions),
            _ => value.to_vec(),
        };
        (name.to_vec(), value)
    });
    encode(&unpacked.collect())
}

/// What a file has of attributes once an entry describes it that was described before: `chown`
/// takes its capabilities away (not from a directory, which has none), then each attribute of the
/// entry is set. Both sets and the answer are canonical, or empty for none.
pub(crate) fn described_again(before: &[u8], entry: &[u8], is_directory: bool) -> Vec<u8> {
    let stays = |(name, _): &(&[u8], &[u8])| is_directory || *name != CAPABILITY;
    let mut old = Pairs::new(before).filter(stays).peekable();
    let mut new = Pairs::new(entry).peekable();
    let mut out = Vec::with_capacity(before.len() + entry.len());
    loop {
        let (name, value) = match (old.peek(), new.peek()) {
            (None, None) => return out,
            (Some(pair), None) => (*pair, old.next()).0,
            (Some(pair), Some((name, _))) if pair.0 < *name => (*pair, old.next()).0,
            (there, Some(pair)) => {
                let replaces = there.is_some_and(|(name, _)| *name == pair.0);
                let pair = (*pair, new.next()).0;
                if replaces {
                    old.next();
                }
                pair
            }
        };
        put_pair(&mut out, name, value);
    }
}

/// POSIX ACLs in the form of `getxattr(2)`: four bytes of version, then entries of a tag, its
/// permissions and an id. Whether one is valid is for whoever stores it to say.
mod acl {
    const VERSION: usize = 4;
    const ENTRY: usize = 8;
    const OWNER: u8 = 0x01;
    const GROUP: u8 = 0x04;
    const MASK: u8 = 0x10;
    const OTHERS: u8 = 0x20;

    /// To set it is to remove it.
    pub(super) fn is_empty(value: &[u8]) -> bool {
        value.len() <= VERSION
    }

    /// It says no more than a mode can, so that the kernel makes a mode of it.
    pub(super) fn is_only_a_mode(value: &[u8]) -> bool {
        let (entries, torn) = value.get(VERSION..).unwrap_or_default().as_chunks::<ENTRY>();
        torn.is_empty()
            && entries
                .iter()
                .all(|entry| entry[1] == 0 && matches!(entry[0], OWNER | GROUP | OTHERS))
    }

    /// As the kernel has it after a `chmod`, which comes last in Docker and containerd (podman has
    /// it the other way round): owner, mask (the group where there is none) and others follow.
    pub(super) fn after_chmod(value: &[u8], permissions: u16) -> Vec<u8> {
        let mut value = value.to_vec();
        let (entries, _) = value.get_mut(VERSION..).unwrap_or_default().as_chunks_mut::<ENTRY>();
        let of_group = if entries.iter().any(|entry| entry[0] == MASK) { MASK } else { GROUP };
        for entry in entries {
            let shift = match entry[0] {
                OWNER => 6,
                tag if tag == of_group => 3,
                OTHERS => 0,
                _ => continue,
            };
            [entry[2], entry[3]] = (permissions >> shift & 7).to_le_bytes();
        }
        value
    }
}

/// The canonical form of a set.
pub(crate) fn encode(set: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in set {
        put_pair(&mut out, name, value);
    }
    out
}

fn put_pair(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    for part in [name, value] {
        put(out, part.len() as u64);
        out.extend_from_slice(part);
    }
}

/// The attributes of a canonical form; ends early where the bytes are malformed.
#[derive(Clone, Debug)]
pub(crate) struct Pairs<'a>(Cursor<'a>);

impl<'a> Pairs<'a> {
    pub(crate) fn new(encoded: &'a [u8]) -> Self {
        Self(Cursor::new(encoded))
    }

    fn pair(&mut self) -> Result<(&'a [u8], &'a [u8]), Malformed> {
        Ok((self.0.bytes()?, self.0.bytes()?))
    }
}

impl<'a> Iterator for Pairs<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_at_end() { None } else { self.pair().ok() }
    }
}

/// Whether `encoded` is a canonical form: not empty, names ascending, kept and valid.
pub(crate) fn is_canonical(encoded: &[u8]) -> bool {
    let mut pairs = Pairs::new(encoded);
    let mut last: &[u8] = &[];
    while !pairs.0.is_at_end() {
        let Ok((name, _)) = pairs.pair() else { return false };
        if name <= last || name.len() > 255 || name.contains(&0) || !is_kept(name) {
            return false;
        }
        last = name;
    }
    !encoded.is_empty()
}

/// Keeps each set once. Ids are `0, 1, 2, …` in order of first sight.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    ids: BTreeMap<Vec<u8>, u32>,
}

impl Sets {
    /// The id of a canonical form, and whether it is new. `None` when there are 2^32 sets.
    pub(crate) fn intern(&mut self, encoded: &[u8]) -> Option<(u32, bool)> {
        if let Some(id) = self.ids.get(encoded) {
            return Some((*id, false));
        }
        let id = u32::try_from(self.ends.len()).ok()?;
        self.bytes.extend_from_slice(encoded);
        self.ends.push(self.bytes.len());
        self.ids.insert(encoded.to_vec(), id);
        Some((id, true))
    }

    pub(crate) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets how to intern, which halves the memory.
    pub(crate) fn freeze(&mut self) {
        self.ids = BTreeMap::new();
        self.bytes.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pairs: &[(&str, &str)]) -> BTreeMap<Vec<u8>, Vec<u8>> {
        pairs.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec())).collect()
    }

    #[test]
    fn attributes_that_steer_an_overlay_mount_are_dropped() {
        for name in ["trusted.overlay.opaque", "user.overlay.redirect", "system.nfs4_acl"] {
            assert!(!is_kept(name.as_bytes()), "{name}");
        }
        for name in ["com.apple.quarantine", "user.", "security.", "trusted.", "user", ""] {
            assert!(!is_kept(name.as_bytes()), "{name}");
        }
        for name in ["security.capability", "user.a", "trusted.x", "system.posix_acl_default"] {
            assert!(is_kept(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn an_attribute_needs_a_file_that_linux_sets_it_on() {
        use Carrier::{Directory, File, Special, Symlink};
        for (name, carriers) in [
            ("user.a", &[Directory, File][..]),
            ("trusted.a", &[Directory, File, Symlink, Special]),
            ("security.capability", &[Directory, File, Symlink, Special]),
            ("system.posix_acl_access", &[Directory, File, Special]),
            ("system.posix_acl_default", &[Directory]),
        ] {
            for carrier in [Directory, File, Symlink, Special] {
                let is_set = is_settable(carrier, name.as_bytes(), b"12 bytes long");
                assert_eq!(is_set, carriers.contains(&carrier), "{name} on {carrier:?}");
            }
        }
        let both = encode(&set(&[("trusted.a", "1"), ("user.b", "2")]));
        let kept = encode(&set(&[("trusted.a", "1")]));
        assert_eq!(as_unpacked(Symlink, 0o777, &both), kept);
        assert_eq!(as_unpacked(Symlink, 0o777, &encode(&set(&[("user.b", "2")]))), b"");
    }

    fn acl(entries: &[(u8, u8)]) -> Vec<u8> {
        let of = |(tag, permissions): &(u8, u8)| [*tag, 0, *permissions, 0, 255, 255, 255, 255];
        [&[2, 0, 0, 0][..], &entries.iter().flat_map(of).collect::<Vec<u8>>()].concat()
    }

    fn access(value: Vec<u8>) -> Vec<u8> {
        encode(&BTreeMap::from([(ACL_ACCESS.to_vec(), value)]))
    }

    #[test]
    fn an_acl_that_names_nobody_is_a_mode_and_no_attribute() {
        for value in [vec![], acl(&[]), acl(&[(1, 7), (4, 5), (32, 5)])] {
            assert_eq!(as_unpacked(Carrier::File, 0o755, &access(value)), b"");
        }
        // With a mask it is one, and what is torn is for others to refuse.
        for value in [acl(&[(1, 7), (4, 5), (16, 5), (32, 5)]), acl(&[(1, 7)])[..11].to_vec()] {
            let encoded = access(value);
            assert_eq!(as_unpacked(Carrier::File, 0o755, &encoded), encoded);
        }
    }

    #[test]
    fn an_acl_grants_no_more_than_the_mode_of_its_file() {
        let generous = access(acl(&[(1, 7), (2, 7), (4, 7), (16, 7), (32, 7)]));
        let bound = access(acl(&[(1, 6), (2, 7), (4, 7), (16, 4), (32, 0)]));
        assert_eq!(as_unpacked(Carrier::File, 0o640, &generous), bound);
        assert_eq!(as_unpacked(Carrier::File, 0o640, &bound), bound);
    }

    #[test]
    fn a_second_description_adds_attributes_and_takes_capabilities_away() {
        let encoded = |pairs: &[(&str, &str)]| encode(&set(pairs));
        let before = encoded(&[("security.capability", "c"), ("user.a", "1"), ("user.c", "3")]);
        let entry = encoded(&[("trusted.t", "t"), ("user.a", "2"), ("user.b", "2")]);
        let joined = [("trusted.t", "t"), ("user.a", "2"), ("user.b", "2"), ("user.c", "3")];
        assert_eq!(described_again(&before, &entry, false), encoded(&joined));
        let capable = [&[("security.capability", "c")], &joined[..]].concat();
        assert_eq!(described_again(&before, &entry, true), encoded(&capable));
        let plain = [("user.a", "1"), ("user.c", "3")];
        assert_eq!(described_again(&before, b"", false), encoded(&plain));
        assert_eq!(described_again(&encoded(&capable[..1]), b"", false), b"");
        assert_eq!(described_again(b"", &entry, false), entry);
        let given = encoded(&[("security.capability", "d")]);
        assert_eq!(described_again(&encoded(&capable[..1]), &given, false), given);
    }

    #[test]
    fn equal_sets_get_equal_ids() {
        let mut sets = Sets::default();
        let one = encode(&set(&[("user.a", "1"), ("user.b", "")]));
        let two = encode(&set(&[("user.a", "2")]));
        assert_eq!(sets.intern(&one), Some((0, true)));
        assert_eq!(sets.intern(&two), Some((1, true)));
        assert_eq!(sets.intern(&one), Some((0, false)));
        assert_eq!(sets.get(1), two);
        let pairs: Vec<_> = Pairs::new(sets.get(0)).collect();
        assert_eq!(pairs, [(&b"user.a"[..], &b"1"[..]), (&b"user.b"[..], &b""[..])]);
    }

    #[test]
    fn only_the_canonical_form_is_accepted() {
        let good = encode(&set(&[("user.a", "1"), ("user.b", "2")]));
        assert!(is_canonical(&good));
        assert!(!is_canonical(&[]));
        assert!(!is_canonical(&good[..good.len() - 1]));
        let doubled = [good.clone(), good].concat();
        assert!(!is_canonical(&doubled));
        assert!(!is_canonical(&encode(&set(&[("trusted.overlay.opaque", "y")]))));
    }
}
