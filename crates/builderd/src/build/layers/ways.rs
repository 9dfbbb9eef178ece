//! Where the pack of a layer comes from and goes to: the cache, the slabs, a file of its own.

use std::sync::Arc;

use oci::Layer;

use super::packing::To;
use super::slabs::Slabs;
use super::{Job, Packed, check_diff_id, open_pack, reopening, shared, stage};
use crate::build::{BuildError, BuildEvent, LayerOrigin, PackStorage, Phase};
use crate::packs::{Lookup, OpenPack, PackCache, PackKey, PackLock};
use crate::staged::Staged;

impl Job<'_> {
    /// One of the three ways.
    pub(super) async fn pack(
        &self,
        index: usize,
        layer: &Layer,
    ) -> Result<(LayerOrigin, Packed), BuildError> {
        match (&self.spec.packs, &self.slabs) {
            (PackStorage::Cache { cache, domain, .. }, _) => {
                let key = PackKey { domain: domain.clone(), digest: layer.digest };
                self.through_cache(index, layer, cache, key).await
            }
            (PackStorage::Temporary, slabs) => {
                let slabs = slabs.as_ref().filter(|slabs| !slabs.is_given_up());
                Ok((LayerOrigin::Packed, self.temporary(index, layer, slabs).await?))
            }
        }
    }

    /// In its stretch of the slabs, or in a file of its own; either stays nameless and goes with its
    /// descriptor.
    async fn temporary(
        &self,
        index: usize,
        layer: &Layer,
        slabs: Option<&Slabs>,
    ) -> Result<Packed, BuildError> {
        let staged = stage(self.spec)?;
        let file = shared(staged.file())?;
        let to = slabs.map_or(To::Own(&file), |slabs| To::Slabs(slabs, &file));
        let made = self.fetch_and_pack(index, layer, to).await?;
        let pack_bytes = made.summary.pack_bytes;
        if let Some(slabs) = slabs.filter(|_| made.is_placed) {
            let pack = open_placed(index, layer, slabs, pack_bytes)?;
            return Ok(Packed { placed: Some(pack.clone()), pack });
        }
        if let Some(slabs) = slabs {
            slabs.clear(index);
        }
        let pack = open_pack(index, layer, file, 0, pack_bytes)?;
        Ok(Packed { pack, placed: None })
    }

    /// As it is in the cache, else made for it, by one build at a time.
    async fn through_cache(
        &self,
        index: usize,
        layer: &Layer,
        cache: &PackCache,
        key: PackKey,
    ) -> Result<(LayerOrigin, Packed), BuildError> {
        if let Some(pack) = self.cached(index, cache, &key).await? {
            return Ok((LayerOrigin::Cached, Packed { pack, placed: None }));
        }
        let lock = self.lock(index, layer, cache, &key).await?;
        // Another process may have made it while we waited for the lock.
        if let Some(pack) = self.cached(index, cache, &key).await? {
            return Ok((LayerOrigin::Cached, Packed { pack, placed: None }));
        }
        let packed = self.make_for_cache(index, layer, cache, &key).await?;
        drop(lock);
        Ok((LayerOrigin::Packed, packed))
    }

    /// Made for the cache; into the slabs in the same breath, so that nothing has to be read back for
    /// the image, while there is hope that they become one.
    async fn make_for_cache(
        &self,
        index: usize,
        layer: &Layer,
        cache: &PackCache,
        key: &PackKey,
    ) -> Result<Packed, BuildError> {
        let staged = cache.stage(key)?;
        let file = shared(staged.file())?;
        let slabs = self.slabs.as_ref().filter(|slabs| !slabs.is_given_up());
        let slabs = slabs.filter(|_| !self.disk.is_too_slow());
        let to = match slabs {
            Some(slabs) => To::Both(slabs, &file),
            None => To::Own(&file),
        };
        let made = self.fetch_and_pack(index, layer, to).await?;
        drop(file);
        let pack_bytes = made.summary.pack_bytes;
        let placed = match slabs.filter(|_| made.is_placed) {
            Some(slabs) => Some(open_placed(index, layer, slabs, pack_bytes)?),
            None => None,
        };
        let pack = commit(index, layer, cache, key, staged, pack_bytes)?;
        Ok(Packed { pack, placed })
    }

    /// Says so before it waits for whoever makes the pack.
    async fn lock(
        &self,
        index: usize,
        layer: &Layer,
        cache: &PackCache,
        key: &PackKey,
    ) -> Result<PackLock, BuildError> {
        let at_once = {
            let (cache, key) = (cache.clone(), key.clone());
            blocking(move || cache.try_lock(&key)).await??
        };
        if let Some(lock) = at_once {
            return Ok(lock);
        }
        let digest = layer.digest.to_string();
        self.observer.event(&BuildEvent::LayerWaiting { layer: index, digest });
        let (cache, key) = (cache.clone(), key.clone());
        Ok(blocking(move || cache.lock(&key)).await??)
    }

    async fn cached(
        &self,
        index: usize,
        cache: &PackCache,
        key: &PackKey,
    ) -> Result<Option<OpenPack>, BuildError> {
        let digest = key.digest;
        let found = {
            let (cache, key) = (cache.clone(), key.clone());
            blocking(move || cache.lookup(&key)).await??
        };
        Ok(match found {
            Lookup::Hit(open) => {
                open.count(&self.tally, &self.spec.layer_limits)
                    .map_err(|source| BuildError::Pack { layer: index, digest, source })?;
                Some(open)
            }
            Lookup::Miss => None,
            Lookup::Damaged(error) => {
                let message =
                    format!("the cached pack of {digest} was damaged and is made anew: {error}");
                self.observer.event(&BuildEvent::Warning { message });
                None
            }
        })
    }
}

/// The pack that a worker has made in the slabs. It says itself how long that is: it may neither
/// lie on those of others, nor be another one than its copy.
pub(super) fn open_placed(
    index: usize,
    layer: &Layer,
    slabs: &Slabs,
    pack_bytes: u64,
) -> Result<OpenPack, BuildError> {
    let stretch = slabs.stretch(index);
    if pack_bytes > stretch.end - stretch.start {
        let (digest, source) = (layer.digest, rootfs::PackReadError::NotAPack);
        return Err(BuildError::PackUnread { layer: index, digest, source });
    }
    let open = open_pack(index, layer, Arc::clone(slabs.file()), stretch.start, pack_bytes)?;
    check_diff_id(index, layer, &open.diff_id)?;
    Ok(open)
}

/// Gives a pack its name, if it is the one that others will look for: what gets a name is for them,
/// too. `pack_bytes` is what its worker says.
pub(super) fn commit(
    index: usize,
    layer: &Layer,
    cache: &PackCache,
    key: &PackKey,
    staged: Staged,
    pack_bytes: u64,
) -> Result<OpenPack, BuildError> {
    let file = shared(staged.file())?;
    // They look at its end, wherever its worker says that it is.
    let whole_bytes = file.metadata().map_err(reopening)?.len();
    let mut open = open_pack(index, layer, file, 0, pack_bytes.max(whole_bytes))?;
    check_diff_id(index, layer, &open.diff_id)?;
    open.file = Arc::new(cache.commit(key, staged)?);
    Ok(open)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| BuildError::WorkerLost { phase: Phase::Layers })
}
