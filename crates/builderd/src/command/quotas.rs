//! `builderd quotas` and `builderd stats`: what a tenant may use, uses, and has built.

use serde_json::{Value, json};

use super::builds::{block_on, number, state};
use super::client::Client;
use super::service_args::{QuotasArgs, StatsArgs};
use super::{Failure, text};

pub(super) fn quotas(args: &QuotasArgs) -> Result<(), Failure> {
    let client = Client::new(&args.server)?;
    let answer = block_on(async { Ok(client.call("GetTenantQuotas", &json!({})).await?) })?;
    if args.format.is_json() {
        put!("{answer}");
        return Ok(());
    }
    let (limits, usage) = (&answer["currentLimits"], &answer["currentUsage"]);
    let of = |used: &str, limit: &str| (number(&usage[used]), number(&limits[limit]));
    let (active, concurrent) = of("activeBuilds", "maxConcurrentBuilds");
    let (today, daily) = of("dailyBuildsUsed", "maxDailyBuilds");
    let (stored, storage) = of("storageBytesUsed", "maxStorageBytes");
    put!("builds running   {active} of {concurrent}, {} queued", number(&usage["buildsQueued"]));
    let reset = text::printable(usage["resetTime"].as_str().unwrap_or("midnight UTC"));
    put!("builds today     {today} of {daily}, starts again at {reset}");
    put!("storage          {} of {}", text::bytes(stored), text::bytes(storage));
    let limit = |name: &str| number(&limits[name]);
    put!(
        "each build       {} of memory, {} cores, {} of disk, {} s",
        text::bytes(limit("maxMemoryBytes")),
        limit("maxCpuCores"),
        text::bytes(limit("maxDiskBytes")),
        limit("timeoutSeconds")
    );
    if let Some(Value::Array(registries)) = limits.get("allowedRegistries") {
        let names: Vec<&str> = registries.iter().filter_map(Value::as_str).collect();
        put!("registries       {}", text::printable(&names.join(", ")));
    }
    for violation in answer["violations"].as_array().into_iter().flatten() {
        put!("used up          {}", text::printable(violation["message"].as_str().unwrap_or("?")));
    }
    Ok(())
}

pub(super) fn stats(args: &StatsArgs) -> Result<(), Failure> {
    let client = Client::new(&args.server)?;
    let mut request = json!({});
    if let Some(since) = args.since {
        let since = jiff::SignedDuration::try_from(since).map_err(Failure::ours)?;
        let from = jiff::Timestamp::now().checked_sub(since);
        let from = from.map_err(|error| Failure::usage(format!("--since: {error}")))?;
        request["startTime"] = from.to_string().into();
    }
    let answer = block_on(async { Ok(client.call("GetBuildStats", &request).await?) })?;
    if args.format.is_json() {
        put!("{answer}");
        return Ok(());
    }
    let count = |name: &str| number(&answer[name]);
    put!(
        "builds           {}: {} completed, {} failed",
        count("totalBuilds"),
        count("successfulBuilds"),
        count("failedBuilds")
    );
    put!("mean time        {} ms", count("avgBuildTimeMs"));
    put!("storage          {}", text::bytes(count("totalStorageBytes")));
    put!("build time       {} min", count("totalComputeMinutes"));
    for build in answer["recentBuilds"].as_array().into_iter().flatten() {
        let id = text::printable(build["buildId"].as_str().unwrap_or_default());
        let image = &build["config"]["source"]["dockerImage"]["imageUri"];
        let image = text::printable(image.as_str().unwrap_or_default());
        put!("recent           {id} {:<11} {image}", state(build));
    }
    Ok(())
}
