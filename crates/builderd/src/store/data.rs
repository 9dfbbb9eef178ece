//! What goes into the store and comes out of it. It does not know SQL, nor who may ask.

use std::collections::BTreeSet;
use std::fmt;

use crate::build::record::{Build, BuildId, BuildRequest, BuildResult, Failure, Micros};
use crate::build::state::BuildState;
use crate::tenant::{Right, TenantId, TenantLimits, Tier};

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
    /// The organization that the tenant acts for, as its creator's credential says.
    pub organization: Option<String>,
    /// What that credential allows.
    pub rights: BTreeSet<Right>,
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
    /// The organization that the tenant acts for.
    pub organization: Option<String>,
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

/// All rows of a table, as far as they can be read: one that cannot hides no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed<T> {
    /// Those that can.
    pub rows: Vec<T>,
    /// Those that cannot.
    pub unread: Vec<Unread>,
}

/// A row that this version cannot read: a newer one wrote it, or it is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// Its id, as it stands there.
    pub id: String,
    /// What of it cannot be read.
    pub problem: String,
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
