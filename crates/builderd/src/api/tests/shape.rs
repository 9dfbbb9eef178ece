//! What a request is refused for before it is a message: words and values that are none, and what
//! is no text.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{Server, create_body, send};
use crate::api::Mode;

#[tokio::test]
async fn words_that_an_enum_has_not_are_refused_by_name() {
    let server = Server::start(Mode::Development).await;
    server.create("t").await;
    let call =
        |method: &str, body: &Value| send(server.rpc(method, body).header("x-tenant-id", "t"));
    let list = json!({"state_filter": ["BUILD_STATE_PENDING", "BUILD_STATE_QEUED"]});
    let with = |path: &str, name: &str, word: &str| {
        let mut body = create_body();
        body.pointer_mut(path).unwrap()[name] = json!(word);
        body
    };
    let mut tier = create_body();
    tier["config"]["tenant"] = json!({"tier": "TENANT_TIER_GOLD"});
    let policy = with("/config/source/docker_image", "pull_policy", "PULL_POLICY_OFTEN");
    let init = with("/config/target/microvm_rootfs", "initStrategy", "INIT_STRATEGY_OF_TOMORROW");
    for (method, body, field, word, known) in [
        ("ListBuilds", list, "state_filter", "BUILD_STATE_QEUED", "BUILD_STATE_PENDING"),
        ("CreateBuild", tier, "config.tenant.tier", "TENANT_TIER_GOLD", "TENANT_TIER_FREE"),
        (
            "CreateBuild",
            policy,
            "config.source.docker_image.pull_policy",
            "PULL_POLICY_OFTEN",
            "PULL_POLICY_MISSING",
        ),
        (
            "CreateBuild",
            init,
            "config.target.microvm_rootfs.init_strategy",
            "INIT_STRATEGY_OF_TOMORROW",
            "INIT_STRATEGY_DIRECT_EXEC",
        ),
    ] {
        let reply = call(method, &body).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{field}");
        let reply = reply.json();
        assert_eq!(reply["code"], "invalid_argument", "{field}");
        let message = reply["message"].as_str().unwrap();
        assert!(message.starts_with(&format!("{field}: \"{word}\" is none of ")), "{message}");
        assert!(message.contains(known), "{message}");
        assert_eq!(reply["error"]["message"], message, "people read it as documented, too");
    }
    let reply = send(server.plain("ListBuilds?status=sleeping").header("x-tenant-id", "t")).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    let error = &reply.json()["error"];
    assert_eq!(error["code"], "INVALID_ARGUMENT");
    let message = error["message"].as_str().unwrap();
    assert!(message.starts_with("status: \"sleeping\" is none of "), "{message}");
    assert!(message.contains("BUILD_STATUS_RUNNING") && message.contains("running"), "{message}");
    let all = call("ListBuilds", &json!({})).await.well();
    assert_eq!(all["total_count"], 1, "nothing else was accepted");
    server.stop().await;
}

#[tokio::test]
async fn a_message_in_json_is_an_object_and_nothing_else() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let framed = |body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[0], &length[..], body].concat()
    };
    for body in ["[]", "[\"t\"]", "\"\"", "1", "true", "null"] {
        let ask = server.rpc("ListBuilds", &json!({})).header("x-tenant-id", "t");
        let reply = send(ask.body(body)).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(reply.json()["code"], "invalid_argument", "{body}");
        assert_eq!(reply.json()["error"]["code"], "INVALID_ARGUMENT", "{body}");
        let query = format!("ListBuilds?connect=v1&encoding=json&message={body}");
        let reply = send(server.plain(&query).header("x-tenant-id", "t")).await;
        assert_eq!(reply.json()["code"], "invalid_argument", "{body}");
        let path = format!("/{}/StreamBuildLogs", api::SERVICE);
        let stream = server.request(Method::POST, &path).header("x-tenant-id", "t");
        let stream = stream.header("content-type", "application/connect+json");
        let end = send(stream.body(framed(body.as_bytes()))).await.body;
        let end = String::from_utf8_lossy(&end).into_owned();
        assert!(end.contains("invalid_argument") && end.contains("message: is "), "{end}");
    }
    let inside = json!({"config": {"source": {"docker_image": ["nginx"]}}});
    let reply = send(server.rpc("CreateBuild", &inside).header("x-tenant-id", "t")).await;
    let message = reply.json()["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("config.source.docker_image: is a list"), "{message}");
    let get = json!({"build_id": id});
    send(server.rpc("GetBuild", &get).header("x-tenant-id", "t")).await.well();
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_text_is_answered_as_documented() {
    let server = Server::start(Mode::Development).await;
    for route in ["GetBuildStatus/%ff", "GetBuildLogs/%ff", "GetBuildArtifact/%ff.sha256"] {
        for method in [Method::GET, Method::HEAD] {
            let path = format!("/{}/{route}", api::SERVICE);
            let request = server.request(method.clone(), &path).header("x-tenant-id", "t");
            let reply = send(request).await;
            assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{route}");
            assert_eq!(reply.header("content-type"), "application/json", "{route}");
            if method == Method::GET {
                let error = &reply.json()["error"];
                assert_eq!(error["code"], "INVALID_ARGUMENT", "{route}");
                assert!(error["message"].as_str().unwrap().contains("UTF-8"), "{error}");
            }
        }
    }
    for route in [
        "ListBuilds?status=%ff",
        "ListBuilds?tenant_id=%ff",
        "ListBuilds?limit=%ff",
        "GetBuildLogs/build_0?offset=%ff",
        "GetBuildStatus%ff/x",
    ] {
        let reply = send(server.plain(route)).await;
        assert!(reply.status.is_client_error(), "{route}");
        assert!(reply.json()["error"]["code"].is_string(), "{route}: {:?}", reply.json());
    }
    server.stop().await;
}
