//! What the janitor removes while somebody wants it again.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use super::*;
use crate::artifact::{LocalArtifacts, OpenArtifact, Stored};
use crate::build::record::{BuildMetrics, BuildResult};
use crate::build::state::BuildState;
use crate::clock::{StoppedClock, WallClock};
use crate::store::audit::AuditFilter;
use crate::store::tests::queue_build;
use crate::store::{Claimed, NewFile, Outcome, Reserved, TenantKeyRow};
use crate::tenant::Tier;

const KEY: &str = "public/ab";
const CONTENT: &[u8] = b"an image";

/// A build that has made its file and is about to store it.
struct Worker {
    store: Store,
    clock: Arc<dyn Clock>,
    files: Arc<LocalArtifacts>,
    claimed: Claimed,
    staged: PathBuf,
}

impl Worker {
    async fn about_to_store(
        store: &Store,
        clock: &Arc<dyn Clock>,
        files: &Arc<LocalArtifacts>,
    ) -> Self {
        queue_build(store, "app", clock.now()).await;
        let claimed = store.system().claim("worker", 3600, clock.now()).await.unwrap().unwrap();
        let staged = files.staging().join("made");
        std::fs::write(&staged, CONTENT).unwrap();
        let (store, clock, files) = (store.clone(), Arc::clone(clock), Arc::clone(files));
        Self { store, clock, files, claimed, staged }
    }

    /// Ends the build with the file, or hears that it must wait.
    async fn publish(&self) -> ControlFlow<()> {
        let lease = self.store.lease(&self.claimed.lease);
        let size_bytes = CONTENT.len() as u64;
        let file = NewFile { key: KEY, size_bytes, sha256: "ab" };
        match lease.reserve(&file, self.clock.now()).await.unwrap() {
            Reserved::BeingRemoved => return ControlFlow::Continue(()),
            Reserved::Yes => {}
            Reserved::Lost => panic!("the lease is lost"),
        }
        self.files.publish(&self.staged, KEY).await.unwrap();
        let packaging = lease.progress(BuildState::Packaging, 98, "storing", self.clock.now());
        packaging.await.unwrap();
        let result = BuildResult {
            artifact_key: KEY.into(),
            artifact_bytes: size_bytes,
            sha256: "ab".into(),
            image_bytes: size_bytes,
            metadata: serde_json::json!({}),
            from_cache: false,
            metrics: BuildMetrics::default(),
        };
        let outcome = Outcome::Completed(Box::new(result));
        lease.finish(None, outcome, self.clock.now()).await.unwrap();
        ControlFlow::Break(())
    }
}

/// What happens when a file with that name is to be removed, before it is.
type OnRemove = Box<dyn Fn(&str) -> BoxFuture<'static, io::Result<()>> + Send + Sync>;

/// Files to whose removal something happens.
struct Watched {
    files: Arc<LocalArtifacts>,
    on_remove: OnRemove,
}

#[async_trait]
impl ArtifactStore for Watched {
    fn staging(&self) -> &Path {
        self.files.staging()
    }

    async fn publish(&self, staged: &Path, key: &str) -> io::Result<()> {
        self.files.publish(staged, key).await
    }

    async fn settle(&self) {}

    async fn open(&self, key: &str) -> io::Result<Option<OpenArtifact>> {
        self.files.open(key).await
    }

    async fn remove(&self, key: &str) -> io::Result<()> {
        (self.on_remove)(key).await?;
        self.files.remove(key).await
    }

    async fn list(&self) -> io::Result<Vec<Stored>> {
        self.files.list().await
    }

    fn path(&self, key: &str) -> String {
        self.files.path(key)
    }

    fn space(&self) -> io::Result<Option<(u64, u64)>> {
        self.files.space()
    }
}

/// The file of a build that came to nothing, two hours ago.
#[expect(clippy::disallowed_methods, reason = "a file's time")]
async fn forgotten_file(files: &LocalArtifacts, key: &str) {
    let staged = files.staging().join("old");
    std::fs::write(&staged, CONTENT).unwrap();
    files.publish(&staged, key).await.unwrap();
    let file = std::fs::File::options().append(true).open(files.path(key)).unwrap();
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(7200)).unwrap();
}

/// One sweep that nobody stops.
async fn sweep(janitor: &mut Janitor) -> io::Result<()> {
    let (_stop, going) = watch::channel(false);
    janitor.sweep(&going).await
}

fn rules() -> JanitorRules {
    JanitorRules {
        sweep_every: Duration::from_secs(1),
        retention_secs: 1 << 30,
        audit_retention_secs: 1 << 30,
        storage_bytes_max: u64::MAX,
        packs: None,
        tenants: ServiceRules {
            limits: Tier::ALL.map(Tier::limits),
            registry_auth: true,
            allowed_registries: Vec::new(),
            registries: oci::ClientOptions::default(),
            registries_of_tenants: std::collections::HashMap::new(),
            build_secs_max: 900,
            no_commands: None,
            stop_wait: Duration::from_secs(1),
        },
    }
}

#[tokio::test]
async fn rows_of_the_audit_log_go_when_they_were_kept_long_enough() {
    const DAY: u64 = 86_400;
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock = Arc::new(StoppedClock::at(WallClock.now()));
    let files = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
    let rules = JanitorRules { audit_retention_secs: 365 * DAY, ..rules() };
    let its_clock = Arc::clone(&clock) as Arc<dyn Clock>;
    let mut janitor = Janitor::new(store.clone(), files, its_clock, Metrics::unread(), rules);
    queue_build(&store, "old", clock.now()).await;
    clock.advance_secs(364 * DAY);
    queue_build(&store, "young", clock.now()).await;
    let numbers = async || {
        let page = store.system().audit_page(&AuditFilter::default(), None).await.unwrap();
        page.iter().map(|row| row.number).collect::<Vec<_>>()
    };
    sweep(&mut janitor).await.unwrap();
    assert_eq!(numbers().await, [1, 2]);
    clock.advance_secs(2 * DAY);
    sweep(&mut janitor).await.unwrap();
    assert_eq!(numbers().await, [2]);
    assert!(store.system().verify_audit().await.unwrap().problems.is_empty());
}

#[tokio::test]
async fn a_retired_key_that_nothing_needs_goes_after_a_day() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock = Arc::new(StoppedClock::at(WallClock.now()));
    let files = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
    let its_clock = Arc::clone(&clock) as Arc<dyn Clock>;
    let mut janitor = Janitor::new(store.clone(), files, its_clock, Metrics::unread(), rules());
    let tenant = queue_build(&store, "app", clock.now()).await.tenant;
    let key = |number: u8| TenantKeyRow {
        tenant: tenant.clone(),
        id: format!("{number:032x}"),
        wrapped: vec![number],
        wrapped_by: "master".into(),
        created_at: clock.now(),
        retired_at: None,
    };
    let system = store.system();
    assert!(system.rotate_tenant_key(&key(1)).await.unwrap());
    assert!(system.rotate_tenant_key(&key(2)).await.unwrap());
    let there = async |number: u8| {
        system.tenant_key(&tenant, &format!("{number:032x}")).await.unwrap().is_some()
    };
    clock.advance_secs(KEY_GRACE_SECS);
    sweep(&mut janitor).await.unwrap();
    assert!(there(1).await && there(2).await);
    clock.advance_secs(1);
    sweep(&mut janitor).await.unwrap();
    assert!(!there(1).await && there(2).await);
}

#[tokio::test]
async fn a_file_that_a_build_is_about_to_name_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock: Arc<dyn Clock> = Arc::new(StoppedClock::at(WallClock.now()));
    let files = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
    forgotten_file(&files, KEY).await;
    let worker = Arc::new(Worker::about_to_store(&store, &clock, &files).await);
    let heard = Arc::new(Mutex::new(Vec::new()));
    // The worker wants the file at the worst moment: when the janitor has decided to remove it.
    let on_remove: OnRemove = {
        let (worker, heard) = (Arc::clone(&worker), Arc::clone(&heard));
        Box::new(move |_| {
            let (worker, heard) = (Arc::clone(&worker), Arc::clone(&heard));
            Box::pin(async move {
                let said = worker.publish().await;
                heard.lock().unwrap().push(said);
                Ok(())
            })
        })
    };
    let artifacts = Arc::new(Watched { files: Arc::clone(&files), on_remove });
    let mut janitor = Janitor::new(store, artifacts, clock, Metrics::unread(), rules());
    sweep(&mut janitor).await.unwrap();
    assert!(files.open(KEY).await.unwrap().is_some(), "seen for the first time, it stays");
    sweep(&mut janitor).await.unwrap();
    assert_eq!(*heard.lock().unwrap(), [ControlFlow::Continue(())], "it must wait");
    assert!(files.open(KEY).await.unwrap().is_none(), "nobody had named it");

    assert_eq!(worker.publish().await, ControlFlow::Break(()), "the way is free");
    for _ in 0..2 {
        sweep(&mut janitor).await.unwrap();
    }
    assert!(files.open(KEY).await.unwrap().is_some(), "the completed build has its file");
    assert_eq!(heard.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_file_that_cannot_be_removed_keeps_nothing_else_from_being_cleared_away() {
    const STUCK: [&str; 2] = ["public/m-stuck", "tenant-a/stuck"];
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock = Arc::new(StoppedClock::at(WallClock.now()));
    let files = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
    for key in ["public/a", STUCK[0], STUCK[1], "public/z"] {
        forgotten_file(&files, key).await;
    }
    // What is no file of ours is left alone.
    std::fs::create_dir(files.path("public/directory")).unwrap();
    let cache = directory.path().join("cache");
    let packs = PackCache::open(&cache).unwrap();
    let domain = cache.join("packs-v1/local");
    let pack = domain.join(format!("{}.pack", "0".repeat(64)));

    let problem = Arc::new(Mutex::new(Some(io::ErrorKind::PermissionDenied)));
    let asked = Arc::new(AtomicUsize::new(0));
    let on_remove: OnRemove = {
        let (problem, asked) = (Arc::clone(&problem), Arc::clone(&asked));
        Box::new(move |key| {
            let problem = STUCK.contains(&key).then(|| {
                asked.fetch_add(1, Ordering::SeqCst);
                *problem.lock().unwrap()
            });
            Box::pin(async move { problem.flatten().map_or(Ok(()), |kind| Err(kind.into())) })
        })
    };
    let artifacts = Arc::new(Watched { files: Arc::clone(&files), on_remove });
    let rules = JanitorRules { packs: Some((packs, 0)), ..rules() };
    let its_clock = Arc::clone(&clock) as Arc<dyn Clock>;
    let mut janitor = Janitor::new(store, artifacts, its_clock, Metrics::unread(), rules);
    sweep(&mut janitor).await.unwrap();
    std::fs::create_dir_all(&domain).unwrap();
    std::fs::write(&pack, CONTENT).unwrap();
    let failed = sweep(&mut janitor).await.unwrap_err();
    assert_eq!(failed.kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(asked.swap(0, Ordering::SeqCst), STUCK.len());
    for (key, is_there) in
        [("public/a", false), ("public/z", false), (STUCK[0], true), (STUCK[1], true)]
    {
        assert_eq!(files.open(key).await.unwrap().is_some(), is_there, "{key}");
    }
    assert!(!pack.exists(), "the cache is pruned all the same");

    // A store that does not answer is asked once; when it does, everything is as it should be.
    // What was begun is over first.
    clock.advance_secs(3600);
    *problem.lock().unwrap() = Some(io::ErrorKind::TimedOut);
    assert_eq!(sweep(&mut janitor).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    clock.advance_secs(3600);
    *problem.lock().unwrap() = None;
    sweep(&mut janitor).await.unwrap();
    for key in STUCK {
        assert!(files.open(key).await.unwrap().is_none(), "{key}");
    }
    assert!(Path::new(&files.path("public/directory")).is_dir());
}

#[tokio::test]
async fn what_was_deleted_is_removed_without_a_sweep() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock: Arc<dyn Clock> = Arc::new(StoppedClock::at(WallClock.now()));
    let files = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
    let worker = Worker::about_to_store(&store, &clock, &files).await;
    assert_eq!(worker.publish().await, ControlFlow::Break(()));
    let is_stuck = Arc::new(Mutex::new(true));
    let on_remove: OnRemove = {
        let is_stuck = Arc::clone(&is_stuck);
        Box::new(move |_| {
            let result =
                if *is_stuck.lock().unwrap() { Err(io::ErrorKind::TimedOut) } else { Ok(()) };
            Box::pin(async move { Ok(result?) })
        })
    };
    let remover = Remover {
        store: store.clone(),
        artifacts: Arc::new(Watched { files: Arc::clone(&files), on_remove }),
        clock: Arc::clone(&clock),
    };
    let (_stop, going) = watch::channel(false);
    remover.remove_dropped(&going).await.unwrap();
    assert!(files.open(KEY).await.unwrap().is_some(), "a build has it");

    assert_eq!(store.system().expire(clock.now().plus_secs(1)).await.unwrap(), 1);
    assert_eq!(remover.remove_dropped(&going).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    *is_stuck.lock().unwrap() = false;
    remover.remove_dropped(&going).await.unwrap();
    assert!(files.open(KEY).await.unwrap().is_some(), "the removal that was begun is not over");
    let clock: Arc<dyn Clock> = Arc::new(StoppedClock::at(clock.now().plus_secs(3600)));
    let remover = Remover { clock, ..remover };
    remover.remove_dropped(&going).await.unwrap();
    assert!(files.open(KEY).await.unwrap().is_none());
}

#[tokio::test]
async fn who_stops_the_service_does_not_wait_until_everything_that_was_deleted_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock: Arc<dyn Clock> = Arc::new(StoppedClock::at(WallClock.now()));
    let files = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
    let worker = Worker::about_to_store(&store, &clock, &files).await;
    // What a build stores in the place of something else lets that go.
    for key in ["public/one", "public/two"] {
        let file = NewFile { key, size_bytes: 1, sha256: "ab" };
        let reserved = store.lease(&worker.claimed.lease).reserve(&file, clock.now()).await;
        assert!(matches!(reserved, Ok(Reserved::Yes)));
        forgotten_file(&files, key).await;
    }
    assert_eq!(worker.publish().await, ControlFlow::Break(()));
    let (stop, going) = watch::channel(false);
    let on_remove: OnRemove = Box::new(move |_| {
        stop.send_replace(true);
        Box::pin(async { Ok(()) })
    });
    let artifacts = Arc::new(Watched { files: Arc::clone(&files), on_remove });
    let remover = Remover { store: store.clone(), artifacts, clock: Arc::clone(&clock) };
    assert_eq!(store.system().dropped(DROPPED_MAX, clock.now()).await.unwrap().len(), 2);
    remover.run(going).await;
    let left = store.system().dropped(DROPPED_MAX, clock.now()).await.unwrap();
    assert_eq!(left, ["public/two"]);
}

#[tokio::test]
async fn who_stops_the_service_does_not_wait_until_all_files_are_swept() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock: Arc<dyn Clock> = Arc::new(StoppedClock::at(WallClock.now()));
    let files = Arc::new(LocalArtifacts::open(directory.path()).unwrap());
    let keys = ["public/one", "public/two", "public/three"];
    for key in keys {
        forgotten_file(&files, key).await;
    }
    let (stop, going) = watch::channel(false);
    let on_remove: OnRemove = Box::new(move |_| {
        stop.send_replace(true);
        Box::pin(async { Ok(()) })
    });
    let artifacts = Arc::new(Watched { files: Arc::clone(&files), on_remove });
    let mut janitor = Janitor::new(store, artifacts, clock, Metrics::unread(), rules());
    janitor.sweep(&going).await.unwrap();
    janitor.sweep(&going).await.unwrap();
    assert_eq!(files.list().await.unwrap().len(), keys.len() - 1, "one was on its way");
}
