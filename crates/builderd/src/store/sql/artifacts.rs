//! Which build has which file, and what goes when files grow old or room runs out.
//!
//! A file that a row names is somebody's: a completed build has it, or a running one is about
//! to take it. The row goes with the last of them, in the same transaction; whoever sweeps the
//! files asks for the row. Knows no file.

use crate::build::record::{BuildId, BuildResult, Micros};
use crate::build::state::BuildState;
use crate::store::engine::{Tx, signed, sql, to_json};
use crate::store::{ArtifactName, KnownArtifact, Lease, StoreError};
use crate::tenant::TenantId;

use super::removals::note_dropped;
use super::{Held, Rows, named, passed_over, was_held};

/// Rows looked at in one go.
const BATCH: i64 = 500;

/// What a build took.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub(super) size_bytes: i64,
    /// What the tenant's storage grows by: nothing if another of its builds has the file.
    pub(super) added_bytes: i64,
}

/// Gives a tenant's build the file that it made, or that was made before, and files its name.
pub(super) async fn keep(
    tx: &mut Tx,
    tenant: &TenantId,
    result: &BuildResult,
    name: Option<&ArtifactName>,
    now: Micros,
) -> Result<Kept, StoreError> {
    // The update changes nothing, but holds the row.
    let query = sql("INSERT INTO artifact (artifact_key, size_bytes, sha256, created_at) \
         VALUES ($1, $2, $3, $4) ON CONFLICT (artifact_key) DO UPDATE SET \
         sha256 = artifact.sha256 RETURNING size_bytes");
    let key = result.artifact_key.as_str();
    let query = query.text(key).count(result.artifact_bytes).text(&result.sha256).at(now);
    let size_bytes = tx.one(query).await?.int("size_bytes")?;
    if let Some(name) = name.filter(|name| name.domain.includes(tenant)) {
        // What was made says more than what was found.
        let query = match result.from_cache {
            true => {
                sql("INSERT INTO artifact_name (sharing_domain, recipe, artifact_key, result) \
                 VALUES ($1, $2, $3, $4) ON CONFLICT (sharing_domain, recipe) DO NOTHING")
            }
            false => {
                sql("INSERT INTO artifact_name (sharing_domain, recipe, artifact_key, result) \
                 VALUES ($1, $2, $3, $4) ON CONFLICT (sharing_domain, recipe) DO UPDATE SET \
                 artifact_key = excluded.artifact_key, result = excluded.result")
            }
        };
        let query = query.text(&name.domain.to_string()).text(&name.recipe).text(key);
        tx.execute(query.text(&to_json(result)?)).await?;
    }
    let query = sql("INSERT INTO tenant_artifact (tenant_id, artifact_key, builds) \
         VALUES ($1, $2, 1) ON CONFLICT (tenant_id, artifact_key) DO UPDATE SET \
         builds = tenant_artifact.builds + 1 RETURNING builds");
    let builds = tx.one(query.text(tenant.as_str()).text(key)).await?.int("builds")?;
    let added_bytes = if builds == 1 { size_bytes } else { 0 };
    Ok(Kept { size_bytes, added_bytes })
}

/// Takes its file away from a completed build. Returns what the tenant's storage shrinks by;
/// the caller counts it.
pub(super) async fn drop_claim(tx: &mut Tx, held: &Held) -> Result<i64, StoreError> {
    let Some(key) = &held.artifact_key else { return Ok(0) };
    let query = sql("SELECT size_bytes FROM artifact WHERE artifact_key = $1 FOR UPDATE");
    let size_bytes = tx.one(query.text(key)).await?.int("size_bytes")?;
    let query = sql("UPDATE build SET artifact_key = NULL \
         WHERE tenant_id = $1 AND id = $2 AND state = $3");
    was_held(tx.execute(held.key(query)).await?)?;
    let query = sql("UPDATE tenant_artifact SET builds = builds - 1 \
         WHERE tenant_id = $1 AND artifact_key = $2 RETURNING builds");
    let query = query.text(held.tenant.as_str()).text(key);
    if tx.one(query).await?.int("builds")? > 0 {
        return Ok(0);
    }
    let query = sql("DELETE FROM tenant_artifact WHERE tenant_id = $1 AND artifact_key = $2");
    tx.execute(query.text(held.tenant.as_str()).text(key)).await?;
    remove_if_unused(tx, key).await?;
    Ok(size_bytes)
}

/// Removes an artifact that no build has; its file is soon removed as well. Returns whether it is gone.
pub(super) async fn remove_if_unused(tx: &mut Tx, key: &str) -> Result<bool, StoreError> {
    // Held first: whoever wants it at this moment is seen by the next statement, or waits.
    let query = sql("SELECT artifact_key FROM artifact WHERE artifact_key = $1 FOR UPDATE");
    if tx.optional(query.text(key)).await?.is_none() {
        return Ok(true);
    }
    let query = sql("SELECT id FROM build WHERE artifact_key = $1 LIMIT 1");
    if tx.optional(query.text(key)).await?.is_some() {
        return Ok(false);
    }
    tx.execute(sql("DELETE FROM artifact_name WHERE artifact_key = $1").text(key)).await?;
    tx.execute(sql("DELETE FROM artifact WHERE artifact_key = $1").text(key)).await?;
    note_dropped(tx, key).await?;
    Ok(true)
}

impl Rows {
    pub(crate) async fn known_artifact(
        &self,
        lease: &Lease,
        name: &ArtifactName,
    ) -> Result<Option<KnownArtifact>, StoreError> {
        if !name.domain.includes(&lease.tenant) {
            return Ok(None);
        }
        self.again(|| self.known_artifact_once(lease, name)).await
    }

    /// The build says that it wants the file, so that it stays until the build ends.
    async fn known_artifact_once(
        &self,
        lease: &Lease,
        name: &ArtifactName,
    ) -> Result<Option<KnownArtifact>, StoreError> {
        let mut tx = self.engine.begin().await?;
        let Some(held) = Held::by_lease(&mut tx, lease).await? else { return Ok(None) };
        let query = sql("SELECT n.artifact_key, n.result FROM artifact_name n \
             JOIN artifact a ON a.artifact_key = n.artifact_key \
             WHERE n.sharing_domain = $1 AND n.recipe = $2 FOR SHARE OF a");
        let found = tx.optional(query.text(&name.domain.to_string()).text(&name.recipe)).await?;
        let Some(found) = found else { return Ok(None) };
        let result = match found.json("result") {
            // Whoever builds it anew writes it anew.
            Err(StoreError::Corrupt(problem)) => {
                tracing::error!(name = name.recipe, problem, "a known artifact cannot be read");
                return Ok(None);
            }
            result => result?,
        };
        let key = found.text("artifact_key")?;
        let query = sql("UPDATE build SET artifact_key = $4 \
             WHERE tenant_id = $1 AND id = $2 AND state = $3");
        was_held(tx.execute(held.key(query).text(&key)).await?)?;
        if let Some(other) = held.artifact_key.as_deref().filter(|other| *other != key) {
            remove_if_unused(&mut tx, other).await?;
        }
        tx.commit().await?;
        Ok(Some(KnownArtifact { result }))
    }

    pub(crate) async fn expire(&self, older_than: Micros) -> Result<u64, StoreError> {
        let mut forgotten = 0;
        loop {
            let query = || {
                sql("SELECT tenant_id, id FROM build WHERE ended_at IS NOT NULL \
                     AND artifact_key IS NOT NULL AND ended_at < $1 ORDER BY ended_at LIMIT $2")
                .at(older_than)
                .int(BATCH)
            };
            let old = self.again(|| self.engine.all(query())).await?;
            let mut some = 0;
            for (tenant, id) in named(&old)? {
                some += u64::from(self.forget(&tenant, &id).await?);
            }
            forgotten += some;
            if some == 0 {
                break;
            }
        }
        // A day's figures are of no use when the artifacts of that day are gone.
        let query = || sql("DELETE FROM tenant_day WHERE day < $1").at(older_than.day());
        self.again(|| self.engine.execute(query())).await?;
        Ok(forgotten)
    }

    pub(crate) async fn evict(&self, bytes_max: u64) -> Result<u64, StoreError> {
        let mut evicted = 0;
        let mut left = signed(self.storage_bytes().await?);
        let bytes_max = signed(bytes_max);
        while left > bytes_max {
            let query = || {
                sql("SELECT artifact_key, size_bytes FROM artifact \
                     ORDER BY created_at, artifact_key LIMIT $1")
                .int(BATCH)
            };
            let oldest = self.again(|| self.engine.all(query())).await?;
            let before = evicted;
            for row in &oldest {
                if left <= bytes_max {
                    break;
                }
                if self.evict_one(&row.text("artifact_key")?).await? {
                    left -= row.int("size_bytes")?;
                    evicted += 1;
                }
            }
            // What is left is being taken by running builds.
            if evicted == before {
                break;
            }
        }
        Ok(evicted)
    }

    /// Takes an artifact away from every completed build. Returns whether it is gone: a running
    /// build that is about to take it keeps it.
    async fn evict_one(&self, key: &str) -> Result<bool, StoreError> {
        // First of all nobody finds it any more.
        let query = || sql("DELETE FROM artifact_name WHERE artifact_key = $1").text(key);
        self.again(|| self.engine.execute(query())).await?;
        loop {
            let query = || {
                sql("SELECT tenant_id, id FROM build WHERE artifact_key = $1 \
                     AND state = 'completed' LIMIT $2")
                .text(key)
                .int(BATCH)
            };
            let owners = self.again(|| self.engine.all(query())).await?;
            let mut some = false;
            for (tenant, id) in named(&owners)? {
                some |= self.forget(&tenant, &id).await?;
            }
            if !some {
                break;
            }
        }
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            let is_gone = remove_if_unused(&mut tx, key).await?;
            tx.commit().await?;
            Ok(is_gone)
        })
        .await
    }

    /// The same as [`forget_once`](Self::forget_once), but a build that cannot be read, or whose
    /// tenant's counters are wrong, keeps its file: the others shall not wait for whoever mends it.
    pub(super) async fn forget(&self, tenant: &TenantId, id: &BuildId) -> Result<bool, StoreError> {
        self.again(|| self.forget_once(tenant, id)).await.or_else(|error| {
            passed_over(error, &format!("build {id} of tenant {tenant}"))?;
            Ok(false)
        })
    }

    /// Takes a completed build's file away; the build stays.
    async fn forget_once(&self, tenant: &TenantId, id: &BuildId) -> Result<bool, StoreError> {
        let mut tx = self.engine.begin().await?;
        let Some(held) = Held::hold(&mut tx, tenant, id).await? else { return Ok(false) };
        if held.state != BuildState::Completed || held.artifact_key.is_none() {
            return Ok(false);
        }
        let freed_bytes = drop_claim(&mut tx, &held).await?;
        let tally = super::Tally { storage_bytes: -freed_bytes, ..super::Tally::default() };
        tally.apply(&mut tx, tenant).await?;
        tx.commit().await?;
        Ok(true)
    }

    pub(crate) async fn artifact_is_referenced(&self, key: &str) -> Result<bool, StoreError> {
        let query = || sql("SELECT id FROM build WHERE artifact_key = $1 LIMIT 1").text(key);
        Ok(self.again(|| self.engine.optional(query())).await?.is_some())
    }

    pub(crate) async fn storage_bytes(&self) -> Result<u64, StoreError> {
        let query = || {
            sql("SELECT CAST(COALESCE(SUM(size_bytes), 0) AS BIGINT) AS size_bytes FROM artifact")
        };
        match self.again(|| self.engine.optional(query())).await? {
            Some(row) => row.count("size_bytes"),
            None => Ok(0),
        }
    }
}
