//! Connections to SQLite's file for single statements that read.
//!
//! They are never given back. A pool pings a connection each time it comes back, in a task of its
//! own, which costs as much as the statement that was sent.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::sync::{Mutex, MutexGuard};

use super::engine::Query;

/// As many as read at once.
const READERS: usize = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Readers {
    options: SqliteConnectOptions,
    /// Each is opened when it is first needed, and anew if it broke.
    connections: [Mutex<Option<SqliteConnection>>; READERS],
    /// How often all of them were in use.
    waited: AtomicUsize,
    is_closed: AtomicBool,
}

impl Readers {
    /// Connections of these `options`, none of which is opened yet.
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        Self {
            options,
            connections: Default::default(),
            waited: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
        }
    }

    /// Every row of the answer.
    ///
    /// # Errors
    /// [`sqlx::Error`]
    pub(super) async fn all(&self, query: Query) -> sqlx::Result<Vec<SqliteRow>> {
        let mut reader = self.free().await;
        let read = query.sqlite().fetch_all(self.opened(&mut reader).await?).await;
        read.inspect_err(|error| close_broken(&mut reader, error))
    }

    /// The first row of the answer, if there is one.
    ///
    /// # Errors
    /// [`sqlx::Error`]
    pub(super) async fn optional(&self, query: Query) -> sqlx::Result<Option<SqliteRow>> {
        let mut reader = self.free().await;
        let read = query.sqlite().fetch_optional(self.opened(&mut reader).await?).await;
        read.inspect_err(|error| close_broken(&mut reader, error))
    }

    /// Waits until each is closed; whoever asks later gets an error.
    pub(super) async fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        for reader in &self.connections {
            if let Some(open) = reader.lock().await.take() {
                // It has read, and there is nothing to be lost.
                let _ = open.close().await;
            }
        }
    }

    /// One that nobody uses; whoever finds none waits for the next in turn.
    async fn free(&self) -> MutexGuard<'_, Option<SqliteConnection>> {
        if let Some(free) = self.connections.iter().find_map(|reader| reader.try_lock().ok()) {
            return free;
        }
        let turn = self.waited.fetch_add(1, Ordering::Relaxed);
        self.connections[turn % READERS].lock().await
    }

    async fn opened<'a>(
        &self,
        reader: &'a mut Option<SqliteConnection>,
    ) -> sqlx::Result<&'a mut SqliteConnection> {
        let opened = match reader.take() {
            _ if self.is_closed.load(Ordering::SeqCst) => return Err(sqlx::Error::PoolClosed),
            Some(open) => open,
            None => self.options.connect().await?,
        };
        Ok(reader.insert(opened))
    }
}

/// A connection whose thread is gone answers nobody any more.
fn close_broken(reader: &mut Option<SqliteConnection>, error: &sqlx::Error) {
    if matches!(error, sqlx::Error::WorkerCrashed) {
        *reader = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::sql;

    /// Counts up to `$1`, which takes as long.
    const COUNT: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1) \
                         SELECT COUNT(*) AS found FROM n";

    async fn count(readers: &Readers, to: i64) -> i64 {
        use sqlx::Row as _;
        let row = readers.optional(sql(COUNT).int(to)).await.unwrap().unwrap();
        row.get("found")
    }

    fn readers() -> Readers {
        Readers::new(SqliteConnectOptions::new().in_memory(true))
    }

    async fn opened(readers: &Readers) -> usize {
        let mut opened = 0;
        for reader in &readers.connections {
            opened += usize::from(reader.lock().await.is_some());
        }
        opened
    }

    #[tokio::test]
    async fn more_who_read_than_connections_all_get_their_rows() {
        let readers = readers();
        assert_eq!(count(&readers, 1).await, 1);
        assert_eq!(opened(&readers).await, 1, "one after the other shares one");
        let counts = (1..=100).map(|to| count(&readers, to));
        assert_eq!(futures_util::future::join_all(counts).await, Vec::from_iter(1..=100));
        assert_eq!(opened(&readers).await, READERS);
    }

    #[tokio::test]
    async fn who_stops_waiting_leaves_a_connection_that_reads() {
        let readers = readers();
        for _ in 0..2 * READERS {
            let long =
                tokio::time::timeout(std::time::Duration::from_millis(1), count(&readers, 300_000));
            assert!(long.await.is_err());
        }
        let counts = (1..=10).map(|to| count(&readers, to));
        assert_eq!(futures_util::future::join_all(counts).await, Vec::from_iter(1..=10));
    }

    #[tokio::test]
    async fn a_statement_that_fails_leaves_a_connection_that_reads() {
        let readers = readers();
        assert!(readers.all(sql("SELECT * FROM nothing")).await.is_err());
        assert_eq!(count(&readers, 7).await, 7);
        close_broken(&mut *readers.connections[0].lock().await, &sqlx::Error::WorkerCrashed);
        assert_eq!(opened(&readers).await, 0);
        assert_eq!(count(&readers, 7).await, 7, "it was opened anew");
    }

    #[tokio::test]
    async fn nothing_is_opened_again_when_all_are_closed() {
        let readers = readers();
        assert_eq!(count(&readers, 1).await, 1);
        readers.close().await;
        assert!(readers.all(sql("SELECT 1")).await.is_err());
        assert_eq!(opened(&readers).await, 0);
    }
}
