//! Builds, logs and figures, as they are asked for.

use super::{Rows, counter, passed_over, rows, told_apart};
use crate::build::record::{Build, BuildId, BuildRequest, LogLine, Micros, Stats, Usage};
use crate::build::state::BuildState;
use crate::store::engine::{Row, Tx, either, signed, sql};
use crate::store::{Depth, Filter, Page, Revision, Seen, StoreError};
use crate::tenant::{TenantId, Tier};

/// Behind every id.
const LAST_ID: &str = "build_ZZZZZZZZZZZZZZZZZZZZZZZZZZ";
/// What the builds of a page may hold together, however many are asked for: an answer is made
/// in memory, from a multiple of it. One build always comes.
const PAGE_BYTES_MAX: u64 = 4 << 20;
/// What a build does of which not all can be read.
const UNREAD_STEP: &str = "What is stored of this build cannot be read";

/// What makes a [`Build`], of the table `build`.
macro_rules! build_columns {
    () => {
        "tenant_id, id, customer, tier, limits, request, state, progress_percent, step, \
         cancel_requested_at, cancel_reason, attempt, attempts, created_at, run_at, started_at, \
         updated_at, ended_at, artifact_key, result, failure, live_usage, traceparent, \
         organization, rights"
    };
}
pub(super) use build_columns;

const BUILD: &str =
    concat!("SELECT ", build_columns!(), " FROM build WHERE tenant_id = $1 AND id = $2");

/// A build and the last messages of its log as a JSON list, made by that function.
macro_rules! build_with_log {
    ($messages:expr) => {
        concat!(
            "SELECT ",
            build_columns!(),
            ", revision, CAST((SELECT ",
            $messages,
            " FROM (SELECT line, message FROM build_log WHERE tenant_id = $1 AND build_id = $2 \
             ORDER BY line DESC LIMIT $3) AS tail) AS TEXT) AS log_tail \
             FROM build WHERE tenant_id = $1 AND id = $2"
        )
    };
}

/// What of a row cannot be read, as a newer version or a damaged database leaves it.
#[derive(Default)]
pub(super) struct Gaps {
    first: Option<StoreError>,
}

impl Gaps {
    /// What was read, if all of it was.
    pub(super) fn none_in<T>(self, read: T) -> Result<T, StoreError> {
        self.first.map_or(Ok(read), Err)
    }

    /// What was read, or something else in its place.
    pub(super) fn or<T>(&mut self, read: Result<T, StoreError>, other: impl FnOnce() -> T) -> T {
        read.unwrap_or_else(|error| {
            self.first.get_or_insert(error);
            other()
        })
    }

    /// The same for what need not be there.
    fn or_none<T>(&mut self, read: Result<Option<T>, StoreError>) -> Option<T> {
        self.or(read, || None)
    }
}

/// All of a row with the columns of [`build_columns`]: for whoever works on the build.
fn build(row: &Row) -> Result<Build, StoreError> {
    let mut gaps = Gaps::default();
    let build = read(row, &mut gaps)?;
    gaps.none_in(build)
}

/// What can be read of such a row, for whoever looks: one build that cannot be read must not hide
/// the others.
pub(super) fn shown(row: &Row) -> Result<Build, StoreError> {
    let mut gaps = Gaps::default();
    let mut build = read(row, &mut gaps)?;
    let Some(problem) = gaps.first else { return Ok(build) };
    let (tenant, id) = (&build.tenant, &build.id);
    tracing::warn!(%tenant, build = %id, %problem, "not all of a build that is shown can be read");
    build.is_whole = false;
    // Who failed says why.
    if build.state != BuildState::Failed {
        build.step = UNREAD_STEP.to_owned();
    }
    Ok(build)
}

fn read(row: &Row, gaps: &mut Gaps) -> Result<Build, StoreError> {
    let reason = row.maybe_text("cancel_reason")?;
    let cancel_reason = row.maybe_int("cancel_requested_at")?.map(|_| reason.unwrap_or_default());
    // Every end has a word that all versions know (`build`'s checks in the schema): what has another
    // one has not ended.
    let state = gaps.or(row.parsed("state"), || BuildState::Queued);
    let is_completed = state == BuildState::Completed;
    // Before its end the build only wants it.
    let has_artifact = is_completed && row.maybe_text("artifact_key")?.is_some();
    let result = match is_completed {
        true => gaps.or_none(row.maybe_json("result")),
        false => None,
    };
    // A node that is older does not clear it.
    let usage = match matches!(state, BuildState::Queued | BuildState::Completed) {
        true => None,
        false => gaps.or_none(row.maybe_json("live_usage")),
    };
    let tier = gaps.or(row.parsed("tier"), || Tier::Free);
    Ok(Build {
        id: row.parsed("id")?,
        tenant: row.parsed("tenant_id")?,
        customer: row.maybe_text("customer")?,
        organization: row.maybe_text("organization")?,
        rights: gaps.or_none(row.maybe_json("rights")).unwrap_or_default(),
        tier,
        limits: gaps.or(row.json("limits"), || tier.limits()),
        request: gaps.or(row.json("request"), BuildRequest::default),
        state,
        progress_percent: gaps.or(row.small("progress_percent"), || 0),
        step: row.text("step")?,
        cancel_reason,
        attempt: gaps.or(row.small("attempt"), || 0),
        attempts: gaps.or(row.json("attempts"), Vec::new),
        created_at: row.at("created_at")?,
        run_at: row.at("run_at")?,
        started_at: row.maybe_at("started_at")?,
        updated_at: row.at("updated_at")?,
        ended_at: row.maybe_at("ended_at")?,
        result,
        has_artifact,
        failure: gaps.or_none(row.maybe_json("failure")),
        usage,
        traceparent: row.maybe_text("traceparent")?,
        is_whole: true,
    })
}

/// A build that the transaction knows to be there.
pub(super) async fn read_build(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &BuildId,
) -> Result<Build, StoreError> {
    build(&tx.one(sql(BUILD).text(tenant.as_str()).text(id.as_str())).await?)
}

impl Rows {
    pub(crate) async fn get(
        &self,
        tenant: &TenantId,
        id: &BuildId,
    ) -> Result<Option<Build>, StoreError> {
        let query = sql(BUILD).text(tenant.as_str()).text(id.as_str());
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        row.as_ref().map(shown).transpose()
    }

    pub(crate) async fn state(
        &self,
        tenant: &TenantId,
        id: &BuildId,
    ) -> Result<Option<BuildState>, StoreError> {
        let query = sql("SELECT state FROM build WHERE tenant_id = $1 AND id = $2");
        let query = query.text(tenant.as_str()).text(id.as_str());
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        row.map(|row| row.parsed("state")).transpose()
    }

    /// In one statement: a row costs more than what is in it.
    pub(crate) async fn get_with_log(
        &self,
        tenant: &TenantId,
        id: &BuildId,
        lines: u32,
    ) -> Result<Option<Seen>, StoreError> {
        let query = either(
            build_with_log!("json_group_array(message ORDER BY line)"),
            build_with_log!("json_agg(message ORDER BY line)"),
        );
        let query = query.text(tenant.as_str()).text(id.as_str()).int(rows(lines, 0));
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        let read = |row: &Row| {
            Ok(Seen {
                build: shown(row)?,
                log: row.maybe_json("log_tail")?.unwrap_or_default(),
                revision: Revision(row.int("revision")?),
            })
        };
        row.as_ref().map(read).transpose()
    }

    /// What runs has none: its changes are not counted.
    pub(crate) async fn revision_of_ended(
        &self,
        tenant: &TenantId,
        id: &BuildId,
    ) -> Result<Option<Revision>, StoreError> {
        let query = sql("SELECT revision FROM build \
             WHERE tenant_id = $1 AND id = $2 AND ended_at IS NOT NULL");
        let query = query.text(tenant.as_str()).text(id.as_str());
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        row.map(|row| Ok(Revision(row.int("revision")?))).transpose()
    }

    pub(crate) async fn list(
        &self,
        tenant: &TenantId,
        filter: &Filter,
    ) -> Result<Page, StoreError> {
        self.again(|| self.list_once(tenant, filter)).await
    }

    /// One view of everything: a build that changes its state meanwhile is listed once.
    async fn list_once(&self, tenant: &TenantId, filter: &Filter) -> Result<Page, StoreError> {
        let mut tx = self.engine.snapshot().await?;
        let mut states = filter.states.clone();
        states.sort_unstable();
        states.dedup();
        let total = total(&mut tx, tenant, &states).await?;
        let before = filter.before.as_ref().map_or(LAST_ID, BuildId::as_str);
        let mut before = before.to_owned();
        if filter.offset > 0 {
            match skip(&mut tx, tenant, &states, &before, filter.offset).await? {
                Some(last) => before = last,
                None => return Ok(Page { builds: Vec::new(), total, has_more: false }),
            }
        }
        let page = page(&mut tx, tenant, &states, &before, filter.limit).await;
        let (builds, has_more) = page?;
        tx.rollback().await?;
        Ok(Page { builds, total, has_more })
    }

    pub(crate) async fn log(
        &self,
        tenant: &TenantId,
        id: &BuildId,
        offset: u64,
        limit: u32,
    ) -> Result<Vec<LogLine>, StoreError> {
        let query = sql("SELECT line, said_at, level, component, message FROM build_log \
             WHERE tenant_id = $1 AND build_id = $2 AND line >= $3 ORDER BY line LIMIT $4");
        let query = query.text(tenant.as_str()).text(id.as_str()).count(offset).int(rows(limit, 0));
        let found = self.again(|| self.engine.all(query.clone())).await?;
        found.iter().map(log_line).collect()
    }

    pub(crate) async fn usage(&self, tenant: &TenantId, now: Micros) -> Result<Usage, StoreError> {
        let query = sql("SELECT t.queued, t.running, t.storage_bytes, t.compute_us, \
             COALESCE(d.created, 0) AS created, COALESCE(d.completed, 0) AS completed, \
             COALESCE(d.failed, 0) AS failed \
             FROM tenant t LEFT JOIN tenant_day d ON d.tenant_id = t.id AND d.day = $2 \
             WHERE t.id = $1");
        let query = query.text(tenant.as_str()).at(now.day());
        let Some(row) = self.again(|| self.engine.optional(query.clone())).await? else {
            return Ok(Usage::default());
        };
        Ok(Usage {
            running: row.count("running")?,
            queued: row.count("queued")?,
            created_today: row.count("created")?,
            completed_today: row.count("completed")?,
            failed_today: row.count("failed")?,
            storage_bytes: row.count("storage_bytes")?,
            compute_secs: row.count("compute_us")? / 1_000_000,
        })
    }

    /// Ids are in the order of time, so that those before it are of earlier.
    pub(crate) async fn first_since(
        &self,
        tenant: &TenantId,
        at: Micros,
    ) -> Result<Option<BuildId>, StoreError> {
        let query = sql("SELECT id FROM build WHERE tenant_id = $1 AND created_at >= $2 \
             ORDER BY created_at, id LIMIT 1");
        let query = query.text(tenant.as_str()).at(at);
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        row.map(|row| row.parsed("id")).transpose()
    }

    pub(crate) async fn stats(
        &self,
        tenant: &TenantId,
        from: Option<Micros>,
        to: Option<Micros>,
    ) -> Result<Stats, StoreError> {
        self.again(|| self.stats_once(tenant, from, to)).await
    }

    async fn stats_once(
        &self,
        tenant: &TenantId,
        from: Option<Micros>,
        to: Option<Micros>,
    ) -> Result<Stats, StoreError> {
        let (from, to) = (from.unwrap_or(Micros(i64::MIN)), to.unwrap_or(Micros(i64::MAX)));
        let mut tx = self.engine.snapshot().await?;
        let query = sql("SELECT COUNT(*) AS total, \
             CAST(COALESCE(SUM(CASE WHEN state = 'completed' THEN 1 ELSE 0 END), 0) AS BIGINT) \
             AS completed, \
             CAST(COALESCE(SUM(CASE WHEN state IN ('failed', 'timeout') THEN 1 ELSE 0 END), 0) \
             AS BIGINT) AS failed, \
             CAST(COALESCE(SUM(CASE WHEN state = 'completed' THEN wall_us ELSE 0 END), 0) \
             AS BIGINT) AS completed_us, \
             CAST(COALESCE(SUM(wall_us), 0) AS BIGINT) AS wall_us \
             FROM build WHERE tenant_id = $1 AND created_at >= $2 AND created_at < $3");
        let row = tx.one(query.text(tenant.as_str()).at(from).at(to)).await?;
        let kept = sql("SELECT CAST(COALESCE(SUM(size_bytes), 0) AS BIGINT) AS size_bytes \
             FROM artifact WHERE artifact_key IN (SELECT artifact_key FROM build \
             WHERE tenant_id = $1 AND created_at >= $2 AND created_at < $3 \
             AND state = 'completed' AND artifact_key IS NOT NULL)");
        let kept = tx.one(kept.text(tenant.as_str()).at(from).at(to)).await?;
        tx.rollback().await?;
        let completed = row.count("completed")?;
        Ok(Stats {
            total: row.count("total")?,
            completed,
            failed: row.count("failed")?,
            mean_ms: row.count("completed_us")? / completed.max(1) / 1000,
            storage_bytes: kept.count("size_bytes")?,
            compute_secs: row.count("wall_us")? / 1_000_000,
        })
    }

    pub(crate) async fn depth(&self) -> Result<Depth, StoreError> {
        let query = || {
            sql("SELECT CAST(COALESCE(SUM(queued), 0) AS BIGINT) AS queued, \
                 CAST(COALESCE(SUM(running), 0) AS BIGINT) AS running FROM tenant")
        };
        match self.again(|| self.engine.optional(query())).await? {
            Some(row) => Ok(Depth { queued: row.count("queued")?, running: row.count("running")? }),
            None => Ok(Depth::default()),
        }
    }
}

fn log_line(row: &Row) -> Result<LogLine, StoreError> {
    Ok(LogLine {
        offset: row.count("line")?,
        at: row.at("said_at")?,
        level: row.text("level")?,
        component: row.text("component")?,
        message: row.text("message")?,
    })
}

/// How many builds are in these states: ended ones and waiting ones as counted, running ones,
/// which are few, one by one.
async fn total(tx: &mut Tx, tenant: &TenantId, states: &[BuildState]) -> Result<u64, StoreError> {
    let query = sql("SELECT queued, running, completed, failed, cancelled, timed_out \
         FROM tenant WHERE id = $1");
    let Some(row) = tx.optional(query.text(tenant.as_str())).await? else { return Ok(0) };
    let counters = ["queued", "running", "completed", "failed", "cancelled", "timed_out"];
    if states.is_empty() {
        return counters.iter().map(|name| row.count(name)).sum();
    }
    let mut sum = 0;
    for state in states {
        sum += match state.is_running() {
            true => running(tx, tenant, *state).await?,
            false => row.count(counters[counter(*state)])?,
        };
    }
    Ok(sum)
}

async fn running(tx: &mut Tx, tenant: &TenantId, state: BuildState) -> Result<u64, StoreError> {
    let query = sql("SELECT COUNT(*) AS found FROM build WHERE tenant_id = $1 AND state = $2");
    tx.one(query.text(tenant.as_str()).text(state.as_str())).await?.count("found")
}

/// The statements that give some columns of a tenant's newest builds before an id: of any state,
/// and of one. No other bound: SQLite would choose the wrong index for it.
macro_rules! newest {
    ($columns:expr) => {
        (
            concat!(
                "SELECT ",
                $columns,
                " FROM build WHERE tenant_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3"
            ),
            concat!(
                "SELECT ",
                $columns,
                " FROM build WHERE tenant_id = $1 AND id < $2 AND state = $4 \
                 ORDER BY id DESC LIMIT $3"
            ),
        )
    };
}

/// The id of the `offset`th build before `before`; none if there are fewer.
async fn skip(
    tx: &mut Tx,
    tenant: &TenantId,
    states: &[BuildState],
    before: &str,
    offset: u64,
) -> Result<Option<String>, StoreError> {
    let mut ids = Vec::new();
    for state in wanted(states) {
        for row in newest(tx, newest!("id"), tenant, state, before, signed(offset)).await? {
            ids.push(row.text("id")?);
        }
    }
    ids.sort_unstable_by(|a, b| b.cmp(a));
    let last = usize::try_from(offset - 1).unwrap_or(usize::MAX);
    Ok(ids.into_iter().nth(last))
}

/// The newest builds before `before`, and whether there are more. How long they are is asked
/// first: what does not fit is never read.
async fn page(
    tx: &mut Tx,
    tenant: &TenantId,
    states: &[BuildState],
    before: &str,
    limit: u32,
) -> Result<(Vec<Build>, bool), StoreError> {
    let texts = newest!(
        "id, CAST(OCTET_LENGTH(request) + OCTET_LENGTH(attempts) \
         + COALESCE(OCTET_LENGTH(result), 0) + COALESCE(OCTET_LENGTH(failure), 0) AS BIGINT) \
         AS held_bytes"
    );
    let mut sizes = Vec::new();
    for state in wanted(states) {
        for row in newest(tx, texts, tenant, state, before, rows(limit, 1)).await? {
            sizes.push((row.text("id")?, state, row.count("held_bytes")?));
        }
    }
    sizes.sort_unstable_by(|(a, ..), (b, ..)| b.cmp(a));
    let limit_rows = usize::try_from(limit).unwrap_or(usize::MAX);
    let count = fitting(sizes.iter().map(|(.., bytes)| *bytes)).min(limit_rows);
    let mut builds = Vec::with_capacity(count);
    for state in wanted(states) {
        let those = sizes[..count].iter().filter(|(_, of, _)| *of == state).count();
        let limit = i64::try_from(those).unwrap_or(i64::MAX);
        for row in newest(tx, newest!(build_columns!()), tenant, state, before, limit).await? {
            match shown(&row) {
                Ok(build) => builds.push(build),
                Err(error) => {
                    let id = told_apart(&row, "id");
                    passed_over(error, &format!("build {id} of tenant {tenant}"))?;
                }
            }
        }
    }
    builds.sort_unstable_by(|a, b| b.id.cmp(&a.id));
    Ok((builds, sizes.len() > count))
}

/// How many of them, from the first, are a page; the first is one, however long it is.
fn fitting(sizes: impl Iterator<Item = u64>) -> usize {
    let mut sum = 0u64;
    let fits = |(place, bytes): &(usize, u64)| {
        sum = sum.saturating_add(*bytes);
        *place == 0 || sum <= PAGE_BYTES_MAX
    };
    sizes.enumerate().take_while(fits).count()
}

/// What to ask for: any state at once, or one after the other: an index gives each answer from
/// its start, so that rare states among many builds cost nothing.
fn wanted(states: &[BuildState]) -> Vec<Option<BuildState>> {
    match states {
        [] => vec![None],
        states => states.iter().copied().map(Some).collect(),
    }
}

async fn newest(
    tx: &mut Tx,
    (any, one): (&'static str, &'static str),
    tenant: &TenantId,
    state: Option<BuildState>,
    before: &str,
    limit: i64,
) -> Result<Vec<Row>, StoreError> {
    if limit == 0 {
        return Ok(Vec::new());
    }
    let query = |text| sql(text).text(tenant.as_str()).text(before).int(limit);
    tx.all(match state {
        None => query(any),
        Some(state) => query(one).text(state.as_str()),
    })
    .await
}
