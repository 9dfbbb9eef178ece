//! When workers look at the queue, and what they do when the database is away.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use oci::Platform;
use oci::testing::TestRegistry;
use tracing::instrument::WithSubscriber as _;

use super::*;
use crate::artifact::LocalArtifacts;
use crate::clock::WallClock;
use crate::store::ArtifactDomain;
use crate::store::tests::{hang, messages, queue_build, result, stored};

/// Workers on `store` that run `program` for each build, and reach the registry at `host` without
/// TLS.
fn workers(
    store: &Store,
    directory: &Path,
    clock: Arc<dyn Clock>,
    program: &str,
    host: &str,
) -> Workers {
    let registry = RegistrySpec {
        insecure: vec![host.to_owned()],
        image_bytes_max: 1 << 30,
        ..RegistrySpec::default()
    };
    let rules = WorkerRules {
        host: Arc::default(),
        concurrent_max: 1,
        registry,
        pull_timeout: Duration::from_secs(10),
        packs: None,
        sealed_packs: None,
        cache_enabled: false,
        encrypts_all: false,
        program: program.into(),
        runtime: None,
        commands_egress: CommandsEgress::default(),
        shutdown_timeout: Duration::ZERO,
    };
    Workers::new(
        store.clone(),
        Arc::new(LocalArtifacts::open(directory).unwrap()),
        Arc::new(MasterKey::load_or_create(&directory.join("master.key")).unwrap()),
        clock,
        Metrics::unread(),
        rules,
    )
}

#[tokio::test]
async fn a_tenants_own_registry_is_reached_for_it_alone_and_shared_with_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let registry = TestRegistry::start().unwrap();
    let here = Platform::of_this_machine();
    registry.put_image("app", Some("latest"), (&here.os, &here.architecture), &[]);
    let host = registry.host();
    let open = |entries: &[String]| {
        let clock = Arc::new(WallClock);
        let mut workers = workers(&store, directory.path(), clock, "/bin/false", &host);
        workers.rules.registry = workers.rules.registry.with_places_of_tenants(entries);
        workers
    };
    let image = format!("{host}/app");
    let (_hurry, give_up) = watch::channel(false);
    for (entry, expected) in [
        // The tenant of every build here.
        (Some(format!("acme={host}")), Some(ArtifactDomain::Tenant("acme".parse().unwrap()))),
        (Some(format!("bank={host}")), None),
        (None, Some(ArtifactDomain::Public)),
    ] {
        let workers = open(entry.as_slice());
        queue_build(&store, &image, WallClock.now()).await;
        let claimed = workers.claim().await.expect("a build waits");
        let running = Running::new(&workers, &claimed, give_up.clone());
        let asked = registry.requests().len();
        let resolved = running.resolve(running.registry().unwrap()).await;
        let domain = resolved.as_ref().ok().map(|(image, _)| running.domain(image));
        assert_eq!(domain, expected, "{entry:?}");
        if let Err(failure) = resolved {
            assert_eq!(failure.code, FailureCode::NetworkDenied, "{failure:?}");
            assert_eq!(registry.requests().len(), asked, "it is asked nothing");
        }
    }
}

#[tokio::test]
async fn what_was_made_of_one_registry_is_for_nobody_who_asked_another() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let here = Platform::of_this_machine();
    let (_hurry, give_up) = watch::channel(false);
    let registries = [TestRegistry::start().unwrap(), TestRegistry::start().unwrap()];
    let mut names = Vec::new();
    for registry in registries.iter().chain([&registries[0]]) {
        registry.put_image("app", Some("latest"), (&here.os, &here.architecture), &[]);
        let host = registry.host();
        let workers = workers(&store, directory.path(), Arc::new(WallClock), "/bin/false", &host);
        queue_build(&store, &format!("{host}/app"), WallClock.now()).await;
        let claimed = workers.claim().await.expect("a build waits");
        let running = Running::new(&workers, &claimed, give_up.clone());
        let (image, _) = running.resolve(running.registry().unwrap()).await.unwrap();
        assert_eq!(running.domain(&image), ArtifactDomain::Public);
        names.push((
            image.manifest_digest,
            running.artifact_name(&image).recipe,
            running.packs_domain(&image),
        ));
    }
    assert_eq!(names[0], names[2], "whoever asks the same registry shares it");
    assert_eq!(names[0].0, names[1].0, "the image is the same");
    assert_ne!(names[0].1, names[1].1);
    assert_ne!(names[0].2, names[1].2);
}

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

#[tokio::test]
async fn another_build_of_the_same_image_is_not_waited_for_to_the_end_of_ones_time() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let mut workers = workers(&store, directory.path(), Arc::new(WallClock), "/bin/false", "");
    workers.rules.cache_enabled = true;
    queue_build(&store, "app", WallClock.now()).await;
    let mut claimed = workers.claim().await.expect("a build waits");
    claimed.build.limits.timeout_secs = 10;
    let (_hurry, give_up) = watch::channel(false);
    let running = Running::new(&workers, &claimed, give_up);
    let name = ArtifactName { domain: ArtifactDomain::Public, recipe: "the same".into() };
    let others = workers.flight(&name).try_acquire_owned().unwrap();
    let begun = std::time::Instant::now();
    assert!(running.turn(&name).await.unwrap().is_none());
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(1) && waited < Duration::from_secs(5), "{waited:?}");
    let (turn, ()) = tokio::join!(running.turn(&name), async { drop(others) });
    assert!(turn.unwrap().is_some(), "who ends in time is waited for");
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
    let own: Arc<dyn Clock> = Arc::clone(&clock) as Arc<dyn Clock>;
    let workers = workers(&store, directory.path(), own, "/bin/false", "127.0.0.1:1");
    let workers = Arc::new(workers);
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

/// The number of a process that wrote it to `file` with a line's end.
async fn pid_in(file: &Path) -> u32 {
    loop {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if let Some(number) = text.strip_suffix('\n') {
            return number.parse().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether there is such a process that is not dead (`proc_pid_stat(5)`: the state follows the
/// name in parentheses).
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// A build of an image that its registry has, taken by a worker that runs shells for it: they take
/// their only argument, `build-child` or `build-sum`, for a script in the staging directory.
struct Taken {
    store: Store,
    workers: Workers,
    claimed: Claimed,
    staging: PathBuf,
    _registry: TestRegistry,
}

impl Taken {
    async fn on(host: Host, directory: &Path) -> Self {
        let store = Store::open_sqlite(directory).await.unwrap();
        let registry = TestRegistry::start().unwrap();
        let here = Platform::of_this_machine();
        registry.put_image("app", Some("latest"), (&here.os, &here.architecture), &[]);
        let address = registry.host();
        queue_build(&store, &format!("{address}/app"), WallClock.now()).await;
        let mut workers = workers(&store, directory, Arc::new(WallClock), "/bin/sh", &address);
        workers.rules.host = Arc::new(host);
        let claimed = workers.claim().await.expect("a build waits");
        let staging = workers.staging(&claimed.lease);
        std::fs::create_dir_all(&staging).unwrap();
        Self { store, workers, claimed, staging, _registry: registry }
    }

    fn script(&self, role: &str, text: &str) {
        std::fs::write(self.staging.join(role), text).unwrap();
    }

    async fn run(&self, give_up: watch::Receiver<bool>) -> End {
        Running::new(&self.workers, &self.claimed, give_up).run_to_the_end().await
    }
}

#[tokio::test]
async fn a_database_that_hangs_stops_the_child_within_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let taken = Taken::on(Host::default(), directory.path()).await;
    let pid_file = directory.path().join("pid");
    taken.script(
        "build-child",
        &format!("echo $$ > '{}'; exec /bin/sleep 1000", pid_file.display()),
    );
    let (_hurry, give_up) = watch::channel(false);
    let hangs = async {
        let pid = pid_in(&pid_file).await;
        let hung = hang(&taken.store).await;
        assert!(lives(pid));
        // From here on nothing happens but the passing of time.
        tokio::time::pause();
        (pid, hung, Instant::now())
    };
    let (end, (pid, hung, since)) = tokio::join!(taken.run(give_up), hangs);
    assert!(matches!(end, End::Lost), "it did not give up");
    // Long before the lease runs out, and somebody else begins.
    let waited = since.elapsed();
    assert!(waited <= SILENCE_MAX + HEARTBEAT, "it was given up after {waited:?}");
    assert!(waited + HEARTBEAT < Duration::from_secs(LEASE_SECS));
    let killed = std::time::Instant::now();
    while lives(pid) {
        assert!(killed.elapsed() < Duration::from_secs(10), "process {pid} lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!taken.staging.exists(), "its files are there still");
    drop(hung);
}

/// What comes of a build whose process does this and says that it has made five bytes with that
/// sum, and under which names something is stored then.
async fn made_by(script: &str, sha256: &str) -> (End, Vec<String>) {
    let sum = "cat > /dev/null; set -- $(sha256sum rootfs.ext4); echo $1 7";
    made_and_summed_by(script, sum, sha256).await
}

/// The same where the sum is computed by that, in the build's group if there are groups.
async fn made_and_summed_by(script: &str, sum: &str, sha256: &str) -> (End, Vec<String>) {
    let directory = tempfile::tempdir_in(".").unwrap();
    let (_hurry, give_up) = watch::channel(false);
    made_in(directory.path(), script, sum, sha256, give_up).await
}

/// The same in that directory, until it is to be given up.
async fn made_in(
    directory: &Path,
    script: &str,
    sum: &str,
    sha256: &str,
    give_up: watch::Receiver<bool>,
) -> (End, Vec<String>) {
    let taken = Taken::on(Host::open(directory, &[]), directory).await;
    taken.script("build-sum", sum);
    let report = serde_json::json!({"done": {
        "metadata": {"artifact": {"sha256": sha256}},
        "artifact_bytes": 5,
        "image_bytes": 5,
        "sha256": sha256,
        "fetched_bytes": 0,
        "layers_cached": 0,
        "phase_secs": [],
        "memory_peak_bytes": 0,
        "cpu_ms": 5,
    }});
    std::fs::write(directory.join("secret"), "12345").unwrap();
    taken.script("build-child", &format!("cat > /dev/null; {script}; echo '{report}'"));
    let end = taken.run(give_up).await;
    let artifacts = &taken.workers.artifacts;
    assert_eq!(std::fs::read_dir(artifacts.staging()).unwrap().count(), 0);
    let stored = artifacts.list().await.unwrap();
    (end, stored.into_iter().map(|stored| stored.key).collect())
}

/// Of `12345`.
const SUM: &str = "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5";

#[tokio::test]
async fn an_artifact_is_filed_under_the_sum_of_its_bytes_whatever_the_process_that_made_it_says() {
    // That of another image, perhaps: whoever builds it next would be given these bytes.
    for lie in ["5".repeat(64).as_str(), "a/b", "", SUM] {
        let (end, stored) = made_by("printf 12345 > rootfs.ext4", lie).await;
        let End::Made(_, result, _) = end else { panic!("{lie} is no success") };
        assert_eq!(stored, [format!("public/{SUM}.ext4")], "{lie}");
        assert_eq!((result.artifact_key, result.sha256), (stored[0].clone(), SUM.to_owned()));
        assert_eq!(result.metadata["artifact"]["sha256"], SUM, "{lie}");
        assert_eq!(result.metrics.cpu_ms, 5 + 7, "what both of its processes took");
    }
}

#[tokio::test]
async fn a_process_that_was_taken_over_does_not_end_its_worker_by_what_it_says() {
    // Times and bytes that cannot be added up.
    let finished =
        serde_json::json!({"event": "phase_finished", "phase": "layers", "secs": 1.8e19});
    let progress =
        serde_json::json!({"event": "write_progress", "bytes": u64::MAX, "total_bytes": u64::MAX});
    let said: Vec<String> = [&finished, &finished, &progress]
        .map(|event| format!("echo '{}'", serde_json::json!({ "event": event })))
        .into();
    let script = format!("{}; printf 12345 > rootfs.ext4", said.join("; "));
    let (end, _) = made_by(&script, SUM).await;
    let End::Made(..) = end else { panic!("no success") };
}

#[tokio::test]
async fn a_process_that_complains_at_length_is_not_kept_waiting() {
    // More than is kept of it and a pipe holds together.
    let script = "head -c 1000000 /dev/zero >&2; printf 12345 > rootfs.ext4";
    let made = tokio::time::timeout(Duration::from_secs(60), made_by(script, SUM));
    let (end, _) = made.await.expect("it waits for who reads its complaints");
    let End::Made(..) = end else { panic!("no success") };
}

#[tokio::test]
async fn what_a_build_has_made_is_its_own_file_or_nothing() {
    for script in [
        "ln -s ../../secret rootfs.ext4",
        "ln ../../secret rootfs.ext4",
        "mkfifo rootfs.ext4",
        "mkdir rootfs.ext4",
        "printf 123456 > rootfs.ext4",
        "true",
    ] {
        let (end, stored) = made_by(script, SUM).await;
        let End::Failed(failure) = end else { panic!("{script} is no failure") };
        assert_eq!(failure.code, FailureCode::Internal, "{failure:?}");
        assert_eq!(stored, Vec::<String>::new(), "{script}");
    }
}

#[tokio::test]
async fn the_sum_is_computed_within_the_limits_of_the_build() {
    let place = tempfile::tempdir().unwrap();
    let groups = place.path().join("groups");
    // It knows what to do once it is in its group.
    let file = groups.display();
    let sum = format!("cat > /dev/null; cat /proc/self/cgroup > '{file}'; echo {SUM} 7");
    let (end, _) = made_and_summed_by("printf 12345 > rootfs.ext4", &sum, SUM).await;
    let End::Made(..) = end else { panic!("no success") };
    let groups = std::fs::read_to_string(groups).unwrap();
    match Host::open(place.path(), &[]).places().is_empty() {
        true => println!("skipped: no cgroups for this user"),
        false => assert!(groups.contains("/build_"), "{groups}"),
    }
}

#[tokio::test]
async fn what_a_build_has_started_has_ended_before_its_artifact_is_summed() {
    let place = tempfile::tempdir().unwrap();
    if Host::open(place.path(), &[]).places().is_empty() {
        println!("skipped: no cgroups for this user");
        return;
    }
    // Many, so that some would live for a moment longer.
    let script = "for n in 1 2 3 4 5 6 7 8 9; do setsid sleep 4713 > /dev/null 2>&1 & done; \
                  printf 12345 > rootfs.ext4";
    let lives = place.path().join("lives");
    let sum =
        format!("cat > /dev/null; pgrep -f '^sleep 4713' > '{}'; echo {SUM} 7", lives.display());
    let (end, _) = made_and_summed_by(script, &sum, SUM).await;
    let End::Made(..) = end else { panic!("no success") };
    assert_eq!(std::fs::read_to_string(lives).unwrap(), "");
}

#[tokio::test]
async fn without_a_sum_nothing_is_filed() {
    let failed = format!("echo {SUM} 7; exit 1");
    let endless = format!("printf %s '{SUM} 7'");
    for sum in ["exit 1", "echo", "echo ../../x 7", "kill -9 $$", &failed, &endless] {
        let (end, stored) = made_and_summed_by("printf 12345 > rootfs.ext4", sum, SUM).await;
        let End::Failed(failure) = end else { panic!("{sum} is no failure") };
        assert_eq!(failure.code, FailureCode::TemporaryResourceError, "{failure:?}");
        assert_eq!(stored, Vec::<String>::new(), "{sum}");
    }
}

#[tokio::test]
async fn while_a_process_of_the_build_lives_on_nothing_that_it_has_made_is_filed() {
    // Who is frozen by version 1 of cgroups cannot be ended, like one that waits for a disk.
    let freezer = Path::new("/sys/fs/cgroup/freezer");
    let directory = tempfile::tempdir_in(".").unwrap();
    let host = Host::open(directory.path(), &[]);
    if host.places().is_empty() || !freezer.join("cgroup.procs").exists() {
        println!("skipped: no cgroups for this user, or no freezer of version 1");
        return;
    }
    let ice = freezer.join(format!("builderd-test-worker-{}", std::process::id()));
    std::fs::create_dir(&ice).unwrap();
    // Nothing of its own that the build waits for may freeze with it.
    let script = format!(
        "setsid sh -c 'exec > /dev/null 2>&1; : > ready; exec sleep 4714' & \
         while [ ! -e ready ]; do :; done; rm ready; echo $! > {0}/cgroup.procs; \
         echo FROZEN > {0}/freezer.state; printf 12345 > rootfs.ext4",
        ice.display()
    );
    let sum = format!("cat > /dev/null; echo {SUM} 7");
    let (_hurry, give_up) = watch::channel(false);
    let (end, stored) = made_in(directory.path(), &script, &sum, SUM, give_up).await;
    std::fs::write(ice.join("freezer.state"), "THAWED").unwrap();
    host.sweep();
    host.close();
    std::fs::remove_dir(ice).unwrap();
    let End::Failed(failure) = end else { panic!("no failure") };
    assert_eq!(failure.code, FailureCode::TemporaryResourceError, "{failure:?}");
    assert_eq!(failure.cause, "the build's processes could not be ended in time");
    assert_eq!(stored, Vec::<String>::new());
}

#[tokio::test]
async fn a_build_that_is_given_up_while_its_artifact_is_summed_leaves_nothing() {
    let directory = tempfile::tempdir_in(".").unwrap();
    let pid_file = directory.path().join("pid");
    let pid_file = std::path::absolute(pid_file).unwrap();
    let sum = format!("echo $$ > '{}'; exec sleep 1000", pid_file.display());
    let (hurry, give_up) = watch::channel(false);
    let made = made_in(directory.path(), "printf 12345 > rootfs.ext4", &sum, SUM, give_up);
    let gives_up = async {
        let pid = pid_in(&pid_file).await;
        hurry.send_replace(true);
        (pid, std::time::Instant::now())
    };
    let ((end, stored), (pid, since)) = tokio::join!(made, gives_up);
    assert!(matches!(end, End::Released), "it was not given back");
    assert_eq!(stored, Vec::<String>::new());
    while lives(pid) {
        assert!(since.elapsed() < Duration::from_secs(1), "process {pid} lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a group weighs beside others, if it is there, and what one does that nobody has weighed.
fn weight(group: &[PathBuf]) -> Option<(u64, u64)> {
    let files = [("cpu.weight", 100), ("cpu.shares", 1024)];
    let mut files = group.iter().flat_map(|place| files.map(|(file, of)| (place.join(file), of)));
    files.find_map(|(file, unweighed)| {
        let text = std::fs::read_to_string(file).ok()?;
        Some((text.trim().parse().ok()?, unweighed))
    })
}

#[tokio::test]
async fn a_build_that_runs_is_weighed_beside_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let host = Host::open(directory.path(), &[]);
    if host.places().is_empty() {
        println!("skipped: {:?}", host.missing());
        return;
    }
    let taken = Taken::on(host, directory.path()).await;
    taken.script("build-child", "exec /bin/sleep 1000");
    let (name, host) = (taken.staging.file_name().unwrap(), &taken.workers.rules.host);
    let group: Vec<PathBuf> = host.places().iter().map(|place| place.join(name)).collect();

    let (hurry, give_up) = watch::channel(false);
    let look = async {
        let patience = Instant::now() + Duration::from_secs(20);
        loop {
            let found = weight(&group);
            if found.is_some_and(|(weight, of)| weight > of) || Instant::now() > patience {
                hurry.send_replace(true);
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (end, found) = tokio::join!(taken.run(give_up), look);
    assert!(matches!(end, End::Released), "it was not given back");
    let (weight, unweighed) = found.expect("it has a group");
    assert!(weight > unweighed, "who has taken nothing goes first: {weight}");
    host.close();
}

/// Said in a moment: twice as many as may wait for the store.
const LINES: usize = 8000;

#[tokio::test]
async fn what_a_command_says_last_is_in_the_log_and_behind_it_why_the_build_failed() {
    let directory = tempfile::tempdir_in(".").unwrap();
    let taken = Taken::on(Host::default(), directory.path()).await;
    let said = |line: &str| {
        let event = serde_json::json!({"event": "command_output", "command": 0, "line": line});
        serde_json::json!({ "event": event }).to_string()
    };
    let failed = serde_json::json!({"failed": {
        "code": "INVALID_SOURCE", "step": "commands", "cause": "command 1 ended with exit code 7",
        "blame": "yours", "remedy": "see the log",
    }});
    let line = said("line N").replace('N', "'$n'");
    let script = format!(
        "cat > /dev/null; n=0; while [ $n -lt {LINES} ]; do echo '{line}'; n=$((n+1)); done; \
         echo '{}'; echo '{failed}'",
        said("FATAL: no space left"),
    );
    taken.script("build-child", &script);
    let (_hurry, give_up) = watch::channel(false);
    let end = taken.run(give_up).await;
    let End::Failed(failure) = end else { panic!("no failure") };
    assert_eq!(failure.step, "commands");
    let log = messages(&taken.store, &taken.claimed.build).await;
    let first = log.iter().position(|line| line == "line 0").expect("it has said something");
    let said = log[first..].iter().zip(0..LINES);
    let whole = said.take_while(|(line, number)| **line == format!("line {number}")).count();
    assert_eq!(whole, LINES, "{:?}", &log[log.len() - 3..]);
    let end =
        ["FATAL: no space left", "commands failed: command 1 ended with exit code 7 (see the log)"];
    assert_eq!(log[first + LINES..], end);
}

#[tokio::test]
async fn the_memory_of_a_build_is_that_of_its_processes_and_not_of_what_they_wrote() {
    let place = tempfile::tempdir().unwrap();
    if Host::open(place.path(), &[]).places().is_empty() {
        println!("skipped: no cgroups for this user");
        return;
    }
    let script = "dd if=/dev/zero of=big bs=1M count=96 2> /dev/null; rm big; \
                  printf 12345 > rootfs.ext4";
    let (end, _) = made_by(script, SUM).await;
    let End::Made(_, result, _) = end else { panic!("no success") };
    let most = result.metrics.memory_peak_bytes;
    assert!(most < 48 << 20, "{most} bytes: what the page cache holds is no memory of the build");
}

#[test]
fn the_memory_of_a_build_is_the_smaller_of_two_counts_and_one_where_there_are_no_groups() {
    assert_eq!(engine::memory_peak_bytes(90, Some(600)), 90, "the rest is files");
    assert_eq!(engine::memory_peak_bytes(90, Some(70)), 70, "the rest is counted twice");
    assert_eq!(engine::memory_peak_bytes(90, Some(0)), 90, "the kernel does not count");
    assert_eq!(engine::memory_peak_bytes(90, None), 90);
}

#[tokio::test]
async fn a_build_whose_registry_fell_silent_is_late_for_the_registry() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    queue_build(&store, "127.0.0.1:1/app", WallClock.now()).await;
    let clock = Arc::new(WallClock);
    let workers = workers(&store, directory.path(), clock, "/bin/false", "127.0.0.1:1");
    let claimed = workers.claim().await.expect("a build waits");
    let (_hurry, give_up) = watch::channel(false);
    let running = Running::new(&workers, &claimed, give_up);
    tokio::time::pause();
    let early = running.too_late();
    assert_eq!((early.code, &*early.blame), (FailureCode::BuildTimeout, "yours"));
    tokio::time::advance(Duration::from_secs(60)).await;
    let late = running.too_late();
    assert_eq!((late.code, &*late.blame), (FailureCode::BuildTimeout, "upstream"));
    assert!(late.cause.contains("60 seconds") && late.remedy.contains("registry"), "{late:?}");
}

#[tokio::test]
async fn the_log_of_the_server_says_why_a_try_failed_and_when_there_is_another() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let clock = Arc::new(WallClock);
    let workers = workers(&store, directory.path(), clock, "/bin/false", "127.0.0.1:1");
    let failure = |code: FailureCode, blame: &str| Failure {
        code,
        step: "layers".into(),
        cause: "a reason".into(),
        blame: blame.into(),
        remedy: "do something".into(),
    };
    let mut lines = Vec::new();
    for failure in [
        failure(FailureCode::NetworkError, "upstream"),
        failure(FailureCode::InvalidSource, "yours"),
        failure(FailureCode::Internal, "ours"),
    ] {
        queue_build(&store, "127.0.0.1:1/app", WallClock.now()).await;
        let Claimed { lease, build, .. } = workers.claim().await.expect("a build waits");
        let (dispatch, logged) = telemetry::tests::logged();
        let end = End::Failed(failure);
        workers.conclude(&lease, &build, WallClock.now(), end).with_subscriber(dispatch).await;
        let mut said = logged();
        said.retain(|line| line["target"].as_str().is_some_and(|from| from.ends_with("worker")));
        assert_eq!(said.len(), 1, "{said:?}");
        lines.append(&mut said);
    }
    for line in &lines {
        assert_eq!((&line["step"], &line["cause"]), (&"layers".into(), &"a reason".into()));
    }
    let told = |line: &serde_json::Value| {
        ["level", "code", "blame"].map(|name| line[name].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(told(&lines[0]), ["info", "NETWORK_ERROR", "upstream"]);
    assert_eq!(lines[0]["again_in_secs"], 30);
    assert_eq!(told(&lines[1]), ["info", "INVALID_SOURCE", "yours"]);
    assert_eq!(told(&lines[2]), ["warn", "INTERNAL", "ours"]);
    assert_eq!((&lines[1]["state"], &lines[2]["state"]), (&"failed".into(), &"failed".into()));
}

#[test]
fn who_asked_for_a_build_that_met_a_bug_is_told_whom_to_tell() {
    let remedy = internal("it is odd").remedy;
    assert!(remedy.contains("tell the operator the build's id"), "{remedy}");
}

#[tokio::test]
async fn a_build_whose_last_step_was_not_stored_completes() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let build = queue_build(&store, "127.0.0.1:1/app", WallClock.now()).await;
    let clock = Arc::new(WallClock);
    let workers = workers(&store, directory.path(), clock, "/bin/false", "127.0.0.1:1");
    let claimed = workers.claim().await.expect("a build waits");
    // The database was away when the steps behind the first were entered.
    assert_eq!(stored(&store, &build).await.state, BuildState::Preparing);
    let name = ArtifactName { domain: ArtifactDomain::Public, recipe: "r".into() };
    let made = result("public/x", 7);
    let outcome = Outcome::Completed(Box::new(made.clone()));
    let end = workers.finish(&claimed.lease, Some(&name), outcome).await;
    assert_eq!(end.unwrap(), Some(BuildState::Completed));
    let completed = stored(&store, &build).await;
    assert_eq!((completed.state, completed.result), (BuildState::Completed, Some(made)));
}

#[tokio::test]
async fn a_build_that_somebody_else_has_is_not_ended() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_sqlite(directory.path()).await.unwrap();
    let build = queue_build(&store, "127.0.0.1:1/app", WallClock.now()).await;
    let clock = Arc::new(WallClock);
    let workers = workers(&store, directory.path(), clock, "/bin/false", "127.0.0.1:1");
    let lost = workers.claim().await.expect("a build waits");
    store.system().reap(crate::store::Leases::All, ATTEMPTS_MAX, WallClock.now()).await.unwrap();
    workers.claim().await.expect("it waits again");
    let outcome = Outcome::Completed(Box::new(result("public/x", 7)));
    assert_eq!(workers.finish(&lost.lease, None, outcome).await.unwrap(), None);
    assert_eq!(stored(&store, &build).await.state, BuildState::Preparing);
}
