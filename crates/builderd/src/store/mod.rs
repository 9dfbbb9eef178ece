//! What outlives the process: builds, their logs, tenants, tokens and artifacts, in SQL.
//!
//! One body (`sql/`) for two engines (`engine.rs`), SQLite and PostgreSQL, one schema
//! (`migrations/`), one conformance suite that runs on both (`tests/`). A tenant's rows are reached with a [`Permit`]
//! through [`TenantStore`], a running build's with its [`Lease`] through [`LeaseStore`]; what
//! belongs to nobody is [`SystemStore`]'s. Every change of a build's state is one transaction
//! that asks [`BuildState::next`], compares and sets, counts, and adds an event row.
//!
//! It does not know doors, the engine, or where artifacts lie.

pub mod admin;
pub(crate) mod audit;
mod changes;
mod engine;
mod keys;
mod open;
mod sql;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use audit::{Action, AuditEntry, AuditFilter, AuditRow, AuditVerdict, Author};
pub use changes::Changes;
pub(crate) use keys::SEALED;
pub use keys::{Destroyed, TenantKeyRow};
pub(crate) use sql::Rows;

use crate::build::record::{
    Build, BuildId, BuildRequest, BuildResult, Failure, LiveUsage, LogLine, Micros, Stats, Usage,
};
use crate::build::state::{BuildState, IllegalTransition};
use crate::clock::{Clock as _, WallClock};
use crate::tenant::{Permit, TenantId, TenantLimits, Tier};

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, or is too busy.
    #[error("the database is not available")]
    Unavailable(#[source] sqlx::Error),
    /// The disk of the database is full.
    #[error("the disk of the database is full")]
    Full(#[source] sqlx::Error),
    /// What stands in the database is not what was written there.
    #[error("the database holds something it should not: {0}")]
    Corrupt(String),
    /// A build's state does not allow it.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// Anything else the database said.
    #[error("the database failed")]
    Database(#[source] sqlx::Error),
    /// The data directory cannot be used.
    #[error("the data directory {path:?} cannot be used: {problem}")]
    DataDirectory {
        /// Where it is.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A migration failed.
    #[error("the database's schema could not be brought up to date")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

impl StoreError {
    /// Whether the same may work a moment later.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Full(_))
    }

    /// What kind of trouble it is, in one word for programs.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Unavailable(error) if engine::is_read_only(error) => "database_read_only",
            Self::Unavailable(_) => "database_unavailable",
            Self::Full(_) => "database_full",
            Self::Corrupt(_)
            | Self::Illegal(_)
            | Self::Database(_)
            | Self::DataDirectory { .. }
            | Self::Migrate(_) => "database_failed",
        }
    }

    /// The database took longer than its caller waits.
    pub(crate) fn timed_out() -> Self {
        Self::Unavailable(sqlx::Error::PoolTimedOut)
    }
}

/// A build to be accepted.
#[derive(Clone, Debug)]
pub struct NewBuild {
    /// Its name.
    pub id: BuildId,
    /// What was asked.
    pub request: BuildRequest,
    /// The tenant's limits lowered by the request.
    pub limits: TenantLimits,
    /// The customer within the tenant.
    pub customer: Option<String>,
    /// Registry credentials, sealed; erased when the build ends.
    pub sealed_credentials: Option<Vec<u8>>,
    /// Two builds of a tenant with the same key are one.
    pub idempotency_key: Option<String>,
    /// SHA-256 over the request; the same key with another hash is refused.
    pub request_hash: String,
    /// The id of its creator's token; none if nobody was asked for one.
    pub created_by: Option<String>,
    /// W3C trace context of the request.
    pub traceparent: Option<String>,
    /// When.
    pub created_at: Micros,
}

/// What became of a [`NewBuild`].
#[derive(Clone, Debug)]
pub enum Accepted {
    /// It is in the queue.
    Created(Build),
    /// The same request was accepted before.
    Known {
        /// What it made.
        build: Build,
        /// The id of its creator's token, if that is known.
        created_by: Option<String>,
    },
    /// The key was used for another request.
    KeyReused,
    /// The tenant has no more.
    Quota(QuotaExceeded),
}

/// A quota that is used up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaExceeded {
    /// `daily_builds`, `storage` or `queued_builds`.
    pub quota_type: &'static str,
    /// What is used.
    pub current: u64,
    /// What may be used.
    pub limit: u64,
    /// When it starts again, if it does by itself.
    pub reset_at: Option<Micros>,
}

/// Which builds of a tenant.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Any when empty.
    pub states: Vec<BuildState>,
    /// Builds older than this one: the last of the page before.
    pub before: Option<BuildId>,
    /// Builds to skip; `before` is faster.
    pub offset: u64,
    /// At most so many.
    pub limit: u32,
}

/// A page of builds, newest first.
#[derive(Clone, Debug)]
pub struct Page {
    /// The builds.
    pub builds: Vec<Build>,
    /// How many fit the filter in all.
    pub total: u64,
    /// Whether more follow.
    pub has_more: bool,
}

/// How often the row of an ended build was changed: as long as this is the same, what was read of
/// the build is still true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revision(pub(crate) i64);

/// A build as it was at one moment, with the end of its log.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// The build.
    pub build: Build,
    /// The last messages of its log, oldest first.
    pub log: Vec<String>,
    /// Counts changes once the build has ended, and says nothing before.
    pub revision: Revision,
}

/// What became of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// It was queued and is cancelled.
    Done,
    /// It runs; its worker is told.
    Requested,
    /// It had ended in this state.
    Ended(BuildState),
}

/// What became of a delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delete {
    /// It is gone.
    Done,
    /// It has not ended; with force it is cancelled now, and is to be deleted again after that.
    Running(BuildState),
}

/// One worker's claim on one try of one build. Every write with it names `token`; a lease that
/// was lost changes nothing any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub(crate) build: BuildId,
    pub(crate) tenant: TenantId,
    pub(crate) token: i64,
}

impl Lease {
    /// The build.
    pub fn build(&self) -> &BuildId {
        &self.build
    }

    /// Its tenant.
    pub fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    /// Rises with every claim of the build.
    pub fn token(&self) -> i64 {
        self.token
    }
}

/// A build that was claimed.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The leave to work on it.
    pub lease: Lease,
    /// The build, already in [`BuildState::Preparing`].
    pub build: Build,
    /// Registry credentials, sealed.
    pub sealed_credentials: Option<Vec<u8>>,
}

/// What a worker hears when it says it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heartbeat {
    /// Go on.
    GoOn,
    /// Stop, and end the build as cancelled.
    Cancel {
        /// Why.
        reason: String,
    },
    /// The lease is lost: stop and write nothing.
    Lost,
}

/// How a try ends.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// With an artifact.
    Completed(Box<BuildResult>),
    /// Without one.
    Failed(Failure),
    /// As somebody wished.
    Cancelled,
    /// Too late.
    TimedOut(Failure),
    /// Back to the queue, to be taken again from `run_at` on.
    Retry {
        /// Why this try failed; none when the worker shuts down, which counts no try.
        failure: Option<Failure>,
        /// Not before.
        run_at: Micros,
    },
}

/// Whether a write with a lease was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fenced {
    /// It was.
    Written,
    /// The lease is lost; nothing was written.
    Lost,
}

/// Which leases are taken from their workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leases {
    /// Those that have run out.
    Expired,
    /// All: nobody else works on this database.
    All,
}

/// An artifact that a build can be given without building.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownArtifact {
    /// What the build that made it got.
    pub result: BuildResult,
}

/// Which artifact a build would make: who may share it, and what decides its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArtifactName {
    /// Who may be given it.
    pub domain: ArtifactDomain,
    /// Digest over manifest digest, options and engine version, in hex.
    pub recipe: String,
}

/// Who may share an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArtifactDomain {
    /// Everybody: what it was made of was fetched without any credential.
    Public,
    /// One tenant.
    Tenant(TenantId),
}

impl ArtifactDomain {
    /// Whether builds of `tenant` may take from it and add to it.
    pub fn includes(&self, tenant: &TenantId) -> bool {
        match self {
            Self::Public => true,
            Self::Tenant(owner) => owner == tenant,
        }
    }
}

/// `public` or `tenant-<id>`: the first part of an artifact's key, too.
impl fmt::Display for ArtifactDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Public => f.write_str("public"),
            Self::Tenant(tenant) => write!(f, "tenant-{tenant}"),
        }
    }
}

/// A file that is about to be stored under its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFile<'a> {
    /// Its name.
    pub key: &'a str,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// SHA-256 of its content, in hex.
    pub sha256: &'a str,
}

/// Whether a build may store a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// It may; nobody removes what has this name until the try ends.
    Yes,
    /// What has this name is just being removed: ask again.
    BeingRemoved,
    /// The lease is lost.
    Lost,
}

/// Leave to remove a stored file that nothing names; no build takes the name meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    pub(crate) key: String,
    /// When it is over, whatever became of it.
    pub(crate) expires_at: Micros,
}

/// A token as it is kept: the secret's hash, never the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRow {
    /// Public part, for lists and revoking.
    pub id: String,
    /// SHA-256 of the secret, in hex.
    pub secret_hash: String,
    /// Whose.
    pub tenant: TenantId,
    /// The customer within the tenant.
    pub customer: Option<String>,
    /// Names of [`crate::tenant::Right`]s.
    pub rights: Vec<String>,
    /// A note for people.
    pub note: String,
    /// When it was made.
    pub created_at: Micros,
    /// When it stops to work.
    pub expires_at: Option<Micros>,
    /// When it was revoked.
    pub revoked_at: Option<Micros>,
}

/// A tenant as the operator set it up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantRow {
    /// Its id.
    pub id: TenantId,
    /// Its tier.
    pub tier: Tier,
    /// Limits in the place of the tier's.
    pub limits: Option<TenantLimits>,
}

/// A tenant as the operator sees it from afar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantLoad {
    /// Which, and what the operator set for it.
    pub tenant: TenantRow,
    /// Its builds that run.
    pub running: u64,
    /// Its builds accepted today (UTC).
    pub created_today: u64,
    /// Bytes of its artifacts; one of several builds counts once.
    pub storage_bytes: u64,
}

/// How full the queue is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Builds that wait.
    pub queued: u64,
    /// Builds that run.
    pub running: u64,
}

/// The database.
#[derive(Clone)]
pub struct Store {
    rows: Arc<Rows>,
}

impl Store {
    /// The rows of the permit's tenant.
    pub fn tenant<'a>(&'a self, permit: &'a Permit<'_>) -> TenantStore<'a> {
        TenantStore { rows: &self.rows, permit }
    }

    /// The build that the lease is for.
    pub fn lease<'a>(&'a self, lease: &'a Lease) -> LeaseStore<'a> {
        LeaseStore { rows: &self.rows, lease }
    }

    /// What belongs to no tenant.
    pub fn system(&self) -> SystemStore<'_> {
        SystemStore { rows: &self.rows, author: None }
    }

    /// The same, for somebody whose changes are told of in the audit log.
    pub(crate) fn system_for<'a>(&'a self, author: &'a Author) -> SystemStore<'a> {
        SystemStore { rows: &self.rows, author: Some(author) }
    }
}

/// One tenant's rows, and no others.
#[derive(Clone, Copy)]
pub struct TenantStore<'a> {
    rows: &'a Rows,
    permit: &'a Permit<'a>,
}

/// A build with a lease on it.
#[derive(Clone, Copy)]
pub struct LeaseStore<'a> {
    rows: &'a Rows,
    lease: &'a Lease,
}

/// The queue, tenants, tokens, artifacts.
#[derive(Clone, Copy)]
pub struct SystemStore<'a> {
    rows: &'a Rows,
    /// Who changes something; the service itself if nobody is named.
    author: Option<&'a Author>,
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

impl LeaseStore<'_> {
    /// Says that the worker lives and what the build takes, and hears whether to go on.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn heartbeat(
        &self,
        lease_secs: u64,
        usage: Option<&LiveUsage>,
        now: Micros,
    ) -> Result<Heartbeat, StoreError> {
        self.rows.heartbeat(self.lease, lease_secs, usage, now).await
    }

    /// Enters a step, or goes on in it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn progress(
        &self,
        state: BuildState,
        percent: u32,
        step: &str,
        now: Micros,
    ) -> Result<Fenced, StoreError> {
        self.rows.progress(self.lease, state, percent, step, now).await
    }

    /// Adds lines to the log; their offsets are given by the store.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn append_log(&self, lines: &[LogLine]) -> Result<Fenced, StoreError> {
        self.rows.append_log(self.lease, lines).await
    }

    /// Ends the try. With [`Outcome::Completed`] the artifact is published in the same
    /// transaction, under `artifact` for other builds to find. Returns the state in which the
    /// build is now, which may be another than the worker thinks: cancelled meanwhile, or failed
    /// because its tenant's storage has no room left. None if the lease was lost.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn finish(
        &self,
        artifact: Option<&ArtifactName>,
        outcome: Outcome,
        now: Micros,
    ) -> Result<Option<BuildState>, StoreError> {
        self.rows.finish(self.lease, artifact, &outcome, now).await
    }

    /// Says that the build is about to store a file, before it does: from then on nobody removes
    /// what has its name, until this try ends.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn reserve(&self, file: &NewFile<'_>, now: Micros) -> Result<Reserved, StoreError> {
        self.rows.reserve(self.lease, file, now).await
    }

    /// An artifact that was made for the same name and still exists. It goes on to exist until
    /// this try ends, so that the try can end with it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn known_artifact(
        &self,
        name: &ArtifactName,
    ) -> Result<Option<KnownArtifact>, StoreError> {
        self.rows.known_artifact(self.lease, name).await
    }
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
    pub async fn tenants(&self) -> Result<Vec<TenantRow>, StoreError> {
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
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, StoreError> {
        self.rows.tokens().await
    }

    /// Revokes a token; false if there is none.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn revoke_token(&self, id: &str, now: Micros) -> Result<bool, StoreError> {
        self.rows.revoke_token_by(&self.author(), id, now).await
    }

    fn author(&self) -> Author {
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
