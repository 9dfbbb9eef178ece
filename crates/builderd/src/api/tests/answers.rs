//! `GetBuild` about builds that have ended: as it was answered before, as long as that is true.

use buffa::Message as _;
use reqwest::{Method, StatusCode};
use serde_json::json;

use super::{Reply, Server, send};
use crate::api::Mode;
use crate::build::record::Micros;
use crate::clock::{Clock as _, WallClock};
use crate::store::Store;
use crate::store::tests::{delete_build, garble, rewrite_logs};
use crate::tenant::Right;
use api::v1;

/// A completed build of `t` that said `old`.
async fn ended(server: &Server) -> String {
    let id = server.create("t").await;
    let claimed = server.claim().await;
    server.log(&claimed, &["old"]).await;
    server.complete(&claimed, b"an image", "none").await;
    id
}

async fn get_as(server: &Server, tenant: &str, id: &str) -> Reply {
    let request = server.rpc("GetBuild", &json!({"buildId": id}));
    send(request.header("connect-protocol-version", "1").header("x-tenant-id", tenant)).await
}

async fn get(server: &Server, id: &str) -> Reply {
    get_as(server, "t", id).await
}

/// The same in the binary format.
async fn get_binary(server: &Server, id: &str) -> Reply {
    let message = v1::GetBuildRequest { build_id: id.to_owned(), ..Default::default() };
    let request = server.request(Method::POST, &format!("/{}/GetBuild", api::SERVICE));
    let request = request.header("content-type", "application/proto").header("x-tenant-id", "t");
    send(request.body(message.encode_to_vec())).await
}

fn last_line(reply: Reply) -> String {
    let build = reply.well()["build"].take();
    build["buildLogs"].as_array().unwrap().last().unwrap().as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_ended_build_is_answered_as_before_until_it_changes() {
    let server = Server::start(Mode::Development).await;
    let id = ended(&server).await;
    let (json, binary) = (get(&server, &id).await, get_binary(&server, &id).await);
    // Nobody reads this, as the build itself did not change.
    rewrite_logs(&server.store, "new").await;
    for _ in 0..3 {
        assert_eq!(get(&server, &id).await.body, json.body);
        assert_eq!(get_binary(&server, &id).await.body, binary.body);
    }
    let told = v1::GetBuildResponse::decode_from_slice(&binary.body).unwrap();
    assert_eq!(told.build.build_logs.last().unwrap(), "old");
    assert!(!told.build.rootfs_path.is_empty());
    assert_eq!(last_line(json), "old");

    // The retention takes its file.
    let before = get(&server, &id).await;
    let later = Micros(WallClock.now().0 + 1);
    assert_eq!(server.store.system().expire(later).await.unwrap(), 1);
    let told = get_binary(&server, &id).await;
    let told = v1::GetBuildResponse::decode_from_slice(&told.body).unwrap();
    assert_eq!(told.build.rootfs_path, "");
    let json = get(&server, &id).await;
    let (first, now) = (before.json()["build"].take(), json.json()["build"].take());
    assert_eq!(now.get("rootfsPath"), None);
    for what in ["rootfsSizeBytes", "rootfsChecksum", "metrics", "imageMetadata"] {
        assert!(now.get(what).is_some() && now[what] == first[what], "{what}: {now:#}");
    }
    let artifact = server.plain(&format!("GetBuildArtifact/{id}")).header("x-tenant-id", "t");
    assert_eq!(send(artifact).await.status, StatusCode::NOT_FOUND);
    assert_eq!(last_line(json), "new");
    server.stop().await;
}

#[tokio::test]
async fn what_another_node_deletes_is_gone_at_once() {
    let server = Server::start(Mode::Development).await;
    let id = ended(&server).await;
    for _ in 0..2 {
        assert_eq!(get(&server, &id).await.status, StatusCode::OK);
        assert_eq!(get_as(&server, "other", &id).await.status, StatusCode::NOT_FOUND);
    }
    let node = Store::attach_sqlite(server._directory.path()).await.unwrap();
    delete_build(&node, "t", &id).await;
    node.close().await;
    assert_eq!(get(&server, &id).await.status, StatusCode::NOT_FOUND);
    assert_eq!(get_binary(&server, &id).await.status, StatusCode::NOT_FOUND);
    server.stop().await;
}

#[tokio::test]
async fn what_is_kept_is_for_those_who_may_read() {
    let server = Server::start(Mode::Tokens).await;
    let owner = server.token("t", &Right::ALL).await;
    let blind = server.token("t", &[Right::BuildCreate]).await;
    let stranger = server.token("other", &Right::ALL).await;
    let created = send(server.rpc("CreateBuild", &super::create_body()).bearer_auth(&owner)).await;
    let id = created.well()["build_id"].as_str().unwrap().to_owned();
    let claimed = server.claim().await;
    server.complete(&claimed, b"an image", "none").await;
    let get =
        |token: &str| send(server.rpc("GetBuild", &json!({"buildId": id})).bearer_auth(token));
    for _ in 0..2 {
        assert_eq!(get(&owner).await.status, StatusCode::OK);
        assert_eq!(get(&blind).await.status, StatusCode::FORBIDDEN);
        assert_eq!(get(&stranger).await.status, StatusCode::NOT_FOUND);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_running_build_is_read_each_time() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    assert_eq!(get(&server, &id).await.well()["build"]["status"], "BUILD_STATUS_QUEUED");
    let claimed = server.claim().await;
    server.log(&claimed, &["old"]).await;
    assert_eq!(last_line(get(&server, &id).await), "old");
    rewrite_logs(&server.store, "new").await;
    assert_eq!(last_line(get(&server, &id).await), "new");
    server.complete(&claimed, b"an image", "none").await;
    assert_eq!(get(&server, &id).await.well()["build"]["status"], "BUILD_STATUS_COMPLETED");
    server.stop().await;
}

#[tokio::test]
async fn a_build_that_cannot_be_read_hides_neither_itself_nor_others() {
    let server = Server::start(Mode::Development).await;
    let (made, plain, waits) =
        (ended(&server).await, server.create("t").await, server.create("t").await);
    for id in [&made, &waits] {
        garble(&server.store, id).await;
    }
    let ask = |method: &str, body| send(server.rpc(method, &body).header("x-tenant-id", "t"));
    let list = ask("ListBuilds", json!({})).await.well();
    let states = |list: &serde_json::Value| -> Vec<(String, String)> {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let builds = list["builds"].as_array().unwrap().iter();
        builds.map(|build| (text(&build["build_id"]), text(&build["status"]))).collect()
    };
    let wanted = [
        (waits.clone(), "BUILD_STATUS_QUEUED".to_owned()),
        (plain, "BUILD_STATUS_QUEUED".to_owned()),
        (made.clone(), "BUILD_STATUS_COMPLETED".to_owned()),
    ];
    assert_eq!(states(&list), wanted);
    let page = send(server.plain("ListBuilds").header("x-tenant-id", "t")).await.well();
    assert_eq!(states(&page), wanted);
    for id in [&made, &waits] {
        let build = get(&server, id).await.well()["build"].take();
        let step = build["currentStep"].as_str().unwrap();
        assert!(step.contains("cannot be read"), "{step}");
    }
    ask("GetBuildStats", json!({})).await.well();
    send(server.plain(&format!("GetBuildLogs/{made}")).header("x-tenant-id", "t")).await.well();

    // It had one, so nobody is told that it is gone.
    let artifact = server.plain(&format!("GetBuildArtifact/{made}"));
    let artifact = send(artifact.header("x-tenant-id", "t")).await;
    assert_eq!(artifact.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(ask("CancelBuild", json!({"build_id": waits})).await.well()["success"], true);
    for id in [&made, &waits] {
        assert_eq!(ask("DeleteBuild", json!({"build_id": id})).await.well()["success"], true);
    }
    server.stop().await;
}
