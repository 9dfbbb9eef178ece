//! What one tenant tries with another's builds, images and secrets, by the API alone.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::Table;
use super::ground::{BUILD, Ground, OPERATORS_SECRET, VICTIMS_CANARY, VICTIMS_TOKEN};
use crate::images::generated::noise;
use crate::images::tar::Node;
use crate::service::api::{Order, SERVICE};
use crate::service::until;

const DOOR: &str = "tenants' own rows";
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const NOISE_BYTES: u64 = 2 << 20;

pub(super) fn run(ground: &Ground, table: &mut Table) -> Result<()> {
    let layout = ground.layout("private", &json!({}), |writer| {
        writer.layer(|tar| tar.add("etc/secret", &Node::file(VICTIMS_CANARY.repeat(5000))))
    })?;
    let image = ground.registry.serve_privately(&layout, "private", VICTIMS_TOKEN)?;
    let id = order_privately(ground, &image)?;
    ground.victim.follow(&id)?;
    let theirs = ground.victim.completed(&id, BUILD).context("the victim's own build")?;
    table.add("another's build, log and artifact by its id", DOOR, by_id(ground, &id));
    table.add("another's name in a request", DOOR, by_name(ground));
    table.add("no token, a token that was guessed", "the door", without_token(ground));
    table.add("another's private image from cache", "sharing domains", from_cache(ground, &image));
    let secrets = while_it_runs(ground);
    table.add("argv and environment of the host's processes", "secrets by pipe", secrets);
    if ground.victim.build(&id)? != theirs {
        bail!("the victim's build is not what it was");
    }
    table.healthy(ground);
    Ok(())
}

fn order_privately(ground: &Ground, image: &str) -> Result<String> {
    let mut order = ground.victim.message(&Order::of(image));
    order["config"]["source"]["dockerImage"]["auth"] = json!({"token": VICTIMS_TOKEN});
    let answer = ground.victim.ask("CreateBuild", &order)?;
    Ok(answer["buildId"].as_str().context("the answer names no build")?.to_owned())
}

fn by_id(ground: &Ground, id: &str) -> Result<String> {
    for method in ["GetBuild", "CancelBuild", "DeleteBuild"] {
        let answer = ground.patiently(|api| api.call(method, &json!({"buildId": id})))?;
        if answer.status() != 404 {
            bail!("{method} answers {}: {}", answer.status(), answer.text());
        }
    }
    for path in [format!("GetBuildArtifact/{id}"), format!("GetBuildStatus/{id}")] {
        let answer = ground.patiently(|api| api.get(&path, &[]))?;
        if answer.status() != 404 {
            bail!("{path} answers {}: {}", answer.status(), answer.text());
        }
    }
    match ground.followed(id) {
        Ok(lines) => bail!("its log was told: {lines:?}"),
        Err(error) if format!("{error:#}").contains("not_found") => {}
        Err(error) => return Err(error.context("its log")),
    }
    let (builds, _) = ground.attacker.list()?;
    match builds.iter().any(|build| build["buildId"] == id) {
        true => bail!("it is listed"),
        false => Ok("404, as of a build that never was".into()),
    }
}

fn by_name(ground: &Ground) -> Result<String> {
    let mut order = ground.order("docker.io/library/busybox", &[]);
    order["config"]["tenant"]["tenantId"] = json!("victim");
    for (method, message) in [("CreateBuild", order), ("ListBuilds", json!({"tenantId": "victim"}))]
    {
        let answer = ground.patiently(|api| api.call(method, &message))?;
        if answer.status() != 403 {
            bail!("{method} answers {}: {}", answer.status(), answer.text());
        }
    }
    Ok("403".into())
}

fn without_token(ground: &Ground) -> Result<String> {
    let path = format!("{SERVICE}/ListBuilds");
    for header in [("X-Tenant-ID", "victim"), ("Authorization", "Bearer victim")] {
        let answer = ground.send("POST", &path, &[header], "{}")?;
        if answer.status() != 401 {
            bail!("{header:?} is answered {}: {}", answer.status(), answer.text());
        }
    }
    Ok("401".into())
}

/// Neither the layers nor the artifact are had by whoever cannot pull them.
fn from_cache(ground: &Ground, image: &str) -> Result<String> {
    ground.build(image, &[])?.failed("AUTHENTICATION_FAILED", "")
}

/// Any user of the host may read what a process was called with; its owner, its environment.
fn while_it_runs(ground: &Ground) -> Result<String> {
    let layout = ground.layout("slow", &json!({}), |writer| {
        writer.layer(|tar| tar.add("noise", &Node::file(noise(7, NOISE_BYTES))))
    })?;
    ground.registry.serve_privately(&layout, "slow", VICTIMS_TOKEN)?;
    let image = format!("{}/slow:latest", ground.slow.address());
    let id = order_privately(ground, &image)?;
    let mut seen = 0;
    let found = until("a process builds, and ends", BUILD, || {
        let children = ground.server.children();
        seen += children.len();
        for child in &children {
            for file in ["cmdline", "environ"] {
                let bytes = std::fs::read(format!("/proc/{child}/{file}")).unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes).into_owned();
                for secret in [OPERATORS_SECRET, VICTIMS_TOKEN] {
                    if text.contains(secret) {
                        return Ok(Some(Some(format!("{file} of a build's process has {secret}"))));
                    }
                }
            }
        }
        std::thread::sleep(LOOK_AGAIN);
        let build: Value = ground.victim.build(&id)?;
        Ok(crate::service::api::ended(&build).then_some(None))
    })?;
    match found {
        Some(problem) => bail!(problem),
        None if seen == 0 => bail!("no process was ever seen"),
        None => Ok("nothing found".into()),
    }
}
