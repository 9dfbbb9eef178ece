//! Keys of tenants, as the database has them: wrapped. Knows no key.

use super::{StoreError, SystemStore};
use crate::build::record::Micros;
use crate::tenant::TenantId;

/// What stands in an artifact's key between its name and the id of the tenant's key that it was
/// sealed with.
pub(crate) const SEALED: &str = ".sealed-";

/// A tenant's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantKeyRow {
    /// Whose.
    pub tenant: TenantId,
    /// Its id, 32 hexadecimal digits.
    pub id: String,
    /// The key, wrapped.
    pub wrapped: Vec<u8>,
    /// The name of the key that wrapped it.
    pub wrapped_by: String,
    /// When it was made.
    pub created_at: Micros,
    /// Since when it seals nothing new.
    pub retired_at: Option<Micros>,
}

/// What was destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destroyed {
    /// Keys.
    pub keys: u64,
    /// Builds whose artifacts they had sealed.
    pub builds: u64,
}

impl SystemStore<'_> {
    /// The key that the tenant's next artifact is sealed with, if it has one.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn current_tenant_key(
        &self,
        tenant: &TenantId,
    ) -> Result<Option<TenantKeyRow>, StoreError> {
        self.rows.current_tenant_key(tenant).await
    }

    /// One of a tenant's keys; none if it is not there any more.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn tenant_key(
        &self,
        tenant: &TenantId,
        id: &str,
    ) -> Result<Option<TenantKeyRow>, StoreError> {
        self.rows.tenant_key(tenant, id).await
    }

    /// Keeps a tenant's first key, unless it has a current one; the one that holds.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn add_tenant_key(&self, key: &TenantKeyRow) -> Result<TenantKeyRow, StoreError> {
        self.rows.add_tenant_key(key).await
    }

    /// Makes this the tenant's current key and retires the one before. False if there is no such
    /// tenant.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn rotate_tenant_key(&self, key: &TenantKeyRow) -> Result<bool, StoreError> {
        self.rows.rotate_tenant_key_by(&self.author(), key).await
    }

    /// Retires every key of every tenant: the key that wrapped them is lost. Returns how many keys
    /// there are.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn retire_tenant_keys(&self, now: Micros) -> Result<u64, StoreError> {
        self.rows.retire_tenant_keys(now).await
    }

    /// Deletes keys that were retired before `older_than` and that no artifact needs. Returns how
    /// many.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn prune_tenant_keys(&self, older_than: Micros) -> Result<u64, StoreError> {
        self.rows.prune_tenant_keys(older_than).await
    }

    /// Takes the sealed artifacts away from the tenant's builds, then deletes its keys: nobody can
    /// read again what they had sealed.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn destroy_tenant_keys(
        &self,
        tenant: &TenantId,
        now: Micros,
    ) -> Result<Destroyed, StoreError> {
        self.rows.destroy_tenant_keys_by(&self.author(), tenant, now).await
    }
}
