//! Every way in leaves one row in the audit log when it changes something or refuses somebody,
//! and nothing that anybody sends gets into one.

use std::time::Duration;

use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};

use super::authorisation::WAYS;
use super::{Server, create_body, send};
use crate::api::Mode;
use crate::store::audit::{AuditFilter, AuditRow};
use crate::store::tests::only_reads;
use crate::tenant::Right;

/// How long a refusal may take to be written.
const WRITTEN_MAX: Duration = Duration::from_secs(10);

impl Server {
    pub(super) async fn audit(&self) -> Vec<AuditRow> {
        let (system, filter) = (self.store.system(), AuditFilter::default());
        let mut rows = Vec::new();
        loop {
            let page = system.audit_page(&filter, rows.last()).await.unwrap();
            if page.is_empty() {
                break rows;
            }
            rows.extend(page);
        }
    }

    /// The rows, once there are `count`, in the order of their writing within a stream.
    pub(super) async fn audit_of(&self, count: usize) -> Vec<AuditRow> {
        let begin = std::time::Instant::now();
        loop {
            let rows = self.audit().await;
            if rows.len() >= count || begin.elapsed() > WRITTEN_MAX {
                break rows;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The one row that a request leaves; none if it leaves none.
    async fn left_by(&self, request: RequestBuilder, is_expected: bool) -> Option<AuditRow> {
        let before = self.audit().await;
        send(request).await;
        let count = before.len() + usize::from(is_expected);
        let new: Vec<AuditRow> =
            self.audit_of(count).await.into_iter().filter(|row| !before.contains(row)).collect();
        assert!(new.len() <= 1, "{new:#?}");
        new.into_iter().next()
    }
}

/// What a way in is called in the log, by the right it takes.
fn action(right: Right) -> &'static str {
    match right {
        Right::ArtifactRead => "artifact.download",
        Right::BuildCreate | Right::BuildRead | Right::BuildCancel | Right::BuildDelete => {
            match right.as_str() {
                "build:create" => "build.create",
                "build:read" => "build.read",
                "build:cancel" => "build.cancel",
                _ => "build.delete",
            }
        }
    }
}

fn told(row: Option<&AuditRow>) -> [String; 4] {
    let row = row.expect("a row was left");
    [&row.stream, &row.action, &row.object, &row.outcome].map(Clone::clone)
}

#[tokio::test]
async fn every_refusal_leaves_exactly_one_row() {
    let server = Server::start(Mode::Tokens).await;
    let all = server.token("owner", &Right::ALL).await;
    let created = send(server.rpc("CreateBuild", &create_body()).bearer_auth(&all)).await.well();
    let id = created["build_id"].as_str().unwrap().to_owned();
    let claimed = server.claim().await;
    server.complete(&claimed, b"an image", "none").await;
    let stranger = server.token("stranger", &Right::ALL).await;
    let stranger_id = server.store.system().tokens().await.unwrap().rows[1].id.clone();
    for (way, right, is_about_a_build) in WAYS {
        let (name, action) = (way.name(), action(*right));
        // The head of a request alone tells of a build in a path, the body comes too late.
        let in_path = if name.contains("ID") { id.as_str() } else { "" };
        let about = if *is_about_a_build { id.as_str() } else { "" };

        let row = server.left_by(way.request(&server, &id, None), true).await;
        assert_eq!(told(row.as_ref()), ["", action, in_path, "unauthenticated"], "{name}");
        let row = row.unwrap();
        assert!(row.subject.is_empty() && row.peer.starts_with("127.0.0.1:"), "{row:?}");
        assert_eq!(row.request.len(), 32, "{row:?}");

        let named = way.request(&server, &id, None).header("x-tenant-id", "owner");
        let row = server.left_by(named.bearer_auth(&stranger), true).await;
        let told_of = told(row.as_ref());
        assert_eq!(told_of, ["stranger", action, in_path, "permission_denied"], "{name}");
        assert_eq!(row.unwrap().subject, stranger_id, "{name}");

        let named = way.request(&server, &id, Some("owner")).bearer_auth(&stranger);
        let row = server.left_by(named, true).await;
        assert_eq!(told(row.as_ref()), ["stranger", action, about, "permission_denied"], "{name}");

        if *is_about_a_build {
            let foreign = way.request(&server, &id, None).bearer_auth(&stranger);
            let row = server.left_by(foreign, true).await;
            assert_eq!(told(row.as_ref()), ["stranger", action, &id, "not_found"], "{name}");
        }
        let others: Vec<Right> = Right::ALL.into_iter().filter(|other| other != right).collect();
        let weak = server.token("owner", &others).await;
        let row = server.left_by(way.request(&server, &id, None).bearer_auth(weak), true).await;
        assert_eq!(told(row.as_ref()), ["owner", action, about, "permission_denied"], "{name}");
    }
    let verdict = server.store.system().verify_audit().await.unwrap();
    assert!(verdict.problems.is_empty(), "{verdict:?}");
    server.stop().await;
}

#[tokio::test]
async fn every_change_leaves_exactly_one_row_and_a_look_none() {
    let server = Server::start(Mode::Tokens).await;
    let all = server.token("owner", &Right::ALL).await;
    let token_id = server.store.system().tokens().await.unwrap().rows[0].id.clone();
    let created = send(server.rpc("CreateBuild", &create_body()).bearer_auth(&all)).await.well();
    let id = created["build_id"].as_str().unwrap().to_owned();
    let claimed = server.claim().await;
    server.complete(&claimed, b"an image", "none").await;
    // Of what waits there is something to cancel; what has ended can be had and deleted.
    let waiting = send(server.rpc("CreateBuild", &create_body()).bearer_auth(&all)).await.well();
    let waiting = waiting["build_id"].as_str().unwrap().to_owned();
    for (way, right, _) in WAYS {
        let name = way.name();
        let id = if *right == Right::BuildCancel { &waiting } else { &id };
        let changes = match right {
            Right::BuildCreate | Right::BuildCancel | Right::BuildDelete => true,
            Right::ArtifactRead => !name.ends_with(".sha256"),
            Right::BuildRead => false,
        };
        let request = way.request(&server, id, None).bearer_auth(&all);
        let row = server.left_by(request, changes).await;
        assert_eq!(row.is_some(), changes, "{name}: {row:?}");
        let Some(row) = row else { continue };
        let told = [row.stream.as_str(), &row.subject, &row.action, &row.outcome];
        assert_eq!(told, ["owner", &token_id, action(*right), "done"], "{name}");
        assert!(row.object == *id || *right == Right::BuildCreate, "{row:?}");
        assert!(row.peer.starts_with("127.0.0.1:"), "{row:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn bytes_are_written_down_and_headers_are_not() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("acme").await;
    let claimed = server.claim().await;
    server.complete(&claimed, b"an image", "none").await;
    let route = format!("GetBuildArtifact/{id}");
    let get = || server.plain(&route).header("x-tenant-id", "acme");
    let part = server.left_by(get().header("range", "bytes=2-3"), true).await.unwrap();
    assert_eq!((part.subject.as_str(), part.object), ("development", id.clone()));
    for nothing in [get().header("range", "bytes=99-"), get().header("if-none-match", "*")] {
        assert_eq!(server.left_by(nothing, false).await, None);
    }
    let head = server.request(reqwest::Method::HEAD, &format!("/{}/{route}", api::SERVICE));
    let head = || head.try_clone().unwrap().header("x-tenant-id", "acme");
    assert_eq!(server.left_by(head(), false).await, None);

    only_reads(&server.store, true).await;
    let unwritten = send(get()).await;
    assert_eq!(unwritten.status, StatusCode::SERVICE_UNAVAILABLE, "no bytes without a row");
    assert_eq!(send(head()).await.status, StatusCode::OK);
    only_reads(&server.store, false).await;
    assert_eq!(send(get()).await.body, b"an image");
    server.stop().await;
}

#[tokio::test]
async fn parts_of_an_artifact_leave_one_row_and_their_count() {
    let server = Server::start(Mode::Development).await;
    let ids = [server.create("acme").await, server.create("acme").await];
    for _ in &ids {
        let claimed = server.claim().await;
        server.complete(&claimed, b"an image", "none").await;
    }
    let before = server.audit().await;
    let get = |id: &str| {
        let request = server.plain(&format!("GetBuildArtifact/{id}"));
        request.header("x-tenant-id", "acme").header("range", "bytes=2-2")
    };
    let row = server.left_by(get(&ids[0]), true).await.unwrap();
    assert_eq!((row.action.as_str(), &row.object), ("artifact.download", &ids[0]));
    // What follows is bytes without a row: the database need not even take one.
    only_reads(&server.store, true).await;
    for _ in 0..20 {
        assert_eq!(send(get(&ids[0])).await.body, b" ");
    }
    assert_eq!(send(get(&ids[1])).await.status, StatusCode::SERVICE_UNAVAILABLE);
    only_reads(&server.store, false).await;
    // Another artifact has its own, and so has whoever takes all of it.
    assert!(server.left_by(get(&ids[1]), true).await.is_some());
    let whole = server.plain(&format!("GetBuildArtifact/{}", ids[0]));
    assert!(server.left_by(whole.header("x-tenant-id", "acme"), true).await.is_some());
    let store = server.store.clone();
    server.stop().await;
    let begin = std::time::Instant::now();
    let rows = loop {
        let rows = store.system().audit_page(&AuditFilter::default(), None).await.unwrap();
        if rows.len() > before.len() + 3 || begin.elapsed() > WRITTEN_MAX {
            break rows;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(rows.len(), before.len() + 4, "{rows:#?}");
    let last = rows.last().unwrap();
    let told = [last.stream.as_str(), &last.subject, &last.action, &last.outcome];
    assert_eq!(told, ["acme", "development", "artifact.download", "done"]);
    assert_eq!(last.object, format!("{}: parts, 20 more", ids[0]));
    assert!(last.peer.starts_with("127.0.0.1:") && last.request.len() == 32, "{last:?}");
    let verdict = store.system().verify_audit().await.unwrap();
    assert!(verdict.problems.is_empty(), "{verdict:?}");
}

#[tokio::test]
async fn a_refusal_waits_for_a_database_that_takes_no_rows_for_a_while() {
    let server = Server::start(Mode::Tokens).await;
    let before = server.audit().await.len();
    only_reads(&server.store, true).await;
    let refused = send(server.rpc("GetBuild", &json!({}))).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED);
    // The first try has failed by now.
    tokio::time::sleep(Duration::from_millis(50)).await;
    only_reads(&server.store, false).await;
    let rows = server.audit_of(before + 1).await;
    assert_eq!(told(rows.last()), ["", "build.read", "", "unauthenticated"]);
    assert_eq!(rows.len(), before + 1, "{rows:#?}");
    server.stop().await;
}

#[tokio::test]
async fn nothing_that_is_sent_gets_into_the_log() {
    const CANARY: &str = "canary-31415926";
    let server = Server::start(Mode::Tokens).await;
    let all = server.token("owner", &Right::ALL).await;
    let mut body = create_body();
    body["config"]["build_name"] = json!(CANARY);
    body["config"]["source"]["docker_image"]["auth"] =
        json!({"username": CANARY, "password": CANARY});
    let request = server.rpc("CreateBuild", &body).header("idempotency-key", CANARY);
    let created = send(request.bearer_auth(&all)).await.well();
    let id = created["build_id"].as_str().unwrap();
    let everywhere = |request: RequestBuilder| {
        request
            .header("x-tenant-id", CANARY)
            .header("x-customer-id", CANARY)
            .header("traceparent", format!("00-{CANARY}-{CANARY}-01"))
            .header("user-agent", CANARY)
    };
    let named: Value = json!({"build_id": CANARY, "tenant_id": CANARY});
    let refused = [
        server.rpc("GetBuild", &named).bearer_auth(format!("bld_{CANARY}")),
        everywhere(server.rpc("GetBuild", &named)).bearer_auth(&all),
        everywhere(server.plain(&format!("ListBuilds?tenant_id={CANARY}"))).bearer_auth(&all),
        everywhere(server.plain(&format!("GetBuildStatus/{CANARY}"))).bearer_auth(CANARY),
        server.rpc("GetBuild", &json!({"build_id": CANARY})).bearer_auth(&all),
        server.plain(&format!("GetBuildArtifact/{CANARY}")).bearer_auth(&all),
        server.rpc(CANARY, &named),
    ];
    for request in refused {
        assert!(server.left_by(request, true).await.is_some());
    }
    let cancel = json!({"build_id": id, "reason": CANARY});
    let row = server.left_by(server.rpc("CancelBuild", &cancel).bearer_auth(&all), true).await;
    assert_eq!(row.unwrap().action, "build.cancel");
    let log = format!("{:?}", server.audit().await);
    assert!(!log.contains(CANARY), "{log}");
    assert!(!log.contains(&all[4..40]), "{log}");
    server.stop().await;
}

#[tokio::test]
async fn a_page_that_rebinds_its_name_is_written_down() {
    let server = Server::start(Mode::Development).await;
    let request = server.rpc("GetBuild", &json!({})).header("host", "evil.example");
    let row = server.left_by(request, true).await;
    assert_eq!(told(row.as_ref()), ["", "build.read", "", "permission_denied"]);
    server.stop().await;
}

/// Whoever is refused again and again fills no disk, and what was left out is told.
#[tokio::test]
async fn a_flood_of_refusals_is_cut_and_counted() {
    let server = Server::start(Mode::Development).await;
    let flood = (0..150).map(|_| send(server.rpc("GetBuild", &json!({"build_id": "x"}))));
    let replies = futures_util::future::join_all(flood).await;
    assert!(replies.iter().all(|reply| reply.status == StatusCode::UNAUTHORIZED));
    let begin = std::time::Instant::now();
    let rows = loop {
        let rows = server.audit().await;
        let has_mark = rows.iter().any(|row| row.action == "audit.dropped");
        if (has_mark && rows.len() > 100) || begin.elapsed() > WRITTEN_MAX {
            break rows;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let count = |action: &str| rows.iter().filter(|row| row.action == action).count();
    // A second or two bring one back at most.
    assert!((100..=101).contains(&count("build.read")), "{}", count("build.read"));
    let marks: Vec<&AuditRow> = rows.iter().filter(|row| row.action == "audit.dropped").collect();
    assert!(!marks.is_empty(), "it is told at once that rows are left out");
    assert!(marks.iter().all(|mark| mark.subject == "service"), "{marks:?}");
    server.stop().await;
}
