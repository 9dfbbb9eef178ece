//! Stories about clients that other people wrote. Each lives one whole life of a build: create,
//! follow, get, list, cancel another one, look at quotas and figures, delete.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Verdict;
use super::lab::Lab;
use super::service::{place, slow_image, slowly};
use crate::images;
use crate::process::Program;
use crate::service::api::{Api, SERVICE, number};
use crate::service::{Server, clients, free_port, until};

/// How many transports the Node.js client goes through.
const NODE_TRANSPORTS: usize = 14;

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

pub(super) fn py_spiffe_and_the_service_believe_one_agent(lab: &Lab) -> Result<Verdict> {
    const STEPS: usize = 4;
    const SECS_MAX: Duration = Duration::from_secs(120);
    let corner = lab.corner()?;
    let (agent_dir, log) = (short_dir()?, corner.path("agent.log"));
    let dir = agent_dir.path();
    let setpriv = Program::new("setpriv").args(["--pdeathsig", "KILL"]);
    let mut agent = clients::spiffe()?.arg(dir).under(setpriv).background(&log)?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let socket = dir.join("server.sock");
    until("the agent's socket", SECS_MAX, || Ok(socket.exists().then_some(())))
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
    let status = agent.wait_for(SECS_MAX)?.context("the clients do not end").with_context(said)?;
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
