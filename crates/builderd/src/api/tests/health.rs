//! What those learn who look whether the service is well, and how often they may look.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::json;

use super::stream::Follower;
use super::{Reply, Server, rules, send};
use crate::api::{ApiRules, Mode, OPEN_MAX, OpenMax};
use crate::config::Origins;
use crate::store::tests::only_reads;
use crate::tenant::Tier;

/// Longest that a change may take to be seen.
const SEEN_MAX: Duration = Duration::from_secs(30);

async fn get(server: &Server, path: &str) -> Reply {
    send(server.request(Method::GET, path)).await
}

/// Whether `grpc.health.v1.Health` says that all is well.
async fn is_serving(server: &Server) -> bool {
    let check = server.request(Method::POST, "/grpc.health.v1.Health/Check");
    let check = check.header("content-type", "application/json").body("{}");
    let status = send(check).await.well()["status"].clone();
    assert!(status == "SERVING" || status == "NOT_SERVING", "{status}");
    status == "SERVING"
}

/// Looks until `/health` has that status.
async fn health_when(server: &Server, status: StatusCode) -> Reply {
    let begun = Instant::now();
    loop {
        let reply = get(server, "/health").await;
        if reply.status == status {
            return reply;
        }
        assert!(begun.elapsed() < SEEN_MAX, "{:?}", reply.json());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_database_that_can_only_be_read_is_no_health_until_it_is_written_again() {
    let server = Server::start(Mode::Tokens).await;
    for _ in 0..2 {
        let well = health_when(&server, StatusCode::OK).await.json();
        assert_eq!((&well["status"], well.get("reason")), (&"ok".into(), None));
        assert!(is_serving(&server).await);
        only_reads(&server.store, true).await;
        let ill = health_when(&server, StatusCode::SERVICE_UNAVAILABLE).await.json();
        assert_eq!(ill["status"], "unavailable");
        assert_eq!(ill["reason"], "database_read_only");
        assert!(!is_serving(&server).await);
        only_reads(&server.store, false).await;
    }
    health_when(&server, StatusCode::OK).await;
    server.stop().await;
}

#[tokio::test]
async fn who_watches_health_is_told_of_every_change_and_of_the_end() {
    let server = Server::start(Mode::Tokens).await;
    let path = "/grpc.health.v1.Health/Watch";
    let mut watchers = Vec::new();
    for service in ["", api::SERVICE] {
        watchers.push(Follower::call("", &server, path, json!({"service": service})).await);
    }
    let mut told = async |wanted: &str| {
        for watcher in &mut watchers {
            let (flags, message) = watcher.frame().await;
            assert_eq!((flags, message["status"].as_str()), (0, Some(wanted)));
        }
    };
    told("SERVING").await;
    for _ in 0..2 {
        only_reads(&server.store, true).await;
        told("NOT_SERVING").await;
        only_reads(&server.store, false).await;
        told("SERVING").await;
    }
    server.begin_stop();
    told("NOT_SERVING").await;
    for mut watcher in watchers {
        assert_eq!(watcher.frame().await, (2, json!({})), "the stream ends with the service");
    }
    server.stop().await;
}

#[tokio::test]
async fn an_address_has_only_so_many_calls_that_need_no_credential() {
    let open_max = OpenMax { strangers: 2, ..OPEN_MAX };
    let rules = ApiRules { open_max, ..rules(Mode::Tokens, Tier::Free) };
    let server = Server::start_by(rules, Origins::NONE).await;
    let watch = "/grpc.health.v1.Health/Watch";
    let mut watchers = Vec::new();
    for _ in 0..2 {
        let mut watcher = Follower::call("", &server, watch, json!({})).await;
        assert_eq!(watcher.frame().await.0, 0);
        watchers.push(watcher);
    }
    let check = |client: &reqwest::Client| {
        let check = client.post(server.url("/grpc.health.v1.Health/Check"));
        send(check.header("content-type", "application/json").body("{}"))
    };
    let here = reqwest::Client::builder().no_proxy().build().unwrap();
    let refused = check(&here).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.json()["code"], "resource_exhausted");
    // What else it may do it does, and others are not concerned: all of 127.0.0.0/8 is this machine.
    assert_eq!(get(&server, "/health").await.status, StatusCode::OK);
    let there = reqwest::Client::builder().no_proxy().local_address(Some([127, 0, 0, 3].into()));
    let there = there.build().unwrap();
    assert_eq!(check(&there).await.status, StatusCode::OK);
    // An answer that is read to its end is nobody's any more.
    assert_eq!(check(&there).await.status, StatusCode::OK);
    drop(watchers);
    let begun = Instant::now();
    while check(&here).await.status != StatusCode::OK {
        assert!(begun.elapsed() < SEEN_MAX);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for _ in 0..5 {
        assert_eq!(check(&here).await.status, StatusCode::OK);
    }
    server.stop().await;
}

#[tokio::test]
async fn who_polls_figures_takes_nothing_from_who_looks_at_health() {
    // One look comes back in a second: no machine is too slow to use ten up.
    let rules = ApiRules { looks_per_sec: 1, ..rules(Mode::Tokens, Tier::Free) };
    let server = Server::start_by(rules, Origins::NONE).await;
    let mut refused = get(&server, "/stats").await;
    let begun = Instant::now();
    while refused.status == StatusCode::OK && begun.elapsed() < SEEN_MAX {
        refused = get(&server, "/stats").await;
    }
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.header("x-ratelimit-limit"), "1");
    for _ in 0..10 {
        assert_eq!(get(&server, "/health").await.status, StatusCode::OK);
    }
    for _ in 0..50 {
        assert_eq!(get(&server, "/metrics").await.status, StatusCode::OK);
    }
    // Another address: the whole of 127.0.0.0/8 is this machine.
    let other = reqwest::Client::builder().local_address(Some([127, 0, 0, 2].into()));
    let other = other.no_proxy().build().unwrap();
    assert_eq!(send(other.get(server.url("/stats"))).await.status, StatusCode::OK);
    server.stop().await;
}
