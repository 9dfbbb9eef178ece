//! Who may talk to development mode: whoever means this machine, and no page that only got here
//! by another name.

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::json;

use super::{Reply, Server, create_body, send};
use crate::api::Mode;
use crate::config::Origins;
use crate::tenant::Tier;

const APP: &str = "https://app.example.com";

async fn development() -> Server {
    let origins = Origins::read(&[APP.to_owned()]).unwrap();
    Server::start_for(Mode::Development, Tier::Enterprise, origins).await
}

fn create(server: &Server) -> RequestBuilder {
    server.rpc("CreateBuild", &create_body()).header("x-tenant-id", "t")
}

async fn builds(server: &Server) -> u64 {
    let list = send(server.plain("ListBuilds").header("x-tenant-id", "t")).await.well();
    list["total_count"].as_u64().unwrap()
}

/// Refused, by name, with what to do.
fn refused(reply: &Reply, name: &str) {
    assert_eq!(reply.status, StatusCode::FORBIDDEN, "{name}");
    let text = String::from_utf8_lossy(&reply.body);
    assert!(text.contains(name) && text.contains("--dev"), "{text}");
    assert!(text.contains("localhost") && text.contains("without"), "{text}");
}

#[tokio::test]
async fn a_page_that_rebinds_its_name_to_this_machine_is_refused() {
    let server = development().await;
    let port = server.address.port();
    for host in ["evil.example".to_owned(), format!("evil.example:{port}"), "0.0.0.0".into()] {
        refused(&send(create(&server).header("host", &host)).await, &host);
        for path in ["/health", "/metrics", "/nowhere"] {
            refused(&send(server.request(Method::GET, path).header("host", &host)).await, &host);
        }
    }
    assert_eq!(builds(&server).await, 0);
    for host in [format!("localhost:{port}"), "LOCALHOST".into(), "127.1.2.3".into()] {
        send(create(&server).header("host", host)).await.well();
    }
    send(create(&server).header("host", format!("[::1]:{port}"))).await.well();
    assert_eq!(builds(&server).await, 4);
    server.stop().await;
}

#[tokio::test]
async fn the_authority_of_http2_is_a_host() {
    let server = development().await;
    let evil = Client::builder()
        .http2_prior_knowledge()
        .no_proxy()
        .resolve("evil.example", server.address)
        .resolve("localhost", server.address)
        .build()
        .unwrap();
    let port = server.address.port();
    let check = |host: &str| {
        let url = format!("http://{host}:{port}/grpc.health.v1.Health/Check");
        evil.post(url).header("content-type", "application/json").body("{}")
    };
    refused(&send(check("evil.example")).await, "evil.example");
    send(check("localhost")).await.well();
    server.stop().await;
}

#[tokio::test]
async fn a_page_of_another_origin_is_refused_and_a_named_one_is_not() {
    let server = development().await;
    for origin in ["https://evil.example", "null", "http://localhost.evil.example", "file://"] {
        let reply = send(create(&server).header("origin", origin)).await;
        refused(&reply, "UNKEY_BUILDERD_CORS_ALLOWED_ORIGINS");
        assert_eq!(reply.json()["code"], "permission_denied");
        let plain = server.plain("ListBuilds").header("x-tenant-id", "t");
        let reply = send(plain.header("origin", origin)).await;
        refused(&reply, origin);
        assert_eq!(reply.json()["error"]["code"], "PERMISSION_DENIED");
    }
    assert_eq!(builds(&server).await, 0);
    for origin in [APP, "http://localhost:5173", "http://127.0.0.1", "https://[::1]:8443"] {
        send(create(&server).header("origin", origin)).await.well();
    }
    assert_eq!(builds(&server).await, 4);
    server.stop().await;
}

#[tokio::test]
async fn with_tokens_any_name_is_the_services() {
    let server = Server::start(Mode::Tokens).await;
    let token = server.token("t", &crate::tenant::Right::ALL).await;
    let list = server.rpc("ListBuilds", &json!({})).bearer_auth(token);
    let list = list.header("host", "builds.example.com").header("origin", "https://evil.example");
    send(list).await.well();
    server.stop().await;
}
