//! Who waits for something to happen is woken when something may have happened. A hint, never
//! more: whoever is woken looks at the rows, and looks from time to time anyway.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// The channel that the nodes of a fleet share.
const CHANNEL: &str = "builderd_change";
/// A node says at most so often that something changed: PostgreSQL takes a lock over the whole
/// database for each word.
const SILENCE: Duration = Duration::from_millis(50);
/// Before a listener that lost its connection tries again.
const RECONNECT: Duration = Duration::from_secs(1);

/// Sees changes from the moment it was made on.
#[derive(Clone, Debug)]
pub struct Changes {
    seen: watch::Receiver<u64>,
}

impl Changes {
    /// Waits for a change since the last call, at most so long. One that came between the calls
    /// is not missed.
    pub async fn wait(&mut self, at_most: Duration) {
        // Out of time and out of a store are both "look again".
        let _ = tokio::time::timeout(at_most, self.seen.changed()).await;
    }
}

/// Says that something changed.
#[derive(Debug)]
pub(super) struct Announcer {
    count: Arc<watch::Sender<u64>>,
    /// Wakes the task that tells the other nodes, if there are others.
    outgoing: Option<Arc<Notify>>,
    /// The one connection that hears from them; it is never given back, so that it must not be
    /// one of those that everybody shares.
    incoming: Option<PgPool>,
    /// End with the store.
    _tasks: JoinSet<()>,
}

impl Announcer {
    /// For a database that this process has for itself, or looks into for a moment.
    pub(super) fn alone() -> Self {
        let count = Arc::new(watch::Sender::new(0));
        Self { count, outgoing: None, incoming: None, _tasks: JoinSet::new() }
    }

    /// For a database shared with other nodes: tells them, and hears from them.
    pub(super) fn shared(pool: &PgPool, options: PgConnectOptions) -> Self {
        let count = Arc::new(watch::Sender::new(0));
        let outgoing = Arc::new(Notify::new());
        let incoming = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None::<Duration>)
            .idle_timeout(None::<Duration>)
            .connect_lazy_with(options);
        let mut tasks = JoinSet::new();
        tasks.spawn(tell(pool.clone(), Arc::clone(&outgoing)));
        tasks.spawn(listen(incoming.clone(), Arc::clone(&count)));
        Self { count, outgoing: Some(outgoing), incoming: Some(incoming), _tasks: tasks }
    }

    /// Hears no more from other nodes.
    pub(super) async fn close(&self) {
        if let Some(incoming) = &self.incoming {
            incoming.close().await;
        }
    }

    /// Something changed.
    pub(super) fn announce(&self) {
        self.count.send_modify(|count| *count = count.wrapping_add(1));
        if let Some(outgoing) = &self.outgoing {
            outgoing.notify_one();
        }
    }

    pub(super) fn subscribe(&self) -> Changes {
        Changes { seen: self.count.subscribe() }
    }
}

/// Tells the other nodes, many changes in one word.
async fn tell(pool: PgPool, outgoing: Arc<Notify>) {
    loop {
        outgoing.notified().await;
        let said = sqlx::query("SELECT pg_notify($1, '')").bind(CHANNEL).execute(&pool).await;
        if let Err(error) = said {
            tracing::debug!(%error, "the other nodes were not told of a change; they will look");
        }
        tokio::time::sleep(SILENCE).await;
    }
}

/// Hears from the other nodes.
async fn listen(pool: PgPool, count: Arc<watch::Sender<u64>>) {
    while !pool.is_closed() {
        if let Err(error) = hear(&pool, &count).await {
            tracing::debug!(%error, "nothing is heard from the other nodes; trying again");
        }
        // What was said meanwhile was not heard.
        count.send_modify(|count| *count = count.wrapping_add(1));
        tokio::time::sleep(RECONNECT).await;
    }
}

async fn hear(pool: &PgPool, count: &watch::Sender<u64>) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    while listener.try_recv().await?.is_some() {
        count.send_modify(|count| *count = count.wrapping_add(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_change_between_two_waits_is_not_missed() {
        let announcer = Announcer::alone();
        let mut changes = announcer.subscribe();
        let long = Duration::from_secs(3600);
        announcer.announce();
        announcer.announce();
        assert!(changes.wait(long).now_or_never().is_some());
        assert!(changes.wait(long).now_or_never().is_none());
        announcer.announce();
        assert!(changes.wait(long).now_or_never().is_some());
    }
}
