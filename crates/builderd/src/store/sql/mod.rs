//! The SQL, for both engines. Reached through the views of [`super`], which say who may.
//!
//! | where | what |
//! |---|---|
//! | `create` | a build is accepted, or a quota says no |
//! | `queue` | claims, heartbeats, progress, leases that run out |
//! | `log` | lines of a build's log, within its bounds |
//! | `ending` | a try ends; cancel and delete |
//! | `artifacts` | which build has which file, and what goes when there is no room |
//! | `removals` | a file is taken or removed, never both |
//! | `reading` | builds, logs, figures |
//! | `tenants` | tenants and tokens as the operator set them up |
//! | `audit` | who did what, and who was refused |
//! | `keys` | which master key secrets are sealed with |
//! | `heart` | whether the database takes writes |
//!
//! Rows are locked in this order, whoever asks: build, a file's removal, artifact, a tenant's
//! claim on it, tenant, the tenant's day, a stream of the audit log. A claim holds a tenant before it looks for a build, and so takes
//! only a build that nobody else holds; nobody waits in a circle.

mod artifacts;
mod audit;
mod create;
mod ending;
mod heart;
mod keys;
mod log;
mod queue;
mod reading;
mod removals;
mod tenants;

#[cfg(test)]
pub(super) use audit::AUDIT_PAGE;
#[cfg(test)]
pub(super) use log::{LOG_BYTES_MAX, LOG_LINE_BYTES_MAX, LOG_LINES_MAX};

use std::future::Future;
use std::time::Duration;

use super::changes::Announcer;
use super::engine::{Engine, Row, Tx, is_conflict, signed, sql};
use super::open::{DirectoryLock, in_vain, place, why};
use super::{Lease, Listed, StoreError, Unread};
use crate::build::record::{BuildId, Micros};
use crate::build::state::BuildState;
use crate::causes::chain;
use crate::tenant::TenantId;
use reading::Gaps;

/// How often a transaction is tried that another one got in the way of.
const CONFLICT_TRIES: u32 = 10;
/// Longest that anybody waits for the database.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the SQL does.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(super) engine: Engine,
    pub(super) announcer: Announcer,
    /// Held by the one who asks why nobody is let in.
    asking: tokio::sync::Mutex<()>,
    /// Keeps other servers away.
    _lock: Option<DirectoryLock>,
}

impl Rows {
    pub(super) fn new(engine: Engine, announcer: Announcer, lock: Option<DirectoryLock>) -> Self {
        Self { engine, announcer, asking: tokio::sync::Mutex::new(()), _lock: lock }
    }

    /// The error, with the place of a database that is elsewhere and not available.
    pub(super) fn placed(&self, error: StoreError) -> StoreError {
        match (&self.engine, error) {
            (Engine::Postgres(pool), error @ StoreError::Unavailable(_)) => {
                let place = place(&pool.connect_options());
                StoreError::Unreachable { place, source: Box::new(error) }
            }
            (_, error) => error,
        }
    }

    /// The same, and why: who has waited in vain for a connection was told by nobody. One asks at a
    /// time: where all connections are just taken, there are none to spare for questions.
    async fn explained(&self, error: StoreError) -> StoreError {
        let error = match (&self.engine, error) {
            (Engine::Postgres(pool), StoreError::Unavailable(sqlx::Error::PoolTimedOut)) => {
                let why = match self.asking.try_lock() {
                    Ok(_one) => why(&pool.connect_options()).await,
                    Err(_) => in_vain("no connection"),
                };
                StoreError::Unavailable(why)
            }
            (_, error) => error,
        };
        self.placed(error)
    }

    /// Does `work`, a transaction, until no other one gets in its way.
    async fn again<T, Fut>(&self, work: impl Fn() -> Fut) -> Result<T, StoreError>
    where
        Fut: Future<Output = Result<T, StoreError>>,
    {
        let mut tries = 0;
        loop {
            tries += 1;
            let done = tokio::time::timeout(PATIENCE, work()).await;
            match done.unwrap_or_else(|_| Err(StoreError::late(PATIENCE))) {
                Err(error) if is_conflict(&error) && tries < CONFLICT_TRIES => {}
                Err(error) => return Err(self.explained(error).await),
                done => return done,
            }
        }
    }

    /// Does `work` as [`again`](Self::again) does, and says that something changed.
    async fn change<T, Fut>(&self, work: impl Fn() -> Fut) -> Result<T, StoreError>
    where
        Fut: Future<Output = Result<T, StoreError>>,
    {
        let done = self.again(work).await?;
        self.announcer.announce();
        Ok(done)
    }
}

/// A build's row, held by a transaction until it ends: what decides what may happen to it.
struct Held {
    tenant: TenantId,
    id: BuildId,
    state: BuildState,
    token: i64,
    attempt: u32,
    attempt_started_at: Option<Micros>,
    lease_owner: Option<String>,
    lease_expires_at: Option<Micros>,
    created_at: Micros,
    is_cancel_requested: bool,
    cancel_reason: Option<String>,
    cancelled_by: Option<String>,
    unread_tries: i64,
    artifact_key: Option<String>,
    event_seq: i64,
    progress_percent: u32,
    step: String,
    attempts: String,
    log_lines: u64,
    log_bytes: u64,
    log_is_cut: bool,
}

impl Held {
    /// Holds a build; none if there is none.
    async fn hold(
        tx: &mut Tx,
        tenant: &TenantId,
        id: &BuildId,
    ) -> Result<Option<Self>, StoreError> {
        let mut gaps = Gaps::default();
        let held = Self::hold_as_it_is(tx, tenant, id, &mut gaps).await?;
        gaps.none_in(held)
    }

    /// Holds a build of which not all need be readable: for whoever wants no more of it than an end.
    async fn hold_as_it_is(
        tx: &mut Tx,
        tenant: &TenantId,
        id: &BuildId,
        gaps: &mut Gaps,
    ) -> Result<Option<Self>, StoreError> {
        let query = sql("SELECT state, lease_token, attempt, attempt_started_at, lease_owner, \
             lease_expires_at, created_at, cancel_requested_at, cancel_reason, cancelled_by, \
             unread_tries, artifact_key, event_seq, progress_percent, step, attempts, log_lines, log_bytes, log_is_cut \
             FROM build WHERE tenant_id = $1 AND id = $2 FOR NO KEY UPDATE");
        let row = tx.optional(query.text(tenant.as_str()).text(id.as_str())).await?;
        row.map(|row| Self::read(tenant, id, &row, gaps)).transpose()
    }

    /// Holds the build of a lease; none if the lease is lost.
    async fn by_lease(tx: &mut Tx, lease: &Lease) -> Result<Option<Self>, StoreError> {
        let held = Self::hold(tx, &lease.tenant, &lease.build).await?;
        Ok(held.filter(|held| held.state.is_running() && held.token == lease.token))
    }

    fn read(
        tenant: &TenantId,
        id: &BuildId,
        row: &Row,
        gaps: &mut Gaps,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            tenant: tenant.clone(),
            id: id.clone(),
            state: row.parsed("state")?,
            token: row.int("lease_token")?,
            attempt: gaps.or(row.small("attempt"), || 0),
            attempt_started_at: row.maybe_at("attempt_started_at")?,
            lease_owner: row.maybe_text("lease_owner")?,
            lease_expires_at: row.maybe_at("lease_expires_at")?,
            created_at: row.at("created_at")?,
            is_cancel_requested: row.maybe_int("cancel_requested_at")?.is_some(),
            cancel_reason: row.maybe_text("cancel_reason")?,
            cancelled_by: row.maybe_text("cancelled_by")?,
            unread_tries: row.maybe_int("unread_tries")?.unwrap_or(0),
            artifact_key: row.maybe_text("artifact_key")?,
            event_seq: row.int("event_seq")?,
            progress_percent: gaps.or(row.small("progress_percent"), || 0),
            step: row.text("step")?,
            attempts: row.text("attempts")?,
            log_lines: gaps.or(row.count("log_lines"), || 0),
            log_bytes: gaps.or(row.count("log_bytes"), || 0),
            log_is_cut: row.int("log_is_cut")? != 0,
        })
    }

    /// Who works on it; somebody does while it runs.
    fn worker(&self) -> &str {
        self.lease_owner.as_deref().unwrap_or("worker")
    }

    /// When the running try ended, if it ends now. One whose worker died is over when its lease
    /// is: nothing was computed while no server ran.
    fn attempt_end(&self, now: Micros) -> Micros {
        self.lease_expires_at.map_or(now, |expires_at| expires_at.min(now))
    }

    /// How long the running try has taken.
    fn attempt_us(&self, now: Micros) -> i64 {
        let end = self.attempt_end(now);
        self.attempt_started_at.map_or(0, |start| end.0.saturating_sub(start.0).max(0))
    }

    /// Writes down that the build is `to` now. The update of the row itself counts `event_seq`
    /// up, too.
    async fn record(
        &self,
        tx: &mut Tx,
        to: BuildState,
        token: i64,
        actor: &str,
        now: Micros,
    ) -> Result<(), StoreError> {
        let event = Event {
            tenant: &self.tenant,
            build: &self.id,
            seq: self.event_seq + 1,
            from: self.state.as_str(),
            to,
            token,
            actor,
        };
        event.add(tx, now).await
    }
}

/// Something that happened to a build.
struct Event<'a> {
    tenant: &'a TenantId,
    build: &'a BuildId,
    seq: i64,
    /// Empty before the first.
    from: &'a str,
    to: BuildState,
    token: i64,
    /// Who did it: `tenant`, a worker's name, `reaper`.
    actor: &'a str,
}

impl Event<'_> {
    async fn add(&self, tx: &mut Tx, now: Micros) -> Result<(), StoreError> {
        let query = sql("INSERT INTO build_event (tenant_id, build_id, seq, happened_at, \
             from_state, to_state, lease_token, actor) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)");
        let query = query
            .text(self.tenant.as_str())
            .text(self.build.as_str())
            .int(self.seq)
            .at(now)
            .text(self.from)
            .text(self.to.as_str())
            .int(self.token)
            .text(self.actor);
        tx.execute(query).await?;
        Ok(())
    }
}

/// A compare-and-set on a held row must find it.
fn was_held(touched: u64) -> Result<(), StoreError> {
    match touched {
        1 => Ok(()),
        _ => Err(StoreError::Corrupt(format!("{touched} rows changed in the place of one"))),
    }
}

/// What changes in a tenant's counters.
#[derive(Default)]
struct Tally {
    /// In the order of [`counter`].
    builds: [i64; 6],
    compute_us: i64,
    storage_bytes: i64,
    virtual_time: i64,
}

/// Which counter of a tenant a build in that state is counted by.
fn counter(state: BuildState) -> usize {
    match state {
        BuildState::Queued => 0,
        BuildState::Preparing
        | BuildState::Downloading
        | BuildState::Building
        | BuildState::Optimizing
        | BuildState::Packaging => 1,
        BuildState::Completed => 2,
        BuildState::Failed => 3,
        BuildState::Cancelled => 4,
        BuildState::Timeout => 5,
    }
}

impl Tally {
    /// A build that was counted in one state, if it existed, and is in another, if it still does.
    fn moved(from: Option<BuildState>, to: Option<BuildState>) -> Self {
        let mut tally = Self::default();
        if let Some(from) = from {
            tally.builds[counter(from)] -= 1;
        }
        if let Some(to) = to {
            tally.builds[counter(to)] += 1;
        }
        tally
    }

    async fn apply(self, tx: &mut Tx, tenant: &TenantId) -> Result<(), StoreError> {
        let query = sql("UPDATE tenant SET queued = queued + $2, running = running + $3, \
             completed = completed + $4, failed = failed + $5, cancelled = cancelled + $6, \
             timed_out = timed_out + $7, compute_us = compute_us + $8, \
             storage_bytes = storage_bytes + $9, virtual_time = virtual_time + $10 \
             WHERE id = $1");
        let query = self
            .builds
            .into_iter()
            .fold(query.text(tenant.as_str()), |query, change| query.int(change));
        let query = query.int(self.compute_us).int(self.storage_bytes).int(self.virtual_time);
        was_held(tx.execute(query).await?)
    }
}

/// How far behind a tenant is whose `build` enters the queue while none of its others is ready:
/// who had nothing to do has saved nothing up, and who worked alone owes nothing.
///
/// The others' place is that of the next to be served; with nobody waiting, the furthest
/// anybody got.
async fn arrears(
    tx: &mut Tx,
    tenant: &TenantId,
    build: &BuildId,
    now: Micros,
) -> Result<i64, StoreError> {
    let own = sql("SELECT virtual_time, weight FROM tenant WHERE id = $1 FOR NO KEY UPDATE");
    let own = tx.one(own.text(tenant.as_str())).await?;
    let ready = sql("SELECT id FROM build WHERE tenant_id = $1 AND state = 'queued' \
         AND run_at <= $2 AND id <> $3 ORDER BY run_at, id LIMIT 1");
    let ready = ready.text(tenant.as_str()).at(now).text(build.as_str());
    if tx.optional(ready).await?.is_some() {
        return Ok(0);
    }
    let next = sql("SELECT t.id, t.virtual_time, t.weight FROM tenant t \
         WHERE t.queued > 0 AND t.running < t.running_max AND t.id <> $2 AND EXISTS \
         (SELECT b.id FROM build b \
          WHERE b.tenant_id = t.id AND b.state = 'queued' AND b.run_at <= $1) \
         ORDER BY t.virtual_time, t.id LIMIT 1");
    let other = match tx.optional(next.at(now).text(tenant.as_str())).await? {
        Some(row) => row,
        None => {
            let furthest = sql("SELECT id, virtual_time, weight FROM tenant \
                 ORDER BY virtual_time DESC LIMIT 1");
            tx.one(furthest).await?
        }
    };
    let done = |row: &Row| -> Result<i64, StoreError> {
        Ok(row.int("virtual_time")?.saturating_sub(virtual_start(row.small("weight")?)))
    };
    let own = done(&own)?;
    let others = done(&other).or_else(|error| {
        let tenant = told_apart(&other, "id");
        passed_over(error, &format!("tenant {tenant}"))?;
        Ok::<_, StoreError>(own)
    })?;
    Ok(others.saturating_sub(own).max(0))
}

/// Tells of a row that keeps itself from being worked on, so that nobody waits for whoever mends it;
/// any other error is given back.
fn passed_over(error: StoreError, row: &str) -> Result<(), StoreError> {
    if !error.is_of_a_row() {
        return Err(error);
    }
    tracing::error!(row, problem = chain(&error), "a row of the database is passed over");
    Ok(())
}

/// What a row is called, as well as that can be said.
fn told_apart(row: &Row, column: &str) -> String {
    row.text(column).unwrap_or_else(|_| "without a name".to_owned())
}

/// The builds that rows name in `tenant_id` and `id`; those whose names cannot be read are told of.
fn named(found: &[Row]) -> Result<Vec<(TenantId, BuildId)>, StoreError> {
    let mut builds = Vec::with_capacity(found.len());
    for row in found {
        let name = || Ok((row.parsed("tenant_id")?, row.parsed("id")?));
        match name() {
            Ok(name) => builds.push(name),
            Err(error) => {
                let (tenant, id) = (told_apart(row, "tenant_id"), told_apart(row, "id"));
                passed_over(error, &format!("build {id} of tenant {tenant}"))?;
            }
        }
    }
    Ok(builds)
}

/// What `read` makes of the rows of a table, and those of which it makes nothing.
fn listed<T>(
    found: &[Row],
    read: impl Fn(&Row) -> Result<T, StoreError>,
) -> Result<Listed<T>, StoreError> {
    let mut listed = Listed { rows: Vec::with_capacity(found.len()), unread: Vec::new() };
    for row in found {
        match read(row) {
            Ok(row) => listed.rows.push(row),
            Err(StoreError::Corrupt(problem)) => {
                listed.unread.push(Unread { id: told_apart(row, "id"), problem });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(listed)
}

/// What a started build costs a tenant of that weight.
fn virtual_cost(weight: u32) -> i64 {
    const BUILD: i64 = 1_000_000_000;
    BUILD / i64::from(weight.max(1))
}

/// Where a tenant begins: at the middle of its first build. Whose middle comes first is served
/// first, which keeps everybody nearest to its share.
fn virtual_start(weight: u32) -> i64 {
    virtual_cost(weight) / 2
}

/// A length as the database counts it.
fn length(text: &str) -> u64 {
    u64::try_from(text.len()).unwrap_or(u64::MAX)
}

/// A number of rows wanted.
fn rows(limit: u32, more: u32) -> i64 {
    signed(u64::from(limit) + u64::from(more))
}
