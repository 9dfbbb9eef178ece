//! Who did what: written with the change itself, never changed, forgotten in order.

use futures_util::future::join_all;

use super::{STORY_BEGIN, TestStore, new_build, plenty, tenant};
use crate::build::record::Micros;
use crate::store::audit::{Action, AuditEntry, AuditFilter, AuditRow, Author, DONE};
use crate::store::engine::sql;
use crate::store::{Accepted, Cancel, Delete, NewBuild, StoreError, TenantRow, TokenRow};
use crate::tenant::Tier;

fn author() -> Author {
    Author {
        subject: "tok_story".into(),
        peer: "192.0.2.7:4711".into(),
        request: "0af7651916cd43dd8448eb211c80319c".into(),
    }
}

/// All rows, in the order of time.
async fn rows(t: &TestStore) -> Vec<AuditRow> {
    let (filter, mut rows) = (AuditFilter::default(), Vec::new());
    loop {
        let page = t.rows().audit_page(&filter, rows.last()).await.unwrap();
        if page.is_empty() {
            return rows;
        }
        rows.extend(page);
    }
}

async fn verified(t: &TestStore) -> u64 {
    let verdict = t.rows().verify_audit().await.unwrap();
    assert!(verdict.problems.is_empty(), "{verdict:?}");
    verdict.rows
}

fn token() -> TokenRow {
    TokenRow {
        id: "tok_new".into(),
        secret_hash: "hash".into(),
        tenant: tenant("a"),
        customer: None,
        organization: None,
        rights: Vec::new(),
        note: String::new(),
        created_at: STORY_BEGIN,
        expires_at: None,
        revoked_at: None,
    }
}

fn refused(name: Option<&str>, at: Micros) -> AuditEntry {
    AuditEntry {
        tenant: name.map(tenant),
        at,
        author: author(),
        action: Action::BuildRead,
        object: String::new(),
        outcome: "not_found",
    }
}

pub(super) async fn every_change_leaves_one_row(t: &TestStore) {
    let (by, a, now) = (author(), tenant("a"), t.now());
    let (one, two) = (new_build(now), new_build(now));
    for build in [&one, &two] {
        let done = t.rows().create_by(&by, &a, Tier::Pro, &plenty(), build).await.unwrap();
        assert!(matches!(done, Accepted::Created(_)));
    }
    t.claim().await;
    for (build, how) in [(&one, Cancel::Requested), (&two, Cancel::Done)] {
        let done = t.rows().cancel_by(&by, &a, &build.id, "why", now).await.unwrap();
        assert_eq!(done, Some(how));
    }
    let done = t.rows().delete_by(&by, &a, &two.id, now).await.unwrap();
    assert_eq!(done, Some(Delete::Done));
    t.rows().add_token_by(&by, &token()).await.unwrap();
    assert!(t.rows().revoke_token_by(&by, "tok_new", now).await.unwrap());
    let set = TenantRow { id: a.clone(), tier: Tier::Free, limits: None };
    t.rows().put_tenant_by(&by, &set, now).await.unwrap();
    t.rows().forget_master_key_by(&by, now).await.unwrap();

    let (one, two) = (one.id.as_str(), two.id.as_str());
    let expected = [
        ("", 1, "admin.forget-key", ""),
        ("a", 1, "build.create", one),
        ("a", 2, "build.create", two),
        ("a", 3, "build.cancel", one),
        ("a", 4, "build.cancel", two),
        ("a", 5, "build.delete", two),
        ("a", 6, "token.create", "tok_new"),
        ("a", 7, "token.revoke", "tok_new"),
        ("a", 8, "tenant.set", "a"),
    ];
    let rows = rows(t).await;
    let found: Vec<_> = rows
        .iter()
        .map(|row| (row.stream.as_str(), row.number, row.action.as_str(), row.object.as_str()))
        .collect();
    assert_eq!(found, expected);
    for row in &rows {
        assert_eq!((row.subject.as_str(), row.outcome.as_str()), ("tok_story", DONE));
        assert_eq!((&row.peer, &row.request, row.at), (&by.peer, &by.request, now));
    }
    assert_eq!(verified(t).await, 9);
}

pub(super) async fn what_changed_nothing_leaves_none(t: &TestStore) {
    let (by, a, now) = (author(), tenant("a"), t.now());
    let build = NewBuild { idempotency_key: Some("key".into()), ..new_build(now) };
    let again = NewBuild { id: new_build(now).id, ..build.clone() };
    t.ask("a", &plenty(), &build).await;
    assert!(matches!(t.ask("a", &plenty(), &again).await, Accepted::Known { .. }));
    let none = crate::tenant::TenantLimits { daily_builds: 1, ..plenty() };
    assert!(matches!(t.ask("a", &none, &new_build(now)).await, Accepted::Quota(_)));
    assert_eq!(t.rows().delete_by(&by, &tenant("b"), &build.id, now).await.unwrap(), None);
    let waits = t.rows().delete_by(&by, &a, &build.id, now).await.unwrap();
    assert!(matches!(waits, Some(Delete::Running(_))), "{waits:?}");
    t.claim().await;
    for _ in 0..3 {
        let done = t.rows().cancel_by(&by, &a, &build.id, "", now).await.unwrap();
        assert_eq!(done, Some(Cancel::Requested));
    }
    t.rows().add_token_by(&by, &token()).await.unwrap();
    assert!(matches!(t.rows().add_token_by(&by, &token()).await, Err(StoreError::Database(_))));
    for _ in 0..2 {
        assert!(t.rows().revoke_token_by(&by, "tok_new", now).await.unwrap());
    }
    assert!(!t.rows().revoke_token_by(&by, "tok_other", now).await.unwrap());
    let rows = rows(t).await;
    let actions: Vec<&str> = rows.iter().map(|row| row.action.as_str()).collect();
    assert_eq!(actions, ["build.create", "build.cancel", "token.create", "token.revoke"]);
}

pub(super) async fn a_row_is_never_changed_or_removed(t: &TestStore) {
    t.rows().add_audit(vec![refused(None, t.now()), refused(Some("a"), t.now())]).await.unwrap();
    let before = rows(t).await;
    for statement in [
        "UPDATE audit SET subject = 'nobody'",
        "UPDATE audit SET hash = hash",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE tenant_id = 'a'",
    ] {
        let error = t.rows().engine.execute(sql(statement)).await.unwrap_err();
        let said = format!("{:?}", error);
        assert!(said.contains("append-only"), "{statement}: {said}");
    }
    assert_eq!(rows(t).await, before);
}

/// Whoever writes past the triggers, as the database's owner can, is seen.
pub(super) async fn damage_to_the_log_is_found(t: &TestStore) {
    let entries = (0..5).map(|_| refused(Some("a"), t.now())).collect();
    t.rows().add_audit(entries).await.unwrap();
    verified(t).await;
    let drop_triggers: &[&'static str] = match t.rows().engine {
        crate::store::engine::Engine::Sqlite { .. } => {
            &["DROP TRIGGER audit_is_not_changed", "DROP TRIGGER audit_is_kept"]
        }
        crate::store::engine::Engine::Postgres(_) => {
            &["DROP TRIGGER audit_is_not_changed ON audit"]
        }
    };
    for statement in drop_triggers {
        t.rows().engine.execute(sql(statement)).await.unwrap();
    }
    let damages = [
        ("UPDATE audit SET subject = 'x' WHERE number = 3", "row 3 of \"a\""),
        ("UPDATE audit SET number = 9 WHERE number = 3", "no rows from 3 to 3"),
        ("UPDATE audit SET number = 9 WHERE number = 5", "no rows from 5 to"),
        ("UPDATE audit SET number = 9 WHERE number = 1", "no rows from 1 to 1"),
        ("UPDATE audit_stream SET last_number = 4, last_hash = base_hash", "end of \"a\""),
    ];
    let repairs = [
        "UPDATE audit SET subject = 'tok_story'",
        "UPDATE audit SET number = 3 WHERE number = 9",
        "UPDATE audit SET number = 5 WHERE number = 9",
        "UPDATE audit SET number = 1 WHERE number = 9",
        "UPDATE audit_stream SET last_number = 5, \
         last_hash = (SELECT hash FROM audit WHERE number = 5)",
    ];
    for ((damage, said), repair) in damages.into_iter().zip(repairs) {
        t.rows().engine.execute(sql(damage)).await.unwrap();
        let problems = t.rows().verify_audit().await.unwrap().problems;
        assert!(problems.iter().any(|problem| problem.contains(said)), "{damage}: {problems:?}");
        let is_gap = said.starts_with("no rows");
        let broken = !crate::store::admin::check(&t.store).await.unwrap().is_empty();
        assert!(broken || !is_gap, "the check does not see: {damage}");
        t.rows().engine.execute(sql(repair)).await.unwrap();
        verified(t).await;
    }
}

pub(super) async fn old_rows_go_from_the_beginning_alone(t: &TestStore) {
    let count = super::super::sql::AUDIT_PAGE + 200;
    let old = (0..count).map(|_| refused(Some("a"), t.now())).collect();
    t.rows().add_audit(old).await.unwrap();
    t.rows().add_audit(vec![refused(Some("b"), t.now()), refused(None, t.now())]).await.unwrap();
    t.advance_secs(100);
    let border = t.now();
    t.rows().add_audit(vec![refused(Some("a"), border)]).await.unwrap();
    // Of a node whose clock is late: it must not leave a gap.
    t.rows().add_audit(vec![refused(Some("a"), STORY_BEGIN)]).await.unwrap();
    let all = u64::from(count);
    assert_eq!(t.rows().forget_audit(STORY_BEGIN).await.unwrap(), 0);
    assert_eq!(t.rows().forget_audit(border).await.unwrap(), all + 2);
    let left: Vec<(String, u64)> =
        rows(t).await.into_iter().map(|row| (row.stream, row.number)).collect();
    assert_eq!(left, [("a".to_owned(), all + 2), ("a".to_owned(), all + 1)]);
    assert_eq!(verified(t).await, 2);
    // A stream that was forgotten whole goes on where it was.
    t.rows().add_audit(vec![refused(Some("b"), t.now())]).await.unwrap();
    let filter = AuditFilter { tenant: Some(tenant("b")), ..AuditFilter::default() };
    let page = t.rows().audit_page(&filter, None).await.unwrap();
    assert_eq!(page.iter().map(|row| row.number).collect::<Vec<_>>(), [2]);
    assert_eq!(verified(t).await, 3);
}

pub(super) async fn pages_of_the_log_follow_each_other(t: &TestStore) {
    let count = i64::from(super::super::sql::AUDIT_PAGE) * 2 + 7;
    let at = |second: i64| Micros(STORY_BEGIN.0 + second / 3 * Micros::SECOND);
    let names = [None, Some("a"), Some("b")];
    let entries = (0..count).map(|second| {
        let name = names[usize::try_from(second % 3).unwrap()];
        refused(name, at(second))
    });
    t.rows().add_audit(entries.collect()).await.unwrap();
    let all = rows(t).await;
    assert_eq!(i64::try_from(all.len()).unwrap(), count);
    let places: Vec<_> = all.iter().map(|row| (row.at, &row.stream, row.number)).collect();
    assert!(places.is_sorted());
    let (since, until) = (at(9), at(15));
    let filter = AuditFilter { since: Some(since), until: Some(until), tenant: Some(tenant("b")) };
    let page = t.rows().audit_page(&filter, None).await.unwrap();
    let found: Vec<_> = page.iter().map(|row| (row.stream.as_str(), row.at)).collect();
    assert_eq!(found, [("b", at(9)), ("b", at(12))]);
}

pub(super) async fn many_writers_number_without_gaps(t: &TestStore) {
    let writers = (0..30).map(|number: u32| async move {
        let name = ["a", "b"][usize::from(number.is_multiple_of(2))];
        if number.is_multiple_of(3) {
            t.rows().add_audit(vec![refused(Some(name), t.now())]).await.unwrap();
        } else {
            t.create(name).await;
        }
    });
    join_all(writers).await;
    assert_eq!(verified(t).await, 30);
}

/// Rows go by `forget_audit` alone, whatever somebody adds later.
#[test]
fn no_statement_changes_the_log_but_two() {
    let sources = [
        include_str!("../sql/artifacts.rs"),
        include_str!("../sql/audit.rs"),
        include_str!("../sql/create.rs"),
        include_str!("../sql/ending.rs"),
        include_str!("../sql/heart.rs"),
        include_str!("../sql/keys.rs"),
        include_str!("../sql/mod.rs"),
        include_str!("../sql/queue.rs"),
        include_str!("../sql/reading.rs"),
        include_str!("../sql/removals.rs"),
        include_str!("../sql/tenants.rs"),
        include_str!("../admin.rs"),
        include_str!("../engine.rs"),
    ];
    let count = |text: &str| sources.iter().map(|source| source.matches(text).count()).sum();
    let found: [usize; 3] =
        ["INSERT INTO audit ", "DELETE FROM audit ", "UPDATE audit "].map(count);
    assert_eq!(found, [1, 1, 0]);
}
