//! The queue: builds are claimed, worked on and said to live; leases that run out are reaped.
//!
//! Tenants are served by virtual time: who got the least for its weight is next. A tenant's
//! own builds are served in the order in which they became ready. A write by a worker names the
//! token of its lease; whoever lost the lease changes nothing.

use crate::build::record::{Build, BuildId, Failure, FailureCode, LiveUsage, LogLine, Micros};
use crate::build::state::{BuildState, Happening};
use crate::build::step_name;
use crate::causes::chain;
use crate::store::engine::{Query, Row, Tx, sql, to_json};
use crate::store::{Claimed, Fenced, Heartbeat, Lease, Leases, StoreError};
use crate::tenant::TenantId;

use super::ending::{Ending, Requeue};
use super::log::{add_last_words, add_to_log, own_line};
use super::reading::{Gaps, read_build};
use super::{Held, Rows, Tally, named, passed_over, virtual_cost, was_held};

/// How often a claim looks again when others hold what it found.
const CLAIM_TRIES: u32 = 5;
/// How long a build waits that a worker could not read.
const PUT_OFF_SECS: u64 = 30;
/// A build that was put off so often ends as failed. Ten minutes at least: a newer node, which can
/// read it, will have taken it in between.
const UNREAD_TRIES_MAX: i64 = 20;
/// Lost leases that one call of `reap` looks at.
const REAP_MAX: i64 = 1000;

/// The builds of a tenant that wait and may run now.
macro_rules! ready_builds {
    () => {
        "SELECT b.id FROM build b WHERE b.tenant_id = t.id AND b.state = 'queued' \
         AND b.run_at <= $1"
    };
}

impl Rows {
    pub(crate) async fn claim(
        &self,
        worker: &str,
        lease_secs: u64,
        now: Micros,
    ) -> Result<Option<Claimed>, StoreError> {
        for _ in 0..CLAIM_TRIES {
            let claimed = self.again(|| self.claim_once(worker, lease_secs, now)).await?;
            if claimed.is_some() {
                self.announcer.announce();
                return Ok(claimed);
            }
            // Rows that others hold are passed over, so that nothing found can mean that all
            // that was found is held.
            if !self.again(|| self.is_work_ready(now)).await? {
                return Ok(None);
            }
            tokio::task::yield_now().await;
        }
        Ok(None)
    }

    async fn is_work_ready(&self, now: Micros) -> Result<bool, StoreError> {
        let query = sql(concat!(
            "SELECT t.id FROM tenant t WHERE t.queued > 0 AND t.running < t.running_max \
             AND EXISTS (",
            ready_builds!(),
            ") LIMIT 1"
        ));
        Ok(self.engine.optional(query.at(now)).await?.is_some())
    }

    async fn claim_once(
        &self,
        worker: &str,
        lease_secs: u64,
        now: Micros,
    ) -> Result<Option<Claimed>, StoreError> {
        let mut tx = self.engine.begin().await?;
        let Some(turn) = next_tenant(&mut tx, now).await? else { return Ok(None) };
        let query =
            sql("SELECT tenant_id, id FROM build WHERE tenant_id = $1 AND state = 'queued' \
             AND run_at <= $2 ORDER BY run_at, id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED");
        let query = query.text(&turn.text("id")?).at(now);
        let Some(found) = tx.optional(query).await? else { return Ok(None) };
        match take(&mut tx, &turn, &found, worker, lease_secs, now).await {
            Ok(Some(claimed)) => {
                tx.commit().await?;
                Ok(Some(claimed))
            }
            Ok(None) => Ok(None),
            Err(error) if error.is_of_a_row() => {
                tx.rollback().await?;
                self.put_off(&found, &chain(&error), now).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Lets a build wait that this version cannot read or take, so that the queue goes on without
    /// it: a newer node wrote it, and will take it, or somebody has to mend the database. When
    /// neither happens the build ends.
    async fn put_off(&self, found: &Row, problem: &str, now: Micros) -> Result<(), StoreError> {
        let (tenant, build) = (found.text("tenant_id")?, found.text("id")?);
        // Who can read it may have taken it meanwhile.
        let query = sql("UPDATE build SET run_at = $4, \
             unread_tries = COALESCE(unread_tries, 0) + 1 \
             WHERE tenant_id = $1 AND id = $2 AND state = 'queued' AND run_at <= $3 \
             RETURNING unread_tries");
        let query = query.text(&tenant).text(&build).at(now).at(now.plus_secs(PUT_OFF_SECS));
        let mut tx = self.engine.begin().await?;
        let Some(row) = tx.optional(query).await? else { return Ok(()) };
        tx.commit().await?;
        tracing::error!(tenant, build, problem, "a build in the queue cannot be taken");
        match row.int("unread_tries")? > UNREAD_TRIES_MAX {
            true => self
                .give_up(found, now)
                .await
                .or_else(|error| passed_over(error, &format!("build {build} of tenant {tenant}"))),
            false => Ok(()),
        }
    }

    /// Ends a build that was put off for the last time.
    async fn give_up(&self, found: &Row, now: Micros) -> Result<(), StoreError> {
        let (tenant, build) = (found.parsed("tenant_id")?, found.parsed("id")?);
        let mut tx = self.engine.begin().await?;
        let held = Held::hold_as_it_is(&mut tx, &tenant, &build, &mut Gaps::default()).await?;
        let waits =
            |held: &Held| held.state == BuildState::Queued && held.unread_tries > UNREAD_TRIES_MAX;
        let Some(held) = held.filter(waits) else { return Ok(()) };
        let failure = unread(&held);
        let ending = Ending::by("queue", Happening::Failed);
        let ending = Ending { failure: Some(&failure), ..ending };
        ending.apply(&mut tx, &held, now).await?;
        tx.commit().await?;
        tracing::error!(%tenant, %build, "a build that cannot be read has failed");
        self.announcer.announce();
        Ok(())
    }

    pub(crate) async fn heartbeat(
        &self,
        lease: &Lease,
        lease_secs: u64,
        usage: Option<&LiveUsage>,
        now: Micros,
    ) -> Result<Heartbeat, StoreError> {
        let usage = usage.map(to_json).transpose()?;
        self.again(|| self.heartbeat_once(lease, lease_secs, usage.as_deref(), now)).await
    }

    async fn heartbeat_once(
        &self,
        lease: &Lease,
        lease_secs: u64,
        usage: Option<&str>,
        now: Micros,
    ) -> Result<Heartbeat, StoreError> {
        let mut tx = self.engine.begin().await?;
        let expires_at = tx.lease_clock(now).await?.plus_secs(lease_secs);
        let query = sql("UPDATE build SET lease_expires_at = $4, \
             live_usage = COALESCE($5, live_usage) \
             WHERE tenant_id = $1 AND id = $2 AND lease_token = $3 AND lease_owner IS NOT NULL \
             RETURNING cancel_requested_at, cancel_reason");
        let query = query
            .text(lease.tenant.as_str())
            .text(lease.build.as_str())
            .int(lease.token)
            .at(expires_at)
            .maybe_text(usage);
        let Some(row) = tx.optional(query).await? else { return Ok(Heartbeat::Lost) };
        tx.commit().await?;
        match row.maybe_int("cancel_requested_at")? {
            None => Ok(Heartbeat::GoOn),
            Some(_) => {
                let reason = row.maybe_text("cancel_reason")?.unwrap_or_default();
                Ok(Heartbeat::Cancel { reason })
            }
        }
    }

    pub(crate) async fn progress(
        &self,
        lease: &Lease,
        state: BuildState,
        percent: u32,
        step: &str,
        now: Micros,
    ) -> Result<Fenced, StoreError> {
        self.change(|| async {
            let mut tx = self.engine.begin().await?;
            let Some(held) = Held::by_lease(&mut tx, lease).await? else { return Ok(Fenced::Lost) };
            let to = held.state.next(Happening::Entered(state))?;
            let is_new = to != held.state;
            let query = sql("UPDATE build SET state = $4, progress_percent = $6, step = $7, \
                 updated_at = $8, event_seq = event_seq + $9 \
                 WHERE tenant_id = $1 AND id = $2 AND state = $3 AND lease_token = $5");
            let query = held
                .key(query)
                .text(to.as_str())
                .int(held.token)
                .int(i64::from(percent.min(100).max(held.progress_percent)))
                .text(step)
                .at(now)
                .int(i64::from(is_new));
            was_held(tx.execute(query).await?)?;
            if is_new {
                held.record(&mut tx, to, held.token, held.worker(), now).await?;
            }
            tx.commit().await?;
            Ok(Fenced::Written)
        })
        .await
    }

    pub(crate) async fn append_log(
        &self,
        lease: &Lease,
        lines: &[LogLine],
    ) -> Result<Fenced, StoreError> {
        self.change(|| async {
            let mut tx = self.engine.begin().await?;
            let Some(held) = Held::by_lease(&mut tx, lease).await? else { return Ok(Fenced::Lost) };
            add_to_log(&mut tx, &held, lines).await?;
            tx.commit().await?;
            Ok(Fenced::Written)
        })
        .await
    }

    pub(crate) async fn reap(
        &self,
        leases: Leases,
        attempts_max: u32,
        now: Micros,
    ) -> Result<u64, StoreError> {
        let mut reaped = 0;
        for (tenant, id) in self.again(|| self.lost(leases, now)).await? {
            let reap = || self.reap_once(&tenant, &id, leases, attempts_max, now);
            match self.again(reap).await {
                Ok(done) => reaped += u64::from(done),
                // The others shall not wait for whoever mends this one.
                Err(error) => passed_over(error, &format!("build {id} of tenant {tenant}"))?,
            }
        }
        if reaped > 0 {
            self.announcer.announce();
        }
        Ok(reaped)
    }

    /// Builds that their workers have lost.
    async fn lost(
        &self,
        leases: Leases,
        now: Micros,
    ) -> Result<Vec<(TenantId, BuildId)>, StoreError> {
        let mut tx = self.engine.snapshot().await?;
        let clock = match leases {
            Leases::Expired => tx.lease_clock(now).await?,
            Leases::All => Micros(i64::MAX),
        };
        let query = sql("SELECT tenant_id, id FROM build \
             WHERE lease_owner IS NOT NULL AND lease_expires_at <= $1 \
             ORDER BY lease_expires_at LIMIT $2");
        let found = tx.all(query.at(clock).int(REAP_MAX)).await?;
        tx.rollback().await?;
        named(&found)
    }

    async fn reap_once(
        &self,
        tenant: &TenantId,
        id: &BuildId,
        leases: Leases,
        attempts_max: u32,
        now: Micros,
    ) -> Result<bool, StoreError> {
        let mut tx = self.engine.begin().await?;
        let Some(held) = Held::hold(&mut tx, tenant, id).await? else { return Ok(false) };
        // It may have lived or ended meanwhile.
        let clock = tx.lease_clock(now).await?;
        let is_expired = held.lease_expires_at.is_some_and(|expires_at| expires_at <= clock);
        if !held.state.is_running() || !(is_expired || leases == Leases::All) {
            return Ok(false);
        }
        let token = held.token + 1;
        let (failure, tries_max) = (worker_lost(&held), attempts_max);
        if held.is_cancel_requested {
            held.tell_cancel(&mut tx, now).await?;
            let ending = Ending { token, ..Ending::by("reaper", Happening::Cancelled) };
            ending.apply(&mut tx, &held, now).await?;
        } else if held.attempt >= attempts_max {
            // Nobody works on it who could say so.
            let line = format!("{} failed: {} ({})", failure.step, failure.cause, failure.remedy);
            add_last_words(&mut tx, &held, own_line("error", line, now)).await?;
            let ending = Ending::by("reaper", Happening::Failed);
            let ending = Ending { token, failure: Some(&failure), ..ending };
            ending.apply(&mut tx, &held, now).await?;
        } else {
            let why = Some((&failure, tries_max));
            let run_at = now.plus_secs(rest_secs(held.attempt));
            let requeue = Requeue { why, run_at, token, actor: "reaper" };
            requeue.apply(&mut tx, &held, now).await?;
        }
        tx.commit().await?;
        Ok(true)
    }
}

impl Held {
    /// The first three values of an update: whose, which, and in which state.
    pub(super) fn key(&self, query: Query) -> Query {
        query.text(self.tenant.as_str()).text(self.id.as_str()).text(self.state.as_str())
    }
}

/// The tenant whose turn it is, with its weight, of which nothing has been read yet.
async fn next_tenant(tx: &mut Tx, now: Micros) -> Result<Option<Row>, StoreError> {
    let query = sql(concat!(
        "SELECT t.id, t.weight FROM tenant t \
         WHERE t.queued > 0 AND t.running < t.running_max AND EXISTS (",
        ready_builds!(),
        ") ORDER BY t.virtual_time, t.id LIMIT 1 FOR NO KEY UPDATE OF t SKIP LOCKED"
    ));
    tx.optional(query.at(now)).await
}

/// Takes the build that was found of the tenant whose turn it is; none if it is not there any more.
async fn take(
    tx: &mut Tx,
    turn: &Row,
    found: &Row,
    worker: &str,
    lease_secs: u64,
    now: Micros,
) -> Result<Option<Claimed>, StoreError> {
    let (tenant, id) = (found.parsed("tenant_id")?, found.parsed("id")?);
    let Some(held) = Held::hold(tx, &tenant, &id).await? else { return Ok(None) };
    let to = held.state.next(Happening::Claimed)?;
    let token = held.token + 1;
    let expires_at = tx.lease_clock(now).await?.plus_secs(lease_secs);
    let query = sql("UPDATE build SET state = $4, attempt = attempt + 1, lease_token = $5, \
         lease_owner = $6, lease_expires_at = $7, attempt_started_at = $8, \
         started_at = COALESCE(started_at, $8), updated_at = $8, progress_percent = 0, \
         step = '', live_usage = NULL, unread_tries = NULL, event_seq = event_seq + 1 \
         WHERE tenant_id = $1 AND id = $2 AND state = $3");
    let query = held.key(query).text(to.as_str()).int(token).text(worker);
    was_held(tx.execute(query.at(expires_at).at(now)).await?)?;
    held.record(tx, to, token, worker, now).await?;
    let moved = Tally::moved(Some(held.state), Some(to));
    let tally = Tally { virtual_time: virtual_cost(turn.small("weight")?), ..moved };
    tally.apply(tx, &tenant).await?;
    let (build, sealed_credentials) = claimed_build(tx, &held).await?;
    let lease = Lease { build: id, tenant, token };
    Ok(Some(Claimed { lease, build, sealed_credentials }))
}

async fn claimed_build(tx: &mut Tx, held: &Held) -> Result<(Build, Option<Vec<u8>>), StoreError> {
    let build = read_build(tx, &held.tenant, &held.id).await?;
    let query = sql("SELECT sealed_credentials FROM build WHERE tenant_id = $1 AND id = $2");
    let query = query.text(held.tenant.as_str()).text(held.id.as_str());
    let row: Row = tx.one(query).await?;
    Ok((build, row.bytes("sealed_credentials")?))
}

/// How long a build rests that was lost at this try: a server that dies now and then loses no time,
/// and a build that ends each server it comes to lets the others go first.
fn rest_secs(attempt: u32) -> u64 {
    match attempt {
        ..=2 => 0,
        3..=7 => 1 << (attempt - 3),
        _ => 30,
    }
}

fn worker_lost(held: &Held) -> Failure {
    Failure {
        code: FailureCode::TemporaryResourceError,
        step: step_name(&held.step).to_owned(),
        cause: "the worker stopped answering".into(),
        blame: "ours".into(),
        remedy: "build it again; if that fails in the same way, tell the operator the build's id"
            .into(),
    }
}

fn unread(held: &Held) -> Failure {
    Failure {
        code: FailureCode::Internal,
        step: step_name(&held.step).to_owned(),
        cause: "what is stored of this build cannot be read".into(),
        blame: "ours".into(),
        remedy: "build it again; if that fails in the same way, tell the operator the build's id"
            .into(),
    }
}
