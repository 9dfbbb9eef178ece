//! What is told arrives: as Prometheus reads it, at a collector, and in the log.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::Uri;
use tokio::sync::mpsc;

use super::*;
use crate::build::record::BuildMetrics;
use crate::build::state::BuildState;
use crate::build::{BuildEvent, Phase};
use crate::tenant::{TenantId, Tier};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn config(otlp: Option<String>) -> TelemetryConfig {
    TelemetryConfig {
        otlp,
        service_name: "builderd-under-test".into(),
        service_version: "1.2.3".into(),
        sampling_rate: 1.0,
        prometheus: None,
        high_cardinality: false,
    }
}

fn json() -> LogConfig {
    LogConfig { level: "info".into(), format: LogFormat::Json }
}

/// A log in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines(&self) -> Vec<serde_json::Value> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn prepared(config: &TelemetryConfig) -> (Telemetry, Dispatch, Log) {
    let log = Log::default();
    let out = log.clone();
    let own = vec!["registry.example.com".to_owned(), "*".to_owned()];
    let (telemetry, dispatch) = prepare(config, own, &json(), move || out.clone()).unwrap();
    (telemetry, dispatch, log)
}

/// Telemetry whose metrics can be read, for tests of those who measure.
pub(crate) fn readable(high_cardinality: bool) -> Telemetry {
    prepared(&TelemetryConfig { high_cardinality, ..config(None) }).0
}

/// What takes lines of the log, and what it has taken, for tests of those who say them.
pub(crate) fn logged() -> (Dispatch, impl Fn() -> Vec<serde_json::Value>) {
    let (_telemetry, dispatch, log) = prepared(&config(None));
    (dispatch, move || log.lines())
}

fn everything(metrics: &Metrics) {
    let tenant: TenantId = "tenant-123".parse().unwrap();
    metrics.build_created(&tenant, Tier::Pro);
    metrics.build_started(Tier::Pro);
    for state in BuildState::ALL.into_iter().filter(|state| state.is_terminal()) {
        metrics.build_ended(Tier::Pro, state, 12.5);
    }
    for step in ["preparing", "downloading", "building", "optimizing", "packaging"] {
        metrics.step(step, 0.3, false);
        metrics.step(step, 0.3, true);
    }
    metrics.sizes(400 << 20, 100 << 20);
    metrics.cost(&BuildMetrics {
        total_ms: 1000,
        cpu_ms: 1500,
        memory_peak_bytes: 64 << 20,
        disk_bytes: 1 << 30,
        ..BuildMetrics::default()
    });
    metrics.quota_violation(&tenant, "daily_builds");
    metrics.rpc("CreateBuild", "ok", 0.002);
    metrics.rpc("/builder.v1.BuilderService/GetBuild", "not_found", 0.001);
    metrics.rpc("/made/up/by/a/caller", "not_found", 0.001);
    metrics.rpc_panicked("GetBuild");
    metrics.audit_left_out(3);
    metrics.tls_reload(true);
    metrics.tls_reload(false);
    metrics.set_depth(7, 3);
    metrics.pull("docker.io", Pull::Fetched(Duration::from_secs(3)));
    metrics.pull("docker.io", Pull::Known);
    metrics.pull("registry.example.com", Pull::Failed);
    metrics.pull("made.up.by.a.caller:5000", Pull::Failed);
    for is_hit in [true, true, true, false] {
        metrics.cache_lookup(Cache::Layers, is_hit);
    }
    metrics.storage_operation("local", "put", "ok", Duration::from_millis(20));
    metrics.set_storage(StorageLevels {
        artifact_bytes: Some(5),
        cache_bytes: Some(6),
        space: Some((10, 20)),
    });
    metrics.set_tenants(vec![TenantLevels {
        tenant,
        running: 2,
        created_today: 9,
        storage_bytes: 300,
        storage_bytes_max: 1200,
    }]);
}

/// The samples of Prometheus' text, checked line by line (prometheus.io, "Text format details").
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let mut described = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let (kind, rest) = rest.split_once(' ').unwrap();
            let (name, rest) = rest.split_once(' ').unwrap();
            assert!(matches!(kind, "HELP" | "TYPE") && !rest.is_empty(), "{line}");
            described.insert(name.to_owned());
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        let family = name.split('{').next().unwrap();
        let parts = ["_bucket", "_sum", "_count"];
        let base = parts.iter().find_map(|part| family.strip_suffix(part)).unwrap_or(family);
        assert!(described.contains(base) || described.contains(family), "{line}");
        assert!(samples.insert(name.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
    }
    samples
}

#[test]
fn every_documented_metric_is_there_and_the_text_is_well_formed() {
    let (telemetry, _dispatch, _log) = prepared(&config(None));
    let metrics = telemetry.metrics();
    everything(&metrics);
    let active = metrics.rpc_begun();
    let text = metrics.render();
    let samples = samples(&text);
    for name in DOCUMENTED.into_iter().filter(|name| !OF_TENANTS.contains(name)) {
        assert!(text.contains(&format!("# TYPE {name} ")), "{name} is not in\n{text}");
    }
    let value = |name: &str| *samples.get(name).unwrap_or_else(|| panic!("{name} in\n{text}"));
    let is = |name: &str, expected: f64| assert!((value(name) - expected).abs() < 1e-9, "{name}");
    is(r#"builderd_builds_total{status="completed",tier="pro"}"#, 1.0);
    is(r#"builderd_build_errors_total{error_type="timeout",tier="pro"}"#, 1.0);
    is(r#"builderd_build_duration_seconds_bucket{status="failed",tier="pro",le="10"}"#, 0.0);
    is(r#"builderd_build_duration_seconds_bucket{status="failed",tier="pro",le="20"}"#, 1.0);
    is(r#"builderd_build_step_errors_total{step="building"}"#, 1.0);
    is(r#"builderd_compression_ratio_sum"#, 0.25);
    is(r#"builderd_build_cpu_usage_cores_sum"#, 1.5);
    is(r#"builderd_active_builds"#, 3.0);
    is(r#"builderd_queued_builds"#, 7.0);
    is(r#"builderd_storage_free_bytes"#, 10.0);
    is(r#"builderd_storage_usage_bytes{storage_type="artifacts"}"#, 5.0);
    is(r#"builderd_storage_usage_bytes{storage_type="cache"}"#, 6.0);
    is(r#"builderd_docker_pulls_total{registry="docker.io",status="fetched"}"#, 1.0);
    is(r#"builderd_docker_pulls_total{registry="docker.io",status="known"}"#, 1.0);
    is(r#"builderd_docker_pulls_total{registry="registry.example.com",status="failed"}"#, 1.0);
    is(r#"builderd_docker_pulls_total{registry="other",status="failed"}"#, 1.0);
    is(r#"builderd_docker_pull_duration_seconds_sum{registry="docker.io"}"#, 3.0);
    is(r#"builderd_docker_pull_duration_seconds_count{registry="docker.io"}"#, 1.0);
    is(r#"builderd_cache_hit_ratio{cache_type="layers"}"#, 0.75);
    is(r#"builderd_cache_lookups_total{cache_type="layers",result="miss"}"#, 1.0);
    is(r#"builderd_storage_operations_total{backend="local",operation="put",status="ok"}"#, 1.0);
    is(r#"rpc_server_active_requests"#, 1.0);
    is(r#"rpc_server_requests_total{code="not_found",method="GetBuild"}"#, 1.0);
    is(r#"rpc_server_requests_total{code="not_found",method="other"}"#, 1.0);
    assert!(!text.contains("tenant-123"), "a tenant is no label unless asked for");
    drop(active);
    assert!(metrics.render().contains("rpc_server_active_requests 0"));
}

#[test]
fn tenants_become_labels_when_asked_for() {
    let telemetry = readable(true);
    let metrics = telemetry.metrics();
    everything(&metrics);
    let text = metrics.render();
    for line in [
        r#"builderd_tenant_builds_total{tenant_id="tenant-123",tier="pro"} 1"#,
        r#"builderd_tenant_builds_active{tenant_id="tenant-123"} 2"#,
        r#"builderd_tenant_quota_usage{quota_type="concurrent_builds",tenant_id="tenant-123"} 2"#,
        r#"builderd_tenant_quota_usage{quota_type="daily_builds",tenant_id="tenant-123"} 9"#,
        r#"builderd_tenant_quota_usage{quota_type="storage",tenant_id="tenant-123"} 300"#,
        r#"builderd_storage_quota_usage_ratio{tenant_id="tenant-123"} 0.25"#,
        r#"builderd_storage_usage_bytes{storage_type="tenant",tenant_id="tenant-123"} 300"#,
    ] {
        assert!(text.contains(&format!("{line}\n")), "{line} is not in\n{text}");
    }
    for name in OF_TENANTS {
        assert!(text.contains(&format!("# TYPE {name} gauge")), "{name} is not in\n{text}");
    }
    // Who is not among the busiest any more has no series any more.
    metrics.set_tenants(Vec::new());
    let text = metrics.render();
    assert!(!text.contains("builderd_tenant_builds_active{"), "{text}");
}

#[test]
fn the_operators_page_names_every_metric_and_no_other() {
    let page = include_str!("../../../../docs/operations.md");
    let table = page.split("### Every metric").nth(1).unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let named: BTreeSet<&str> =
        rows.flat_map(|row| row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2)).collect();
    let telemetry = readable(true);
    everything(&telemetry.metrics());
    let text = telemetry.metrics().render();
    let shown: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert_eq!(named, shown);
    assert_eq!(shown, DOCUMENTED.into_iter().collect());
}

#[test]
fn what_nobody_measured_is_not_shown() {
    let telemetry = readable(true);
    let text = telemetry.metrics().render();
    let unknown = ["builderd_cache_hit_ratio", "builderd_storage_", "builderd_tenant_"];
    for name in unknown {
        assert!(!text.contains(name), "{name} is in\n{text}");
    }
    // An object store has no size that could run out.
    let artifact_bytes = Some(7);
    let levels = StorageLevels { artifact_bytes, ..StorageLevels::default() };
    telemetry.metrics().set_storage(levels);
    let text = telemetry.metrics().render();
    assert!(text.contains(r#"builderd_storage_usage_bytes{storage_type="artifacts"} 7"#), "{text}");
    assert!(!text.contains("builderd_storage_free_bytes"), "{text}");
}

#[test]
fn running_builds_are_summed_up_until_they_end() {
    let telemetry = readable(false);
    let metrics = telemetry.metrics();
    let shown = |expected: (u64, u64, u64)| {
        let text = metrics.render();
        for (name, value) in [
            ("memory_usage_bytes", expected.0),
            ("cpu_usage_percent", expected.1),
            ("disk_usage_bytes", expected.2),
        ] {
            assert!(text.contains(&format!("\nbuilderd_{name} {value}\n")), "{name}\n{text}");
        }
    };
    shown((0, 0, 0));
    let (one, two) = (metrics.running_build(), metrics.running_build());
    one.set(100, 150, 1000);
    two.set(10, 20, 30);
    one.set(50, 0, 2000);
    shown((60, 20, 2030));
    drop(one);
    shown((10, 20, 30));
    drop(two);
    shown((0, 0, 0));
}

#[test]
#[expect(clippy::disallowed_methods, reason = "tests start programs")]
fn promtool_has_nothing_to_say() {
    let telemetry = readable(true);
    everything(&telemetry.metrics());
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("SKIPPED: promtool is not installed (Debian: prometheus)");
        return;
    };
    let text = telemetry.metrics().render();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let said = promtool.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() && words.trim().is_empty(), "{words}\n{text}");
}

#[test]
fn a_line_of_the_log_has_tenant_build_and_trace() {
    let (_telemetry, dispatch, log) = prepared(&config(None));
    tracing::dispatcher::with_default(&dispatch, || {
        let span = request_span("CreateBuild", Some(PARENT));
        span.in_scope(|| {
            Span::current().record("tenant", "t1");
            tracing::info!(count = 3, quick = true, "accepted \"it\"\nnow");
            assert!(traceparent().unwrap().contains(TRACE));
        });
        let kept = span.in_scope(traceparent);
        build_span("t1", "build_1", 1, kept.as_deref()).in_scope(|| {
            step_span("building").in_scope(|| tracing::warn!(tenant = "nearer", "slow"));
            tracing::debug!("not at this level");
        });
        tracing::error!("outside of any span");
    });
    let lines = log.lines();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[0]["message"], "accepted \"it\"\nnow");
    assert_eq!((&lines[0]["count"], &lines[0]["quick"]), (&3.into(), &true.into()));
    assert_eq!((&lines[0]["level"], &lines[0]["tenant"]), (&"info".into(), &"t1".into()));
    assert_eq!(lines[0]["trace_id"], TRACE);
    assert_eq!(lines[0]["method"], "CreateBuild");
    assert!(lines[0]["timestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!((&lines[1]["build"], &lines[1]["step"]), (&"build_1".into(), &"building".into()));
    assert_eq!(lines[1]["tenant"], "nearer");
    assert_eq!(lines[1]["trace_id"], TRACE, "the build is in the trace of its request");
    assert!(lines[2].get("trace_id").is_none());
}

#[test]
fn a_trace_that_cannot_be_read_starts_a_new_one() {
    let (_telemetry, dispatch, log) = prepared(&config(None));
    tracing::dispatcher::with_default(&dispatch, || {
        for bad in [None, Some(""), Some("00-zz-1-01"), Some("00-0000-0000-00")] {
            request_span("GetBuild", bad).in_scope(|| tracing::info!("x"));
        }
    });
    let ids: BTreeSet<String> =
        log.lines().iter().map(|line| line["trace_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), 4);
    assert!(ids.iter().all(|id| id.len() == 32 && id.bytes().any(|byte| byte != b'0')));
}

/// A collector that keeps what it is sent.
async fn collector() -> (String, mpsc::UnboundedReceiver<(String, Bytes)>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let keep = |State(sender): State<mpsc::UnboundedSender<(String, Bytes)>>,
                uri: Uri,
                body: Bytes| async move {
        let _ = sender.send((uri.path().to_owned(), body));
    };
    let router = axum::Router::new().fallback(keep).with_state(sender);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (format!("http://{address}"), receiver)
}

fn contains(body: &Bytes, needle: &[u8]) -> bool {
    body.windows(needle.len()).any(|window| window == needle)
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_and_metrics_reach_a_collector() {
    let (endpoint, mut received) = collector().await;
    let (telemetry, dispatch, _log) = prepared(&config(Some(endpoint)));
    tracing::dispatcher::with_default(&dispatch, || {
        let build = build_span("t1", "build_42", 2, Some(PARENT));
        build.in_scope(|| step_span("downloading").in_scope(|| ()));
        let mut steps = Steps::default();
        build.in_scope(|| steps.apply(&BuildEvent::PhaseStarted { phase: Phase::Flatten }));
    });
    everything(&telemetry.metrics());
    telemetry.finish().await;
    let mut bodies: BTreeMap<String, Vec<Bytes>> = BTreeMap::new();
    while let Ok((path, body)) = received.try_recv() {
        bodies.entry(path).or_default().push(body);
    }
    let sent = |path: &str, needle: &[u8]| {
        bodies.get(path).is_some_and(|bodies| bodies.iter().any(|body| contains(body, needle)))
    };
    for needle in [&b"build_42"[..], b"downloading", b"flatten", b"builderd-under-test", b"1.2.3"] {
        assert!(sent("/v1/traces", needle), "{:?} {bodies:?}", String::from_utf8_lossy(needle));
    }
    let trace: Vec<u8> = (0..16)
        .map(|index| u8::from_str_radix(&TRACE[index * 2..index * 2 + 2], 16).unwrap())
        .collect();
    assert!(sent("/v1/traces", &trace), "the caller's trace goes on");
    // Each would cost something at every turn of a request.
    for needle in [&b"busy_ns"[..], b"idle_ns", b"thread.id", b"thread.name"] {
        let name = String::from_utf8_lossy(needle);
        assert!(!sent("/v1/traces", needle), "{name} is measured");
    }
    for needle in [&b"builderd_builds_total"[..], b"rpc_server_request_duration_seconds"] {
        assert!(sent("/v1/metrics", needle), "{bodies:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_sampled_is_not_sent() {
    let (endpoint, mut received) = collector().await;
    let config = TelemetryConfig { sampling_rate: 0.0, ..config(Some(endpoint)) };
    let (telemetry, dispatch, _log) = prepared(&config);
    tracing::dispatcher::with_default(&dispatch, || {
        request_span("GetBuild", None).in_scope(|| ());
    });
    telemetry.finish().await;
    while let Ok((path, _)) = received.try_recv() {
        assert_ne!(path, "/v1/traces");
    }
}

#[tokio::test]
async fn metrics_have_a_port_of_their_own() {
    let (telemetry, _dispatch, _log) = prepared(&config(None));
    telemetry.metrics().set_depth(2, 1);
    let address = "127.0.0.1:0".parse().unwrap();
    let own = TelemetryConfig { prometheus: Some(address), ..config(None) };
    let listener = bind_metrics(&own).await.unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let router = metrics_router(telemetry.metrics());
    let (crowd, drain) = (crate::api::Crowd::up_to(0), Duration::from_secs(5));
    let entrance = crate::api::Entrance::new(listener, None, crowd);
    let server = tokio::spawn(crate::api::serve(entrance, router, stopped, drain));
    let answer = reqwest::get(format!("http://{address}/metrics")).await.unwrap();
    let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    assert!(answer.text().await.unwrap().contains("builderd_queued_builds 2"));
    let taken = TelemetryConfig { prometheus: Some(address), ..config(None) };
    let error = bind_metrics(&taken).await.unwrap_err().to_string();
    assert!(error.contains("OTEL_PROMETHEUS_PORT"), "{error}");
    stop.send_replace(true);
    server.await.unwrap().unwrap();
}

/// Those that name a tenant, and so are there only when that is asked for.
const OF_TENANTS: [&str; 3] = [
    "builderd_tenant_builds_active",
    "builderd_tenant_quota_usage",
    "builderd_storage_quota_usage_ratio",
];

const DOCUMENTED: [&str; 46] = [
    "builderd_tls_reloads_total",
    "builderd_audit_left_out_total",
    "builderd_builds_total",
    "builderd_build_errors_total",
    "builderd_build_cancellations_total",
    "builderd_build_duration_seconds",
    "builderd_pull_duration_seconds",
    "builderd_extract_duration_seconds",
    "builderd_optimize_duration_seconds",
    "builderd_active_builds",
    "builderd_queued_builds",
    "builderd_image_size_bytes",
    "builderd_rootfs_size_bytes",
    "builderd_compression_ratio",
    "builderd_build_memory_usage_bytes",
    "builderd_build_disk_usage_bytes",
    "builderd_build_cpu_usage_cores",
    "builderd_build_steps_total",
    "builderd_build_step_errors_total",
    "builderd_build_step_duration_seconds",
    "builderd_tenant_builds_total",
    "builderd_tenant_quota_violations_total",
    "rpc_server_requests_total",
    "rpc_server_request_duration_seconds",
    "rpc_server_active_requests",
    "rpc_server_panics_total",
    "builderd_builds_duration_seconds",
    "builderd_builds_queue_size",
    "builderd_quota_violations_total",
    "builderd_storage_usage_bytes",
    "builderd_storage_free_bytes",
    "builderd_storage_total_bytes",
    "builderd_memory_usage_bytes",
    "builderd_cpu_usage_percent",
    "builderd_disk_usage_bytes",
    "builderd_tenant_builds_active",
    "builderd_tenant_quota_usage",
    "builderd_docker_pulls_total",
    "builderd_docker_pull_duration_seconds",
    "builderd_storage_operations_total",
    "builderd_storage_operation_duration_seconds",
    "builderd_storage_quota_usage_ratio",
    "builderd_cache_hit_ratio",
    "builderd_cache_lookups_total",
    "builderd_builds_started_total",
    "target_info",
];
