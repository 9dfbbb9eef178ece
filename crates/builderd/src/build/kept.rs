//! Layer packs of protected tenants, which lie encrypted between their builds: opened into a
//! directory of one try before it begins, sealed from there when it has ended well. The processes
//! of the build see plain packs of their own tenant's image, no key, and nobody else's packs.
//!
//! What goes wrong here costs a download, never a build. It does not know who is protected.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::TryStreamExt as _;
use oci::Digest;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::io::AsyncWriteExt as _;

use super::record::Micros;
use super::worker::{clear_leftovers, is_own_file};
use crate::artifact::{ArtifactStore as _, LocalArtifacts, SealedArtifacts, sealed_name};
use crate::causes::chain;
use crate::keys::TenantKeys;
use crate::packs::{PackCache, PackKey, SharingDomain};
use crate::tenant::TenantId;

/// Below the directory where images are made, which no other service uses.
const DIRECTORY: &str = "sealed-packs-v1";
/// Below that of a try: the packs that its processes see,
const OPEN: &str = "open";
/// and the one that is being sealed, which they do not.
const TAKEN: &str = "taken";
/// Before the digest of a layer, whose pack is named by what a tenant's key makes of both.
const NAME: &str = "layer pack ";

/// See the module.
pub(crate) struct SealedPacks {
    plain: Arc<LocalArtifacts>,
    sealed: SealedArtifacts,
    keys: Arc<TenantKeys>,
    limit_bytes: u64,
}

impl std::fmt::Debug for SealedPacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedPacks").field("plain", &self.plain).finish_non_exhaustive()
    }
}

/// Plain packs of one try.
#[derive(Debug)]
pub(super) struct OwnPacks {
    /// Where they are.
    pub(super) directory: PathBuf,
    cache: PackCache,
    domain: SharingDomain,
    /// Those that lie sealed already.
    kept: HashSet<Digest>,
}

impl SealedPacks {
    /// Keeps at most `limit_bytes` below `directory`. What a service that died has left open is
    /// removed.
    ///
    /// # Errors
    /// Those of the directory.
    pub(crate) fn open(
        directory: &Path,
        limit_bytes: u64,
        keys: Arc<TenantKeys>,
    ) -> io::Result<Self> {
        let plain = Arc::new(LocalArtifacts::open(&directory.join(DIRECTORY))?);
        clear_leftovers(plain.staging())?;
        let inner = Arc::clone(&plain) as Arc<dyn crate::artifact::ArtifactStore>;
        let sealed = SealedArtifacts::new(inner, Arc::clone(&keys) as _);
        Ok(Self { plain, sealed, keys, limit_bytes })
    }

    /// What is there for a try of that name alone; to be removed when it has ended.
    pub(super) fn directory(&self, name: &str) -> PathBuf {
        self.plain.staging().join(name)
    }

    /// Opens what there is of an image's layers for the try `name`.
    ///
    /// # Errors
    /// When the try's directory cannot be made.
    pub(super) async fn restore(
        &self,
        name: &str,
        (tenant, domain): (&TenantId, &str),
        layers: &HashSet<Digest>,
        now: Micros,
    ) -> io::Result<OwnPacks> {
        let directory = self.directory(name).join(OPEN);
        tokio::fs::create_dir_all(&directory).await?;
        let cache = PackCache::open(&directory).map_err(io::Error::other)?;
        let domain = SharingDomain::named(domain);
        let mut own = OwnPacks { directory, cache, domain, kept: HashSet::new() };
        for &digest in layers {
            match self.open_pack(tenant, &own, digest, now).await {
                Ok(true) => drop(own.kept.insert(digest)),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(error = chain(&error), "a kept layer could not be opened");
                }
            }
        }
        Ok(own)
    }

    /// Whether the pack was there, whole.
    async fn open_pack(
        &self,
        tenant: &TenantId,
        own: &OwnPacks,
        digest: Digest,
        now: Micros,
    ) -> io::Result<bool> {
        let name = self.name(tenant, digest, now).await?;
        let Some(pack) = self.sealed.open(&name).await? else { return Ok(false) };
        let key = own.key(digest);
        let staged = own.cache.stage(&key).map_err(io::Error::other)?;
        let mut file = tokio::fs::File::from_std(staged.file().try_clone()?);
        let mut pieces = pack.read(0..pack.size_bytes);
        while let Some(piece) = match pieces.try_next().await {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                // Found out and told: the layer is fetched, and kept, anew.
                self.sealed.remove(&name).await?;
                return Err(error);
            }
            other => other?,
        } {
            file.write_all(&piece).await?;
        }
        file.flush().await?;
        drop(file);
        own.cache.commit(&key, staged).map_err(io::Error::other)?;
        // The least recently used go first.
        self.plain.touch(&name).await?;
        Ok(true)
    }

    /// Seals the packs that were made, each gone from the try's directory afterwards, and removes
    /// those that nobody has used for the longest time, if they are too many.
    ///
    /// # Errors
    /// The first of storing; what is stored stays.
    pub(super) async fn keep(
        &self,
        tenant: &TenantId,
        own: &OwnPacks,
        layers: &HashSet<Digest>,
        now: Micros,
    ) -> io::Result<()> {
        let sealed = self.seal(tenant, own, layers, now).await;
        // Also where nothing more could be stored.
        let pruned = self.prune().await;
        sealed.and(pruned)
    }

    async fn seal(
        &self,
        tenant: &TenantId,
        own: &OwnPacks,
        layers: &HashSet<Digest>,
        now: Micros,
    ) -> io::Result<()> {
        for &digest in layers.difference(&own.kept) {
            let path = own.cache.pack_path(&own.key(digest));
            let (from, taken) = (own.directory.clone(), own.directory.with_file_name(TAKEN));
            let to = taken.clone();
            let is_there = tokio::task::spawn_blocking(move || take(&from, &path, &to));
            if is_there.await.map_err(io::Error::other)?? {
                let name = self.name(tenant, digest, now).await?;
                self.sealed.publish(&taken, &name).await?;
            }
        }
        Ok(())
    }

    async fn prune(&self) -> io::Result<()> {
        let mut all = self.plain.list().await?;
        let mut total: u64 = all.iter().map(|pack| pack.size_bytes).sum();
        all.sort_by_key(|pack| std::cmp::Reverse(pack.age_secs));
        for pack in all {
            if total <= self.limit_bytes {
                break;
            }
            self.plain.remove(&pack.key).await?;
            total -= pack.size_bytes;
        }
        Ok(())
    }

    async fn name(&self, tenant: &TenantId, digest: Digest, now: Micros) -> io::Result<String> {
        let plain = format!("{NAME}{digest}");
        let (key, file) = self.keys.name(tenant, &plain, now).await.map_err(io::Error::other)?;
        Ok(sealed_name(&format!("tenant-{tenant}/{file}.pack"), key))
    }
}

/// Moves the file at `path`, which is below `directory`, to `to`, where no process of a build
/// comes. Those who made it are not trusted with the service's files: no link is followed, and
/// what is no file of its own is left. False if there is none.
fn take(directory: &Path, path: &Path, to: &Path) -> io::Result<bool> {
    let below = path.strip_prefix(directory).map_err(io::Error::other)?;
    let (Some(parent), Some(name)) = (below.parent(), below.file_name()) else { return Ok(false) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::open(directory, flags, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let parent = match rustix::fs::openat2(&top, parent, flags, Mode::empty(), resolve) {
        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(false),
        other => other?,
    };
    match rustix::fs::renameat(&parent, name, CWD, to) {
        Err(Errno::NOENT) => return Ok(false),
        other => other?,
    }
    if is_own_file(&std::fs::symlink_metadata(to)?) {
        return Ok(true);
    }
    commands::remove_tree(to).map(|()| false)
}

impl OwnPacks {
    /// How they are shared: with nobody else.
    pub(super) fn domain(&self) -> &str {
        self.domain.as_str()
    }

    fn key(&self, digest: Digest) -> PackKey {
        PackKey { domain: self.domain.clone(), digest }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::seal::MasterKey;
    use crate::store::Store;
    use crate::store::tests::queue_build;

    const NOW: Micros = Micros(1_000_000);

    /// A directory of packs, whose keys are there, and a tenant.
    struct Place {
        directory: tempfile::TempDir,
        keys: Arc<TenantKeys>,
        tenant: TenantId,
    }

    impl Place {
        async fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open_sqlite(directory.path()).await.unwrap();
            let master = MasterKey::load_or_create(&directory.path().join("key")).unwrap();
            let keys = Arc::new(TenantKeys::new(store.clone(), Arc::new(master)));
            let tenant = queue_build(&store, "127.0.0.1:1/app", NOW).await.tenant;
            Self { directory, keys, tenant }
        }

        fn open(&self, limit_bytes: u64) -> SealedPacks {
            SealedPacks::open(self.directory.path(), limit_bytes, Arc::clone(&self.keys)).unwrap()
        }

        /// What a try of that name finds.
        async fn restored(&self, packs: &SealedPacks, name: &str, digests: &[Digest]) -> OwnPacks {
            let whose = (&self.tenant, "tenant-acme");
            packs.restore(name, whose, &digests.iter().copied().collect(), NOW).await.unwrap()
        }
    }

    /// Makes a pack.
    fn put(own: &OwnPacks, digest: Digest, content: &[u8]) {
        let staged = own.cache.stage(&own.key(digest)).unwrap();
        std::io::Write::write_all(&mut staged.file(), content).unwrap();
        own.cache.commit(&own.key(digest), staged).unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn packs_are_kept_for_their_tenant_and_links_are_not_followed() {
        let place = Place::new().await;
        let digests = [Digest::of(b"one"), Digest::of(b"two"), Digest::of(b"link")];
        let layers = HashSet::from(digests);
        let secret = place.directory.path().join("key");
        // Big enough to be read in several pieces, and no whole number of them.
        let content: Vec<u8> = (0..=250).cycle().take(3_000_001).collect();

        let packs = place.open(u64::MAX);
        let own = place.restored(&packs, "first", &digests).await;
        assert!(own.kept.is_empty());
        put(&own, digests[0], &content);
        put(&own, digests[1], &content);
        symlink(&secret, own.cache.pack_path(&own.key(digests[2]))).unwrap();
        packs.keep(&place.tenant, &own, &layers, NOW).await.unwrap();
        assert!(secret.exists());

        // Nor is a link that leads to another's packs in place of a directory.
        let theirs = place.restored(&packs, "theirs", &digests).await;
        let pack = theirs.cache.pack_path(&theirs.key(digests[0]));
        assert!(pack.exists());
        let thief: TenantId = "thief".parse().unwrap();
        let thiefs = packs.restore("thiefs", (&thief, "tenant-acme"), &layers, NOW).await.unwrap();
        let top = |own: &OwnPacks| {
            let pack = own.cache.pack_path(&own.key(digests[0]));
            pack.ancestors().nth(2).unwrap().to_owned()
        };
        std::fs::remove_dir(top(&thiefs)).unwrap();
        symlink(top(&theirs), top(&thiefs)).unwrap();
        packs.keep(&thief, &thiefs, &layers, NOW).await.unwrap();
        assert!(pack.exists());

        let own = place.restored(&packs, "second", &digests).await;
        assert_eq!(own.kept, HashSet::from([digests[0], digests[1]]));
        for digest in &digests[..2] {
            let pack = std::fs::read(own.cache.pack_path(&own.key(*digest))).unwrap();
            assert!(pack == content);
        }
        // Another tenant has none, though it asks for the same.
        let stranger: TenantId = "stranger".parse().unwrap();
        let other = packs.restore("third", (&stranger, "tenant-stranger"), &layers, NOW).await;
        assert!(other.unwrap().kept.is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn packs_that_nobody_used_for_longest_go_first_and_what_was_open_at_the_start() {
        let place = Place::new().await;
        let digests = [Digest::of(b"one"), Digest::of(b"two")];
        let layers = HashSet::from(digests);
        let packs = place.open(u64::MAX);
        let own = place.restored(&packs, "first", &digests).await;
        put(&own, digests[0], b"content");
        put(&own, digests[1], b"content");
        packs.keep(&place.tenant, &own, &layers, NOW).await.unwrap();

        // One has room still: the other was not used for longer.
        let sealed_bytes = packs.plain.list().await.unwrap()[0].size_bytes;
        let packs = place.open(sealed_bytes);
        assert!(!packs.directory("first").exists(), "what was open is removed at the start");
        let named = packs.name(&place.tenant, digests[0], NOW).await.unwrap();
        let path = place.directory.path().join(DIRECTORY).join("artifacts").join(&named);
        let old = std::fs::File::options().append(true).open(path).unwrap();
        old.set_modified(std::time::UNIX_EPOCH).unwrap();
        packs.prune().await.unwrap();
        let own = place.restored(&packs, "second", &digests).await;
        assert_eq!(own.kept, HashSet::from([digests[1]]));

        // Nor are there more of them where the next one cannot be stored.
        put(&own, digests[0], b"");
        std::fs::create_dir_all(own.directory.with_file_name(TAKEN).join("in the way")).unwrap();
        let packs = SealedPacks { limit_bytes: 0, ..packs };
        assert!(packs.keep(&place.tenant, &own, &layers, NOW).await.is_err());
        assert!(packs.plain.list().await.unwrap().is_empty());
    }
}
