//! Two databases behind one face: a statement with its values goes in, rows come out.
//!
//! The text of a statement is the same for both. What differs is here: how a transaction
//! begins, names of functions, and that PostgreSQL locks rows where SQLite has one writer anyway,
//! so that SQLite gets a statement without its closing ` FOR ...`. It does not know what the tables mean.

use std::borrow::Cow;

use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Decode, PgPool, Postgres, Row as _, Sqlite, SqlitePool, Type};

use super::StoreError;
use super::readers::Readers;
use crate::build::record::Micros;

/// A database.
#[derive(Debug)]
pub(super) enum Engine {
    /// A file: one connection writes, some read.
    Sqlite {
        /// The one that writes.
        write: SqlitePool,
        /// Those that read in one statement.
        read: Box<Readers>,
        /// Those that read in several, of one view.
        view: SqlitePool,
    },
    /// A server.
    Postgres(PgPool),
}

/// A transaction; undone unless it is committed.
pub(super) enum Tx {
    Sqlite(sqlx::Transaction<'static, Sqlite>),
    Postgres(sqlx::Transaction<'static, Postgres>),
}

/// A statement with its values.
#[derive(Clone, Debug)]
pub(super) struct Query {
    text: Cow<'static, str>,
    /// Where PostgreSQL has another word for the same.
    postgres: Option<&'static str>,
    values: Vec<Value>,
}

/// A value of one of the three types that the schema has.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Int(Option<i64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
}

/// A statement whose values follow in the order of its `$1`, `$2`, ...
pub(super) fn sql(text: &'static str) -> Query {
    Query { text: Cow::Borrowed(text), postgres: None, values: Vec::new() }
}

/// One statement in two dialects: for what both databases do and call differently.
pub(super) fn either(sqlite: &'static str, postgres: &'static str) -> Query {
    Query { postgres: Some(postgres), ..sql(sqlite) }
}

impl Query {
    /// A statement put together by the program; never of what came from outside.
    pub(super) fn assembled(text: String) -> Self {
        Self { text: Cow::Owned(text), postgres: None, values: Vec::new() }
    }

    pub(super) fn value(mut self, value: Value) -> Self {
        self.values.push(value);
        self
    }

    pub(super) fn int(self, value: impl Into<Option<i64>>) -> Self {
        self.value(Value::Int(value.into()))
    }

    /// A number that has no sign in the program; the database's largest stands for larger ones.
    pub(super) fn count(self, value: u64) -> Self {
        self.int(signed(value))
    }

    pub(super) fn at(self, value: impl Into<Option<Micros>>) -> Self {
        self.int(value.into().map(|at| at.0))
    }

    pub(super) fn text(self, value: &str) -> Self {
        self.value(Value::Text(Some(storable(value))))
    }

    pub(super) fn maybe_text(self, value: Option<&str>) -> Self {
        self.value(Value::Text(value.map(storable)))
    }

    pub(super) fn bytes(self, value: Option<Vec<u8>>) -> Self {
        self.value(Value::Bytes(value))
    }

    pub(super) fn sqlite(
        self,
    ) -> sqlx::query::Query<'static, Sqlite, <Sqlite as sqlx::Database>::Arguments> {
        let text = match self.text {
            Cow::Borrowed(text) => Cow::Borrowed(without_locks(text)),
            Cow::Owned(text) => Cow::Owned(text),
        };
        let query = sqlx::query(AssertSqlSafe(text));
        self.values.into_iter().fold(query, |query, value| match value {
            Value::Int(value) => query.bind(value),
            Value::Text(value) => query.bind(value),
            Value::Bytes(value) => query.bind(value),
        })
    }

    fn postgres(
        self,
    ) -> sqlx::query::Query<'static, Postgres, <Postgres as sqlx::Database>::Arguments> {
        let text = self.postgres.map_or(self.text, Cow::Borrowed);
        let query = sqlx::query(AssertSqlSafe(text));
        self.values.into_iter().fold(query, |query, value| match value {
            Value::Int(value) => query.bind(value),
            Value::Text(value) => query.bind(value),
            Value::Bytes(value) => query.bind(value),
        })
    }
}

/// The statement up to its closing ` FOR ...`.
fn without_locks(text: &'static str) -> &'static str {
    text.rfind(" FOR ").map_or(text, |end| &text[..end])
}

/// PostgreSQL refuses NUL in a text.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// Counts as the database has them.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Engine {
    /// A transaction that may write.
    pub(super) async fn begin(&self) -> Result<Tx, StoreError> {
        Ok(match self {
            // A transaction that reads first and writes later would fail when another has
            // written in between; one that announces itself waits.
            Self::Sqlite { write, .. } => Tx::Sqlite(write.begin_with("BEGIN IMMEDIATE").await?),
            Self::Postgres(pool) => Tx::Postgres(pool.begin().await?),
        })
    }

    /// A transaction that reads, with one view of everything.
    pub(super) async fn snapshot(&self) -> Result<Tx, StoreError> {
        const VIEW: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY";
        Ok(match self {
            Self::Sqlite { view, .. } => Tx::Sqlite(view.begin().await?),
            Self::Postgres(pool) => Tx::Postgres(pool.begin_with(VIEW).await?),
        })
    }

    /// One statement that reads.
    pub(super) async fn all(&self, query: Query) -> Result<Vec<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite { read, .. } => {
                read.all(query).await?.into_iter().map(Row::Sqlite).collect()
            }
            Self::Postgres(pool) => {
                query.postgres().fetch_all(pool).await?.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    /// One statement that reads at most one row.
    pub(super) async fn optional(&self, query: Query) -> Result<Option<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite { read, .. } => read.optional(query).await?.map(Row::Sqlite),
            Self::Postgres(pool) => query.postgres().fetch_optional(pool).await?.map(Row::Postgres),
        })
    }

    /// One statement that writes; how many rows it touched.
    pub(super) async fn execute(&self, query: Query) -> Result<u64, StoreError> {
        Ok(match self {
            Self::Sqlite { write, .. } => query.sqlite().execute(write).await?.rows_affected(),
            Self::Postgres(pool) => query.postgres().execute(pool).await?.rows_affected(),
        })
    }

    /// Waits until every connection is closed.
    pub(super) async fn close(&self) {
        match self {
            Self::Sqlite { write, read, view } => {
                read.close().await;
                view.close().await;
                write.close().await;
            }
            Self::Postgres(pool) => pool.close().await,
        }
    }
}

impl Tx {
    pub(super) async fn all(&mut self, query: Query) -> Result<Vec<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite(tx) => {
                query.sqlite().fetch_all(&mut **tx).await?.into_iter().map(Row::Sqlite).collect()
            }
            Self::Postgres(tx) => {
                let rows = query.postgres().fetch_all(&mut **tx).await?;
                rows.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    pub(super) async fn optional(&mut self, query: Query) -> Result<Option<Row>, StoreError> {
        Ok(match self {
            Self::Sqlite(tx) => query.sqlite().fetch_optional(&mut **tx).await?.map(Row::Sqlite),
            Self::Postgres(tx) => {
                query.postgres().fetch_optional(&mut **tx).await?.map(Row::Postgres)
            }
        })
    }

    /// The row of a statement that always has one.
    pub(super) async fn one(&mut self, query: Query) -> Result<Row, StoreError> {
        let row = self.optional(query).await?;
        row.ok_or_else(|| StoreError::Corrupt("a row that always exists is missing".into()))
    }

    pub(super) async fn execute(&mut self, query: Query) -> Result<u64, StoreError> {
        Ok(match self {
            Self::Sqlite(tx) => query.sqlite().execute(&mut **tx).await?.rows_affected(),
            Self::Postgres(tx) => query.postgres().execute(&mut **tx).await?.rows_affected(),
        })
    }

    pub(super) async fn commit(self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(tx) => tx.commit().await?,
            Self::Postgres(tx) => tx.commit().await?,
        }
        Ok(())
    }

    pub(super) async fn rollback(self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(tx) => tx.rollback().await?,
            Self::Postgres(tx) => tx.rollback().await?,
        }
        Ok(())
    }

    /// The clock that leases live by: the server's, so that a node whose clock is wrong takes
    /// nobody's lease; with a file there is one node, and `now` is its clock.
    pub(super) async fn lease_clock(&mut self, now: Micros) -> Result<Micros, StoreError> {
        const CLOCK: &str =
            "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT) AS micros";
        match self {
            Self::Sqlite(_) => Ok(now),
            Self::Postgres(_) => self.one(sql(CLOCK)).await?.at("micros"),
        }
    }
}

/// A row of an answer.
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    fn get<T>(&self, column: &str) -> Result<T, StoreError>
    where
        T: for<'r> Decode<'r, Sqlite> + Type<Sqlite>,
        T: for<'r> Decode<'r, Postgres> + Type<Postgres>,
    {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    pub(super) fn int(&self, column: &str) -> Result<i64, StoreError> {
        self.get(column)
    }

    pub(super) fn maybe_int(&self, column: &str) -> Result<Option<i64>, StoreError> {
        self.get(column)
    }

    /// A number that cannot be below zero.
    pub(super) fn count(&self, column: &str) -> Result<u64, StoreError> {
        let value = self.int(column)?;
        let below = |_| StoreError::Corrupt(format!("{column} is {value}"));
        u64::try_from(value).map_err(below)
    }

    /// A small number that cannot be below zero.
    pub(super) fn small(&self, column: &str) -> Result<u32, StoreError> {
        let value = self.int(column)?;
        u32::try_from(value).map_err(|_| StoreError::Corrupt(format!("{column} is {value}")))
    }

    pub(super) fn at(&self, column: &str) -> Result<Micros, StoreError> {
        Ok(Micros(self.int(column)?))
    }

    pub(super) fn maybe_at(&self, column: &str) -> Result<Option<Micros>, StoreError> {
        Ok(self.maybe_int(column)?.map(Micros))
    }

    pub(super) fn text(&self, column: &str) -> Result<String, StoreError> {
        self.get(column)
    }

    pub(super) fn maybe_text(&self, column: &str) -> Result<Option<String>, StoreError> {
        self.get(column)
    }

    pub(super) fn bytes(&self, column: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.get(column)
    }

    /// A text that is the name of something.
    pub(super) fn parsed<T: std::str::FromStr>(&self, column: &str) -> Result<T, StoreError> {
        let text = self.text(column)?;
        text.parse().map_err(|_| StoreError::Corrupt(format!("{column} is {text:?}")))
    }

    /// A text that is JSON.
    pub(super) fn json<T: serde::de::DeserializeOwned>(
        &self,
        column: &str,
    ) -> Result<T, StoreError> {
        from_json(column, &self.text(column)?)
    }

    /// A text that is JSON, or nothing.
    pub(super) fn maybe_json<T: serde::de::DeserializeOwned>(
        &self,
        column: &str,
    ) -> Result<Option<T>, StoreError> {
        self.maybe_text(column)?.map(|text| from_json(column, &text)).transpose()
    }
}

fn from_json<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text)
        .map_err(|error| StoreError::Corrupt(format!("{column} cannot be read: {error}")))
}

/// A value as the JSON that [`Row::json`] reads.
pub(super) fn to_json<T: serde::Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value)
        .map_err(|error| StoreError::Corrupt(format!("a value cannot be written: {error}")))
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match kind(&error) {
            Kind::Unavailable => Self::Unavailable(error),
            Kind::Full => Self::Full(error),
            Kind::Corrupt => Self::Corrupt(error.to_string()),
            Kind::Other => Self::Database(error),
        }
    }
}

enum Kind {
    Unavailable,
    Full,
    Corrupt,
    Other,
}

fn kind(error: &sqlx::Error) -> Kind {
    use sqlx::Error;
    if let Error::Database(said) = error {
        return match said.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() {
            Some(said) => postgres_kind(said.code()),
            None => sqlite_kind(said.code().as_deref().unwrap_or_default()),
        };
    }
    if let Error::Io(io) = error {
        let is_full = io.kind() == std::io::ErrorKind::StorageFull;
        return if is_full { Kind::Full } else { Kind::Unavailable };
    }
    // SQLite keeps whatever is put into a column.
    if matches!(error, Error::ColumnDecode { .. }) {
        return Kind::Corrupt;
    }
    let is_away = matches!(
        error,
        Error::Tls(_)
            | Error::PoolTimedOut
            | Error::PoolClosed
            | Error::WorkerCrashed
            | Error::Protocol(_)
            | Error::BeginFailed
    );
    if is_away { Kind::Unavailable } else { Kind::Other }
}

/// PostgreSQL, appendix A: error codes.
fn postgres_kind(code: &str) -> Kind {
    match code {
        // disk_full
        "53100" => Kind::Full,
        // serialization_failure, deadlock_detected: tried again before anybody hears of it.
        "40001" | "40P01" => Kind::Unavailable,
        // lock_not_available, query_canceled, read_only_sql_transaction (a stand-by), io_error
        "55P03" | "57014" | "25006" | "58030" => Kind::Unavailable,
        // data_corrupted, index_corrupted
        "XX001" | "XX002" => Kind::Corrupt,
        // connection_exception, insufficient_resources, operator_intervention
        _ if ["08", "53", "57"].iter().any(|class| code.starts_with(class)) => Kind::Unavailable,
        // invalid_authorization_specification, invalid_catalog_name
        _ if code.starts_with("28") || code == "3D000" => Kind::Unavailable,
        _ => Kind::Other,
    }
}

/// SQLite, "Result and Error Codes": the low byte is the primary code.
fn sqlite_kind(code: &str) -> Kind {
    match code.parse::<u32>().unwrap_or_default() & 0xff {
        // SQLITE_FULL
        13 => Kind::Full,
        // SQLITE_BUSY, SQLITE_LOCKED, SQLITE_READONLY, SQLITE_IOERR, SQLITE_CANTOPEN
        5 | 6 | 8 | 10 | 14 => Kind::Unavailable,
        // SQLITE_CORRUPT, SQLITE_NOTADB
        11 | 26 => Kind::Corrupt,
        _ => Kind::Other,
    }
}

/// Whether a database can be read and not written.
pub(super) fn is_read_only(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(said) = error else { return false };
    let code = said.code().unwrap_or_default();
    match said.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() {
        // read_only_sql_transaction
        Some(_) => code == "25006",
        // SQLITE_READONLY
        None => code.parse::<u32>().is_ok_and(|code| code & 0xff == 8),
    }
}

/// Whether a database refuses what a row would become: a check or a key forbids it, a number has no
/// room.
pub(super) fn is_refused_row(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(said) = error else { return false };
    let code = said.code().unwrap_or_default();
    match said.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() {
        // Classes data_exception and integrity_constraint_violation.
        Some(_) => code.starts_with("22") || code.starts_with("23"),
        // SQLITE_CONSTRAINT
        None => code.parse::<u32>().is_ok_and(|code| code & 0xff == 19),
    }
}

/// Whether two transactions got in each other's way, so that the loser should just try again.
pub(super) fn is_conflict(error: &StoreError) -> bool {
    let StoreError::Unavailable(sqlx::Error::Database(said)) = error else { return false };
    matches!(said.code().as_deref(), Some("40001" | "40P01"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlite_sees_no_locking_clause() {
        let locked = "SELECT id FROM tenant WHERE id = $1 FOR NO KEY UPDATE OF t SKIP LOCKED";
        assert_eq!(without_locks(locked), "SELECT id FROM tenant WHERE id = $1");
        assert_eq!(without_locks("SELECT 1"), "SELECT 1");
    }

    #[test]
    fn no_text_brings_a_nul() {
        assert_eq!(storable("a\0b"), "a\u{fffd}b");
    }

    #[test]
    fn a_full_disk_and_a_lost_database_are_told_apart() {
        assert!(matches!(sqlite_kind("13"), Kind::Full));
        // SQLITE_IOERR_WRITE, SQLITE_BUSY_SNAPSHOT
        assert!(matches!(sqlite_kind("778"), Kind::Unavailable));
        assert!(matches!(sqlite_kind("517"), Kind::Unavailable));
        // SQLITE_CONSTRAINT_UNIQUE
        assert!(matches!(sqlite_kind("2067"), Kind::Other));
        assert!(matches!(postgres_kind("53100"), Kind::Full));
        for code in ["57P01", "57P03", "08006", "53300", "40001"] {
            assert!(matches!(postgres_kind(code), Kind::Unavailable), "{code}");
        }
        assert!(matches!(postgres_kind("23505"), Kind::Other));
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(matches!(StoreError::from(sqlx::Error::Io(full)), StoreError::Full(_)));
        assert!(matches!(StoreError::from(sqlx::Error::PoolTimedOut), StoreError::Unavailable(_)));
    }
}
