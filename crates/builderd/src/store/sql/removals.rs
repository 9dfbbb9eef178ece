//! A stored file is either being taken by a build or being removed, never both.
//!
//! Both sides write the same row of `artifact_removal` first, so that one waits for the other
//! and then sees what it did. A file that nothing names any more has a row there at once, that of a
//! removal which is over, so that it is found without looking at all files. Knows no file.

use super::artifacts::remove_if_unused;
use super::{Held, Rows, rows, was_held};
use crate::build::record::Micros;
use crate::store::engine::{Tx, sql};
use crate::store::{Lease, NewFile, Removal, Reserved, StoreError};

/// A removal that was not ended after so long is over: longer than it may take.
const REMOVAL_SECS: u64 = 120;

/// Writes the row of a key, unless a removal that is not over has written it.
async fn hold_key(
    tx: &mut Tx,
    key: &str,
    expires_at: Micros,
    now: Micros,
) -> Result<bool, StoreError> {
    let query = sql("DELETE FROM artifact_removal WHERE artifact_key = $1 AND expires_at <= $2");
    tx.execute(query.text(key).at(now)).await?;
    let query = sql("INSERT INTO artifact_removal (artifact_key, expires_at) VALUES ($1, $2) \
         ON CONFLICT (artifact_key) DO NOTHING");
    Ok(tx.execute(query.text(key).at(expires_at)).await? == 1)
}

/// Leaves word that a stored file has nobody any more.
pub(super) async fn note_dropped(tx: &mut Tx, key: &str) -> Result<(), StoreError> {
    let query = sql("INSERT INTO artifact_removal (artifact_key, expires_at) VALUES ($1, 0) \
         ON CONFLICT (artifact_key) DO NOTHING");
    tx.execute(query.text(key)).await?;
    Ok(())
}

impl Rows {
    pub(crate) async fn dropped(&self, limit: u32, now: Micros) -> Result<Vec<String>, StoreError> {
        let query = sql("SELECT artifact_key FROM artifact_removal WHERE expires_at <= $1 \
             ORDER BY expires_at, artifact_key LIMIT $2");
        let query = query.at(now).int(rows(limit, 0));
        let found = self.again(|| self.engine.all(query.clone())).await?;
        found.iter().map(|row| row.text("artifact_key")).collect()
    }

    pub(crate) async fn reserve(
        &self,
        lease: &Lease,
        file: &NewFile<'_>,
        now: Micros,
    ) -> Result<Reserved, StoreError> {
        self.again(|| self.reserve_once(lease, file, now)).await
    }

    async fn reserve_once(
        &self,
        lease: &Lease,
        file: &NewFile<'_>,
        now: Micros,
    ) -> Result<Reserved, StoreError> {
        let mut tx = self.engine.begin().await?;
        let Some(held) = Held::by_lease(&mut tx, lease).await? else { return Ok(Reserved::Lost) };
        let clock = tx.lease_clock(now).await?;
        if !hold_key(&mut tx, file.key, clock, clock).await? {
            return Ok(Reserved::BeingRemoved);
        }
        // The update changes nothing, but holds the row.
        let query = sql("INSERT INTO artifact (artifact_key, size_bytes, sha256, created_at) \
             VALUES ($1, $2, $3, $4) ON CONFLICT (artifact_key) DO UPDATE SET \
             sha256 = artifact.sha256");
        let query = query.text(file.key).count(file.size_bytes).text(file.sha256).at(now);
        tx.execute(query).await?;
        let query = sql("UPDATE build SET artifact_key = $4 \
             WHERE tenant_id = $1 AND id = $2 AND state = $3");
        was_held(tx.execute(held.key(query).text(file.key)).await?)?;
        if let Some(other) = held.artifact_key.as_deref().filter(|other| *other != file.key) {
            remove_if_unused(&mut tx, other).await?;
        }
        let query = sql("DELETE FROM artifact_removal WHERE artifact_key = $1");
        was_held(tx.execute(query.text(file.key)).await?)?;
        tx.commit().await?;
        Ok(Reserved::Yes)
    }

    pub(crate) async fn begin_removal(
        &self,
        key: &str,
        now: Micros,
    ) -> Result<Option<Removal>, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            let clock = tx.lease_clock(now).await?;
            let expires_at = clock.plus_secs(REMOVAL_SECS);
            if !hold_key(&mut tx, key, expires_at, clock).await? {
                return Ok(None);
            }
            let query = sql("SELECT artifact_key FROM artifact WHERE artifact_key = $1");
            let is_wanted = tx.optional(query.text(key)).await?.is_some();
            if is_wanted {
                let query = sql("DELETE FROM artifact_removal WHERE artifact_key = $1");
                tx.execute(query.text(key)).await?;
            }
            tx.commit().await?;
            Ok((!is_wanted).then(|| Removal { key: key.to_owned(), expires_at }))
        })
        .await
    }

    pub(crate) async fn end_removal(&self, removal: &Removal) -> Result<(), StoreError> {
        let query = sql("DELETE FROM artifact_removal WHERE artifact_key = $1 AND expires_at = $2");
        let query = query.text(&removal.key).at(removal.expires_at);
        self.again(|| self.engine.execute(query.clone())).await?;
        Ok(())
    }
}
