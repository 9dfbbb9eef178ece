//! `builderd admin …`: the database's own chores. They work on the database of the same settings
//! as the server.

use std::path::Path;

use secrecy::ExposeSecret as _;

use super::service_args::{AdminArgs, AdminCommand};
use super::{Failure, text};
use crate::clock::{Clock as _, WallClock};
use crate::config::{Config, DatabaseConfig};
use crate::store::admin::{AdminError, backup, check, migrate_store, restore};
use crate::store::audit::{Action, Author};
use crate::store::{DirectoryProblem, Store, StoreError, check_postgres_url};

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Store(error) => error.into(),
            AdminError::NotEmpty { .. } | AdminError::Newer { .. } | AdminError::File { .. } => {
                Self { code: 3, error: Box::new(error), hint: None }
            }
            AdminError::Incomplete { .. } => Self::ours(error),
        }
    }
}

pub(super) fn run(args: &AdminArgs) -> Result<(), Failure> {
    let config = super::config::load(&args.settings, Vec::new())?;
    super::builds::block_on(async {
        match &args.command {
            AdminCommand::Check => check_all(&config).await,
            AdminCommand::Audit(command) => {
                let store = attach(&config).await?;
                let done = super::audit::run(&store, command).await;
                store.close().await;
                done
            }
            AdminCommand::Backup { file } => {
                backup(sqlite(&config)?, file).await?;
                noted(&config, Action::Backup, file).await;
                put!("{} written; keep the master key beside it", file.display());
                Ok(())
            }
            AdminCommand::Restore { file } => {
                restore(file, sqlite(&config)?).await?;
                noted(&config, Action::Restore, file).await;
                put!("restored to {}", config.data_dir.display());
                Ok(())
            }
            AdminCommand::ForgetKey => forget_key(&config).await,
            AdminCommand::RotateKey { tenant } => {
                let store = attach(&config).await?;
                let done = super::keys::rotate(&store, &config, tenant).await;
                store.close().await;
                done
            }
            AdminCommand::DestroyKeys { tenant } => {
                let store = attach(&config).await?;
                let done = super::keys::destroy(&store, tenant).await;
                store.close().await;
                done
            }
            AdminCommand::MigrateStore { from, to } => migrate(from, to.expose_secret()).await,
        }
    })
}

/// These two are PostgreSQL's own business where PostgreSQL is used.
fn sqlite(config: &Config) -> Result<&Path, Failure> {
    match &config.database {
        DatabaseConfig::Sqlite => Ok(&config.data_dir),
        DatabaseConfig::Postgres { .. } => {
            let message = "the database is PostgreSQL: use pg_dump and pg_restore";
            Err(Failure { code: Failure::USAGE, error: message.into(), hint: None })
        }
    }
}

async fn attach(config: &Config) -> Result<Store, StoreError> {
    match &config.database {
        DatabaseConfig::Sqlite => Store::attach_sqlite(&config.data_dir).await,
        DatabaseConfig::Postgres { url, .. } => Store::attach_postgres(url.expose_secret()).await,
    }
}

/// Writes down what was done with a file; it stays done also where that cannot be written, as
/// on a full disk.
async fn noted(config: &Config, action: Action, file: &Path) {
    let note = async {
        let store = attach(config).await?;
        let noted = super::audit::note(&store, action, &file.to_string_lossy()).await;
        store.close().await;
        noted
    };
    if let Err(failure) = note.await {
        tell!("warning: this is not in the audit log: {}", failure.error);
    }
}

async fn check_all(config: &Config) -> Result<(), Failure> {
    let store = attach(config).await?;
    let violations = check(&store).await;
    store.close().await;
    let violations = violations?;
    for violation in &violations {
        put!("{}: {}", text::printable(&violation.subject), violation.rule);
    }
    match violations.len() {
        0 => {
            put!("every rule holds");
            Ok(())
        }
        count => {
            let error = format!("{count} rules are broken").into();
            let hint = Some("please report this as a bug of builderd".to_owned());
            Err(Failure { code: 1, error, hint })
        }
    }
}

async fn forget_key(config: &Config) -> Result<(), Failure> {
    let store = match &config.database {
        // Not attached but opened: a server that runs goes on with the old key.
        DatabaseConfig::Sqlite => Store::reopen_sqlite(&config.data_dir).await?,
        DatabaseConfig::Postgres { url, .. } => Store::attach_postgres(url.expose_secret()).await?,
    };
    let author = Author::command();
    let system = store.system_for(&author);
    let forgotten = async {
        let keys = system.retire_tenant_keys(WallClock.now()).await?;
        system.forget_master_key().await.map(|sealed| (keys, sealed))
    };
    let forgotten = forgotten.await;
    store.close().await;
    let (keys, sealed) = forgotten?;
    put!("the key of the next server to start is the one of this database");
    match sealed {
        0 => put!("no build waits with credentials that the old key sealed"),
        sealed => put!("{sealed} builds wait with credentials of the old key, and will fail"),
    }
    if keys > 0 {
        put!("{keys} keys of tenants were wrapped by the old key: what they encrypted is lost");
    }
    Ok(())
}

async fn migrate(from: &Path, to: &str) -> Result<(), Failure> {
    check_postgres_url(to)
        .map_err(|problem| Failure::usage(format!("--to: the URL cannot be used: {problem}")))?;
    // Not attached but opened: no server may write to it meanwhile.
    let source = Store::reopen_sqlite(from).await.map_err(|error| {
        // No setting says where it is.
        let elsewhere =
            matches!(error, StoreError::DataDirectory { problem: DirectoryProblem::Other(_), .. });
        let mut failure = Failure::from(error);
        if elsewhere {
            failure.hint = Some("--from is the server's DATABASE_DATA_DIR".to_owned());
        }
        failure
    })?;
    let target = Store::attach_postgres(to).await?;
    let copied = migrate_store(&source, &target).await;
    let noted = match &copied {
        Ok(_) => {
            let object = from.to_string_lossy();
            super::audit::note(&target, Action::MigrateStore, &object).await
        }
        Err(_) => Ok(()),
    };
    source.close().await;
    target.close().await;
    for table in copied? {
        put!("{:>9} rows of {}", table.rows, table.table);
    }
    noted
}
