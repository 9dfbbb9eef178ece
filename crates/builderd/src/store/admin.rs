//! What an operator does with a whole database: move it, check it, back it up. Knows rows, not
//! what they are for.

use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sqlx::sqlite::SqliteJournalMode;
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

use super::engine::{Query, Row, Tx, Value, sql};
use super::open::{DATABASE_FILE, NEWEST_MIGRATION, lock, sqlite_options};
use super::{Store, StoreError};
use crate::build::state::{BuildState, Happening};
use crate::private;

/// Rows read at once while a table is copied.
const BATCH: usize = 500;
/// Rows written by one statement.
const ROWS_AT_ONCE: usize = 50;
/// What stands behind a database's name in the names of files that SQLite takes for its newest
/// changes, whatever database lies beside them (sqlite.org, "How To Corrupt", 1.4).
const CHANGES: [&str; 2] = ["-wal", "-journal"];

/// Why an operator's work on the database was not done.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// A database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The database to copy to is in use.
    #[error("the target has rows in its table {table}: copy to an empty database")]
    NotEmpty {
        /// Where the rows are.
        table: &'static str,
    },
    /// The database to copy has what this version does not know, and would leave out.
    #[error(
        "a newer version has changed the database (migration {migration}; this one knows those up \
         to {}): copy it with that version",
        NEWEST_MIGRATION
    )]
    Newer {
        /// The newest change.
        migration: i64,
    },
    /// The copy is not complete; nothing was kept of it.
    #[error("table {table}: {copied} rows arrived of {rows}; the target was left empty")]
    Incomplete {
        /// Which.
        table: &'static str,
        /// How many there are.
        rows: u64,
        /// How many there were in the copy.
        copied: u64,
    },
    /// A file cannot be read or written.
    #[error("{path:?}: {problem}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
}

/// Something that the database should never hold.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// What should be.
    pub rule: &'static str,
    /// Where it is not: a tenant, a build, an artifact.
    pub subject: String,
}

/// A table that was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Its name.
    pub table: &'static str,
    /// Its rows.
    pub rows: u64,
}

/// How a column's values are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Int,
    Text,
    Bytes,
}

/// A table, for copying.
struct Table {
    name: &'static str,
    /// The first columns are the key.
    keys: usize,
    columns: &'static [(&'static str, Kind)],
}

use Kind::{Bytes, Int, Text};

/// Every table, referenced ones first.
const TABLES: &[Table] = &[
    Table {
        name: "tenant",
        keys: 1,
        columns: &[
            ("id", Text),
            ("tier", Text),
            ("is_set_up", Int),
            ("limits", Text),
            ("weight", Int),
            ("running_max", Int),
            ("virtual_time", Int),
            ("queued", Int),
            ("running", Int),
            ("completed", Int),
            ("failed", Int),
            ("cancelled", Int),
            ("timed_out", Int),
            ("storage_bytes", Int),
            ("compute_us", Int),
        ],
    },
    Table {
        name: "tenant_day",
        keys: 2,
        columns: &[
            ("tenant_id", Text),
            ("day", Int),
            ("created", Int),
            ("deleted", Int),
            ("completed", Int),
            ("failed", Int),
        ],
    },
    Table {
        name: "artifact",
        keys: 1,
        columns: &[
            ("artifact_key", Text),
            ("size_bytes", Int),
            ("sha256", Text),
            ("created_at", Int),
        ],
    },
    Table {
        name: "artifact_name",
        keys: 2,
        columns: &[
            ("sharing_domain", Text),
            ("recipe", Text),
            ("artifact_key", Text),
            ("result", Text),
        ],
    },
    Table {
        name: "tenant_artifact",
        keys: 2,
        columns: &[("tenant_id", Text), ("artifact_key", Text), ("builds", Int)],
    },
    Table {
        name: "build",
        keys: 2,
        columns: &[
            ("tenant_id", Text),
            ("id", Text),
            ("state", Text),
            ("created_at", Int),
            ("run_at", Int),
            ("updated_at", Int),
            ("started_at", Int),
            ("ended_at", Int),
            ("attempt", Int),
            ("attempt_started_at", Int),
            ("wall_us", Int),
            ("progress_percent", Int),
            ("lease_token", Int),
            ("lease_owner", Text),
            ("lease_expires_at", Int),
            ("cancel_requested_at", Int),
            ("artifact_key", Text),
            ("artifact_bytes", Int),
            ("event_seq", Int),
            ("log_lines", Int),
            ("log_bytes", Int),
            ("log_is_cut", Int),
            ("step", Text),
            ("cancel_reason", Text),
            ("tier", Text),
            ("customer", Text),
            ("traceparent", Text),
            ("idempotency_key", Text),
            ("request_hash", Text),
            ("sealed_credentials", Bytes),
            ("limits", Text),
            ("request", Text),
            ("attempts", Text),
            ("failure", Text),
            ("result", Text),
            ("live_usage", Text),
            ("unread_tries", Int),
            ("created_by", Text),
            ("revision", Int),
            ("organization", Text),
            ("rights", Text),
            ("cancelled_by", Text),
        ],
    },
    Table {
        name: "build_event",
        keys: 3,
        columns: &[
            ("tenant_id", Text),
            ("build_id", Text),
            ("seq", Int),
            ("happened_at", Int),
            ("from_state", Text),
            ("to_state", Text),
            ("lease_token", Int),
            ("actor", Text),
        ],
    },
    Table {
        name: "build_log",
        keys: 3,
        columns: &[
            ("tenant_id", Text),
            ("build_id", Text),
            ("line", Int),
            ("said_at", Int),
            ("level", Text),
            ("component", Text),
            ("message", Text),
        ],
    },
    Table {
        name: "api_token",
        keys: 1,
        columns: &[
            ("id", Text),
            ("secret_hash", Text),
            ("tenant_id", Text),
            ("customer", Text),
            ("rights", Text),
            ("note", Text),
            ("created_at", Int),
            ("expires_at", Int),
            ("revoked_at", Int),
            ("organization", Text),
        ],
    },
    Table { name: "master_key", keys: 1, columns: &[("id", Text), ("place", Int)] },
    Table {
        name: "tenant_key",
        keys: 2,
        columns: &[
            ("tenant_id", Text),
            ("id", Text),
            ("wrapped", Bytes),
            ("wrapped_by", Text),
            ("created_at", Int),
            ("retired_at", Int),
        ],
    },
    Table {
        name: "artifact_removal",
        keys: 1,
        columns: &[("artifact_key", Text), ("expires_at", Int)],
    },
    Table { name: "heartbeat", keys: 1, columns: &[("place", Int), ("beats", Int)] },
    Table {
        name: "audit_stream",
        keys: 1,
        columns: &[
            ("tenant_id", Text),
            ("first_number", Int),
            ("base_hash", Text),
            ("last_number", Int),
            ("last_hash", Text),
        ],
    },
    Table {
        name: "audit",
        keys: 2,
        columns: &[
            ("tenant_id", Text),
            ("number", Int),
            ("happened_at", Int),
            ("subject", Text),
            ("action", Text),
            ("object", Text),
            ("outcome", Text),
            ("peer", Text),
            ("request", Text),
            ("hash", Text),
        ],
    },
];

/// `$first, ...`, so many.
fn places(first: usize, count: usize) -> String {
    let places: Vec<String> = (first..first + count).map(|place| format!("${place}")).collect();
    places.join(", ")
}

impl Table {
    fn names(&self, columns: usize) -> String {
        let names: Vec<&str> = self.columns.iter().take(columns).map(|(name, _)| *name).collect();
        names.join(", ")
    }

    async fn count(&self, tx: &mut Tx) -> Result<u64, StoreError> {
        let query = Query::assembled(format!("SELECT COUNT(*) AS found FROM {}", self.name));
        tx.one(query).await?.count("found")
    }

    /// Rows behind `last`, in the order of the key.
    async fn read(&self, tx: &mut Tx, last: &[Value]) -> Result<Vec<Vec<Value>>, StoreError> {
        let key = self.names(self.keys);
        let behind = match last.is_empty() {
            true => String::new(),
            false => format!("WHERE ({key}) > ({})", places(1, self.keys)),
        };
        let all = self.names(self.columns.len());
        let query = Query::assembled(format!(
            "SELECT {all} FROM {} {behind} ORDER BY {key} LIMIT {BATCH}",
            self.name
        ));
        let query = last.iter().take(self.keys).cloned().fold(query, Query::value);
        tx.all(query).await?.iter().map(|row| self.values(row)).collect()
    }

    fn values(&self, row: &Row) -> Result<Vec<Value>, StoreError> {
        let value = |(name, kind): &(&str, Kind)| -> Result<Value, StoreError> {
            Ok(match kind {
                Int => Value::Int(row.maybe_int(name)?),
                Text => Value::Text(row.maybe_text(name)?),
                Bytes => Value::Bytes(row.bytes(name)?),
            })
        };
        self.columns.iter().map(value).collect()
    }

    async fn write(&self, tx: &mut Tx, rows: Vec<Vec<Value>>) -> Result<(), StoreError> {
        let width = self.columns.len();
        for rows in rows.chunks(ROWS_AT_ONCE) {
            let tuples: Vec<String> = (0..rows.len())
                .map(|row| format!("({})", places(1 + row * width, width)))
                .collect();
            let query = Query::assembled(format!(
                "INSERT INTO {} ({}) VALUES {}",
                self.name,
                self.names(width),
                tuples.join(", ")
            ));
            let query = rows.iter().flatten().cloned().fold(query, Query::value);
            tx.execute(query).await?;
        }
        Ok(())
    }

    async fn copy(&self, from: &mut Tx, to: &mut Tx) -> Result<Copied, AdminError> {
        let mut last: Vec<Value> = Vec::new();
        loop {
            let rows = self.read(from, &last).await?;
            let Some(end) = rows.last() else { break };
            last = end.clone();
            self.write(to, rows).await?;
        }
        let (rows, copied) = (self.count(from).await?, self.count(to).await?);
        match rows == copied {
            true => Ok(Copied { table: self.name, rows }),
            false => Err(AdminError::Incomplete { table: self.name, rows, copied }),
        }
    }
}

/// Copies everything from one database to another, empty one: all of it or nothing. Nobody else
/// may write to either meanwhile.
///
/// # Errors
/// [`AdminError::NotEmpty`], [`AdminError::Newer`], [`AdminError::Incomplete`]
pub async fn migrate_store(from: &Store, to: &Store) -> Result<Vec<Copied>, AdminError> {
    let mut source = from.rows.engine.snapshot().await?;
    let newest = sql("SELECT MAX(version) AS migration FROM _sqlx_migrations");
    let migration = source.one(newest).await?.int("migration")?;
    if migration > NEWEST_MIGRATION {
        return Err(AdminError::Newer { migration });
    }
    let mut target = to.rows.engine.begin().await?;
    for table in TABLES {
        if table.count(&mut target).await? > 0 {
            return Err(AdminError::NotEmpty { table: table.name });
        }
    }
    let mut copied = Vec::new();
    for table in TABLES {
        copied.push(table.copy(&mut source, &mut target).await?);
    }
    target.commit().await?;
    source.rollback().await?;
    Ok(copied)
}

/// What should be, and a query for the subjects of which it is not true.
const RULES: &[(&str, &str)] = &[
    (
        "a build ends at most once",
        "SELECT tenant_id, build_id AS subject FROM build_event \
         WHERE to_state IN ('completed', 'failed', 'cancelled', 'timeout') \
         GROUP BY tenant_id, build_id HAVING COUNT(*) > 1",
    ),
    (
        "nothing happens to a build that has ended",
        "SELECT tenant_id, build_id AS subject FROM build_event \
         WHERE from_state IN ('completed', 'failed', 'cancelled', 'timeout')",
    ),
    (
        "every event begins where the one before it ended",
        "SELECT e.tenant_id, e.build_id AS subject FROM build_event e \
         LEFT JOIN build_event p ON p.tenant_id = e.tenant_id AND p.build_id = e.build_id \
         AND p.seq = e.seq - 1 \
         WHERE e.from_state <> COALESCE(p.to_state, '') OR (p.seq IS NULL AND e.seq <> 1)",
    ),
    (
        "the last event tells the build's state",
        "SELECT b.tenant_id, b.id AS subject FROM build b \
         LEFT JOIN build_event e ON e.tenant_id = b.tenant_id AND e.build_id = b.id \
         AND e.seq = b.event_seq \
         WHERE e.to_state IS NULL OR e.to_state <> b.state OR b.event_seq <> \
         (SELECT COUNT(*) FROM build_event c WHERE c.tenant_id = b.tenant_id AND c.build_id = b.id)",
    ),
    (
        "a token never falls",
        "SELECT e.tenant_id, e.build_id AS subject FROM build_event e \
         JOIN build_event p ON p.tenant_id = e.tenant_id AND p.build_id = e.build_id \
         AND p.seq = e.seq - 1 WHERE e.lease_token < p.lease_token",
    ),
    (
        "a build's token is that of its last event",
        "SELECT b.tenant_id, b.id AS subject FROM build b \
         JOIN build_event e ON e.tenant_id = b.tenant_id AND e.build_id = b.id \
         AND e.seq = b.event_seq WHERE e.lease_token <> b.lease_token",
    ),
    (
        "a running build, and no other, has a lease",
        "SELECT tenant_id, id AS subject FROM build WHERE \
         (CASE WHEN state IN ('preparing', 'downloading', 'building', 'optimizing', 'packaging') \
          THEN 1 ELSE 0 END) <> (CASE WHEN lease_owner IS NULL THEN 0 ELSE 1 END)",
    ),
    (
        "a build that has ended has no credentials",
        "SELECT tenant_id, id AS subject FROM build \
         WHERE sealed_credentials IS NOT NULL \
         AND state IN ('completed', 'failed', 'cancelled', 'timeout')",
    ),
    (
        "a tenant's counters are the numbers of its builds",
        "SELECT t.id AS tenant_id, t.id AS subject FROM tenant t LEFT JOIN (SELECT tenant_id, \
         SUM(CASE WHEN state = 'queued' THEN 1 ELSE 0 END) AS queued, \
         SUM(CASE WHEN state = 'completed' THEN 1 ELSE 0 END) AS completed, \
         SUM(CASE WHEN state = 'failed' THEN 1 ELSE 0 END) AS failed, \
         SUM(CASE WHEN state = 'cancelled' THEN 1 ELSE 0 END) AS cancelled, \
         SUM(CASE WHEN state = 'timeout' THEN 1 ELSE 0 END) AS timed_out, \
         COUNT(*) AS builds FROM build GROUP BY tenant_id) b ON b.tenant_id = t.id \
         WHERE t.queued <> COALESCE(b.queued, 0) OR t.completed <> COALESCE(b.completed, 0) \
         OR t.failed <> COALESCE(b.failed, 0) OR t.cancelled <> COALESCE(b.cancelled, 0) \
         OR t.timed_out <> COALESCE(b.timed_out, 0) \
         OR t.queued + t.running + t.completed + t.failed + t.cancelled + t.timed_out \
         <> COALESCE(b.builds, 0)",
    ),
    (
        "a tenant's storage is the size of the artifacts that its builds have",
        "SELECT t.id AS tenant_id, t.id AS subject FROM tenant t LEFT JOIN \
         (SELECT k.tenant_id, SUM(a.size_bytes) AS size_bytes FROM \
          (SELECT DISTINCT tenant_id, artifact_key FROM build \
           WHERE state = 'completed' AND artifact_key IS NOT NULL) k \
          JOIN artifact a ON a.artifact_key = k.artifact_key GROUP BY k.tenant_id) s \
         ON s.tenant_id = t.id WHERE t.storage_bytes <> COALESCE(s.size_bytes, 0)",
    ),
    (
        "a tenant's claim on an artifact counts the builds that have it",
        "SELECT tenant_id, artifact_key AS subject FROM tenant_artifact k WHERE builds <> \
         (SELECT COUNT(*) FROM build b WHERE b.tenant_id = k.tenant_id \
          AND b.artifact_key = k.artifact_key AND b.state = 'completed') OR builds = 0",
    ),
    (
        "an artifact belongs to a build",
        "SELECT artifact_key AS tenant_id, artifact_key AS subject FROM artifact a \
         WHERE NOT EXISTS (SELECT b.id FROM build b WHERE b.artifact_key = a.artifact_key)",
    ),
    (
        "a sealed artifact has its key",
        "SELECT b.tenant_id, b.id AS subject FROM build b \
         WHERE b.state = 'completed' AND b.artifact_key LIKE '%/%.sealed-%' \
         AND NOT EXISTS (SELECT k.id FROM tenant_key k WHERE k.tenant_id = b.tenant_id \
         AND b.artifact_key LIKE '%.sealed-' || k.id)",
    ),
    (
        "a day's counter is the number of builds accepted on it",
        "SELECT d.tenant_id, d.tenant_id AS subject FROM tenant_day d WHERE \
         d.created - d.deleted <> (SELECT COUNT(*) FROM build b \
         WHERE b.tenant_id = d.tenant_id AND b.created_at >= d.day \
         AND b.created_at < d.day + 86400000000)",
    ),
    (
        "a log's lines are counted, and none is missing behind the first there is",
        "SELECT b.tenant_id, b.id AS subject FROM build b LEFT JOIN \
         (SELECT tenant_id, build_id, COUNT(*) AS found, MIN(line) AS first, MAX(line) AS last \
          FROM build_log GROUP BY tenant_id, build_id) l \
         ON l.tenant_id = b.tenant_id AND l.build_id = b.id \
         WHERE b.log_lines <> COALESCE(l.last + 1, 0) \
         OR COALESCE(l.last + 1 - l.first, 0) <> COALESCE(l.found, 0)",
    ),
    (
        "a stream of the audit log has every row from its first to its last",
        "SELECT s.tenant_id, 'the audit log' AS subject FROM audit_stream s LEFT JOIN \
         (SELECT tenant_id, COUNT(*) AS found, MIN(number) AS first, MAX(number) AS last \
          FROM audit GROUP BY tenant_id) a ON a.tenant_id = s.tenant_id \
         WHERE s.last_number - s.first_number + 1 <> COALESCE(a.found, 0) \
         OR s.first_number <> COALESCE(a.first, s.first_number) \
         OR s.last_number <> COALESCE(a.last, s.last_number)",
    ),
    (
        "a row of the audit log has a stream",
        "SELECT DISTINCT tenant_id, 'the audit log' AS subject FROM audit a WHERE NOT EXISTS \
         (SELECT s.tenant_id FROM audit_stream s WHERE s.tenant_id = a.tenant_id)",
    ),
];

/// Looks for what should never be in a database; empty when all is well. Reads everything.
///
/// # Errors
/// [`StoreError`]
pub async fn check(store: &Store) -> Result<Vec<Violation>, StoreError> {
    let mut tx = store.rows.engine.snapshot().await?;
    let mut violations = Vec::new();
    for &(rule, query) in RULES {
        for row in tx.all(sql(query)).await? {
            let (tenant, subject) = (row.text("tenant_id")?, row.text("subject")?);
            let subject = match tenant == subject {
                true => subject,
                false => format!("{tenant}: {subject}"),
            };
            violations.push(Violation { rule, subject });
        }
    }
    violations.extend(illegal_steps(&mut tx).await?);
    tx.rollback().await?;
    violations.sort();
    violations.dedup();
    Ok(violations)
}

/// Events that [`BuildState::next`] would not have allowed, or does not know.
async fn illegal_steps(tx: &mut Tx) -> Result<Vec<Violation>, StoreError> {
    let rule = "every step is one that the state machine has";
    let query = sql("SELECT DISTINCT from_state, to_state FROM build_event WHERE seq > 1");
    let mut violations = Vec::new();
    for row in tx.all(query).await? {
        let (from, to) = (row.text("from_state")?, row.text("to_state")?);
        if !is_step(&from, &to) {
            violations.push(Violation { rule, subject: format!("{from} to {to}") });
        }
    }
    Ok(violations)
}

fn is_step(from: &str, to: &str) -> bool {
    let (Ok(from), Ok(to)) = (from.parse::<BuildState>(), to.parse::<BuildState>()) else {
        return false;
    };
    let mut ways = [
        Happening::Claimed,
        Happening::Entered(to),
        Happening::Published,
        Happening::Failed,
        Happening::Released,
        Happening::Cancelled,
        Happening::TimedOut,
    ]
    .into_iter();
    ways.any(|happening| from.next(happening) == Ok(to))
}

fn file_error(path: &Path, problem: impl ToString) -> AdminError {
    AdminError::File { path: path.to_owned(), problem: problem.to_string() }
}

fn with_ending(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// What stands under another name until it is whole.
fn partial(file: &Path) -> PathBuf {
    with_ending(file, ".partial")
}

fn remove_if_there(path: &Path) -> Result<(), AdminError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(file_error(path, error)),
        _ => Ok(()),
    }
}

/// Gives a finished file its name, so that it survives a power failure.
fn publish(partial: &Path, file: &Path) -> Result<(), AdminError> {
    let publish = || {
        fs::set_permissions(partial, fs::Permissions::from_mode(0o600))?;
        File::open(partial)?.sync_all()?;
        fs::rename(partial, file)?;
        let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    };
    publish().map_err(|error: std::io::Error| file_error(file, error))
}

fn refuse_existing(file: &Path) -> Result<(), AdminError> {
    match file.exists() {
        true => Err(file_error(file, "it exists already: choose another name, or remove it")),
        false => Ok(()),
    }
}

/// Writes a copy of the SQLite database in `data_dir` to `file`, as it is at one moment; a
/// server may be using it. Registry credentials of builds that wait are left out: restored,
/// such a build fails and says that it needs them.
///
/// # Errors
/// [`AdminError::File`] if the file exists.
pub async fn backup(data_dir: &Path, file: &Path) -> Result<(), AdminError> {
    refuse_existing(file)?;
    let (source, partial) = (data_dir.join(DATABASE_FILE), partial(file));
    if !source.exists() {
        return Err(file_error(&source, "there is no database: look at the data directory"));
    }
    remove_if_there(&partial)?;
    let target = partial.to_str().ok_or_else(|| file_error(file, "the name is not UTF-8"))?;
    // Where it cannot be made, SQLite would say that it cannot open a database. It takes an empty
    // one (lang_vacuum.html), which nobody else may read.
    let made = File::options().write(true).create_new(true).mode(0o600).open(&partial);
    made.map_err(|error| file_error(file, error))?;
    let copied = async {
        let mut source = sqlite_options(&source).connect().await?;
        sqlx::query("VACUUM INTO $1").bind(target.to_owned()).execute(&mut source).await?;
        source.close().await?;
        let options = sqlite_options(&partial).journal_mode(SqliteJournalMode::Delete);
        let mut copy = options.connect().await?;
        let erase = "UPDATE build SET sealed_credentials = NULL \
             WHERE sealed_credentials IS NOT NULL";
        sqlx::query(erase).execute(&mut copy).await?;
        // What was erased must not lie in pages that nobody uses.
        sqlx::query("VACUUM").execute(&mut copy).await?;
        copy.close().await
    };
    let done = match copied.await.map_err(StoreError::from) {
        Ok(()) => publish(&partial, file),
        Err(error) => Err(error.into()),
    };
    if done.is_err() {
        // It may hold what a backup must not, and takes room on a disk that is full.
        remove_if_there(&partial)?;
    }
    done
}

/// Puts a [`backup`] into a data directory that has no database. The master key is not part of
/// a backup.
///
/// # Errors
/// [`AdminError::File`] if there is a database or what is left of one, or the backup is damaged.
pub async fn restore(file: &Path, data_dir: &Path) -> Result<(), AdminError> {
    private::make_directory(data_dir).map_err(|error| file_error(data_dir, error))?;
    let _lock = lock(data_dir).await?;
    let target = data_dir.join(DATABASE_FILE);
    refuse_existing(&target)?;
    for changes in CHANGES.map(|ending| with_ending(&target, ending)) {
        if changes.exists() {
            let problem = "it belongs to a database that is gone, and would be taken for a part of \
                           the restored one: move it away as well";
            return Err(file_error(&changes, problem));
        }
    }
    if !file.exists() {
        return Err(file_error(file, "there is no such file"));
    }
    let partial = partial(&target);
    fs::copy(file, &partial).map_err(|error| file_error(&partial, error))?;
    match inspect(&partial).await {
        Ok(()) => publish(&partial, &target),
        Err(problem) => {
            remove_if_there(&partial)?;
            Err(file_error(file, format!("it is damaged, or no backup of a store: {problem}")))
        }
    }
}

/// Whether a file is a whole database with our tables; else why not.
async fn inspect(file: &Path) -> Result<(), String> {
    let said = async {
        let options = sqlite_options(file).journal_mode(SqliteJournalMode::Delete);
        let mut copy = options.connect().await?;
        let said = sqlx::query("PRAGMA integrity_check").fetch_one(&mut copy).await?;
        sqlx::query("SELECT COUNT(*) FROM build").fetch_one(&mut copy).await?;
        copy.close().await?;
        said.try_get::<String, _>(0)
    };
    match said.await {
        Ok(said) if said == "ok" => Ok(()),
        Ok(said) => Err(said),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_table_and_column_of_the_schema_is_copied() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open_sqlite(directory.path()).await.unwrap();
        let engine = &store.rows.engine;
        let tables = "SELECT name FROM sqlite_master WHERE type = 'table' \
             AND name NOT LIKE '\\_sqlx%' ESCAPE '\\' ORDER BY name";
        let found = engine.all(sql(tables)).await.unwrap();
        let found: Vec<String> = found.iter().map(|row| row.text("name").unwrap()).collect();
        let mut known: Vec<&str> = TABLES.iter().map(|table| table.name).collect();
        known.sort_unstable();
        assert_eq!(found, known);
        for table in TABLES {
            let columns = "SELECT name, type FROM pragma_table_info($1)";
            let found = engine.all(sql(columns).text(table.name)).await.unwrap();
            let found: Vec<(String, Kind)> = found
                .iter()
                .map(|row| {
                    let kind = match row.text("type").unwrap().as_str() {
                        "BIGINT" => Int,
                        "TEXT" => Text,
                        "BYTEA" => Bytes,
                        other => panic!("{}: {other}", table.name),
                    };
                    (row.text("name").unwrap(), kind)
                })
                .collect();
            let known: Vec<(String, Kind)> =
                table.columns.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect();
            assert_eq!(found, known, "{}", table.name);
        }
    }
}
