//! DeleteBuild with force: a running build is told to stop, and waited for, but not for ever.

use reqwest::StatusCode;
use serde_json::json;

use super::{Reply, Server, send};
use crate::api::Mode;
use crate::build::state::BuildState;
use crate::clock::{Clock as _, WallClock};
use crate::store::{Claimed, Heartbeat, Outcome};

async fn delete(server: &Server, id: &str, force: bool) -> Reply {
    let request = server.rpc("DeleteBuild", &json!({"build_id": id, "force": force}));
    send(request.header("x-tenant-id", "t")).await
}

/// The worker says that it lives; the reason if it is told to stop.
async fn told_to_stop(server: &Server, claimed: &Claimed) -> Option<String> {
    match server.store.lease(&claimed.lease).heartbeat(60, None, WallClock.now()).await.unwrap() {
        Heartbeat::Cancel { reason } => Some(reason),
        Heartbeat::GoOn => None,
        Heartbeat::Lost => panic!("nobody took the lease"),
    }
}

async fn stop_working(server: &Server, claimed: &Claimed) {
    let lease = server.store.lease(&claimed.lease);
    let written = lease.finish(None, Outcome::Cancelled, WallClock.now()).await.unwrap();
    assert_eq!(written, Some(BuildState::Cancelled));
}

#[tokio::test]
async fn a_build_that_does_not_stop_is_not_waited_for_for_ever() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    let refused = delete(&server, &id, false).await.json();
    assert_eq!(refused["code"], "failed_precondition");
    assert_eq!(told_to_stop(&server, &claimed).await, None, "it was not forced");

    let late = delete(&server, &id, true).await;
    assert_eq!(late.status, StatusCode::GATEWAY_TIMEOUT);
    let late = late.json();
    assert_eq!(late["code"], "deadline_exceeded");
    assert_eq!(late["error"]["code"], "DEADLINE_EXCEEDED");
    let message = late["message"].as_str().unwrap();
    assert!(message.contains("for 1 s") && message.contains("delete it again"), "{message}");
    assert_eq!(told_to_stop(&server, &claimed).await.as_deref(), Some("deleted"), "it stays told");

    stop_working(&server, &claimed).await;
    delete(&server, &id, true).await.well();
    assert_eq!(delete(&server, &id, true).await.status, StatusCode::NOT_FOUND);
    server.stop().await;
}

#[tokio::test]
async fn a_build_that_stops_is_deleted_at_once() {
    let server = Server::start(Mode::Development).await;
    let running = server.create("t").await;
    let claimed = server.claim().await;
    let worker = async {
        let mut changes = server.store.system().changes();
        while told_to_stop(&server, &claimed).await.is_none() {
            changes.wait(super::DRAIN).await;
        }
        stop_working(&server, &claimed).await;
    };
    let (deleted, ()) = tokio::join!(delete(&server, &running, true), worker);
    deleted.well();
    let queued = server.create("t").await;
    delete(&server, &queued, true).await.well();
    server.stop().await;
}
