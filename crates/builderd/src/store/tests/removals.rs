//! A file is taken or removed, never both; and whose key seals.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::{TestStore, result};
use crate::store::engine::sql;
use crate::store::{Claimed, NewFile, Outcome, Removal, Reserved};

const KEY: &str = "public/one";

async fn reserve(t: &TestStore, claimed: &Claimed, key: &str) -> Reserved {
    let file = NewFile { key, size_bytes: 10, sha256: "ab" };
    t.rows().reserve(&claimed.lease, &file, t.now()).await.unwrap()
}

async fn begin(t: &TestStore, key: &str) -> Option<Removal> {
    t.rows().begin_removal(key, t.now()).await.unwrap()
}

/// Nothing keeps the file: leave to remove it is given, and given back.
async fn is_free(t: &TestStore, key: &str) -> bool {
    let begun = begin(t, key).await;
    if let Some(removal) = &begun {
        t.rows().end_removal(removal).await.unwrap();
    }
    begun.is_some()
}

pub(super) async fn a_file_is_taken_or_removed_never_both(t: &TestStore) {
    t.create("a").await;
    let claimed = t.claim().await;
    let removal = begin(t, KEY).await.expect("nobody has it");
    assert_eq!(begin(t, KEY).await, None, "one janitor is enough");
    assert_eq!(reserve(t, &claimed, KEY).await, Reserved::BeingRemoved);
    assert!(!t.rows().artifact_is_referenced(KEY).await.unwrap());
    t.rows().end_removal(&removal).await.unwrap();
    for _ in 0..2 {
        assert_eq!(reserve(t, &claimed, KEY).await, Reserved::Yes);
        assert!(!is_free(t, KEY).await);
    }
    t.check().await;
    // Who takes another file lets the first one go, as does who ends without one.
    assert_eq!(reserve(t, &claimed, "public/two").await, Reserved::Yes);
    assert!(is_free(t, KEY).await);
    assert!(!is_free(t, "public/two").await);
    t.finish(&claimed, Outcome::Retry { failure: None, run_at: t.now() }).await;
    assert!(is_free(t, "public/two").await);
    assert_eq!(reserve(t, &claimed, KEY).await, Reserved::Lost);
    let claimed = t.claim().await;
    assert_eq!(reserve(t, &claimed, KEY).await, Reserved::Yes);
    t.pack(&claimed).await;
    t.finish(&claimed, Outcome::Completed(Box::new(result(KEY, 10)))).await;
    assert!(!is_free(t, KEY).await);
}

async fn dropped(t: &TestStore) -> Vec<String> {
    t.rows().dropped(10, t.now()).await.unwrap()
}

pub(super) async fn a_file_that_lost_its_last_build_is_found_at_once(t: &TestStore) {
    for name in ["a", "b"] {
        t.create(name).await;
    }
    let claims = [t.claim().await, t.claim().await];
    for claimed in &claims {
        assert_eq!(reserve(t, claimed, KEY).await, Reserved::Yes);
        t.pack(claimed).await;
        t.finish(claimed, Outcome::Completed(Box::new(result(KEY, 10)))).await;
    }
    let [one, other] = claims.map(|claimed| claimed.lease);
    t.rows().delete(&one.tenant, &one.build).await.unwrap();
    assert!(dropped(t).await.is_empty(), "the other has it");
    t.rows().delete(&other.tenant, &other.build).await.unwrap();
    assert_eq!(dropped(t).await, [KEY]);
    // Who is removing it is not disturbed, and who is done leaves nothing.
    let removal = begin(t, KEY).await.expect("nobody has it");
    assert!(dropped(t).await.is_empty());
    t.rows().end_removal(&removal).await.unwrap();
    assert!(dropped(t).await.is_empty());
    // Who wants it again, before it is removed, has it.
    t.create("c").await;
    let again = t.claim().await;
    assert_eq!(reserve(t, &again, KEY).await, Reserved::Yes);
    assert_eq!(reserve(t, &again, "public/two").await, Reserved::Yes);
    assert_eq!(dropped(t).await, [KEY]);
    assert_eq!(reserve(t, &again, KEY).await, Reserved::Yes);
    assert_eq!(dropped(t).await, ["public/two"]);
    assert_eq!(begin(t, KEY).await, None);
    t.check().await;
}

pub(super) async fn a_removal_whose_janitor_died_is_over_some_day(t: &TestStore) {
    t.create("a").await;
    let claimed = t.claim().await;
    let old = begin(t, KEY).await.expect("nobody has it");
    let expire = sql("UPDATE artifact_removal SET expires_at = 1");
    t.rows().engine.execute(expire.clone()).await.unwrap();
    t.advance_secs(1);
    let new = begin(t, KEY).await.expect("the old one is over");
    // Who comes back from the dead ends nothing but its own.
    t.rows().end_removal(&old).await.unwrap();
    assert_eq!(reserve(t, &claimed, KEY).await, Reserved::BeingRemoved);
    t.rows().engine.execute(expire).await.unwrap();
    assert_eq!(reserve(t, &claimed, KEY).await, Reserved::Yes);
    t.rows().end_removal(&new).await.unwrap();
    assert!(!is_free(t, KEY).await);
}

pub(super) async fn takers_and_removers_never_meet(t: &TestStore) {
    const TURNS: usize = 15;
    let mut takers = Vec::new();
    for name in ["a", "b", "c"] {
        t.create(name).await;
        takers.push(t.claim().await);
    }
    let (holders, is_removed) = (AtomicU32::new(0), AtomicBool::new(false));
    let take = async |claimed: &Claimed, own: String| {
        let mut taken = 0;
        while taken < TURNS {
            if reserve(t, claimed, KEY).await == Reserved::BeingRemoved {
                continue;
            }
            taken += 1;
            holders.fetch_add(1, Ordering::SeqCst);
            assert!(!is_removed.load(Ordering::SeqCst));
            t.rows().beat().await.unwrap();
            assert!(!is_removed.load(Ordering::SeqCst));
            holders.fetch_sub(1, Ordering::SeqCst);
            assert_eq!(reserve(t, claimed, &own).await, Reserved::Yes);
        }
    };
    let remove = async {
        for _ in 0..2 * TURNS {
            let Some(removal) = begin(t, KEY).await else { continue };
            is_removed.store(true, Ordering::SeqCst);
            assert_eq!(holders.load(Ordering::SeqCst), 0);
            t.rows().beat().await.unwrap();
            assert_eq!(holders.load(Ordering::SeqCst), 0);
            is_removed.store(false, Ordering::SeqCst);
            t.rows().end_removal(&removal).await.unwrap();
        }
    };
    tokio::join!(
        take(&takers[0], "public/a".into()),
        take(&takers[1], "public/b".into()),
        take(&takers[2], "public/c".into()),
        remove
    );
}

pub(super) async fn the_first_key_is_the_key(t: &TestStore) {
    let rows = t.rows();
    assert_eq!(rows.master_key().await.unwrap(), None);
    let (one, two) = tokio::join!(rows.claim_master_key("one"), rows.claim_master_key("two"));
    let held = one.unwrap();
    assert_eq!(two.unwrap(), held);
    assert!(["one", "two"].contains(&held.as_str()), "{held}");
    assert_eq!(rows.claim_master_key("three").await.unwrap(), held);
    assert_eq!(rows.master_key().await.unwrap(), Some(held));
    t.create("a").await;
    assert_eq!(rows.forget_master_key().await.unwrap(), 1, "one build waits with a secret");
    assert_eq!(rows.master_key().await.unwrap(), None);
    assert_eq!(rows.claim_master_key("three").await.unwrap(), "three");
}
