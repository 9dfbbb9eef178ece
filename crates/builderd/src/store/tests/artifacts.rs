//! Who has which file, and what goes when.

use super::{TestStore, result, tenant};
use crate::build::record::{Build, BuildResult};
use crate::build::state::BuildState;
use crate::store::engine::sql;
use crate::store::{ArtifactDomain, ArtifactName, Claimed, Outcome};

/// The name that everybody shares, or that a tenant has for itself.
fn name(domain: &str) -> ArtifactName {
    let domain = match domain.strip_prefix("tenant-") {
        Some(owner) => ArtifactDomain::Tenant(tenant(owner)),
        None => ArtifactDomain::Public,
    };
    ArtifactName { domain, recipe: "recipe-1".into() }
}

async fn storage(t: &TestStore, name: &str) -> u64 {
    t.rows().usage(&tenant(name), t.now()).await.unwrap().storage_bytes
}

/// Creates a build of the tenant and completes it with the named artifact.
async fn make(t: &TestStore, who: &str, domain: &str, made: &BuildResult) -> Build {
    let build = t.create(who).await;
    let claimed = t.claim().await;
    assert_eq!(claimed.build.id, build.id);
    t.pack(&claimed).await;
    let outcome = Outcome::Completed(Box::new(made.clone()));
    let done = t.rows().finish(&claimed.lease, Some(&name(domain)), &outcome, t.now()).await;
    assert_eq!(done.unwrap(), Some(BuildState::Completed));
    t.get(&build).await
}

async fn known(t: &TestStore, claimed: &Claimed, domain: &str) -> Option<BuildResult> {
    let found = t.rows().known_artifact(&claimed.lease, &name(domain)).await.unwrap();
    found.map(|known| known.result)
}

pub(super) async fn an_artifact_of_several_builds_counts_once(t: &TestStore) {
    let made = result("tenant-a/one", 100);
    let first = make(t, "a", "tenant-a", &made).await;
    let again = t.create("a").await;
    let claimed = t.claim().await;
    assert_eq!(known(t, &claimed, "tenant-a").await, Some(made.clone()));
    t.pack(&claimed).await;
    let cached = BuildResult { from_cache: true, ..made.clone() };
    t.finish(&claimed, Outcome::Completed(Box::new(cached.clone()))).await;
    assert_eq!(t.get(&again).await.result, Some(cached));
    assert_eq!((storage(t, "a").await, t.rows().storage_bytes().await.unwrap()), (100, 100));
    make(t, "a", "tenant-a", &result("tenant-a/two", 7)).await;
    assert_eq!(storage(t, "a").await, 107);

    t.rows().delete(&first.tenant, &first.id).await.unwrap();
    assert_eq!(storage(t, "a").await, 107);
    assert!(t.rows().artifact_is_referenced("tenant-a/one").await.unwrap());
    t.rows().delete(&again.tenant, &again.id).await.unwrap();
    assert_eq!((storage(t, "a").await, t.rows().storage_bytes().await.unwrap()), (7, 7));
    assert!(!t.rows().artifact_is_referenced("tenant-a/one").await.unwrap());
}

pub(super) async fn a_public_artifact_is_found_by_others(t: &TestStore) {
    let made = result("public/one", 100);
    make(t, "a", "public", &made).await;
    make(t, "a", "tenant-a", &result("tenant-a/own", 5)).await;
    t.create("b").await;
    let claimed = t.claim().await;
    assert_eq!(known(t, &claimed, "public").await, Some(made.clone()));
    // A name of somebody else is no name.
    assert_eq!(known(t, &claimed, "tenant-a").await, None);
    t.pack(&claimed).await;
    t.finish(&claimed, Outcome::Completed(Box::new(made))).await;
    assert_eq!((storage(t, "a").await, storage(t, "b").await), (105, 100));
    assert_eq!(t.rows().storage_bytes().await.unwrap(), 105);
}

pub(super) async fn what_a_running_build_wants_stays(t: &TestStore) {
    let made = result("tenant-a/one", 100);
    let first = make(t, "a", "tenant-a", &made).await;
    let second = t.create("a").await;
    let claimed = t.claim().await;
    assert!(known(t, &claimed, "tenant-a").await.is_some());
    t.rows().delete(&first.tenant, &first.id).await.unwrap();
    assert_eq!(t.rows().evict(0).await.unwrap(), 0);
    assert!(t.rows().artifact_is_referenced("tenant-a/one").await.unwrap());
    assert_eq!(storage(t, "a").await, 0);
    t.check().await;
    t.pack(&claimed).await;
    t.finish(&claimed, Outcome::Completed(Box::new(made.clone()))).await;
    assert_eq!(t.get(&second).await.result, Some(made.clone()));
    assert_eq!(storage(t, "a").await, 100);

    // One that does not take it lets it go.
    make(t, "a", "tenant-a", &made).await;
    let third = t.create("a").await;
    let claimed = t.claim().await;
    assert!(known(t, &claimed, "tenant-a").await.is_some());
    assert_eq!(t.rows().evict(0).await.unwrap(), 0);
    t.finish(&claimed, Outcome::Retry { failure: None, run_at: t.now() }).await;
    assert!(!t.rows().artifact_is_referenced("tenant-a/one").await.unwrap());
    let claimed = t.claim().await;
    assert_eq!(claimed.build.id, third.id);
    assert_eq!(known(t, &claimed, "tenant-a").await, None);
    assert_eq!(t.rows().storage_bytes().await.unwrap(), 0);
}

pub(super) async fn old_artifacts_are_forgotten(t: &TestStore) {
    let old = make(t, "a", "tenant-a", &result("tenant-a/old", 10)).await;
    let shared = make(t, "a", "public", &result("public/shared", 20)).await;
    t.advance_secs(100);
    let young = make(t, "a", "tenant-a", &result("public/shared", 20)).await;
    assert_eq!(t.rows().expire(t.now()).await.unwrap(), 2);
    for build in [&old, &shared] {
        let build = t.get(build).await;
        assert_eq!((build.state, build.has_artifact), (BuildState::Completed, false));
        let result = build.result.expect("what was true when it ended");
        assert!(result.artifact_bytes >= 10 && result.metrics.total_ms == 1200, "{result:?}");
    }
    assert!(t.get(&young).await.has_artifact);
    assert!(!t.rows().artifact_is_referenced("tenant-a/old").await.unwrap());
    assert!(t.rows().artifact_is_referenced("public/shared").await.unwrap());
    assert_eq!(storage(t, "a").await, 20);
    assert_eq!(t.rows().expire(t.now()).await.unwrap(), 0);
    t.rows().delete(&old.tenant, &old.id).await.unwrap();
}

pub(super) async fn a_build_that_cannot_be_read_keeps_no_other_from_being_forgotten(t: &TestStore) {
    let broken = make(t, "a", "tenant-a", &result("tenant-a/broken", 10)).await;
    t.advance_secs(1);
    let plain = make(t, "a", "tenant-a", &result("tenant-a/plain", 20)).await;
    t.advance_secs(1);
    t.damage("UPDATE build SET attempt = -1 WHERE id = $1", &broken).await;
    assert_eq!(t.rows().expire(t.now()).await.unwrap(), 1);
    assert!(!t.get(&plain).await.has_artifact);
    assert!(t.rows().artifact_is_referenced("tenant-a/broken").await.unwrap());
    make(t, "a", "tenant-a", &result("tenant-a/young", 40)).await;
    assert_eq!(t.rows().evict(0).await.unwrap(), 1);
    assert_eq!(storage(t, "a").await, 10);
    t.damage("UPDATE build SET attempt = 1 WHERE id = $1", &broken).await;
    assert_eq!(t.rows().evict(0).await.unwrap(), 1);
}

pub(super) async fn a_tenant_whose_counters_are_wrong_keeps_no_other_from_being_forgotten(
    t: &TestStore,
) {
    make(t, "a", "tenant-a", &result("tenant-a/one", 10)).await;
    t.advance_secs(1);
    let other = make(t, "b", "tenant-b", &result("tenant-b/one", 20)).await;
    t.advance_secs(1);
    // Less than is to be given back: the database refuses that.
    t.write("UPDATE tenant SET storage_bytes = 0 WHERE id = 'a'").await;
    assert_eq!(t.rows().expire(t.now()).await.unwrap(), 1);
    assert!(!t.get(&other).await.has_artifact);
    assert_eq!(t.rows().evict(0).await.unwrap(), 0);
    t.write("UPDATE tenant SET storage_bytes = 10 WHERE id = 'a'").await;
    assert_eq!(t.rows().expire(t.now()).await.unwrap(), 1);
}

pub(super) async fn a_known_artifact_that_cannot_be_read_is_made_anew(t: &TestStore) {
    let made = result("public/one", 100);
    make(t, "a", "public", &made).await;
    let spoil = sql("UPDATE artifact_name SET result = '{\"of\":\"another version\"}'");
    assert_eq!(t.rows().engine.execute(spoil).await.unwrap(), 1);
    let again = t.create("b").await;
    let claimed = t.claim().await;
    assert_eq!(known(t, &claimed, "public").await, None);
    t.pack(&claimed).await;
    let outcome = Outcome::Completed(Box::new(made.clone()));
    t.rows().finish(&claimed.lease, Some(&name("public")), &outcome, t.now()).await.unwrap();
    assert_eq!(t.state(&again).await, BuildState::Completed);
    t.create("c").await;
    let claimed = t.claim().await;
    assert_eq!(known(t, &claimed, "public").await, Some(made));
}

pub(super) async fn the_oldest_artifacts_make_room(t: &TestStore) {
    let mut builds = Vec::new();
    for number in 0..4 {
        builds.push(make(t, "a", "tenant-a", &result(&format!("tenant-a/{number}"), 10)).await);
        t.advance_secs(1);
    }
    assert_eq!(t.rows().evict(40).await.unwrap(), 0);
    assert_eq!(t.rows().evict(25).await.unwrap(), 2);
    assert_eq!((storage(t, "a").await, t.rows().storage_bytes().await.unwrap()), (20, 20));
    for (build, is_kept) in builds.iter().zip([false, false, true, true]) {
        assert_eq!(t.get(build).await.has_artifact, is_kept);
    }
    t.check().await;
    assert_eq!(t.rows().evict(0).await.unwrap(), 2);
    assert_eq!(storage(t, "a").await, 0);
}
