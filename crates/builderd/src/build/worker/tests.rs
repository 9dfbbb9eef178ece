//! When workers look at the queue.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::artifact::LocalArtifacts;
use crate::store::tests::queue_build;

/// The moment of the first look at the queue, and a later one.
const FIRST: Micros = Micros(1_000_000);
const LATER: Micros = Micros(2_000_000);

/// A clock by which a build comes at the worst moment: the first look at the queue, which asks
/// for the time, just misses it.
struct Mischief {
    store: Store,
    looks: AtomicU32,
    missed: OnceLock<Instant>,
}

impl Clock for Mischief {
    fn now(&self) -> Micros {
        if self.looks.fetch_add(1, Ordering::SeqCst) > 0 {
            return LATER;
        }
        // Nobody is at that address: taking the build is all that matters.
        let create = queue_build(&self.store, "127.0.0.1:1/app", LATER);
        let runtime = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| runtime.block_on(create));
        self.missed.set(Instant::now()).unwrap();
        FIRST
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_comes_while_the_queue_is_looked_at_does_not_wait_for_the_next_look() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock = Arc::new(Mischief {
        store: store.clone(),
        looks: AtomicU32::new(0),
        missed: OnceLock::new(),
    });
    let rules = WorkerRules {
        concurrent_max: 1,
        registry: RegistrySpec::default(),
        pull_timeout: Duration::from_secs(1),
        packs: None,
        cache_enabled: false,
        program: "/bin/false".into(),
        shutdown_timeout: Duration::ZERO,
    };
    let key = MasterKey::load_or_create(&directory.path().join("master.key")).unwrap();
    let workers = Arc::new(Workers::new(
        store.clone(),
        Arc::new(LocalArtifacts::open(directory.path()).unwrap()),
        Arc::new(key),
        Arc::clone(&clock) as Arc<dyn Clock>,
        Metrics::unread(),
        rules,
    ));
    let (stop, stopping) = watch::channel(false);
    let mut changes = store.system().changes();
    let work = tokio::spawn(workers.run(stopping));
    while clock.missed.get().is_none() || store.system().depth().await.unwrap().queued > 0 {
        changes.wait(Duration::from_millis(50)).await;
    }
    let waited = clock.missed.get().unwrap().elapsed();
    assert!(waited < POLL, "it was taken after {waited:?}");
    stop.send_replace(true);
    work.await.unwrap();
}
