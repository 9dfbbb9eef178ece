//! What a tenant may do with its own rows: a [`Permit`] says which tenant's, and what.

use super::audit::{Action, AuditEntry, Author};
use super::{Accepted, Cancel, Delete, Filter, NewBuild, Page, Revision, Rows, Seen, StoreError};
use crate::build::record::{Build, BuildId, LogLine, Micros, Stats, Usage};
use crate::build::state::BuildState;
use crate::tenant::{Permit, TenantId, TenantLimits};

/// One tenant's rows, and no others.
#[derive(Clone, Copy)]
pub struct TenantStore<'a> {
    pub(super) rows: &'a Rows,
    pub(super) permit: &'a Permit<'a>,
}

impl TenantStore<'_> {
    fn tenant(&self) -> &TenantId {
        self.permit.tenant()
    }

    fn author(&self) -> Author {
        Author::of(self.permit.principal())
    }

    /// Writes into the audit log what the permit was used for and changes nothing here.
    ///
    /// # Errors
    /// [`StoreError`]
    pub(crate) async fn note(&self, object: &str, now: Micros) -> Result<(), StoreError> {
        let (author, action) = (self.author(), Action::by(self.permit.right()));
        let entry = AuditEntry::done(Some(self.tenant()), &author, action, object, now);
        self.rows.add_audit(vec![entry]).await
    }

    /// Puts a build into the queue, unless a quota is used up: counted in the same transaction.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn create(
        &self,
        tenant_limits: &TenantLimits,
        build: NewBuild,
    ) -> Result<Accepted, StoreError> {
        let tier = self.permit.principal().tier();
        let author = self.author();
        self.rows.create_by(&author, self.tenant(), tier, tenant_limits, &build).await
    }

    /// One build.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn get(&self, id: &BuildId) -> Result<Option<Build>, StoreError> {
        self.rows.get(self.tenant(), id).await
    }

    /// One build with the last messages of its log, oldest first.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn get_with_log(&self, id: &BuildId, lines: u32) -> Result<Option<Seen>, StoreError> {
        self.rows.get_with_log(self.tenant(), id, lines).await
    }

    /// Where one build stands, for whoever needs no more of it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn state(&self, id: &BuildId) -> Result<Option<BuildState>, StoreError> {
        self.rows.state(self.tenant(), id).await
    }

    /// How often a build was changed after its end; none if it has not ended or is not there.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn revision_of_ended(&self, id: &BuildId) -> Result<Option<Revision>, StoreError> {
        self.rows.revision_of_ended(self.tenant(), id).await
    }

    /// A page of builds.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn list(&self, filter: &Filter) -> Result<Page, StoreError> {
        self.rows.list(self.tenant(), filter).await
    }

    /// Cancels a queued build, asks the worker of a running one to stop; none if there is none.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn cancel(
        &self,
        id: &BuildId,
        reason: &str,
        now: Micros,
    ) -> Result<Option<Cancel>, StoreError> {
        self.rows.cancel_by(&self.author(), self.tenant(), id, reason, now).await
    }

    /// Deletes a build that has ended; none if there is none.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn delete(&self, id: &BuildId, now: Micros) -> Result<Option<Delete>, StoreError> {
        self.rows.delete_by(&self.author(), self.tenant(), id, now).await
    }

    /// At most `limit` lines of a log from line `offset` on.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn log(
        &self,
        id: &BuildId,
        offset: u64,
        limit: u32,
    ) -> Result<Vec<LogLine>, StoreError> {
        self.rows.log(self.tenant(), id, offset, limit).await
    }

    /// What the tenant uses now.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn usage(&self, now: Micros) -> Result<Usage, StoreError> {
        self.rows.usage(self.tenant(), now).await
    }

    /// The first build that was accepted then or later.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn first_since(&self, at: Micros) -> Result<Option<BuildId>, StoreError> {
        self.rows.first_since(self.tenant(), at).await
    }

    /// Figures over the builds accepted in `from..to`.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn stats(
        &self,
        from: Option<Micros>,
        to: Option<Micros>,
    ) -> Result<Stats, StoreError> {
        self.rows.stats(self.tenant(), from, to).await
    }
}
