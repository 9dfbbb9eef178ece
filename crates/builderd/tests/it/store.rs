//! Stories about the database as operators meet it; what its rows do is told beside them.

use builderd::build::record::Micros;
use builderd::store::admin::{self, AdminError};
use builderd::store::{DirectoryProblem, Store, StoreError, TenantRow, TokenRow};
use builderd::tenant::Tier;

use crate::support::Workshop;
use crate::support::postgres::Postgres;

fn token(id: &str) -> TokenRow {
    TokenRow {
        id: id.into(),
        secret_hash: format!("hash of {id}"),
        tenant: "tenant-1".parse().unwrap(),
        customer: None,
        organization: None,
        rights: vec!["build:create".into()],
        note: String::new(),
        created_at: Micros(1),
        expires_at: None,
        revoked_at: None,
    }
}

fn tier(name: &str, tier: Tier) -> TenantRow {
    TenantRow { id: name.parse().unwrap(), tier, limits: None }
}

#[tokio::test]
async fn two_servers_never_share_a_data_directory() {
    let workshop = Workshop::new();
    let data = workshop.path("data");
    let server = Store::open_sqlite(&data).await.unwrap();
    let second = Store::open_sqlite(&data).await;
    let Err(StoreError::DataDirectory { path, problem }) = second.map(|_| ()) else {
        panic!("a second server was let in")
    };
    assert_eq!((path, problem), (data.clone(), DirectoryProblem::InUse));
    // An operator's command may look in, and both see the same.
    let command = Store::attach_sqlite(&data).await.unwrap();
    command.system().add_token(&token("one")).await.unwrap();
    assert_eq!(server.system().tokens().await.unwrap().rows, vec![token("one")]);
    server.close().await;
    drop(server);
    let third = Store::open_sqlite(&data).await.unwrap();
    assert_eq!(third.system().tokens().await.unwrap().rows, vec![token("one")]);
}

#[tokio::test]
async fn a_backup_is_taken_beside_a_server_and_restored() {
    let workshop = Workshop::new();
    let (data, file) = (workshop.path("data"), workshop.path("backup.db"));
    let server = Store::open_sqlite(&data).await.unwrap();
    server.system().add_token(&token("one")).await.unwrap();
    admin::backup(&data, &file).await.unwrap();
    server.system().add_token(&token("two")).await.unwrap();
    let nowhere = admin::backup(&data, &workshop.path("nowhere/backup.db")).await;
    assert!(matches!(nowhere, Err(AdminError::File { .. })), "{nowhere:?}");
    // What breaks off leaves nothing: this one is no database.
    let broken = workshop.path("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("builderd.db"), [7; 10_000]).unwrap();
    assert!(admin::backup(&broken, &broken.join("backup.db")).await.is_err());
    assert_eq!(std::fs::read_dir(&broken).unwrap().count(), 1, "of the backup nothing is left");
    let again = admin::backup(&data, &file).await;
    assert!(matches!(again, Err(AdminError::File { .. })), "{again:?}");

    // Nothing is put under a server, nor over a database that is there.
    let under = admin::restore(&file, &data).await;
    let locked = matches!(under, Err(AdminError::Store(StoreError::DataDirectory { .. })));
    assert!(locked, "{under:?}");
    server.close().await;
    drop(server);
    let over = admin::restore(&file, &data).await;
    assert!(matches!(over, Err(AdminError::File { .. })), "{over:?}");
    let other = workshop.path("other");
    admin::restore(&file, &other).await.unwrap();
    let restored = Store::open_sqlite(&other).await.unwrap();
    assert_eq!(restored.system().tokens().await.unwrap().rows, vec![token("one")]);
    assert!(admin::check(&restored).await.unwrap().is_empty());

    // What a server that died has not yet written into a database belongs to that one alone.
    let bereft = workshop.path("bereft");
    std::fs::create_dir(&bereft).unwrap();
    for ending in ["wal", "journal"] {
        let changes = bereft.join(format!("builderd.db-{ending}"));
        std::fs::write(&changes, b"of another database").unwrap();
        let refused = admin::restore(&file, &bereft).await.unwrap_err();
        let AdminError::File { path, problem } = refused else { panic!("{refused:?}") };
        assert_eq!(path, changes);
        assert!(problem.contains("move it away as well"), "{problem}");
        assert!(!bereft.join("builderd.db").exists());
        std::fs::remove_file(changes).unwrap();
    }
    admin::restore(&file, &bereft).await.unwrap();

    std::fs::write(workshop.path("noise"), crate::support::noise(1, 20_000)).unwrap();
    let damaged = admin::restore(&workshop.path("noise"), &workshop.path("third")).await;
    assert!(damaged.is_err(), "noise was taken for a backup");
    assert!(!workshop.path("third/builderd.db").exists());
}

#[tokio::test]
async fn an_older_binary_lives_with_a_newer_schema() {
    let workshop = Workshop::new();
    let data = workshop.path("data");
    Store::open_sqlite(&data).await.unwrap().close().await;
    let newer = sqlx::sqlite::SqliteConnectOptions::new().filename(data.join("builderd.db"));
    let mut connection = sqlx::ConnectOptions::connect(&newer).await.unwrap();
    for statement in [
        "ALTER TABLE build ADD COLUMN of_the_future TEXT",
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES (9999, 'the future', TRUE, x'00', 1)",
    ] {
        sqlx::query(statement).execute(&mut connection).await.unwrap();
    }
    sqlx::Connection::close(connection).await.unwrap();
    let store = Store::open_sqlite(&data).await.unwrap();
    store.system().put_tenant(&tier("tenant-1", Tier::Pro)).await.unwrap();
    assert_eq!(store.system().tenants().await.unwrap().rows, vec![tier("tenant-1", Tier::Pro)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_keeps_what_it_answered_when_it_crashes() {
    let Some(mut postgres) = Postgres::start() else { return };
    let url = postgres.database();
    // Nodes may start at the same moment.
    let nodes = [0; 4].map(|_| Store::open_postgres(&url, 2));
    let nodes = futures_util::future::join_all(nodes).await;
    let nodes: Vec<Store> = nodes.into_iter().map(|node| node.unwrap()).collect();
    nodes[0].system().add_token(&token("one")).await.unwrap();
    nodes[1].system().put_tenant(&tier("tenant-1", Tier::Enterprise)).await.unwrap();
    postgres.crash();
    let away = nodes[2].system().tokens().await;
    let Err(StoreError::Unreachable { place, .. }) = &away else { panic!("{away:?}") };
    assert!(place.contains(&postgres.place()), "{place}");
    assert!(Store::open_postgres(&url, 2).await.is_err());
    postgres.restart();
    for node in &nodes {
        let system = node.system();
        assert_eq!(system.tokens().await.unwrap().rows, vec![token("one")]);
        let known = system.tenant(&"tenant-1".parse().unwrap()).await.unwrap();
        assert_eq!(known, Some(tier("tenant-1", Tier::Enterprise)));
        system.beat().await.unwrap();
        node.close().await;
    }
}
