//! Stories about clients that other people wrote. Each lives one whole life of a build: create,
//! follow, get, list, cancel another one, look at quotas and figures, delete.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Verdict;
use super::lab::Lab;
use super::service::{place, slow_image, slowly};
use crate::images;
use crate::process::Program;
use crate::service::api::{Api, Order, SERVICE, number};
use crate::service::{Server, clients, free_port, until};

/// How many transports the Node.js client goes through.
const NODE_TRANSPORTS: usize = 14;

/// How long somebody else's program may take to do one thing.
const CLIENT_MAX: Duration = Duration::from_secs(120);

/// Those that a page goes through: once where it may, once where it may not.
const WEB_TRANSPORTS: [&str; 5] =
    ["connect-json", "connect-proto", "connect-get", "grpc-web-proto", "grpc-web-json"];

/// A service, an image that it builds, and one that it never gets to the end of.
fn with_service(
    lab: &Lab,
    story: impl FnOnce(&Server, &str, &str) -> Result<()>,
) -> Result<Verdict> {
    with_settings(lab, &[], story)
}

/// The same with more settings.
fn with_settings(
    lab: &Lab,
    settings: &[(&str, &str)],
    story: impl FnOnce(&Server, &str, &str) -> Result<()>,
) -> Result<Verdict> {
    let corner = lab.corner()?;
    let (throttle, place) = slowly(lab, place(lab, &corner)?)?;
    let place = settings.iter().fold(place, |place, (name, value)| place.set(name, value));
    let server = place.start()?;
    story(&server, &lab.pushed(images::TINY)?, &slow_image(lab, &throttle, 1)?)
        .with_context(|| last_lines(&server.said()))?;
    if server.said().contains("panicked") {
        bail!("the service panicked:\n{}", last_lines(&server.said()));
    }
    place.nothing_staged()?;
    Ok(Verdict::Passed)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    format!("the service said:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"))
}

/// A program that does not outlive us, however we end.
fn dying(program: Program) -> Program {
    program.under(Program::new("setpriv").args(["--pdeathsig", "KILL"]))
}

/// A directory for sockets: unix(7) gives a path 108 bytes, which a corner may have used up.
fn short_dir() -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("b").tempdir()?)
}

/// Prints what a client says it did, and counts it.
fn passed(said: &str) -> usize {
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("ok ")).collect();
    println!("      {}", lines.join("\n      "));
    lines.len()
}

pub(super) fn connect_node_lives_a_builds_life_on_every_transport(lab: &Lab) -> Result<Verdict> {
    let dir = clients::node()?;
    with_service(lab, |server, image, slow| {
        let url = format!("http://{}", server.address());
        let said = Program::new("node").args(["client.mjs", &url, image, slow]).dir(&dir).text()?;
        let count = passed(&said);
        if count != NODE_TRANSPORTS {
            bail!("{count} of {NODE_TRANSPORTS} transports passed:\n{said}");
        }
        Ok(())
    })
}

pub(super) fn connect_web_in_a_browser_lives_a_builds_life_where_its_origin_may_call(
    lab: &Lab,
) -> Result<Verdict> {
    let dir = clients::node()?;
    // Chromium binds a socket in it.
    let home = short_dir()?;
    let ports = [free_port()?, free_port()?].map(|port| port.to_string());
    let origin = format!("http://127.0.0.1:{}", ports[0]);
    with_settings(lab, &[("CORS_ALLOWED_ORIGINS", &origin)], |server, image, _| {
        let url = format!("http://{}", server.address());
        let said = Program::new("setpriv")
            .args(["--pdeathsig", "KILL", "node", "browser.mjs", &url, image])
            .args(&ports)
            .arg(home.path())
            .dir(&dir)
            .text()?;
        if passed(&said) != 2 * WEB_TRANSPORTS.len() {
            bail!("the pages said:\n{said}");
        }
        // The browser has not only kept the answers to itself.
        for (who, wanted) in [("web", 1), ("stranger", 0)] {
            for transport in WEB_TRANSPORTS {
                let tenant = format!("{who}-{transport}");
                let (_, found) = Api::new(server.address(), &tenant, "PRO").list()?;
                if found != wanted {
                    bail!("{tenant} has created {found} builds, not {wanted}");
                }
            }
        }
        Ok(())
    })
}

pub(super) fn python_grpcio_lives_a_builds_life(lab: &Lab) -> Result<Verdict> {
    let client = clients::python_client()?;
    with_service(lab, |server, image, slow| {
        let said = client.args([server.address(), image, slow]).text()?;
        if passed(&said) != 1 {
            bail!("it said:\n{said}");
        }
        Ok(())
    })
}

pub(super) fn python_grpcio_watches_health_until_the_service_has_stopped(
    lab: &Lab,
) -> Result<Verdict> {
    let watcher = clients::watcher()?;
    let corner = lab.corner()?;
    let server = place(lab, &corner)?.start()?;
    let log = corner.path("watcher.log");
    let mut watcher = dying(watcher.arg(server.address())).background(&log)?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let is_watching = || Ok(said().contains("watching").then_some(()));
    until("it watches", CLIENT_MAX, is_watching).with_context(said)?;
    if !server.stop(Duration::from_secs(20))?.success() {
        bail!("the service did not stop well while it was watched");
    }
    let status = watcher.wait_for(CLIENT_MAX)?.context("it watches for ever").with_context(said)?;
    if !status.success() || passed(&said()) != 1 {
        bail!("it said:\n{}", said());
    }
    Ok(Verdict::Passed)
}

pub(super) fn a_collector_is_told_of_a_build_and_its_steps(lab: &Lab) -> Result<Verdict> {
    let [taker, grpc, http] = [free_port()?, free_port()?, free_port()?];
    let corner = lab.corner()?;
    let (told, said) = (corner.path("told"), corner.path("collector.log"));
    let _taker = dying(clients::otlp()?.arg(taker.to_string())).background(&told)?;
    let collector = clients::collector()?
        .args(["--otlp-grpc-endpoint", &format!("127.0.0.1:{grpc}")])
        .args(["--otlp-http-endpoint", &format!("127.0.0.1:{http}")])
        .args(["--exporter", "otlp", "--disable-batching", "--otlp-exporter-endpoint"])
        .arg(format!("http://127.0.0.1:{taker}"));
    let _collector = dying(collector).background(&said)?;
    for port in [taker, http] {
        let listens = || Ok(TcpStream::connect(("127.0.0.1", port)).is_ok().then_some(()));
        until("the collector listens", CLIENT_MAX, listens)
            .with_context(|| std::fs::read_to_string(&said).unwrap_or_default())?;
    }
    let server = place(lab, &corner)?
        .set("OTEL_ENABLED", "true")
        .set("OTEL_ENDPOINT", &format!("127.0.0.1:{http}"))
        .set("OTEL_SERVICE_NAME", "builderd-under-test")
        .start()?;
    let image = lab.pushed(images::TINY)?;
    let api = Api::new(server.address(), "traced", "PRO");
    let created = Program::new("curl")
        .args(["--silent", "--show-error", "--fail-with-body"])
        .args(["--header", "X-Tenant-ID: traced", "--header", "Content-Type: application/json"])
        .args(["--header", &format!("traceparent: 00-{TRACE}-{CALLER}-01"), "--data"])
        .args([api.message(&Order::of(&image)).to_string()])
        .arg(format!("http://{}{SERVICE}/CreateBuild", server.address()))
        .text()?;
    let created: Value = serde_json::from_str(&created)?;
    let id = created["build_id"].as_str().context("no build_id")?;
    api.completed(id, CLIENT_MAX)?;
    // What has not been sent yet is sent at the end.
    let log = server.said();
    if !server.stop(Duration::from_secs(20))?.success() {
        bail!("the service did not stop well:\n{}", last_lines(&log));
    }
    let told = || -> Result<Vec<Value>> {
        let text = std::fs::read_to_string(&told)?;
        // The last line may still be written.
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    };
    let mut problem = None;
    until("all is handed on", Duration::from_secs(20), || {
        let told = told()?;
        let checked = check_trace(&told, id).and_then(|()| check_metrics(&told));
        problem = checked.err().map(|error| error.to_string());
        Ok(problem.is_none().then_some(()))
    })
    .with_context(|| format!("{problem:?}\nthe service: {}", last_lines(&log)))
    .with_context(|| std::fs::read_to_string(&said).unwrap_or_default())?;
    println!("      ok rotel: {} spans and metrics", told()?.len());
    Ok(Verdict::Passed)
}

/// A trace that its caller began.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// Who asked, the build below it, its steps below that, and the engine's below one of these.
fn check_trace(told: &[Value], id: &str) -> Result<()> {
    let one = |name: &str, parent: &str| {
        let is_it = |line: &&Value| {
            line["span"] == name && line["trace"] == TRACE && line["parent"] == parent
        };
        let found: Vec<&Value> = told.iter().filter(is_it).collect();
        let [span] = found[..] else { bail!("{} spans {name} below {parent}", found.len()) };
        if span["service"]["service.name"] != "builderd-under-test" {
            bail!("{name} is of another service: {span}");
        }
        Ok(span.clone())
    };
    let below = |name: &str, parent: &Value| one(name, parent["id"].as_str().unwrap_or_default());
    let request = one("CreateBuild", CALLER)?;
    if request["server"] != true {
        bail!("a request of a server is one: {request}");
    }
    let build = below("build", &request)?;
    let attributes = &build["attributes"];
    if (&attributes["tenant"], &attributes["build"]) != (&json!("traced"), &json!(id)) {
        bail!("the build is not told: {build}");
    }
    for step in ["resolve", "publish"] {
        below(step, &build)?;
    }
    let run = below("run", &build)?;
    let mut steps_nanos = 0;
    for step in ["layers", "flatten", "layout", "write"] {
        steps_nanos += number(&below(step, &run)?["nanos"]);
    }
    if steps_nanos == 0 || steps_nanos > number(&run["nanos"]) {
        bail!("steps of {steps_nanos} ns are not within {run}");
    }
    Ok(())
}

/// The value of a point with these attributes, of the last that was told.
fn check_metrics(told: &[Value]) -> Result<()> {
    let value = |name: &str, attribute: &str, wanted: &str| {
        let lines = told.iter().rev().filter(|line| line["metric"] == name);
        let points = lines.filter_map(|line| line["points"].as_array()).flatten();
        let mut found = points.filter(|point| point["attributes"][attribute] == wanted);
        found.next().map(|point| point["value"].clone())
    };
    for (name, attribute, wanted) in [
        ("builderd_builds_total", "status", "completed"),
        ("builderd_build_duration_seconds", "status", "completed"),
        ("rpc_server_requests_total", "method", "CreateBuild"),
    ] {
        if value(name, attribute, wanted).as_ref().map(number) != Some(1) {
            bail!("{name} with {attribute} {wanted} is {:?}", value(name, attribute, wanted));
        }
    }
    Ok(())
}

pub(super) fn py_spiffe_and_the_service_believe_one_agent(lab: &Lab) -> Result<Verdict> {
    const STEPS: usize = 4;
    let corner = lab.corner()?;
    let (agent_dir, log) = (short_dir()?, corner.path("agent.log"));
    let dir = agent_dir.path();
    let mut agent = dying(clients::spiffe()?.arg(dir)).background(&log)?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let socket = dir.join("server.sock");
    until("the agent's socket", CLIENT_MAX, || Ok(socket.exists().then_some(())))
        .with_context(said)?;
    let known = corner.path("clients.toml");
    std::fs::write(&known, "[[client]]\nid = \"spiffe://example.org/client\"\n")?;
    let place = place(lab, &corner)?
        .set("TLS_MODE", "spiffe")
        .set("SPIFFE_SOCKET", &socket.display().to_string())
        .set("TLS_CLIENTS_FILE", &known.display().to_string());
    let server = place.start()?;
    let address = dir.join("address.part");
    std::fs::write(&address, server.address())?;
    std::fs::rename(&address, dir.join("address"))?;
    let status =
        agent.wait_for(CLIENT_MAX)?.context("the clients do not end").with_context(said)?;
    if !status.success() || passed(&said()) != STEPS {
        bail!("the clients said:\n{}\n{}", said(), last_lines(&server.said()));
    }
    Ok(Verdict::Passed)
}

/// A way to call one RPC: method and message in, the answers' JSON out, one on each line.
type Caller<'a> = dyn Fn(&str, &Value) -> Result<Vec<Value>> + 'a;

pub(super) fn buf_curl_lives_a_builds_life_by_reflection_alone(lab: &Lab) -> Result<Verdict> {
    let buf = clients::buf()?;
    let buf_curl = || Program::new(&buf).args(["curl", "--http2-prior-knowledge"]);
    with_service(lab, |server, image, slow| {
        let url = |rest: &str| format!("http://{}{rest}", server.address());
        let services = buf_curl().args(["--list-services", &url("")]).text()?;
        for name in ["builder.v1.BuilderService", "grpc.health.v1.Health"] {
            if !services.lines().any(|line| line == name) {
                bail!("reflection does not list {name}: {services}");
            }
        }
        for protocol in ["connect", "grpc", "grpcweb"] {
            let tenant = format!("buf-{protocol}");
            let call = |method: &str, message: &Value| {
                let said = buf_curl()
                    .args(["--protocol", protocol])
                    .args(["--header", &format!("X-Tenant-ID: {tenant}")])
                    .args(["--data", &message.to_string()])
                    .arg(url(&format!("{SERVICE}/{method}")))
                    .text()?;
                let stream = serde_json::Deserializer::from_str(&said).into_iter::<Value>();
                Ok(stream.collect::<Result<_, _>>()?)
            };
            one_life(&call, &tenant, image, slow).with_context(|| format!("by {protocol}"))?;
            println!("      ok buf curl, {protocol}");
        }
        Ok(())
    })
}

pub(super) fn plain_curl_lives_a_builds_life(lab: &Lab) -> Result<Verdict> {
    with_service(lab, |server, image, slow| {
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            let tenant = format!("curl{version}").replace(".", "");
            let call =
                |method: &str, message: &Value| curl(server, &tenant, version, method, message);
            one_life(&call, &tenant, image, slow).with_context(|| version.to_owned())?;
            println!("      ok curl {version}");
        }
        Ok(())
    })
}

/// Streams come to curl as the documented page of lines: it knows no envelopes.
fn curl(
    server: &Server,
    tenant: &str,
    version: &str,
    method: &str,
    message: &Value,
) -> Result<Vec<Value>> {
    let program = Program::new("curl")
        .args(["--silent", "--show-error", "--fail-with-body", version])
        .args(["--header", &format!("X-Tenant-ID: {tenant}")]);
    let url = format!("http://{}{SERVICE}", server.address());
    if method != "StreamBuildLogs" {
        let said = program
            .args(["--header", "Content-Type: application/json", "--data"])
            .args([message.to_string(), format!("{url}/{method}")])
            .text()?;
        return Ok(vec![serde_json::from_str(&said)?]);
    }
    let id = message["buildId"].as_str().unwrap_or_default();
    let route = |name: &str| -> Result<Value> {
        let said = Program::new("curl")
            .args(["--silent", "--show-error", "--fail-with-body", version])
            .args(["--header", &format!("X-Tenant-ID: {tenant}")])
            .arg(format!("{url}/{name}"))
            .text()?;
        Ok(serde_json::from_str(&said)?)
    };
    until("the build has ended", Duration::from_secs(120), || {
        let status = route(&format!("GetBuildStatus/{id}"))?;
        Ok((status["status"] == "BUILD_STATUS_COMPLETED").then_some(()))
    })?;
    let page = route(&format!("GetBuildLogs/{id}?offset=0&limit=1000"))?;
    page["logs"].as_array().cloned().context("GetBuildLogs gave no lines")
}

fn one_life(call: &Caller<'_>, tenant: &str, image: &str, slow: &str) -> Result<()> {
    let one = |method: &str, message: Value| -> Result<Value> {
        let mut answers = call(method, &message)?;
        answers.pop().with_context(|| format!("{method} answered nothing"))
    };
    let order = |image: &str| {
        json!({"config": {
            "tenant": {"tenantId": tenant, "tier": "TENANT_TIER_ENTERPRISE"},
            "source": {"dockerImage": {"imageUri": image}},
            "target": {"microvmRootfs": {"initStrategy": "INIT_STRATEGY_DIRECT"}},
            "strategy": {"dockerExtract": {}},
        }})
    };
    let id = one("CreateBuild", order(image))?["buildId"].take();
    let lines = call("StreamBuildLogs", &json!({"buildId": id, "follow": true}))?;
    for (offset, line) in lines.iter().enumerate() {
        if number(&line["offset"]) != offset as u64 {
            bail!("line {offset} of the log is {line}");
        }
    }
    let last = lines.last().context("the log is empty")?["message"].as_str();
    if !last.is_some_and(|message| message.starts_with("completed: ")) {
        bail!("the log ends with {last:?}");
    }
    let build = one("GetBuild", json!({"buildId": id}))?["build"].take();
    if build["state"] != "BUILD_STATE_COMPLETED" {
        bail!("it ended as {build}");
    }
    let list = one("ListBuilds", json!({"tenantId": tenant}))?;
    if number(&list["totalCount"]) != 1 || list["builds"][0]["buildId"] != id {
        bail!("the list is {list}");
    }
    let cancelled = cancel_another(&one, &order(slow))?;
    let quotas = one("GetTenantQuotas", json!({}))?["currentUsage"].take();
    if number(&quotas["dailyBuildsUsed"]) != 2
        || number(&quotas["storageBytesUsed"]) != number(&build["rootfsSizeBytes"])
    {
        bail!("the usage is {quotas}");
    }
    let stats = one("GetBuildStats", json!({}))?;
    if (number(&stats["totalBuilds"]), number(&stats["successfulBuilds"])) != (2, 1) {
        bail!("the figures are {stats}");
    }
    for id in [id, cancelled] {
        if one("DeleteBuild", json!({"buildId": id}))?["success"] != true {
            bail!("{id} is not deleted");
        }
        if one("GetBuild", json!({"buildId": id})).is_ok() {
            bail!("{id} is deleted and still there");
        }
    }
    Ok(())
}

fn cancel_another(one: &dyn Fn(&str, Value) -> Result<Value>, order: &Value) -> Result<Value> {
    let id = one("CreateBuild", order.clone())?["buildId"].take();
    let reaches = |state: &str| {
        until(state, Duration::from_secs(30), || {
            let build = one("GetBuild", json!({"buildId": id}))?;
            Ok((build["build"]["state"] == state).then_some(()))
        })
    };
    reaches("BUILD_STATE_EXTRACTING")?;
    one("CancelBuild", json!({"buildId": id, "reason": "a test"}))?;
    reaches("BUILD_STATE_CANCELLED")?;
    Ok(id)
}
