//! Stories about the service: one node in development mode, asked as its documentation says.

use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::Verdict;
use super::lab::{Corner, Lab, same_bytes};
use crate::chores::fsck;
use crate::compare::walk;
use crate::images;
use crate::process::{self, Program};
use crate::service::api::{Api, Order, PRINTED_IMAGE, PRINTED_ORDER, SERVICE, number};
use crate::service::throttle::Throttle;
use crate::service::wire::{Connection, Request};
use crate::service::{Place, Server, until};

/// How long a build of a small image may take.
const BUILD: Duration = Duration::from_secs(120);

/// How fast a slow registry is: a layer of [`SLOW_BYTES`] never ends.
const SLOW_BYTES_PER_SEC: u64 = 100_000;
/// The one layer that counts of a slow image.
const SLOW_BYTES: u64 = 32 << 20;

/// A node whose images come from the lab's registry, under the documentation's names too.
pub(super) fn place(lab: &Lab, corner: &Corner<'_>) -> Result<Place> {
    let registry = lab.registry().address();
    Ok(Place::new(lab.binary(), &corner.path("service"))?
        .set("DOCKER_INSECURE_REGISTRIES", registry)
        .set("DOCKER_REGISTRY_MIRROR", &format!("ghcr.io={registry},{registry}")))
}

/// A way to the registry that is too slow for [`slow_image`], and the settings to use it.
pub(super) fn slowly(lab: &Lab, place: Place) -> Result<(Throttle, Place)> {
    let throttle = Throttle::start(lab.registry().address(), SLOW_BYTES_PER_SEC)?;
    let registries = format!("{},{}", lab.registry().address(), throttle.address());
    let place = place.set("DOCKER_INSECURE_REGISTRIES", &registries);
    Ok((throttle, place))
}

/// An image that takes minutes to fetch; `number` tells several apart.
pub(super) fn slow_image(lab: &Lab, throttle: &Throttle, number: u64) -> Result<String> {
    Ok(format!("{}/{}", throttle.address(), lab.numbered(number, SLOW_BYTES)?))
}

/// The image of stories about one build: with everything in it where root has made it.
fn some_image() -> &'static str {
    if process::is_root() { "small" } else { images::TINY }
}

fn curl(server: &Server, path: &str) -> Program {
    Program::new("curl")
        .args(["--silent", "--show-error", "--fail-with-body"])
        .args(["--header", "X-Tenant-ID: tenant-123"])
        .arg(format!("http://{}{SERVICE}/{path}", server.address()))
}

fn curl_json(server: &Server, path: &str) -> Result<Value> {
    Ok(serde_json::from_str(&curl(server, path).text()?)?)
}

/// Fails unless two JSON values are equal.
fn same(what: &str, found: &Value, wanted: &Value) -> Result<()> {
    if found != wanted {
        bail!("{what} is {found}, not {wanted}");
    }
    Ok(())
}

pub(super) fn the_printed_order_gives_the_bytes_that_the_command_makes(
    lab: &Lab,
) -> Result<Verdict> {
    let corner = lab.corner()?;
    let layout = images::layout(some_image())?;
    let reference = lab.registry().push(&layout, some_image())?;
    lab.registry().push_as(&layout, PRINTED_IMAGE)?;
    let place = place(lab, &corner)?;
    let server = place.start()?;
    let created: Value = serde_json::from_str(
        &curl(&server, "CreateBuild")
            .args(["--request", "POST", "--header", "Content-Type: application/json"])
            .args(["--header", "X-Customer-ID: customer-456", "--data", PRINTED_ORDER])
            .text()?,
    )?;
    let id = check_created(&created)?;
    let api = Api::new(server.address(), "tenant-123", "PRO");
    let lines = api.follow(&id)?;
    let last = lines.last().context("the log is empty")?["message"].as_str().unwrap_or_default();
    if !last.starts_with("completed: ") {
        bail!("the log ends with {last:?}");
    }
    let build = api.build(&id)?;
    check_printed_status(&server, &id)?;
    let file = corner.output("service.ext4");
    check_artifact(&server, &id, &build, &file)?;
    fsck(&file)?;
    let wanted = corner.output("command.ext4");
    corner.build(&reference, &wanted, &[])?;
    same_bytes(&file, &wanted)?;
    check_strangers(&server, &api, &id)?;
    check_delete(&api, &id)?;
    place.nothing_staged()?;
    Ok(Verdict::Passed)
}

/// What the documentation prints as the answer; ids and times by their shape.
fn check_created(created: &Value) -> Result<String> {
    let id = created["build_id"].as_str().context("no build_id")?;
    let digits = id.strip_prefix("build_").context("the id does not begin with build_")?;
    if digits.len() != 26 || !digits.bytes().all(|digit| digit.is_ascii_alphanumeric()) {
        bail!("{id} is not build_ and 26 digits");
    }
    same("status", &created["status"], &json!("BUILD_STATUS_QUEUED"))?;
    let time = created["created_at"].as_str().context("no created_at")?;
    if !time.ends_with('Z') || time.get(10..11) != Some("T") {
        bail!("created_at is {time:?}");
    }
    let tenant = &created["tenant_context"];
    same("tenant_id", &tenant["tenant_id"], &json!("tenant-123"))?;
    same("tier", &tenant["tier"], &json!("TENANT_TIER_PRO"))?;
    let limits = &tenant["resource_limits"];
    same("max_memory_bytes", &limits["max_memory_bytes"], &json!(2_147_483_648_u64))?;
    same("max_cpu_cores", &limits["max_cpu_cores"], &json!(2))?;
    same("timeout_seconds", &limits["timeout_seconds"], &json!(900))?;
    Ok(id.to_owned())
}

fn check_printed_status(server: &Server, id: &str) -> Result<()> {
    let status = curl_json(server, &format!("GetBuildStatus/{id}"))?;
    same("build_id", &status["build_id"], &json!(id))?;
    same("status", &status["status"], &json!("BUILD_STATUS_COMPLETED"))?;
    same("progress.percentage", &status["progress"]["percentage"], &json!(100))?;
    for field in ["started_at", "updated_at"] {
        status[field].as_str().with_context(|| format!("no {field}"))?;
    }
    let list = curl_json(server, "ListBuilds?tenant_id=tenant-123&limit=5&offset=0")?;
    same("total_count", &list["total_count"], &json!(1))?;
    same("has_more", &list["has_more"], &json!(false))?;
    same("the listed build", &list["builds"][0]["build_id"], &json!(id))?;
    let none = curl_json(server, "ListBuilds?status=BUILD_STATUS_FAILED")?;
    same("total_count of failed ones", &none["total_count"], &json!(0))
}

/// The whole file, pieces of it, its checksum, and an answer without it.
fn check_artifact(server: &Server, id: &str, build: &Value, file: &Path) -> Result<()> {
    let path = format!("GetBuildArtifact/{id}");
    curl(server, &path).arg("--output").arg(file).run()?;
    let bytes = std::fs::read(file)?;
    let sha256 = hex(walk::sha256_of(file)?);
    same("rootfsChecksum", &build["rootfsChecksum"], &json!(sha256))?;
    if bytes.len() as u64 != number(&build["rootfsSizeBytes"]) {
        bail!("{} bytes came, {} were promised", bytes.len(), build["rootfsSizeBytes"]);
    }
    let api = Api::new(server.address(), "tenant-123", "PRO");
    let etag = format!("\"{sha256}\"");
    let end = bytes.len() - 1000;
    for (range, wanted) in [
        ("bytes=1000-1999", &bytes[1000..2000]),
        ("bytes=-1000", &bytes[end..]),
        (&format!("bytes={end}-"), &bytes[end..]),
    ] {
        let answer = api.get(&path, &[("Range", range), ("If-Range", &etag)])?;
        if answer.status() != 206 || answer.body != wanted {
            bail!("{range} answered {} with {} bytes", answer.status(), answer.body.len());
        }
    }
    let beyond = api.get(&path, &[("Range", &format!("bytes={}-", bytes.len()))])?;
    let unchanged = api.get(&path, &[("If-None-Match", &etag)])?;
    if (beyond.status(), unchanged.status()) != (416, 304) {
        bail!("beyond its end: {}, unchanged: {}", beyond.status(), unchanged.status());
    }
    same("the ETag", &json!(unchanged.head.header("etag")), &json!(etag))?;
    let sums = curl(server, &format!("{path}.sha256")).text()?;
    if !sums.starts_with(&sha256) {
        bail!("the checksum file says {sums:?}");
    }
    Ok(())
}

pub(super) fn hex(bytes: [u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A build of somebody else is not there, on no way in.
fn check_strangers(server: &Server, api: &Api, id: &str) -> Result<()> {
    let stranger = Api { tenant: "tenant-12".into(), ..api.clone() };
    for method in ["GetBuild", "CancelBuild", "DeleteBuild"] {
        let answer = stranger.call(method, &json!({"buildId": id}))?;
        if answer.status() != 404 || !answer.text().contains("not_found") {
            bail!("{method} by a stranger answered {}: {}", answer.status(), answer.text());
        }
    }
    for path in ["GetBuildStatus", "GetBuildArtifact", "GetBuildLogs"] {
        let answer = stranger.get(&format!("{path}/{id}"), &[])?;
        if answer.status() != 404 {
            bail!("{path} to a stranger answered {}", answer.status());
        }
    }
    let nobody = Request {
        method: "GET",
        path: &format!("{SERVICE}/GetBuildStatus/{id}"),
        headers: &[],
        body: b"",
    };
    let answer = Connection::open(server.address())?.send(nobody)?;
    if answer.status() != 401 {
        bail!("nobody's request answered {}", answer.status());
    }
    Ok(())
}

fn check_delete(api: &Api, id: &str) -> Result<()> {
    let cancelled = api.call("CancelBuild", &json!({"buildId": id, "reason": "too late"}))?;
    let build = api.build(id)?;
    same("a build cancelled after its end", &build["state"], &json!("BUILD_STATE_COMPLETED"))
        .with_context(|| cancelled.text())?;
    api.ask("DeleteBuild", &json!({"buildId": id}))?;
    let usage = api.ask("GetTenantQuotas", &json!({}))?;
    if number(&usage["currentUsage"]["storageBytesUsed"]) != 0 {
        bail!("a deleted build takes storage: {usage}");
    }
    let gone = api.get(&format!("GetBuildArtifact/{id}"), &[])?;
    if gone.status() != 404 {
        bail!("the artifact of a deleted build answered {}", gone.status());
    }
    Ok(())
}

pub(super) fn a_running_build_is_cancelled_within_a_second(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let (throttle, place) = slowly(lab, place(lab, &corner)?)?;
    let place = place.set("MAX_CONCURRENT_BUILDS", "1");
    let server = place.start()?;
    let api = Api::new(server.address(), "hasty", "PRO");
    let running = api.create(&Order::of(&slow_image(lab, &throttle, 1)?))?;
    api.wait_for(&running, &["EXTRACTING"], BUILD)?;
    until("a process builds", BUILD, || Ok((!server.children().is_empty()).then_some(())))?;
    let waiting = api.create(&Order::of(&slow_image(lab, &throttle, 2)?))?;
    for (what, id) in [("waiting", &waiting), ("running", &running)] {
        let started = Instant::now();
        let message = json!({"buildId": id, "reason": "changed my mind"});
        let answer = api.ask("CancelBuild", &message)?;
        same("success", &answer["success"], &json!(true))?;
        api.wait_for(id, &["CANCELLED"], Duration::from_secs(5))?;
        let took = started.elapsed();
        println!("      cancelled while {what}: {} ms", took.as_millis());
        if took > Duration::from_secs(1) {
            bail!("a {what} build was cancelled after {took:?}");
        }
    }
    let left = until("its process ends", Duration::from_secs(1), || {
        Ok(server.children().is_empty().then_some(()))
    });
    left.with_context(|| format!("{:?} still run", server.children()))?;
    place.nothing_staged()?;
    let usage = api.ask("GetTenantQuotas", &json!({}))?["currentUsage"].take();
    if number(&usage["activeBuilds"]) + number(&usage["buildsQueued"]) != 0 {
        bail!("cancelled builds count as active: {usage}");
    }
    Ok(Verdict::Passed)
}

pub(super) fn what_a_stopped_service_cannot_finish_the_next_start_completes(
    lab: &Lab,
) -> Result<Verdict> {
    let corner = lab.corner()?;
    let (throttle, place) = slowly(lab, place(lab, &corner)?)?;
    let place = place.set("SHUTDOWN_TIMEOUT", "1s").set("MAX_CONCURRENT_BUILDS", "1");
    let server = place.start()?;
    let api = Api::new(server.address(), "patient", "PRO");
    let running = api.create(&Order::of(&slow_image(lab, &throttle, 1)?))?;
    let waiting = api.create(&Order::of(&lab.pushed(images::TINY)?))?;
    api.wait_for(&running, &["EXTRACTING"], BUILD)?;
    let started = Instant::now();
    let status = server.stop(Duration::from_secs(6))?;
    if !status.success() {
        bail!("SIGTERM ended it with {status}");
    }
    println!("      stopped in {:.1} s", started.elapsed().as_secs_f64());
    place.nothing_staged()?;
    throttle.set(u64::MAX);
    let server = place.start()?;
    let api = Api::new(server.address(), "patient", "PRO");
    for id in [&running, &waiting] {
        let build = api.completed(id, BUILD)?;
        // A shutdown is nobody's failure and counts no try.
        if build["attempts"].as_array().is_some_and(|list| !list.is_empty()) {
            bail!("{id} has failed attempts: {}", build["attempts"]);
        }
    }
    place.nothing_staged()?;
    Ok(Verdict::Passed)
}

pub(super) fn of_500_orders_at_once_the_last_place_takes_one(lab: &Lab) -> Result<Verdict> {
    const LIMIT: usize = 5;
    const CALLERS: usize = 500;
    let corner = lab.corner()?;
    let place = place(lab, &corner)?
        .set("TENANT_DEFAULT_TIER", "dedicated")
        .set("TENANT_DEFAULT_MAX_DAILY_BUILDS", &LIMIT.to_string());
    let server = place.start()?;
    let api = Api::new(server.address(), "greedy", "DEDICATED");
    let image = lab.pushed(images::TINY)?;
    for _ in 1..LIMIT {
        api.create(&Order::of(&image))?;
    }
    let statuses = at_once(&api, &api.message(&Order::of(&image)), CALLERS)?;
    let passed = statuses.iter().filter(|status| **status == 200).count();
    let refused = statuses.iter().filter(|status| **status == 429).count();
    if (passed, refused) != (1, CALLERS - 1) {
        bail!("{passed} passed and {refused} of {CALLERS} were refused");
    }
    let usage = api.ask("GetTenantQuotas", &json!({}))?;
    same("dailyBuildsUsed", &usage["currentUsage"]["dailyBuildsUsed"], &json!(LIMIT))?;
    let (builds, total) = api.list()?;
    if (builds.len(), total) != (LIMIT, LIMIT as u64) {
        bail!("{} builds are listed, {total} counted", builds.len());
    }
    for build in builds {
        api.completed(build["buildId"].as_str().unwrap_or_default(), BUILD)?;
    }
    Ok(Verdict::Passed)
}

/// Sends the same CreateBuild on as many connections, at the same moment.
fn at_once(api: &Api, message: &Value, callers: usize) -> Result<Vec<u16>> {
    let rpc = api.rpc("CreateBuild", message);
    let barrier = Barrier::new(callers);
    std::thread::scope(|scope| {
        let call = || {
            let connection = Connection::open(&api.address);
            barrier.wait();
            Ok(connection?.send(rpc.request())?.status())
        };
        let threads: Vec<_> = (0..callers).map(|_| scope.spawn(call)).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(|status| status.unwrap_or_else(|_| bail!("a caller panicked"))).collect()
    })
}
