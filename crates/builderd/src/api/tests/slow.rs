//! Callers who send the body of a request a little at a time.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Server, create_body, rules, send};
use crate::api::{ApiRules, Mode};
use crate::config::Origins;
use crate::tenant::{Right, Tier};

/// How long a body may take here.
const BODY_MAX: Duration = Duration::from_millis(500);
/// Longest that anybody trickles here.
const TRICKLE_MAX: Duration = Duration::from_secs(20);

async fn serving() -> Server {
    let rules = ApiRules { body_max: BODY_MAX, ..rules(Mode::Tokens, Tier::Enterprise) };
    Server::start_by(rules, Origins::NONE).await
}

/// Sends a head, then a byte of a body now and then; what the server says until it closes.
async fn trickle(server: &Server, head: &str) -> String {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let head = format!("{head}\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n{{");
    write.write_all(head.as_bytes()).await.unwrap();
    let sender = tokio::spawn(async move {
        // Until the server has had enough.
        while write.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut answer = Vec::new();
    let read = tokio::time::timeout(TRICKLE_MAX, async {
        let mut buffer = [0; 4096];
        // A connection that is closed while it is written to may end with an error.
        while let Ok(count @ 1..) = read.read(&mut buffer).await {
            answer.extend_from_slice(&buffer[..count]);
        }
    });
    read.await.expect("the connection is closed");
    sender.abort();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_body_that_trickles_is_answered_and_its_connection_closed() {
    let server = serving().await;
    let token = server.token("t", &Right::ALL).await;
    let post = |path: &str, headers: &str| {
        format!("POST {path} HTTP/1.1\r\nauthorization: Bearer {token}\r\n{headers}")
    };
    let json = "content-type: application/json";
    let create = format!("/{}/CreateBuild", api::SERVICE);
    let begun = Instant::now();
    let person = trickle(&server, &post(&create, json)).await;
    assert!(begun.elapsed() >= BODY_MAX);
    assert!(person.starts_with("HTTP/1.1 408 "), "{person}");
    assert!(person.contains("connection: close"), "{person}");
    assert!(person.contains("\"DEADLINE_EXCEEDED\"") && person.contains("0.5 s"), "{person}");
    let connect = format!("{json}\r\nconnect-protocol-version: 1");
    let program = trickle(&server, &post(&create, &connect)).await;
    assert!(program.starts_with("HTTP/1.1 504 "), "{program}");
    assert!(program.contains("\"deadline_exceeded\""), "{program}");
    let health = trickle(&server, &post("/grpc.health.v1.Health/Check", &connect)).await;
    assert!(health.contains("\"deadline_exceeded\""), "{health}");

    // Who sends at once is not held to it, however long the answer takes.
    send(server.rpc("CreateBuild", &create_body()).bearer_auth(&token)).await.well();
    server.stop().await;
}

/// One question to reflection in Connect's frame.
fn question(message: &str) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], message.as_bytes()].concat()
}

/// Asks reflection what `body` says; what it answers until it has had enough.
async fn reflected(server: &Server, body: reqwest::Body) -> String {
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
    let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let request = client.post(server.url(path)).header("content-type", "application/connect+json");
    let mut response = request.body(body).send().await.unwrap();
    let mut answer = String::new();
    let read = tokio::time::timeout(TRICKLE_MAX, async {
        while let Ok(Some(chunk)) = response.chunk().await {
            answer.push_str(&String::from_utf8_lossy(&chunk));
        }
    });
    read.await.expect("the stream ends");
    answer
}

#[tokio::test]
async fn reflection_ends_in_time_and_answers_no_endless_list_of_questions() {
    let server = serving().await;
    // Whoever asks and then says nothing more, but does not go.
    let list = question(r#"{"listServices":""}"#);
    let silent = stream::iter([Ok::<_, Infallible>(list)]).chain(stream::pending());
    let begun = Instant::now();
    let answer = reflected(&server, reqwest::Body::wrap_stream(silent)).await;
    assert!(answer.contains(api::SERVICE), "{answer}");
    assert!(answer.contains("deadline_exceeded"), "{answer}");
    assert!(begun.elapsed() >= BODY_MAX);

    let long = question(&format!(r#"{{"fileContainingSymbol":"{}"}}"#, "x".repeat(12 << 10)));
    let endless = stream::repeat_with(move || Ok::<_, Infallible>(long.clone()));
    let answer = reflected(&server, reqwest::Body::wrap_stream(endless)).await;
    let end = &answer[answer.len().saturating_sub(200)..];
    assert!(end.contains("length limit exceeded"), "{end}");
    server.stop().await;
}

#[tokio::test]
async fn a_log_is_followed_for_longer_than_a_body_may_take() {
    let server = serving().await;
    let token = server.token("t", &Right::ALL).await;
    let created = send(server.rpc("CreateBuild", &create_body()).bearer_auth(&token)).await.well();
    let message = serde_json::json!({"build_id": created["build_id"], "follow": true}).to_string();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend(message.as_bytes());
    let path = format!("/{}/StreamBuildLogs", api::SERVICE);
    let follow = server
        .request(reqwest::Method::POST, &path)
        .bearer_auth(&token)
        .header("content-type", "application/connect+json")
        .body(body);
    let mut following = follow.send().await.unwrap();
    tokio::time::sleep(3 * BODY_MAX).await;
    let claimed = server.claim().await;
    server.log(&claimed, &["a late line"]).await;
    server.complete(&claimed, b"an image", "none").await;
    let mut heard = String::new();
    while let Some(chunk) = following.chunk().await.unwrap() {
        heard.push_str(&String::from_utf8_lossy(&chunk));
    }
    assert!(heard.contains("a late line") && !heard.contains("error"), "{heard}");
    server.stop().await;
}
