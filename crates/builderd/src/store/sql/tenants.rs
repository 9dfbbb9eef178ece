//! Tenants and tokens as the operator set them up.

use super::audit::append;
use super::{Rows, listed, rows, virtual_start};
use crate::build::record::Micros;
use crate::store::audit::{Action, AuditEntry, Author};
use crate::store::engine::{Query, Row, sql, to_json};
use crate::store::{Listed, StoreError, TenantLoad, TenantRow, TokenRow, Unread};
use crate::tenant::{TenantId, Tier};

impl Rows {
    /// Makes one change and says in the log who made it, if it changed anything; how many rows.
    async fn change_audited(&self, query: &Query, entry: &AuditEntry) -> Result<u64, StoreError> {
        self.change(|| async {
            let mut tx = self.engine.begin().await?;
            let touched = tx.execute(query.clone()).await?;
            if touched > 0 {
                append(&mut tx, std::slice::from_ref(entry)).await?;
            }
            tx.commit().await?;
            Ok(touched)
        })
        .await
    }

    pub(crate) async fn put_tenant_by(
        &self,
        author: &Author,
        tenant: &TenantRow,
        now: Micros,
    ) -> Result<(), StoreError> {
        let own = tenant.limits.as_ref();
        let running_max = own.unwrap_or(&tenant.tier.limits()).concurrent_builds;
        let limits = own.map(to_json).transpose()?;
        // Without limits of its own, what settings say of the tier is known to the next create.
        let query = sql("INSERT INTO tenant (id, tier, is_set_up, limits, weight, running_max, \
             virtual_time, queued, running, completed, failed, cancelled, timed_out, \
             storage_bytes, compute_us) \
             VALUES ($1, $2, 1, $3, $4, $5, $6, 0, 0, 0, 0, 0, 0, 0, 0) \
             ON CONFLICT (id) DO UPDATE SET tier = excluded.tier, is_set_up = 1, \
             limits = excluded.limits, weight = excluded.weight, \
             running_max = CASE WHEN excluded.limits IS NOT NULL OR tenant.tier <> excluded.tier \
             THEN excluded.running_max ELSE tenant.running_max END");
        let query = query
            .text(tenant.id.as_str())
            .text(tenant.tier.as_str())
            .maybe_text(limits.as_deref())
            .int(i64::from(tenant.tier.weight()))
            .int(i64::from(running_max))
            .int(virtual_start(tenant.tier.weight()));
        let (id, action) = (&tenant.id, Action::TenantSet);
        let entry = AuditEntry::done(Some(id), author, action, id.as_str(), now);
        self.change_audited(&query, &entry).await?;
        Ok(())
    }

    pub(crate) async fn tenant(&self, id: &TenantId) -> Result<Option<TenantRow>, StoreError> {
        let query = sql("SELECT id, tier, limits FROM tenant WHERE id = $1 AND is_set_up = 1");
        let query = query.text(id.as_str());
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        row.as_ref().map(tenant_row).transpose()
    }

    pub(crate) async fn tenants(&self) -> Result<Listed<TenantRow>, StoreError> {
        let query = || sql("SELECT id, tier, limits FROM tenant ORDER BY id");
        listed(&self.again(|| self.engine.all(query())).await?, tenant_row)
    }

    pub(crate) async fn busiest(
        &self,
        limit: u32,
        now: Micros,
    ) -> Result<Vec<TenantLoad>, StoreError> {
        let query = sql("SELECT t.id, t.tier, t.limits, t.running, t.storage_bytes, \
             COALESCE(d.created, 0) AS created \
             FROM tenant t LEFT JOIN tenant_day d ON d.tenant_id = t.id AND d.day = $1 \
             ORDER BY t.running DESC, t.storage_bytes DESC, t.id LIMIT $2");
        let query = query.at(now.day()).int(rows(limit, 0));
        let found = self.again(|| self.engine.all(query.clone())).await?;
        let load = |row: &Row| {
            Ok(TenantLoad {
                tenant: tenant_row(row)?,
                running: row.count("running")?,
                created_today: row.count("created")?,
                storage_bytes: row.count("storage_bytes")?,
            })
        };
        let Listed { rows, unread } = listed(&found, load)?;
        for Unread { id, problem } in unread {
            tracing::warn!(tenant = id, problem, "what is set for a tenant cannot be read");
        }
        Ok(rows)
    }

    pub(crate) async fn add_token_by(
        &self,
        author: &Author,
        token: &TokenRow,
    ) -> Result<(), StoreError> {
        let query = sql("INSERT INTO api_token (id, secret_hash, tenant_id, customer, rights, \
             note, created_at, expires_at, revoked_at, organization) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)");
        let query = query
            .text(&token.id)
            .text(&token.secret_hash)
            .text(token.tenant.as_str())
            .maybe_text(token.customer.as_deref())
            .text(&to_json(&token.rights)?)
            .text(&token.note)
            .at(token.created_at)
            .at(token.expires_at)
            .at(token.revoked_at)
            .maybe_text(token.organization.as_deref());
        let (tenant, action) = (Some(&token.tenant), Action::TokenCreate);
        let entry = AuditEntry::done(tenant, author, action, &token.id, token.created_at);
        self.change_audited(&query, &entry).await?;
        Ok(())
    }

    pub(crate) async fn token_by_hash(
        &self,
        secret_hash: &str,
    ) -> Result<Option<(TokenRow, Option<Tier>)>, StoreError> {
        let query = sql("SELECT k.id, k.secret_hash, k.tenant_id, k.customer, k.rights, k.note, \
             k.created_at, k.expires_at, k.revoked_at, k.organization, t.tier FROM api_token k \
             LEFT JOIN tenant t ON t.id = k.tenant_id AND t.is_set_up = 1 \
             WHERE k.secret_hash = $1");
        let query = query.text(secret_hash);
        let Some(row) = self.again(|| self.engine.optional(query.clone())).await? else {
            return Ok(None);
        };
        let tier = row.maybe_text("tier")?.map(|_| row.parsed("tier")).transpose()?;
        Ok(Some((token_row(&row)?, tier)))
    }

    pub(crate) async fn tokens(&self) -> Result<Listed<TokenRow>, StoreError> {
        let query = || {
            sql("SELECT id, secret_hash, tenant_id, customer, rights, note, created_at, \
                 expires_at, revoked_at, organization FROM api_token ORDER BY created_at, id")
        };
        listed(&self.again(|| self.engine.all(query())).await?, token_row)
    }

    pub(crate) async fn revoke_token_by(
        &self,
        author: &Author,
        id: &str,
        now: Micros,
    ) -> Result<bool, StoreError> {
        let query = sql("SELECT tenant_id FROM api_token WHERE id = $1").text(id);
        let Some(row) = self.again(|| self.engine.optional(query.clone())).await? else {
            return Ok(false);
        };
        // A token stays its tenant's. Revoked once, it stays that, and nobody does it again.
        let tenant: TenantId = row.parsed("tenant_id")?;
        let query = sql("UPDATE api_token SET revoked_at = $2 \
             WHERE id = $1 AND revoked_at IS NULL");
        let entry = AuditEntry::done(Some(&tenant), author, Action::TokenRevoke, id, now);
        self.change_audited(&query.text(id).at(now), &entry).await?;
        Ok(true)
    }
}

fn tenant_row(row: &Row) -> Result<TenantRow, StoreError> {
    Ok(TenantRow {
        id: row.parsed("id")?,
        tier: row.parsed("tier")?,
        limits: row.maybe_json("limits")?,
    })
}

fn token_row(row: &Row) -> Result<TokenRow, StoreError> {
    Ok(TokenRow {
        id: row.text("id")?,
        secret_hash: row.text("secret_hash")?,
        tenant: row.parsed("tenant_id")?,
        customer: row.maybe_text("customer")?,
        organization: row.maybe_text("organization")?,
        rights: row.json("rights")?,
        note: row.text("note")?,
        created_at: row.at("created_at")?,
        expires_at: row.maybe_at("expires_at")?,
        revoked_at: row.maybe_at("revoked_at")?,
    })
}
