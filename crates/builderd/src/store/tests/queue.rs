//! Who is served when, and what leases are worth.

use std::collections::{BTreeMap, BTreeSet};

use super::{LONG, TestStore, failure, new_build, plenty, result, tenant};
use crate::build::record::{Build, BuildMetrics, FailureCode, LiveUsage, LogLine, Micros};
use crate::build::state::BuildState;
use crate::store::engine::Engine;
use crate::store::{
    Accepted, ArtifactDomain, ArtifactName, Cancel, Claimed, Delete, Depth, Fenced, Filter,
    Heartbeat, Leases, Outcome, StoreError,
};
use crate::tenant::{TenantLimits, Tier};

pub(super) async fn a_build_goes_from_the_queue_to_its_end(t: &TestStore) {
    let created = t.create("a").await;
    assert_eq!(created.state, BuildState::Queued);
    assert_eq!(created, t.get(&created).await);
    assert_eq!(t.rows().depth().await.unwrap(), Depth { queued: 1, running: 0 });

    t.advance_secs(5);
    let claimed = t.claim().await;
    assert_eq!(claimed.build.id, created.id);
    assert_eq!(claimed.build.state, BuildState::Preparing);
    assert_eq!(claimed.build.started_at, Some(t.now()));
    assert_eq!(claimed.build.attempt, 1);
    assert_eq!(claimed.sealed_credentials, Some(vec![1, 2, 0, 255]));
    assert_eq!((claimed.lease.token(), claimed.lease.build()), (1, &created.id));
    assert_eq!(t.rows().depth().await.unwrap(), Depth { queued: 0, running: 1 });
    assert!(t.try_claim(LONG).await.is_none());

    t.advance_secs(2);
    t.pack(&claimed).await;
    let half = t.get(&created).await;
    assert_eq!((half.progress_percent, half.step.as_str()), (90, "storing"));
    t.advance_secs(1);
    let made = result("tenant-a/one", 100);
    let outcome = Outcome::Completed(Box::new(made.clone()));
    assert_eq!(t.finish(&claimed, outcome).await, Fenced::Written);
    let done = t.get(&created).await;
    assert_eq!((done.state, done.progress_percent), (BuildState::Completed, 100));
    assert_eq!((done.ended_at, done.updated_at), (Some(t.now()), t.now()));
    assert_eq!(done.result, Some(made));
    assert_eq!(t.rows().depth().await.unwrap(), Depth::default());
    let usage = t.rows().usage(&created.tenant, t.now()).await.unwrap();
    assert_eq!((usage.completed_today, usage.created_today, usage.compute_secs), (1, 1, 3));
}

/// How many builds of each tenant are started in so many claims.
async fn starts(t: &TestStore, claims: usize) -> BTreeMap<String, u32> {
    let mut starts = BTreeMap::new();
    for _ in 0..claims {
        *starts.entry(t.claim().await.lease.tenant.to_string()).or_default() += 1;
    }
    starts
}

pub(super) async fn shares_follow_the_weights(t: &TestStore) {
    let tiers = [("free", Tier::Free), ("pro", Tier::Pro), ("enterprise", Tier::Enterprise)];
    for (name, tier) in tiers {
        for _ in 0..30 {
            t.create_at(name, tier).await;
        }
    }
    let mut all: BTreeMap<String, u32> = BTreeMap::new();
    for claims in 1..=42_u32 {
        for (name, count) in starts(t, 1).await {
            *all.entry(name).or_default() += count;
        }
        // Nobody is further than one build from its share, at any time.
        for (name, tier) in tiers {
            let share = f64::from(claims) * f64::from(tier.weight()) / 14.0;
            let off = (f64::from(*all.get(name).unwrap_or(&0)) - share).abs();
            assert!(off <= 1.0, "{name} is {off} off after {claims}: {all:?}");
        }
    }
    assert_eq!(all, BTreeMap::from([("enterprise", 30), ("free", 3), ("pro", 9)].map(owned)));
}

fn owned((name, count): (&str, u32)) -> (String, u32) {
    (name.to_owned(), count)
}

pub(super) async fn an_idle_tenant_saves_nothing_up(t: &TestStore) {
    t.create("late").await;
    t.complete("tenant-late/x", 1).await;
    for _ in 0..30 {
        t.create("busy").await;
    }
    starts(t, 10).await;
    for _ in 0..10 {
        t.create("late").await;
    }
    let starts = starts(t, 10).await;
    assert_eq!(starts, BTreeMap::from([("busy", 5), ("late", 5)].map(owned)));
}

pub(super) async fn who_worked_alone_owes_nothing(t: &TestStore) {
    t.create("other").await;
    starts(t, 1).await;
    for _ in 0..20 {
        t.create("alone").await;
        starts(t, 1).await;
    }
    for _ in 0..10 {
        t.create("other").await;
    }
    for _ in 0..10 {
        t.create("alone").await;
    }
    let starts = starts(t, 10).await;
    assert_eq!(starts, BTreeMap::from([("alone", 5), ("other", 5)].map(owned)));
}

pub(super) async fn a_tenant_never_runs_more_than_it_may(t: &TestStore) {
    let limits = TenantLimits { concurrent_builds: 3, ..plenty() };
    for _ in 0..10 {
        t.ask("a", &limits, &new_build(t.now())).await;
    }
    let claims = (0..20).map(|_| t.try_claim(LONG));
    let claimed = futures_util::future::join_all(claims).await;
    let mut claimed: Vec<Claimed> = claimed.into_iter().flatten().collect();
    assert!(claimed.len() <= 3, "{} run", claimed.len());
    // Who found the tenant's row locked too often went away with nothing, and comes again.
    while let Some(one) = t.try_claim(LONG).await {
        claimed.push(one);
    }
    assert_eq!(claimed.len(), 3);
    t.finish(&claimed[0], Outcome::Failed(failure(FailureCode::InvalidSource))).await;
    assert!(t.try_claim(LONG).await.is_some());
    assert!(t.try_claim(LONG).await.is_none());
}

pub(super) async fn many_workers_never_take_the_same_build(t: &TestStore) {
    for name in ["a", "b", "c"] {
        for _ in 0..20 {
            t.create(name).await;
        }
    }
    let work = (0..8).map(|_| async {
        let mut taken = Vec::new();
        while let Some(claimed) = t.try_claim(LONG).await {
            taken.push(claimed.lease.build.clone());
            t.pack(&claimed).await;
            let outcome = Outcome::Failed(failure(FailureCode::InvalidSource));
            assert_eq!(t.finish(&claimed, outcome).await, Fenced::Written);
        }
        taken
    });
    let taken: Vec<_> = futures_util::future::join_all(work).await.concat();
    assert_eq!(taken.len(), 60);
    assert_eq!(taken.iter().collect::<BTreeSet<_>>().len(), 60);
}

pub(super) async fn a_worker_without_its_lease_changes_nothing(t: &TestStore) {
    let build = t.create("a").await;
    let stale = t.claim_and_die().await;
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 1);
    let current = t.claim().await;
    assert!(current.lease.token() > stale.lease.token());
    let before = t.get(&build).await;
    let log_before = t.rows().log(&build.tenant, &build.id, 0, 10).await.unwrap();

    t.advance_secs(1);
    let (rows, now) = (t.rows(), t.now());
    let beat = rows.heartbeat(&stale.lease, LONG, Some(&usage(7)), now).await.unwrap();
    assert_eq!(beat, Heartbeat::Lost);
    let progress = rows.progress(&stale.lease, BuildState::Packaging, 99, "x", now).await;
    assert_eq!(progress.unwrap(), Fenced::Lost);
    let log = rows.append_log(&stale.lease, &[line("from the dead")]).await;
    assert_eq!(log.unwrap(), Fenced::Lost);
    let name = ArtifactName { domain: ArtifactDomain::Public, recipe: "r".into() };
    for outcome in [
        Outcome::Completed(Box::new(result("tenant-a/stale", 7))),
        Outcome::Failed(failure(FailureCode::Internal)),
        Outcome::Cancelled,
        Outcome::TimedOut(failure(FailureCode::BuildTimeout)),
        Outcome::Retry { failure: None, run_at: now },
    ] {
        let done = rows.finish(&stale.lease, Some(&name), &outcome, now).await.unwrap();
        assert_eq!(done, None, "{outcome:?}");
    }
    assert_eq!(t.get(&build).await, before);
    assert_eq!(rows.log(&build.tenant, &build.id, 0, 10).await.unwrap(), log_before);
    assert!(!rows.artifact_is_referenced("tenant-a/stale").await.unwrap());
    assert!(rows.known_artifact(&stale.lease, &name).await.unwrap().is_none());
    t.check().await;

    t.pack(&current).await;
    let outcome = Outcome::Completed(Box::new(result("tenant-a/own", 7)));
    assert_eq!(t.finish(&current, outcome.clone()).await, Fenced::Written);
    // And nobody ends it twice.
    assert_eq!(t.finish(&current, outcome).await, Fenced::Lost);
    assert_eq!(t.state(&build).await, BuildState::Completed);
}

fn line(message: &str) -> LogLine {
    LogLine {
        offset: 0,
        at: Micros(5),
        level: "info".into(),
        component: "builder".into(),
        message: message.into(),
    }
}

pub(super) async fn a_lease_that_runs_out_puts_the_build_back(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim_and_die().await;
    t.advance_secs(40);
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 1);
    let back = t.get(&build).await;
    assert_eq!((back.state, back.attempt, back.attempts.len()), (BuildState::Queued, 1, 1));
    let attempt = &back.attempts[0];
    assert_eq!(attempt.failure.code, FailureCode::TemporaryResourceError);
    assert_eq!(attempt.failure.step, "prepare");
    assert_eq!(attempt.failure.cause, "the worker stopped answering");
    assert_eq!(attempt.attempt, 1);
    // Nobody worked on it after its lease; a server's leases live by its own clock.
    if matches!(t.rows().engine, Engine::Sqlite { .. }) {
        assert_eq!(attempt.ended_at, attempt.started_at);
        let usage = t.rows().usage(&build.tenant, t.now()).await.unwrap();
        assert_eq!(usage.compute_secs, 0);
    }
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 0);
    let again = t.claim().await;
    assert_eq!((again.build.attempt, again.lease.token()), (2, claimed.lease.token() + 2));
    assert_eq!(again.build.started_at, claimed.build.started_at);
    assert_eq!(again.sealed_credentials, claimed.sealed_credentials);
}

pub(super) async fn who_is_alone_waits_for_no_lease(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim().await;
    t.advance_secs(1);
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 0);
    assert_eq!(t.rows().reap(Leases::All, 5, t.now()).await.unwrap(), 1);
    let back = t.get(&build).await;
    assert_eq!((back.state, back.attempts[0].ended_at), (BuildState::Queued, t.now()));
    // At once, and not when its lease would have run out.
    let again = t.claim().await;
    assert_eq!((again.build.id, again.build.attempt), (claimed.build.id, 2));
}

pub(super) async fn a_build_that_cannot_be_read_holds_nobody_up(t: &TestStore) {
    let strange = t.create("a").await;
    t.advance_secs(1);
    let plain = t.create("a").await;
    let other = t.create("b").await;
    // As a newer version might write it: all that this one knows, and one thing more, which must
    // not be left undone.
    t.damage(
        "UPDATE build SET request = REPLACE(request, '{\"image\":', \
         '{\"sign_with\":\"a key\",\"image\":') WHERE id = $1",
        &strange,
    )
    .await;
    assert!(!t.get(&strange).await.is_whole);
    let mut taken = BTreeSet::from([t.claim().await.build.id, t.claim().await.build.id]);
    assert_eq!(taken, BTreeSet::from([plain.id.clone(), other.id.clone()]));
    assert!(t.try_claim(LONG).await.is_none());

    // It stays in the queue until somebody can read it, and keeps its turn's worth.
    t.damage(
        "UPDATE build SET request = (SELECT request FROM build b WHERE b.id <> $1 LIMIT 1) \
              WHERE id = $1",
        &strange,
    )
    .await;
    t.advance_secs(31);
    taken.insert(t.claim().await.build.id);
    assert!(taken.contains(&strange.id));

    // Nor do lost ones whose list of tries cannot be read keep others from coming back.
    t.damage("UPDATE build SET attempts = 'x' WHERE id = $1", &strange).await;
    assert_eq!(t.rows().reap(Leases::All, 5, t.now()).await.unwrap(), 2);
    t.damage("UPDATE build SET attempts = '[]' WHERE id = $1", &strange).await;
    assert_eq!(t.rows().reap(Leases::All, 5, t.now()).await.unwrap(), 1);
}

pub(super) async fn a_build_that_nobody_can_read_fails_in_the_end(t: &TestStore) {
    let (first, second) = (t.create("a").await, t.create("a").await);
    for build in [&first, &second] {
        t.damage("UPDATE build SET request = '{}', attempts = 'x' WHERE id = $1", build).await;
    }
    // Ten minutes are not enough to give it up.
    let began = t.now();
    for _ in 0..20 {
        assert!(t.try_claim(LONG).await.is_none());
        t.advance_secs(30);
    }
    assert!(t.now() >= began.plus_secs(600));
    assert_eq!(t.rows().depth().await.unwrap(), Depth { queued: 2, running: 0 });

    // Whoever can read it takes it, and it begins anew.
    let mend = "UPDATE build SET attempts = '[]', request = (SELECT request FROM build b \
         WHERE b.request <> '{}' LIMIT 1) WHERE id = $1";
    let other = t.create("b").await;
    t.damage(mend, &second).await;
    let mut taken = [t.claim().await, t.claim().await];
    taken.sort_by_key(|claimed| claimed.build.id != second.id);
    assert_eq!(taken[1].build.id, other.id);
    let retry = Outcome::Retry { failure: None, run_at: t.now() };
    assert_eq!(t.finish(&taken[0], retry).await, Fenced::Written);
    t.damage("UPDATE build SET request = '{}' WHERE id = $1", &second).await;
    assert!(t.try_claim(LONG).await.is_none());
    assert_eq!(t.rows().depth().await.unwrap(), Depth { queued: 1, running: 1 });

    let failed = t.get(&first).await;
    assert_eq!((failed.state, failed.ended_at), (BuildState::Failed, Some(t.now())));
    let why = failed.failure.expect("a failed build says why");
    assert_eq!((why.code, why.blame.as_str()), (FailureCode::Internal, "ours"));
    assert!(why.cause.contains("cannot be read"), "{}", why.cause);
    assert!(why.remedy.contains("build it again"), "{}", why.remedy);
    let usage = t.rows().usage(&first.tenant, t.now()).await.unwrap();
    assert_eq!((usage.queued, usage.running, usage.failed_today), (1, 0, 1));
    let sealed = "SELECT COUNT(*) AS found FROM build \
         WHERE state = 'failed' AND sealed_credentials IS NOT NULL";
    let sealed = t.rows().engine.optional(crate::store::engine::sql(sealed)).await.unwrap();
    assert_eq!(sealed.expect("a count").count("found").unwrap(), 0);
}

pub(super) async fn a_build_with_impossible_numbers_holds_nobody_up_and_ends(t: &TestStore) {
    let (first, second) = (t.create("a").await, t.create("a").await);
    for strange in [&first, &second] {
        let damage = "UPDATE build SET attempt = -1, progress_percent = -1, log_lines = -1, \
             log_bytes = -7 WHERE id = $1";
        t.damage(damage, strange).await;
    }
    t.advance_secs(1);
    let (plain, other) = (t.create("a").await, t.create("b").await);
    let taken = BTreeSet::from([t.claim().await.build.id, t.claim().await.build.id]);
    assert_eq!(taken, BTreeSet::from([plain.id, other.id]));
    assert!(t.try_claim(LONG).await.is_none());

    // Its tenant gets rid of it, or the queue does.
    let cancelled = t.rows().cancel(&second.tenant, &second.id, "", t.now()).await;
    assert_eq!(cancelled.unwrap(), Some(Cancel::Done));
    for _ in 0..20 {
        assert_eq!(t.state(&first).await, BuildState::Queued);
        t.advance_secs(30);
        assert!(t.try_claim(LONG).await.is_none());
    }
    assert_eq!(t.state(&first).await, BuildState::Failed);
    for ended in [&first, &second] {
        let deleted = t.rows().delete(&ended.tenant, &ended.id).await.unwrap();
        assert_eq!(deleted, Some(Delete::Done));
    }
}

pub(super) async fn a_build_whose_name_cannot_be_read_holds_nobody_up(t: &TestStore) {
    let strange = t.create("a").await;
    t.advance_secs(1);
    let plain = t.create("a").await;
    t.damage("DELETE FROM build_event WHERE build_id = $1", &strange).await;
    t.damage("UPDATE build SET id = 'tomorrow-1' WHERE id = $1", &strange).await;
    let claimed = t.claim_and_die().await;
    assert_eq!(claimed.build.id, plain.id);
    let all = Filter { limit: 10, ..Filter::default() };
    let page = t.rows().list(&plain.tenant, &all).await.unwrap();
    assert_eq!(page.builds.iter().map(|build| &build.id).collect::<Vec<_>>(), [&plain.id]);
    assert_eq!(page.total, 2);
    t.write(
        "UPDATE build SET state = 'building', lease_owner = 'w', lease_expires_at = 0 \
         WHERE id = 'tomorrow-1'",
    )
    .await;
    t.advance_secs(1);
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 1);
    assert_eq!(t.state(&plain).await, BuildState::Queued);
    t.write(
        "UPDATE build SET state = 'queued', lease_owner = NULL, lease_expires_at = NULL \
         WHERE id = 'tomorrow-1'",
    )
    .await;
    t.damage("UPDATE build SET id = $1 WHERE id = 'tomorrow-1'", &strange).await;
    let event = "INSERT INTO build_event (tenant_id, build_id, seq, happened_at, from_state, \
         to_state, lease_token, actor) \
         SELECT tenant_id, id, 1, created_at, '', 'queued', 0, 'tenant' FROM build WHERE id = $1";
    t.damage(event, &strange).await;
}

pub(super) async fn what_the_database_refuses_of_one_build_holds_nobody_up(t: &TestStore) {
    let strange = t.create("a").await;
    t.advance_secs(1);
    let (plain, other) = (t.create("a").await, t.create("b").await);
    // Its next event is there already.
    let event = "INSERT INTO build_event (tenant_id, build_id, seq, happened_at, from_state, \
         to_state, lease_token, actor) \
         SELECT tenant_id, id, 2, created_at, '', 'queued', 0, 'nobody' FROM build WHERE id = $1";
    t.damage(event, &strange).await;
    let taken =
        BTreeSet::from([t.claim_and_die().await.build.id, t.claim_and_die().await.build.id]);
    assert_eq!(taken, BTreeSet::from([plain.id, other.id]));
    assert!(t.try_claim(LONG).await.is_none());
    t.damage("DELETE FROM build_event WHERE build_id = $1 AND seq = 2", &strange).await;

    // A tenant's counter says that none of its builds runs.
    t.write("UPDATE tenant SET running = 0 WHERE id = 'a'").await;
    t.advance_secs(1);
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 1);
    t.write("UPDATE tenant SET running = 1 WHERE id = 'a'").await;
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 1);
}

pub(super) async fn a_tenant_with_impossible_numbers_holds_nobody_up(t: &TestStore) {
    t.create("strange").await;
    t.write("UPDATE tenant SET weight = 5000000000 WHERE id = 'strange'").await;
    // Who comes new is measured against the next in the queue.
    let plain = t.create("plain").await;
    assert_eq!(t.claim().await.build.id, plain.id);
    assert!(t.try_claim(LONG).await.is_none());
    // Its next build puts its row in order.
    t.create("strange").await;
    assert_eq!(t.claim().await.build.tenant, tenant("strange"));
    t.advance_secs(31);
    assert_eq!(t.claim().await.build.tenant, tenant("strange"));
}

pub(super) async fn a_heartbeat_keeps_the_lease(t: &TestStore) {
    t.create("a").await;
    let claimed = t.claim_and_die().await;
    let beat = t.rows().heartbeat(&claimed.lease, LONG, None, t.now()).await.unwrap();
    assert_eq!(beat, Heartbeat::GoOn);
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 0);
    t.finish(&claimed, Outcome::Failed(failure(FailureCode::Internal))).await;
    let beat = t.rows().heartbeat(&claimed.lease, LONG, None, t.now()).await.unwrap();
    assert_eq!(beat, Heartbeat::Lost);
}

fn usage(memory_bytes: u64) -> LiveUsage {
    let so_far = BuildMetrics { cpu_ms: 1500, fetched_bytes: 9, ..BuildMetrics::default() };
    LiveUsage { memory_bytes, cpu_percent: 150, disk_bytes: 1 << 40, so_far }
}

pub(super) async fn a_heartbeat_says_what_the_build_takes(t: &TestStore) {
    let build = t.create("a").await;
    let first = t.claim().await;
    assert_eq!(t.get(&build).await.usage, None);
    let before = t.get(&build).await;
    let beat = async |claimed: &Claimed, usage: Option<LiveUsage>| {
        let beat = t.rows().heartbeat(&claimed.lease, LONG, usage.as_ref(), t.now());
        assert_eq!(beat.await.unwrap(), Heartbeat::GoOn);
    };
    beat(&first, Some(usage(64))).await;
    beat(&first, Some(usage(32))).await;
    beat(&first, None).await;
    let running = t.get(&build).await;
    assert_eq!(running.usage, Some(usage(32)));
    assert_eq!(running, Build { usage: Some(usage(32)), ..before });
    let listed = t.rows().list(&build.tenant, &Filter { limit: 1, ..Filter::default() }).await;
    assert_eq!(listed.unwrap().builds, [running]);

    // A build that waits takes nothing, and a new try begins with nothing.
    let failure = failure(FailureCode::NetworkError);
    let retry = Outcome::Retry { failure: Some(failure.clone()), run_at: t.now() };
    t.finish(&first, retry).await;
    assert_eq!(t.get(&build).await.usage, None);
    let second = t.claim().await;
    assert_eq!((&second.build.usage, t.get(&build).await.usage), (&None, None));

    // What a failed one took last is told; of a completed one the result tells.
    beat(&second, Some(usage(16))).await;
    t.finish(&second, Outcome::Failed(failure)).await;
    assert_eq!(t.get(&build).await.usage, Some(usage(16)));
    let other = t.create("a").await;
    let third = t.claim().await;
    beat(&third, Some(usage(8))).await;
    t.pack(&third).await;
    t.finish(&third, Outcome::Completed(Box::new(result("tenant-a/x", 5)))).await;
    let completed = t.get(&other).await;
    assert_eq!((completed.state, completed.usage), (BuildState::Completed, None));
}

pub(super) async fn a_build_whose_workers_die_fails_in_the_end(t: &TestStore) {
    let build = t.create("a").await;
    for _ in 0..3 {
        t.claim_and_die().await;
        assert_eq!(t.rows().reap(Leases::Expired, 3, t.now()).await.unwrap(), 1);
    }
    let failed = t.get(&build).await;
    assert_eq!((failed.state, failed.attempts.len()), (BuildState::Failed, 2));
    let failure = failed.failure.expect("a failed build says why");
    assert_eq!(failure.code, FailureCode::TemporaryResourceError);
    assert!(t.try_claim(LONG).await.is_none());
}

pub(super) async fn a_build_that_is_lost_again_and_again_rests_between_its_tries(t: &TestStore) {
    t.create("a").await;
    for rest_secs in [0, 0, 1, 2] {
        t.claim_and_die().await;
        assert_eq!(t.rows().reap(Leases::Expired, 20, t.now()).await.unwrap(), 1);
        if rest_secs > 0 {
            assert!(t.try_claim(LONG).await.is_none());
            t.advance_secs(rest_secs);
        }
    }
    assert!(t.try_claim(LONG).await.is_some());
}

pub(super) async fn a_cancelled_build_is_never_queued_again(t: &TestStore) {
    let (first, second) = (t.create("a").await, t.create("a").await);
    let lost = t.claim_and_die().await;
    let retried = t.claim().await;
    for build in [&first, &second] {
        let done = t.rows().cancel(&build.tenant, &build.id, "no need", t.now()).await;
        assert_eq!(done.unwrap(), Some(Cancel::Requested));
    }
    assert_eq!(t.rows().reap(Leases::Expired, 5, t.now()).await.unwrap(), 1);
    let failure = Some(failure(FailureCode::NetworkError));
    let outcome = Outcome::Retry { failure, run_at: t.now() };
    assert_eq!(t.finish(&retried, outcome).await, Fenced::Written);
    assert_eq!(t.state(&first).await, BuildState::Cancelled);
    assert_eq!(t.state(&second).await, BuildState::Cancelled);
    assert_eq!(t.finish(&lost, Outcome::Cancelled).await, Fenced::Lost);
    assert!(t.try_claim(LONG).await.is_none());
    for build in [&first, &second] {
        assert_eq!(t.last_line(build).await, "cancelled by service while it ran: no need");
    }
}

pub(super) async fn a_queued_build_is_cancelled_at_once(t: &TestStore) {
    let build = t.create("a").await;
    t.advance_secs(1);
    let cancel = || t.rows().cancel(&build.tenant, &build.id, "mistake", t.now());
    assert_eq!(cancel().await.unwrap(), Some(Cancel::Done));
    let cancelled = t.get(&build).await;
    assert_eq!(cancelled.state, BuildState::Cancelled);
    assert_eq!(cancelled.cancel_reason.as_deref(), Some("mistake"));
    assert_eq!((cancelled.ended_at, cancelled.started_at), (Some(t.now()), None));
    assert!(t.try_claim(LONG).await.is_none());
    assert_eq!(cancel().await.unwrap(), Some(Cancel::Ended(BuildState::Cancelled)));
    let log = t.rows().log(&build.tenant, &build.id, 0, 10).await.unwrap();
    assert_eq!(log.len(), 1, "no worker says it: {log:?}");
    assert_eq!((&*log[0].level, &*log[0].component), ("warn", "queue"));
    assert_eq!(log[0].message, "cancelled by service while it waited: mistake");
}

pub(super) async fn a_cancelled_build_never_completes(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim().await;
    let cancel = |reason| t.rows().cancel(&build.tenant, &build.id, reason, t.now());
    assert_eq!(cancel("stop").await.unwrap(), Some(Cancel::Requested));
    assert_eq!(cancel("again").await.unwrap(), Some(Cancel::Requested));
    let beat = t.rows().heartbeat(&claimed.lease, LONG, None, t.now()).await.unwrap();
    assert_eq!(beat, Heartbeat::Cancel { reason: "stop".into() });
    // The worker did not hear it in time.
    t.pack(&claimed).await;
    let outcome = Outcome::Completed(Box::new(result("tenant-a/late", 7)));
    assert_eq!(t.finish(&claimed, outcome).await, Fenced::Written);
    let cancelled = t.get(&build).await;
    assert_eq!((cancelled.state, cancelled.result), (BuildState::Cancelled, None));
    assert_eq!(t.last_line(&build).await, "cancelled by service while it ran: stop");
    assert!(!t.rows().artifact_is_referenced("tenant-a/late").await.unwrap());
    let usage = t.rows().usage(&build.tenant, t.now()).await.unwrap();
    assert_eq!((usage.storage_bytes, usage.completed_today), (0, 0));
}

pub(super) async fn a_failed_build_stays_failed(t: &TestStore) {
    let (failed, late) = (t.create("a").await, t.create("a").await);
    let why = failure(FailureCode::AuthenticationFailed);
    let claimed = t.claim().await;
    t.finish(&claimed, Outcome::Failed(why.clone())).await;
    let claimed = t.claim().await;
    t.finish(&claimed, Outcome::TimedOut(failure(FailureCode::BuildTimeout))).await;
    let build = t.get(&failed).await;
    assert_eq!((build.state, build.failure), (BuildState::Failed, Some(why)));
    assert_eq!(t.state(&late).await, BuildState::Timeout);
    let ended = t.rows().cancel(&late.tenant, &late.id, "", t.now()).await.unwrap();
    assert_eq!(ended, Some(Cancel::Ended(BuildState::Timeout)));
    let usage = t.rows().usage(&late.tenant, t.now()).await.unwrap();
    assert_eq!((usage.failed_today, usage.running, usage.queued), (2, 0, 0));
}

pub(super) async fn a_retry_waits_until_its_time(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim().await;
    t.pack(&claimed).await;
    t.advance_secs(4);
    let why = failure(FailureCode::NetworkError);
    let run_at = t.now().plus_secs(30);
    t.finish(&claimed, Outcome::Retry { failure: Some(why.clone()), run_at }).await;
    let waiting = t.get(&build).await;
    assert_eq!((waiting.state, waiting.progress_percent), (BuildState::Queued, 0));
    assert_eq!(waiting.attempts.len(), 1);
    assert_eq!(waiting.attempts[0].failure, why);
    assert_eq!(waiting.attempts[0].ended_at, t.now());
    assert_eq!(waiting.next_attempt_at(t.now()), Some(run_at));
    assert!(t.try_claim(LONG).await.is_none());
    t.advance_secs(30);
    assert_eq!(t.get(&build).await.next_attempt_at(t.now()), None, "it may begin");
    let again = t.claim().await;
    assert_eq!((again.build.attempt, again.build.id), (2, build.id));
}

pub(super) async fn a_shutdown_counts_no_try(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim().await;
    t.finish(&claimed, Outcome::Retry { failure: None, run_at: t.now() }).await;
    let back = t.get(&build).await;
    assert_eq!((back.state, back.attempt, back.attempts.len()), (BuildState::Queued, 0, 0));
    let again = t.claim().await;
    assert_eq!(again.build.attempt, 1);
    assert!(again.lease.token() > claimed.lease.token());
}

pub(super) async fn progress_never_goes_back(t: &TestStore) {
    let build = t.create("a").await;
    let claimed = t.claim().await;
    let enter =
        |state, percent| t.rows().progress(&claimed.lease, state, percent, "some step", t.now());
    enter(BuildState::Downloading, 40).await.unwrap();
    enter(BuildState::Downloading, 30).await.unwrap();
    assert_eq!(t.get(&build).await.progress_percent, 40);
    enter(BuildState::Building, 500).await.unwrap();
    assert_eq!(t.get(&build).await.progress_percent, 100);
    for state in [BuildState::Downloading, BuildState::Queued, BuildState::Completed] {
        let refused = enter(state, 50).await;
        assert!(matches!(refused, Err(StoreError::Illegal(_))), "{state}: {refused:?}");
    }
    // An artifact is published from the last step only.
    let outcome = Outcome::Completed(Box::new(result("tenant-a/early", 7)));
    let refused = t.rows().finish(&claimed.lease, None, &outcome, t.now()).await;
    assert!(matches!(refused, Err(StoreError::Illegal(_))), "{refused:?}");
    assert_eq!(t.state(&build).await, BuildState::Building);
}

pub(super) async fn ending_erases_the_credentials(t: &TestStore) {
    for _ in 0..5 {
        t.create("a").await;
    }
    t.complete("tenant-a/x", 1).await;
    for outcome in [
        Outcome::Failed(failure(FailureCode::Internal)),
        Outcome::Cancelled,
        Outcome::TimedOut(failure(FailureCode::BuildTimeout)),
    ] {
        let claimed = t.claim().await;
        assert!(claimed.sealed_credentials.is_some());
        t.finish(&claimed, outcome).await;
    }
    let page = t.rows().list(&tenant("a"), &super::lists::newest(1)).await.unwrap();
    let last = &page.builds[0];
    t.rows().cancel(&last.tenant, &last.id, "", t.now()).await.unwrap();
    let left = "SELECT COUNT(*) AS found FROM build WHERE sealed_credentials IS NOT NULL";
    let left = t.rows().engine.optional(crate::store::engine::sql(left)).await.unwrap();
    assert_eq!(left.expect("a count").count("found").unwrap(), 0);
    assert!(matches!(t.ask("a", &plenty(), &new_build(t.now())).await, Accepted::Created(_)));
}
