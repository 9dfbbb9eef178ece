//! Stories about `builderd serve` as a whole: a real server process, a registry in this one.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use oci::testing::{Access, Fault, TestRegistry};
use serde_json::{Value, json};

use crate::support::{Layer, TestImage, Workshop, stderr};

mod commands;
mod encryption;
mod hosts;
mod view;
mod walls;

const RPC: &str = "/builder.v1.BuilderService";
/// Long enough for the slowest machine; a story that works never waits so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server of its own, with its data in a directory that several of them may use in turn.
struct Server {
    child: Child,
    address: String,
    http: reqwest::blocking::Client,
    /// In its log, up to the line that it listens.
    said: String,
}

impl Server {
    fn start(directory: &Path, settings: &[(&str, &str)]) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_builderd")), directory, settings)
    }

    /// By a command that takes the program's arguments.
    fn start_by(mut command: Command, directory: &Path, settings: &[(&str, &str)]) -> Self {
        command
            .args(["serve", "--dev", "--listen", "127.0.0.1:0"])
            .env_clear()
            .env("UNKEY_BUILDERD_DATABASE_DATA_DIR", directory.join("data"))
            .env("UNKEY_BUILDERD_ROOTFS_OUTPUT_DIR", directory.join("rootfs"))
            .env("UNKEY_BUILDERD_CACHE_DIR", directory.join("cache"))
            .env("UNKEY_BUILDERD_OTEL_PROMETHEUS_ENABLED", "false")
            .env("UNKEY_BUILDERD_SHUTDOWN_TIMEOUT", "1s")
            .envs(settings.iter().map(|(name, value)| (format!("UNKEY_BUILDERD_{name}"), value)))
            .current_dir(directory)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let address = loop {
            let Some(line) = lines.next() else { panic!("the server did not start:\n{said}") };
            let line = line.unwrap();
            said.push_str(&line);
            said.push('\n');
            if let Ok(line) = serde_json::from_str::<Value>(&line)
                && line["message"].as_str().or(line["fields"]["message"].as_str())
                    == Some("listening")
            {
                let field = line["address"].as_str().or(line["fields"]["address"].as_str());
                break field.unwrap().to_owned();
            }
        };
        assert!(said.contains("\"development mode: "), "each start says so: {said}");
        // The server must not wait for a full pipe.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if std::env::var_os("BUILDERD_TEST_LOG").is_some() {
                    eprintln!("{line}");
                }
            }
        });
        let http = reqwest::blocking::Client::builder().no_proxy().build().unwrap();
        Self { child, address, http, said }
    }

    fn call(&self, tenant: &str, method: &str, body: &Value) -> (u16, Value) {
        let answer = self
            .http
            .post(format!("http://{}{RPC}/{method}", self.address))
            .header("Content-Type", "application/json")
            .header("X-Tenant-ID", tenant)
            .body(body.to_string())
            .send()
            .unwrap();
        let status = answer.status().as_u16();
        (status, serde_json::from_slice(&answer.bytes().unwrap()).unwrap())
    }

    fn well(&self, tenant: &str, method: &str, body: &Value) -> Value {
        let (status, answer) = self.call(tenant, method, body);
        assert_eq!(status, 200, "{method}: {answer}");
        answer
    }

    fn create(&self, tenant: &str, image: &str) -> String {
        let answer = self.well(tenant, "CreateBuild", &order(image));
        answer["build_id"].as_str().unwrap().to_owned()
    }

    fn build(&self, tenant: &str, id: &str) -> Value {
        self.well(tenant, "GetBuild", &json!({"build_id": id}))["build"].clone()
    }

    /// Waits until the build's state is one of `states`.
    fn wait(&self, tenant: &str, id: &str, states: &[&str]) -> Value {
        let started = Instant::now();
        loop {
            let build = self.build(tenant, id);
            if states.contains(&build["state"].as_str().unwrap()) {
                return build;
            }
            assert!(started.elapsed() < PATIENCE, "still waiting: {build:#}");
            // Not faster than the tier may ask.
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn finished(&self, tenant: &str, id: &str) -> Value {
        let ends = ["BUILD_STATE_COMPLETED", "BUILD_STATE_FAILED", "BUILD_STATE_CANCELLED"];
        self.wait(tenant, id, &ends)
    }

    fn artifact(&self, tenant: &str, id: &str) -> Vec<u8> {
        let answer = self
            .http
            .get(format!("http://{}{RPC}/GetBuildArtifact/{id}", self.address))
            .header("X-Tenant-ID", tenant)
            .send()
            .unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        answer.bytes().unwrap().to_vec()
    }

    /// Lines of the log.
    fn log(&self, tenant: &str, id: &str) -> String {
        self.http
            .get(format!("http://{}{RPC}/GetBuildLogs/{id}", self.address))
            .header("X-Tenant-ID", tenant)
            .send()
            .unwrap()
            .text()
            .unwrap()
    }

    /// Metrics as Prometheus reads them.
    fn metrics(&self) -> String {
        let answer = self.http.get(format!("http://{}/metrics", self.address)).send().unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        answer.text().unwrap()
    }

    /// One of them, if it is there.
    fn metric(&self, name: &str) -> Option<f64> {
        let text = self.metrics();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map(|value| value.parse().unwrap())
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn end(mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn order(image: &str) -> Value {
    json!({"config": {
        "tenant": {"tier": "TENANT_TIER_PRO"},
        "source": {"docker_image": {"image_uri": image}},
        "target": {"microvm_rootfs": {"init_strategy": "INIT_STRATEGY_DIRECT"}},
        "strategy": {"docker_extract": {}},
    }})
}

/// A registry with one image, `app:latest`, and a place for a server.
struct Stage {
    registry: TestRegistry,
    workshop: Workshop,
    image: TestImage,
}

impl Stage {
    fn new() -> Self {
        let content: Vec<u8> = (0..=250u8).cycle().step_by(7).take(3_000_000).collect();
        let base = Layer::new().directory("bin").file("bin/app", b"app").file("data", &content);
        let image = TestImage::new(vec![base, Layer::new().file("etc/conf", b"x=1")]);
        let stage =
            Self { registry: TestRegistry::start().unwrap(), workshop: Workshop::new(), image };
        stage.push("app", &["latest", "other"]);
        stage
    }

    fn push(&self, repository: &str, tags: &[&str]) {
        let config = serde_json::to_vec(&self.image.config).unwrap();
        for blob in &self.image.blobs {
            self.registry.put_blob(blob.clone());
        }
        self.registry.put_blob(config.clone());
        let manifest = self.image.manifest(&config);
        for tag in tags {
            let media_type = "application/vnd.oci.image.manifest.v1+json";
            self.registry.put_manifest_bytes(repository, Some(tag), media_type, manifest.clone());
        }
    }

    fn reference(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.registry.host())
    }

    fn serve(&self, settings: &[(&str, &str)]) -> Server {
        let host = self.registry.host();
        let mut all = vec![("DOCKER_INSECURE_REGISTRIES", host.as_str())];
        all.extend(settings);
        Server::start(self.workshop.directory.path(), &all)
    }

    fn staged(&self) -> Vec<String> {
        self.workshop.names("rootfs/staging")
    }

    /// The large layer comes to a standstill after some bytes, so many times.
    fn stall(&self, times: usize) {
        let layer = crate::support::sha256(&self.image.blobs[0]);
        for _ in 0..times {
            self.registry.fault(&layer, Fault::StallAfter(1000));
        }
    }

    /// Build processes of this stage's server.
    fn children(&self) -> usize {
        self.processes().len()
    }

    /// Their directories in `/proc`.
    fn processes(&self) -> Vec<PathBuf> {
        let staging = self.workshop.path("rootfs/staging");
        let is_ours = |pid: &PathBuf| {
            std::fs::read_link(pid.join("cwd")).is_ok_and(|cwd| cwd.starts_with(&staging))
        };
        std::fs::read_dir("/proc")
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(is_ours)
            .collect()
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "still not: {what}");
        // A tenant of the smallest tier may ask 300 times in a minute.
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_build_by_the_service_is_the_image_that_the_command_makes() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let id = server.create("t1", &stage.reference("latest"));
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    assert_eq!(build["status"], "BUILD_STATUS_COMPLETED");
    assert_eq!(build["progress_percent"], 100);
    assert_eq!(build["image_metadata"]["entrypoint"], json!(["/bin/app"]));
    assert_eq!(build["image_metadata"]["original_image"], stage.reference("latest"));
    let artifact = server.artifact("t1", &id);
    assert_eq!(build["rootfs_checksum"], crate::support::sha256(&artifact));
    let host = stage.registry.host();
    let image = stage.reference("latest");
    let result = stage.workshop.run(&["build", &image, "-o", "own.ext4", "--plain-http", &host]);
    assert!(result.status.success());
    assert!(stage.workshop.read("own.ext4") == artifact, "the same bytes");
    assert_eq!(std::fs::read(build["rootfs_path"].as_str().unwrap()).unwrap(), artifact);
    assert_eq!(stage.staged(), Vec::<String>::new());
    let log = server.log("t1", &id);
    assert!(log.contains("completed:") && log.contains("layer sha256:"), "{log}");
}

#[test]
fn the_same_image_under_another_tag_is_not_built_again() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let first = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    let blobs = |stage: &Stage| {
        stage.registry.requests().iter().filter(|request| request.path.contains("/blobs/")).count()
    };
    let before = blobs(&stage);
    // The config is read again: the registry must still let this tenant have the image.
    let second = server.finished("t2", &server.create("t2", &stage.reference("other")));
    assert_eq!(second["rootfs_checksum"], first["rootfs_checksum"]);
    assert_eq!(second["image_metadata"]["original_image"], stage.reference("other"));
    assert!(blobs(&stage) <= before + 1, "no layer was fetched");
}

#[test]
fn what_was_pulled_with_credentials_is_not_shared_and_the_password_is_nowhere() {
    let stage = Stage::new();
    let canary = "canary-7f3a91";
    stage.registry.set_access(Access::Basic("me".into(), canary.into()));
    let server = stage.serve(&[]);
    let mut with_password = order(&stage.reference("latest"));
    with_password["config"]["source"]["docker_image"]["registry_auth"] =
        json!({"username": "me", "password": canary});
    let answer = server.well("t1", "CreateBuild", &with_password);
    let id = answer["build_id"].as_str().unwrap().to_owned();
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    assert!(build["rootfs_path"].as_str().unwrap().contains("tenant-t1"), "{build:#}");
    let mut wrong = order(&stage.reference("latest"));
    wrong["config"]["source"]["docker_image"]["registry_auth"] =
        json!({"username": "me", "password": "wrong"});
    let answer = server.well("t2", "CreateBuild", &wrong);
    let refused = server.finished("t2", answer["build_id"].as_str().unwrap());
    let remedy = refused["failure"]["remedy"].as_str().unwrap();
    assert!(remedy.starts_with("check the credentials that were sent"), "{refused:#}");
    let other = server.finished("t2", &server.create("t2", &stage.reference("latest")));
    assert_eq!(other["state"], "BUILD_STATE_FAILED");
    assert_eq!(other["failure"]["code"], "AUTHENTICATION_FAILED", "{other:#}");
    assert_eq!(other["failure"]["blame"], "yours");
    let remedy = other["failure"]["remedy"].as_str().unwrap();
    assert!(remedy.contains("with the build") && !remedy.contains("docker login"), "{remedy}");
    let said = format!("{build}{}", server.log("t1", &id));
    assert!(!said.contains(canary));
    drop(server);
    assert_eq!(files_with(stage.workshop.directory.path(), canary), Vec::<PathBuf>::new());
}

/// Files below `directory` that contain `text`.
fn files_with(directory: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, text));
        } else if std::fs::read(&path)
            .is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
        {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_retry_asks_for_the_credentials_that_the_build_brought() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let retry = |id: &str, arguments: &[&str]| {
        let mut command = stage.workshop.command(&["builds", "retry", id, "--tenant", "t1"]);
        command.env("UNKEY_BUILDERD_SERVER_ADDRESS", &server.address).args(arguments);
        command.env("NO_PROXY", "127.0.0.1").stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A command that asks for nothing may have ended.
        let _ = child.stdin.take().unwrap().write_all(b"secret");
        child.wait_with_output().unwrap()
    };
    for name in ["auth", "registry_auth"] {
        let mut body = order(&stage.reference("latest"));
        body["config"]["source"]["docker_image"][name] =
            json!({"username": "me", "password": "secret"});
        let id = server.well("t1", "CreateBuild", &body)["build_id"].as_str().unwrap().to_owned();
        let output = retry(&id, &[]);
        assert_eq!(output.status.code(), Some(2), "{name}: {output:?}");
        assert!(stderr(&output).contains("--password-stdin"), "{}", stderr(&output));
        let output = retry(&id, &["--username", "me", "--password-stdin"]);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
    }
    let output = retry(&server.create("t1", &stage.reference("latest")), &[]);
    assert!(output.status.success(), "it brought none: {}", stderr(&output));
}

#[test]
fn a_queued_build_keeps_its_password_sealed() {
    let stage = Stage::new();
    let canary = "canary-2b8c44";
    let server = stage.serve(&[("MAX_CONCURRENT_BUILDS", "1")]);
    stage.stall(10);
    let busy = server.create("t1", &stage.reference("latest"));
    server.wait("t1", &busy, &["BUILD_STATE_EXTRACTING"]);
    let mut waiting = order(&stage.reference("other"));
    waiting["config"]["source"]["docker_image"]["auth"] =
        json!({"username": "me", "password": canary});
    let id = server.well("t2", "CreateBuild", &waiting)["build_id"].as_str().unwrap().to_owned();
    assert_eq!(server.build("t2", &id)["state"], "BUILD_STATE_PENDING");
    assert_eq!(files_with(stage.workshop.directory.path(), canary), Vec::<PathBuf>::new());
    assert!(!server.build("t2", &id).to_string().contains(canary));
}

#[test]
fn a_running_build_is_cancelled_within_a_second_and_leaves_nothing() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    stage.stall(10);
    let id = server.create("t1", &stage.reference("latest"));
    server.wait("t1", &id, &["BUILD_STATE_EXTRACTING"]);
    eventually("a build process", || stage.children() == 1);
    let asked = Instant::now();
    server.well("t1", "CancelBuild", &json!({"build_id": id, "reason": "changed my mind"}));
    let build = server.wait("t1", &id, &["BUILD_STATE_CANCELLED"]);
    assert!(asked.elapsed() < Duration::from_millis(1500), "took {:?}", asked.elapsed());
    assert_eq!(build["status"], "BUILD_STATUS_CANCELLED");
    let log = server.log("t1", &id);
    let last = "cancelled by development while it ran: changed my mind";
    assert!(log.contains(last), "{log}");
    eventually("no build process", || stage.children() == 0);
    eventually("no staged file", || stage.staged().is_empty());
}

#[test]
fn a_build_survives_the_death_of_its_server() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    stage.stall(1);
    let id = server.create("t1", &stage.reference("latest"));
    server.wait("t1", &id, &["BUILD_STATE_EXTRACTING"]);
    // Or the next server would be the one that waits for it.
    eventually("a layer that stands still", || stage.registry.faults_left() == 0);
    server.signal(rustix::process::Signal::KILL);
    server.end();
    eventually("no build process", || stage.children() == 0);
    let started = Instant::now();
    let server = stage.serve(&[]);
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    assert_eq!(build["attempts"].as_array().map(Vec::len), Some(1), "{build:#}");
    // Its lease would have run for longer: on SQLite nobody waits for a server that is gone.
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(stage.staged(), Vec::<String>::new());
}

#[test]
fn a_server_that_stops_puts_its_builds_back_into_the_queue() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    stage.stall(1);
    let id = server.create("t1", &stage.reference("latest"));
    server.wait("t1", &id, &["BUILD_STATE_EXTRACTING"]);
    // Or the next server would be the one that waits for it.
    eventually("a layer that stands still", || stage.registry.faults_left() == 0);
    server.signal(rustix::process::Signal::TERM);
    assert!(server.end().success());
    assert_eq!(stage.staged(), Vec::<String>::new());
    let server = stage.serve(&[]);
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    assert!(build["attempts"].as_array().is_none_or(Vec::is_empty), "a stop counts no try");
}

#[test]
fn a_build_that_takes_too_long_ends_as_timed_out() {
    let stage = Stage::new();
    let server = stage.serve(&[("BUILD_TIMEOUT", "1s")]);
    stage.stall(10);
    let id = server.create("t1", &stage.reference("latest"));
    let build = server.wait("t1", &id, &["BUILD_STATE_FAILED"]);
    assert_eq!(build["status"], "BUILD_STATUS_TIMEOUT", "{build:#}");
    assert_eq!(build["failure"]["code"], "BUILD_TIMEOUT");
    eventually("no build process", || stage.children() == 0);
}

#[test]
fn a_node_runs_no_more_builds_at_once_than_it_may() {
    let stage = Stage::new();
    let server = stage.serve(&[("MAX_CONCURRENT_BUILDS", "2")]);
    stage.stall(20);
    // Three artifacts of three tenants: nothing else keeps one from running.
    let ids = [("t1", "none"), ("t2", "gzip"), ("t3", "zstd")].map(|(tenant, compression)| {
        let mut order = order(&stage.reference("latest"));
        order["config"]["target"]["microvm_rootfs"]["compression"] = json!(compression);
        let id = server.well(tenant, "CreateBuild", &order)["build_id"].clone();
        (tenant, id.as_str().unwrap().to_owned())
    });
    let counts = || -> Value {
        let answer = server.http.get(format!("http://{}/stats", server.address)).send().unwrap();
        serde_json::from_slice::<Value>(&answer.bytes().unwrap()).unwrap()["builds"].clone()
    };
    let full = json!({"queued": 1, "running": 2});
    eventually("two run", || counts() == full);
    // A worker more would have found the third at once.
    for _ in 0..10 {
        assert_eq!(counts(), full);
        std::thread::sleep(Duration::from_millis(100));
    }
    let waits =
        |(tenant, id): &(&str, String)| server.build(tenant, id)["state"] == "BUILD_STATE_PENDING";
    let (waiting, running): (Vec<_>, Vec<_>) = ids.iter().partition(|build| waits(build));
    let (tenant, id) = running[0];
    server.well(tenant, "CancelBuild", &json!({"build_id": id}));
    eventually("the third has its turn", || !waits(waiting[0]));
}

#[test]
fn a_registry_that_has_had_enough_is_asked_again_later() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    // It names a time for which nobody waits who holds a worker meanwhile.
    let enough = || Fault::Status(429, vec![("Retry-After".into(), "3600".into())]);
    let ordered = |policy: Value| {
        let mut order = order(&stage.reference("latest"));
        order["config"]["retry_policy"] = policy;
        server.well("t1", "CreateBuild", &order)["build_id"].as_str().unwrap().to_owned()
    };
    for _ in 0..2 {
        stage.registry.fault("/manifests/latest", enough());
    }
    let started = Instant::now();
    let id = ordered(json!({"base_delay": "1s"}));
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let waited = started.elapsed();
    assert!(waited >= Duration::from_secs(1 + 2), "{waited:?}");
    let attempts = build["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2, "{build:#}");
    for (attempt, number) in attempts.iter().zip(1..) {
        assert_eq!(attempt["attempt"], number, "{attempt:#}");
        assert_eq!(attempt["failure"]["code"], "REGISTRY_RATE_LIMIT", "{attempt:#}");
        assert_eq!(attempt["failure"]["blame"], "upstream", "{attempt:#}");
    }

    // Who wants no second try has none, and the reason at once.
    stage.registry.fault("/manifests/latest", enough());
    let build = server.finished("t1", &ordered(json!({"max_retries": 0})));
    assert_eq!(build["failure"]["code"], "REGISTRY_RATE_LIMIT", "{build:#}");
    assert!(build["attempts"].as_array().is_none_or(Vec::is_empty), "{build:#}");
    assert_eq!(stage.registry.faults_left(), 0);
}

#[test]
fn a_failed_build_says_what_is_wrong_whose_fault_it_is_and_what_to_do() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let id = server.create("t1", &stage.reference("missing"));
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_FAILED");
    let failure = &build["failure"];
    assert_eq!(failure["code"], "INVALID_SOURCE", "{build:#}");
    assert_eq!(failure["blame"], "yours");
    assert_eq!(failure["step"], "resolve");
    assert!(failure["cause"].as_str().unwrap().contains("missing"), "{build:#}");
    assert!(build["error_message"].as_str().unwrap().contains("missing"));
}

#[test]
fn an_image_larger_than_the_request_allows_fails_before_it_is_written() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let mut small = order(&stage.reference("latest"));
    small["config"]["target"]["microvm_rootfs"]["size_limit_bytes"] = json!(1_000_000);
    let id = server.well("t1", "CreateBuild", &small)["build_id"].as_str().unwrap().to_owned();
    let build = server.finished("t1", &id);
    assert_eq!(build["failure"]["code"], "INVALID_SOURCE", "{build:#}");
    assert!(build["failure"]["cause"].as_str().unwrap().contains("1000000"), "{build:#}");
    assert_eq!(stage.staged(), Vec::<String>::new());
}

#[test]
fn tags_are_tried_where_the_image_names_none() {
    let stage = Stage::new();
    stage.push("tool", &["v2", "v1"]);
    let server = stage.serve(&[]);
    let mut open = order(&format!("{}/tool", stage.registry.host()));
    let image = &mut open["config"]["source"]["docker_image"];
    image["pull_tags"] = json!(["v3", "v2"]);
    let id = server.well("t1", "CreateBuild", &open)["build_id"].as_str().unwrap().to_owned();
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    let asked = |tag: &str| {
        let end = format!("/tool/manifests/{tag}");
        stage.registry.requests().iter().any(|request| request.path.ends_with(&end))
    };
    assert!(asked("latest") && asked("v3") && asked("v2") && !asked("v1"));
    // A tag that is named is the one that is meant.
    let mut closed = order(&format!("{}/tool:v9", stage.registry.host()));
    closed["config"]["source"]["docker_image"]["pull_tags"] = json!(["v1"]);
    let id = server.well("t1", "CreateBuild", &closed)["build_id"].as_str().unwrap().to_owned();
    assert_eq!(server.finished("t1", &id)["failure"]["code"], "INVALID_SOURCE");
}

#[test]
fn a_name_that_is_a_file_for_the_command_is_an_image_for_the_service() {
    let stage = Stage::new();
    let mirror = format!("docker.io={}", stage.registry.host());
    let server = stage.serve(&[("DOCKER_REGISTRY_MIRROR", &mirror)]);
    // The server runs in this directory.
    stage.workshop.path("secret.tar");
    std::fs::write(stage.workshop.path("secret.tar"), b"no archive").unwrap();
    for name in ["docker-archive:secret.tar", "oci-archive:secret.tar", "oci:data"] {
        let mut once = order(name);
        once["config"]["retry_policy"] = json!({"max_retries": 0});
        let id = server.well("t1", "CreateBuild", &once)["build_id"].as_str().unwrap().to_owned();
        let build = server.finished("t1", &id);
        // The mirror has no such image, and Docker Hub is out of reach or has none either.
        let code = build["failure"]["code"].as_str().unwrap();
        assert!(["INVALID_SOURCE", "NETWORK_ERROR"].contains(&code), "{build:#}");
        let said = format!("{build}{}", server.log("t1", &id));
        assert!(said.contains("docker.io/library/"), "{said}");
        assert!(!said.contains("archive is"), "{said}");
    }
}

#[test]
fn builds_of_one_image_at_once_make_it_once() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    // Long enough for all of them to be there before the first has ended.
    let ids: Vec<String> =
        (0..4).map(|_| server.create("t1", &stage.reference("latest"))).collect();
    let made = ids.iter().filter(|id| {
        let build = server.finished("t1", id);
        assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
        !server.log("t1", id).contains("the same image was built before")
    });
    assert_eq!(made.count(), 1);
}

#[test]
fn a_build_that_may_not_take_anothers_artifact_does_not_wait_for_it() {
    let stage = Stage::new();
    let server = stage.serve(&[("STORAGE_CACHE_ENABLED", "false")]);
    stage.stall(1);
    let slow = server.create("t1", &stage.reference("latest"));
    eventually("a layer that stands still", || stage.registry.faults_left() == 0);
    let id = server.create("t2", &stage.reference("latest"));
    let build = server.finished("t2", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    assert_eq!(server.build("t1", &slow)["state"], "BUILD_STATE_EXTRACTING");
}

#[test]
fn a_mirror_that_is_passed_over_is_in_the_log() {
    let stage = Stage::new();
    let mirror = format!("{}=127.0.0.1:1", stage.registry.host());
    let server = stage.serve(&[("DOCKER_REGISTRY_MIRROR", &mirror)]);
    // The second takes the artifact of the first: nobody but the worker asks the mirror.
    for from_cache in [false, true] {
        let id = server.create("t1", &stage.reference("latest"));
        let build = server.finished("t1", &id);
        assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
        let log = server.log("t1", &id);
        assert_eq!(log.contains("the same image was built before"), from_cache, "{log}");
        assert!(log.contains("mirror 127.0.0.1:1 was passed over: "), "{log}");
    }
}

#[test]
fn a_mirror_that_is_passed_over_is_in_the_log_of_a_build_that_ran_out_of_time() {
    let stage = Stage::new();
    let mirror = format!("{}=127.0.0.1:1", stage.registry.host());
    let settings = [("DOCKER_REGISTRY_MIRROR", &*mirror), ("DOCKER_PULL_TIMEOUT", "2s")];
    let server = stage.serve(&settings);
    stage.registry.fault("manifests", Fault::StallAfter(0));
    let mut once = order(&stage.reference("latest"));
    once["config"]["retry_policy"] = json!({"max_retries": 0});
    let id = server.well("t1", "CreateBuild", &once)["build_id"].as_str().unwrap().to_owned();
    let build = server.finished("t1", &id);
    let cause = build["failure"]["cause"].as_str().unwrap();
    assert!(cause.contains("longer than 2 seconds"), "{build:#}");
    let log = server.log("t1", &id);
    assert!(log.contains("mirror 127.0.0.1:1 was passed over: "), "{log}");
}

#[test]
fn an_artifact_larger_than_the_disk_is_given_to_nobody() {
    let stage = Stage::new();
    stage.push("library/app", &["latest"]);
    let mirror = format!("docker.io={}", stage.registry.host());
    let mirrored = ("DOCKER_REGISTRY_MIRROR", mirror.as_str());
    let server = stage.serve(&[mirrored]);
    let first = server.finished("t1", &server.create("t1", "app"));
    assert_eq!(first["state"], "BUILD_STATE_COMPLETED", "{first:#}");
    drop(server);
    // Smaller than the image.
    let server = stage.serve(&[mirrored, ("TENANT_DEFAULT_MAX_DISK_BYTES", "2000000")]);
    let mut known = order("app");
    known["config"]["tenant"]["tier"] = json!("TENANT_TIER_FREE");
    let id = server.well("t2", "CreateBuild", &known)["build_id"].as_str().unwrap().to_owned();
    let build = server.finished("t2", &id);
    assert_eq!(build["state"], "BUILD_STATE_FAILED", "{build:#}");
    assert!(build["failure"]["cause"].as_str().unwrap().contains("2000000"), "{build:#}");
}

#[test]
fn a_running_build_shows_what_it_takes() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    stage.stall(10);
    let id = server.create("t1", &stage.reference("latest"));
    let usage = |build: &Value, name: &str| build["resource_usage"][name].as_u64().unwrap_or(0);
    let mut build = Value::Null;
    eventually("a process with memory", || {
        std::thread::sleep(Duration::from_millis(200));
        build = server.build("t1", &id);
        usage(&build, "memory_used_bytes") > 0
    });
    assert_eq!(build["state"], "BUILD_STATE_EXTRACTING", "{build:#}");
    let memory = usage(&build, "memory_used_bytes");
    // Of the engine, not of a page or of the whole machine.
    assert!((1 << 20..1 << 30).contains(&memory), "{build:#}");
    let metrics = &build["metrics"];
    assert!(metrics["memory_peak_bytes"].as_u64().unwrap() >= memory, "{build:#}");
    assert!(metrics["total_duration_ms"].as_u64().unwrap() > 0, "{build:#}");
    let blobs: usize = stage.image.blobs.iter().map(Vec::len).sum();
    assert_eq!(metrics["original_size_bytes"], blobs, "{build:#}");
    assert!(server.metric("builderd_memory_usage_bytes").unwrap() > 0.0);
    if std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 1) {
        // The small layer comes while the large one stands still.
        let small = stage.image.blobs[1].len();
        eventually("the small layer is there", || {
            std::thread::sleep(Duration::from_millis(200));
            build = server.build("t1", &id);
            usage(&build, "downloaded_bytes") == small as u64
        });
    }
    let before = build["metrics"]["total_duration_ms"].as_u64().unwrap();
    eventually("time goes on", || {
        std::thread::sleep(Duration::from_millis(200));
        server.build("t1", &id)["metrics"]["total_duration_ms"].as_u64().unwrap() > before
    });
    server.well("t1", "CancelBuild", &json!({"build_id": id}));
    let ended = server.wait("t1", &id, &["BUILD_STATE_CANCELLED"]);
    assert_eq!(ended["resource_usage"]["memory_used_bytes"], ended["metrics"]["memory_peak_bytes"]);
    eventually("nothing runs", || server.metric("builderd_memory_usage_bytes") == Some(0.0));
}

#[test]
fn pulls_caches_and_the_artifact_store_are_counted_where_they_are_used() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let first = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    let known = server.finished("t2", &server.create("t2", &stage.reference("other")));
    assert_eq!(first["rootfs_checksum"], known["rootfs_checksum"]);
    let missing = server.finished("t1", &server.create("t1", &stage.reference("missing")));
    assert_eq!(missing["state"], "BUILD_STATE_FAILED");
    server.artifact("t1", first["build_id"].as_str().unwrap());

    // What was measured of a build that was quick is true as well.
    let blobs: usize = stage.image.blobs.iter().map(Vec::len).sum();
    assert_eq!(first["resource_usage"]["downloaded_bytes"], blobs, "{first:#}");
    assert!(first["metrics"]["disk_usage_bytes"].as_u64().unwrap() > 0, "{first:#}");
    assert_eq!(known["resource_usage"]["downloaded_bytes"], 0, "{known:#}");

    let host = stage.registry.host();
    let pulls = |status: &str| {
        server.metric(&format!(
            "builderd_docker_pulls_total{{registry=\"{host}\",status=\"{status}\"}}"
        ))
    };
    assert_eq!(pulls("fetched"), Some(1.0), "{}", server.metrics());
    assert_eq!((pulls("known"), pulls("failed")), (Some(1.0), Some(1.0)));
    let timed = format!("builderd_docker_pull_duration_seconds_count{{registry=\"{host}\"}}");
    assert_eq!(server.metric(&timed), Some(1.0));
    let ratio =
        |cache: &str| server.metric(&format!("builderd_cache_hit_ratio{{cache_type=\"{cache}\"}}"));
    assert_eq!((ratio("artifacts"), ratio("layers")), (Some(0.5), Some(0.0)));
    let operations = |operation: &str| {
        let labels = format!("backend=\"local\",operation=\"{operation}\",status=\"ok\"");
        server.metric(&format!("builderd_storage_operations_total{{{labels}}}"))
    };
    assert_eq!((operations("put"), operations("get")), (Some(1.0), Some(1.0)));
    let failed = "builderd_build_step_errors_total{step=\"resolve\"}";
    assert_eq!(server.metric(failed), Some(1.0));
}

/// Does something to the database behind the server's back.
fn execute(stage: &Stage, statement: &'static str, key: &str) {
    let file = stage.workshop.path("data/builderd.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file);
    let work = async {
        let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
        sqlx::query(statement).bind(key.to_owned()).execute(&mut connection).await.unwrap();
        sqlx::Connection::close(connection).await.unwrap();
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
}

#[test]
fn a_build_waits_while_an_old_file_of_its_content_is_removed() {
    let stage = Stage::new();
    let server = stage.serve(&[]);
    let id = server.create("t1", &stage.reference("latest"));
    let build = server.finished("t1", &id);
    let path = PathBuf::from(build["rootfs_path"].as_str().unwrap());
    let parts: Vec<_> = path.iter().map(|part| part.to_str().unwrap()).collect();
    let key = parts[parts.len() - 2..].join("/");
    server.well("t1", "DeleteBuild", &json!({"build_id": id}));
    // A janitor that is about to remove the file that nothing names now.
    let begin = "INSERT INTO artifact_removal (artifact_key, expires_at) \
         VALUES ($1, 9000000000000000000) \
         ON CONFLICT (artifact_key) DO UPDATE SET expires_at = excluded.expires_at";
    execute(&stage, begin, &key);
    let id = server.create("t1", &stage.reference("latest"));
    eventually("it waits", || server.log("t1", &id).contains("is being removed; waiting"));
    assert_eq!(server.build("t1", &id)["completed_at"], Value::Null);
    // The server's own janitor may have been faster.
    let _ = std::fs::remove_file(&path);
    execute(&stage, "DELETE FROM artifact_removal WHERE artifact_key = $1", &key);
    let build = server.finished("t1", &id);
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    assert_eq!(Some(path.as_path()), build["rootfs_path"].as_str().map(Path::new));
    assert!(path.exists(), "the completed build has its file");
}

#[test]
fn a_registry_that_no_build_may_reach_is_refused_before_there_is_a_build() {
    let stage = Stage::new();
    let blocked = ("BLOCKED_DOMAINS", "evil.example");
    let server = stage.serve(&[blocked, ("EGRESS_ALLOWED_PRIVATE", "10.7.0.0/16")]);
    let mut free = order("quay.io/a/b");
    free["config"]["tenant"]["tier"] = json!("TENANT_TIER_FREE");
    for (ordered, rule) in [
        (order("127.0.0.1:1/x"), "127.0.0.1:1 may not be reached from here: it is a loopback"),
        (order("127.0.0.1:1/x"), "UNKEY_BUILDERD_EGRESS_ALLOWED_PRIVATE"),
        (order("2130706433:1/x"), "a loopback address"),
        (order("[::ffff:10.0.0.1]/x"), "a private address"),
        (order("169.254.169.254/latest/meta-data"), "a link-local address"),
        (order("hub.evil.example/x"), "the blocked domain evil.example"),
        (free, "docker.io, ghcr.io are"),
    ] {
        let (status, answer) = server.call("t1", "CreateBuild", &ordered);
        assert_eq!(status, 403, "{answer}");
        assert!(answer.to_string().contains("NETWORK_DENIED"), "{answer}");
        assert!(answer.to_string().contains(rule), "{rule}: {answer}");
    }
    let listed = server.well("t1", "ListBuilds", &json!({}));
    assert!(listed["builds"].as_array().is_none_or(Vec::is_empty), "{listed}");
    // What is allowed is asked for.
    server.create("t1", "10.7.0.1:1/x");
}

#[test]
fn a_redirect_to_a_neighbour_fails_the_build_at_once_and_asks_it_nothing() {
    let stage = Stage::new();
    let neighbour = TestRegistry::start().unwrap();
    let layer = crate::support::sha256(&stage.image.blobs[0]);
    neighbour.put_blob(stage.image.blobs[0].clone());
    let target = format!("http://{}/cdn/sha256:{layer}", neighbour.host());
    let server = stage.serve(&[]);
    stage.registry.fault(&layer, Fault::Redirect(target.clone()));
    let id = server.create("t1", &stage.reference("latest"));
    let build = server.finished("t1", &id);
    assert_eq!(build["failure"]["code"], "NETWORK_DENIED", "{build:#}");
    assert_eq!(build["failure"]["blame"], "yours", "{build:#}");
    let cause = build["failure"]["cause"].as_str().unwrap();
    let told = format!("{} may not be reached from here: it is a loopback", neighbour.host());
    assert!(cause.contains(&told), "{build:#}");
    let remedy = build["failure"]["remedy"].as_str().unwrap();
    assert!(remedy.contains("UNKEY_BUILDERD_EGRESS_ALLOWED_PRIVATE"), "{build:#}");
    assert!(build["attempts"].as_array().is_none_or(|tries| tries.len() <= 1), "{build:#}");
    assert!(neighbour.requests().is_empty());
    drop(server);
    // The same redirect, when the operator names the neighbour.
    let both = format!("{},{}", stage.registry.host(), neighbour.host());
    let server = stage.serve(&[("DOCKER_INSECURE_REGISTRIES", &both)]);
    stage.registry.fault(&layer, Fault::Redirect(target));
    let build = server.finished("t1", &server.create("t1", &stage.reference("latest")));
    assert_eq!(build["state"], "BUILD_STATE_COMPLETED", "{build:#}");
    assert_eq!(neighbour.requests().len(), 1);
}
