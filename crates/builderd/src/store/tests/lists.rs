//! Pages and figures.

use super::{TestStore, failure, new_build, plenty, tenant};
use crate::build::record::{BuildId, FailureCode, Micros};
use crate::build::state::BuildState;
use crate::store::admin::{self, Violation};
use crate::store::{Accepted, Filter, Outcome, Page, StoreError};

pub(super) fn newest(limit: u32) -> Filter {
    Filter { limit, ..Filter::default() }
}

async fn list(t: &TestStore, filter: &Filter) -> Page {
    t.rows().list(&tenant("a"), filter).await.unwrap()
}

fn ids(page: &Page) -> Vec<BuildId> {
    page.builds.iter().map(|build| build.id.clone()).collect()
}

pub(super) async fn pages_follow_each_other(t: &TestStore) {
    let mut all = Vec::new();
    for _ in 0..7 {
        all.push(t.create("a").await.id);
        t.create("b").await;
    }
    all.reverse();
    let mut filter = newest(3);
    let mut seen = Vec::new();
    loop {
        let page = list(t, &filter).await;
        assert_eq!(page.total, 7);
        seen.extend(ids(&page));
        assert_eq!(page.has_more, seen.len() < 7);
        if !page.has_more {
            break;
        }
        filter.before = seen.last().cloned();
    }
    assert_eq!(seen, all);
    for offset in 0..9_usize {
        let page = list(t, &Filter { offset: offset as u64, ..newest(2) }).await;
        let expected: Vec<_> = all.iter().skip(offset).take(2).cloned().collect();
        assert_eq!((ids(&page), page.total), (expected, 7), "offset {offset}");
        assert_eq!(page.has_more, offset + 2 < 7, "offset {offset}");
    }
    let nothing = list(t, &newest(0)).await;
    assert_eq!((nothing.builds.len(), nothing.total, nothing.has_more), (0, 7, true));
}

pub(super) async fn a_build_says_who_asked_for_it(t: &TestStore) {
    let build = t.create("a").await;
    let asked = t.get(&build).await;
    assert_eq!(asked.organization.as_deref(), Some("organization-1"));
    assert_eq!(asked.rights, ["build:create", "build:read"]);
    // As an older node writes it.
    t.damage("UPDATE build SET organization = NULL, rights = NULL WHERE id = $1", &build).await;
    let older = t.get(&build).await;
    assert!(older.is_whole && older.organization.is_none() && older.rights.is_empty());
}

pub(super) async fn a_build_that_cannot_be_read_is_shown_as_what_it_is(t: &TestStore) {
    let (plain, strange) = (t.create("a").await, t.create("a").await);
    let damages = [
        "UPDATE build SET request = '{\"from\":\"the future\"}' WHERE id = $1",
        "UPDATE build SET tier = 'platinum', limits = '' WHERE id = $1",
        "UPDATE build SET attempts = 'x' WHERE id = $1",
    ];
    for damage in damages {
        t.damage(damage, &strange).await;
        let page = list(t, &newest(10)).await;
        assert_eq!(ids(&page), [strange.id.clone(), plain.id.clone()], "{damage}");
        assert_eq!((page.builds[0].is_whole, page.builds[1].is_whole), (false, true));
        let shown = t.get(&strange).await;
        assert_eq!(shown, page.builds[0]);
        assert_eq!((shown.state, shown.created_at), (strange.state, strange.created_at));
        assert!(shown.step.contains("cannot be read"), "{}", shown.step);
        let seen = t.rows().get_with_log(&tenant("a"), &strange.id, 5).await.unwrap();
        assert_eq!(seen.expect("the build is there").build, shown);
    }
    // What nobody can read nobody works on.
    assert_eq!(t.claim().await.build, t.get(&plain).await);
    assert!(t.try_claim(60).await.is_none());
    let queued = Filter { states: vec![BuildState::Queued], ..newest(10) };
    assert_eq!(ids(&list(t, &queued).await), [strange.id]);
}

pub(super) async fn a_state_of_another_version_hides_no_build(t: &TestStore) {
    let (strange, plain) = (t.create("a").await, t.create("a").await);
    for damage in [
        "UPDATE build SET state = 'paused' WHERE id = $1",
        "UPDATE build SET attempt = -1, progress_percent = -1 WHERE id = $1",
    ] {
        t.damage(damage, &strange).await;
        let page = list(t, &newest(10)).await;
        assert_eq!(ids(&page), [plain.id.clone(), strange.id.clone()], "{damage}");
        assert_eq!((page.builds[0].is_whole, page.builds[1].is_whole), (true, false));
        let shown = t.get(&strange).await;
        assert_eq!(shown, page.builds[1]);
        assert_eq!((shown.state, shown.request), (BuildState::Queued, strange.request.clone()));
        assert!(shown.step.contains("cannot be read"), "{}", shown.step);
    }
    // Whoever knows what it means works on it, and nobody else does anything to it.
    assert_eq!(t.claim().await.build.id, plain.id);
    assert!(t.try_claim(60).await.is_none());
    let (rows, tenant, id) = (t.rows(), &strange.tenant, &strange.id);
    let cancelled = rows.cancel(tenant, id, "", t.now()).await;
    assert!(matches!(cancelled, Err(StoreError::Corrupt(_))), "{cancelled:?}");
    assert!(matches!(rows.delete(tenant, id).await, Err(StoreError::Corrupt(_))));
    let step = "UPDATE build_event SET to_state = 'paused' WHERE build_id = $1 AND seq = 1";
    t.damage(step, &strange).await;
    t.damage(
        "INSERT INTO build_event SELECT tenant_id, build_id, 2, happened_at, 'paused', \
         'resumed', lease_token, actor FROM build_event WHERE build_id = $1",
        &strange,
    )
    .await;
    let found = admin::check(&t.store).await.unwrap();
    let named = |violation: &Violation| violation.subject == "paused to resumed";
    assert!(found.iter().any(named), "{found:#?}");
    for repair in [
        "DELETE FROM build_event WHERE build_id = $1 AND seq = 2",
        "UPDATE build_event SET to_state = 'queued' WHERE build_id = $1",
        "UPDATE build SET state = 'queued', attempt = 0, progress_percent = 0 WHERE id = $1",
    ] {
        t.damage(repair, &strange).await;
    }
    assert_eq!(t.claim().await.build.id, strange.id);
}

pub(super) async fn a_page_ends_early_where_its_builds_are_large(t: &TestStore) {
    let mut all = Vec::new();
    for mebibytes in [3, 0, 0, 1, 5, 3, 0] {
        let mut build = new_build(t.now());
        build.request.echo = "x".repeat(mebibytes << 20);
        assert!(matches!(t.ask("a", &plenty(), &build).await, Accepted::Created(_)));
        all.insert(0, build.id);
    }
    for states in [vec![], vec![BuildState::Queued, BuildState::Failed]] {
        let mut filter = Filter { states, ..newest(1000) };
        let (mut seen, mut pages) = (Vec::new(), Vec::new());
        loop {
            let page = list(t, &filter).await;
            assert_eq!(page.total, 7);
            pages.push(page.builds.len());
            seen.extend(ids(&page));
            assert_eq!(page.has_more, seen.len() < 7, "{pages:?}");
            if !page.has_more {
                break;
            }
            filter.before = seen.last().cloned();
        }
        // Newest first: 0 and 3 MiB, 5 alone, 1 and two small ones, 3.
        assert_eq!((pages, &seen), (vec![2, 1, 3, 1], &all));
    }
    let second = list(t, &Filter { offset: 2, ..newest(5) }).await;
    assert_eq!((ids(&second), second.has_more), (vec![all[2].clone()], true));
    let few = list(t, &newest(1)).await;
    assert_eq!((ids(&few), few.has_more), (vec![all[0].clone()], true));
}

pub(super) async fn filters_find_rare_states(t: &TestStore) {
    for _ in 0..6 {
        t.create("a").await;
    }
    let failed = t.claim().await;
    t.finish(&failed, Outcome::Failed(failure(FailureCode::InvalidSource))).await;
    let completed = t.complete("tenant-a/x", 1).await;
    let running = t.claim().await;
    t.pack(&running).await;
    let queued = list(t, &newest(10)).await.builds.remove(0);
    t.rows().cancel(&queued.tenant, &queued.id, "", t.now()).await.unwrap();

    let with = |states: &[BuildState]| Filter { states: states.to_vec(), ..newest(10) };
    let page = list(t, &with(&[BuildState::Failed])).await;
    assert_eq!((ids(&page), page.total), (vec![failed.lease.build.clone()], 1));
    let page = list(t, &with(&[BuildState::Packaging, BuildState::Preparing])).await;
    assert_eq!((ids(&page), page.total), (vec![running.lease.build.clone()], 1));
    let ended = [BuildState::Failed, BuildState::Completed, BuildState::Cancelled];
    let page = list(t, &with(&[&ended[..], &ended[..]].concat())).await;
    let mut expected = vec![queued.id, failed.lease.build, completed.lease.build];
    expected.sort_unstable_by(|a, b| b.cmp(a));
    assert_eq!((ids(&page), page.total, page.has_more), (expected.clone(), 3, false));
    let page = list(t, &Filter { offset: 1, limit: 1, ..with(&ended) }).await;
    assert_eq!((ids(&page), page.total, page.has_more), (vec![expected[1].clone()], 3, true));
    let before = Some(expected[1].clone());
    let page = list(t, &Filter { before, ..with(&ended) }).await;
    assert_eq!(ids(&page), vec![expected[2].clone()]);
    let page = list(t, &with(&[BuildState::Timeout])).await;
    assert_eq!((page.builds.len(), page.total, page.has_more), (0, 0, false));
    assert_eq!(list(t, &with(&[BuildState::Queued])).await.total, 2);
}

pub(super) async fn the_first_build_since_a_time_is_found(t: &TestStore) {
    let first = |at| async move { t.rows().first_since(&tenant("a"), at).await.unwrap() };
    assert_eq!(first(Micros(0)).await, None);
    let begun = t.now();
    let mut created = Vec::new();
    for _ in 0..3 {
        created.push((t.now(), t.create("a").await.id));
        t.advance_secs(1);
    }
    for (at, id) in &created {
        assert_eq!(first(*at).await.as_ref(), Some(id));
        assert_eq!(first(Micros(at.0 - 1)).await.as_ref(), Some(id));
    }
    assert_eq!(first(Micros(0)).await.as_ref(), Some(&created[0].1));
    assert_eq!(first(t.now()).await, None);
    assert_eq!(t.rows().first_since(&tenant("b"), begun).await.unwrap(), None);
}

pub(super) async fn figures_cover_a_stretch_of_time(t: &TestStore) {
    let from = t.now();
    t.create("a").await;
    let claimed = t.claim().await;
    t.pack(&claimed).await;
    t.advance_secs(4);
    let result = super::result("tenant-a/x", 50);
    t.finish(&claimed, Outcome::Completed(Box::new(result))).await;
    t.create("a").await;
    let claimed = t.claim().await;
    t.advance_secs(2);
    t.finish(&claimed, Outcome::TimedOut(failure(FailureCode::BuildTimeout))).await;
    let build = new_build(t.now());
    t.ask("a", &plenty(), &build).await;

    let stats = |from, to| async move { t.rows().stats(&tenant("a"), from, to).await.unwrap() };
    let all = stats(None, None).await;
    assert_eq!((all.total, all.completed, all.failed), (3, 1, 1));
    assert_eq!((all.mean_ms, all.storage_bytes, all.compute_secs), (4000, 50, 6));
    let early = stats(Some(from), Some(Micros(from.0 + 1))).await;
    assert_eq!((early.total, early.completed, early.compute_secs), (1, 1, 4));
    let late = stats(Some(build.created_at), None).await;
    assert_eq!((late.total, late.completed, late.mean_ms, late.storage_bytes), (1, 0, 0, 0));
}
