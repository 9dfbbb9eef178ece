//! `StreamBuildLogs`: backlog, following, resuming, heartbeats and every kind of end.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{Server, create_body, rules, send};
use crate::api::{ApiRules, Mode, OPEN_MAX, OpenMax, new_token};
use crate::clock::{Clock as _, WallClock};
use crate::config::Origins;
use crate::store::audit::AuditRow;
use crate::store::{Outcome, TokenRow};
use crate::tenant::{Right, Tier};

/// A follower that speaks Connect's streaming JSON.
pub(super) struct Follower {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Follower {
    async fn open(server: &Server, body: Value) -> Self {
        Self::open_as("", server, body).await
    }

    async fn open_as(token: &str, server: &Server, body: Value) -> Self {
        Self::call(token, server, &format!("/{}/StreamBuildLogs", api::SERVICE), body).await
    }

    /// Of any stream that takes one message.
    pub(super) async fn call(token: &str, server: &Server, path: &str, body: Value) -> Self {
        let body = body.to_string();
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let response = server
            .request(Method::POST, path)
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1")
            .header("x-tenant-id", "t")
            .bearer_auth(token)
            .body([&[0], &length[..], body.as_bytes()].concat())
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        Self { response, buffer: Vec::new() }
    }

    /// The next frame: its flags and its message.
    pub(super) async fn frame(&mut self) -> (u8, Value) {
        let waiting = async {
            loop {
                if let Some((head, rest)) = self.buffer.split_at_checked(5) {
                    let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
                    if let Some(message) = rest.get(..length) {
                        let frame = (head[0], serde_json::from_slice(message).unwrap());
                        self.buffer.drain(..5 + length);
                        return frame;
                    }
                }
                let more = self.response.chunk().await.unwrap().expect("the stream goes on");
                self.buffer.extend_from_slice(&more);
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("a frame in time")
    }

    /// Messages until one is `last`.
    async fn until(&mut self, last: &str) -> Vec<String> {
        let mut messages = Vec::new();
        while messages.last().map(String::as_str) != Some(last) {
            let (flags, line) = self.frame().await;
            assert_eq!(flags, 0, "{messages:?} and then {line}");
            messages.push(line["message"].as_str().unwrap_or_default().to_owned());
        }
        messages
    }

    /// The end of the stream, with what comes before it.
    async fn end(&mut self) -> (Vec<Value>, Value) {
        let mut lines = Vec::new();
        loop {
            match self.frame().await {
                (2, end) => return (lines, end),
                (_, line) => lines.push(line),
            }
        }
    }
}

#[tokio::test]
async fn a_follower_gets_the_backlog_what_comes_and_the_end() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    let backlog: Vec<String> = (0..450).map(|index| format!("line {index}")).collect();
    server.log(&claimed, &backlog.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut follower = Follower::open(&server, json!({"buildId": id, "follow": true})).await;
    let seen = follower.until("line 449").await;
    assert!(seen.ends_with(&backlog), "every line of the backlog, in order");
    server.log(&claimed, &["live"]).await;
    assert_eq!(follower.until("live").await, ["live"]);
    server.complete(&claimed, b"image", "none").await;
    let (_, end) = follower.end().await;
    assert_eq!(end, json!({}), "a finished build ends the stream well");
    server.stop().await;
}

#[tokio::test]
async fn long_lines_come_whole_and_in_their_order() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    // More than a follower keeps at once.
    let line = |index: usize| format!("line {index} {}", "x".repeat(8000));
    let lines: Vec<String> = (0..50).map(line).collect();
    server.log(&claimed, &lines.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut follower = Follower::open(&server, json!({"buildId": id, "follow": true})).await;
    assert!(follower.until(&lines[49]).await.ends_with(&lines));
    let (seen, end) = Follower::open(&server, json!({ "buildId": id })).await.end().await;
    let seen: Vec<&str> = seen.iter().filter_map(|line| line["message"].as_str()).collect();
    assert!(seen.ends_with(&lines.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(end, json!({}));
    server.stop().await;
}

#[tokio::test]
async fn a_tenant_holds_only_so_many_answers_open() {
    let open_max = OpenMax { logs: 2, artifacts: 1, ..OPEN_MAX };
    let rules = ApiRules { open_max, ..rules(Mode::Development, Tier::Enterprise) };
    let server = Server::start_by(rules, Origins::NONE).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    server.log(&claimed, &["a line"]).await;
    let body = || json!({"buildId": id, "follow": true});
    let mut open =
        vec![Follower::open(&server, body()).await, Follower::open(&server, body()).await];
    let (_, end) = Follower::open(&server, body()).await.end().await;
    assert_eq!(end["error"]["code"], "resource_exhausted");
    let message = end["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("2 followed logs of this tenant"), "{message}");
    // Another tenant has places of its own.
    let stranger = server.plain(&format!("GetBuildLogs/{id}")).header("x-tenant-id", "other");
    assert_eq!(send(stranger).await.status, 404);
    // Who goes leaves a place.
    drop(open.pop());
    eventually(async || {
        let mut again = Follower::open(&server, body()).await;
        again.frame().await.0 == 0
    })
    .await;

    server.complete(&claimed, &vec![7; 64 << 20], "none").await;
    let download = || server.plain(&format!("GetBuildArtifact/{id}")).header("x-tenant-id", "t");
    // Somebody who does not read.
    let held = download().send().await.unwrap();
    assert_eq!(held.status(), 200);
    let refused = send(download()).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("retry-after"), "5");
    assert_eq!(refused.json()["error"]["code"], "RATE_LIMITED");
    drop(held);
    eventually(async || download().send().await.unwrap().status() == 200).await;
    server.stop().await;
}

/// Asks again until it is so.
async fn eventually(is_so: impl AsyncFn() -> bool) {
    let asking = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), asking).await.expect("it comes to be");
}

#[tokio::test]
async fn a_follower_that_was_cut_goes_on_where_it_was() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    server.log(&claimed, &["a", "b", "c"]).await;
    let all = Follower::open(&server, json!({ "buildId": id })).await.end().await.0;
    let offset = |line: &Value| line["offset"].as_str().map_or(0, |text| text.parse().unwrap());
    let offsets: Vec<i64> = all.iter().map(offset).collect();
    assert_eq!(offsets, (0..offsets.len() as i64).collect::<Vec<_>>());
    let next = offset(&all[all.len() - 2]) + 1;
    let (rest, end) =
        Follower::open(&server, json!({"buildId": id, "offset": next})).await.end().await;
    assert_eq!(rest.len(), 1);
    assert_eq!(rest[0]["message"], "c");
    assert_eq!((&rest[0]["level"], &rest[0]["component"]), (&json!("info"), &json!("builder")));
    assert_eq!(end, json!({}), "without follow a stream ends with the log");
    server.stop().await;
}

#[tokio::test]
async fn heartbeats_come_when_asked_for_and_only_then() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    server.log(&claimed, &["a"]).await;
    let wish = json!({"buildId": id, "follow": true, "heartbeatSecs": 1});
    let mut follower = Follower::open(&server, wish).await;
    follower.until("a").await;
    let (flags, beat) = follower.frame().await;
    assert_eq!((flags, &beat["heartbeat"]), (0, &json!(true)));
    let lease = server.store.lease(&claimed.lease);
    lease.finish(None, Outcome::Cancelled, WallClock.now()).await.unwrap();
    let (lines, end) = follower.end().await;
    assert!(lines.iter().all(|line| line["heartbeat"] == true || line.get("message").is_some()));
    assert_eq!(end, json!({}));
    server.stop().await;
}

#[tokio::test]
async fn streams_say_why_they_end_early() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    server.log(&claimed, &["a"]).await;
    let (_, end) = Follower::open(&server, json!({"buildId": "build_0"})).await.end().await;
    assert_eq!(end["error"]["code"], "not_found");
    assert_eq!(end["error"]["details"][0]["type"], "builder.v1.ErrorDetail");
    let (_, end) = Follower::open(&server, json!({"buildId": id, "offset": -1})).await.end().await;
    assert_eq!(end["error"]["code"], "invalid_argument");

    let mut follower = Follower::open(&server, json!({"buildId": id, "follow": true})).await;
    follower.until("a").await;
    server.begin_stop();
    let (_, end) = follower.end().await;
    assert_eq!(end["error"]["code"], "unavailable");
    server.stop().await;
}

/// Longest that a token may be believed here: asked anew every two seconds, and remembered for one.
const BELIEVED_MAX: Duration = Duration::from_secs(3);
/// How much later the word of it may come on a busy machine.
const SLACK: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_log_is_followed_no_longer_than_the_token_is_good() {
    let server = Server::start(Mode::Tokens).await;
    let system = server.store.system();
    let good = server.token("t", &Right::ALL).await;
    let created = send(server.rpc("CreateBuild", &create_body()).bearer_auth(&good)).await.well();
    let wish = json!({"buildId": created["build_id"], "follow": true});
    let claimed = server.claim().await;
    server.log(&claimed, &["a"]).await;
    let good_row = system.tokens().await.unwrap().rows.remove(0);
    let token = async |expires_at| {
        let (secret, id, secret_hash) = new_token();
        system
            .add_token(&TokenRow { id: id.clone(), secret_hash, expires_at, ..good_row.clone() })
            .await
            .unwrap();
        (secret, id)
    };
    let mut allowed = Follower::open_as(&good, &server, wish.clone()).await;
    allowed.until("a").await;

    // Nothing is said meanwhile.
    let (revoked, id) = token(None).await;
    let mut follower = Follower::open_as(&revoked, &server, wish.clone()).await;
    follower.until("a").await;
    assert!(system.revoke_token(&id, WallClock.now()).await.unwrap());
    let since = std::time::Instant::now();
    let (lines, end) = follower.end().await;
    assert_eq!(end["error"]["code"], "unauthenticated", "{lines:?} and then {end}");
    assert!(since.elapsed() < BELIEVED_MAX + SLACK, "it took {:?}", since.elapsed());

    // Lines come all the time.
    let expires_at = WallClock.now().plus_secs(4);
    let (expiring, _) = token(Some(expires_at)).await;
    let mut follower = Follower::open_as(&expiring, &server, wish).await;
    follower.until("a").await;
    let said = async {
        loop {
            server.log(&claimed, &["b"]).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (lines, end) = tokio::select! {
        end = follower.end() => end,
        () = said => unreachable!("it is said without end"),
    };
    let ended_at = WallClock.now();
    assert_eq!(end["error"]["code"], "unauthenticated");
    let is_cut = |row: &AuditRow| row.subject == id && row.outcome == "unauthenticated";
    assert!(server.audit().await.iter().any(is_cut), "who was cut off a moment ago is known");
    assert!(lines.iter().any(|line| line["message"] == "b"), "it read as long as it might");
    assert!(ended_at >= expires_at, "it was cut before its time");
    let latest = expires_at.plus_secs((BELIEVED_MAX + SLACK).as_secs());
    assert!(ended_at < latest, "it was believed until {ended_at:?} of {expires_at:?}");

    server.log(&claimed, &["last"]).await;
    allowed.until("last").await;
    server.complete(&claimed, b"image", "none").await;
    assert_eq!(allowed.end().await.1, json!({}), "a token that is good follows to the end");
    server.stop().await;
}

#[tokio::test]
async fn a_plain_log_is_read_page_by_page() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("t").await;
    let claimed = server.claim().await;
    server.log(&claimed, &["a", "b", "c"]).await;
    server.complete(&claimed, b"image", "none").await;
    let mut messages = Vec::new();
    let mut offset = 0;
    loop {
        let route = format!("GetBuildLogs/{id}?offset={offset}&limit=2");
        let page = super::send(server.plain(&route).header("x-tenant-id", "t")).await.well();
        assert_eq!(page["build_id"], id);
        for line in page["logs"].as_array().unwrap() {
            messages.push(line["message"].as_str().unwrap().to_owned());
        }
        offset = page["next_offset"].as_u64().unwrap();
        if page["is_end"] == true {
            break;
        }
    }
    let ours: Vec<&str> = messages.iter().map(String::as_str).filter(|m| m.len() == 1).collect();
    assert_eq!(ours, ["a", "b", "c"]);
    let route = format!("GetBuildLogs/{id}?limit=0");
    let page = super::send(server.plain(&route).header("x-tenant-id", "t")).await.well();
    assert_eq!((&page["limit"], &page["is_end"]), (&json!(100), &json!(true)));
    server.stop().await;
}
