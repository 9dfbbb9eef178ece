//! What is counted, under the documented names: those of the original service and those of its
//! documentation, where both mean something.
//!
//! Labels are few and bounded (`labels.rs`). A tenant becomes a label only where the operator
//! asks for it (`OTEL_HIGH_CARDINALITY_ENABLED`). Levels are in `levels.rs`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter, MeterProvider as _};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Registry, TextEncoder};

use super::labels::{self, Registries};
use super::levels::{
    self, ActiveRequest, Cache, Levels, RunningBuild, StorageLevels, TenantLevels, approximate,
};
use crate::build::record::BuildMetrics;
use crate::build::state::BuildState;
use crate::tenant::{TenantId, Tier};

/// Seconds of builds and their steps.
const BUILD_SECS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
    900.0, 1800.0, 3600.0,
];
/// Seconds of requests.
const REQUEST_SECS: [f64; 13] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Seconds of what is asked of the artifact store.
const STORAGE_SECS: [f64; 12] =
    [0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0];
/// Bytes: 1 MiB to 64 GiB.
const BYTES: [f64; 9] = [
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
    17_179_869_184.0,
    68_719_476_736.0,
];
/// The counter of what the audit log leaves out, and what it means.
const AUDIT_LEFT_OUT: (&str, &str) =
    ("builderd_audit_left_out_total", "Refusals that the audit log left out");
const RATIOS: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
const CORES: [f64; 8] = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0];

/// Every instrument.
pub(crate) struct Metrics {
    registry: Registry,
    levels: Arc<Levels>,
    with_tenant: bool,
    registries: Registries,
    builds: Builds,
    phases: Phases,
    pulls: Pulls,
    sizes: Sizes,
    quotas: Quotas,
    storage: Storage,
    requests: Requests,
    tls_reloads: Counter<u64>,
    audit_left_out: Counter<u64>,
}

/// Builds, from their acceptance to their end.
struct Builds {
    accepted: Counter<u64>,
    started: Counter<u64>,
    ended: Counter<u64>,
    failed: Counter<u64>,
    cancelled: Counter<u64>,
    secs: Histogram<f64>,
    /// The same under its other name.
    secs_too: Histogram<f64>,
}

/// The steps of builds.
struct Phases {
    steps: Counter<u64>,
    errors: Counter<u64>,
    secs: Histogram<f64>,
    pull_secs: Histogram<f64>,
    extract_secs: Histogram<f64>,
    optimize_secs: Histogram<f64>,
}

/// What builds ask of registries and caches.
struct Pulls {
    all: Counter<u64>,
    secs: Histogram<f64>,
    lookups: Counter<u64>,
}

/// What becomes of asking a registry for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pull {
    /// Layers came; so long from the first request to the last layer.
    Fetched(Duration),
    /// It was asked for the manifest; every layer, or the artifact, was known.
    Known,
    /// The image is not there, may not be had, or broke off.
    Failed,
}

/// What is asked of the artifact store.
struct Storage {
    operations: Counter<u64>,
    secs: Histogram<f64>,
}

/// What builds make and need.
struct Sizes {
    image_bytes: Histogram<f64>,
    rootfs_bytes: Histogram<f64>,
    compression_ratio: Histogram<f64>,
    memory_bytes: Histogram<f64>,
    disk_bytes: Histogram<f64>,
    cpu_cores: Histogram<f64>,
}

/// Requests that a quota refused.
struct Quotas {
    all: Counter<u64>,
    by_tenant: Counter<u64>,
}

/// Requests.
struct Requests {
    all: Counter<u64>,
    secs: Histogram<f64>,
    panics: Counter<u64>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("with_tenant", &self.with_tenant).finish_non_exhaustive()
    }
}

fn counter(meter: &Meter, name: &'static str, what: &'static str) -> Counter<u64> {
    meter.u64_counter(name).with_description(what).build()
}

fn histogram(
    meter: &Meter,
    (name, what, unit): (&'static str, &'static str, &'static str),
    bounds: &[f64],
) -> Histogram<f64> {
    let builder = meter.f64_histogram(name).with_description(what).with_unit(unit);
    builder.with_boundaries(bounds.to_vec()).build()
}

fn secs(meter: &Meter, name: &'static str, what: &'static str) -> Histogram<f64> {
    histogram(meter, (name, what, "s"), &BUILD_SECS)
}

fn bytes(meter: &Meter, name: &'static str, what: &'static str) -> Histogram<f64> {
    histogram(meter, (name, what, "By"), &BYTES)
}

impl Builds {
    fn new(m: &Meter) -> Self {
        Self {
            accepted: counter(m, "builderd_tenant_builds_total", "Builds that were accepted"),
            started: counter(m, "builderd_builds_started_total", "Tries that were started"),
            ended: counter(m, "builderd_builds_total", "Builds that ended"),
            failed: counter(m, "builderd_build_errors_total", "Builds that failed"),
            cancelled: counter(
                m,
                "builderd_build_cancellations_total",
                "Builds that were cancelled",
            ),
            secs: secs(m, "builderd_build_duration_seconds", "Time from start to end"),
            secs_too: secs(
                m,
                "builderd_builds_duration_seconds",
                "The same as builderd_build_duration_seconds, under its other documented name",
            ),
        }
    }
}

impl Phases {
    fn new(m: &Meter) -> Self {
        Self {
            steps: counter(m, "builderd_build_steps_total", "Steps that ended"),
            errors: counter(m, "builderd_build_step_errors_total", "Steps that failed"),
            secs: secs(m, "builderd_build_step_duration_seconds", "Time of a step"),
            pull_secs: secs(m, "builderd_pull_duration_seconds", "Resolving the image"),
            extract_secs: secs(m, "builderd_extract_duration_seconds", "Fetching layers"),
            optimize_secs: secs(m, "builderd_optimize_duration_seconds", "Compressing the image"),
        }
    }
}

impl Pulls {
    fn new(m: &Meter) -> Self {
        let pulls = "builderd_docker_pulls_total";
        let lookups = "builderd_cache_lookups_total";
        Self {
            all: counter(m, pulls, "Images that registries were asked for"),
            secs: secs(
                m,
                "builderd_docker_pull_duration_seconds",
                "From asking for the manifest to the last layer, where layers were fetched",
            ),
            lookups: counter(m, lookups, "Lookups of builds in caches"),
        }
    }
}

impl Storage {
    fn new(m: &Meter) -> Self {
        let what = "Time of what was asked of the artifact store";
        let secs = ("builderd_storage_operation_duration_seconds", what, "s");
        let (name, what) = ("builderd_storage_operations_total", "What the artifact store did");
        Self { operations: counter(m, name, what), secs: histogram(m, secs, &STORAGE_SECS) }
    }
}

impl Sizes {
    fn new(m: &Meter) -> Self {
        let ratio = ("builderd_compression_ratio", "Size of the artifact over the image's", "1");
        let what = "CPU time of a build over its wall time";
        let cores = ("builderd_build_cpu_usage_cores", what, "1");
        Self {
            image_bytes: bytes(m, "builderd_image_size_bytes", "Size of the uncompressed image"),
            rootfs_bytes: bytes(m, "builderd_rootfs_size_bytes", "Size of the stored artifact"),
            compression_ratio: histogram(m, ratio, &RATIOS),
            memory_bytes: bytes(m, "builderd_build_memory_usage_bytes", "Most memory of a build"),
            disk_bytes: bytes(m, "builderd_build_disk_usage_bytes", "Disk of a build"),
            cpu_cores: histogram(m, cores, &CORES),
        }
    }
}

impl Quotas {
    fn new(m: &Meter) -> Self {
        let (all, what) = ("builderd_quota_violations_total", "Requests refused by a quota");
        let by_tenant = "builderd_tenant_quota_violations_total";
        Self { all: counter(m, all, what), by_tenant: counter(m, by_tenant, what) }
    }
}

impl Requests {
    fn new(m: &Meter) -> Self {
        let what = "Time to answer a request";
        let secs = ("rpc_server_request_duration_seconds", what, "s");
        Self {
            all: counter(m, "rpc_server_requests_total", "Requests answered"),
            secs: histogram(m, secs, &REQUEST_SECS),
            panics: counter(m, "rpc_server_panics_total", "Requests that panicked"),
        }
    }
}

impl Metrics {
    /// Tenants become labels `with_tenant`; `registries` are named beside those that many use.
    pub(super) fn new(
        provider: &SdkMeterProvider,
        registry: Registry,
        with_tenant: bool,
        registries: Vec<String>,
    ) -> Self {
        let meter = &provider.meter("builderd");
        let levels = Arc::<Levels>::default();
        levels::observe(meter, &levels);
        Self {
            registry,
            levels,
            with_tenant,
            registries: Registries::with(registries),
            builds: Builds::new(meter),
            phases: Phases::new(meter),
            pulls: Pulls::new(meter),
            sizes: Sizes::new(meter),
            quotas: Quotas::new(meter),
            storage: Storage::new(meter),
            requests: Requests::new(meter),
            audit_left_out: counter(meter, AUDIT_LEFT_OUT.0, AUDIT_LEFT_OUT.1),
            tls_reloads: counter(meter, "builderd_tls_reloads_total", "New TLS material"),
        }
    }

    /// Measures for nobody.
    #[cfg(test)]
    pub(crate) fn unread() -> Arc<Self> {
        let provider = SdkMeterProvider::builder().build();
        Arc::new(Self::new(&provider, Registry::new(), false, Vec::new()))
    }

    /// The audit log left refusals out.
    pub(crate) fn audit_left_out(&self, count: u64) {
        self.audit_left_out.add(count, &[]);
    }

    /// There was new TLS material, which can be used or not.
    pub(crate) fn tls_reload(&self, is_good: bool) {
        let result = if is_good { "used" } else { "refused" };
        self.tls_reloads.add(1, &[KeyValue::new("result", result)]);
    }

    /// Everything, as Prometheus reads it.
    pub(crate) fn render(&self) -> String {
        let families = self.registry.gather();
        TextEncoder::new().encode_to_string(&families).unwrap_or_else(|error| {
            tracing::error!(%error, "the metrics cannot be shown");
            String::new()
        })
    }

    fn tenant(&self, tenant: &TenantId) -> Option<KeyValue> {
        self.with_tenant.then(|| KeyValue::new("tenant_id", tenant.to_string()))
    }

    /// A build was accepted.
    pub(crate) fn build_created(&self, tenant: &TenantId, tier: Tier) {
        let mut labels = vec![KeyValue::new("tier", tier.as_str())];
        labels.extend(self.tenant(tenant));
        self.builds.accepted.add(1, &labels);
    }

    /// A worker took a build.
    pub(crate) fn build_started(&self, tier: Tier) {
        self.builds.started.add(1, &[KeyValue::new("tier", tier.as_str())]);
    }

    /// A build ended.
    pub(crate) fn build_ended(&self, tier: Tier, state: BuildState, secs: f64) {
        let tier = KeyValue::new("tier", tier.as_str());
        let labels = [tier.clone(), KeyValue::new("status", state.as_str())];
        self.builds.ended.add(1, &labels);
        self.builds.secs.record(secs, &labels);
        self.builds.secs_too.record(secs, &labels);
        match state {
            BuildState::Failed | BuildState::Timeout => {
                self.builds.failed.add(1, &[tier, KeyValue::new("error_type", state.as_str())]);
            }
            BuildState::Cancelled => self.builds.cancelled.add(1, &[tier]),
            BuildState::Completed
            | BuildState::Queued
            | BuildState::Preparing
            | BuildState::Downloading
            | BuildState::Building
            | BuildState::Optimizing
            | BuildState::Packaging => {}
        }
    }

    /// A step of a build ended; `name` is the state's, or the engine's phase.
    pub(crate) fn step(&self, name: &'static str, secs: f64, failed: bool) {
        let labels = [KeyValue::new("step", name)];
        self.phases.steps.add(1, &labels);
        self.phases.secs.record(secs, &labels);
        if failed {
            self.phases.errors.add(1, &labels);
            return;
        }
        match name {
            "preparing" | "resolve" => self.phases.pull_secs.record(secs, &[]),
            "downloading" | "layers" => self.phases.extract_secs.record(secs, &[]),
            "optimizing" | "compress" => self.phases.optimize_secs.record(secs, &[]),
            _ => {}
        }
    }

    /// A registry was asked for an image.
    pub(crate) fn pull(&self, registry: &str, pull: Pull) {
        let registry = KeyValue::new("registry", self.registries.label(registry));
        let status = match pull {
            Pull::Fetched(_) => "fetched",
            Pull::Known => "known",
            Pull::Failed => "failed",
        };
        if let Pull::Fetched(took) = pull {
            self.pulls.secs.record(took.as_secs_f64(), std::slice::from_ref(&registry));
        }
        self.pulls.all.add(1, &[registry, KeyValue::new("status", status)]);
    }

    /// A build looked for something that need not be made again.
    pub(crate) fn cache_lookup(&self, cache: Cache, is_hit: bool) {
        self.levels.looked_up(cache, is_hit);
        let result = KeyValue::new("result", if is_hit { "hit" } else { "miss" });
        self.pulls.lookups.add(1, &[KeyValue::new("cache_type", cache.as_str()), result]);
    }

    /// The artifact store did something, or could not.
    pub(crate) fn storage_operation(
        &self,
        backend: &'static str,
        operation: &'static str,
        status: &'static str,
        took: Duration,
    ) {
        let labels = [
            KeyValue::new("backend", backend),
            KeyValue::new("operation", operation),
            KeyValue::new("status", status),
        ];
        self.storage.secs.record(took.as_secs_f64(), &labels[..2]);
        self.storage.operations.add(1, &labels);
    }

    /// A build begins to run here; what it takes counts until what is returned is dropped.
    pub(crate) fn running_build(&self) -> RunningBuild {
        RunningBuild::new(Arc::clone(&self.levels))
    }

    /// A build made an image of `image_bytes`, stored in `rootfs_bytes`.
    pub(crate) fn sizes(&self, image_bytes: u64, rootfs_bytes: u64) {
        let (image, rootfs) = (approximate(image_bytes), approximate(rootfs_bytes));
        self.sizes.image_bytes.record(image, &[]);
        self.sizes.rootfs_bytes.record(rootfs, &[]);
        if image_bytes > 0 {
            self.sizes.compression_ratio.record(rootfs / image, &[]);
        }
    }

    /// What a build needed.
    pub(crate) fn cost(&self, cost: &BuildMetrics) {
        self.sizes.memory_bytes.record(approximate(cost.memory_peak_bytes), &[]);
        self.sizes.disk_bytes.record(approximate(cost.disk_bytes), &[]);
        if cost.total_ms > 0 {
            self.sizes.cpu_cores.record(approximate(cost.cpu_ms) / approximate(cost.total_ms), &[]);
        }
    }

    /// A quota refused a request.
    pub(crate) fn quota_violation(&self, tenant: &TenantId, kind: &'static str) {
        let kind = KeyValue::new("quota_type", kind);
        self.quotas.all.add(1, std::slice::from_ref(&kind));
        let mut labels = vec![kind];
        labels.extend(self.tenant(tenant));
        self.quotas.by_tenant.add(1, &labels);
    }

    /// A request begins; it is active until what is returned is dropped.
    pub(crate) fn rpc_begun(&self) -> ActiveRequest {
        ActiveRequest::new(Arc::clone(&self.levels))
    }

    /// A request was answered; `method` may be a path, and what is none of ours is `other`.
    pub(crate) fn rpc(&self, method: &str, code: &str, secs: f64) {
        let code = KeyValue::new("code", code.to_owned());
        let labels = [KeyValue::new("method", labels::method(method)), code];
        self.requests.all.add(1, &labels);
        self.requests.secs.record(secs, &labels[..1]);
    }

    /// A request panicked.
    pub(crate) fn rpc_panicked(&self, method: &str) {
        self.requests.panics.add(1, &[KeyValue::new("method", labels::method(method))]);
    }

    /// How many builds wait and run.
    pub(crate) fn set_depth(&self, queued: u64, running: u64) {
        self.levels.queued.store(queued, Ordering::Relaxed);
        self.levels.running.store(running, Ordering::Relaxed);
    }

    /// What lies where artifacts are kept.
    pub(crate) fn set_storage(&self, storage: StorageLevels) {
        self.levels.set_storage(storage);
    }

    /// Whether anybody wants to hear of tenants one by one.
    pub(crate) fn names_tenants(&self) -> bool {
        self.with_tenant
    }

    /// What tenants use, in the place of what they used before; nothing unless they are named.
    pub(crate) fn set_tenants(&self, tenants: Vec<TenantLevels>) {
        if self.with_tenant {
            self.levels.set_tenants(tenants);
        }
    }
}
