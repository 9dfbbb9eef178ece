//! How a database is found, locked, opened and brought up to date.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, PgPool, SqlSafeStr as _, SqlitePool,
};

use super::changes::Announcer;
use super::engine::Engine;
use super::readers::Readers;
use super::{DirectoryProblem, Rows, Store, StoreError};
use crate::private;

/// The database's file in the data directory.
pub(super) const DATABASE_FILE: &str = "builderd.db";
/// Held by the one server of a data directory.
const LOCK_FILE: &str = "builderd.lock";
/// How long one connection waits for another that writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a caller waits for a connection: SQLite's writers queue up for one.
const SQLITE_ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);
const POSTGRES_ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the reason is asked for when they have waited in vain.
const POSTGRES_ONCE_MORE: Duration = Duration::from_secs(2);
/// Who reads in several statements, at once.
const VIEWERS: u32 = 4;
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Every migration, oldest first; both engines take the same.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "store", include_str!("../../migrations/0001_store.sql")),
    (2, "live_usage", include_str!("../../migrations/0002_live_usage.sql")),
    (3, "master_key", include_str!("../../migrations/0003_master_key.sql")),
    (4, "artifact_removal", include_str!("../../migrations/0004_artifact_removal.sql")),
    (5, "heartbeat", include_str!("../../migrations/0005_heartbeat.sql")),
    (6, "unread_tries", include_str!("../../migrations/0006_unread_tries.sql")),
    (7, "created_by", include_str!("../../migrations/0007_created_by.sql")),
    (8, "tenant_key", include_str!("../../migrations/0008_tenant_key.sql")),
    (9, "audit", include_str!("../../migrations/0009_audit.sql")),
    (10, "revision", include_str!("../../migrations/0010_revision.sql")),
    (11, "asked_by", include_str!("../../migrations/0011_asked_by.sql")),
    (12, "cancelled_by", include_str!("../../migrations/0012_cancelled_by.sql")),
];

/// The last of them.
pub(super) const NEWEST_MIGRATION: i64 = MIGRATIONS[MIGRATIONS.len() - 1].0;

/// What a migration does behind its own text where the engines have no words in common: triggers.
/// First SQLite's, then PostgreSQL's.
const OF_EACH_ENGINE: &[(i64, [&str; 2])] = &[
    (
        9,
        [
            include_str!("../../migrations/0009_audit.sqlite.sql"),
            include_str!("../../migrations/0009_audit.postgres.sql"),
        ],
    ),
    (
        10,
        [
            include_str!("../../migrations/0010_revision.sqlite.sql"),
            include_str!("../../migrations/0010_revision.postgres.sql"),
        ],
    ),
];

/// Whose words a migration is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

/// What keeps a second server away from a data directory.
#[derive(Debug)]
pub(super) struct DirectoryLock {
    /// Locked until it is closed.
    _file: File,
}

impl Store {
    /// Opens the database in `data_dir`, which is made if need be, for the one server that uses
    /// it. Others may [`attach`](Self::attach_sqlite).
    ///
    /// # Errors
    /// [`StoreError::DataDirectory`] if another server has it, or it lies on a network file
    /// system.
    pub async fn open_sqlite(data_dir: &Path) -> Result<Self, StoreError> {
        make_directory(data_dir)?;
        let lock = lock(data_dir).await?;
        shut_others_out(data_dir);
        Self::sqlite(data_dir, Some(lock)).await
    }

    /// Opens the database in `data_dir`, which must be there, as [`open`](Self::open_sqlite) does.
    ///
    /// # Errors
    /// [`StoreError::DataDirectory`] if there is no database, and as for `open`.
    pub async fn reopen_sqlite(data_dir: &Path) -> Result<Self, StoreError> {
        expect_database(data_dir)?;
        Self::open_sqlite(data_dir).await
    }

    /// Opens the database in `data_dir`, which must be there, beside the server that may be using
    /// it: for an operator's commands, which do not take builds from the queue.
    ///
    /// # Errors
    /// [`StoreError::DataDirectory`] if there is no database: nothing is true of one that the
    /// command would have to make.
    pub async fn attach_sqlite(data_dir: &Path) -> Result<Self, StoreError> {
        expect_database(data_dir)?;
        Self::attach_or_make_sqlite(data_dir).await
    }

    /// The same for commands that prepare a server's first start: they make the database.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn attach_or_make_sqlite(data_dir: &Path) -> Result<Self, StoreError> {
        make_directory(data_dir)?;
        // A server that is there has brought the schema up to date; else that is done here, and
        // no server may start meanwhile.
        let _lock = try_lock(data_dir)?;
        Self::sqlite(data_dir, None).await
    }

    async fn sqlite(data_dir: &Path, lock: Option<DirectoryLock>) -> Result<Self, StoreError> {
        let file = data_dir.join(DATABASE_FILE);
        // SQLite would let others read it, and gives the files beside it the same mode.
        private::make_file(&file).map_err(|error| directory_error(&file, error))?;
        let options = sqlite_options(&file);
        let pool = || {
            SqlitePoolOptions::new()
                .acquire_timeout(SQLITE_ACQUIRE_TIMEOUT)
                // A file needs no ping, and its connections do not grow stale.
                .test_before_acquire(false)
                .max_lifetime(None::<Duration>)
                .idle_timeout(None::<Duration>)
                // SQLite ends a transaction by itself when the disk is full (lang_transaction.html,
                // section 3), and sqlx goes on counting it: such a connection begins no other.
                .before_acquire(|connection, _| {
                    let is_free = !connection.is_in_transaction();
                    Box::pin(async move { Ok(is_free) })
                })
        };
        let write: SqlitePool =
            pool().max_connections(1).connect_with(options.clone().create_if_missing(true)).await?;
        migrator(Dialect::Sqlite).run(&write).await?;
        let options = options.read_only(true).create_if_missing(false);
        let read = Box::new(Readers::new(options.clone(), SQLITE_ACQUIRE_TIMEOUT));
        let view = pool().max_connections(VIEWERS).connect_with(options).await?;
        let engine = Engine::Sqlite { write, read, view };
        Ok(Self { rows: Arc::new(Rows::new(engine, Announcer::alone(), lock)) })
    }

    /// Opens a PostgreSQL database, shared with other nodes, with at most so many connections
    /// and one more that hears of the others.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn open_postgres(url: &str, max_connections: u32) -> Result<Self, StoreError> {
        let options = postgres_options(url)?;
        let pool = postgres_pool(options.clone(), max_connections).await?;
        let announcer = Announcer::shared(&pool, options);
        Ok(Self { rows: Arc::new(Rows::new(Engine::Postgres(pool), announcer, None)) })
    }

    /// Opens a PostgreSQL database beside the nodes that may be using it: for an operator's
    /// commands, which do one thing at a time and wait for no change. The nodes see what was
    /// done when they look.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn attach_postgres(url: &str) -> Result<Self, StoreError> {
        let pool = postgres_pool(postgres_options(url)?, 1).await?;
        Ok(Self { rows: Arc::new(Rows::new(Engine::Postgres(pool), Announcer::alone(), None)) })
    }

    /// Waits until every connection is closed; a data directory is free then.
    pub async fn close(&self) {
        self.rows.announcer.close().await;
        self.rows.engine.close().await;
    }
}

/// Whether a URL can be one of PostgreSQL; else what is wrong with it, without its password.
///
/// # Errors
/// What is wrong.
pub(crate) fn check_postgres_url(url: &str) -> Result<(), String> {
    match url.parse::<PgConnectOptions>() {
        Ok(_) => Ok(()),
        // Ours to say what it is about.
        Err(sqlx::Error::Configuration(problem)) => Err(problem.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn postgres_options(url: &str) -> Result<PgConnectOptions, StoreError> {
    let options: PgConnectOptions = url.parse()?;
    Ok(options
        .application_name("builderd")
        // Nobody waits for ever for somebody who is gone.
        .options([("lock_timeout", "10s"), ("idle_in_transaction_session_timeout", "60s")]))
}

/// Connections to a database whose schema is up to date.
async fn postgres_pool(
    options: PgConnectOptions,
    max_connections: u32,
) -> Result<PgPool, StoreError> {
    let pool = PgPoolOptions::new()
        .max_connections(max_connections.max(1))
        .acquire_timeout(POSTGRES_ACQUIRE_TIMEOUT)
        .connect_with(options.clone())
        .await;
    let pool = match pool {
        Ok(pool) => pool,
        Err(error) => {
            let is_in_vain = matches!(error, sqlx::Error::PoolTimedOut);
            let error = if is_in_vain { why(&options).await } else { error };
            let source = Box::new(error.into());
            return Err(StoreError::Unreachable { place: place(&options), source });
        }
    };
    migrator(Dialect::Postgres).run(&pool).await?;
    Ok(pool)
}

/// What a database that is elsewhere is called.
pub(super) fn place(options: &PgConnectOptions) -> String {
    let address = match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    };
    match options.get_database() {
        Some(name) => format!("`{name}` at {address}"),
        None => format!("at {address}"),
    }
}

/// Why a pool has waited in vain, which does not know: it is asked once more.
pub(super) async fn why(options: &PgConnectOptions) -> sqlx::Error {
    match tokio::time::timeout(POSTGRES_ONCE_MORE, options.connect()).await {
        Ok(Err(error)) => error,
        Ok(Ok(connection)) => {
            // Whatever it says at the end, it had let us in.
            let _ = connection.close().await;
            in_vain("no connection came free")
        }
        Err(_) => in_vain("no answer"),
    }
}

/// So long was waited for a connection.
pub(super) fn in_vain(what: &str) -> sqlx::Error {
    let problem = format!("{what} within {} s", POSTGRES_ACQUIRE_TIMEOUT.as_secs());
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, problem))
}

pub(super) fn sqlite_options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .journal_mode(SqliteJournalMode::Wal)
        // Less would lose what was answered when the power fails.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        // What is deleted (wrapped keys, sealed credentials) is not left in free pages.
        .pragma("secure_delete", "ON")
}

/// Nodes of a fleet are not all replaced at once: one that is older meets migrations it does
/// not know, and lives with them.
pub(super) fn migrator(dialect: Dialect) -> Migrator {
    let migrations = MIGRATIONS.iter().map(|&(version, description, text)| {
        let kind = MigrationType::Simple;
        let own = OF_EACH_ENGINE.iter().find(|(of, _)| *of == version);
        let text = match (own, dialect) {
            (None, _) => text.into_sql_str(),
            (Some((_, [own, _])), Dialect::Sqlite) | (Some((_, [_, own])), Dialect::Postgres) => {
                AssertSqlSafe([text, own].concat()).into_sql_str()
            }
        };
        Migration::new(version, description.into(), kind, text, false)
    });
    let mut migrator = Migrator::with_migrations(migrations.collect());
    migrator.set_ignore_missing(true);
    migrator
}

fn directory_error(path: &Path, problem: impl ToString) -> StoreError {
    let problem = DirectoryProblem::Other(problem.to_string());
    StoreError::DataDirectory { path: path.to_owned(), problem }
}

fn expect_database(data_dir: &Path) -> Result<(), StoreError> {
    match data_dir.join(DATABASE_FILE).exists() {
        true => Ok(()),
        false => Err(directory_error(
            data_dir,
            "there is no database in it: give the server's own settings (--config, --dev, or its \
             environment)",
        )),
    }
}

/// What lies here from before may be open to every user of the machine. A file that cannot be
/// closed, another user's, is named, and used as ever.
fn shut_others_out(data_dir: &Path) {
    let database = ["", "-wal", "-shm", "-journal"].map(|end| format!("{DATABASE_FILE}{end}"));
    for name in database.iter().map(String::as_str).chain([LOCK_FILE]) {
        let path = data_dir.join(name);
        match private::close(&path) {
            Ok(false) => {}
            Ok(true) => tracing::warn!(
                path = %path.display(),
                "a file of the database let other users read it, and does not any more"
            ),
            Err(error) => tracing::warn!(
                path = %path.display(),
                error = %error,
                "a file of the database may let other users read it: that cannot be changed"
            ),
        }
    }
}

fn make_directory(data_dir: &Path) -> Result<(), StoreError> {
    private::make_directory(data_dir).map_err(|error| directory_error(data_dir, error))?;
    match network_file_system(data_dir)? {
        None => Ok(()),
        Some(name) => Err(directory_error(
            data_dir,
            format!("it is on {name}, where SQLite's locks do not hold: use a local disk"),
        )),
    }
}

/// The name of the network file system that a directory is on, if it is (statfs(2)).
fn network_file_system(path: &Path) -> Result<Option<&'static str>, StoreError> {
    const NETWORK: &[(u32, &str)] = &[
        (0x6969, "NFS"),
        (0xff53_4d42, "CIFS"),
        (0xfe53_4d42, "SMB"),
        (0x517b, "SMB"),
        (0x00c3_6400, "Ceph"),
        (0x0bd0_0bd0, "Lustre"),
        (0x5346_414f, "AFS"),
    ];
    let found = rustix::fs::statfs(path).map_err(|error| directory_error(path, error))?;
    // The magic has 32 bits, whatever the type.
    let magic = i128::from(found.f_type) & 0xffff_ffff;
    Ok(NETWORK.iter().find(|(known, _)| i128::from(*known) == magic).map(|(_, name)| *name))
}

/// The lock of a data directory. An operator's command may have it for a moment.
pub(super) async fn lock(data_dir: &Path) -> Result<DirectoryLock, StoreError> {
    for _ in 0..LOCK_TRIES {
        if let Some(lock) = try_lock(data_dir)? {
            return Ok(lock);
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Err(StoreError::DataDirectory { path: data_dir.to_owned(), problem: DirectoryProblem::InUse })
}

/// The lock of a data directory; none if somebody has it.
pub(super) fn try_lock(data_dir: &Path) -> Result<Option<DirectoryLock>, StoreError> {
    let path: PathBuf = data_dir.join(LOCK_FILE);
    let file = private::file_options().open(&path);
    let file = file.map_err(|error| directory_error(&path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(DirectoryLock { _file: file })),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(directory_error(&path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of its allocations would take a lock for them (`.cargo/config.toml`).
    #[tokio::test]
    async fn sqlite_keeps_no_statistics_of_memory() {
        let mut memory = SqliteConnectOptions::new().in_memory(true).connect().await.unwrap();
        let options = sqlx::query_scalar("SELECT compile_options FROM pragma_compile_options");
        let options: Vec<String> = options.fetch_all(&mut memory).await.unwrap();
        assert!(options.iter().any(|option| option == "DEFAULT_MEMSTATUS=0"), "{options:?}");
    }

    #[test]
    fn every_migration_of_the_folder_is_run() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let name = |version: i64, ending: &str| {
            let (_, description, _) = MIGRATIONS.iter().find(|(of, ..)| *of == version).unwrap();
            format!("{version:04}_{description}{ending}.sql")
        };
        let mut known: Vec<String> =
            MIGRATIONS.iter().map(|(version, ..)| name(*version, "")).collect();
        for (version, _) in OF_EACH_ENGINE {
            known.extend([name(*version, ".postgres"), name(*version, ".sqlite")]);
        }
        known.sort();
        assert_eq!(names, known);
    }
}
