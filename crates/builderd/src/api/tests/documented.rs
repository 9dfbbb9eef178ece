//! Every JSON body and every curl line of the documentation this service keeps its word by
//! (`documented.json` holds them as they are printed there), sent to a server.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Reply, Server, create_body, send};
use crate::api::Mode;
use crate::build::record::{BuildMetrics, LiveUsage};

/// A piece of the documentation.
#[derive(Debug, Deserialize)]
struct Piece {
    document: String,
    heading: String,
    language: String,
    text: String,
}

/// What is refused by name so far. A line that is not true any more fails the test.
const LATER: &[(&str, &str, &str)] = &[
    ("api reference", "CreateBuild / Request", "docker_strategy.optimize_for_size"),
    ("api reference", "Git Repository Source (Planned)", "source.git_repository"),
    ("api reference", "Archive Source (Planned)", "source.archive"),
    ("api reference", "Docker Strategy", "docker_strategy.optimize_for_size"),
    ("readme", "Create Your First Build", "microvm_rootfs.init_strategy INIT_STRATEGY_TINI"),
    ("build workflows", "Docker Strategy", "docker_strategy.optimize_for_size"),
    ("build workflows", "Git Strategy (Planned)", "strategy.git_strategy"),
    ("build workflows", "Archive Strategy (Planned)", "strategy.archive_strategy"),
    ("build workflows", "Simple Node.js Application", "docker_strategy.optimize_for_size"),
    ("build workflows", "Production Web Application", "docker_strategy.optimize_for_size"),
    ("build workflows", "Git Repository Build (Planned)", "source.git_repository"),
    ("build workflows", "Webhook Notifications", "config.webhook"),
];

fn pieces() -> Vec<Piece> {
    serde_json::from_str(include_str!("documented.json")).unwrap()
}

/// What is refused of the pieces of a language, by document and heading.
fn later(language: &str) -> BTreeMap<(String, String), String> {
    let pieces = pieces();
    let place = |document: &str, heading: &str| {
        let is_it = |piece: &&Piece| piece.document == document && piece.heading == heading;
        pieces.iter().find(is_it).unwrap_or_else(|| panic!("{document} has no {heading}"))
    };
    LATER
        .iter()
        .filter(|(document, heading, _)| place(document, heading).language == language)
        .map(|(document, heading, what)| {
            (((*document).into(), (*heading).into()), (*what).to_owned())
        })
        .collect()
}

/// What an answer says is not implemented, if it says so.
fn unimplemented(reply: &Reply) -> Option<String> {
    if reply.status != StatusCode::NOT_IMPLEMENTED {
        return None;
    }
    let error = reply.json();
    assert_eq!(error["code"], "unimplemented");
    assert_eq!(error["error"]["code"], "UNIMPLEMENTED");
    let message = error["message"].as_str().unwrap();
    Some(message.split(" is not implemented").next().unwrap().to_owned())
}

/// The JSON of a piece; a comment stands for something of the reader's.
fn printed(piece: &Piece) -> Value {
    let text = piece.text.replace("{ /* build config */ }", "{}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", piece.heading))
}

/// The request that a piece of a request makes, with what it leaves to the reader.
fn completed(piece: &Value) -> Option<Value> {
    let (name, part) = piece.as_object()?.iter().next()?;
    if name == "config" {
        return Some(piece.clone());
    }
    let mut body = create_body();
    let config = &mut body["config"];
    let place = match name.as_str() {
        "docker_image" | "git_repository" | "archive" => "source",
        "microvm_rootfs" => "target",
        "docker_strategy" | "git_strategy" | "archive_strategy" => "strategy",
        "retry_policy" | "webhook" => {
            config[name] = part.clone();
            return Some(body);
        }
        _ => return None,
    };
    config[place] = json!({ name: part });
    Some(body)
}

/// Asserts that everything printed is there, of the same kind.
fn like(printed: &Value, real: &Value, path: &str) {
    match (printed, real) {
        (Value::Object(printed), Value::Object(real)) => {
            for (name, value) in printed {
                let found = real.get(name).unwrap_or_else(|| panic!("{path}.{name} is missing"));
                like(value, found, &format!("{path}.{name}"));
            }
        }
        (Value::Array(printed), Value::Array(real)) => {
            if let (Some(printed), Some(real)) = (printed.first(), real.first()) {
                like(printed, real, &format!("{path}[]"));
            }
        }
        (Value::String(_), Value::String(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::Bool(_), Value::Bool(_)) => {}
        (printed, real) => panic!("{path}: {printed} is printed, {real} is answered"),
    }
}

#[tokio::test]
async fn every_documented_request_works_or_is_refused_by_name() {
    let server = Server::start(Mode::Development).await;
    let mut refused = BTreeMap::new();
    let mut sent = 0;
    for piece in pieces().iter().filter(|piece| piece.language == "json") {
        if piece.heading.ends_with("/ Response") || piece.heading == "Standard Error Response" {
            continue;
        }
        let printed = printed(piece);
        let name = (piece.document.clone(), piece.heading.clone());
        sent += 1;
        if piece.heading == "CancelBuild / Request" {
            let mut body = printed;
            body["build_id"] = json!(server.create("tenant-123").await);
            let reply = send(server.rpc("CancelBuild", &body).header("x-tenant-id", "tenant-123"));
            assert_eq!(reply.await.well()["success"], true);
            continue;
        }
        let body = completed(&printed).unwrap_or_else(|| panic!("{name:?} goes nowhere"));
        let request = server.rpc("CreateBuild", &body).header("x-tenant-id", "tenant-123");
        let reply = send(request).await;
        match unimplemented(&reply) {
            Some(what) => drop(refused.insert(name, what)),
            None => assert_eq!(reply.well()["status"], "BUILD_STATUS_QUEUED", "{name:?}"),
        }
    }
    assert_eq!(sent, 16);
    assert_eq!(refused, later("json"));
    let table: BTreeSet<&str> =
        crate::api::convert::UNIMPLEMENTED.iter().map(|later| later.what).collect();
    assert!(LATER.iter().all(|(_, _, what)| table.contains(what)));
    server.stop().await;
}

#[tokio::test]
async fn every_documented_answer_is_given_as_printed() {
    let server = Server::start_with(Mode::Development, crate::tenant::Tier::Pro).await;
    let request = server.rpc("CreateBuild", &create_body()).header("x-tenant-id", "tenant-123");
    let created = send(request).await.well();
    let id = created["build_id"].as_str().unwrap().to_owned();
    let claimed = server.claim().await;
    let lease = server.store.lease(&claimed.lease);
    let (state, now) = (crate::build::state::BuildState::Downloading, claimed.build.updated_at);
    lease.progress(state, 45, "Extracting Docker layers", now.plus_secs(1)).await.unwrap();
    let so_far = BuildMetrics::default();
    let usage = LiveUsage { memory_bytes: 1 << 29, cpu_percent: 75, disk_bytes: 1 << 30, so_far };
    lease.heartbeat(60, Some(&usage), now.plus_secs(2)).await.unwrap();
    let get = |route: String| send(server.plain(&route).header("x-tenant-id", "tenant-123"));
    let running = get(format!("GetBuildStatus/{id}")).await.well();
    assert_eq!(running["progress"]["stage"], "EXTRACTION");
    assert_eq!(running["progress"]["percentage"], 45);
    assert_eq!(running["progress"]["current_step"], "Extracting Docker layers");
    let remaining = running["progress"]["estimated_duration"].as_str().unwrap();
    assert!(remaining.strip_suffix('s').unwrap().parse::<u64>().is_ok(), "{remaining}");
    assert_eq!(running["resource_usage"]["memory_used_bytes"], 536_870_912);
    server.complete(&claimed, b"image", "none").await;
    let list = get("ListBuilds?tenant_id=tenant-123&limit=50&offset=0".into()).await.well();

    let mut compared = 0;
    for piece in pieces() {
        let real = match piece.heading.as_str() {
            "CreateBuild / Response" => &created,
            "GetBuildStatus / Response" => &running,
            "ListBuilds / Response" => &list,
            _ => continue,
        };
        compared += 1;
        like(&printed(&piece), real, &piece.heading);
    }
    assert_eq!(compared, 3);
    let limits = &created["tenant_context"]["resource_limits"];
    assert_eq!(limits["max_memory_bytes"], 2_147_483_648u64);
    assert_eq!((&limits["max_cpu_cores"], &limits["timeout_seconds"]), (&json!(2), &json!(900)));
    server.stop().await;
}

/// A curl line, as a shell would pass it on.
#[derive(Debug)]
struct Curl {
    method: Method,
    url: String,
    headers: Vec<(String, String)>,
    data: Option<String>,
}

/// The words of a shell script, with its variables put in; a line's end is a word of its own.
fn words(script: &str, variables: &BTreeMap<&str, String>) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut letters = script.chars().peekable();
    while let Some(letter) = letters.next() {
        match (letter, quote) {
            (letter, Some(open)) if letter == open => quote = None,
            ('\'' | '"', None) => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            ('\\', None) if letters.peek() == Some(&'\n') => {
                letters.next();
            }
            ('#', None) if word.is_none() => {
                while letters.peek().is_some_and(|next| *next != '\n') {
                    letters.next();
                }
            }
            ('\n', None) => {
                words.extend(word.take());
                words.push("\n".to_owned());
            }
            (' ', None) => words.extend(word.take()),
            ('$', None | Some('"')) => {
                let mut name = String::new();
                while let Some(next) =
                    letters.next_if(|next| next.is_alphanumeric() || *next == '_')
                {
                    name.push(next);
                }
                word.get_or_insert_default().push_str(&variables[name.as_str()]);
            }
            (letter, _) => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

fn curls(script: &str, variables: &BTreeMap<&str, String>) -> Vec<Curl> {
    let words = words(script, variables);
    let lines = words.split(|word| word == "\n").filter(|line| !line.is_empty());
    let mut curls = Vec::new();
    for line in lines {
        let Some((program, arguments)) = line.split_first() else { continue };
        if program != "curl" {
            assert!(program.starts_with("BUILD_ID="), "{program}");
            continue;
        }
        let mut curl =
            Curl { method: Method::GET, url: String::new(), headers: vec![], data: None };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().unwrap().clone();
            match argument.as_str() {
                "-X" => curl.method = value().parse().unwrap(),
                "-H" => {
                    let (name, value) = value().split_once(": ").map(own).unwrap();
                    curl.headers.push((name, value));
                }
                "-d" => curl.data = Some(value()),
                "-o" => drop(value()),
                url => curl.url = url.to_owned(),
            }
        }
        curls.push(curl);
    }
    curls
}

fn own((name, value): (&str, &str)) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// Sends it as curl would, to our port.
async fn run(server: &Server, curl: &Curl, tenant: &str) -> Reply {
    let path = curl.url.trim_start_matches("http://localhost:8082");
    let mut request = server.request(curl.method.clone(), path);
    let mut headers = curl.headers.clone();
    let is_named = |name: &str, headers: &[(String, String)]| {
        headers.iter().any(|(known, _)| known.eq_ignore_ascii_case(name))
    };
    if let Some(data) = &curl.data {
        // An ellipsis stands for the reader's own config.
        request = request.body(data.replace("{...}", &create_body()["config"].to_string()));
        if !is_named("content-type", &headers) {
            let form = "application/x-www-form-urlencoded".to_owned();
            headers.push(("content-type".to_owned(), form));
        }
    } else if !is_named("x-tenant-id", &headers) {
        // The workflow document leaves it out where it shows routes only.
        headers.push(("X-Tenant-ID".to_owned(), tenant.to_owned()));
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    send(request).await
}

#[tokio::test]
async fn every_documented_curl_line_works_or_is_refused_by_name() {
    let server = Server::start(Mode::Development).await;
    let id = server.create("tenant-123").await;
    let claimed = server.claim().await;
    server.complete(&claimed, b"an image", "none").await;
    let variables = BTreeMap::from([("BUILD_ID", id.clone())]);
    let mut ran = Vec::new();
    let mut refused = BTreeMap::new();
    for piece in pieces().iter().filter(|piece| piece.language == "bash") {
        let script = piece.text.replace("/BUILD_ID", "/$BUILD_ID");
        for curl in curls(&script, &variables) {
            let reply = run(&server, &curl, "tenant-123").await;
            if let Some(what) = unimplemented(&reply) {
                refused.insert((piece.document.clone(), piece.heading.clone()), what);
                continue;
            }
            assert_eq!(reply.status, StatusCode::OK, "{curl:?}: {reply:?}");
            let route = curl.url.split('/').find(|part| part.starts_with(char::is_uppercase));
            let route = route.unwrap().to_owned();
            match route.as_str() {
                "CreateBuild" => assert_eq!(reply.json()["status"], "BUILD_STATUS_QUEUED"),
                "GetBuildStatus" => assert_eq!(reply.json()["status"], "BUILD_STATUS_COMPLETED"),
                "GetBuildArtifact" => assert_eq!(reply.body, b"an image"),
                other => panic!("{other} has no expectation"),
            }
            ran.push(route);
        }
    }
    let three = ["CreateBuild", "GetBuildStatus", "GetBuildArtifact"];
    assert_eq!(ran, [three, three].concat());
    assert_eq!(refused, later("bash"));
    server.stop().await;
}
