//! A try ends: with an artifact, without one, or back in the queue. Cancel and delete.

use crate::build::record::{
    Attempt, BuildId, BuildRequest, BuildResult, Failure, FailureCode, LogLine, Micros,
};
use crate::build::state::{BuildState, Happening};
use crate::store::audit::{Action, AuditEntry, Author};
use crate::store::engine::{Tx, sql, to_json};
use crate::store::{ArtifactName, Cancel, Delete, Lease, Outcome, StoreError};
use crate::tenant::{TenantId, TenantLimits};

use super::artifacts::{drop_claim, keep, remove_if_unused};
use super::audit::append;
use super::log::{add_last_words, make_room_in_log, own_line};
use super::reading::Gaps;
use super::{Held, Rows, Tally, arrears, was_held};

/// How a build ends.
pub(super) struct Ending<'a> {
    pub(super) actor: &'a str,
    pub(super) happening: Happening,
    pub(super) failure: Option<&'a Failure>,
    /// What came of it, and under which name others find it.
    pub(super) published: Option<(&'a BuildResult, Option<&'a ArtifactName>)>,
    /// The token from now on; never below the row's.
    pub(super) token: i64,
}

/// How a build goes back to the queue.
pub(super) struct Requeue<'a> {
    /// Why, and how often it is tried because of such things; none when the try does not count.
    pub(super) why: Option<(&'a Failure, u32)>,
    pub(super) run_at: Micros,
    pub(super) token: i64,
    pub(super) actor: &'a str,
}

impl<'a> Ending<'a> {
    pub(super) fn by(actor: &'a str, happening: Happening) -> Self {
        Self { actor, happening, failure: None, published: None, token: 0 }
    }

    /// Ends the build: artifact, row, counters and event. Returns its state from now on.
    pub(super) async fn apply(
        self,
        tx: &mut Tx,
        held: &Held,
        now: Micros,
    ) -> Result<BuildState, StoreError> {
        let to = held.state.next(self.happening)?;
        let token = self.token.max(held.token);
        let kept = match self.published {
            Some((result, name)) => Some(keep(tx, &held.tenant, result, name, now).await?),
            None => None,
        };
        let key = self.published.map(|(result, _)| result.artifact_key.as_str());
        self.write(tx, held, to, key, kept.map(|kept| kept.size_bytes), now).await?;
        if let Some(other) = held.artifact_key.as_deref().filter(|other| Some(*other) != key) {
            remove_if_unused(tx, other).await?;
        }
        let attempt_us = held.attempt_us(now);
        let tally = Tally {
            compute_us: attempt_us,
            storage_bytes: kept.map_or(0, |kept| kept.added_bytes),
            ..Tally::moved(Some(held.state), Some(to))
        };
        tally.apply(tx, &held.tenant).await?;
        count_day(tx, &held.tenant, to, now).await?;
        held.record(tx, to, token, self.actor, now).await?;
        Ok(to)
    }

    async fn write(
        &self,
        tx: &mut Tx,
        held: &Held,
        to: BuildState,
        artifact_key: Option<&str>,
        artifact_bytes: Option<i64>,
        now: Micros,
    ) -> Result<(), StoreError> {
        let query = sql("UPDATE build SET state = $4, ended_at = $5, updated_at = $5, \
             lease_token = $7, lease_owner = NULL, lease_expires_at = NULL, \
             attempt_started_at = NULL, sealed_credentials = NULL, wall_us = wall_us + $8, \
             progress_percent = $9, failure = $10, result = $11, artifact_key = $12, \
             artifact_bytes = $13, event_seq = event_seq + 1 \
             WHERE tenant_id = $1 AND id = $2 AND state = $3 AND lease_token = $6");
        let is_completed = to == BuildState::Completed;
        let percent = if is_completed { 100 } else { held.progress_percent };
        let failure = self.failure.map(to_json).transpose()?;
        let result = self.published.map(|(result, _)| to_json(result)).transpose()?;
        let query = held
            .key(query)
            .text(to.as_str())
            .at(now)
            .int(held.token)
            .int(self.token.max(held.token))
            .int(held.attempt_us(now))
            .int(i64::from(percent))
            .maybe_text(failure.as_deref())
            .maybe_text(result.as_deref())
            .maybe_text(artifact_key)
            .int(artifact_bytes);
        was_held(tx.execute(query).await?)
    }
}

impl Requeue<'_> {
    /// Puts the build back: log, row, counters and event.
    pub(super) async fn apply(
        self,
        tx: &mut Tx,
        held: &Held,
        now: Micros,
    ) -> Result<(), StoreError> {
        let to = held.state.next(Happening::Released)?;
        make_room_in_log(tx, held, self.line(held, now).as_slice()).await?;
        let query = sql("UPDATE build SET state = $4, run_at = $5, updated_at = $6, \
             lease_token = $8, lease_owner = NULL, lease_expires_at = NULL, \
             attempt_started_at = NULL, wall_us = wall_us + $9, progress_percent = 0, \
             step = '', attempt = $10, attempts = $11, artifact_key = NULL, \
             live_usage = NULL, event_seq = event_seq + 1 \
             WHERE tenant_id = $1 AND id = $2 AND state = $3 AND lease_token = $7");
        let attempt = match self.why {
            Some(_) => held.attempt,
            None => held.attempt.saturating_sub(1),
        };
        let query = held
            .key(query)
            .text(to.as_str())
            .at(self.run_at)
            .at(now)
            .int(held.token)
            .int(self.token)
            .int(held.attempt_us(now))
            .int(i64::from(attempt))
            .text(&self.attempts(held, now)?);
        was_held(tx.execute(query).await?)?;
        if let Some(key) = &held.artifact_key {
            remove_if_unused(tx, key).await?;
        }
        let virtual_time = arrears(tx, &held.tenant, &held.id, now).await?;
        let tally = Tally {
            compute_us: held.attempt_us(now),
            virtual_time,
            ..Tally::moved(Some(held.state), Some(to))
        };
        tally.apply(tx, &held.tenant).await?;
        held.record(tx, to, self.token, self.actor, now).await
    }

    /// What the log says of a try that failed: which it was, why, and when the next one begins.
    fn line(&self, held: &Held, now: Micros) -> Option<LogLine> {
        let (Failure { cause, .. }, tries_max) = self.why?;
        let secs = (self.run_at.0.saturating_sub(now.0)).max(0) / Micros::SECOND;
        let next = match secs {
            0 => "as soon as a worker is free".to_owned(),
            secs => format!("in {secs} s, if a worker is free then"),
        };
        let try_of = format!("try {} of at most {tries_max}", held.attempt);
        let message = format!("{try_of} has failed, the next one begins {next}: {cause}");
        Some(own_line("warn", message, now))
    }

    /// The build's list of tries, with this one if it counts.
    fn attempts(&self, held: &Held, now: Micros) -> Result<String, StoreError> {
        let Some((failure, _)) = self.why else { return Ok(held.attempts.clone()) };
        let unread = |error| StoreError::Corrupt(format!("attempts cannot be read: {error}"));
        // What another version says of its tries stays as it is.
        let mut attempts: Vec<serde_json::Value> =
            serde_json::from_str(&held.attempts).map_err(unread)?;
        let attempt = Attempt {
            attempt: held.attempt,
            started_at: held.attempt_started_at.unwrap_or(now),
            ended_at: held.attempt_end(now),
            failure: failure.clone(),
        };
        attempts.push(serde_json::to_value(attempt).map_err(unread)?);
        to_json(&attempts)
    }
}

impl Rows {
    pub(crate) async fn finish(
        &self,
        lease: &Lease,
        artifact: Option<&ArtifactName>,
        outcome: &Outcome,
        now: Micros,
    ) -> Result<Option<BuildState>, StoreError> {
        self.change(|| async {
            let mut tx = self.engine.begin().await?;
            let Some(held) = Held::by_lease(&mut tx, lease).await? else { return Ok(None) };
            let ending = |happening| Ending::by(held.worker(), happening);
            let no_room;
            let ending = match outcome {
                // Who was told that the build will be cancelled must never see it complete.
                Outcome::Completed(_) | Outcome::Retry { .. } if held.is_cancel_requested => {
                    ending(Happening::Cancelled)
                }
                Outcome::Cancelled => ending(Happening::Cancelled),
                Outcome::Completed(result) => match no_room_for(&mut tx, &held, result).await? {
                    None => {
                        let published = Some((&**result, artifact));
                        Ending { published, ..ending(Happening::Published) }
                    }
                    Some(failure) => {
                        no_room = failure;
                        Ending { failure: Some(&no_room), ..ending(Happening::Failed) }
                    }
                },
                Outcome::Failed(failure) => {
                    Ending { failure: Some(failure), ..ending(Happening::Failed) }
                }
                Outcome::TimedOut(failure) => {
                    Ending { failure: Some(failure), ..ending(Happening::TimedOut) }
                }
                Outcome::Retry { failure, run_at } => {
                    let why = match failure {
                        Some(failure) => Some((failure, tries_max(&mut tx, &held).await?)),
                        None => None,
                    };
                    let (token, actor) = (held.token, held.worker());
                    let requeue = Requeue { why, run_at: *run_at, token, actor };
                    requeue.apply(&mut tx, &held, now).await?;
                    tx.commit().await?;
                    return Ok(Some(BuildState::Queued));
                }
            };
            if ending.happening == Happening::Cancelled {
                held.tell_cancel(&mut tx, now).await?;
            }
            let state = ending.apply(&mut tx, &held, now).await?;
            tx.commit().await?;
            Ok(Some(state))
        })
        .await
    }

    pub(crate) async fn cancel_by(
        &self,
        author: &Author,
        tenant: &TenantId,
        id: &BuildId,
        reason: &str,
        now: Micros,
    ) -> Result<Option<Cancel>, StoreError> {
        self.change(|| async {
            let mut tx = self.engine.begin().await?;
            // Whoever wants to be rid of a build need not be able to read all of it.
            let mut gaps = Gaps::default();
            let held = Held::hold_as_it_is(&mut tx, tenant, id, &mut gaps).await?;
            let Some(held) = held else { return Ok(None) };
            if held.state.is_terminal() {
                return Ok(Some(Cancel::Ended(held.state)));
            }
            let mut entries = Vec::new();
            if !held.is_cancel_requested {
                let action = Action::BuildCancel;
                entries.push(AuditEntry::done(Some(tenant), author, action, id.as_str(), now));
                let query = sql("UPDATE build SET cancel_requested_at = $4, cancel_reason = $5, \
                     cancelled_by = $6, updated_at = $4 \
                     WHERE tenant_id = $1 AND id = $2 AND state = $3");
                let query = held.key(query).at(now).text(reason).text(&author.subject);
                was_held(tx.execute(query).await?)?;
            }
            let done = match held.state.is_running() {
                true => Cancel::Requested,
                false => {
                    // Nobody works on it who could say so.
                    if gaps.none_in(()).is_ok() {
                        let line = cancelled(&author.subject, "while it waited", reason, now);
                        add_last_words(&mut tx, &held, line).await?;
                    }
                    Ending::by("tenant", Happening::Cancelled).apply(&mut tx, &held, now).await?;
                    Cancel::Done
                }
            };
            append(&mut tx, &entries).await?;
            tx.commit().await?;
            Ok(Some(done))
        })
        .await
    }

    pub(crate) async fn delete_by(
        &self,
        author: &Author,
        tenant: &TenantId,
        id: &BuildId,
        now: Micros,
    ) -> Result<Option<Delete>, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            let held = Held::hold_as_it_is(&mut tx, tenant, id, &mut Gaps::default()).await?;
            let Some(held) = held else { return Ok(None) };
            if !held.state.is_terminal() {
                return Ok(Some(Delete::Running(held.state)));
            }
            let freed_bytes = drop_claim(&mut tx, &held).await?;
            for statement in [
                "DELETE FROM build_log WHERE tenant_id = $1 AND build_id = $2",
                "DELETE FROM build_event WHERE tenant_id = $1 AND build_id = $2",
                "DELETE FROM build WHERE tenant_id = $1 AND id = $2",
            ] {
                tx.execute(sql(statement).text(tenant.as_str()).text(id.as_str())).await?;
            }
            let tally =
                Tally { storage_bytes: -freed_bytes, ..Tally::moved(Some(held.state), None) };
            tally.apply(&mut tx, tenant).await?;
            // The day's quota stays used.
            let query = sql("UPDATE tenant_day SET deleted = deleted + 1 \
                 WHERE tenant_id = $1 AND day = $2");
            tx.execute(query.text(tenant.as_str()).at(held.created_at.day())).await?;
            let action = Action::BuildDelete;
            let entry = AuditEntry::done(Some(tenant), author, action, id.as_str(), now);
            append(&mut tx, &[entry]).await?;
            tx.commit().await?;
            Ok(Some(Delete::Done))
        })
        .await
    }
}

impl Held {
    /// Says in the log of a running build that it ends as it was cancelled: in the transaction of its
    /// end, whoever makes it, so that a worker that died, or was done already, leaves nobody asking.
    pub(super) async fn tell_cancel(&self, tx: &mut Tx, now: Micros) -> Result<(), StoreError> {
        let by = self.cancelled_by.as_deref().unwrap_or_default();
        let reason = self.cancel_reason.as_deref().unwrap_or_default();
        add_last_words(tx, self, cancelled(by, "while it ran", reason, now)).await
    }
}

/// What the log of a build says last that was cancelled.
fn cancelled(by: &str, when: &str, reason: &str, now: Micros) -> LogLine {
    let by = if by.is_empty() { String::new() } else { format!(" by {by}") };
    let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    own_line("warn", format!("cancelled{by} {when}{why}"), now)
}

/// How often a build is tried at the most when its tries fail.
async fn tries_max(tx: &mut Tx, held: &Held) -> Result<u32, StoreError> {
    let query = sql("SELECT request FROM build WHERE tenant_id = $1 AND id = $2 AND state = $3");
    let request: BuildRequest = tx.one(held.key(query)).await?.json("request")?;
    Ok(request.retry.max_retries.saturating_add(1))
}

/// Why a tenant's storage cannot take an artifact; none if it can. Builds that were accepted
/// while there was room end at the same time: whoever comes last finds none.
///
/// The artifact's row is held before the tenant's, as everywhere.
async fn no_room_for(
    tx: &mut Tx,
    held: &Held,
    result: &BuildResult,
) -> Result<Option<Failure>, StoreError> {
    let key = result.artifact_key.as_str();
    let query = sql("SELECT size_bytes FROM artifact WHERE artifact_key = $1 FOR UPDATE");
    tx.optional(query.text(key)).await?;
    let query =
        sql("SELECT builds FROM tenant_artifact WHERE tenant_id = $1 AND artifact_key = $2");
    if tx.optional(query.text(held.tenant.as_str()).text(key)).await?.is_some() {
        return Ok(None);
    }
    let query = sql("SELECT limits FROM build WHERE tenant_id = $1 AND id = $2 AND state = $3");
    let limits: TenantLimits = tx.one(held.key(query)).await?.json("limits")?;
    let query = sql("SELECT storage_bytes FROM tenant WHERE id = $1 FOR NO KEY UPDATE");
    let stored = tx.one(query.text(held.tenant.as_str())).await?.count("storage_bytes")?;
    let bytes = result.artifact_bytes;
    if stored.saturating_add(bytes) <= limits.storage_bytes {
        return Ok(None);
    }
    Ok(Some(Failure {
        code: FailureCode::QuotaExceeded,
        step: "publish".into(),
        cause: format!(
            "the artifact has {bytes} bytes; {stored} of the {} bytes of storage are in use",
            limits.storage_bytes
        ),
        blame: "yours".into(),
        remedy: "delete builds whose artifacts are no longer needed, or use a tier with more \
                 storage"
            .into(),
    }))
}

/// Counts a build that ended in its tenant's day.
async fn count_day(
    tx: &mut Tx,
    tenant: &TenantId,
    to: BuildState,
    now: Micros,
) -> Result<(), StoreError> {
    let completed = i64::from(to == BuildState::Completed);
    let failed = i64::from(matches!(to, BuildState::Failed | BuildState::Timeout));
    if completed + failed == 0 {
        return Ok(());
    }
    let query =
        sql("INSERT INTO tenant_day (tenant_id, day, created, deleted, completed, failed) \
         VALUES ($1, $2, 0, 0, $3, $4) ON CONFLICT (tenant_id, day) DO UPDATE SET \
         completed = tenant_day.completed + excluded.completed, \
         failed = tenant_day.failed + excluded.failed");
    tx.execute(query.text(tenant.as_str()).at(now.day()).int(completed).int(failed)).await?;
    Ok(())
}
