//! `builderd admin …`: the database's own chores. They work on the database of the same settings
//! as the server.

use std::path::Path;

use secrecy::ExposeSecret as _;

use super::service_args::{AdminArgs, AdminCommand};
use super::{Failure, text};
use crate::config::{Config, DatabaseConfig};
use crate::store::Store;
use crate::store::admin::{AdminError, backup, check, migrate_store, restore};

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Store(error) => error.into(),
            AdminError::NotEmpty { .. } | AdminError::File { .. } => {
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
            AdminCommand::Backup { file } => {
                backup(sqlite(&config)?, file).await?;
                put!("{} written; keep the master key beside it", file.display());
                Ok(())
            }
            AdminCommand::Restore { file } => {
                restore(file, sqlite(&config)?).await?;
                put!("restored to {}", config.data_dir.display());
                Ok(())
            }
            AdminCommand::ForgetKey => forget_key(&config).await,
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

async fn check_all(config: &Config) -> Result<(), Failure> {
    let store = match &config.database {
        DatabaseConfig::Sqlite => Store::attach_sqlite(&config.data_dir).await?,
        DatabaseConfig::Postgres { url, .. } => Store::attach_postgres(url.expose_secret()).await?,
    };
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
        DatabaseConfig::Sqlite => Store::open_sqlite(&config.data_dir).await?,
        DatabaseConfig::Postgres { url, .. } => Store::attach_postgres(url.expose_secret()).await?,
    };
    let sealed = store.system().forget_master_key().await;
    store.close().await;
    let sealed = sealed?;
    put!("the key of the next server to start is the one of this database");
    match sealed {
        0 => put!("no build waits with credentials that the old key sealed"),
        sealed => put!("{sealed} builds wait with credentials of the old key, and will fail"),
    }
    Ok(())
}

async fn migrate(from: &Path, to: &str) -> Result<(), Failure> {
    // Not attached but opened: no server may write to it meanwhile.
    let source = Store::open_sqlite(from).await?;
    let target = Store::attach_postgres(to).await?;
    let copied = migrate_store(&source, &target).await;
    source.close().await;
    target.close().await;
    for table in copied? {
        put!("{:>9} rows of {}", table.rows, table.table);
    }
    Ok(())
}
