//! Connections to SQLite's file for single statements that read.
//!
//! They are never given back. A pool pings a connection each time it comes back, in a task of its
//! own, which costs as much as the statement that was sent.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::engine::Query;

/// As many as read at once.
const READERS: u32 = 4;

/// A connection; none before the first statement, and where one broke.
type Slot = Option<SqliteConnection>;

/// See the module.
#[derive(Debug)]
pub(super) struct Readers {
    options: SqliteConnectOptions,
    wait_max: Duration,
    /// A permit for each of the slots.
    places: Semaphore,
    /// Those that nobody uses. What was used last is at the back, and taken first: it has the
    /// statements prepared.
    slots: Mutex<VecDeque<Slot>>,
}

impl Readers {
    /// Connections of these `options`, none of which is opened yet. For one of them a caller waits
    /// no longer than `wait_max`.
    pub(super) fn new(options: SqliteConnectOptions, wait_max: Duration) -> Self {
        let slots: VecDeque<Slot> = (0..READERS).map(|_| None).collect();
        let places = Semaphore::new(slots.len());
        Self { options, wait_max, places, slots: Mutex::new(slots) }
    }

    /// Every row of the answer.
    ///
    /// # Errors
    /// [`sqlx::Error`]
    pub(super) async fn all(&self, query: Query) -> sqlx::Result<Vec<SqliteRow>> {
        let mut reader = self.free().await?;
        let read = query.sqlite().fetch_all(reader.opened().await?).await;
        reader.ended(read)
    }

    /// The first row of the answer, if there is one.
    ///
    /// # Errors
    /// [`sqlx::Error`]
    pub(super) async fn optional(&self, query: Query) -> sqlx::Result<Option<SqliteRow>> {
        let mut reader = self.free().await?;
        let read = query.sqlite().fetch_optional(reader.opened().await?).await;
        reader.ended(read)
    }

    /// Waits until each is closed; whoever asks later gets an error.
    pub(super) async fn close(&self) {
        // Those who came before have had their turn.
        let all = self.places.acquire_many(READERS).await;
        self.places.close();
        drop(all);
        let slots = std::mem::take(&mut *self.slots());
        for open in slots.into_iter().flatten() {
            // It has read, and there is nothing to be lost.
            let _ = open.close().await;
        }
    }

    /// One that nobody uses; whoever finds none waits for the first that is free again.
    async fn free(&self) -> sqlx::Result<Reader<'_>> {
        let place = tokio::time::timeout(self.wait_max, self.places.acquire()).await;
        let place = place.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let place = place.map_err(|_| sqlx::Error::PoolClosed)?;
        let open = self.slots().pop_back().flatten();
        Ok(Reader { readers: self, open, is_at_work: false, _place: place })
    }

    fn slots(&self) -> MutexGuard<'_, VecDeque<Slot>> {
        // Nothing is half done in a queue whose holder panicked.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot that is in use, free again when this is dropped.
struct Reader<'a> {
    readers: &'a Readers,
    open: Slot,
    /// Whether a statement was sent whose end was not seen.
    is_at_work: bool,
    // Behind the slot: who has a permit finds one.
    _place: SemaphorePermit<'a>,
}

impl Reader<'_> {
    /// Its connection, for a statement.
    async fn opened(&mut self) -> sqlx::Result<&mut SqliteConnection> {
        let open = match self.open.take() {
            Some(open) => open,
            None => self.readers.options.connect().await?,
        };
        self.is_at_work = true;
        Ok(self.open.insert(open))
    }

    /// Takes the end of the statement. A connection whose thread is gone answers nobody any more.
    fn ended<T>(&mut self, read: sqlx::Result<T>) -> sqlx::Result<T> {
        self.is_at_work = false;
        if matches!(read, Err(sqlx::Error::WorkerCrashed)) {
            self.open = None;
        }
        read
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let open = self.open.take();
        let mut slots = self.readers.slots();
        match self.is_at_work || open.is_none() {
            // Whoever asked has left, and SQLite is at it still: the next one takes another.
            true => slots.push_front(open),
            false => slots.push_back(open),
        }
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
        Readers::new(SqliteConnectOptions::new().in_memory(true), Duration::from_secs(30))
    }

    fn opened(readers: &Readers) -> usize {
        readers.slots().iter().flatten().count()
    }

    #[tokio::test]
    async fn more_who_read_than_connections_all_get_their_rows() {
        let readers = readers();
        assert_eq!(count(&readers, 1).await, 1);
        assert_eq!(count(&readers, 1).await, 1);
        assert_eq!(opened(&readers), 1, "one after the other shares one");
        let counts = (1..=100).map(|to| count(&readers, to));
        assert_eq!(futures_util::future::join_all(counts).await, Vec::from_iter(1..=100));
        assert_eq!(opened(&readers), READERS as usize);
    }

    #[tokio::test]
    async fn who_waits_gets_the_first_that_is_free_again() {
        let readers = readers();
        let mut held = Vec::new();
        for _ in 0..READERS {
            held.push(readers.free().await.unwrap());
        }
        let waiting = futures_util::future::join_all((1..=8).map(|to| count(&readers, to)));
        let (counted, ()) = tokio::join!(waiting, async { drop(held.pop()) });
        assert_eq!(counted, Vec::from_iter(1..=8), "the others are slow");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let readers = readers();
        let mut held = Vec::new();
        for _ in 0..READERS {
            held.push(readers.free().await.unwrap());
        }
        let error = readers.all(sql("SELECT 1")).await.unwrap_err();
        assert!(matches!(error, sqlx::Error::PoolTimedOut), "{error}");
    }

    #[tokio::test]
    async fn who_stops_waiting_leaves_a_connection_that_reads() {
        let readers = readers();
        for _ in 0..2 * READERS {
            let long = tokio::time::timeout(Duration::from_millis(1), count(&readers, 300_000));
            assert!(long.await.is_err());
        }
        let counts = (1..=10).map(|to| count(&readers, to));
        assert_eq!(futures_util::future::join_all(counts).await, Vec::from_iter(1..=10));
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_waited_for_by_nobody_else() {
        let readers = readers();
        assert_eq!(count(&readers, 1).await, 1, "opened, so that what is left is a statement");
        let long = tokio::time::timeout(Duration::from_millis(1), count(&readers, 300_000));
        assert!(long.await.is_err());
        for _ in 0..10 {
            assert_eq!(count(&readers, 1).await, 1);
        }
        assert_eq!(opened(&readers), 2, "the one that is at it, and another for everybody");
    }

    #[tokio::test]
    async fn a_statement_that_fails_leaves_a_connection_that_reads() {
        let readers = readers();
        assert!(readers.all(sql("SELECT * FROM nothing")).await.is_err());
        assert_eq!((count(&readers, 7).await, opened(&readers)), (7, 1));
        let mut broken = readers.free().await.unwrap();
        broken.opened().await.unwrap();
        assert!(broken.ended::<()>(Err(sqlx::Error::WorkerCrashed)).is_err());
        drop(broken);
        assert_eq!(opened(&readers), 0);
        assert_eq!(count(&readers, 7).await, 7, "it was opened anew");
    }

    #[tokio::test]
    async fn nothing_is_opened_again_when_all_are_closed() {
        let readers = readers();
        assert_eq!(count(&readers, 1).await, 1);
        let reads = readers.free().await.unwrap();
        tokio::join!(readers.close(), async { drop(reads) });
        assert!(readers.all(sql("SELECT 1")).await.is_err());
        assert_eq!(opened(&readers), 0);
    }
}
