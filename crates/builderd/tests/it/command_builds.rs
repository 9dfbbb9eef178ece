//! `builderd builds …` against a server that is cut, slow, wrong or says no.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::response::Response;
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::support::{Workshop, noise, sha256, stderr};

const ID: &str = "build_01HZQQR7X8N9PN0Z2KG5WV7H3M";
const SERVICE: &str = "/builder.v1.BuilderService/";

/// A request as the server got it.
#[derive(Clone, Debug)]
struct Asked {
    method: String,
    headers: axum::http::HeaderMap,
    body: Bytes,
    /// How many requests for the same method came before.
    before: usize,
}

impl Asked {
    fn json(&self) -> Value {
        // A message of a stream has five bytes before it.
        let start = if self.method == "StreamBuildLogs" { 5 } else { 0 };
        serde_json::from_slice(&self.body[start..]).unwrap()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// What it answers: a status, headers, the body's pieces, and whether the connection breaks then.
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    pieces: Vec<Vec<u8>>,
    is_cut: bool,
}

fn json_reply(value: &Value) -> Reply {
    Reply { status: 200, headers: vec![], pieces: vec![value.to_string().into()], is_cut: false }
}

fn refusal(status: u16, code: &str, message: &str) -> Reply {
    Reply { status, ..json_reply(&json!({"code": code, "message": message})) }
}

/// One message of a stream.
fn message(flags: u8, value: &Value) -> Vec<u8> {
    let text = value.to_string();
    let length = u32::try_from(text.len()).unwrap().to_be_bytes();
    [&[flags][..], &length, text.as_bytes()].concat()
}

fn line(offset: u64) -> Value {
    let mut line = json!({
        "timestamp": "2024-01-15T10:30:00.5Z",
        "level": "info",
        "component": "puller",
        "message": format!("line {offset}"),
    });
    // As proto3's JSON has it: a string, left out when it is 0.
    if offset > 0 {
        line["offset"] = offset.to_string().into();
    }
    line
}

fn messages(messages: &[Vec<u8>], is_cut: bool) -> Reply {
    Reply { status: 200, headers: vec![], pieces: messages.to_vec(), is_cut }
}

fn end() -> Vec<u8> {
    message(2, &json!({}))
}

/// A server made of one function.
struct Fake {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    fn new(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = oneshot::channel();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, answer) = (Arc::clone(&asked), Arc::new(answer));
        let handle = move |request: Request| {
            let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
            async move { Ok::<_, Infallible>(respond(request, &seen, &*answer).await) }
        };
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let router = axum::Router::new().fallback_service(tower::service_fn(handle));
                let stopped = async move { drop(stopped.await) };
                axum::serve(listener, router).with_graceful_shutdown(stopped).await.unwrap();
            });
        });
        Self { address, asked, stop: Some(stop), thread: Some(thread) }
    }

    fn asked(&self, method: &str) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|asked| asked.method == method).cloned().collect()
    }

    fn command(&self, workshop: &Workshop, arguments: &[&str]) -> std::process::Command {
        let mut command = workshop.command(arguments);
        command.env("UNKEY_BUILDERD_SERVER_ADDRESS", self.address.to_string());
        command.env("NO_PROXY", "127.0.0.1").stdin(Stdio::null());
        command
    }

    fn run(&self, workshop: &Workshop, arguments: &[&str]) -> Output {
        self.command(workshop, arguments).output().unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn respond(
    request: Request,
    seen: &Mutex<Vec<Asked>>,
    answer: &(dyn Fn(&Asked) -> Reply + Send + Sync),
) -> Response {
    let path = request.uri().path().strip_prefix(SERVICE).unwrap_or("?").to_owned();
    let method = path.split('/').next().unwrap_or_default().to_owned();
    let headers = request.headers().clone();
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let asked = {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let before = seen.iter().filter(|asked| asked.method == method).count();
        let asked = Asked { method, headers, body, before };
        seen.push(asked.clone());
        asked
    };
    let reply = answer(&asked);
    let mut builder = Response::builder().status(reply.status);
    for (name, value) in reply.headers {
        builder = builder.header(name, value);
    }
    let pieces = stream::iter(reply.pieces).map(|piece| Ok(Bytes::from(piece)));
    let end = stream::iter(reply.is_cut.then_some(())).then(|()| async {
        // What was said before is sent when there is nothing to say for a moment.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        Err(std::io::Error::other("cut"))
    });
    builder.body(Body::from_stream(pieces.chain(end))).unwrap()
}

fn build(state: &str) -> Value {
    json!({"build": {
        "buildId": ID,
        "state": format!("BUILD_STATE_{state}"),
        "createdAt": "2024-01-15T10:30:00.123456Z",
        "config": {"source": {"dockerImage": {"imageUri": "nginx:alpine"}}},
    }})
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_log_that_is_cut_goes_on_behind_its_last_line() {
    let fake = Fake::new(|asked| match (asked.method.as_str(), asked.before) {
        ("StreamBuildLogs", 0) => messages(&[message(0, &line(0)), message(0, &line(1))], true),
        // A stopping server says so.
        ("StreamBuildLogs", 1) => {
            let unavailable = json!({"error": {"code": "unavailable", "message": "stopping"}});
            messages(&[message(0, &line(2)), message(2, &unavailable)], false)
        }
        ("StreamBuildLogs", 2) => Reply { status: 503, ..refusal(503, "unavailable", "starting") },
        // One that dies may not, and half a message is none.
        ("StreamBuildLogs", 3) => {
            messages(&[message(0, &line(3)), message(0, &line(4))[..9].to_vec()], true)
        }
        // Lines that were seen come again, and a sign of life.
        ("StreamBuildLogs", _) => {
            let heartbeat = json!({"heartbeat": true});
            let lines = [line(2), line(3), heartbeat, line(4)];
            let sent: Vec<_> = lines.iter().map(|line| message(0, line)).chain([end()]).collect();
            messages(&sent, false)
        }
        ("GetBuild", _) => json_reply(&build("COMPLETED")),
        _ => refusal(404, "not_found", "?"),
    });
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "logs", "-f", ID]);
    assert!(output.status.success(), "{}", stderr(&output));
    let shown: Vec<_> = stdout(&output).lines().map(|line| line.to_owned()).collect();
    let expected: Vec<_> =
        (0..5).map(|number| format!("10:30:00 info  puller    line {number}")).collect();
    assert_eq!(shown, expected);
    let offsets: Vec<_> = fake
        .asked("StreamBuildLogs")
        .iter()
        .map(|asked| {
            assert_eq!(asked.header("content-type"), "application/connect+json");
            assert_eq!(asked.header("connect-protocol-version"), "1");
            assert_eq!(asked.json()["follow"], true);
            asked.json()["offset"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(offsets, ["0", "2", "3", "3", "4"]);
}

#[test]
fn a_stream_that_ends_before_the_build_is_taken_up_again() {
    let fake = Fake::new(|asked| match (asked.method.as_str(), asked.before) {
        ("StreamBuildLogs", 0) => messages(&[message(0, &line(0)), end()], false),
        ("StreamBuildLogs", _) => messages(&[message(0, &line(1)), end()], false),
        ("GetBuild", 0) => json_reply(&build("BUILDING")),
        _ => json_reply(&build("COMPLETED")),
    });
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "logs", "-f", "-o", "json", ID]);
    assert!(output.status.success(), "{}", stderr(&output));
    let lines: Vec<Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, [line(0), line(1)]);
    // Without -f one stream is enough.
    let output = fake.run(&workshop, &["builds", "logs", "--from", "1", ID]);
    assert_eq!(stdout(&output).lines().count(), 1);
    assert_eq!(fake.asked("StreamBuildLogs").last().unwrap().json()["offset"], "1");
}

#[test]
fn an_error_in_the_stream_is_the_commands() {
    let fake = Fake::new(|_| {
        let error = json!({"error": {"code": "not_found", "message": "build not found: x"}});
        messages(&[message(2, &error)], false)
    });
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "logs", "-f", "x"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("build not found: x"));
    assert_eq!(fake.asked("StreamBuildLogs").len(), 1, "not again");
}

/// A server whose build ends in `ended`, with a log of one line.
fn ending(ended: Value) -> Fake {
    Fake::new(move |asked| match asked.method.as_str() {
        "CreateBuild" => json_reply(&json!({"buildId": ID, "state": "BUILD_STATE_PENDING"})),
        "StreamBuildLogs" => messages(&[message(0, &line(0)), end()], false),
        _ => {
            let mut answer = build("FAILED");
            answer["build"].as_object_mut().unwrap().extend(ended.as_object().unwrap().clone());
            json_reply(&answer)
        }
    })
}

#[test]
fn the_exit_code_says_how_a_followed_build_ended() {
    let failed = |code: &str, blame: &str| {
        json!({"state": "BUILD_STATE_FAILED", "failure": {
            "code": code, "step": "pull", "cause": "no such tag", "blame": blame, "remedy": "look",
        }})
    };
    let workshop = Workshop::new();
    for (ended, code) in [
        (json!({"state": "BUILD_STATE_COMPLETED", "rootfsChecksum": "00"}), 0),
        (failed("INVALID_SOURCE", "yours"), 3),
        (failed("NETWORK_ERROR", "upstream"), 4),
        (failed("INTERNAL", "ours"), 1),
        (failed("STORAGE_FULL", "ours"), 5),
        (json!({"state": "BUILD_STATE_FAILED", "status": "BUILD_STATUS_TIMEOUT"}), 1),
        (json!({"state": "BUILD_STATE_CANCELLED"}), 1),
    ] {
        let fake = ending(ended.clone());
        let output = fake.run(&workshop, &["builds", "create", "nginx", "--follow"]);
        assert_eq!(output.status.code(), Some(code), "{ended}: {}", stderr(&output));
        assert_eq!(stdout(&output), format!("{ID}\n"));
        assert!(stderr(&output).contains("line 0"));
        if ended["failure"].is_object() {
            assert!(stderr(&output).contains("no such tag in pull"), "{}", stderr(&output));
            assert!(stderr(&output).contains("hint: look"));
        }
        let output = fake.run(&workshop, &["builds", "create", "nginx"]);
        assert!(output.status.success(), "without --follow the call is all");
        let output = fake.run(&workshop, &["builds", "get", ID]);
        assert!(output.status.success(), "looking at a failed build is no failure");
    }
}

#[test]
fn a_build_that_waits_is_shown_with_until_when_and_why() {
    let fake = Fake::new(|_| {
        let mut answer = build("PENDING");
        answer["build"]["currentStep"] = "Waiting until 2024-01-15T10:30:30Z for try 2".into();
        answer["build"]["nextAttemptAt"] = "2024-01-15T10:30:30Z".into();
        let failure = json!({"code": "NETWORK_ERROR", "cause": "cannot reach it\u{1b}[2J"});
        answer["build"]["attempts"] = json!([{"attempt": 1, "failure": failure}]);
        json_reply(&answer)
    });
    let output = fake.run(&Workshop::new(), &["builds", "get", ID]);
    let said = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(said.contains("Waiting until 2024-01-15T10:30:30Z for try 2"), "{said}");
    assert!(said.contains("NETWORK_ERROR: cannot reach it"), "{said}");
    assert!(!said.contains('\u{1b}'), "{said}");
}

#[test]
fn what_is_asked_for_is_what_is_sent() {
    let fake = ending(json!({}));
    let workshop = Workshop::new();
    let mut command = fake.command(
        &workshop,
        &[
            "builds",
            "create",
            "ghcr.io/a/b:1",
            "--compression",
            "zstd",
            "--label",
            "a=b=c",
            "--label",
            "x=",
            "--name",
            "mine",
            "--idempotency-key",
            "k1",
            "--tier",
            "pro",
            "--size-limit",
            "2G",
            "--username",
            "me",
            "--password-stdin",
            "-o",
            "json",
        ],
    );
    command.env("UNKEY_BUILDERD_TOKEN", "bld_canary").env("UNKEY_BUILDERD_TENANT_ID", "t1");
    command.env("UNKEY_BUILDERD_USER_ID", "c1").stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"pass word\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let answer: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(answer["buildId"], ID);
    let asked = &fake.asked("CreateBuild")[0];
    assert_eq!(asked.header("authorization"), "Bearer bld_canary");
    assert_eq!((asked.header("x-tenant-id"), asked.header("x-customer-id")), ("t1", "c1"));
    let expected = json!({"config": {
        "source": {"dockerImage": {
            "imageUri": "ghcr.io/a/b:1",
            "auth": {"username": "me", "password": "pass word"},
        }},
        "target": {"microvmRootfs": {"compression": "zstd", "sizeLimitBytes": "2147483648"}},
        "strategy": {"dockerExtract": {}},
        "labels": {"a": "b=c", "x": ""},
        "idempotencyKey": "k1",
        "buildName": "mine",
        "tenant": {"tier": "TENANT_TIER_PRO"},
    }});
    assert_eq!(asked.json(), expected);
    let said = stdout(&output) + &stderr(&output);
    assert!(!said.contains("canary") && !said.contains("pass word"), "{said}");
}

#[test]
fn a_refusal_is_told_with_what_to_do() {
    let workshop = Workshop::new();
    for (status, code, exit) in [
        (401, "unauthenticated", 3),
        (403, "permission_denied", 3),
        (429, "resource_exhausted", 3),
        (501, "unimplemented", 3),
        (503, "unavailable", 4),
        (500, "internal", 1),
    ] {
        let fake = Fake::new(move |_| refusal(status, code, "because of \u{1b}[31m this"));
        let output = fake.run(&workshop, &["builds", "create", "nginx"]);
        assert_eq!(output.status.code(), Some(exit), "{code}: {}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains("error: because of") && !said.contains('\u{1b}'), "{said}");
        assert_eq!(fake.asked("CreateBuild").len(), 1, "{code}");
    }
    let foreign = Fake::new(|_| Reply { status: 404, ..json_reply(&json!("a page")) });
    let output = foreign.run(&workshop, &["quotas"]);
    assert!(stderr(&output).contains("none of builderd's"), "{}", stderr(&output));
    let address = foreign.address.to_string();
    drop(foreign);
    let output = workshop.run(&["stats", "--server", &address]);
    assert_eq!(output.status.code(), Some(4));
    assert!(stderr(&output).contains(&address), "{}", stderr(&output));
}

#[test]
fn a_server_that_asks_for_patience_gets_it() {
    let fake = Fake::new(|asked| match asked.before {
        0 => Reply {
            headers: vec![("retry-after", "1".into())],
            ..refusal(429, "resource_exhausted", "rate limit exceeded")
        },
        _ => json_reply(&build("COMPLETED")),
    });
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "get", "-o", "json", ID]);
    assert!(output.status.success(), "{}", stderr(&output));
    let shown: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(shown, build("COMPLETED")["build"]);
    assert_eq!(fake.asked("GetBuild").len(), 2);
}

/// What a rate limit says of a stream, which is no error to HTTP: in its head, or in its end.
fn refused_stream(in_head: bool) -> Reply {
    let mut last = json!({"error": {"code": "resource_exhausted", "message": "too many"}});
    let mut headers = Vec::new();
    match in_head {
        true => headers.push(("retry-after", "1".to_owned())),
        false => last["metadata"] = json!({"retry-after": ["1"]}),
    }
    Reply { headers, ..messages(&[message(2, &last)], false) }
}

#[test]
fn logs_and_downloads_wait_as_long_as_the_server_asks_for() {
    let bytes = noise(8, 50_000);
    let (sum, artifact) = (sha256(&bytes), bytes.clone());
    let limited = || Reply {
        headers: vec![("retry-after", "1".into())],
        ..refusal(429, "resource_exhausted", "rate limit exceeded")
    };
    let fake = Fake::new(move |asked| match (asked.method.as_str(), asked.before) {
        ("StreamBuildLogs" | "GetBuildArtifact", 0) => limited(),
        ("StreamBuildLogs", 1) => refused_stream(true),
        // It is cut, and taken up too often.
        ("StreamBuildLogs", 2) => messages(&[message(0, &line(0))], true),
        ("StreamBuildLogs", 3) => refused_stream(false),
        ("StreamBuildLogs", _) => messages(&[message(0, &line(1)), end()], false),
        ("GetBuild", _) => {
            let mut answer = build("COMPLETED");
            answer["build"]["rootfsChecksum"] = sum.as_str().into();
            json_reply(&answer)
        }
        _ => Reply { status: 200, headers: vec![], pieces: vec![artifact.clone()], is_cut: false },
    });
    let workshop = Workshop::new();
    let before = Instant::now();
    let output = fake.run(&workshop, &["builds", "logs", "-f", ID]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output).lines().count(), 2);
    assert!(before.elapsed() >= Duration::from_secs(3), "three times a second");
    let before = Instant::now();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(before.elapsed() >= Duration::from_secs(1));
    assert!(workshop.read("out") == bytes);
}

#[test]
fn a_limit_that_names_no_time_or_a_long_one_ends_logs_and_downloads() {
    let workshop = Workshop::new();
    for wait in ["", "3600"] {
        let fake = Fake::new(move |asked| match asked.method.as_str() {
            "GetBuild" => {
                let mut answer = build("COMPLETED");
                answer["build"]["rootfsChecksum"] = sha256(b"x").into();
                json_reply(&answer)
            }
            _ => Reply {
                headers: vec![("retry-after", wait.to_owned())],
                ..refusal(429, "resource_exhausted", "rate limit exceeded")
            },
        });
        for arguments in [&["logs", "-f", ID][..], &["download", ID, "-o", "out"]] {
            let output = fake.run(&workshop, &[&["builds"], arguments].concat());
            assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
            assert!(stderr(&output).contains("rate limit exceeded"));
        }
        assert_eq!(fake.asked("StreamBuildLogs").len() + fake.asked("GetBuildArtifact").len(), 2);
    }
}

#[test]
fn builds_that_took_too_long_are_listed_alone_or_with_others() {
    let fake = Fake::new(|asked| {
        let one = |state: &str, status: &str| {
            let mut one = build(state)["build"].take();
            one["status"] = format!("BUILD_STATUS_{status}").into();
            one
        };
        let all =
            [one("FAILED", "TIMEOUT"), one("FAILED", "FAILED"), one("CANCELLED", "CANCELLED")];
        // A server that is told one status gives no other.
        let wanted = if asked.json()["status"] == "timeout" { &all[..1] } else { &all[..] };
        json_reply(&json!({"builds": wanted}))
    });
    let workshop = Workshop::new();
    let states = |arguments: &[&str]| -> Vec<String> {
        let output = fake.run(&workshop, &[&["builds", "list"], arguments].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let lines = stdout(&output);
        lines.lines().skip(1).map(|line| line.split_whitespace().nth(1).unwrap().into()).collect()
    };
    assert_eq!(states(&["--state", "timeout"]), ["timeout"]);
    assert_eq!(states(&["--state", "timeout", "--state", "cancelled"]), ["timeout", "cancelled"]);
    let failed = ["--state", "timeout", "--state", "failed"];
    assert_eq!(states(&failed), ["timeout", "failed", "cancelled"], "as the server sends them");
    let asked: Vec<Value> = fake.asked("ListBuilds").iter().map(Asked::json).collect();
    assert_eq!(asked[1]["stateFilter"], json!(["BUILD_STATE_FAILED", "BUILD_STATE_CANCELLED"]));
    assert!(asked[1]["status"].is_null() && asked[2]["status"].is_null());
}

#[test]
fn a_server_of_another_protocol_is_a_wrong_argument() {
    let workshop = Workshop::new();
    for server in ["ftp://x", "unix:///run/x", "http://[x", "https://a b"] {
        let output = workshop.run(&["quotas", "--server", server]);
        assert_eq!(output.status.code(), Some(2), "{server}: {}", stderr(&output));
        assert!(stderr(&output).contains("--server"), "{server}: {}", stderr(&output));
    }
}

#[test]
fn a_list_is_read_page_by_page() {
    let fake = Fake::new(|asked| {
        let page = asked.before;
        let builds: Vec<Value> = (0..200).map(|_| build("COMPLETED")["build"].clone()).collect();
        json_reply(&json!({"builds": builds, "nextPageToken": format!("after-{page}")}))
    });
    let workshop = Workshop::new();
    let arguments = ["builds", "list", "--limit", "450", "--state", "running", "--state", "queued"];
    let output = fake.run(&workshop, &arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output).lines().count(), 451, "a heading and the builds");
    assert!(stdout(&output).contains("completed   2024-01-15T10:30:00"), "{}", stdout(&output));
    let asked: Vec<Value> = fake.asked("ListBuilds").iter().map(Asked::json).collect();
    let pages: Vec<_> =
        asked.iter().map(|asked| (&asked["pageSize"], &asked["pageToken"])).collect();
    let expected =
        [(json!(200), json!("")), (json!(200), json!("after-0")), (json!(50), json!("after-1"))];
    assert_eq!(pages, expected.iter().map(|(size, token)| (size, token)).collect::<Vec<_>>());
    assert_eq!(asked[0]["stateFilter"].as_array().unwrap().len(), 5);
}

/// A server with one artifact, which answers ranges and breaks connections where `cuts` says.
fn artifact_server(bytes: Vec<u8>, sum: String, cuts: &'static [usize]) -> Fake {
    Fake::new(move |asked| {
        if asked.method == "GetBuild" {
            let mut answer = build("COMPLETED");
            answer["build"]["rootfsChecksum"] = sum.as_str().into();
            answer["build"]["rootfsSizeBytes"] = bytes.len().to_string().into();
            return json_reply(&answer);
        }
        let range = asked.header("range");
        let is_ours = asked.header("if-range") == format!("\"{sum}\"");
        let from: usize = match range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')) {
            Some(from) if is_ours => from.parse().unwrap(),
            _ => 0,
        };
        let end = cuts.get(asked.before).map_or(bytes.len(), |cut| from + cut);
        let total = bytes.len();
        if from >= total {
            return Reply { status: 416, headers: vec![], pieces: vec![], is_cut: false };
        }
        let mut headers = vec![("content-length", (total - from).to_string())];
        if from > 0 {
            headers.push(("content-range", format!("bytes {from}-{}/{total}", total - 1)));
        }
        Reply {
            status: if from > 0 { 206 } else { 200 },
            headers,
            pieces: bytes[from..end].chunks(10_000).map(<[u8]>::to_vec).collect(),
            is_cut: end < total,
        }
    })
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_stopped() {
    let bytes = noise(1, 1_000_000);
    let sum = sha256(&bytes);
    let fake = artifact_server(bytes.clone(), sum.clone(), &[300_000, 0, 400_000]);
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "rootfs.ext4"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(workshop.read("rootfs.ext4") == bytes);
    assert_eq!(workshop.names("."), ["rootfs.ext4"], "nothing else is left");
    let asked = fake.asked("GetBuildArtifact");
    assert_eq!(asked[0].header("range"), "");
    for later in &asked[1..] {
        let from = later.header("range").strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
        // What was on its way when the connection broke may be lost.
        assert!((1..=700_000).contains(&from.parse::<u64>().unwrap()), "{from}");
        assert_eq!(later.header("if-range"), format!("\"{sum}\""));
    }
}

#[test]
fn a_download_that_was_interrupted_is_taken_up_by_the_next_one() {
    let bytes = noise(2, 200_000);
    let sum = sha256(&bytes);
    let fake = artifact_server(bytes.clone(), sum.clone(), &[]);
    let workshop = Workshop::new();
    let partial = format!(".out.{}.part", &sum[..16]);
    std::fs::write(workshop.path(&partial), &bytes[..150_000]).unwrap();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(workshop.read("out") == bytes);
    assert_eq!(fake.asked("GetBuildArtifact")[0].header("range"), "bytes=150000-");
    // All of it was there, only the name was missing.
    std::fs::write(workshop.path(&partial), &bytes).unwrap();
    std::fs::remove_file(workshop.path("out")).unwrap();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(workshop.read("out") == bytes);
    assert_eq!(workshop.names("."), ["out"]);
}

#[test]
fn a_damaged_artifact_gets_no_name() {
    let workshop = Workshop::new();
    std::fs::write(workshop.path("out"), b"what was there").unwrap();
    let fake = artifact_server(noise(3, 50_000), sha256(b"something else"), &[]);
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("damaged"), "{}", stderr(&output));
    assert_eq!(workshop.names("."), ["out"], "what came is gone");
    assert_eq!(workshop.read("out"), b"what was there");
    // A part that is none of the artifact does no harm either: the next try starts anew.
    let bytes = noise(4, 50_000);
    let fake = artifact_server(bytes.clone(), sha256(&bytes), &[]);
    let partial = format!(".out.{}.part", &sha256(&bytes)[..16]);
    std::fs::write(workshop.path(&partial), noise(5, 20_000)).unwrap();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert_eq!(output.status.code(), Some(4));
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(workshop.read("out") == bytes);
}

#[test]
fn a_download_takes_the_place_of_regular_files_alone() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let bytes = noise(6, 50_000);
    let fake = artifact_server(bytes.clone(), sha256(&bytes), &[]);
    let workshop = Workshop::new();
    let mode = Mode::from_raw_mode(0o600);
    mknodat(CWD, workshop.path("fifo"), FileType::Fifo, mode, 0).unwrap();
    std::os::unix::fs::symlink("fifo", workshop.path("link")).unwrap();
    std::fs::create_dir(workshop.path("directory")).unwrap();
    let mut places =
        vec![".", "..", "fifo", "link", "directory", "directory/", "fifo/", "none/out"];
    // A node of our own that is what /dev/null is.
    let null = rustix::fs::makedev(1, 3);
    match mknodat(CWD, workshop.path("null"), FileType::CharacterDevice, mode, null) {
        Ok(()) => places.push("null"),
        Err(error) => println!("skipped: a device, which takes root: {error}"),
    }
    let names = workshop.names(".");
    for place in places {
        let output = fake.run(&workshop, &["builds", "download", ID, "-o", place]);
        assert_eq!(output.status.code(), Some(3), "{place}: {}", stderr(&output));
        assert!(stderr(&output).contains("cannot be written"), "{place}: {}", stderr(&output));
        assert_eq!(workshop.names("."), names, "{place}");
        assert!(workshop.names("directory").is_empty(), "{place}");
        assert!(!workshop.path(place).is_file(), "{place}");
    }
    // As /dev/stdout is one: a regular file, but by a link that is everybody's.
    std::fs::write(workshop.path("input"), b"kept").unwrap();
    std::os::unix::fs::symlink("/proc/self/fd/0", workshop.path("open")).unwrap();
    let mut command = fake.command(&workshop, &["builds", "download", ID, "-o", "open"]);
    let input = std::fs::File::open(workshop.path("input")).unwrap();
    let output = command.stdin(input).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(workshop.path("open").is_symlink());
    assert!(fake.asked("GetBuild").is_empty(), "nothing is asked for a name that cannot be");

    // As `builderd build` has it: the link goes, what it names stays.
    std::fs::write(workshop.path("kept"), b"kept").unwrap();
    std::os::unix::fs::symlink("kept", workshop.path("out")).unwrap();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(workshop.read("out") == bytes && workshop.read("kept") == b"kept");
}

#[test]
fn what_has_the_name_of_a_part_is_neither_waited_for_nor_written_through() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let bytes = noise(7, 50_000);
    let sum = sha256(&bytes);
    let fake = artifact_server(bytes, sum.clone(), &[]);
    let workshop = Workshop::new();
    let partial = workshop.path(&format!(".out.{}.part", &sum[..16]));
    std::fs::write(workshop.path("kept"), b"kept").unwrap();
    std::os::unix::fs::symlink("kept", &partial).unwrap();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(workshop.read("kept"), b"kept");
    std::fs::remove_file(&partial).unwrap();
    mknodat(CWD, &partial, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("is in the way"), "{}", stderr(&output));
}

#[test]
fn why_an_artifact_is_gone_is_told_and_nothing_is_left_of_the_download() {
    const WHY: &str = "the artifact was removed by the retention rules: build it again";
    let gone = || Reply {
        status: 404,
        ..json_reply(&json!({"error": {"code": "NOT_FOUND", "message": WHY}}))
    };
    let workshop = Workshop::new();
    // A build whose artifact has been gone for long, and one whose goes this moment.
    for sum in ["", &sha256(b"gone")] {
        let sum = sum.to_owned();
        let fake = Fake::new(move |asked| {
            if asked.method != "GetBuild" {
                return gone();
            }
            let mut answer = build("COMPLETED");
            answer["build"]["rootfsChecksum"] = sum.as_str().into();
            json_reply(&answer)
        });
        let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert!(stderr(&output).contains(WHY), "{}", stderr(&output));
        assert!(workshop.names(".").is_empty(), "{:?}", workshop.names("."));
    }
}

#[test]
fn a_build_without_an_artifact_says_so() {
    let workshop = Workshop::new();
    for (state, hint) in [("BUILDING", "builds logs -f"), ("FAILED", "builds retry")] {
        let fake = Fake::new(move |_| json_reply(&build(state)));
        let output = fake.run(&workshop, &["builds", "download", ID, "-o", "out"]);
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert!(stderr(&output).contains(hint), "{}", stderr(&output));
        assert!(workshop.names(".").is_empty());
    }
}

#[test]
fn a_retry_sends_the_same_config_with_a_key_of_its_own() {
    let first = json!({
        "tenant": {"tenantId": "t1", "tier": "TENANT_TIER_PRO", "resourceLimits": {"maxCpuCores": 2}},
        "source": {"dockerImage": {"imageUri": "nginx"}},
        "target": {"microvmRootfs": {"compression": "gzip"}},
        "labels": {"a": "b"},
        "idempotencyKey": "first",
    });
    let config = first.clone();
    let fake = ending(json!({"config": config}));
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "retry", ID]);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut sent = fake.asked("CreateBuild")[0].json()["config"].clone();
    let key = sent["idempotencyKey"].take();
    assert!(key.as_str().is_some_and(|key| key != "first" && key.len() > 20), "{key}");
    let mut expected = first;
    expected["idempotencyKey"] = Value::Null;
    expected["tenant"] = json!({"tenantId": "t1", "tier": "TENANT_TIER_PRO"});
    assert_eq!(sent, expected);
}

#[test]
fn a_retry_of_a_build_with_credentials_asks_for_them() {
    let image = json!({"imageUri": "r.example.com/x", "auth": {"username": "me"}});
    let fake = ending(json!({"config": {"source": {"dockerImage": image}}}));
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "retry", ID]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("--password-stdin"), "{}", stderr(&output));
    let mut command = fake.command(&workshop, &["builds", "retry", ID, "--password-stdin"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"token-1").unwrap();
    assert!(child.wait().unwrap().success());
    let sent = fake.asked("CreateBuild")[0].json();
    assert_eq!(sent["config"]["source"]["dockerImage"]["auth"], json!({"token": "token-1"}));
}

#[test]
fn cancel_delete_quotas_and_stats_speak() {
    let fake = Fake::new(|asked| match asked.method.as_str() {
        "CancelBuild" => json_reply(&json!({"success": true, "state": "BUILD_STATE_CANCELLED"})),
        "DeleteBuild" => json_reply(&json!({"success": true})),
        "GetTenantQuotas" => json_reply(&json!({
            "currentLimits": {
                "maxConcurrentBuilds": 3, "maxDailyBuilds": 100, "maxStorageBytes": "10737418240",
                "maxMemoryBytes": "2147483648", "maxCpuCores": 2, "timeoutSeconds": 900,
                "allowedRegistries": ["docker.io", "ghcr.io"],
            },
            "currentUsage": {"activeBuilds": 1, "dailyBuildsUsed": 100, "storageBytesUsed": "1048576"},
            "violations": [{"message": "daily build limit exceeded: 100/100"}],
        })),
        "GetBuildStats" => json_reply(&json!({
            "totalBuilds": 9, "successfulBuilds": 7, "failedBuilds": 2, "avgBuildTimeMs": "1234",
            "recentBuilds": [build("COMPLETED")["build"]],
        })),
        _ => refusal(404, "not_found", "?"),
    });
    let workshop = Workshop::new();
    let output = fake.run(&workshop, &["builds", "cancel", ID, "--reason", "no more"]);
    assert_eq!(stdout(&output), format!("{ID} cancelled\n"));
    assert_eq!(fake.asked("CancelBuild")[0].json(), json!({"buildId": ID, "reason": "no more"}));
    let output = fake.run(&workshop, &["builds", "delete", ID, "--force"]);
    assert!(output.status.success());
    assert_eq!(fake.asked("DeleteBuild")[0].json(), json!({"buildId": ID, "force": true}));
    let said = stdout(&fake.run(&workshop, &["quotas"]));
    for part in ["1 of 3", "100 of 100", "1.00 MiB of 10.00 GiB", "used up", "docker.io, ghcr.io"] {
        assert!(said.contains(part), "{part} in\n{said}");
    }
    let said = stdout(&fake.run(&workshop, &["stats", "--since", "30d"]));
    for part in ["9: 7 completed, 2 failed", "1234 ms", "nginx:alpine"] {
        assert!(said.contains(part), "{part} in\n{said}");
    }
    assert!(fake.asked("GetBuildStats")[0].json()["startTime"].as_str().unwrap().ends_with('Z'));
}

/// The same command on a terminal of its own, which script(1) makes; what it shows there.
fn on_a_terminal(command: &Command) -> (String, Option<i32>) {
    let words: Vec<&str> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_str().unwrap())
        .collect();
    let line = format!("stty rows 24 cols 100; exec {}", words.join(" "));
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--flush", "--command", &line, "/dev/null"]);
    script.env_clear().env("PATH", "/usr/bin:/bin").env("SHELL", "/bin/sh").env("TERM", "xterm");
    for (name, value) in command.get_envs() {
        script.env(name, value.unwrap());
    }
    script.current_dir(command.get_current_dir().unwrap()).stdin(Stdio::null());
    // Of the package bsdutils, which every Debian has.
    let output = script.output().unwrap();
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code())
}

/// A server whose build is at work for long enough to be looked at.
fn at_work() -> Fake {
    let begun = std::sync::OnceLock::new();
    Fake::new(move |asked| match asked.method.as_str() {
        "CreateBuild" => json_reply(&json!({"buildId": ID, "state": "BUILD_STATE_PENDING"})),
        "StreamBuildLogs" => messages(&[message(0, &line(0)), end()], false),
        _ => {
            let begun = begun.get_or_init(Instant::now);
            let is_over = begun.elapsed() > Duration::from_secs(3);
            let mut answer = build(if is_over { "COMPLETED" } else { "BUILDING" });
            answer["build"]["progressPercent"] = 42.into();
            answer["build"]["currentStep"] = "Packing layers".into();
            json_reply(&answer)
        }
    })
}

#[test]
fn a_followed_build_has_a_bar_on_a_terminal_and_nowhere_else() {
    const BAR: &str = " 42 % building Packing layers";
    let workshop = Workshop::new();
    let create = ["builds", "create", "nginx", "--follow"];
    let (shown, code) = on_a_terminal(&at_work().command(&workshop, &create));
    assert_eq!(code, Some(0), "{shown:?}");
    assert!(shown.contains(BAR), "{shown:?}");
    assert!(shown.contains("line 0") && shown.contains("completed: "), "{shown:?}");
    // It is gone when the build has ended: the last that stands there is the result.
    assert!(shown.rfind(BAR) < shown.rfind("completed: "), "{shown:?}");

    let output = at_work().run(&workshop, &create);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("line 0"), "{}", stderr(&output));
    for sign in ["%", "\r", "\u{1b}"] {
        assert!(!stderr(&output).contains(sign), "{:?}", stderr(&output));
    }
    // Nor where a program reads what is shown.
    let json = [&create[..], &["-o", "json"]].concat();
    let (shown, code) = on_a_terminal(&at_work().command(&workshop, &json));
    assert_eq!(code, Some(0), "{shown:?}");
    assert!(shown.starts_with('{') && !shown.contains(BAR), "{shown:?}");
}
