//! Every RPC and every route against every kind of caller. What has no row here fails the test.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use super::{Server, create_body, send};
use crate::api::Mode;
use crate::tenant::Right;

/// How a way in names the build it is about.
pub(super) enum Way {
    /// An RPC with this body, `ID` standing for the build.
    Rpc(&'static str, &'static str),
    /// A plain route.
    Route(&'static str),
}

use Way::{Route, Rpc};

/// Each way in, the right it takes, and whether it is about one build.
pub(super) const WAYS: &[(Way, Right, bool)] = &[
    (Rpc("CreateBuild", ""), Right::BuildCreate, false),
    (Rpc("GetBuild", r#"{"build_id":"ID"}"#), Right::BuildRead, true),
    (Rpc("ListBuilds", "{}"), Right::BuildRead, false),
    (Rpc("StreamBuildLogs", r#"{"build_id":"ID"}"#), Right::BuildRead, true),
    (Rpc("GetTenantQuotas", "{}"), Right::BuildRead, false),
    (Rpc("GetBuildStats", "{}"), Right::BuildRead, false),
    (Route("GetBuildStatus/ID"), Right::BuildRead, true),
    (Route("GetBuildLogs/ID"), Right::BuildRead, true),
    (Route("ListBuilds"), Right::BuildRead, false),
    (Route("GetBuildArtifact/ID"), Right::ArtifactRead, true),
    (Route("GetBuildArtifact/ID.sha256"), Right::ArtifactRead, true),
    (Rpc("CancelBuild", r#"{"build_id":"ID"}"#), Right::BuildCancel, true),
    (Rpc("DeleteBuild", r#"{"build_id":"ID"}"#), Right::BuildDelete, true),
];

/// What anybody may see.
const OPEN: &[&str] = &["/health", "/stats", "/metrics"];

impl Way {
    pub(super) fn name(&self) -> String {
        match self {
            Rpc(name, _) => format!("rpc {name}"),
            Route(route) => format!("route {route}"),
        }
    }

    pub(super) fn request(
        &self,
        server: &Server,
        id: &str,
        tenant: Option<&str>,
    ) -> RequestBuilder {
        match self {
            Rpc("StreamBuildLogs", body) => {
                let body = named(body, id, tenant).to_string();
                let length = u32::try_from(body.len()).unwrap().to_be_bytes();
                let framed = [&[0], &length[..], body.as_bytes()].concat();
                server
                    .request(Method::POST, &format!("/{}/StreamBuildLogs", api::SERVICE))
                    .header("content-type", "application/connect+json")
                    .body(framed)
            }
            Rpc(name, body) => server.rpc(name, &named(body, id, tenant)),
            Route(route) => {
                let query = tenant.map(|tenant| format!("?tenant_id={tenant}"));
                server.plain(&format!("{}{}", route.replace("ID", id), query.unwrap_or_default()))
            }
        }
    }
}

fn named(body: &str, id: &str, tenant: Option<&str>) -> Value {
    if body.is_empty() {
        let mut body = create_body();
        if let Some(tenant) = tenant {
            body["config"]["tenant"] = json!({"tenant_id": tenant});
        }
        return body;
    }
    let mut body: Value = serde_json::from_str(&body.replace("ID", id)).unwrap();
    if let Some(tenant) = tenant {
        body["tenant_id"] = json!(tenant);
    }
    body
}

/// What an answer means, whatever its form: a stream says it at its end.
async fn meaning(request: RequestBuilder) -> (String, String) {
    let reply = send(request).await;
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    let is_stream = reply.header("content-type").starts_with("application/connect+");
    let codes = ["unauthenticated", "permission_denied", "not_found"];
    let in_stream = codes.into_iter().find(|code| text.contains(&format!("\"{code}\"")));
    let word = match (reply.status, in_stream.filter(|_| is_stream)) {
        (_, Some(code)) => code,
        (StatusCode::OK, None) => "ok",
        (StatusCode::UNAUTHORIZED, None) => {
            assert_eq!(reply.header("www-authenticate"), "Bearer", "of what kind: {text}");
            "unauthenticated"
        }
        (StatusCode::FORBIDDEN, None) => "permission_denied",
        (StatusCode::NOT_FOUND, None) => "not_found",
        (status, None) => panic!("{status}: {text}"),
    };
    (word.to_owned(), text)
}

#[tokio::test]
async fn every_way_in_lets_in_whom_it_should_and_nobody_else() {
    let server = Server::start(Mode::Tokens).await;
    let all = server.token("owner", &Right::ALL).await;
    let created = send(server.rpc("CreateBuild", &create_body()).bearer_auth(&all)).await.well();
    let id = created["build_id"].as_str().unwrap().to_owned();
    let claimed = server.claim().await;
    server.log(&claimed, &["a line of the owner"]).await;
    server.complete(&claimed, b"an image", "none").await;
    let stranger = server.token("stranger", &Right::ALL).await;

    for (way, right, is_about_a_build) in WAYS {
        let name = way.name();
        let (word, _) = meaning(way.request(&server, &id, None)).await;
        assert_eq!(word, "unauthenticated", "{name} without a credential");

        let invented = format!("bld_{}", "0".repeat(72));
        let (word, _) = meaning(way.request(&server, &id, None).bearer_auth(invented)).await;
        assert_eq!(word, "unauthenticated", "{name} with an invented token");

        let (word, text) = meaning(way.request(&server, &id, None).bearer_auth(&stranger)).await;
        let expected = if *is_about_a_build { "not_found" } else { "ok" };
        assert_eq!(word, expected, "{name} with another tenant's token");
        assert!(word != "ok" || !text.contains(&id), "{name} shows a stranger the build");
        assert!(!text.contains("owner"), "{name} names the owner to a stranger: {text}");

        let named = way.request(&server, &id, Some("owner")).bearer_auth(&stranger);
        let (word, _) = meaning(named).await;
        assert_eq!(word, "permission_denied", "{name} in another's name");
        let named = way.request(&server, &id, None).header("x-tenant-id", "owner");
        let (word, _) = meaning(named.bearer_auth(&stranger)).await;
        assert_eq!(word, "permission_denied", "{name} in another's name, by header");

        let others: Vec<Right> = Right::ALL.into_iter().filter(|other| other != right).collect();
        let weak = server.token("owner", &others).await;
        let (word, _) = meaning(way.request(&server, &id, None).bearer_auth(weak)).await;
        assert_eq!(word, "permission_denied", "{name} without {}", right.as_str());
    }
    for (way, right, _) in WAYS {
        let just = server.token("owner", &[*right]).await;
        let request = way.request(&server, &id, Some("owner")).header("x-tenant-id", "owner");
        let (word, text) = meaning(request.bearer_auth(just)).await;
        assert_eq!(word, "ok", "{} with its right: {text}", way.name());
    }
    for path in OPEN {
        assert_eq!(send(server.request(Method::GET, path)).await.status, StatusCode::OK, "{path}");
    }
    server.stop().await;
}

/// What takes a second right, because of what it does or tells beside what it is asked for.
#[tokio::test]
async fn nobody_stops_a_build_without_the_right_to_cancel() {
    let server = Server::start(Mode::Tokens).await;
    let all = server.token("owner", &Right::ALL).await;
    let others = Right::ALL.into_iter().filter(|right| *right != Right::BuildCancel);
    let weak = server.token("owner", &others.collect::<Vec<_>>()).await;
    let both = server.token("owner", &[Right::BuildDelete, Right::BuildCancel]).await;
    for is_running in [false, true] {
        let created = send(server.rpc("CreateBuild", &create_body()).bearer_auth(&all)).await;
        let id = created.well()["build_id"].as_str().unwrap().to_owned();
        let claimed = if is_running { Some(server.claim().await) } else { None };
        let force = json!({"build_id": id, "force": true});
        let delete = |token: &str| server.rpc("DeleteBuild", &force).bearer_auth(token);
        let (word, text) = meaning(delete(&weak)).await;
        assert_eq!(word, "permission_denied");
        assert!(text.contains("build:cancel"), "{text}");
        let get = server.rpc("GetBuild", &json!({"build_id": id})).bearer_auth(&all);
        let state = send(get).await.well()["build"]["status"].clone();
        let expected = if is_running { "BUILD_STATUS_RUNNING" } else { "BUILD_STATUS_QUEUED" };
        assert_eq!(state, expected, "it goes on");
        let Some(claimed) = claimed else {
            assert_eq!(meaning(delete(&both)).await.0, "ok");
            continue;
        };
        server.complete(&claimed, b"an image", "none").await;
        assert_eq!(meaning(delete(&weak)).await.0, "ok", "there is nothing to stop");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_key_of_another_caller_tells_nothing_of_its_build() {
    let server = Server::start(Mode::Tokens).await;
    let creator = server.token("owner", &[Right::BuildCreate]).await;
    let create = |token: &str, body: &Value| {
        let request = server.rpc("CreateBuild", body).bearer_auth(token);
        send(request.header("idempotency-key", "guessed"))
    };
    let id = create(&creator, &create_body()).await.well()["build_id"].clone();
    let again = create(&creator, &create_body()).await.well();
    assert_eq!(again["build_id"], id, "whoever created it may lose the answer");

    let others = Right::ALL.into_iter().filter(|right| *right != Right::BuildRead);
    let weak = server.token("owner", &others.collect::<Vec<_>>()).await;
    let same = create(&weak, &create_body()).await;
    assert_eq!(same.status, StatusCode::CONFLICT);
    assert_eq!(same.json()["code"], "already_exists");
    let mut other = create_body();
    other["config"]["build_name"] = json!("another");
    let other = create(&weak, &other).await;
    assert_eq!((other.status, &other.body), (same.status, &same.body), "nor what was asked for");
    assert!(!String::from_utf8_lossy(&same.body).contains(id.as_str().unwrap()));

    let reader = server.token("owner", &[Right::BuildCreate, Right::BuildRead]).await;
    assert_eq!(create(&reader, &create_body()).await.well()["build_id"], id);
    server.stop().await;
}

#[test]
fn every_way_in_has_a_row() {
    let rows = |wanted: fn(&Way) -> Option<&'static str>| -> BTreeSet<&str> {
        WAYS.iter().filter_map(|(way, _, _)| wanted(way)).collect()
    };
    let rpcs = rows(|way| match way {
        Rpc(name, _) => Some(name),
        Route(_) => None,
    });
    assert_eq!(rpcs, api::METHODS.iter().map(|method| method.name).collect());

    let routes = rows(|way| match way {
        Rpc(..) => None,
        Route(route) => Some(route.split('/').next().unwrap()),
    });
    let source = include_str!("../mod.rs");
    let mut written = BTreeSet::new();
    let mut open = BTreeSet::new();
    for route in source.split(".route(").skip(1) {
        let path = route.split('"').nth(1).unwrap();
        match route.trim_start().starts_with("&at(") {
            true => written.insert(path.split('/').next().unwrap()),
            false => open.insert(path),
        };
    }
    assert!(written.remove("{method}"));
    assert_eq!(routes, written);
    open.retain(|path| !path.starts_with("/grpc."));
    assert_eq!(open, OPEN.iter().copied().collect());
}

#[tokio::test]
async fn tokens_that_are_over_are_refused_like_unknown_ones() {
    let server = Server::start(Mode::Tokens).await;
    let list = |token: &str| send(server.plain("ListBuilds").bearer_auth(token));
    let unknown = list(&crate::api::new_token().0).await;
    assert_eq!(unknown.status, StatusCode::UNAUTHORIZED);

    let token = server.token("a", &Right::ALL).await;
    assert_eq!(list(&token).await.status, StatusCode::OK);
    let system = server.store.system();
    let row = system.tokens().await.unwrap().rows.remove(0);
    assert!(system.revoke_token(&row.id, crate::build::record::Micros(1)).await.unwrap());
    // It may be remembered for so long.
    tokio::time::sleep(Duration::from_secs(crate::api::REMEMBERED_SECS)).await;
    let revoked = list(&token).await;
    assert_eq!((revoked.status, &revoked.body), (unknown.status, &unknown.body));

    let (secret, id, secret_hash) = crate::api::new_token();
    let expires_at = Some(crate::build::record::Micros(1));
    let row = crate::store::TokenRow { id, secret_hash, expires_at, revoked_at: None, ..row };
    system.add_token(&row).await.unwrap();
    let expired = list(&secret).await;
    assert_eq!((expired.status, &expired.body), (unknown.status, &unknown.body));
    server.stop().await;
}

#[tokio::test]
async fn whoever_keeps_guessing_must_wait() {
    let server = Server::start(Mode::Tokens).await;
    let good = server.token("a", &Right::ALL).await;
    let mut last = StatusCode::OK;
    for _ in 0..60 {
        last = send(server.plain("ListBuilds").bearer_auth("bld_guess")).await.status;
    }
    assert_eq!(last, StatusCode::TOO_MANY_REQUESTS);
    let reply = send(server.plain("ListBuilds").bearer_auth(good)).await;
    assert_eq!(reply.status, StatusCode::OK, "the owner of a token is not shut out by guesses");
    server.stop().await;
}

/// What an order says of its sender, and the context that the build shows to whoever reads it.
async fn context(server: &Server, token: &str, tenant: Value) -> Value {
    let mut body = create_body();
    body["config"]["tenant"] = tenant;
    let created = send(server.rpc("CreateBuild", &body).bearer_auth(token)).await.well();
    let reader = server.token("acme", &[Right::BuildRead]).await;
    let asked = json!({"build_id": created["build_id"]});
    let shown = send(server.rpc("GetBuild", &asked).bearer_auth(&reader)).await.well();
    assert_eq!(created["tenant_context"], shown["build"]["tenant_context"]);
    shown["build"]["tenant_context"].clone()
}

#[tokio::test]
async fn a_build_shows_what_the_credential_said_that_asked_for_it_and_not_what_the_body_did() {
    let server = Server::start(Mode::Tokens).await;
    let rights = [Right::BuildCreate, Right::ArtifactRead];
    let token = server.token_of("acme", Some("acme-group"), &rights).await;
    let shown = context(&server, &token, json!({"permissions": ["build:delete"]})).await;
    assert_eq!(shown["organization_id"], "acme-group");
    assert_eq!(shown["permissions"], json!(["build:create", "artifact:read"]));
    let same = context(&server, &token, json!({"organization_id": "acme-group"})).await;
    assert_eq!(same, shown);
    let mut other = create_body();
    other["config"]["tenant"] = json!({"organization_id": "other-group"});
    let (word, text) = meaning(server.rpc("CreateBuild", &other).bearer_auth(&token)).await;
    assert!(word == "permission_denied" && text.contains("organization"), "{word}: {text}");
    // Of one that names none nobody learns of any.
    let token = server.token("acme", &rights).await;
    let shown = context(&server, &token, json!({"organization_id": "acme-group"})).await;
    assert!(shown["organization_id"].as_str().unwrap_or_default().is_empty(), "{shown}");
    server.stop().await;
}
