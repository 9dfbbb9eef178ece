//! What belongs to no tenant: for workers in search of work, the janitor and operators' commands.

use super::audit::{AuditEntry, AuditFilter, AuditRow, AuditVerdict, Author};
use super::{
    Changes, Claimed, Depth, Leases, Listed, Removal, Rows, StoreError, TenantLoad, TenantRow,
    TokenRow,
};
use crate::build::record::Micros;
use crate::clock::{Clock as _, WallClock};
use crate::tenant::{TenantId, Tier};

/// The queue, tenants, tokens, artifacts.
#[derive(Clone, Copy)]
pub struct SystemStore<'a> {
    pub(super) rows: &'a Rows,
    /// Who changes something; the service itself if nobody is named.
    pub(super) author: Option<&'a Author>,
}

impl SystemStore<'_> {
    /// Takes the next build from the queue: tenants by share, a tenant's builds in order.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn claim(
        &self,
        worker: &str,
        lease_secs: u64,
        now: Micros,
    ) -> Result<Option<Claimed>, StoreError> {
        self.rows.claim(worker, lease_secs, now).await
    }

    /// Puts builds that their worker has lost back into the queue, ends those to be cancelled and
    /// those that were tried `attempts_max` times. Returns how many.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn reap(
        &self,
        leases: Leases,
        attempts_max: u32,
        now: Micros,
    ) -> Result<u64, StoreError> {
        self.rows.reap(leases, attempts_max, now).await
    }

    /// Forgets the artifacts of builds that ended before `older_than`; the builds stay. Returns
    /// how many.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn expire(&self, older_than: Micros) -> Result<u64, StoreError> {
        self.rows.expire(older_than).await
    }

    /// Forgets the oldest artifacts until all take at most `bytes_max`. Returns how many.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn evict(&self, bytes_max: u64) -> Result<u64, StoreError> {
        self.rows.evict(bytes_max).await
    }

    /// Whether any build has the artifact.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn artifact_is_referenced(&self, key: &str) -> Result<bool, StoreError> {
        self.rows.artifact_is_referenced(key).await
    }

    /// Keys of stored files that lost their last build, or whose removal was not ended in time;
    /// at most `limit`, oldest first. Some may be wanted again: [`begin_removal`](Self::begin_removal)
    /// knows.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn dropped(&self, limit: u32, now: Micros) -> Result<Vec<String>, StoreError> {
        self.rows.dropped(limit, now).await
    }

    /// Leave to remove a stored file; none if a build has it or is about to, or if somebody else
    /// removes it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn begin_removal(
        &self,
        key: &str,
        now: Micros,
    ) -> Result<Option<Removal>, StoreError> {
        self.rows.begin_removal(key, now).await
    }

    /// The file is gone: builds may take its name again. Without a word they wait until the
    /// removal expires.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn end_removal(&self, removal: &Removal) -> Result<(), StoreError> {
        self.rows.end_removal(removal).await
    }

    /// The name of the key that secrets in this database are sealed with, if there is one.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn master_key(&self) -> Result<Option<String>, StoreError> {
        self.rows.master_key().await
    }

    /// Says which key secrets are sealed with, if nobody said so before; the name that holds.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn claim_master_key(&self, id: &str) -> Result<String, StoreError> {
        self.rows.claim_master_key(id).await
    }

    /// Forgets the name of a key that is lost: the next server to start says which one holds.
    /// Returns how many builds wait with secrets that it had sealed.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn forget_master_key(&self) -> Result<u64, StoreError> {
        self.rows.forget_master_key_by(&self.author(), WallClock.now()).await
    }

    /// How full the queue is.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn depth(&self) -> Result<Depth, StoreError> {
        self.rows.depth().await
    }

    /// Bytes of all artifacts.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn storage_bytes(&self) -> Result<u64, StoreError> {
        self.rows.storage_bytes().await
    }

    /// Whether the database takes writes: one is made, which changes nothing that anybody reads.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn beat(&self) -> Result<(), StoreError> {
        self.rows.beat().await
    }

    /// Adds a tenant or changes it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn put_tenant(&self, tenant: &TenantRow) -> Result<(), StoreError> {
        self.rows.put_tenant_by(&self.author(), tenant, WallClock.now()).await
    }

    /// What the operator set for a tenant.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn tenant(&self, id: &TenantId) -> Result<Option<TenantRow>, StoreError> {
        self.rows.tenant(id).await
    }

    /// Every tenant the operator set up, or that ever built.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn tenants(&self) -> Result<Listed<TenantRow>, StoreError> {
        self.rows.tenants().await
    }

    /// The `limit` tenants with the most running builds; among equals, those with the most bytes.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn busiest(&self, limit: u32, now: Micros) -> Result<Vec<TenantLoad>, StoreError> {
        self.rows.busiest(limit, now).await
    }

    /// Keeps a new token.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn add_token(&self, token: &TokenRow) -> Result<(), StoreError> {
        self.rows.add_token_by(&self.author(), token).await
    }

    /// The token with this secret, revoked and expired ones too, and the tier of its tenant if
    /// the operator set one.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn token_by_hash(
        &self,
        secret_hash: &str,
    ) -> Result<Option<(TokenRow, Option<Tier>)>, StoreError> {
        self.rows.token_by_hash(secret_hash).await
    }

    /// Every token.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn tokens(&self) -> Result<Listed<TokenRow>, StoreError> {
        self.rows.tokens().await
    }

    /// Revokes a token; false if there is none.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn revoke_token(&self, id: &str, now: Micros) -> Result<bool, StoreError> {
        self.rows.revoke_token_by(&self.author(), id, now).await
    }

    pub(super) fn author(&self) -> Author {
        self.author.cloned().unwrap_or_else(Author::service)
    }

    /// Writes into the audit log what changes nothing here.
    ///
    /// # Errors
    /// [`StoreError`]
    pub(crate) async fn add_audit(&self, entries: Vec<AuditEntry>) -> Result<(), StoreError> {
        self.rows.add_audit(entries).await
    }

    /// Rows of the audit log behind `last`, in the order of time: a page, empty at the end.
    ///
    /// # Errors
    /// [`StoreError`]
    pub(crate) async fn audit_page(
        &self,
        filter: &AuditFilter,
        last: Option<&AuditRow>,
    ) -> Result<Vec<AuditRow>, StoreError> {
        self.rows.audit_page(filter, last).await
    }

    /// Forgets rows of the audit log that are older; how many. What is left over is for the next
    /// call.
    ///
    /// # Errors
    /// [`StoreError`]
    pub(crate) async fn forget_audit(&self, older_than: Micros) -> Result<u64, StoreError> {
        self.rows.forget_audit(older_than).await
    }

    /// Whether the audit log is as it was written, without gaps.
    ///
    /// # Errors
    /// [`StoreError`]
    pub(crate) async fn verify_audit(&self) -> Result<AuditVerdict, StoreError> {
        self.rows.verify_audit().await
    }

    /// Changes in queue or logs from now on: hints, never more. Who looks, waits and looks again
    /// misses none that way: take this first.
    pub fn changes(&self) -> Changes {
        self.rows.announcer.subscribe()
    }
}
