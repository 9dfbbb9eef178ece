//! What a request may not bring: too much of anything, and keys that are none.

use reqwest::StatusCode;
use reqwest::header::HeaderValue;
use serde_json::json;

use super::{Reply, Server, create_body, send};
use crate::api::Mode;

/// The field that an answer finds wrong.
fn wrong(reply: &Reply) -> String {
    assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{:?}", reply.json());
    let message = reply.json()["message"].as_str().unwrap().to_owned();
    message.split(": ").next().unwrap().to_owned()
}

#[tokio::test]
async fn a_config_of_mebibytes_is_refused_by_name() {
    let server = Server::start(Mode::Development).await;
    let mut body = create_body();
    body["config"]["tenant"] = json!({"metadata": {"a": "x".repeat(3 << 20)}});
    let reply = send(server.rpc("CreateBuild", &body).header("x-tenant-id", "t")).await;
    assert_eq!(wrong(&reply), "config");
    let list = send(server.plain("ListBuilds").header("x-tenant-id", "t")).await.well();
    assert_eq!(list["total_count"], 0);
    server.stop().await;
}

#[tokio::test]
async fn the_reason_of_a_cancel_and_the_names_of_who_asks_have_an_end() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let body = json!({"build_id": id, "reason": "x".repeat(3 << 20)});
    let reply = send(server.rpc("CancelBuild", &body).header("x-tenant-id", "t")).await;
    assert_eq!(wrong(&reply), "reason");
    let request = server.rpc("CreateBuild", &create_body()).header("x-tenant-id", "t");
    let reply = send(request.header("x-customer-id", "x".repeat(257))).await;
    assert!(wrong(&reply).contains("customer"));
    let mut body = create_body();
    body["config"]["tenant"] = json!({"organization_id": "x".repeat(257)});
    let reply = send(server.rpc("CreateBuild", &body).header("x-tenant-id", "t")).await;
    assert!(wrong(&reply).contains("organization"));
    server.stop().await;
}

#[tokio::test]
async fn the_header_of_a_key_is_held_to_what_the_field_is_held_to() {
    let server = Server::start(Mode::Development).await;
    let create = |key: &[u8]| {
        let request = server.rpc("CreateBuild", &create_body()).header("x-tenant-id", "t");
        send(request.header("idempotency-key", HeaderValue::from_bytes(key).unwrap()))
    };
    let id = |reply: Reply| reply.well()["build_id"].clone();
    let (first, second) = (id(create(b"").await), id(create(b"").await));
    assert_ne!(first, second, "an empty key is none");
    let longest = [b'k'; 256];
    let (first, second) = (id(create(&longest).await), id(create(&longest).await));
    assert_eq!(first, second);
    assert_eq!(wrong(&create(&[b'k'; 257]).await), "Idempotency-Key");
    assert_eq!(wrong(&create("schlüssel".as_bytes()).await), "Idempotency-Key");
    server.stop().await;
}

#[tokio::test]
async fn a_long_path_is_not_told_again_in_whole() {
    let server = Server::start(Mode::Development).await;
    let path = format!("/{}", "x".repeat(10_000));
    let reply = send(server.request(reqwest::Method::GET, &path)).await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND);
    assert!(reply.body.len() < 1000, "{} bytes", reply.body.len());
    server.stop().await;
}
