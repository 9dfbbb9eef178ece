//! A build is accepted, or a quota says no: decided and counted in one transaction.

use super::audit::append;
use super::reading::{build_columns, read_build, shown};
use super::{Event, Rows, Tally, arrears, virtual_start};
use crate::build::record::Micros;
use crate::build::state::BuildState;
use crate::store::audit::{Action, AuditEntry, Author};
use crate::store::engine::{Tx, sql, to_json};
use crate::store::{Accepted, NewBuild, QuotaExceeded, StoreError};
use crate::tenant::{TenantId, TenantLimits, Tier};

/// Builds that may wait, beside ten times those that may run.
const QUEUED_MAX: u64 = 100;
const DAY_SECS: u64 = 86_400;

/// What a tenant has, held until the transaction ends.
struct Standing {
    queued: u64,
    storage_bytes: u64,
}

impl Rows {
    pub(crate) async fn create_by(
        &self,
        author: &Author,
        tenant: &TenantId,
        tier: Tier,
        tenant_limits: &TenantLimits,
        build: &NewBuild,
    ) -> Result<Accepted, StoreError> {
        let create = || self.create_once(author, tenant, tier, tenant_limits, build);
        let accepted = self.again(create).await?;
        if matches!(accepted, Accepted::Created(_)) {
            self.announcer.announce();
        }
        Ok(accepted)
    }

    async fn create_once(
        &self,
        author: &Author,
        tenant: &TenantId,
        tier: Tier,
        tenant_limits: &TenantLimits,
        build: &NewBuild,
    ) -> Result<Accepted, StoreError> {
        let mut tx = self.engine.begin().await?;
        // From here on the tenant's creates come one after another.
        let standing = enlist(&mut tx, tenant, tier, tenant_limits).await?;
        if let Some(accepted) = by_key(&mut tx, tenant, build).await? {
            tx.rollback().await?;
            return Ok(accepted);
        }
        let created_at = build.created_at;
        let used_up = used_up(&mut tx, tenant, &standing, tenant_limits, created_at).await?;
        if let Some(quota) = used_up {
            tx.rollback().await?;
            return Ok(Accepted::Quota(quota));
        }
        let virtual_time = arrears(&mut tx, tenant, &build.id, created_at).await?;
        insert(&mut tx, tenant, tier, build).await?;
        let event = Event {
            tenant,
            build: &build.id,
            seq: 1,
            from: "",
            to: BuildState::Queued,
            token: 0,
            actor: "tenant",
        };
        event.add(&mut tx, created_at).await?;
        let tally = Tally { virtual_time, ..Tally::moved(None, Some(BuildState::Queued)) };
        tally.apply(&mut tx, tenant).await?;
        let created = read_build(&mut tx, tenant, &build.id).await?;
        let (action, id) = (Action::BuildCreate, build.id.as_str());
        let entry = AuditEntry::done(Some(tenant), author, action, id, created_at);
        append(&mut tx, &[entry]).await?;
        tx.commit().await?;
        Ok(Accepted::Created(created))
    }
}

/// Puts the tenant's row up to date, and holds it.
async fn enlist(
    tx: &mut Tx,
    tenant: &TenantId,
    tier: Tier,
    limits: &TenantLimits,
) -> Result<Standing, StoreError> {
    let query = sql("INSERT INTO tenant (id, tier, is_set_up, limits, weight, running_max, \
         virtual_time, queued, running, completed, failed, cancelled, timed_out, \
         storage_bytes, compute_us) \
         VALUES ($1, $2, 0, NULL, $3, $4, $5, 0, 0, 0, 0, 0, 0, 0, 0) \
         ON CONFLICT (id) DO UPDATE SET \
         tier = CASE WHEN tenant.is_set_up = 1 THEN tenant.tier ELSE excluded.tier END, \
         weight = excluded.weight, running_max = excluded.running_max \
         RETURNING queued, storage_bytes");
    let query = query
        .text(tenant.as_str())
        .text(tier.as_str())
        .int(i64::from(tier.weight()))
        .int(i64::from(limits.concurrent_builds))
        .int(virtual_start(tier.weight()));
    let row = tx.one(query).await?;
    Ok(Standing { queued: row.count("queued")?, storage_bytes: row.count("storage_bytes")? })
}

/// What an earlier build with the same key means for this one.
async fn by_key(
    tx: &mut Tx,
    tenant: &TenantId,
    build: &NewBuild,
) -> Result<Option<Accepted>, StoreError> {
    let Some(key) = &build.idempotency_key else { return Ok(None) };
    let query = sql(concat!(
        "SELECT request_hash, created_by, ",
        build_columns!(),
        " FROM build WHERE tenant_id = $1 AND idempotency_key = $2"
    ));
    let Some(row) = tx.optional(query.text(tenant.as_str()).text(key)).await? else {
        return Ok(None);
    };
    match row.text("request_hash")? == build.request_hash {
        true => {
            let build = shown(&row)?;
            Ok(Some(Accepted::Known { build, created_by: row.maybe_text("created_by")? }))
        }
        false => Ok(Some(Accepted::KeyReused)),
    }
}

/// Counts the build, and says which quota forbids it; the caller undoes the counting then.
async fn used_up(
    tx: &mut Tx,
    tenant: &TenantId,
    standing: &Standing,
    limits: &TenantLimits,
    now: Micros,
) -> Result<Option<QuotaExceeded>, StoreError> {
    let query =
        sql("INSERT INTO tenant_day (tenant_id, day, created, deleted, completed, failed) \
         VALUES ($1, $2, 1, 0, 0, 0) \
         ON CONFLICT (tenant_id, day) DO UPDATE SET created = tenant_day.created + 1 \
         RETURNING created");
    let row = tx.one(query.text(tenant.as_str()).at(now.day())).await?;
    let before = row.count("created")?.saturating_sub(1);
    let tomorrow = now.day().plus_secs(DAY_SECS);
    let queued_max = 10 * u64::from(limits.concurrent_builds) + QUEUED_MAX;
    let quotas = [
        ("daily_builds", before, u64::from(limits.daily_builds), Some(tomorrow)),
        ("storage", standing.storage_bytes, limits.storage_bytes, None),
        ("queued_builds", standing.queued, queued_max, None),
    ];
    let mut quotas = quotas.into_iter().map(|(quota_type, current, limit, reset_at)| {
        QuotaExceeded { quota_type, current, limit, reset_at }
    });
    Ok(quotas.find(|quota| quota.current >= quota.limit))
}

async fn insert(
    tx: &mut Tx,
    tenant: &TenantId,
    tier: Tier,
    build: &NewBuild,
) -> Result<(), StoreError> {
    let query = sql("INSERT INTO build (tenant_id, id, state, created_at, run_at, updated_at, \
         attempt, wall_us, progress_percent, lease_token, event_seq, log_lines, log_bytes, \
         log_is_cut, step, tier, customer, traceparent, idempotency_key, request_hash, \
         created_by, sealed_credentials, limits, request, organization, rights, attempts) \
         VALUES ($1, $2, 'queued', $3, $3, $3, 0, 0, 0, 0, 1, 0, 0, 0, '', $4, $5, $6, $7, $8, \
         $9, $10, $11, $12, $13, $14, '[]')");
    let rights: Vec<&str> = build.rights.iter().map(|right| right.as_str()).collect();
    let query = query
        .text(tenant.as_str())
        .text(build.id.as_str())
        .at(build.created_at)
        .text(tier.as_str())
        .maybe_text(build.customer.as_deref())
        .maybe_text(build.traceparent.as_deref())
        .maybe_text(build.idempotency_key.as_deref())
        .text(&build.request_hash)
        .maybe_text(build.created_by.as_deref())
        .bytes(build.sealed_credentials.clone())
        .text(&to_json(&build.limits)?)
        .text(&to_json(&build.request)?)
        .maybe_text(build.organization.as_deref())
        .text(&to_json(&rights)?);
    tx.execute(query).await?;
    Ok(())
}
