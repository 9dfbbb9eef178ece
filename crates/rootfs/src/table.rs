//! Names in directories while layers are folded: a hash table keyed by (directory, name), and
//! the arenas that hold what has no fixed size. Knows nothing of layers.
//!
//! Names come from strangers, so the hash is keyed with the layer's own diff id: whoever wants
//! names that collide would have to know the hash of the layer that holds them.

use std::hash::{DefaultHasher, Hasher};

use ext4::Timestamp;

use crate::xattr::Sets;

/// No inode, no list.
pub(crate) const NONE: u32 = u32::MAX;

/// Bytes and lists that nodes point into.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) names: Vec<u8>,
    /// Targets of symbolic links, and of hard links not found yet.
    pub(crate) targets: Vec<u8>,
    pub(crate) sets: Sets,
    /// Gap and length, in blocks, of files with holes.
    pub(crate) runs: Vec<(u32, u32)>,
    /// Start and count in `runs`.
    pub(crate) run_lists: Vec<(u32, u32)>,
}

impl Store {
    pub(crate) fn name(&self, at: u32, length: u8) -> &[u8] {
        &self.names[at as usize..at as usize + usize::from(length)]
    }

    pub(crate) fn target(&self, at: u32, length: u16) -> &[u8] {
        &self.targets[at as usize..at as usize + usize::from(length)]
    }
}

/// What a node is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Body {
    Directory {
        parent: u32,
        /// 0 for the root.
        depth: u32,
        /// Range in the finished tree's entries.
        first: u32,
        count: u32,
    },
    File {
        size_bytes: u64,
        region: u32,
        first_block: u32,
        /// In `Store::run_lists`; `NONE` when all blocks follow one another.
        runs: u32,
    },
    Symlink {
        at: u32,
        length: u16,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// A hard link whose target has not been seen yet.
    Pending {
        at: u32,
        length: u16,
    },
}

/// One inode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    pub(crate) body: Body,
    pub(crate) mtime: Timestamp,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Counted when the tree is finished.
    pub(crate) links: u32,
    /// `NONE` for none.
    pub(crate) xattrs: u32,
    pub(crate) permissions: u16,
    pub(crate) flags: u8,
}

impl Node {
    /// An entry of the layer made it.
    pub(crate) const EXPLICIT: u8 = 1;
    /// A directory with an entry of the layer that is no whiteout, or one itself.
    pub(crate) const REAL: u8 = 2;
    /// A directory that hides what is below it in lower layers.
    pub(crate) const OPAQUE: u8 = 4;

    /// A directory that no entry describes: 0755, root, 1970.
    pub(crate) fn implicit(parent: u32, depth: u32) -> Self {
        Self {
            body: Body::Directory { parent, depth, first: 0, count: 0 },
            mtime: Timestamp::default(),
            uid: 0,
            gid: 0,
            links: 0,
            xattrs: NONE,
            permissions: 0o755,
            flags: 0,
        }
    }

    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory { .. })
    }

    pub(crate) fn is_pending(&self) -> bool {
        matches!(self.body, Body::Pending { .. })
    }

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dentry {
    pub(crate) parent: u32,
    /// `NONE` once deleted, and for a whiteout without an entry beside it.
    pub(crate) inode: u32,
    pub(crate) name_at: u32,
    pub(crate) name_length: u8,
    /// The layer deletes this name from the layers below.
    pub(crate) whiteout: bool,
}

/// All names of a tree being built. A deleted name keeps its place with no inode.
#[derive(Debug)]
pub(crate) struct Dentries {
    list: Vec<Dentry>,
    /// Hash above, index + 1 below; zero for empty. A power of two of them.
    slots: Vec<u64>,
    key: [u8; 32],
    /// Taken when names collide too often.
    next_key: Option<[u8; 32]>,
    /// Names hashed anew for it.
    rekeyed: u64,
}

/// More than happens by chance: the longest run of a table of 16 million names, three quarters
/// full, has some 450.
const PROBES_MAX: usize = 512;

impl Dentries {
    pub(crate) fn new(key: [u8; 32]) -> Self {
        Self { list: Vec::new(), slots: vec![0; 64], key, next_key: None, rekeyed: 0 }
    }

    pub(crate) fn reserve(&mut self, more: usize) {
        self.list.reserve_exact(more);
        let wanted = ((self.list.len() + more) * 4 / 3 + 1).next_power_of_two();
        if wanted > self.slots.len() {
            self.rebuild(wanted);
        }
    }

    /// Names from here on are chosen by whoever knows the old key.
    pub(crate) fn offer_key(&mut self, key: [u8; 32]) {
        self.next_key = Some(key);
    }

    /// How many names were hashed anew since this was asked.
    pub(crate) fn take_rekeyed(&mut self) -> u64 {
        std::mem::take(&mut self.rekeyed)
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    pub(crate) fn all(&self) -> &[Dentry] {
        &self.list
    }

    pub(crate) fn at(&self, index: u32) -> Dentry {
        self.list[index as usize]
    }

    pub(crate) fn at_mut(&mut self, index: u32) -> &mut Dentry {
        &mut self.list[index as usize]
    }

    pub(crate) fn all_mut(&mut self) -> &mut [Dentry] {
        &mut self.list
    }

    /// Frees the table; only the list is left.
    pub(crate) fn into_list(self) -> Vec<Dentry> {
        self.list
    }

    pub(crate) fn find(&self, store: &Store, parent: u32, name: &[u8]) -> Option<u32> {
        let hash = self.hash(parent, name);
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            let entry = self.slots[slot];
            if entry == 0 {
                return None;
            }
            if entry >> 32 == u64::from(hash) {
                let index = low(entry) - 1;
                let dentry = &self.list[index as usize];
                if dentry.parent == parent && store.name(dentry.name_at, dentry.name_length) == name
                {
                    return Some(index);
                }
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Adds a name that [`Self::find`] has not found. The caller keeps the list below 2^32.
    pub(crate) fn insert(&mut self, store: &Store, dentry: Dentry) -> u32 {
        if (self.list.len() + 1) * 4 > self.slots.len() * 3 {
            self.rebuild(self.slots.len() * 2);
        }
        let hash = self.hash(dentry.parent, store.name(dentry.name_at, dentry.name_length));
        let index = u32::try_from(self.list.len()).unwrap_or(NONE - 1);
        self.list.push(dentry);
        let probes = self.place(u64::from(hash) << 32 | (u64::from(index) + 1));
        if probes > PROBES_MAX
            && let Some(key) = self.next_key.take()
        {
            self.rekey(store, key);
        }
        index
    }

    fn place(&mut self, entry: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = (entry >> 32) as usize & mask;
        let mut probes = 0;
        while self.slots[slot] != 0 {
            slot = (slot + 1) & mask;
            probes += 1;
        }
        self.slots[slot] = entry;
        probes
    }

    fn rebuild(&mut self, slots: usize) {
        let old = std::mem::replace(&mut self.slots, vec![0; slots]);
        for entry in old.into_iter().filter(|entry| *entry != 0) {
            self.place(entry);
        }
    }

    fn rekey(&mut self, store: &Store, key: [u8; 32]) {
        self.key = key;
        self.slots.fill(0);
        self.rekeyed += self.list.len() as u64;
        for index in 0..self.list.len() {
            let dentry = self.list[index];
            let name = store.name(dentry.name_at, dentry.name_length);
            let hash = self.hash(dentry.parent, name);
            self.place(u64::from(hash) << 32 | (index as u64 + 1));
        }
    }

    fn hash(&self, parent: u32, name: &[u8]) -> u32 {
        let mut hasher = DefaultHasher::new();
        hasher.write(&self.key);
        hasher.write_u32(parent);
        hasher.write(name);
        let hash = hasher.finish();
        low(hash) ^ low(hash >> 32)
    }
}

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(dentries: &mut Dentries, store: &mut Store, parent: u32, name: &str) -> u32 {
        let name_at = u32::try_from(store.names.len()).unwrap();
        store.names.extend_from_slice(name.as_bytes());
        let name_length = u8::try_from(name.len()).unwrap();
        let dentry = Dentry { parent, inode: 7, name_at, name_length, whiteout: false };
        dentries.insert(store, dentry)
    }

    #[test]
    fn names_are_found_again_under_their_own_directory_only() {
        let (mut dentries, mut store) = (Dentries::new([1; 32]), Store::default());
        let ids: Vec<u32> =
            (0..5000).map(|n| add(&mut dentries, &mut store, n % 7, &format!("n{n}"))).collect();
        for (n, id) in (0_u32..).zip(ids) {
            let name = format!("n{n}");
            assert_eq!(dentries.find(&store, n % 7, name.as_bytes()), Some(id));
            assert_eq!(dentries.find(&store, n % 7 + 1, name.as_bytes()), None);
        }
    }

    #[test]
    fn a_new_key_loses_no_name() {
        let (mut dentries, mut store) = (Dentries::new([1; 32]), Store::default());
        let ids: Vec<u32> =
            (0..500).map(|n| add(&mut dentries, &mut store, 0, &format!("n{n}"))).collect();
        dentries.rekey(&store, [2; 32]);
        assert_eq!((dentries.take_rekeyed(), dentries.take_rekeyed()), (500, 0));
        for (n, id) in (0_u32..).zip(ids) {
            assert_eq!(dentries.find(&store, 0, format!("n{n}").as_bytes()), Some(id));
        }
    }

    #[test]
    fn a_node_is_small() {
        assert!(size_of::<Node>() <= 64, "{}", size_of::<Node>());
        assert!(size_of::<Dentry>() <= 16, "{}", size_of::<Dentry>());
    }
}
