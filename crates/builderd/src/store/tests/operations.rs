//! What operators do, and what happens to the database itself.

use std::time::Duration;

use super::postgres::Postgres;
use super::{LONG, TestStore, failure, new_build, only_reads, plenty, result, tenant};
use crate::build::record::{FailureCode, LiveUsage, LogLine, Micros};
use crate::build::state::BuildState;
use crate::causes::chain;
use crate::store::admin::{self, AdminError};
use crate::store::engine::{Query, sql};
use crate::store::{Accepted, NewBuild, Outcome, Store, StoreError, TenantRow, TokenRow};
use crate::tenant::{TenantLimits, Tier};

pub(super) async fn tenants_are_as_they_were_set_up(t: &TestStore) {
    let rows = t.rows();
    let build = t.create("built").await;
    assert_eq!(rows.tenant(&build.tenant).await.unwrap(), None);
    let own = TenantLimits { concurrent_builds: 1, ..plenty() };
    let set = TenantRow { id: tenant("set"), tier: Tier::Enterprise, limits: Some(own) };
    rows.put_tenant(&set).await.unwrap();
    assert_eq!(rows.tenant(&set.id).await.unwrap(), Some(set.clone()));
    // What a build says of the tier does not change what the operator said.
    t.create_at("set", Tier::Free).await;
    assert_eq!(rows.tenant(&set.id).await.unwrap(), Some(set.clone()));
    let later = TenantRow { tier: Tier::Free, limits: None, ..set };
    rows.put_tenant(&later).await.unwrap();
    assert_eq!(rows.tenant(&later.id).await.unwrap(), Some(later.clone()));
    let built = TenantRow { id: tenant("built"), tier: Tier::Pro, limits: None };
    assert_eq!(rows.tenants().await.unwrap().rows, vec![built, later]);
}

fn token(id: &str) -> TokenRow {
    TokenRow {
        id: id.into(),
        secret_hash: format!("hash of {id}"),
        tenant: tenant("a"),
        customer: Some("c".into()),
        organization: Some("o".into()),
        rights: vec!["build:read".into()],
        note: "for the tests".into(),
        created_at: Micros(7),
        expires_at: Some(Micros(9)),
        revoked_at: None,
    }
}

pub(super) async fn tokens_are_found_by_their_hash(t: &TestStore) {
    let (rows, one, two) = (t.rows(), token("one"), token("two"));
    rows.add_token(&one).await.unwrap();
    rows.add_token(&two).await.unwrap();
    assert!(matches!(rows.add_token(&one).await, Err(StoreError::Database(_))));
    let found = async |hash: &str| rows.token_by_hash(hash).await.unwrap();
    assert_eq!(found("hash of one").await, Some((one.clone(), None)));
    assert_eq!(found("hash of three").await, None);
    // What a build says of the tier is not the operator's word.
    t.create_at("a", Tier::Free).await;
    assert_eq!(found("hash of one").await, Some((one.clone(), None)));
    let set = TenantRow { id: tenant("a"), tier: Tier::Enterprise, limits: None };
    rows.put_tenant(&set).await.unwrap();
    assert_eq!(found("hash of one").await, Some((one.clone(), Some(Tier::Enterprise))));
    assert!(rows.revoke_token("one", Micros(8)).await.unwrap());
    assert!(rows.revoke_token("one", Micros(9)).await.unwrap());
    assert!(!rows.revoke_token("three", Micros(8)).await.unwrap());
    let revoked = TokenRow { revoked_at: Some(Micros(8)), ..one };
    assert_eq!(rows.tokens().await.unwrap().rows, vec![revoked, two]);
    rows.beat().await.unwrap();
}

pub(super) async fn a_tenant_or_token_that_cannot_be_read_hides_no_other(t: &TestStore) {
    let rows = t.rows();
    let set = |name: &str| TenantRow {
        id: tenant(name),
        tier: Tier::Pro,
        limits: Some(TenantLimits { concurrent_builds: 1, ..plenty() }),
    };
    for name in ["plain", "strange"] {
        rows.put_tenant(&set(name)).await.unwrap();
    }
    for (damage, problem) in [
        ("UPDATE tenant SET tier = 'platinum' WHERE id = 'strange'", "tier is \"platinum\""),
        // As a newer version might write it: a limit more, which must not be gone over.
        (
            "UPDATE tenant SET tier = 'pro', limits = \
             REPLACE(limits, '{\"memory', '{\"gpus\":1,\"memory') WHERE id = 'strange'",
            "unknown field `gpus`",
        ),
    ] {
        t.write(damage).await;
        let listed = rows.tenants().await.unwrap();
        assert_eq!(listed.rows, [set("plain")]);
        let unread = &listed.unread[0];
        assert!(unread.id == "strange" && unread.problem.contains(problem), "{unread:?}");
        let busiest = rows.busiest(10, t.now()).await.unwrap();
        assert_eq!(
            busiest.iter().map(|load| &load.tenant.id).collect::<Vec<_>>(),
            [&tenant("plain")]
        );
        assert!(matches!(rows.tenant(&tenant("strange")).await, Err(StoreError::Corrupt(_))));
    }
    rows.put_tenant(&set("strange")).await.unwrap();
    assert_eq!(rows.tenants().await.unwrap().rows, [set("plain"), set("strange")]);

    rows.add_token(&token("one")).await.unwrap();
    rows.add_token(&token("two")).await.unwrap();
    t.write("UPDATE api_token SET rights = 'x' WHERE id = 'one'").await;
    let listed = rows.tokens().await.unwrap();
    assert_eq!((listed.rows, listed.unread[0].id.as_str()), (vec![token("two")], "one"));
    // It can be revoked all the same.
    assert!(rows.revoke_token("one", Micros(8)).await.unwrap());
}

/// The check must bite: each kind of damage is done, seen and undone.
pub(super) async fn damage_is_found(t: &TestStore) {
    for _ in 0..3 {
        t.create("a").await;
    }
    t.complete("tenant-a/x", 5).await;
    t.claim().await;
    let damages = [
        ("UPDATE tenant SET queued = queued + 1", "UPDATE tenant SET queued = queued - 1"),
        ("UPDATE tenant SET running = running + 1", "UPDATE tenant SET running = running - 1"),
        (
            "UPDATE tenant SET storage_bytes = storage_bytes + 1",
            "UPDATE tenant SET storage_bytes = storage_bytes - 1",
        ),
        (
            "UPDATE tenant_day SET created = created - 1",
            "UPDATE tenant_day SET created = created + 1",
        ),
        (
            "UPDATE tenant_artifact SET builds = builds + 1",
            "UPDATE tenant_artifact SET builds = builds - 1",
        ),
        (
            "UPDATE build_event SET to_state = 'failed' WHERE to_state = 'completed'",
            "UPDATE build_event SET to_state = 'completed' WHERE to_state = 'failed'",
        ),
        (
            "UPDATE build_event SET seq = 90 WHERE to_state = 'completed'",
            "UPDATE build_event SET seq = 4 WHERE seq = 90",
        ),
        (
            "UPDATE build SET lease_token = lease_token - 1 WHERE state = 'completed'",
            "UPDATE build SET lease_token = lease_token + 1 WHERE state = 'completed'",
        ),
        (
            "UPDATE build SET log_lines = 1 WHERE state = 'completed'",
            "UPDATE build SET log_lines = 0 WHERE state = 'completed'",
        ),
    ];
    for (damage, repair) in damages {
        assert!(t.rows().engine.execute(sql(damage)).await.unwrap() > 0, "{damage}");
        assert!(!admin::check(&t.store).await.unwrap().is_empty(), "not seen: {damage}");
        t.rows().engine.execute(sql(repair)).await.unwrap();
        t.check().await;
    }
    // Some damage the database itself refuses.
    for refused in [
        "UPDATE build SET lease_owner = NULL WHERE state = 'preparing'",
        "UPDATE build SET state = 'queued' WHERE state = 'preparing'",
        "UPDATE build SET sealed_credentials = 'x' WHERE state = 'completed'",
        "UPDATE tenant SET running = -1",
        "DELETE FROM artifact",
    ] {
        let answer = t.rows().engine.execute(sql(refused)).await;
        assert!(matches!(answer, Err(StoreError::Database(_))), "{refused}: {answer:?}");
    }
}

pub(super) async fn a_change_wakes_who_waits(t: &TestStore) {
    let mut changes = t.rows().announcer.subscribe();
    let start = std::time::Instant::now();
    t.create("a").await;
    changes.wait(Duration::from_secs(LONG)).await;
    tokio::join!(changes.wait(Duration::from_secs(LONG)), async {
        t.create("a").await;
    });
    assert!(start.elapsed() < Duration::from_secs(LONG / 2));
}

/// A store with something in every table.
async fn filled(t: &TestStore) {
    for name in ["a", "b"] {
        for _ in 0..4 {
            t.create(name).await;
        }
    }
    let name = crate::store::ArtifactName {
        domain: crate::store::ArtifactDomain::Public,
        recipe: "r".into(),
    };
    let claimed = t.claim().await;
    let said = |number| LogLine {
        offset: 0,
        at: t.now(),
        level: "info".into(),
        component: "builder".into(),
        message: format!("line {number}"),
    };
    let lines: Vec<LogLine> = (0..1203).map(said).collect();
    t.rows().append_log(&claimed.lease, &lines).await.unwrap();
    t.pack(&claimed).await;
    let outcome = Outcome::Completed(Box::new(result("public/x", 10)));
    t.rows().finish(&claimed.lease, Some(&name), &outcome, t.now()).await.unwrap();
    let claimed = t.claim().await;
    t.finish(&claimed, Outcome::Failed(failure(FailureCode::Internal))).await;
    let claimed = t.claim().await;
    let usage = LiveUsage { memory_bytes: 77, ..LiveUsage::default() };
    t.rows().heartbeat(&claimed.lease, LONG, Some(&usage), t.now()).await.unwrap();
    t.rows().add_token(&token("one")).await.unwrap();
    let set = TenantRow { id: tenant("c"), tier: Tier::Free, limits: Some(plenty()) };
    t.rows().put_tenant(&set).await.unwrap();
    t.rows().claim_master_key("key").await.unwrap();
    t.rows().add_tenant_key(&super::keys::key(t, "a", 1)).await.unwrap();
    t.rows().begin_removal("public/y", t.now()).await.unwrap().unwrap();
    t.rows().beat().await.unwrap();
}

/// Everything that tenants can see.
async fn seen(store: &Store) -> String {
    let mut seen = String::new();
    for tenant in store.rows.tenants().await.unwrap().rows {
        let filter = super::lists::newest(100);
        let page = store.rows.list(&tenant.id, &filter).await.unwrap();
        for build in &page.builds {
            let log = store.rows.log(&tenant.id, &build.id, 0, 2000).await.unwrap();
            seen.push_str(&format!("{build:?} {log:?}\n"));
        }
        let usage = store.rows.usage(&tenant.id, Micros(1_700_006_400_000_000)).await.unwrap();
        seen.push_str(&format!("{tenant:?} {usage:?} {}\n", page.total));
    }
    seen.push_str(&format!("{:?}", store.rows.tokens().await.unwrap()));
    seen.push_str(&format!("{:?}", store.rows.master_key().await.unwrap()));
    let key = store.rows.current_tenant_key(&tenant("a")).await.unwrap();
    seen.push_str(&format!("{:?}", key.expect("it has one")));
    seen
}

pub(super) async fn a_store_moves_to_postgresql(url: &str) {
    let (from, to) = (TestStore::sqlite().await, TestStore::postgres(url).await);
    filled(&from).await;
    // What this version does not know would be left out of the copy.
    let newer = "INSERT INTO _sqlx_migrations (version, description, success, checksum, \
         execution_time) VALUES (9999, 'the future', TRUE, x'00', 1)";
    from.rows().engine.execute(sql(newer)).await.unwrap();
    let refused = admin::migrate_store(&from.store, &to.store).await;
    assert!(matches!(refused, Err(AdminError::Newer { migration: 9999 })), "{refused:?}");
    let undo = "DELETE FROM _sqlx_migrations WHERE version = 9999";
    from.rows().engine.execute(sql(undo)).await.unwrap();
    let copied = admin::migrate_store(&from.store, &to.store).await.unwrap();
    assert!(copied.iter().all(|table| table.rows > 0), "{copied:?}");
    assert_eq!(seen(&from.store).await, seen(&to.store).await);
    to.check().await;
    // It lives on: what waits is built, what ran is reaped once its lease is over.
    assert!(to.try_claim(LONG).await.expect("a build waits").sealed_credentials.is_some());
    let again = admin::migrate_store(&from.store, &to.store).await;
    assert!(matches!(again, Err(AdminError::NotEmpty { table: "tenant" })), "{again:?}");
    to.store.close().await;
}

pub(super) async fn nodes_hear_of_each_other(url: &str) {
    let (one, two) = (TestStore::postgres(url).await, TestStore::postgres(url).await);
    let system = two.store.system();
    let mut changes = system.changes();
    // The listener counts a change when it gets its connection; that is not the one meant.
    let start = std::time::Instant::now();
    let heard = async {
        loop {
            changes.wait(Duration::from_secs(LONG)).await;
            if two.rows().depth().await.unwrap().queued > 0 {
                break;
            }
        }
    };
    let created = async {
        // Until it is heard: the listener may not listen yet.
        loop {
            one.create("a").await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        () = heard => {}
        () = created => {}
        () = tokio::time::sleep(Duration::from_secs(30)) => panic!("nothing was heard"),
    }
    assert!(start.elapsed() < Duration::from_secs(30));
    one.store.close().await;
    two.store.close().await;
}

pub(super) async fn a_lost_database_comes_back(postgres: &mut Postgres) {
    let t = TestStore::postgres(&postgres.database()).await;
    let before = t.create("a").await;
    let claimed = t.claim().await;
    postgres.crash();
    let place = postgres.place();
    let said = |error: &StoreError| {
        assert!(error.may_pass() && error.class() == "database_unavailable", "{error:?}");
        let said = chain(error);
        assert!(said.contains(&place) && said.contains("cannot be reached"), "{place}: {said}");
        said
    };
    said(&t.rows().get(&before.tenant, &before.id).await.unwrap_err());
    let order = new_build(t.now());
    let late = t.rows().create(&tenant("a"), Tier::Pro, &plenty(), &order).await.unwrap_err();
    let late = said(&late);
    assert!(!late.contains("pool") && late.contains("No such file"), "why: {late}");
    said(&t.store.late(Duration::from_secs(5)));
    postgres.restart();
    // What was answered is still there, and the same store goes on.
    assert_eq!(t.state(&before).await, BuildState::Preparing);
    t.pack(&claimed).await;
    t.create("a").await;
    t.check().await;
    t.store.close().await;
}

#[tokio::test]
async fn a_full_disk_is_told_and_recovers() {
    let t = TestStore::sqlite().await;
    let build = t.create("a").await;
    let claimed = t.claim().await;
    let pages = |number: u32| Query::assembled(format!("PRAGMA max_page_count = {number}"));
    t.rows().engine.execute(pages(60)).await.unwrap();
    let line = LogLine {
        offset: 0,
        at: t.now(),
        level: "info".into(),
        component: "builder".into(),
        message: "x".repeat(8000),
    };
    let lines = vec![line; 100];
    let full = t.rows().append_log(&claimed.lease, &lines).await;
    assert!(matches!(full, Err(StoreError::Full(_))), "{full:?}");
    // Nothing was half done, and reading goes on.
    assert!(t.rows().log(&build.tenant, &build.id, 0, 10).await.unwrap().is_empty());
    t.check().await;
    t.rows().engine.execute(pages(1_000_000)).await.unwrap();
    t.rows().append_log(&claimed.lease, &lines).await.unwrap();
    assert!(matches!(t.ask("a", &plenty(), &new_build(t.now())).await, Accepted::Created(_)));
    t.check().await;
}

/// The store must have one connection that writes.
pub(super) async fn a_database_that_takes_no_writes_is_known(t: &TestStore) {
    let system = t.store.system();
    for _ in 0..2 {
        system.beat().await.unwrap();
        only_reads(&t.store, true).await;
        assert!(system.tokens().await.unwrap().rows.is_empty(), "it can be read");
        let error = system.beat().await.unwrap_err();
        assert_eq!(error.class(), "database_read_only", "{error:?}");
        assert!(error.may_pass());
        only_reads(&t.store, false).await;
        system.beat().await.unwrap();
    }
}

#[tokio::test]
async fn a_file_that_takes_no_writes_is_known() {
    let t = TestStore::sqlite().await;
    a_database_that_takes_no_writes_is_known(&t).await;
    let full = StoreError::Full(sqlx::Error::PoolTimedOut);
    assert_eq!(full.class(), "database_full");
    assert_eq!(t.store.late(Duration::from_secs(5)).class(), "database_unavailable");
    t.check().await;
}

#[tokio::test]
async fn a_backup_holds_no_credentials() {
    let t = TestStore::sqlite().await;
    let canary = b"canary-2718281828".to_vec();
    let contains = |bytes: &[u8]| bytes.windows(canary.len()).any(|window| window == canary);
    let build = NewBuild { sealed_credentials: Some(canary.clone()), ..new_build(t.now()) };
    t.ask("a", &plenty(), &build).await;
    let directory = t.directory.as_ref().unwrap().path();
    let live = ["builderd.db", "builderd.db-wal"].map(|name| directory.join(name));
    let live = live.iter().filter_map(|file| std::fs::read(file).ok());
    assert!(live.into_iter().any(|bytes| contains(&bytes)), "the canary is not even stored");

    let (file, other) = (directory.join("backup.db"), directory.join("other"));
    admin::backup(directory, &file).await.unwrap();
    assert!(!contains(&std::fs::read(&file).unwrap()));
    admin::restore(&file, &other).await.unwrap();
    let restored = TestStore::new(Store::open_sqlite(&other).await.unwrap(), None);
    let claimed = restored.claim().await;
    assert_eq!((claimed.build.id, claimed.sealed_credentials), (build.id, None));
    restored.check().await;
}
