//! Which master key a database's secrets are sealed with, and the wrapped keys of tenants. Knows
//! names and wrapped keys, never a key.

use super::audit::append;
use super::{Rows, named};
use crate::build::record::Micros;
use crate::store::audit::{Action, AuditEntry, Author};
use crate::store::engine::{Row, Tx, sql};
use crate::store::{Destroyed, StoreError, TenantKeyRow};
use crate::tenant::TenantId;

/// Builds that forget their artifacts at once.
const BATCH: i64 = 100;

impl Rows {
    pub(crate) async fn master_key(&self) -> Result<Option<String>, StoreError> {
        let query = || sql("SELECT id FROM master_key");
        let row = self.again(|| self.engine.optional(query())).await?;
        row.map(|row| row.text("id")).transpose()
    }

    pub(crate) async fn claim_master_key(&self, id: &str) -> Result<String, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            let query = sql("INSERT INTO master_key (id, place) VALUES ($1, 1) \
                 ON CONFLICT DO NOTHING");
            tx.execute(query.text(id)).await?;
            let held = tx.one(sql("SELECT id FROM master_key")).await?.text("id")?;
            tx.commit().await?;
            Ok(held)
        })
        .await
    }

    pub(crate) async fn forget_master_key_by(
        &self,
        author: &Author,
        now: Micros,
    ) -> Result<u64, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            tx.execute(sql("DELETE FROM master_key")).await?;
            let query = "SELECT COUNT(*) AS found FROM build WHERE sealed_credentials IS NOT NULL";
            let sealed = tx.one(sql(query)).await?.count("found")?;
            let entry = AuditEntry::done(None, author, Action::ForgetKey, "", now);
            append(&mut tx, &[entry]).await?;
            tx.commit().await?;
            Ok(sealed)
        })
        .await
    }
}

/// Adds a key, unless the tenant has a current one.
async fn insert(tx: &mut Tx, key: &TenantKeyRow) -> Result<(), StoreError> {
    let query = sql("INSERT INTO tenant_key (tenant_id, id, wrapped, wrapped_by, created_at, \
         retired_at) VALUES ($1, $2, $3, $4, $5, NULL) ON CONFLICT DO NOTHING");
    let query = query.text(key.tenant.as_str()).text(&key.id).bytes(Some(key.wrapped.clone()));
    tx.execute(query.text(&key.wrapped_by).at(key.created_at)).await?;
    Ok(())
}

impl Rows {
    pub(crate) async fn current_tenant_key(
        &self,
        tenant: &TenantId,
    ) -> Result<Option<TenantKeyRow>, StoreError> {
        let query = sql("SELECT tenant_id, id, wrapped, wrapped_by, created_at, retired_at \
             FROM tenant_key WHERE tenant_id = $1 AND retired_at IS NULL");
        let query = query.text(tenant.as_str());
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        row.as_ref().map(tenant_key_row).transpose()
    }

    pub(crate) async fn tenant_key(
        &self,
        tenant: &TenantId,
        id: &str,
    ) -> Result<Option<TenantKeyRow>, StoreError> {
        let query = sql("SELECT tenant_id, id, wrapped, wrapped_by, created_at, retired_at \
             FROM tenant_key WHERE tenant_id = $1 AND id = $2");
        let query = query.text(tenant.as_str()).text(id);
        let row = self.again(|| self.engine.optional(query.clone())).await?;
        row.as_ref().map(tenant_key_row).transpose()
    }

    pub(crate) async fn add_tenant_key(
        &self,
        key: &TenantKeyRow,
    ) -> Result<TenantKeyRow, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            insert(&mut tx, key).await?;
            let query = sql("SELECT tenant_id, id, wrapped, wrapped_by, created_at, retired_at \
                 FROM tenant_key WHERE tenant_id = $1 AND retired_at IS NULL");
            let held = tenant_key_row(&tx.one(query.text(key.tenant.as_str())).await?)?;
            tx.commit().await?;
            Ok(held)
        })
        .await
    }

    pub(crate) async fn rotate_tenant_key_by(
        &self,
        author: &Author,
        key: &TenantKeyRow,
    ) -> Result<bool, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            // Held, so that one rotation waits for another.
            let query = sql("SELECT id FROM tenant WHERE id = $1 FOR UPDATE");
            if tx.optional(query.text(key.tenant.as_str())).await?.is_none() {
                return Ok(false);
            }
            let query = sql("UPDATE tenant_key SET retired_at = $2 \
                 WHERE tenant_id = $1 AND retired_at IS NULL");
            tx.execute(query.text(key.tenant.as_str()).at(key.created_at)).await?;
            insert(&mut tx, key).await?;
            let (tenant, action) = (Some(&key.tenant), Action::KeyRotate);
            let entry = AuditEntry::done(tenant, author, action, &key.id, key.created_at);
            append(&mut tx, &[entry]).await?;
            tx.commit().await?;
            Ok(true)
        })
        .await
    }

    pub(crate) async fn retire_tenant_keys(&self, now: Micros) -> Result<u64, StoreError> {
        self.again(|| async {
            let mut tx = self.engine.begin().await?;
            let query = sql("UPDATE tenant_key SET retired_at = $1 WHERE retired_at IS NULL");
            tx.execute(query.at(now)).await?;
            let keys = tx.one(sql("SELECT COUNT(*) AS found FROM tenant_key")).await?;
            tx.commit().await?;
            keys.count("found")
        })
        .await
    }

    pub(crate) async fn prune_tenant_keys(&self, older_than: Micros) -> Result<u64, StoreError> {
        let query = sql("DELETE FROM tenant_key WHERE retired_at < $1 AND NOT EXISTS \
             (SELECT a.artifact_key FROM artifact a WHERE a.artifact_key LIKE \
              'tenant-' || tenant_key.tenant_id || '/%.sealed-' || tenant_key.id)");
        let query = query.at(older_than);
        self.again(|| self.engine.execute(query.clone())).await
    }

    pub(crate) async fn destroy_tenant_keys_by(
        &self,
        author: &Author,
        tenant: &TenantId,
        now: Micros,
    ) -> Result<Destroyed, StoreError> {
        // First of all nobody finds the artifacts any more.
        let names = sql("DELETE FROM artifact_name WHERE sharing_domain = 'tenant-' || $1 \
             AND artifact_key LIKE '%/%.sealed-%'");
        let names = names.text(tenant.as_str());
        self.again(|| self.engine.execute(names.clone())).await?;
        let mut builds = 0;
        loop {
            let query = sql("SELECT tenant_id, id FROM build \
                 WHERE tenant_id = $1 AND state = 'completed' \
                 AND artifact_key LIKE '%/%.sealed-%' LIMIT $2");
            let query = query.text(tenant.as_str()).int(BATCH);
            let some = self.again(|| self.engine.all(query.clone())).await?;
            let before = builds;
            for (tenant, id) in named(&some)? {
                builds += u64::from(self.forget(&tenant, &id).await?);
            }
            // A build that cannot forget its artifact keeps no key alive: it has nothing readable.
            if builds == before {
                break;
            }
        }
        let keys = self
            .again(|| async {
                let mut tx = self.engine.begin().await?;
                let query = sql("DELETE FROM tenant_key WHERE tenant_id = $1");
                let keys = tx.execute(query.text(tenant.as_str())).await?;
                if keys > 0 {
                    let (action, object) = (Action::KeysDestroy, tenant.as_str());
                    let entry = AuditEntry::done(Some(tenant), author, action, object, now);
                    append(&mut tx, &[entry]).await?;
                }
                tx.commit().await?;
                Ok(keys)
            })
            .await?;
        Ok(Destroyed { keys, builds })
    }
}

fn tenant_key_row(row: &Row) -> Result<TenantKeyRow, StoreError> {
    Ok(TenantKeyRow {
        tenant: row.parsed("tenant_id")?,
        id: row.text("id")?,
        wrapped: row.bytes("wrapped")?.unwrap_or_default(),
        wrapped_by: row.text("wrapped_by")?,
        created_at: row.at("created_at")?,
        retired_at: row.maybe_at("retired_at")?,
    })
}
