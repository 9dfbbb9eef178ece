//! The conformance suite: the same stories on SQLite and on PostgreSQL, so that every statement
//! runs on both. When a story ends, the database is checked for what should never be in it.

mod artifacts;
mod audit;
mod fleet;
mod keys;
mod lists;
mod logs;
mod model;
mod operations;
mod queue;
mod quotas;
mod removals;
mod revisions;

#[path = "../../../tests/it/support/postgres.rs"]
mod postgres;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI64, Ordering};

use futures_util::future::BoxFuture;
use tempfile::TempDir;

use super::audit::Author;
use super::{
    Accepted, Cancel, Claimed, Delete, NewBuild, Outcome, Rows, Store, StoreError, TenantRow,
    TokenRow, admin, engine,
};
use crate::build::record::{
    Build, BuildId, BuildMetrics, BuildRequest, BuildResult, Failure, FailureCode, Micros,
    RetryPolicy,
};
use crate::build::state::BuildState;
use crate::tenant::{Right, TenantId, TenantLimits, Tier};

/// A day's beginning.
const STORY_BEGIN: Micros = Micros(1_700_006_400 * Micros::SECOND);
/// Longer than any test.
const LONG: u64 = 3600;

/// Changes by nobody in particular, for stories that are not about who made them.
impl Rows {
    async fn create(
        &self,
        tenant: &TenantId,
        tier: Tier,
        limits: &TenantLimits,
        build: &NewBuild,
    ) -> Result<Accepted, StoreError> {
        self.create_by(&Author::service(), tenant, tier, limits, build).await
    }

    async fn cancel(
        &self,
        tenant: &TenantId,
        id: &BuildId,
        reason: &str,
        now: Micros,
    ) -> Result<Option<Cancel>, StoreError> {
        self.cancel_by(&Author::service(), tenant, id, reason, now).await
    }

    async fn delete(&self, tenant: &TenantId, id: &BuildId) -> Result<Option<Delete>, StoreError> {
        self.delete_by(&Author::service(), tenant, id, STORY_BEGIN).await
    }

    async fn put_tenant(&self, tenant: &TenantRow) -> Result<(), StoreError> {
        self.put_tenant_by(&Author::service(), tenant, STORY_BEGIN).await
    }

    async fn add_token(&self, token: &TokenRow) -> Result<(), StoreError> {
        self.add_token_by(&Author::service(), token).await
    }

    async fn revoke_token(&self, id: &str, now: Micros) -> Result<bool, StoreError> {
        self.revoke_token_by(&Author::service(), id, now).await
    }

    async fn forget_master_key(&self) -> Result<u64, StoreError> {
        self.forget_master_key_by(&Author::service(), STORY_BEGIN).await
    }
}

/// A store of one story, with its own clock.
struct TestStore {
    store: Store,
    now: AtomicI64,
    directory: Option<TempDir>,
}

impl TestStore {
    fn new(store: Store, directory: Option<TempDir>) -> Self {
        let now = AtomicI64::new(STORY_BEGIN.0);
        Self { store, now, directory }
    }

    async fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open_sqlite(directory.path()).await.unwrap();
        Self::new(store, Some(directory))
    }

    async fn postgres(url: &str) -> Self {
        Self::new(Store::open_postgres(url, 20).await.unwrap(), None)
    }

    fn rows(&self) -> &Rows {
        &self.store.rows
    }

    fn now(&self) -> Micros {
        Micros(self.now.load(Ordering::SeqCst))
    }

    fn advance_secs(&self, secs: i64) {
        self.now.fetch_add(secs * Micros::SECOND, Ordering::SeqCst);
    }

    /// Asks for a build as `name` with the limits.
    async fn ask(&self, name: &str, limits: &TenantLimits, build: &NewBuild) -> Accepted {
        self.rows().create(&tenant(name), Tier::Pro, limits, build).await.unwrap()
    }

    /// A build in the queue of a tenant that may do much.
    async fn create(&self, name: &str) -> Build {
        self.create_at(name, Tier::Pro).await
    }

    async fn create_at(&self, name: &str, tier: Tier) -> Build {
        let build = new_build(self.now());
        let accepted = self.rows().create(&tenant(name), tier, &plenty(), &build).await.unwrap();
        match accepted {
            Accepted::Created(build) => build,
            other @ (Accepted::Known { .. } | Accepted::KeyReused | Accepted::Quota(_)) => {
                panic!("{other:?}")
            }
        }
    }

    async fn try_claim(&self, lease_secs: u64) -> Option<Claimed> {
        self.rows().claim("worker-1", lease_secs, self.now()).await.unwrap()
    }

    async fn claim(&self) -> Claimed {
        self.try_claim(LONG).await.expect("a build is ready")
    }

    /// A claim whose lease has run out already.
    async fn claim_and_die(&self) -> Claimed {
        self.try_claim(0).await.expect("a build is ready")
    }

    /// Writes past the store's rules, one row.
    async fn write(&self, statement: &'static str) {
        let query = super::engine::sql(statement);
        assert_eq!(self.rows().engine.execute(query).await.unwrap(), 1, "{statement}");
    }

    /// Writes past the store's rules; the build's id is the statement's `$1`.
    async fn damage(&self, statement: &'static str, build: &Build) {
        let query = super::engine::sql(statement).text(build.id.as_str());
        assert_eq!(self.rows().engine.execute(query).await.unwrap(), 1);
    }

    async fn get(&self, build: &Build) -> Build {
        self.rows().get(&build.tenant, &build.id).await.unwrap().expect("the build is there")
    }

    /// The message of the last line of its log.
    async fn last_line(&self, build: &Build) -> String {
        let log = self.rows().log(&build.tenant, &build.id, 0, 1000).await.unwrap();
        log.last().map_or_else(String::new, |line| line.message.clone())
    }

    async fn state(&self, build: &Build) -> BuildState {
        self.get(build).await.state
    }

    /// Takes the claimed build to its last step.
    async fn pack(&self, claimed: &Claimed) {
        let packaging = BuildState::Packaging;
        let done = self.rows().progress(&claimed.lease, packaging, 90, "storing", self.now());
        assert_eq!(done.await.unwrap(), super::Fenced::Written);
    }

    async fn finish(&self, claimed: &Claimed, outcome: Outcome) -> super::Fenced {
        let done = self.rows().finish(&claimed.lease, None, &outcome, self.now()).await.unwrap();
        done.map_or(super::Fenced::Lost, |_| super::Fenced::Written)
    }

    /// Claims the next build and completes it with the artifact.
    async fn complete(&self, key: &str, bytes: u64) -> Claimed {
        let claimed = self.claim().await;
        self.pack(&claimed).await;
        let outcome = Outcome::Completed(Box::new(result(key, bytes)));
        assert_eq!(self.finish(&claimed, outcome).await, super::Fenced::Written);
        claimed
    }

    /// Asserts that nothing is in the database that should not be.
    async fn check(&self) {
        let violations = admin::check(&self.store).await.unwrap();
        assert!(violations.is_empty(), "{violations:#?}");
    }
}

/// A build of `image` in the queue, for stories that are not about the store.
pub(crate) async fn queue_build(store: &Store, image: &str, now: Micros) -> Build {
    let mut build = new_build(now);
    build.request.image = image.into();
    build.sealed_credentials = None;
    match store.rows.create(&tenant("acme"), Tier::Pro, &plenty(), &build).await.unwrap() {
        Accepted::Created(build) => build,
        other @ (Accepted::Known { .. } | Accepted::KeyReused | Accepted::Quota(_)) => {
            panic!("{other:?}")
        }
    }
}

/// Makes a database one that can be read alone, or ends that.
pub(crate) async fn only_reads(store: &Store, only: bool) {
    let statement = match (&store.rows.engine, only) {
        (engine::Engine::Sqlite { .. }, true) => "PRAGMA query_only = ON",
        (engine::Engine::Sqlite { .. }, false) => "PRAGMA query_only = OFF",
        (engine::Engine::Postgres(_), true) => "SET default_transaction_read_only = on",
        (engine::Engine::Postgres(_), false) => "SET default_transaction_read_only = off",
    };
    store.rows.engine.execute(engine::sql(statement)).await.unwrap();
}

/// Keeps everybody else from writing, as a database that hangs does, until it is dropped. For
/// SQLite, which has one writer.
pub(crate) async fn hang(store: &Store) -> impl Send + use<> {
    store.rows.engine.begin().await.unwrap()
}

/// Writes over the logs of all builds, past the store's rules, so that no row of a build changes:
/// who still tells of the old ones has not read them again.
pub(crate) async fn rewrite_logs(store: &Store, message: &str) {
    let query = engine::sql("UPDATE build_log SET message = $1").text(message);
    assert!(store.rows.engine.execute(query).await.unwrap() > 0, "there is a log");
}

/// Leaves nothing readable of what was asked for, and of what came of it, in a build.
pub(crate) async fn garble(store: &Store, id: &str) {
    let query = engine::sql(
        "UPDATE build SET request = '{}', \
         result = CASE WHEN result IS NULL THEN NULL ELSE 'x' END WHERE id = $1",
    );
    let query = query.text(id);
    assert_eq!(store.rows.engine.execute(query).await.unwrap(), 1);
}

/// Deletes an ended build.
pub(crate) async fn delete_build(store: &Store, name: &str, id: &str) {
    let deleted = store.rows.delete(&tenant(name), &id.parse().unwrap()).await.unwrap();
    assert_eq!(deleted, Some(Delete::Done));
}

/// A build as it is stored.
pub(crate) async fn stored(store: &Store, build: &Build) -> Build {
    store.rows.get(&build.tenant, &build.id).await.unwrap().expect("the build is there")
}

/// The messages of a build's log.
pub(crate) async fn messages(store: &Store, build: &Build) -> Vec<String> {
    let lines = store.rows.log(&build.tenant, &build.id, 0, 10_000).await.unwrap();
    lines.into_iter().map(|line| line.message).collect()
}

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

/// Limits that no story meets by accident.
fn plenty() -> TenantLimits {
    TenantLimits {
        concurrent_builds: 1000,
        daily_builds: 100_000,
        storage_bytes: 1 << 50,
        ..Tier::Pro.limits()
    }
}

fn new_build(now: Micros) -> NewBuild {
    NewBuild {
        id: BuildId::new(),
        request: BuildRequest {
            image: "nginx:1.21".into(),
            pull_tags: Vec::new(),
            compression: "none".into(),
            size_limit_bytes: None,
            commands: Vec::new(),
            name: "web".into(),
            labels: [("team".to_owned(), "a".to_owned())].into(),
            suggested_asset_id: String::new(),
            retry: RetryPolicy::default(),
            echo: "{}".into(),
        },
        limits: Tier::Pro.limits(),
        customer: Some("customer-1".into()),
        organization: Some("organization-1".into()),
        rights: BTreeSet::from([Right::BuildCreate, Right::BuildRead]),
        sealed_credentials: Some(vec![1, 2, 0, 255]),
        idempotency_key: None,
        request_hash: "hash".into(),
        created_by: Some("tok_creator".into()),
        traceparent: Some("00-aa-bb-01".into()),
        created_at: now,
    }
}

pub(crate) fn result(key: &str, bytes: u64) -> BuildResult {
    BuildResult {
        artifact_key: key.into(),
        artifact_bytes: bytes,
        sha256: "ab".repeat(32),
        image_bytes: 2 * bytes,
        metadata: serde_json::json!({"user": "app"}),
        from_cache: false,
        metrics: BuildMetrics { total_ms: 1200, ..BuildMetrics::default() },
    }
}

fn failure(code: FailureCode) -> Failure {
    Failure {
        code,
        step: "pull".into(),
        cause: "it broke".into(),
        blame: "upstream".into(),
        remedy: String::new(),
    }
}

/// Every story, once as a test of its own on SQLite, and in a list for PostgreSQL.
macro_rules! stories {
    ($($module:ident: $($name:ident),+;)+) => {
        mod on_sqlite {
            $($(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    let store = super::TestStore::sqlite().await;
                    super::$module::$name(&store).await;
                    store.check().await;
                }
            )+)+
        }

        const STORIES: &[(&str, fn(&TestStore) -> BoxFuture<'_, ()>)] = &[
            $($((stringify!($name), |store| Box::pin($module::$name(store))),)+)+
        ];
    };
}

stories! {
    queue:
        a_build_goes_from_the_queue_to_its_end,
        shares_follow_the_weights,
        an_idle_tenant_saves_nothing_up,
        who_worked_alone_owes_nothing,
        a_tenant_never_runs_more_than_it_may,
        many_workers_never_take_the_same_build,
        a_worker_without_its_lease_changes_nothing,
        a_lease_that_runs_out_puts_the_build_back,
        a_build_that_is_lost_again_and_again_rests_between_its_tries,
        who_is_alone_waits_for_no_lease,
        a_build_that_cannot_be_read_holds_nobody_up,
        a_build_that_nobody_can_read_fails_in_the_end,
        a_build_with_impossible_numbers_holds_nobody_up_and_ends,
        a_build_whose_name_cannot_be_read_holds_nobody_up,
        what_the_database_refuses_of_one_build_holds_nobody_up,
        a_tenant_with_impossible_numbers_holds_nobody_up,
        a_heartbeat_keeps_the_lease,
        a_heartbeat_says_what_the_build_takes,
        a_build_whose_workers_die_fails_in_the_end,
        a_cancelled_build_is_never_queued_again,
        a_queued_build_is_cancelled_at_once,
        a_cancelled_build_never_completes,
        a_failed_build_stays_failed,
        a_retry_waits_until_its_time,
        a_shutdown_counts_no_try,
        progress_never_goes_back,
        ending_erases_the_credentials;
    quotas:
        one_of_five_hundred_takes_the_last_build_of_the_day,
        the_day_ends_and_deleting_gives_nothing_back,
        full_storage_accepts_no_build,
        the_busiest_tenants_are_known,
        builds_that_end_together_never_fill_more_than_there_is,
        the_queue_of_a_tenant_is_bounded,
        a_key_makes_one_build,
        tenants_see_their_own_builds_alone,
        texts_with_nul_are_stored;
    lists:
        pages_follow_each_other,
        a_build_that_cannot_be_read_is_shown_as_what_it_is,
        a_build_says_who_asked_for_it,
        a_state_of_another_version_hides_no_build,
        a_page_ends_early_where_its_builds_are_large,
        filters_find_rare_states,
        the_first_build_since_a_time_is_found,
        figures_cover_a_stretch_of_time;
    logs:
        lines_are_numbered_from_zero,
        a_log_has_an_end_in_bytes,
        a_log_has_an_end_in_lines,
        a_try_that_talks_without_end_leaves_room_for_the_next,
        a_log_says_of_each_try_that_failed_when_the_next_one_begins,
        no_noise_keeps_a_log_from_saying_how_the_build_ended;
    artifacts:
        an_artifact_of_several_builds_counts_once,
        a_public_artifact_is_found_by_others,
        what_a_running_build_wants_stays,
        old_artifacts_are_forgotten,
        a_build_that_cannot_be_read_keeps_no_other_from_being_forgotten,
        a_tenant_whose_counters_are_wrong_keeps_no_other_from_being_forgotten,
        a_known_artifact_that_cannot_be_read_is_made_anew,
        the_oldest_artifacts_make_room;
    removals:
        a_file_is_taken_or_removed_never_both,
        a_file_that_lost_its_last_build_is_found_at_once,
        a_removal_whose_janitor_died_is_over_some_day,
        takers_and_removers_never_meet,
        the_first_key_is_the_key;
    keys:
        a_tenant_has_one_current_key,
        a_retired_key_stays_while_an_artifact_needs_it,
        keys_are_destroyed_with_what_they_sealed;
    revisions:
        each_change_of_an_ended_build_is_counted,
        what_has_not_ended_has_no_revision;
    audit:
        every_change_leaves_one_row,
        what_changed_nothing_leaves_none,
        a_row_is_never_changed_or_removed,
        damage_to_the_log_is_found,
        old_rows_go_from_the_beginning_alone,
        pages_of_the_log_follow_each_other,
        many_writers_number_without_gaps;
    operations:
        tenants_are_as_they_were_set_up,
        a_tenant_or_token_that_cannot_be_read_hides_no_other,
        tokens_are_found_by_their_hash,
        damage_is_found,
        a_change_wakes_who_waits;
}

/// SQLite ends the transaction by itself then, which must not be held against the connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_over_when_there_is_room_again() {
    let t = TestStore::sqlite().await;
    t.create("a").await;
    // The file may not grow; a new connection knows nothing of that.
    t.rows().engine.execute(engine::sql("PRAGMA max_page_count = 1")).await.unwrap();
    let mut full = 0;
    for _ in 0..500 {
        let build = new_build(t.now());
        match t.rows().create(&tenant("a"), Tier::Pro, &plenty(), &build).await {
            Ok(_) => {}
            Err(StoreError::Full(_)) => {
                full += 1;
                break;
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!(full, 1, "the file was allowed to grow");
    let build = t.create("a").await;
    assert_eq!(t.state(&build).await, BuildState::Queued);
    t.claim().await;
    t.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_story_holds_on_postgresql() {
    let Some(mut postgres) = postgres::Postgres::start() else { return };
    let mut failed = Vec::new();
    for (name, story) in STORIES {
        let store = TestStore::postgres(&postgres.database()).await;
        let told = tokio::spawn(async move {
            story(&store).await;
            store.check().await;
            store.store.close().await;
        });
        if let Err(error) = told.await {
            failed.push(format!("{name}: {error}"));
        }
    }
    operations::a_store_moves_to_postgresql(&postgres.database()).await;
    operations::nodes_hear_of_each_other(&postgres.database()).await;
    fleet::one_connection_is_enough(&postgres).await;
    fleet::a_stand_by_is_known(&postgres).await;
    operations::a_lost_database_comes_back(&mut postgres).await;
    assert!(failed.is_empty(), "{failed:#?}");
}
