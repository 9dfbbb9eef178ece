//! Sets of extended attributes: which names are kept, one canonical byte form per set, and
//! a store that keeps each set once. Knows nothing of how a file system lays them out.
//!
//! Canonical form: for each attribute, ascending by name: name length (varint), name, value
//! length (varint), value.

use std::collections::BTreeMap;

use crate::varint::{Cursor, Malformed, put};

/// Whether an attribute of a layer belongs into an image.
///
/// Kept: `security.*`, `user.*`, `trusted.*`, `system.posix_acl_access` and `_default`.
/// Dropped: `trusted.overlay.*` and `user.overlay.*`, by which a layer could steer an overlay
/// mount of the host, and namespaces that Linux does not have.
pub(crate) fn is_kept(name: &[u8]) -> bool {
    if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
        return false;
    }
    if matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default") {
        return true;
    }
    [&b"security."[..], b"user.", b"trusted."]
        .iter()
        .any(|namespace| name.len() > namespace.len() && name.starts_with(namespace))
}

/// The canonical form of a set.
pub(crate) fn encode(set: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in set {
        put(&mut out, name.len() as u64);
        out.extend_from_slice(name);
        put(&mut out, value.len() as u64);
        out.extend_from_slice(value);
    }
    out
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
