//! Nodes and commands on one PostgreSQL.

use super::postgres::Postgres;
use super::{TestStore, operations, tenant};
use crate::build::record::Micros;
use crate::store::engine::sql;
use crate::store::{Store, TenantRow};
use crate::tenant::Tier;

/// Connections to the database, this question's included.
async fn connections(store: &Store) -> u64 {
    let query = "SELECT COUNT(*) AS found FROM pg_stat_activity \
         WHERE datname = current_database() AND application_name = 'builderd'";
    store.rows.engine.all(sql(query)).await.unwrap()[0].count("found").unwrap()
}

/// Whoever has one connection has it whenever it is wanted: a listener takes none away.
pub(super) async fn one_connection_is_enough(postgres: &Postgres) {
    let url = postgres.database();
    let command = Store::attach_postgres(&url).await.unwrap();
    let row = TenantRow { id: tenant("a"), tier: Tier::Pro, limits: None };
    for _ in 0..5 {
        assert!(command.system().tenants().await.unwrap().rows.len() < 2);
        command.system().put_tenant(&row).await.unwrap();
    }
    assert_eq!(connections(&command).await, 1);
    command.close().await;

    let node = TestStore::new(Store::open_postgres(&url, 1).await.unwrap(), None);
    let mut changes = node.store.system().changes();
    let heard = async {
        // The listener's first word comes when it listens, or from somebody else.
        loop {
            changes.wait(std::time::Duration::from_millis(100)).await;
            if connections(&node.store).await == 2 {
                break;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), heard).await.expect("it listens");
    for _ in 0..5 {
        node.create("a").await;
        assert!(node.store.system().depth().await.unwrap().queued > 0);
        assert_eq!(node.rows().tenant(&row.id).await.unwrap(), Some(row.clone()));
    }
    node.store.system().reap(crate::store::Leases::Expired, 5, Micros(0)).await.unwrap();
    node.store.close().await;
}

/// What a stand-by says to a write, its server says to a transaction that may only read.
pub(super) async fn a_stand_by_is_known(postgres: &Postgres) {
    let store = Store::open_postgres(&postgres.database(), 1).await.unwrap();
    let node = TestStore::new(store, None);
    operations::a_database_that_takes_no_writes_is_known(&node).await;
    node.store.close().await;
}
