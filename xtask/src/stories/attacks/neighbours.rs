//! What one tenant tries with another's builds, images and secrets, by the API alone.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::Table;
use super::ground::{BUILD, Ground, OPERATORS_SECRET, VICTIMS_CANARY, VICTIMS_TOKEN};
use super::rogue::Answer;
use crate::images::generated::noise;
use crate::images::tar::Node;
use crate::service::api::{Order, SERVICE};
use crate::service::until;

const DOOR: &str = "tenants' own rows";
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const NOISE_BYTES: u64 = 2 << 20;

/// An image that the victim alone may pull, and has built.
pub(super) struct Private {
    id: String,
    image: String,
    layout: PathBuf,
    build: Value,
}

impl Private {
    pub(super) fn built(ground: &Ground) -> Result<Self> {
        let layout = ground.layout("private", &json!({}), |writer| {
            writer.layer(|tar| tar.add("etc/secret", &Node::file(VICTIMS_CANARY.repeat(5000))))
        })?;
        let image = ground.registry.serve_privately(&layout, "private", VICTIMS_TOKEN)?;
        let id = order_privately(ground, &image)?;
        ground.victim.follow(&id)?;
        let build = ground.victim.completed(&id, BUILD).context("the victim's own build")?;
        Ok(Self { id, image, layout, build })
    }
}

pub(super) fn run(ground: &Ground, table: &mut Table, theirs: &Private) -> Result<()> {
    let Private { id, image, build, .. } = theirs;
    table.add("another's build, log and artifact by its id", DOOR, by_id(ground, id));
    table.add("another's name in a request", DOOR, by_name(ground));
    table.add("no token, a token that was guessed", "the door", without_token(ground));
    let result = ground.build(image, &[])?.failed("AUTHENTICATION_FAILED", "");
    table.add("another's private image", "its registry is asked again", result);
    let result = by_digest(ground, theirs);
    table.add("another's private layers, by their digests", "sharing domains", result);
    let secrets = while_it_runs(ground);
    table.add("argv and environment of the host's processes", "secrets by pipe", secrets);
    if ground.victim.build(id)? != *build {
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

/// The attacker knows all of an image but its layer, and that the service has it: the same manifest
/// is public at a place of his own, which has no such blob.
fn by_digest(ground: &Ground, theirs: &Private) -> Result<String> {
    let image = ground.registry.serve(&theirs.layout, "borrowed")?;
    let layer = ground.registry.top_layer(&theirs.layout, "borrowed")?;
    ground.registry.put(&layer, Answer::missing());
    let told = ground.build(&image, &[])?.failed("INVALID_SOURCE", "")?;
    match ground.registry.asked().iter().any(|line| line.contains(&layer)) {
        true => Ok(told),
        false => bail!("its registry was not asked for the layer: {told}"),
    }
}

/// The processes below one, at this moment.
pub(super) fn descendants(of: u32) -> Vec<u32> {
    let list = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = list.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: Vec<(u32, u32)> = ids.filter_map(|id| Some((id, parent_of(id)?))).collect();
    let (mut found, mut next) = (Vec::new(), vec![of]);
    while let Some(above) = next.pop() {
        let below = parents.iter().filter(|(_, parent)| *parent == above).map(|(id, _)| *id);
        let below: Vec<u32> = below.collect();
        found.extend(&below);
        next.extend(below);
    }
    found
}

fn parent_of(id: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    parent.trim().parse().ok()
}

/// Any user of the host may read what a process was called with; its owner, its environment.
fn while_it_runs(ground: &Ground) -> Result<String> {
    let layout = ground.layout("slow", &json!({}), |writer| {
        writer.layer(|tar| tar.add("noise", &Node::file(noise(7, NOISE_BYTES))))
    })?;
    ground.registry.serve_privately(&layout, "slow", VICTIMS_TOKEN)?;
    let image = format!("{}/slow:latest", ground.slow.address());
    let id = order_privately(ground, &image)?;
    let (mut seen, mut most) = (0, 0);
    let found = until("a process builds, and ends", BUILD, || {
        let processes = descendants(ground.server.id());
        most = most.max(processes.len());
        for process in &processes {
            for file in ["cmdline", "environ"] {
                // One that has ended has none.
                let bytes = std::fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
                seen += usize::from(file == "cmdline" && !bytes.is_empty());
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
        None => Ok(format!("nothing found in {most} at once")),
    }
}
