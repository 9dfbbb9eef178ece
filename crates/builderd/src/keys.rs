//! Keys of tenants: made when a tenant first needs one, kept in the database wrapped, opened for
//! each use. Nothing is remembered: a key that was destroyed opens nothing from then on, on any
//! node. It does not know what is sealed.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use aws_lc_rs::hmac;
use sealed::KeyId;
use secrecy::ExposeSecret as _;

use crate::artifact::ArtifactKeys;
use crate::build::hex;
use crate::build::record::Micros;
use crate::seal::{DataKey, KeyWrapper, SealError, new_data_key};
use crate::store::audit::Author;
use crate::store::{Store, StoreError, TenantKeyRow};
use crate::tenant::TenantId;

/// Before what a name stands for, when it is computed; ends where that begins.
const NAME: &[u8] = b"builderd name of a sealed artifact, version 1: ";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It could not be wrapped or opened.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// It was destroyed a moment ago.
    #[error("the key of tenant {tenant} was just destroyed")]
    Gone {
        /// Whose.
        tenant: TenantId,
    },
    /// What stands in the database is no id of a key.
    #[error("tenant {tenant} has a key whose id makes no sense: the database is damaged")]
    Id {
        /// Whose.
        tenant: TenantId,
    },
}

/// See the module.
pub(crate) struct TenantKeys {
    store: Store,
    wrapper: Arc<dyn KeyWrapper>,
}

impl TenantKeys {
    pub(crate) fn new(store: Store, wrapper: Arc<dyn KeyWrapper>) -> Self {
        Self { store, wrapper }
    }

    /// What the tenant's next artifact is called where it lies: `plain` stands for its bytes, and
    /// whoever lists a bucket must not see whether they are those of an image that he has, too.
    /// The same bytes have the same name while the tenant has the same key.
    ///
    /// # Errors
    /// [`KeyError`]
    pub(crate) async fn name(
        &self,
        tenant: &TenantId,
        plain: &str,
        now: Micros,
    ) -> Result<(KeyId, String), KeyError> {
        let id = self.current(tenant, now).await?;
        let row = self.store.system().tenant_key(tenant, &id.to_string()).await?;
        let Some(row) = row else { return Err(KeyError::Gone { tenant: tenant.clone() }) };
        let key = self.wrapper.open(tenant, id, &row.wrapped).await?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.expose_secret());
        let mut name = hmac::Context::with_key(&key);
        name.update(NAME);
        name.update(plain.as_bytes());
        Ok((id, hex(name.sign().as_ref())))
    }

    /// The key that the tenant's next artifact is sealed with; made if it has none.
    ///
    /// # Errors
    /// [`KeyError`]
    pub(crate) async fn current(&self, tenant: &TenantId, now: Micros) -> Result<KeyId, KeyError> {
        let system = self.store.system();
        let key = match system.current_tenant_key(tenant).await? {
            Some(key) => key,
            None => system.add_tenant_key(&self.wrapped(tenant, now).await?).await?,
        };
        key.id.parse().map_err(|_| KeyError::Id { tenant: tenant.clone() })
    }

    /// Gives the tenant a new key for what is sealed from now on. None if there is no such tenant.
    ///
    /// # Errors
    /// [`KeyError`]
    pub(crate) async fn rotate(
        &self,
        author: &Author,
        tenant: &TenantId,
        now: Micros,
    ) -> Result<Option<String>, KeyError> {
        let key = self.wrapped(tenant, now).await?;
        Ok(self.store.system_for(author).rotate_tenant_key(&key).await?.then_some(key.id))
    }

    /// A new key, wrapped.
    async fn wrapped(&self, tenant: &TenantId, now: Micros) -> Result<TenantKeyRow, KeyError> {
        let (id, key) = (KeyId(uuid::Uuid::new_v4().into_bytes()), new_data_key()?);
        Ok(TenantKeyRow {
            tenant: tenant.clone(),
            id: id.to_string(),
            wrapped: self.wrapper.wrap(tenant, id, &key).await?,
            wrapped_by: self.wrapper.id().to_owned(),
            created_at: now,
            retired_at: None,
        })
    }
}

#[async_trait]
impl ArtifactKeys for TenantKeys {
    async fn key(&self, tenant: &TenantId, id: KeyId) -> io::Result<Option<DataKey>> {
        let found = self.store.system().tenant_key(tenant, &id.to_string()).await;
        let Some(found) = found.map_err(io::Error::other)? else { return Ok(None) };
        let key = self.wrapper.open(tenant, id, &found.wrapped).await;
        key.map(Some).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::MasterKey;
    use crate::store::tests::queue_build;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_tenants_keys_are_its_own_and_old_ones_open_what_they_sealed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open_sqlite(directory.path()).await.unwrap();
        let master = MasterKey::load_or_create(&directory.path().join("key")).unwrap();
        let keys = TenantKeys::new(store.clone(), Arc::new(master));
        let (now, later) = (Micros(1_000_000), Micros(2_000_000));
        let tenant = queue_build(&store, "127.0.0.1:1/app", now).await.tenant;
        let stranger: TenantId = "stranger".parse().unwrap();

        let first = keys.current(&tenant, now).await.unwrap();
        assert_eq!(keys.current(&tenant, now).await.unwrap(), first);
        let key = keys.key(&tenant, first).await.unwrap().unwrap();
        assert!(keys.key(&stranger, first).await.unwrap().is_none());
        assert_eq!(keys.rotate(&Author::service(), &stranger, now).await.unwrap(), None);

        // Who has the bytes cannot tell their name, nor whether two tenants have the same.
        let name = async |tenant: &TenantId| keys.name(tenant, "sum-of-bytes", now).await.unwrap();
        let (id, called) = name(&tenant).await;
        assert_eq!((id, called.len(), name(&tenant).await.1 == called), (first, 64, true));
        assert_ne!(keys.name(&tenant, "sum-of-others", now).await.unwrap().1, called);
        let by_key = |key: &DataKey| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, key.expose_secret());
            hex(hmac::sign(&key, &[NAME, b"sum-of-bytes"].concat()).as_ref())
        };
        assert_eq!(called, by_key(&key));

        let rotated = keys.rotate(&Author::service(), &tenant, later).await.unwrap().unwrap();
        let second = keys.current(&tenant, later).await.unwrap();
        assert_eq!(second.to_string(), rotated);
        let other = keys.key(&tenant, second).await.unwrap().unwrap();
        assert_ne!(other.expose_secret(), key.expose_secret());
        assert_eq!(name(&tenant).await, (second, by_key(&other)));
        let again = keys.key(&tenant, first).await.unwrap().unwrap();
        assert_eq!(again.expose_secret(), key.expose_secret());

        store.system().destroy_tenant_keys(&tenant, later).await.unwrap();
        assert!(keys.key(&tenant, first).await.unwrap().is_none());

        // A key that another master key wrapped opens for nobody.
        let third = keys.current(&tenant, later).await.unwrap();
        let stranger = MasterKey::load_or_create(&directory.path().join("other")).unwrap();
        let keys = TenantKeys::new(store, Arc::new(stranger));
        let error = keys.key(&tenant, third).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("the master key was changed"), "{error}");
    }
}
