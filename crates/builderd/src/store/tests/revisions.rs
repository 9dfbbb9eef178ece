//! Changes of ended builds are counted, whoever makes them.

use super::{TestStore, failure, tenant};
use crate::build::record::{Build, FailureCode};
use crate::store::{Outcome, Revision};

async fn revision(t: &TestStore, build: &Build) -> Option<Revision> {
    let rows = t.rows();
    let revision = rows.revision_of_ended(&build.tenant, &build.id).await.unwrap();
    if revision.is_some() {
        // What is read whole is of the same count.
        let seen = rows.get_with_log(&build.tenant, &build.id, 1).await.unwrap();
        assert_eq!(seen.map(|seen| seen.revision), revision);
    }
    revision
}

pub(super) async fn each_change_of_an_ended_build_is_counted(t: &TestStore) {
    let build = t.create("a").await;
    t.complete("tenant-a/x", 5).await;
    let first = revision(t, &build).await.expect("it has ended");
    assert_eq!(revision(t, &build).await, Some(first), "reading changes nothing");
    // The retention takes its file.
    assert_eq!(t.rows().expire(t.now().plus_secs(1)).await.unwrap(), 1);
    let second = revision(t, &build).await.expect("it is there");
    assert_ne!(first, second);
    assert!(!t.get(&build).await.has_artifact);
    // Whoever knows nothing of the count, as an older node does, counts too; also what is written
    // over with the same.
    t.damage("UPDATE build SET step = step WHERE id = $1", &build).await;
    let third = revision(t, &build).await.expect("it is there");
    assert!(third != first && third != second);
    let stranger = t.rows().revision_of_ended(&tenant("b"), &build.id).await.unwrap();
    assert_eq!(stranger, None);
    t.rows().delete(&build.tenant, &build.id).await.unwrap();
    assert_eq!(revision(t, &build).await, None);
}

pub(super) async fn what_has_not_ended_has_no_revision(t: &TestStore) {
    let build = t.create("a").await;
    assert_eq!(revision(t, &build).await, None);
    let claimed = t.claim().await;
    t.pack(&claimed).await;
    assert_eq!(revision(t, &build).await, None);
    let outcome = Outcome::Failed(failure(FailureCode::NetworkError));
    t.finish(&claimed, outcome).await;
    assert!(revision(t, &build).await.is_some());
}
