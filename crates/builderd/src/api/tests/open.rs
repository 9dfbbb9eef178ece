//! Who opens more than it may: connections that say nothing, answers that nobody reads, bodies that
//! come at once.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::{Server, rules, send};
use crate::api::{ApiRules, Crowd, Mode, OPEN_MAX, OpenMax};
use crate::config::Origins;
use crate::tenant::Tier;

/// Longest that anything takes here.
const SOON: Duration = Duration::from_secs(20);

async fn serving(open_max: OpenMax) -> Server {
    let rules = ApiRules { open_max, ..rules(Mode::Development, Tier::Enterprise) };
    Server::start_by(rules, Origins::NONE).await
}

/// A connection whose kernel keeps little of what comes.
async fn narrow(server: &Server) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(server.address).await.unwrap()
}

/// Asks for the log of a build and reads the first bytes of the answer.
async fn ask_and_stop_reading(server: &Server, id: &str) -> TcpStream {
    let mut stream = narrow(server).await;
    let path = format!("/{}/GetBuildLogs/{id}?limit=1000", api::SERVICE);
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nx-tenant-id: t\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    stream
}

/// A build of `t` with a log of 7 MB, which no socket keeps.
async fn long_log(server: &Server) -> String {
    let id = server.create("t").await;
    let claimed = server.claim().await;
    let line = "x".repeat(7000);
    server.log(&claimed, &vec![line.as_str(); 1000]).await;
    id
}

async fn status(server: &Server, tenant: &str, id: &str, limit: u32) -> StatusCode {
    let path = format!("GetBuildLogs/{id}?limit={limit}");
    send(server.plain(&path).header("x-tenant-id", tenant)).await.status
}

/// Waits until a tenant is answered again.
async fn until_answered(server: &Server, id: &str, limit: u32) {
    let begun = Instant::now();
    while status(server, "t", id, limit).await != StatusCode::OK {
        assert!(begun.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn answers_that_a_tenant_does_not_read_are_bounded() {
    let server = serving(OpenMax { calls: 3, ..OPEN_MAX }).await;
    let id = long_log(&server).await;
    let mut unread = Vec::new();
    for _ in 0..3 {
        unread.push(ask_and_stop_reading(&server, &id).await);
    }
    let path = format!("GetBuildStatus/{id}");
    let refused = send(server.plain(&path).header("x-tenant-id", "t")).await;
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (StatusCode::TOO_MANY_REQUESTS, "5")
    );
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("3 calls of this tenant"), "{message}");
    assert_eq!(status(&server, "other", &id, 1).await, StatusCode::NOT_FOUND, "it is asked");
    drop(unread.pop());
    until_answered(&server, &id, 1).await;
    drop(unread);
    server.stop().await;
}

#[tokio::test]
async fn what_a_tenant_does_not_read_takes_so_many_bytes_and_no_more() {
    let server = serving(OpenMax { carried_bytes: 10 << 20, ..OPEN_MAX }).await;
    let id = long_log(&server).await;
    let unread = ask_and_stop_reading(&server, &id).await;
    let message = json!({"buildId": id, "limit": 1000});
    let refused = server.plain(&format!("GetBuildLogs/{id}?limit=1000"));
    let refused = send(refused.header("x-tenant-id", "t")).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    let said = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(said.contains("10 MiB"), "{said}");
    // What is short is answered, to whatever protocol.
    assert_eq!(status(&server, "t", &id, 5).await, StatusCode::OK);
    let rpc = send(server.rpc("GetBuild", &message).header("x-tenant-id", "t")).await;
    assert_eq!(rpc.status, StatusCode::OK);
    assert_eq!(rpc.header("content-length"), rpc.body.len().to_string());
    drop(unread);
    until_answered(&server, &id, 1000).await;
    server.stop().await;
}

/// Sends the head of a create and the first of its body.
async fn begin_create(server: &Server, tenant: &str, bytes: usize) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let path = format!("/{}/CreateBuild", api::SERVICE);
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nx-tenant-id: {tenant}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        bytes + 1
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&vec![b' '; bytes]).await.unwrap();
    stream
}

async fn first_line(stream: &mut TcpStream) -> String {
    let mut line = Vec::new();
    let read = async {
        while !line.ends_with(b"\r\n") {
            line.push(stream.read_u8().await.unwrap());
        }
    };
    tokio::time::timeout(SOON, read).await.expect("an answer");
    String::from_utf8(line).unwrap()
}

#[tokio::test]
async fn bodies_of_a_tenant_that_come_at_once_are_bounded() {
    let server = serving(OpenMax { carried_bytes: 1 << 20, ..OPEN_MAX }).await;
    let mut first = begin_create(&server, "t", 700 << 10).await;
    // As soon as the first has come as far as it was sent.
    let begun = Instant::now();
    let refused = loop {
        let mut second = begin_create(&server, "t", 400 << 10).await;
        let answer = tokio::time::timeout(Duration::from_secs(1), first_line(&mut second)).await;
        match answer {
            Ok(line) => break line,
            Err(_) => assert!(begun.elapsed() < SOON),
        }
    };
    assert!(refused.starts_with("HTTP/1.1 429 "), "{refused}");
    let mut other = begin_create(&server, "other", 400 << 10).await;
    for stream in [&mut first, &mut other] {
        stream.write_all(b" ").await.unwrap();
        let answered = first_line(stream).await;
        assert!(answered.starts_with("HTTP/1.1 400 "), "spaces are no message: {answered}");
    }
    let mut again = begin_create(&server, "t", 900 << 10).await;
    again.write_all(b" ").await.unwrap();
    assert!(first_line(&mut again).await.starts_with("HTTP/1.1 400 "));
    server.stop().await;
}

#[tokio::test]
async fn what_a_body_unpacks_to_is_what_a_tenant_carries() {
    let server = serving(OpenMax { carried_bytes: 1 << 20, ..OPEN_MAX }).await;
    let packed = |bytes: usize| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&vec![b' '; bytes]).unwrap();
        gzip.finish().unwrap()
    };
    let status = async |bytes| {
        let request = server.rpc("CreateBuild", &json!({})).header("x-tenant-id", "t");
        let request = request.header("content-encoding", "gzip").body(packed(bytes));
        send(request).await.status
    };
    for _ in 0..3 {
        assert_eq!(status(900 << 10).await, StatusCode::BAD_REQUEST, "spaces are no message");
        assert_eq!(status(2 << 20).await, StatusCode::TOO_MANY_REQUESTS);
    }
    server.stop().await;
}

/// Whether a connection from `from` is kept open by the server.
async fn is_let_in(server: &Server, from: Ipv4Addr) -> (TcpStream, bool) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    // Who is let in is answered; who is not finds the connection closed, or broken.
    let _ = stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let mut begin = [0; 8];
    let read = tokio::time::timeout(SOON, stream.read_exact(&mut begin)).await;
    let is_answered = read.expect("an answer or an end").is_ok();
    (stream, is_answered)
}

#[tokio::test]
async fn an_address_has_only_so_many_connections() {
    let rules = rules(Mode::Tokens, Tier::Free);
    let crowd = Crowd::up_to(2).and_from_here();
    let server = Server::start_among(crowd, None, rules, Origins::NONE).await;
    let (here, there) = (Ipv4Addr::new(127, 0, 0, 5), Ipv4Addr::new(127, 0, 0, 6));
    let mut open = Vec::new();
    for _ in 0..2 {
        let (stream, is_let_in) = is_let_in(&server, here).await;
        assert!(is_let_in);
        open.push(stream);
    }
    assert!(!is_let_in(&server, here).await.1);
    assert!(is_let_in(&server, there).await.1, "others are not concerned");
    drop(open.pop());
    let begun = Instant::now();
    while !is_let_in(&server, here).await.1 {
        assert!(begun.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(open);
    server.stop().await;
}

#[tokio::test]
async fn pages_that_an_address_does_not_read_are_bounded() {
    let rules =
        ApiRules { open_max: OpenMax { looks: 1, ..OPEN_MAX }, ..rules(Mode::Tokens, Tier::Free) };
    let server = Server::start_by(rules, Origins::NONE).await;
    // In one connection, whose client gives room for nothing: the answer is made all the same.
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let settings = [&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 1][..], &request(1)].concat();
    stream
        .write_all(&[&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings].concat())
        .await
        .unwrap();
    let begun = Instant::now();
    while send(server.request(reqwest::Method::GET, "/metrics")).await.status == StatusCode::OK {
        assert!(begun.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let refused = send(server.request(reqwest::Method::GET, "/metrics")).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    drop(stream);
    while send(server.request(reqwest::Method::GET, "/metrics")).await.status != StatusCode::OK {
        assert!(begun.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    server.stop().await;
}

/// `GET /metrics` as HTTP/2 writes it (RFC 9113, section 6.2; RFC 7541, section 6).
fn request(stream: u32) -> Vec<u8> {
    let path = b"/metrics";
    // Indexed: method GET, scheme http. Literal without indexing: path, authority.
    let mut block = vec![0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    block.extend(path);
    block.extend([0x01, 9]);
    block.extend(b"localhost");
    let length = u8::try_from(block.len()).unwrap();
    // HEADERS with END_STREAM and END_HEADERS.
    let mut frame = vec![0, 0, length, 1, 5];
    frame.extend(stream.to_be_bytes());
    frame.extend(block);
    frame
}
