//! The layer-pack cache: every layer is downloaded and inflated once per host.
//!
//! Packs are keyed by (sharing domain, verified blob digest), never by `diff_id`:
//! an image's config may claim any `diff_id`, a blob digest was checked over the
//! bytes. Several processes may share one cache: a pack appears whole or not at
//! all, one builder at a time works on a key (`flock`), readers need no lock
//! because an unlinked pack stays readable through its open file.
//!
//! A pack is not synced to disk when it is made; instead its *stamp* says in which
//! boot of the machine its bytes were last known good, and for which size, inode,
//! modification and change time. Where the stamp does not fit (after a reboot or a crash,
//! or when something wrote to the file) every byte is checked against the pack's
//! own sums before use. The cache does not know images, registries or tenants.

use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci::Digest;
use rootfs::{Limits, Pack, PackError, PackReadError, ReadAt, Tally};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::private;
use crate::staged::{Staged, open_regular};

/// The pack format's version is part of the path: another engine never reads our packs as its own.
const VERSION_DIRECTORY: &str = "packs-v3";
/// Of the directories of all formats.
const VERSIONS_PREFIX: &str = "packs-v";
const _: () = assert!(rootfs::PACK_VERSION == 3, "the directory is named by the version");

/// Who may share a pack: an opaque name made of `a-z`, `0-9`, `-` and `_`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SharingDomain(String);

impl SharingDomain {
    /// The domain of a single user's own cache.
    #[must_use]
    pub fn local() -> Self {
        Self("local".to_owned())
    }

    /// A domain for a name of any form: names of the allowed form are kept, others hashed.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self::parse(name).unwrap_or_else(|| {
            let digest: [u8; 32] = Sha256::digest(name).into();
            Self(format!("h-{}", &crate::build::hex(&digest)[..60]))
        })
    }

    fn parse(name: &str) -> Option<Self> {
        let fits =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        (!name.is_empty() && name.len() <= 64 && name.bytes().all(fits))
            .then(|| Self(name.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a pack is filed under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackKey {
    /// Who may share it.
    pub domain: SharingDomain,
    /// The digest of the layer blob, verified over its bytes.
    pub digest: Digest,
}

/// Why the cache could not serve.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// An operation on a file of the cache failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CacheError + 'a {
    move |source| CacheError::Io { action, path: path.to_owned(), source }
}

/// A pack that is open and was found good; its table of contents is not kept in memory.
#[derive(Clone, Debug)]
pub struct OpenPack {
    /// The file, kept open: deleting the pack does not disturb its users.
    pub file: Arc<File>,
    /// Where in the file the pack begins.
    pub base: u64,
    length: u64,
    /// Blocks of 4 KiB in its data area.
    pub data_blocks: u64,
    /// SHA-256 of the uncompressed layer.
    pub diff_id: [u8; 32],
    blob_bytes: u64,
    tar_bytes: u64,
}

impl OpenPack {
    /// Checks footer and table of contents of a pack file.
    ///
    /// # Errors
    /// [`PackReadError`].
    pub fn new(file: impl Into<Arc<File>>, base: u64, length: u64) -> Result<Self, PackReadError> {
        let file = file.into();
        let pack = Pack::open(&Part { file: &file, base }, length)?;
        let (data_blocks, diff_id) = (pack.data_blocks(), pack.diff_id());
        let (blob_bytes, tar_bytes) = (pack.blob_bytes(), pack.tar_bytes());
        Ok(Self { file, base, length, data_blocks, diff_id, blob_bytes, tar_bytes })
    }

    /// Bytes of the pack, from its base on.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Counts the layer as one of an image.
    ///
    /// # Errors
    /// [`PackError`] when the layers of the image together are beyond a limit.
    pub(crate) fn count(&self, tally: &Tally, limits: &Limits) -> Result<(), PackError> {
        let data_bytes = self.data_blocks * rootfs::BLOCK_BYTES;
        tally.add(self.blob_bytes, self.tar_bytes, data_bytes, limits)
    }

    /// Reads the table of contents.
    ///
    /// # Errors
    /// [`PackReadError`].
    pub fn load(&self) -> Result<Pack, PackReadError> {
        Pack::open(&Part { file: &self.file, base: self.base }, self.length)
    }
}

/// A pack as a part of a file.
struct Part<'a> {
    file: &'a File,
    base: u64,
}

impl ReadAt for Part<'_> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self.file, buffer, self.base.saturating_add(offset))
    }
}

/// What a look-up found.
#[derive(Debug)]
pub enum Lookup {
    /// A good pack.
    Hit(OpenPack),
    /// None.
    Miss,
    /// One that was damaged; it has been removed.
    Damaged(PackReadError),
}

/// One line of `builderd cache ls`.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    /// What it is filed under.
    pub key: PackKey,
    /// Bytes on disk.
    pub size_bytes: u64,
    /// Seconds since the epoch of the last build that used it.
    pub last_used_secs: i64,
}

/// What a prune removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How many packs.
    pub packs: usize,
    /// How many bytes.
    pub bytes: u64,
}

/// A directory of packs, shared by processes.
#[derive(Clone, Debug)]
pub struct PackCache {
    root: PathBuf,
}

/// Held while one process makes one pack; released on drop and by death.
#[derive(Debug)]
pub struct PackLock {
    path: PathBuf,
    _file: File,
}

impl Drop for PackLock {
    fn drop(&mut self) {
        // Still locked: whoever waits will see that the name has gone and lock anew.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl PackCache {
    /// Opens (and makes, if needed) the cache below `directory`.
    ///
    /// # Errors
    /// [`CacheError::Io`] when the directory cannot be made.
    pub fn open(directory: &Path) -> Result<Self, CacheError> {
        let root = directory.join(VERSION_DIRECTORY);
        private::make_directory(&root).map_err(failed("create the cache directory", &root))?;
        Ok(Self { root })
    }

    /// Shuts other users of the machine out of what an earlier engine, which let them in, has left:
    /// packs of this format and of all others. Gives the directories that were open.
    ///
    /// # Errors
    /// [`CacheError::Io`]; also where another user has made one of them.
    pub(crate) fn close_to_others(&self) -> Result<Vec<PathBuf>, CacheError> {
        let mut were_open = Vec::new();
        for found in read_dir(self.root.parent().unwrap_or(&self.root))? {
            let (name, path) = (found.file_name(), found.path());
            let is_ours = name.to_str().is_some_and(|name| name.starts_with(VERSIONS_PREFIX));
            if is_ours && private::close(&path).map_err(failed("shut others out of", &path))? {
                were_open.push(path);
            }
        }
        Ok(were_open)
    }

    /// Opens the pack of `key` if it is there and whole.
    ///
    /// # Errors
    /// [`CacheError::Io`] for failures that are not the pack's own.
    pub fn lookup(&self, key: &PackKey) -> Result<Lookup, CacheError> {
        let path = self.pack_path(key);
        // Whatever has the name, opening it must not wait or lead elsewhere.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&path, flags, Mode::empty()).map_err(io::Error::from);
        let file = match opened {
            Ok(fd) => File::from(fd),
            Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
                self.remove(key)?;
                return Ok(Lookup::Damaged(PackReadError::NotAPack));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Lookup::Miss),
            Err(error) => return Err(failed("open the layer pack", &path)(error)),
        };
        let metadata = file.metadata().map_err(failed("stat the layer pack", &path))?;
        match self.check(key, file, &metadata) {
            Ok(open) => Ok(Lookup::Hit(open)),
            Err(PackReadError::Read { source }) => {
                Err(failed("read the layer pack", &path)(source))
            }
            Err(error) => {
                self.remove(key)?;
                Ok(Lookup::Damaged(error))
            }
        }
    }

    fn check(
        &self,
        key: &PackKey,
        file: File,
        metadata: &Metadata,
    ) -> Result<OpenPack, PackReadError> {
        if !metadata.is_file() {
            return Err(PackReadError::NotAPack);
        }
        let open = OpenPack::new(file, 0, metadata.len())?;
        let stamp_path = self.stamp_path(key);
        let stamp = Stamp::of(metadata);
        let trusted = stamp.as_ref().is_some_and(|stamp| {
            std::fs::read_to_string(&stamp_path).is_ok_and(|text| text == stamp.0)
        });
        if !trusted {
            open.load()?.verify_data(&*open.file)?;
        }
        if trusted {
            touch(&stamp_path);
        } else if let Some(stamp) = stamp {
            // Losing a stamp costs a check the next time, nothing else.
            let _ = stamp.write(&stamp_path);
        }
        Ok(open)
    }

    /// Waits until no other process makes the pack of `key`, and keeps others waiting.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn lock(&self, key: &PackKey) -> Result<PackLock, CacheError> {
        loop {
            let (path, file) = self.open_lock(key)?;
            file.lock().map_err(failed("take the lock", &path))?;
            if guards(&file, &path)? {
                return Ok(PackLock { path, _file: file });
            }
        }
    }

    /// As [`PackCache::lock`], but `None` where that would wait.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn try_lock(&self, key: &PackKey) -> Result<Option<PackLock>, CacheError> {
        loop {
            let (path, file) = self.open_lock(key)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => {
                    return Err(failed("take the lock", &path)(error));
                }
            }
            if guards(&file, &path)? {
                return Ok(Some(PackLock { path, _file: file }));
            }
        }
    }

    /// As [`PackCache::try_lock`], for a lock that has a name already; `None` where it has none.
    fn try_known_lock(&self, key: &PackKey) -> Result<Option<PackLock>, CacheError> {
        let path = self.key_path(key, "lock");
        let Some(file) = open_regular(&path) else { return Ok(None) };
        // Whoever holds it, or has removed it meanwhile, needs no help.
        if file.try_lock().is_err() || !guards(&file, &path)? {
            return Ok(None);
        }
        Ok(Some(PackLock { path, _file: file }))
    }

    fn open_lock(&self, key: &PackKey) -> Result<(PathBuf, File), CacheError> {
        let path = self.key_path(key, "lock");
        self.directory_of(&key.domain)?;
        let opened = private::file_options().open(&path);
        let file = opened.map_err(failed("open the lock", &path))?;
        Ok((path, file))
    }

    /// A nameless file on the cache's file system, to make a pack in.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub(crate) fn stage(&self, key: &PackKey) -> Result<Staged, CacheError> {
        let directory = self.directory_of(&key.domain)?;
        Staged::create_private_in(&directory).map_err(failed("create a file in", &directory))
    }

    /// Files a finished pack whose blob digest and `diff_id` were verified.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub(crate) fn commit(&self, key: &PackKey, staged: Staged) -> Result<File, CacheError> {
        let path = self.pack_path(key);
        let file = staged.publish(&path).map_err(failed("publish the layer pack", &path))?;
        let metadata = file.metadata().map_err(failed("stat the layer pack", &path))?;
        if let Some(stamp) = Stamp::of(&metadata) {
            let stamp_path = self.stamp_path(key);
            stamp.write(&stamp_path).map_err(failed("write", &stamp_path))?;
        }
        Ok(file)
    }

    fn domains(&self) -> Result<Vec<SharingDomain>, CacheError> {
        let entries = read_dir(&self.root)?.into_iter();
        Ok(entries.filter_map(|entry| SharingDomain::parse(entry.file_name().to_str()?)).collect())
    }

    /// Every pack of the cache, the least recently used first.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn entries(&self) -> Result<Vec<CacheEntry>, CacheError> {
        let mut entries = Vec::new();
        for name in self.domains()? {
            for file in read_dir(&self.root.join(name.as_str()))? {
                let Some(digest) = digest_of(&file.path(), "pack") else { continue };
                // A pack may be pruned by another process while we list.
                let Ok(metadata) = file.metadata() else { continue };
                let key = PackKey { domain: name.clone(), digest };
                let used = std::fs::metadata(self.stamp_path(&key));
                entries.push(CacheEntry {
                    size_bytes: metadata.len(),
                    last_used_secs: used.map_or(metadata.mtime(), |used| used.mtime()),
                    key,
                });
            }
        }
        entries.sort_by(|a, b| {
            let order = |entry: &CacheEntry| (entry.last_used_secs, entry.key.digest.to_string());
            order(a).cmp(&order(b))
        });
        Ok(entries)
    }

    /// Removes the least recently used packs until the rest fits into `limit_bytes`, what builds
    /// that were killed have left, and packs in an earlier format, which no limit would count.
    ///
    /// Builds that use a removed pack go on undisturbed.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn prune(&self, limit_bytes: u64) -> Result<Pruned, CacheError> {
        let entries = self.entries()?;
        let mut total: u64 = entries.iter().map(|entry| entry.size_bytes).sum();
        let mut pruned = Pruned::default();
        for entry in entries {
            if total <= limit_bytes {
                break;
            }
            self.remove(&entry.key)?;
            total -= entry.size_bytes;
            pruned.packs += 1;
            pruned.bytes += entry.size_bytes;
        }
        for domain in self.domains()? {
            self.sweep(&domain)?;
        }
        // What cannot be removed now will be seen by the next prune.
        let _ = self.prune_earlier(&mut pruned);
        Ok(pruned)
    }

    /// Removes what engines with an earlier pack format have left: this one will not read it.
    fn prune_earlier(&self, pruned: &mut Pruned) -> Result<(), CacheError> {
        let Some(directory) = self.root.parent() else { return Ok(()) };
        for found in read_dir(directory)? {
            let name = found.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix(VERSIONS_PREFIX));
            let version = version.and_then(|version| version.parse::<u32>().ok());
            let is_earlier = version.is_some_and(|version| version < rootfs::PACK_VERSION);
            if !is_earlier || !found.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let earlier = Self { root: found.path() };
            for entry in earlier.entries()? {
                earlier.remove(&entry.key)?;
                pruned.packs += 1;
                pruned.bytes += entry.size_bytes;
            }
            for domain in earlier.domains()? {
                earlier.sweep(&domain)?;
                // Not where something else lies in them.
                let _ = std::fs::remove_dir(earlier.root.join(domain.as_str()));
            }
            let _ = std::fs::remove_dir(&earlier.root);
        }
        Ok(())
    }

    /// Removes the locks that nobody holds and the stamps without a pack.
    fn sweep(&self, domain: &SharingDomain) -> Result<(), CacheError> {
        for file in read_dir(&self.root.join(domain.as_str()))? {
            let key = |extension| {
                let digest = digest_of(&file.path(), extension)?;
                Some(PackKey { domain: domain.clone(), digest })
            };
            if let Some(key) = key("lock") {
                // Dropped, it removes its name; that of a builder is not to be had.
                drop(self.try_known_lock(&key)?);
            }
            let orphan = key("stamp").filter(|key| !self.pack_path(key).exists());
            // Packs are named under the lock: while it is held none comes to the stamp.
            if let Some(key) = orphan
                && let Some(_lock) = self.try_lock(&key)?
                && !self.pack_path(&key).exists()
            {
                self.remove(&key)?;
            }
        }
        Ok(())
    }

    /// Checks every byte of the pack of `key`, whatever its stamp says; removes it when damaged.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn verify(&self, key: &PackKey) -> Result<Lookup, CacheError> {
        let stamp = self.stamp_path(key);
        match std::fs::remove_file(&stamp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &stamp)(error))
            }
            _ => self.lookup(key),
        }
    }

    fn remove(&self, key: &PackKey) -> Result<(), CacheError> {
        for path in [self.pack_path(key), self.stamp_path(key)] {
            let removed = match std::fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                    std::fs::remove_dir_all(&path)
                }
                other => other,
            };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where the packs of a domain lie, made if need be. Who sees of a cache nothing but this can use
    /// it for that domain.
    ///
    /// # Errors
    /// [`CacheError::Io`] when the directory cannot be made.
    pub(crate) fn directory_of(&self, domain: &SharingDomain) -> Result<PathBuf, CacheError> {
        let directory = self.root.join(domain.as_str());
        private::make_directory(&directory).map_err(failed("create", &directory))?;
        Ok(directory)
    }

    fn key_path(&self, key: &PackKey, extension: &str) -> PathBuf {
        self.root.join(key.domain.as_str()).join(format!("{}.{extension}", key.digest.hex()))
    }

    /// Where the pack of `key` is, or would be.
    pub(crate) fn pack_path(&self, key: &PackKey) -> PathBuf {
        self.key_path(key, "pack")
    }

    fn stamp_path(&self, key: &PackKey) -> PathBuf {
        self.key_path(key, "stamp")
    }
}

/// Whether a lock that was just taken still has its name: the holder before us removed it otherwise,
/// and the lock guards nothing.
fn guards(lock: &File, path: &Path) -> Result<bool, CacheError> {
    let ours = lock.metadata().map_err(failed("stat the lock", path))?;
    Ok(std::fs::metadata(path).is_ok_and(|named| named.ino() == ours.ino()))
}

/// In which boot, and for which state of the file, its bytes were known good.
struct Stamp(String);

impl Stamp {
    /// `None` where the system does not tell its boot: then nothing is trusted unchecked.
    fn of(metadata: &Metadata) -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let (inode, size) = (metadata.ino(), metadata.len());
        let (secs, nanos) = (metadata.mtime(), metadata.mtime_nsec());
        // Nobody can set this one back.
        let (changed_secs, changed_nanos) = (metadata.ctime(), metadata.ctime_nsec());
        let times = format!("{secs}.{nanos:09} {changed_secs}.{changed_nanos:09}");
        Some(Self(format!("{} {inode} {size} {times}\n", boot.trim())))
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let staged = Staged::create_private_in(path.parent().unwrap_or(Path::new(".")))?;
        staged.file().write_all(self.0.as_bytes())?;
        staged.publish(path).map(drop)
    }
}

/// Marks the stamp as used now, for the order of pruning; a lost mark harms nothing.
fn touch(path: &Path) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = rustix::fs::utimensat(CWD, path, &times, AtFlags::empty());
}

/// The digest that a file of the cache is about, if it is of this kind.
fn digest_of(path: &Path, extension: &str) -> Option<Digest> {
    if path.extension()? != extension {
        return None;
    }
    format!("sha256:{}", path.file_stem()?.to_str()?).parse().ok()
}

fn read_dir(path: &Path) -> Result<Vec<std::fs::DirEntry>, CacheError> {
    std::fs::read_dir(path)
        .and_then(Iterator::collect)
        .map_err(failed("list the cache directory", path))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_lock_that_is_swept_at_any_moment_never_has_two_holders() {
        let directory = tempfile::tempdir().unwrap();
        let cache = PackCache::open(directory.path()).unwrap();
        let digest = Digest::of(b"layer");
        let key = PackKey { domain: SharingDomain::local(), digest };
        let (holders, done) = (AtomicU32::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        cache.prune(u64::MAX).unwrap();
                    }
                });
            }
            let hold = || {
                for _ in 0..1000 {
                    let lock = cache.lock(&key).unwrap();
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold the lock");
                    std::thread::yield_now();
                    holders.fetch_sub(1, Ordering::SeqCst);
                    drop(lock);
                }
            };
            let builders = [scope.spawn(hold), scope.spawn(hold)];
            let ended: Vec<_> = builders.into_iter().map(|builder| builder.join()).collect();
            done.store(true, Ordering::Relaxed);
            assert!(ended.iter().all(Result::is_ok));
        });
    }
}
