//! Answers: builds, logs, limits and figures as messages, in both vocabularies.

use api::v1;
use serde_json::{Value, json};

use super::{rfc3339, signed, small, tier_on_the_wire, timestamp};
use crate::build::record::{
    Attempt, Build, BuildMetrics, BuildResult, Failure, LogLine, Micros, Stats,
};
use crate::build::service::{BuildService, Quotas};
use crate::build::state::BuildState;
use crate::tenant::TenantLimits;

/// A build's state on the wire.
pub(in super::super) fn state(state: BuildState) -> v1::BuildState {
    use v1::BuildState as Wire;
    match state {
        BuildState::Queued => Wire::BUILD_STATE_PENDING,
        BuildState::Preparing => Wire::BUILD_STATE_PULLING,
        BuildState::Downloading => Wire::BUILD_STATE_EXTRACTING,
        BuildState::Building => Wire::BUILD_STATE_BUILDING,
        BuildState::Optimizing | BuildState::Packaging => Wire::BUILD_STATE_OPTIMIZING,
        BuildState::Completed => Wire::BUILD_STATE_COMPLETED,
        // The wire has no word for a timeout; the status has.
        BuildState::Failed | BuildState::Timeout => Wire::BUILD_STATE_FAILED,
        BuildState::Cancelled => Wire::BUILD_STATE_CANCELLED,
    }
}

/// A build's state in the documentation's words.
pub(in super::super) fn status(state: BuildState) -> v1::BuildStatus {
    use v1::BuildStatus as Wire;
    match state {
        BuildState::Queued => Wire::BUILD_STATUS_QUEUED,
        BuildState::Preparing
        | BuildState::Downloading
        | BuildState::Building
        | BuildState::Optimizing
        | BuildState::Packaging => Wire::BUILD_STATUS_RUNNING,
        BuildState::Completed => Wire::BUILD_STATUS_COMPLETED,
        BuildState::Failed => Wire::BUILD_STATUS_FAILED,
        BuildState::Cancelled => Wire::BUILD_STATUS_CANCELLED,
        BuildState::Timeout => Wire::BUILD_STATUS_TIMEOUT,
    }
}

/// What a build does, in the documentation's words.
fn stage(state: BuildState) -> &'static str {
    match state {
        BuildState::Queued => "QUEUED",
        BuildState::Preparing => "PREPARATION",
        BuildState::Downloading => "EXTRACTION",
        BuildState::Building => "BUILD",
        BuildState::Optimizing => "OPTIMIZATION",
        BuildState::Packaging => "PACKAGING",
        BuildState::Completed
        | BuildState::Failed
        | BuildState::Cancelled
        | BuildState::Timeout => "DONE",
    }
}

/// One build, with the last messages of its log where they are wanted.
pub(in super::super) fn job(
    service: &BuildService,
    build: &Build,
    log: Vec<String>,
    now: Micros,
) -> v1::BuildJob {
    let result = build.result.as_ref();
    let kept = result.filter(|_| build.has_artifact);
    let failure = build.failure.as_ref();
    v1::BuildJob {
        build_id: build.id.to_string(),
        // It was written by this service.
        config: serde_json::from_str::<v1::BuildConfig>(&build.request.echo).ok().into(),
        state: state(build.state).into(),
        created_at: timestamp(build.created_at).into(),
        started_at: build.started_at.map(timestamp).into(),
        completed_at: build.ended_at.map(timestamp).into(),
        rootfs_path: kept
            .map_or_else(String::new, |result| service.artifact_path(&result.artifact_key)),
        rootfs_size_bytes: result.map_or(0, |result| signed(result.artifact_bytes)),
        rootfs_checksum: result.map_or_else(String::new, |result| result.sha256.clone()),
        image_metadata: result.map(|result| image_metadata(&result.metadata)).into(),
        metrics: metrics(build).into(),
        isolation: isolation(build).into(),
        error_message: failure.map_or_else(String::new, |failure| failure.cause.clone()),
        build_logs: log,
        progress_percent: small(build.progress_percent.into()),
        current_step: step(build, now),
        status: status(build.state).into(),
        progress: progress(build, now).into(),
        resource_usage: resource_usage(build).into(),
        tenant_context: tenant_context(build).into(),
        updated_at: timestamp(build.updated_at).into(),
        failure: failure.map(failure_message).into(),
        attempts: build.attempts.iter().map(attempt).collect(),
        cancel_reason: build.cancel_reason.clone().unwrap_or_default(),
        next_attempt_at: build.next_attempt_at(now).map(timestamp).into(),
        ..Default::default()
    }
}

fn progress(build: &Build, now: Micros) -> v1::BuildProgress {
    v1::BuildProgress {
        stage: stage(build.state).to_owned(),
        percentage: small(build.progress_percent.into()),
        current_step: step(build, now),
        estimated_duration: remaining_secs(build, now)
            .map_or_else(String::new, |secs| format!("{secs}s")),
        ..Default::default()
    }
}

/// What is being done, for people: of a build that waits for its next try, when that may begin.
fn step(build: &Build, now: Micros) -> String {
    let Some(at) = build.next_attempt_at(now) else { return build.step.clone() };
    // The first whole second at which it may.
    let at = Micros(at.0.saturating_add(Micros::SECOND - 1).div_euclid(Micros::SECOND));
    let at = Micros(at.0.saturating_mul(Micros::SECOND));
    format!("Waiting until {} for try {}", rfc3339(at), build.attempt.saturating_add(1))
}

/// What is still to come if the rest goes as fast as what was done; nothing is said of builds
/// that have just begun, or wait.
fn remaining_secs(build: &Build, now: Micros) -> Option<u64> {
    const BEGUN_PERCENT: u64 = 5;
    let percent = u64::from(build.progress_percent).min(100);
    if !build.state.is_running() || percent < BEGUN_PERCENT {
        return None;
    }
    let elapsed = u64::try_from(now.0 - build.started_at?.0).ok()?;
    let micros = elapsed.saturating_mul(100 - percent) / percent;
    Some(micros.div_ceil(u64::try_from(Micros::SECOND).unwrap_or(1)))
}

/// Who a build belongs to, and what applies to it.
pub(in super::super) fn tenant_context(build: &Build) -> v1::TenantContext {
    v1::TenantContext {
        tenant_id: build.tenant.to_string(),
        customer_id: build.customer.clone().unwrap_or_default(),
        organization_id: build.organization.clone().unwrap_or_default(),
        permissions: build.rights.clone(),
        tier: tier_on_the_wire(build.tier).into(),
        resource_limits: limits_message(&build.limits).into(),
        ..Default::default()
    }
}

/// A tenant's limits.
fn limits_message(limits: &TenantLimits) -> v1::TenantResourceLimits {
    v1::TenantResourceLimits {
        max_memory_bytes: signed(limits.memory_bytes),
        max_cpu_cores: small(limits.cpu_cores.into()),
        max_disk_bytes: signed(limits.disk_bytes),
        timeout_seconds: small(limits.timeout_secs.into()),
        max_concurrent_builds: small(limits.concurrent_builds.into()),
        max_daily_builds: small(limits.daily_builds.into()),
        max_storage_bytes: signed(limits.storage_bytes),
        max_build_time_minutes: small(limits.build_minutes.into()),
        allowed_registries: limits.allowed_registries.clone(),
        allow_external_network: limits.external_network,
        ..Default::default()
    }
}

fn image_metadata(metadata: &Value) -> v1::ImageMetadata {
    let text = |name: &str| metadata[name].as_str().unwrap_or_default().to_owned();
    let list = |name: &str| {
        let items = metadata[name].as_array().into_iter().flatten();
        items.filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>()
    };
    let pairs = |name: &str| {
        let items = metadata[name].as_object().into_iter().flatten();
        items.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
    };
    v1::ImageMetadata {
        original_image: text("original_image"),
        image_digest: text("image_digest"),
        layers: list("layers"),
        labels: pairs("labels"),
        command: list("command"),
        entrypoint: list("entrypoint"),
        working_dir: text("working_dir"),
        env: pairs("env"),
        exposed_ports: list("exposed_ports"),
        user: text("user"),
        volumes: list("volumes"),
        ..Default::default()
    }
}

/// What a build cost, or what it cost so far.
fn metrics(build: &Build) -> Option<v1::BuildMetrics> {
    match (&build.result, &build.usage) {
        (Some(result), _) => Some(sizes(result, cost(&result.metrics))),
        (None, Some(usage)) => Some(cost(&usage.so_far)),
        (None, None) => None,
    }
}

/// What stood around the processes of a build; the host's own names for it are told nobody.
fn isolation(build: &Build) -> Option<v1::BuildIsolation> {
    let isolation = match (&build.result, &build.usage) {
        (Some(result), _) => result.metrics.isolation.as_ref(),
        (None, usage) => usage.as_ref().and_then(|usage| usage.so_far.isolation.as_ref()),
    };
    isolation.map(|isolation| v1::BuildIsolation {
        sandbox_id: isolation.sandbox.clone(),
        security_contexts: isolation.walls.clone(),
        ..Default::default()
    })
}

fn sizes(result: &BuildResult, cost: v1::BuildMetrics) -> v1::BuildMetrics {
    let kept = (result.artifact_bytes.saturating_mul(100)).checked_div(result.image_bytes);
    v1::BuildMetrics {
        rootfs_size_bytes: signed(result.image_bytes),
        compression_ratio: signed(100u64.saturating_sub(kept.unwrap_or(100))),
        ..cost
    }
}

fn cost(metrics: &BuildMetrics) -> v1::BuildMetrics {
    v1::BuildMetrics {
        pull_duration_ms: signed(metrics.pull_ms),
        extract_duration_ms: signed(metrics.extract_ms),
        build_duration_ms: signed(metrics.build_ms),
        optimize_duration_ms: signed(metrics.optimize_ms),
        total_duration_ms: signed(metrics.total_ms),
        original_size_bytes: signed(metrics.source_bytes),
        memory_peak_bytes: signed(metrics.memory_peak_bytes),
        disk_usage_bytes: signed(metrics.disk_bytes),
        cpu_cores_used: small(metrics.cpu_ms.div_ceil(metrics.total_ms.max(1))),
        ..Default::default()
    }
}

/// What a running build takes now; of one that has ended, the most it took.
fn resource_usage(build: &Build) -> Option<v1::ResourceUsage> {
    if let (true, Some(usage)) = (build.state.is_running(), &build.usage) {
        return Some(v1::ResourceUsage {
            memory_used_bytes: signed(usage.memory_bytes),
            cpu_usage_percent: small(usage.cpu_percent),
            disk_used_bytes: signed(usage.disk_bytes),
            downloaded_bytes: signed(usage.so_far.fetched_bytes),
            ..Default::default()
        });
    }
    let result = build.result.as_ref().map(|result| &result.metrics);
    let metrics = result.or_else(|| build.usage.as_ref().map(|usage| &usage.so_far))?;
    Some(v1::ResourceUsage {
        memory_used_bytes: signed(metrics.memory_peak_bytes),
        cpu_usage_percent: small(metrics.cpu_ms.saturating_mul(100) / metrics.total_ms.max(1)),
        disk_used_bytes: signed(metrics.disk_bytes),
        downloaded_bytes: signed(metrics.fetched_bytes),
        ..Default::default()
    })
}

fn failure_message(failure: &Failure) -> v1::BuildFailure {
    v1::BuildFailure {
        code: failure.code.as_str().to_owned(),
        step: failure.step.clone(),
        cause: failure.cause.clone(),
        blame: failure.blame.clone(),
        remedy: failure.remedy.clone(),
        ..Default::default()
    }
}

fn attempt(attempt: &Attempt) -> v1::BuildAttempt {
    v1::BuildAttempt {
        attempt: small(attempt.attempt.into()),
        started_at: timestamp(attempt.started_at).into(),
        ended_at: timestamp(attempt.ended_at).into(),
        failure: failure_message(&attempt.failure).into(),
        ..Default::default()
    }
}

/// A line of a log.
pub(in super::super) fn log_message(line: &LogLine) -> v1::StreamBuildLogsResponse {
    v1::StreamBuildLogsResponse {
        timestamp: timestamp(line.at).into(),
        level: line.level.clone(),
        message: line.message.clone(),
        component: line.component.clone(),
        offset: signed(line.offset),
        ..Default::default()
    }
}

/// A line of a log in plain JSON.
pub(in super::super) fn log_value(line: &LogLine) -> Value {
    json!({
        "offset": line.offset,
        "timestamp": rfc3339(line.at),
        "level": line.level,
        "component": line.component,
        "message": line.message,
    })
}

/// What a tenant may use, and uses.
pub(in super::super) fn quotas(quotas: &Quotas) -> v1::GetTenantQuotasResponse {
    let usage = &quotas.usage;
    let violation = |quota: &crate::store::QuotaExceeded| v1::QuotaViolation {
        quota_type: quota.quota_type.to_owned(),
        current_value: signed(quota.current),
        limit_value: signed(quota.limit),
        message: super::super::error::quota_message(quota),
        reset_time: quota.reset_at.map(timestamp).into(),
        ..Default::default()
    };
    v1::GetTenantQuotasResponse {
        current_limits: limits_message(&quotas.limits).into(),
        current_usage: v1::TenantUsageStats {
            active_builds: small(usage.running),
            daily_builds_used: small(usage.created_today),
            storage_bytes_used: signed(usage.storage_bytes),
            compute_minutes_used: signed(usage.compute_secs.div_ceil(60)),
            builds_queued: small(usage.queued),
            builds_completed_today: small(usage.completed_today),
            builds_failed_today: small(usage.failed_today),
            reset_time: timestamp(quotas.reset_at).into(),
            ..Default::default()
        }
        .into(),
        violations: quotas.violations.iter().map(violation).collect(),
        ..Default::default()
    }
}

/// Figures over a tenant's builds.
pub(in super::super) fn stats(
    stats: &Stats,
    recent_builds: Vec<v1::BuildJob>,
) -> v1::GetBuildStatsResponse {
    v1::GetBuildStatsResponse {
        total_builds: small(stats.total),
        successful_builds: small(stats.completed),
        failed_builds: small(stats.failed),
        avg_build_time_ms: signed(stats.mean_ms),
        total_storage_bytes: signed(stats.storage_bytes),
        total_compute_minutes: signed(stats.compute_secs.div_ceil(60)),
        recent_builds,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use buffa::Enumeration as _;

    #[test]
    fn each_state_has_its_words_on_the_wire() {
        let table: Vec<String> = BuildState::ALL
            .into_iter()
            .map(|each| {
                let (state, status) = (state(each).proto_name(), status(each).proto_name());
                format!("{each} {state} {status} {}", stage(each))
            })
            .collect();
        assert_eq!(
            table,
            [
                "queued BUILD_STATE_PENDING BUILD_STATUS_QUEUED QUEUED",
                "preparing BUILD_STATE_PULLING BUILD_STATUS_RUNNING PREPARATION",
                "downloading BUILD_STATE_EXTRACTING BUILD_STATUS_RUNNING EXTRACTION",
                "building BUILD_STATE_BUILDING BUILD_STATUS_RUNNING BUILD",
                "optimizing BUILD_STATE_OPTIMIZING BUILD_STATUS_RUNNING OPTIMIZATION",
                "packaging BUILD_STATE_OPTIMIZING BUILD_STATUS_RUNNING PACKAGING",
                "completed BUILD_STATE_COMPLETED BUILD_STATUS_COMPLETED DONE",
                "failed BUILD_STATE_FAILED BUILD_STATUS_FAILED DONE",
                "cancelled BUILD_STATE_CANCELLED BUILD_STATUS_CANCELLED DONE",
                "timeout BUILD_STATE_FAILED BUILD_STATUS_TIMEOUT DONE",
            ]
        );
    }

    #[test]
    fn figures_of_a_result_are_those_that_were_measured() {
        let result = BuildResult {
            artifact_key: "public/ab".into(),
            artifact_bytes: 25,
            sha256: "ab".into(),
            image_bytes: 100,
            metadata: json!({"original_image": "nginx", "env": {"A": "b"}, "layers": ["x"]}),
            from_cache: false,
            metrics: crate::build::record::BuildMetrics {
                total_ms: 1000,
                cpu_ms: 1500,
                ..Default::default()
            },
        };
        let figures = sizes(&result, cost(&result.metrics));
        assert_eq!((figures.compression_ratio, figures.cpu_cores_used), (75, 2));
        let image = image_metadata(&result.metadata);
        assert_eq!((image.original_image.as_str(), image.layers.len()), ("nginx", 1));
        assert_eq!(image.env.get("A").map(String::as_str), Some("b"));
        assert_eq!(image.user, "");
    }
}
