//! Random histories on the store and on a model of it in memory: every answer must be the same,
//! and after every step the database must hold nothing that it should not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::postgres::Postgres;
use super::{LONG, TestStore, failure, new_build, plenty, result, tenant};
use crate::build::record::{Build, BuildId, FailureCode, LogLine};
use crate::build::state::{BuildState, Happening};
use crate::store::{
    Accepted, ArtifactDomain, ArtifactName, Cancel, Delete, Fenced, Heartbeat, Lease, Leases,
    NewBuild, Outcome, StoreError,
};
use crate::tenant::TenantLimits;

const TENANTS: [&str; 3] = ["a", "b", "c"];
const RUNNING_MAX: u32 = 2;
const DAILY_MAX: usize = 8;
const ATTEMPTS_MAX: u32 = 3;

/// Something that somebody does. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    Create { tenant: usize, key: Option<u8> },
    Claim { dies: bool },
    Beat { lease: usize },
    Enter { lease: usize, state: usize },
    Say { lease: usize, lines: u8 },
    Complete { lease: usize, artifact: u8 },
    Know { lease: usize, artifact: u8 },
    Fail { lease: usize, is_late: bool },
    Retry { lease: usize, counts: bool, wait_secs: u8 },
    Cancel { build: usize },
    Delete { build: usize },
    Reap,
    Expire,
    Evict,
    Pass { secs: u8 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let any = 0..1000_usize;
    let step = prop_oneof![
        4 => (0..3_usize, proptest::option::weighted(0.2, 0..3_u8))
            .prop_map(|(tenant, key)| Step::Create { tenant, key }),
        5 => proptest::bool::weighted(0.3).prop_map(|dies| Step::Claim { dies }),
        1 => any.clone().prop_map(|lease| Step::Beat { lease }),
        5 => (any.clone(), 1..7_usize).prop_map(|(lease, state)| Step::Enter { lease, state }),
        1 => (any.clone(), 0..20_u8).prop_map(|(lease, lines)| Step::Say { lease, lines }),
        4 => (any.clone(), 0..4_u8)
            .prop_map(|(lease, artifact)| Step::Complete { lease, artifact }),
        2 => (any.clone(), 0..4_u8).prop_map(|(lease, artifact)| Step::Know { lease, artifact }),
        1 => (any.clone(), any_bool()).prop_map(|(lease, is_late)| Step::Fail { lease, is_late }),
        2 => (any.clone(), any_bool(), 0..3_u8)
            .prop_map(|(lease, counts, wait_secs)| Step::Retry { lease, counts, wait_secs }),
        2 => any.clone().prop_map(|build| Step::Cancel { build }),
        2 => any.prop_map(|build| Step::Delete { build }),
        1 => Just(Step::Reap),
        1 => Just(Step::Expire),
        1 => Just(Step::Evict),
        1 => (0..3_u8).prop_map(|secs| Step::Pass { secs }),
    ];
    proptest::collection::vec(step, 1..60)
}

fn any_bool() -> impl Strategy<Value = bool> {
    proptest::bool::ANY
}

/// A build as the model has it.
#[derive(Clone, Debug)]
struct Kept {
    id: BuildId,
    tenant: usize,
    key: Option<u8>,
    state: BuildState,
    attempt: u32,
    token: i64,
    dies: bool,
    cancel: bool,
    run_at: i64,
    ended_at: i64,
    artifact: Option<u8>,
    lines: u64,
}

impl Kept {
    /// Its log says by whom.
    fn end_cancelled(&mut self) {
        (self.state, self.artifact) = (BuildState::Cancelled, None);
        self.lines += 1;
    }
}

#[derive(Default)]
struct Model {
    builds: Vec<Kept>,
    leases: Vec<Lease>,
    accepted: [usize; 3],
    /// When each artifact was first there.
    artifacts: BTreeMap<u8, i64>,
    names: Vec<u8>,
}

type Checked = Result<(), TestCaseError>;

macro_rules! same {
    ($model:expr, $store:expr) => {
        prop_assert_eq!(format!("{:?}", $model), format!("{:?}", $store))
    };
}

/// Bytes of an artifact; no two sums of different ones are the same.
fn bytes(artifact: u8) -> u64 {
    1 << (4 * artifact)
}

fn key(artifact: u8) -> String {
    format!("public/{artifact}")
}

fn name(artifact: u8) -> ArtifactName {
    ArtifactName { domain: ArtifactDomain::Public, recipe: artifact.to_string() }
}

impl Model {
    /// The build whose lease is chosen, if the lease is still worth something.
    fn held(&mut self, lease: usize) -> Option<(Lease, Option<&mut Kept>)> {
        let lease = self.leases.get(lease % self.leases.len().max(1))?.clone();
        let found = self.builds.iter_mut().find(|build| build.id == lease.build);
        let found = found.filter(|build| build.state.is_running() && build.token == lease.token);
        Some((lease, found))
    }

    fn running(&self, tenant: usize) -> u32 {
        let builds = self.builds.iter();
        let count = builds.filter(|build| build.tenant == tenant && build.state.is_running());
        u32::try_from(count.count()).unwrap()
    }

    fn storage(&self, tenant: usize) -> u64 {
        let mut artifacts: Vec<u8> = self
            .builds
            .iter()
            .filter_map(|build| match build {
                Kept { tenant: owner, state: BuildState::Completed, artifact, .. }
                    if *owner == tenant =>
                {
                    *artifact
                }
                _ => None,
            })
            .collect();
        artifacts.sort_unstable();
        artifacts.dedup();
        artifacts.into_iter().map(bytes).sum()
    }

    /// Artifacts go with the last build that has them.
    fn sweep(&mut self) {
        let used: Vec<u8> = self.builds.iter().filter_map(|build| build.artifact).collect();
        self.artifacts.retain(|artifact, _| used.contains(artifact));
        self.names.retain(|artifact| used.contains(artifact));
    }

    async fn take(&mut self, t: &TestStore, step: &Step) -> Checked {
        match step {
            Step::Create { tenant, key } => self.create(t, *tenant, *key).await?,
            Step::Claim { dies } => self.claim(t, *dies).await?,
            Step::Beat { lease } => self.beat(t, *lease).await?,
            Step::Enter { lease, state } => self.enter(t, *lease, *state).await?,
            Step::Say { lease, lines } => self.say(t, *lease, *lines).await?,
            Step::Complete { lease, artifact } => self.complete(t, *lease, *artifact).await?,
            Step::Know { lease, artifact } => self.know(t, *lease, *artifact).await?,
            Step::Fail { lease, is_late } => self.fail(t, *lease, *is_late).await?,
            Step::Retry { lease, counts, wait_secs } => {
                self.retry(t, *lease, *counts, *wait_secs).await?;
            }
            Step::Cancel { build } => self.cancel(t, *build).await?,
            Step::Delete { build } => self.delete(t, *build).await?,
            Step::Reap => self.reap(t).await?,
            Step::Expire => self.expire(t).await?,
            Step::Evict => self.evict(t).await?,
            Step::Pass { secs } => t.advance_secs(i64::from(*secs)),
        }
        self.sweep();
        self.compare(t).await
    }

    async fn create(&mut self, t: &TestStore, owner: usize, key: Option<u8>) -> Checked {
        let daily_builds = u32::try_from(DAILY_MAX).unwrap();
        let limits = TenantLimits { concurrent_builds: RUNNING_MAX, daily_builds, ..plenty() };
        let idempotency_key = key.map(|key| key.to_string());
        let build = NewBuild { idempotency_key, ..new_build(t.now()) };
        let answer = t.ask(TENANTS[owner], &limits, &build).await;
        let known = self.builds.iter();
        let known = known.filter(|_| key.is_some()).find(|b| (b.tenant, b.key) == (owner, key));
        let known = known.map(|build| build.id.clone());
        match (known, answer) {
            (Some(known), Accepted::Known { build, .. }) => prop_assert_eq!(known, build.id),
            (None, Accepted::Quota(quota)) => {
                prop_assert_eq!(quota.quota_type, "daily_builds");
                prop_assert_eq!(self.accepted[owner], DAILY_MAX);
            }
            (None, Accepted::Created(created)) => {
                prop_assert!(self.accepted[owner] < DAILY_MAX);
                self.accepted[owner] += 1;
                self.builds.push(Kept {
                    id: created.id,
                    tenant: owner,
                    key,
                    state: BuildState::Queued,
                    attempt: 0,
                    token: 0,
                    dies: false,
                    cancel: false,
                    run_at: t.now().0,
                    ended_at: 0,
                    artifact: None,
                    lines: 0,
                });
            }
            (known, answer) => prop_assert!(false, "{known:?} but {answer:?}"),
        }
        Ok(())
    }

    async fn claim(&mut self, t: &TestStore, dies: bool) -> Checked {
        let now = t.now().0;
        let is_ready = |model: &Self, build: &Kept| {
            build.state == BuildState::Queued
                && build.run_at <= now
                && model.running(build.tenant) < RUNNING_MAX
        };
        let claimed = t.try_claim(if dies { 0 } else { LONG }).await;
        let Some(claimed) = claimed else {
            prop_assert!(!self.builds.iter().any(|build| is_ready(self, build)));
            return Ok(());
        };
        let place = self.builds.iter().position(|build| build.id == claimed.build.id).unwrap();
        prop_assert!(is_ready(self, &self.builds[place]));
        // A tenant's own builds come in order.
        let first = self
            .builds
            .iter()
            .filter(|build| build.tenant == self.builds[place].tenant && is_ready(self, build));
        let first = first.min_by_key(|build| (build.run_at, build.id.clone())).unwrap();
        prop_assert_eq!(&first.id, &claimed.build.id);
        let build = &mut self.builds[place];
        build.state = BuildState::Preparing;
        build.attempt += 1;
        build.token += 1;
        build.dies = dies;
        same!((build.attempt, build.token), (claimed.build.attempt, claimed.lease.token));
        self.leases.push(claimed.lease);
        Ok(())
    }

    async fn beat(&mut self, t: &TestStore, lease: usize) -> Checked {
        let Some((lease, held)) = self.held(lease) else { return Ok(()) };
        let expected = match held {
            None => Heartbeat::Lost,
            Some(build) => {
                build.dies = false;
                match build.cancel {
                    true => Heartbeat::Cancel { reason: "why".into() },
                    false => Heartbeat::GoOn,
                }
            }
        };
        same!(expected, t.rows().heartbeat(&lease, LONG, None, t.now()).await.unwrap());
        Ok(())
    }

    async fn enter(&mut self, t: &TestStore, lease: usize, state: usize) -> Checked {
        let Some((lease, held)) = self.held(lease) else { return Ok(()) };
        let state = BuildState::ALL[state];
        let done = t.rows().progress(&lease, state, 50, "step", t.now()).await;
        let Some(build) = held else {
            prop_assert_eq!(done.unwrap(), Fenced::Lost);
            return Ok(());
        };
        match build.state.next(Happening::Entered(state)) {
            Ok(to) => {
                prop_assert_eq!(done.unwrap(), Fenced::Written);
                build.state = to;
            }
            Err(_) => prop_assert!(matches!(done, Err(StoreError::Illegal(_)))),
        }
        Ok(())
    }

    async fn say(&mut self, t: &TestStore, lease: usize, lines: u8) -> Checked {
        let Some((lease, held)) = self.held(lease) else { return Ok(()) };
        let line = LogLine {
            offset: 0,
            at: t.now(),
            level: "info".into(),
            component: "builder".into(),
            message: "said".into(),
        };
        let done = t.rows().append_log(&lease, &vec![line; lines.into()]).await.unwrap();
        same!(if held.is_some() { Fenced::Written } else { Fenced::Lost }, done);
        if let Some(build) = held {
            build.lines += u64::from(lines);
        }
        Ok(())
    }

    async fn complete(&mut self, t: &TestStore, lease: usize, artifact: u8) -> Checked {
        let now = t.now();
        let Some((lease, held)) = self.held(lease) else { return Ok(()) };
        let outcome = Outcome::Completed(Box::new(result(&key(artifact), bytes(artifact))));
        let done = t.rows().finish(&lease, Some(&name(artifact)), &outcome, now).await;
        let Some(build) = held else {
            prop_assert_eq!(done.unwrap(), None);
            return Ok(());
        };
        if build.cancel {
            prop_assert_eq!(done.unwrap(), Some(BuildState::Cancelled));
            build.end_cancelled();
        } else if build.state == BuildState::Packaging {
            prop_assert_eq!(done.unwrap(), Some(BuildState::Completed));
            build.state = BuildState::Completed;
            build.artifact = Some(artifact);
            build.ended_at = now.0;
            self.artifacts.entry(artifact).or_insert(now.0);
            self.names.push(artifact);
        } else {
            prop_assert!(matches!(done, Err(StoreError::Illegal(_))));
        }
        Ok(())
    }

    async fn know(&mut self, t: &TestStore, lease: usize, artifact: u8) -> Checked {
        let is_known = self.names.contains(&artifact);
        let Some((lease, held)) = self.held(lease) else { return Ok(()) };
        let found = t.rows().known_artifact(&lease, &name(artifact)).await.unwrap();
        prop_assert_eq!(found.is_some(), is_known && held.is_some());
        if let (Some(build), Some(_)) = (held, found) {
            build.artifact = Some(artifact);
        }
        Ok(())
    }

    async fn fail(&mut self, t: &TestStore, lease: usize, is_late: bool) -> Checked {
        let now = t.now();
        let Some((lease, held)) = self.held(lease) else { return Ok(()) };
        let (outcome, state) = match is_late {
            true => (Outcome::TimedOut(failure(FailureCode::BuildTimeout)), BuildState::Timeout),
            false => (Outcome::Failed(failure(FailureCode::Internal)), BuildState::Failed),
        };
        let done = t.rows().finish(&lease, None, &outcome, now).await.unwrap();
        same!(held.as_ref().map(|_| state), done);
        if let Some(build) = held {
            (build.state, build.artifact) = (state, None);
        }
        Ok(())
    }

    async fn retry(&mut self, t: &TestStore, lease: usize, counts: bool, secs: u8) -> Checked {
        let Some((lease, held)) = self.held(lease) else { return Ok(()) };
        let failure = counts.then(|| failure(FailureCode::NetworkError));
        let run_at = t.now().plus_secs(secs.into());
        let outcome = Outcome::Retry { failure, run_at };
        let done = t.rows().finish(&lease, None, &outcome, t.now()).await.unwrap();
        let Some(build) = held else {
            prop_assert_eq!(done, None);
            return Ok(());
        };
        let state = if build.cancel { BuildState::Cancelled } else { BuildState::Queued };
        prop_assert_eq!(done, Some(state));
        build.artifact = None;
        if build.cancel {
            build.end_cancelled();
        } else {
            build.state = BuildState::Queued;
            build.run_at = run_at.0;
            build.lines += u64::from(counts);
            build.attempt -= u32::from(!counts);
        }
        Ok(())
    }

    async fn cancel(&mut self, t: &TestStore, build: usize) -> Checked {
        let count = self.builds.len().max(1);
        let Some(build) = self.builds.get_mut(build % count) else { return Ok(()) };
        let owner = tenant(TENANTS[build.tenant]);
        let expected = if build.state == BuildState::Queued {
            Cancel::Done
        } else if build.state.is_running() {
            Cancel::Requested
        } else {
            Cancel::Ended(build.state)
        };
        let done = t.rows().cancel(&owner, &build.id, "why", t.now()).await.unwrap();
        prop_assert_eq!(Some(expected), done);
        build.cancel |= !build.state.is_terminal();
        if build.state == BuildState::Queued {
            build.end_cancelled();
        }
        Ok(())
    }

    async fn delete(&mut self, t: &TestStore, build: usize) -> Checked {
        let place = build % self.builds.len().max(1);
        let Some(build) = self.builds.get(place) else { return Ok(()) };
        let owner = tenant(TENANTS[build.tenant]);
        let done = t.rows().delete(&owner, &build.id).await.unwrap();
        if build.state.is_terminal() {
            prop_assert_eq!(done, Some(Delete::Done));
            self.builds.remove(place);
        } else {
            prop_assert_eq!(done, Some(Delete::Running(build.state)));
        }
        Ok(())
    }

    async fn reap(&mut self, t: &TestStore) -> Checked {
        let mut expected = 0;
        for build in &mut self.builds {
            if !build.state.is_running() || !build.dies {
                continue;
            }
            expected += 1;
            build.token += 1;
            build.artifact = None;
            if build.cancel {
                build.end_cancelled();
                continue;
            }
            // Its log says that it was lost.
            build.lines += 1;
            if build.attempt >= ATTEMPTS_MAX {
                build.state = BuildState::Failed;
            } else {
                (build.state, build.run_at) = (BuildState::Queued, t.now().0);
            }
        }
        prop_assert_eq!(
            expected,
            t.rows().reap(Leases::Expired, ATTEMPTS_MAX, t.now()).await.unwrap()
        );
        Ok(())
    }

    async fn expire(&mut self, t: &TestStore) -> Checked {
        let now = t.now();
        let mut expected = 0;
        for build in &mut self.builds {
            let is_old = build.state == BuildState::Completed && build.ended_at < now.0;
            if is_old && build.artifact.take().is_some() {
                expected += 1;
            }
        }
        prop_assert_eq!(expected, t.rows().expire(now).await.unwrap());
        Ok(())
    }

    /// Everything goes that no running build wants.
    async fn evict(&mut self, t: &TestStore) -> Checked {
        let wanted: Vec<u8> = self
            .builds
            .iter()
            .filter(|build| build.state.is_running())
            .filter_map(|build| build.artifact)
            .collect();
        let gone = self.artifacts.keys().filter(|artifact| !wanted.contains(artifact)).count();
        let answer = t.rows().evict(0).await.unwrap();
        prop_assert_eq!(u64::try_from(gone).unwrap(), answer);
        for build in &mut self.builds {
            if build.state == BuildState::Completed {
                build.artifact = None;
            }
        }
        self.names.clear();
        Ok(())
    }

    /// Model and database, side by side.
    async fn compare(&self, t: &TestStore) -> Checked {
        let violations = crate::store::admin::check(&t.store).await.unwrap();
        prop_assert!(violations.is_empty(), "{:?}", violations);
        for (owner, name) in TENANTS.into_iter().enumerate() {
            let page = t.rows().list(&tenant(name), &super::lists::newest(100)).await.unwrap();
            let row = |build: &Build| {
                let id = build.id.clone();
                (id, build.state, build.attempt, build.has_artifact)
            };
            let found: Vec<_> = page.builds.iter().map(row).collect();
            let own = self.builds.iter().rev().filter(|build| build.tenant == owner);
            let expected: Vec<_> = own
                .map(|build| {
                    let has = build.state == BuildState::Completed && build.artifact.is_some();
                    (build.id.clone(), build.state, build.attempt, has)
                })
                .collect();
            prop_assert_eq!(expected, found);
            let usage = t.rows().usage(&tenant(name), t.now()).await.unwrap();
            same!(
                (self.accepted[owner], self.running(owner), self.storage(owner)),
                (usage.created_today, usage.running, usage.storage_bytes)
            );
        }
        for artifact in 0..4 {
            let is_there = self.builds.iter().any(|build| build.artifact == Some(artifact));
            let found = t.rows().artifact_is_referenced(&key(artifact)).await.unwrap();
            prop_assert_eq!(is_there, found);
        }
        let lines: u64 = self.builds.iter().map(|build| build.lines).sum();
        let mut found = 0;
        for build in &self.builds {
            let owner = tenant(TENANTS[build.tenant]);
            found += t.rows().log(&owner, &build.id, 0, 10_000).await.unwrap().len();
        }
        prop_assert_eq!(lines, found as u64);
        Ok(())
    }
}

/// Runs random histories, each on a store of its own.
fn histories(cases: u32, open: impl AsyncFn() -> TestStore) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let steps_taken = AtomicU32::new(0);
    let told = TestRunner::new(config).run(&steps(), |steps| {
        runtime.block_on(async {
            let t = open().await;
            let mut model = Model::default();
            let mut told = Ok(());
            for step in &steps {
                steps_taken.fetch_add(1, Ordering::Relaxed);
                told = model.take(&t, step).await;
                if told.is_err() {
                    break;
                }
            }
            t.store.close().await;
            told
        })
    });
    println!("{} steps in {cases} histories", steps_taken.load(Ordering::Relaxed));
    told.unwrap();
}

#[test]
fn random_histories_are_as_the_model_has_them_on_sqlite() {
    histories(40, TestStore::sqlite);
}

#[test]
fn random_histories_are_as_the_model_has_them_on_postgresql() {
    let Some(postgres) = Postgres::start() else { return };
    histories(12, async || TestStore::postgres(&postgres.database()).await);
}
