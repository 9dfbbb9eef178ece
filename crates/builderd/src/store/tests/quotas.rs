//! What a tenant may not have more of, however many ask at once.

use super::{LONG, TestStore, new_build, plenty, result, tenant};
use crate::build::record::{Build, FailureCode, LogLine, Usage};
use crate::build::state::BuildState;
use crate::store::{Accepted, Delete, NewBuild, Outcome, QuotaExceeded, TenantLoad, TenantRow};
use crate::tenant::{TenantLimits, Tier};

fn created(accepted: Accepted) -> Build {
    match accepted {
        Accepted::Created(build) => build,
        other @ (Accepted::Known { .. } | Accepted::KeyReused | Accepted::Quota(_)) => {
            panic!("{other:?}")
        }
    }
}

fn quota(accepted: Accepted) -> QuotaExceeded {
    match accepted {
        Accepted::Quota(quota) => quota,
        other @ (Accepted::Created(_) | Accepted::Known { .. } | Accepted::KeyReused) => {
            panic!("{other:?}")
        }
    }
}

pub(super) async fn one_of_five_hundred_takes_the_last_build_of_the_day(t: &TestStore) {
    let limits = TenantLimits { daily_builds: 5, ..plenty() };
    for _ in 0..4 {
        created(t.ask("a", &limits, &new_build(t.now())).await);
    }
    let builds: Vec<NewBuild> = (0..500).map(|_| new_build(t.now())).collect();
    let asked = builds.iter().map(|build| t.ask("a", &limits, build));
    let answers = futures_util::future::join_all(asked).await;
    let (passed, refused): (Vec<_>, Vec<_>) =
        answers.into_iter().partition(|answer| matches!(answer, Accepted::Created(_)));
    assert_eq!((passed.len(), refused.len()), (1, 499));
    let tomorrow = t.now().day().plus_secs(86_400);
    for answer in refused {
        let expected = QuotaExceeded {
            quota_type: "daily_builds",
            current: 5,
            limit: 5,
            reset_at: Some(tomorrow),
        };
        assert_eq!(quota(answer), expected);
    }
    let usage = t.rows().usage(&tenant("a"), t.now()).await.unwrap();
    assert_eq!((usage.created_today, usage.queued), (5, 5));
}

pub(super) async fn the_busiest_tenants_are_known(t: &TestStore) {
    for name in ["idle", "stores", "stores", "works", "works"] {
        t.create(name).await;
    }
    let own = TenantLimits { storage_bytes: 77, ..plenty() };
    let set = TenantRow { id: tenant("works"), tier: Tier::Pro, limits: Some(own) };
    t.rows().put_tenant(&set).await.unwrap();
    while let Some(claimed) = t.try_claim(LONG).await {
        match claimed.build.tenant.as_str() {
            "works" => continue,
            "idle" => t.finish(&claimed, Outcome::Cancelled).await,
            _ => {
                t.pack(&claimed).await;
                let result = Box::new(result("tenant-stores/x", 500));
                t.finish(&claimed, Outcome::Completed(result)).await
            }
        };
    }
    let busiest = t.rows().busiest(2, t.now()).await.unwrap();
    let works = TenantLoad { tenant: set, running: 2, created_today: 2, storage_bytes: 0 };
    let stores = TenantRow { id: tenant("stores"), tier: Tier::Pro, limits: None };
    let stores = TenantLoad { tenant: stores, running: 0, created_today: 2, storage_bytes: 500 };
    assert_eq!(busiest, [works, stores]);
    // Tomorrow is another day.
    t.advance_secs(86_400);
    let busiest = t.rows().busiest(10, t.now()).await.unwrap();
    assert_eq!(busiest.iter().map(|load| load.created_today).collect::<Vec<_>>(), [0, 0, 0]);
}

pub(super) async fn the_day_ends_and_deleting_gives_nothing_back(t: &TestStore) {
    let limits = TenantLimits { daily_builds: 2, ..plenty() };
    let first = created(t.ask("a", &limits, &new_build(t.now())).await);
    created(t.ask("a", &limits, &new_build(t.now())).await);
    let running = t.rows().delete(&first.tenant, &first.id).await.unwrap();
    assert_eq!(running, Some(Delete::Running(BuildState::Queued)));
    t.rows().cancel(&first.tenant, &first.id, "", t.now()).await.unwrap();
    assert_eq!(t.rows().delete(&first.tenant, &first.id).await.unwrap(), Some(Delete::Done));
    assert_eq!(t.rows().delete(&first.tenant, &first.id).await.unwrap(), None);
    assert_eq!(t.rows().get(&first.tenant, &first.id).await.unwrap(), None);
    let refused = quota(t.ask("a", &limits, &new_build(t.now())).await);
    assert_eq!((refused.quota_type, refused.current), ("daily_builds", 2));
    t.advance_secs(86_399);
    quota(t.ask("a", &limits, &new_build(t.now())).await);
    t.advance_secs(1);
    created(t.ask("a", &limits, &new_build(t.now())).await);
    assert_eq!(t.rows().usage(&first.tenant, t.now()).await.unwrap().created_today, 1);
}

pub(super) async fn full_storage_accepts_no_build(t: &TestStore) {
    let limits = TenantLimits { storage_bytes: 1000, ..plenty() };
    created(t.ask("a", &limits, &new_build(t.now())).await);
    let first = t.complete("tenant-a/one", 999).await;
    created(t.ask("a", &limits, &new_build(t.now())).await);
    t.complete("tenant-a/two", 1).await;
    let refused = quota(t.ask("a", &limits, &new_build(t.now())).await);
    assert_eq!((refused.quota_type, refused.current, refused.limit), ("storage", 1000, 1000));
    assert_eq!(refused.reset_at, None);
    t.rows().delete(&first.build.tenant, &first.build.id).await.unwrap();
    created(t.ask("a", &limits, &new_build(t.now())).await);
    // A refused build is not counted.
    assert_eq!(t.rows().usage(&tenant("a"), t.now()).await.unwrap().created_today, 3);
}

pub(super) async fn builds_that_end_together_never_fill_more_than_there_is(t: &TestStore) {
    let limits = TenantLimits { storage_bytes: 1000, ..plenty() };
    let ask = || async {
        let build = NewBuild { limits: limits.clone(), ..new_build(t.now()) };
        created(t.ask("a", &limits, &build).await)
    };
    let mut claimed = Vec::new();
    // Accepted while the storage was empty, all of them.
    for _ in 0..4 {
        ask().await;
        claimed.push(t.claim().await);
        t.pack(claimed.last().unwrap()).await;
    }
    let ends = claimed.iter().enumerate().map(|(number, claimed)| {
        let outcome = Outcome::Completed(Box::new(result(&format!("tenant-a/{number}"), 400)));
        async move { t.rows().finish(&claimed.lease, None, &outcome, t.now()).await.unwrap() }
    });
    let ended = futures_util::future::join_all(ends).await;
    let completed = ended.iter().filter(|end| **end == Some(BuildState::Completed)).count();
    assert_eq!(completed, 2, "{ended:?}");
    assert_eq!(t.rows().usage(&tenant("a"), t.now()).await.unwrap().storage_bytes, 800);
    for (claimed, end) in claimed.iter().zip(&ended) {
        let build = t.get(&claimed.build).await;
        assert_eq!(Some(build.state), *end);
        let is_failed = build.state == BuildState::Failed;
        let code = build.failure.map(|failure| failure.code);
        assert_eq!(code, is_failed.then_some(FailureCode::QuotaExceeded));
        assert_eq!(build.result.is_some(), !is_failed);
    }
    // Another build with a file that the tenant has already takes no room.
    ask().await;
    let again = t.claim().await;
    t.pack(&again).await;
    let kept = claimed.iter().zip(&ended).position(|(_, end)| *end == Some(BuildState::Completed));
    let outcome = Outcome::Completed(Box::new(result(&format!("tenant-a/{}", kept.unwrap()), 400)));
    let end = t.rows().finish(&again.lease, None, &outcome, t.now()).await.unwrap();
    assert_eq!(end, Some(BuildState::Completed));
}

pub(super) async fn the_queue_of_a_tenant_is_bounded(t: &TestStore) {
    let limits = TenantLimits { concurrent_builds: 1, ..plenty() };
    let builds: Vec<NewBuild> = (0..150).map(|_| new_build(t.now())).collect();
    let asked = builds.iter().map(|build| t.ask("a", &limits, build));
    let answers = futures_util::future::join_all(asked).await;
    let passed = answers.iter().filter(|answer| matches!(answer, Accepted::Created(_))).count();
    assert_eq!(passed, 110);
    let refused = quota(t.ask("a", &limits, &new_build(t.now())).await);
    assert_eq!((refused.quota_type, refused.current, refused.limit), ("queued_builds", 110, 110));
    // One that runs does not wait.
    t.claim().await;
    created(t.ask("a", &limits, &new_build(t.now())).await);
}

pub(super) async fn a_key_makes_one_build(t: &TestStore) {
    let keyed = |key: &str| NewBuild { idempotency_key: Some(key.into()), ..new_build(t.now()) };
    let builds: Vec<NewBuild> = (0..40).map(|_| keyed("k")).collect();
    let limits = plenty();
    let asked = builds.iter().map(|build| t.ask("a", &limits, build));
    let mut first = None;
    let mut known = Vec::new();
    for answer in futures_util::future::join_all(asked).await {
        match answer {
            Accepted::Created(build) => assert!(first.replace(build).is_none()),
            Accepted::Known { build, created_by } => known.push((build, created_by)),
            other @ (Accepted::KeyReused | Accepted::Quota(_)) => panic!("{other:?}"),
        }
    }
    let first = first.expect("one was created");
    assert_eq!(known.len(), 39);
    let creator = Some("tok_creator".to_owned());
    assert!(known.iter().all(|(build, by)| build.id == first.id && *by == creator));
    let later = NewBuild { created_by: None, ..keyed("k") };
    let answer = t.ask("a", &limits, &later).await;
    assert!(matches!(answer, Accepted::Known { created_by, .. } if created_by == creator));
    let other = NewBuild { request_hash: "another".into(), ..keyed("k") };
    assert!(matches!(t.ask("a", &limits, &other).await, Accepted::KeyReused));
    // Keys are a tenant's own.
    assert_ne!(created(t.ask("b", &limits, &keyed("k")).await).id, first.id);
    assert_eq!(t.rows().usage(&tenant("a"), t.now()).await.unwrap().created_today, 1);
}

pub(super) async fn tenants_see_their_own_builds_alone(t: &TestStore) {
    let (mine, stranger) = (t.create("a").await, tenant("b"));
    let rows = t.rows();
    assert_eq!(rows.get(&stranger, &mine.id).await.unwrap(), None);
    assert_eq!(rows.cancel(&stranger, &mine.id, "", t.now()).await.unwrap(), None);
    assert_eq!(rows.delete(&stranger, &mine.id).await.unwrap(), None);
    assert!(rows.log(&stranger, &mine.id, 0, 10).await.unwrap().is_empty());
    assert_eq!(rows.get_with_log(&stranger, &mine.id, 10).await.unwrap(), None);
    let page = rows.list(&stranger, &super::lists::newest(10)).await.unwrap();
    assert_eq!((page.builds.len(), page.total, page.has_more), (0, 0, false));
    assert_eq!(rows.usage(&stranger, t.now()).await.unwrap(), Usage::default());
    assert_eq!(rows.stats(&stranger, None, None).await.unwrap().total, 0);
    assert_eq!(t.state(&mine).await, BuildState::Queued);
}

pub(super) async fn texts_with_nul_are_stored(t: &TestStore) {
    let mut build = NewBuild { idempotency_key: Some("k\0".into()), ..new_build(t.now()) };
    build.request.name = "a\0b".into();
    build.customer = Some("c\0".into());
    let created = created(t.ask("a", &plenty(), &build).await);
    assert_eq!(created.customer.as_deref(), Some("c\u{fffd}"));
    let claimed = t.claim().await;
    let line = LogLine {
        offset: 0,
        at: t.now(),
        level: "info".into(),
        component: "builder".into(),
        message: "x\0y".into(),
    };
    t.rows().append_log(&claimed.lease, &[line]).await.unwrap();
    let log = t.rows().log(&created.tenant, &created.id, 0, 10).await.unwrap();
    assert_eq!(log[0].message, "x\u{fffd}y");
    t.rows().cancel(&created.tenant, &created.id, "no\0", t.now()).await.unwrap();
    assert_eq!(t.get(&created).await.cancel_reason.as_deref(), Some("no\u{fffd}"));
}
