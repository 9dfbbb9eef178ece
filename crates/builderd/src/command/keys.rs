//! `builderd admin rotate-key` and `destroy-keys`: the keys of one tenant, beside a server or
//! without it. Knows no key: they are made and wrapped in `keys.rs`.

use std::sync::Arc;

use super::Failure;
use crate::clock::{Clock as _, WallClock};
use crate::config::Config;
use crate::keys::{KeyError, TenantKeys};
use crate::serve::master_key;
use crate::store::Store;
use crate::store::audit::Author;
use crate::tenant::TenantId;

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::Store(error) => error.into(),
            KeyError::Seal(_) | KeyError::Gone { .. } | KeyError::Id { .. } => Self::ours(error),
        }
    }
}

/// Gives the tenant a new key for what is encrypted from now on.
pub(super) async fn rotate(
    store: &Store,
    config: &Config,
    tenant: &TenantId,
) -> Result<(), Failure> {
    let master = master_key(&config.master_key, store).await.map_err(Failure::ours)?;
    let keys = TenantKeys::new(store.clone(), Arc::new(master));
    match keys.rotate(&Author::command(), tenant, WallClock.now()).await? {
        Some(id) => {
            put!("artifacts of {tenant} are encrypted with key {id} from now on");
            put!("the key before it is kept for as long as an artifact needs it");
            Ok(())
        }
        None => Err(unknown(tenant)),
    }
}

/// Destroys what the tenant's encrypted artifacts can be read with.
pub(super) async fn destroy(store: &Store, tenant: &TenantId) -> Result<(), Failure> {
    let author = Author::command();
    let destroyed = store.system_for(&author).destroy_tenant_keys(tenant, WallClock.now()).await?;
    if destroyed.keys == 0 {
        return Err(unknown(tenant));
    }
    put!(
        "{} keys destroyed; {} builds have no artifact any more",
        destroyed.keys,
        destroyed.builds
    );
    put!("backups of the database hold the keys still, wrapped by the master key");
    Ok(())
}

fn unknown(tenant: &TenantId) -> Failure {
    let error = format!("tenant `{tenant}` is not there, or has no keys").into();
    let hint = Some("see `builderd tenant list`; keys are made with the first artifact".to_owned());
    Failure { code: 3, error, hint }
}
