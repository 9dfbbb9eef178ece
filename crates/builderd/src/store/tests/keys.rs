//! Tenants' keys: made once, rotated, kept while they are needed, destroyed.

use super::{TestStore, result, tenant};
use crate::build::state::BuildState;
use crate::store::audit::Author;
use crate::store::{ArtifactDomain, ArtifactName, Destroyed, Outcome, TenantKeyRow};

/// A wrapped key for `name`.
pub(super) fn key(t: &TestStore, name: &str, number: u8) -> TenantKeyRow {
    TenantKeyRow {
        tenant: tenant(name),
        id: format!("{number:032x}"),
        wrapped: vec![number, 0, 255],
        wrapped_by: "master".into(),
        created_at: t.now(),
        retired_at: None,
    }
}

/// The bytes of a deleted row are not in the file any more, where somebody with the master key
/// could look for them.
#[tokio::test]
async fn a_destroyed_key_is_not_left_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let store = crate::store::Store::open_sqlite(directory.path()).await.unwrap();
    let now = crate::build::record::Micros(1_000_000);
    let build = super::queue_build(&store, "127.0.0.1:1/app", now).await;
    let canary = b"wrapped-canary-2718281828".to_vec();
    let key = TenantKeyRow {
        tenant: build.tenant.clone(),
        id: format!("{:032x}", 1),
        wrapped: canary.clone(),
        wrapped_by: "master".into(),
        created_at: now,
        retired_at: None,
    };
    store.system().add_tenant_key(&key).await.unwrap();
    let destroyed = store.system().destroy_tenant_keys(&build.tenant, now).await.unwrap();
    assert_eq!(destroyed.keys, 1);
    // The last connection brings everything into the one file.
    store.close().await;
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let is_there = bytes.windows(canary.len()).any(|some| some == canary);
        assert!(!is_there, "{}", path.display());
    }
}

/// What an artifact of `name` that was sealed with the key is kept under.
fn sealed(name: &str, content: &str, number: u8) -> String {
    format!("tenant-{name}/{content}.ext4{}{number:032x}", crate::store::SEALED)
}

async fn current(t: &TestStore, name: &str) -> Option<String> {
    t.rows().current_tenant_key(&tenant(name)).await.unwrap().map(|key| key.id)
}

async fn is_there(t: &TestStore, name: &str, number: u8) -> bool {
    t.rows().tenant_key(&tenant(name), &format!("{number:032x}")).await.unwrap().is_some()
}

pub(super) async fn a_tenant_has_one_current_key(t: &TestStore) {
    let rows = t.rows();
    t.create("a").await;
    assert_eq!(current(t, "a").await, None);
    let (one, two) = (key(t, "a", 1), key(t, "a", 2));
    let (first, second) = tokio::join!(rows.add_tenant_key(&one), rows.add_tenant_key(&two));
    let held = first.unwrap();
    assert_eq!(second.unwrap(), held);
    assert!(held == one || held == two, "{held:?}");
    assert_eq!(current(t, "b").await, None, "another tenant has none of it");
    assert_eq!(rows.tenant_key(&tenant("b"), &held.id).await.unwrap(), None);

    t.advance_secs(1);
    let (three, four) = (key(t, "a", 3), key(t, "a", 4));
    let author = Author::command();
    let rotate = |key| rows.rotate_tenant_key_by(&author, key);
    let (first, second) = tokio::join!(rotate(&three), rotate(&four));
    assert!(first.unwrap() && second.unwrap());
    let now = current(t, "a").await.unwrap();
    assert!(now == three.id || now == four.id, "{now}");
    let old = rows.tenant_key(&tenant("a"), &held.id).await.unwrap().unwrap();
    assert_eq!((old.wrapped, old.retired_at), (held.wrapped, Some(t.now())));
    assert!(!rotate(&key(t, "nobody", 5)).await.unwrap());

    assert_eq!(rows.retire_tenant_keys(t.now()).await.unwrap(), 3);
    assert_eq!(current(t, "a").await, None, "the next server's master key makes another");
}

pub(super) async fn a_retired_key_stays_while_an_artifact_needs_it(t: &TestStore) {
    let rows = t.rows();
    let build = t.create("a").await;
    rows.add_tenant_key(&key(t, "a", 1)).await.unwrap();
    t.complete(&sealed("a", "x", 1), 10).await;
    for number in 2..4 {
        t.advance_secs(1);
        let key = key(t, "a", number);
        assert!(rows.rotate_tenant_key_by(&Author::service(), &key).await.unwrap());
    }
    assert_eq!(rows.prune_tenant_keys(t.now()).await.unwrap(), 0, "it may just be in use");
    t.advance_secs(1);
    assert_eq!(rows.prune_tenant_keys(t.now()).await.unwrap(), 1);
    assert!(is_there(t, "a", 1).await && !is_there(t, "a", 2).await && is_there(t, "a", 3).await);
    t.check().await;
    rows.delete(&tenant("a"), &build.id).await.unwrap();
    assert_eq!(rows.prune_tenant_keys(t.now()).await.unwrap(), 1);
    assert!(!is_there(t, "a", 1).await && is_there(t, "a", 3).await, "the current one stays");
}

pub(super) async fn keys_are_destroyed_with_what_they_sealed(t: &TestStore) {
    let rows = t.rows();
    let (one, two) = (t.create("a").await, t.create("a").await);
    rows.add_tenant_key(&key(t, "a", 1)).await.unwrap();
    let name = ArtifactName { domain: ArtifactDomain::Tenant(tenant("a")), recipe: "r".into() };
    let claimed = t.claim().await;
    t.pack(&claimed).await;
    let outcome = Outcome::Completed(Box::new(result(&sealed("a", "x", 1), 10)));
    rows.finish(&claimed.lease, Some(&name), &outcome, t.now()).await.unwrap();
    t.complete("tenant-a/plain.ext4", 7).await;
    t.create("b").await;
    rows.add_tenant_key(&key(t, "b", 2)).await.unwrap();
    t.complete(&sealed("b", "x", 2), 10).await;

    let author = Author::command();
    let destroyed = rows.destroy_tenant_keys_by(&author, &tenant("a"), t.now()).await.unwrap();
    assert_eq!(destroyed, Destroyed { keys: 1, builds: 1 });
    assert!(!is_there(t, "a", 1).await && is_there(t, "b", 2).await);
    for build in [&one, &two] {
        assert_eq!(t.state(build).await, BuildState::Completed);
    }
    assert!(!rows.artifact_is_referenced(&sealed("a", "x", 1)).await.unwrap());
    assert!(rows.artifact_is_referenced("tenant-a/plain.ext4").await.unwrap());
    assert!(rows.artifact_is_referenced(&sealed("b", "x", 2)).await.unwrap());
    let usage = rows.usage(&tenant("a"), t.now()).await.unwrap();
    assert_eq!(usage.storage_bytes, 7);
    t.create("a").await;
    let claimed = t.claim().await;
    assert_eq!(rows.known_artifact(&claimed.lease, &name).await.unwrap(), None);
    let again = rows.destroy_tenant_keys_by(&author, &tenant("a"), t.now()).await.unwrap();
    assert_eq!(again, Destroyed { keys: 0, builds: 0 });
}
