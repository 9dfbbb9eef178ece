//! Pages in browsers: what they are told beforehand, what they may read, and that nobody gets
//! past the gate by asking beforehand.

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::json;

use super::{Reply, Server, create_body, send};
use crate::api::Mode;
use crate::config::Origins;
use crate::tenant::{Right, Tier};

const APP: &str = "https://app.example.com";
const LOCAL: &str = "http://localhost:5173";

/// What Connect, gRPC-Web and pages of our own send.
const SENT: &str = "authorization,connect-protocol-version,connect-timeout-ms,content-type,\
                    grpc-timeout,idempotency-key,if-none-match,if-range,range,traceparent,\
                    x-customer-id,x-grpc-web,x-tenant-id,x-user-agent";

async fn serving(mode: Mode, tier: Tier, origins: &[&str]) -> Server {
    let names: Vec<String> = origins.iter().map(|origin| (*origin).to_owned()).collect();
    Server::start_for(mode, tier, Origins::read(&names).unwrap()).await
}

/// What a browser asks before a page's call.
fn preflight(server: &Server, path: &str, origin: &str, method: &str) -> RequestBuilder {
    server
        .request(Method::OPTIONS, path)
        .header("origin", origin)
        .header("access-control-request-method", method)
        .header("access-control-request-headers", SENT)
}

fn rpc_path(method: &str) -> String {
    format!("/{}/{method}", api::SERVICE)
}

/// The list of words in a header of an answer.
fn words(reply: &Reply, name: &str) -> Vec<String> {
    reply.header(name).split(',').map(|word| word.trim().to_ascii_lowercase()).collect()
}

fn tells_nothing(reply: &Reply) {
    let told = reply.headers.keys().find(|name| name.as_str().starts_with("access-control-"));
    assert_eq!(told, None);
}

#[tokio::test]
async fn a_page_of_a_named_origin_is_let_in_and_reads_what_it_needs() {
    let server = serving(Mode::Tokens, Tier::Enterprise, &[APP, LOCAL]).await;
    let token = server.token("t", &Right::ALL).await;
    for origin in [APP, LOCAL] {
        let routes = [
            (rpc_path("CreateBuild"), "POST"),
            (rpc_path("GetBuild"), "GET"),
            (rpc_path("GetBuildArtifact/build_0"), "HEAD"),
            ("/grpc.health.v1.Health/Check".to_owned(), "POST"),
            ("/health".to_owned(), "GET"),
        ];
        for (path, method) in routes {
            let told = send(preflight(&server, &path, origin, method)).await;
            assert_eq!(told.status, StatusCode::OK, "{path} without a credential");
            assert_eq!(told.header("access-control-allow-origin"), origin);
            assert!(words(&told, "access-control-allow-methods").contains(&method.to_lowercase()));
            let allowed = words(&told, "access-control-allow-headers");
            let missing = SENT.split(',').find(|name| !allowed.contains(&name.to_string()));
            assert_eq!(missing, None, "{path}");
            assert_eq!(told.header("access-control-max-age"), "7200");
            assert_eq!(told.header("access-control-allow-credentials"), "");
            assert_eq!(told.header("vary"), "origin");
        }
        let list = || server.plain("ListBuilds").header("origin", origin);
        let well = send(list().bearer_auth(&token)).await;
        let refused = send(list()).await;
        let nowhere = send(server.request(Method::GET, "/nowhere").header("origin", origin)).await;
        assert_eq!((well.status, refused.status), (StatusCode::OK, StatusCode::UNAUTHORIZED));
        for reply in [&well, &refused, &nowhere] {
            assert_eq!(reply.header("access-control-allow-origin"), origin, "{}", reply.status);
            assert_eq!(reply.header("vary"), "origin");
        }
        let exposed = words(&well, "access-control-expose-headers");
        for name in ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"] {
            assert!(!well.header(name).is_empty() && exposed.contains(&name.to_owned()), "{name}");
        }
    }
    let create = server.rpc("CreateBuild", &create_body()).header("origin", APP);
    send(create.bearer_auth(&token)).await.well();
    server.stop().await;
}

#[tokio::test]
async fn a_page_reads_grpc_web_answers_and_downloads() {
    let server = serving(Mode::Development, Tier::Enterprise, &[APP]).await;
    let lost = server
        .request(Method::POST, &rpc_path("GetBuild"))
        .header("origin", APP)
        .header("content-type", "application/grpc-web+proto")
        .header("x-grpc-web", "1")
        .header("x-tenant-id", "t")
        .body(vec![0, 0, 0, 0, 0]);
    let lost = send(lost).await;
    let exposed = words(&lost, "access-control-expose-headers");
    for name in ["grpc-status", "grpc-message", "grpc-status-details-bin"] {
        assert!(exposed.contains(&name.to_owned()), "{name}");
    }
    assert_eq!(lost.header("access-control-allow-origin"), APP);

    let id = server.create("t").await;
    let claimed = server.claim().await;
    server.complete(&claimed, b"an image", "none").await;
    let part = server.plain(&format!("GetBuildArtifact/{id}")).header("x-tenant-id", "t");
    let part = send(part.header("origin", APP).header("range", "bytes=3-")).await;
    assert_eq!((part.status, &part.body[..]), (StatusCode::PARTIAL_CONTENT, &b"image"[..]));
    for name in ["etag", "content-range", "accept-ranges", "content-disposition"] {
        assert!(!part.header(name).is_empty() && exposed.contains(&name.to_owned()), "{name}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_page_of_another_origin_is_told_nothing() {
    let strangers = [
        "https://evil.example",
        "https://app.example.com.evil.example",
        "https://evil.example/https://app.example.com",
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://APP.example.com",
        "null",
    ];
    let server = serving(Mode::Development, Tier::Enterprise, &[APP]).await;
    for origin in strangers {
        let told = send(preflight(&server, &rpc_path("CreateBuild"), origin, "POST")).await;
        tells_nothing(&told);
        let health = send(server.request(Method::GET, "/health").header("origin", origin)).await;
        tells_nothing(&health);
        assert_eq!(health.header("vary"), "origin", "a cache keeps it for nobody else");
    }
    let program = send(server.request(Method::GET, "/health")).await;
    tells_nothing(&program);
    server.stop().await;

    let closed = Server::start(Mode::Development).await;
    tells_nothing(&send(preflight(&closed, "/health", APP, "GET")).await);
    let health = send(closed.request(Method::GET, "/health").header("origin", APP)).await;
    tells_nothing(&health);
    assert_eq!(health.header("vary"), "");
    closed.stop().await;
}

#[tokio::test]
async fn every_origin_may_be_let_in_but_never_with_credentials() {
    let server = serving(Mode::Tokens, Tier::Enterprise, &["*"]).await;
    let told = send(preflight(&server, &rpc_path("GetBuild"), "https://any.example", "POST")).await;
    let health = server.request(Method::GET, "/health").header("origin", "https://any.example");
    for reply in [told, send(health).await] {
        assert_eq!(reply.status, StatusCode::OK);
        assert_eq!(reply.header("access-control-allow-origin"), "*");
        assert_eq!(reply.header("access-control-allow-credentials"), "");
    }
    server.stop().await;
}

#[tokio::test]
async fn asking_beforehand_neither_counts_nor_does_anything() {
    let server = serving(Mode::Development, Tier::Free, &[APP]).await;
    let (_, burst) = Tier::Free.request_rate();
    for _ in 0..3 * burst {
        let asked = preflight(&server, &rpc_path("CreateBuild"), APP, "POST")
            .header("x-tenant-id", "t")
            .header("content-type", "application/json")
            .body(create_body().to_string());
        let told = send(asked).await;
        assert_eq!((told.status, told.body.len()), (StatusCode::OK, 0));
        assert_eq!(told.header("x-ratelimit-limit"), "");
    }
    let list = || {
        let request = server.rpc("ListBuilds", &json!({})).header("origin", APP);
        send(request.header("x-tenant-id", "t"))
    };
    let first = list().await;
    assert_eq!(first.header("x-ratelimit-remaining"), (burst - 1).to_string());
    assert_eq!(first.well()["total_count"], 0, "nothing was created");
    let mut last = list().await;
    for _ in 0..2 * burst {
        last = list().await;
    }
    assert_eq!(last.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(last.header("access-control-allow-origin"), APP, "the page learns why");
    assert!(!last.header("retry-after").is_empty());
    assert!(words(&last, "access-control-expose-headers").contains(&"retry-after".to_owned()));
    let told = send(preflight(&server, &rpc_path("ListBuilds"), APP, "POST")).await;
    assert_eq!(told.status, StatusCode::OK);
    assert_eq!(list().await.status, StatusCode::TOO_MANY_REQUESTS);
    server.stop().await;
}
