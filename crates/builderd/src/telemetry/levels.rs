//! Levels: what is looked at when somebody reads the metrics, in the place of counted.
//!
//! What nobody has measured is not shown: a gauge that says 0 where nothing is known would lie.
//! It does not know who measures.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{AsyncInstrument, Meter};

use crate::tenant::TenantId;

/// Levels of a service.
#[derive(Debug, Default)]
pub(super) struct Levels {
    pub(super) queued: AtomicU64,
    pub(super) running: AtomicU64,
    pub(super) requests: AtomicI64,
    /// In the order of [`Cache`].
    caches: [Lookups; 2],
    storage: Mutex<StorageLevels>,
    tenants: Mutex<Vec<TenantLevels>>,
    /// What the builds that run here take together.
    builds: Mutex<Taken>,
}

/// What a build is looked up in before it does any work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    /// Layer packs, one look for each layer of a build.
    Layers,
    /// Artifacts of earlier builds, one look for each build.
    Artifacts,
}

impl Cache {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Artifacts => "artifacts",
        }
    }
}

/// What lies where artifacts are kept.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StorageLevels {
    /// All artifacts.
    pub(crate) artifact_bytes: Option<u64>,
    /// All layer packs.
    pub(crate) cache_bytes: Option<u64>,
    /// Free and all bytes of the place, where it has a size.
    pub(crate) space: Option<(u64, u64)>,
}

/// What one tenant uses, and what it may.
#[derive(Clone, Debug)]
pub(crate) struct TenantLevels {
    pub(crate) tenant: TenantId,
    pub(crate) running: u64,
    pub(crate) created_today: u64,
    pub(crate) storage_bytes: u64,
    pub(crate) storage_bytes_max: u64,
}

#[derive(Debug, Default)]
struct Lookups {
    all: AtomicU64,
    hits: AtomicU64,
}

impl Lookups {
    /// Nothing before the first look.
    fn ratio(&self) -> Option<f64> {
        let all = self.all.load(Ordering::Relaxed);
        (all > 0).then(|| approximate(self.hits.load(Ordering::Relaxed)) / approximate(all))
    }
}

/// What builds take.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    memory_bytes: u64,
    cpu_percent: u64,
    disk_bytes: u64,
}

impl Levels {
    pub(super) fn looked_up(&self, cache: Cache, is_hit: bool) {
        let lookups = self.lookups(cache);
        lookups.hits.fetch_add(u64::from(is_hit), Ordering::Relaxed);
        lookups.all.fetch_add(1, Ordering::Relaxed);
    }

    fn lookups(&self, cache: Cache) -> &Lookups {
        match cache {
            Cache::Layers => &self.caches[0],
            Cache::Artifacts => &self.caches[1],
        }
    }

    pub(super) fn set_storage(&self, storage: StorageLevels) {
        *lock(&self.storage) = storage;
    }

    pub(super) fn set_tenants(&self, tenants: Vec<TenantLevels>) {
        *lock(&self.tenants) = tenants;
    }
}

/// A build that runs here: what it takes is part of the sums until this is dropped.
#[derive(Debug)]
pub(crate) struct RunningBuild {
    levels: Arc<Levels>,
    part: Mutex<Taken>,
}

impl RunningBuild {
    pub(super) fn new(levels: Arc<Levels>) -> Self {
        Self { levels, part: Mutex::default() }
    }

    /// What it takes now.
    pub(crate) fn set(&self, memory_bytes: u64, cpu_percent: u64, disk_bytes: u64) {
        let mut part = lock(&self.part);
        let mut sum = lock(&self.levels.builds);
        sum.memory_bytes = sum.memory_bytes + memory_bytes - part.memory_bytes;
        sum.cpu_percent = sum.cpu_percent + cpu_percent - part.cpu_percent;
        sum.disk_bytes = sum.disk_bytes + disk_bytes - part.disk_bytes;
        *part = Taken { memory_bytes, cpu_percent, disk_bytes };
    }
}

impl Drop for RunningBuild {
    fn drop(&mut self) {
        self.set(0, 0, 0);
    }
}

/// A request that is being answered.
pub(crate) struct ActiveRequest(Arc<Levels>);

impl ActiveRequest {
    pub(super) fn new(levels: Arc<Levels>) -> Self {
        levels.requests.fetch_add(1, Ordering::Relaxed);
        Self(levels)
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who is told the values of a gauge.
type Told<'a, T> = &'a dyn AsyncInstrument<T>;

/// Gauges, which look at the levels when they are read.
struct Gauges<'a> {
    meter: &'a Meter,
    levels: &'a Arc<Levels>,
}

impl Gauges<'_> {
    fn whole(&self, name: &'static str, what: &'static str, tell: fn(&Levels, Told<'_, u64>)) {
        let levels = Arc::clone(self.levels);
        let gauge = self.meter.u64_observable_gauge(name).with_description(what);
        // The callback is what lives on; the handle does nothing.
        let _ = gauge.with_callback(move |told| tell(&levels, told)).build();
    }

    fn ratio(&self, name: &'static str, what: &'static str, tell: fn(&Levels, Told<'_, f64>)) {
        let levels = Arc::clone(self.levels);
        let gauge = self.meter.f64_observable_gauge(name).with_description(what);
        let _ = gauge.with_callback(move |told| tell(&levels, told)).build();
    }
}

/// Makes every gauge.
pub(super) fn observe(meter: &Meter, levels: &Arc<Levels>) {
    let gauges = Gauges { meter, levels };
    observe_work(&gauges);
    observe_builds(&gauges);
    observe_storage(&gauges);
    observe_tenants(&gauges);
}

fn observe_work(gauges: &Gauges<'_>) {
    gauges.whole("builderd_active_builds", "Builds that run", |levels, told| {
        told.observe(levels.running.load(Ordering::Relaxed), &[]);
    });
    gauges.whole("builderd_queued_builds", "Builds that wait", |levels, told| {
        told.observe(levels.queued.load(Ordering::Relaxed), &[]);
    });
    let what = "The same as builderd_queued_builds, under its other documented name";
    gauges.whole("builderd_builds_queue_size", what, |levels, told| {
        told.observe(levels.queued.load(Ordering::Relaxed), &[]);
    });
    gauges.whole("rpc_server_active_requests", "Requests being answered", |levels, told| {
        let requests = u64::try_from(levels.requests.load(Ordering::Relaxed));
        told.observe(requests.unwrap_or_default(), &[]);
    });
    let what = "Share of the lookups since the start that found what they looked for";
    gauges.ratio("builderd_cache_hit_ratio", what, |levels, told| {
        for cache in [Cache::Layers, Cache::Artifacts] {
            if let Some(ratio) = levels.lookups(cache).ratio() {
                told.observe(ratio, &[KeyValue::new("cache_type", cache.as_str())]);
            }
        }
    });
}

fn observe_builds(gauges: &Gauges<'_>) {
    let what = "Memory of the builds that run here";
    gauges.whole("builderd_memory_usage_bytes", what, |levels, told| {
        told.observe(lock(&levels.builds).memory_bytes, &[]);
    });
    let what = "CPU of the builds that run here; 100 is one core";
    gauges.whole("builderd_cpu_usage_percent", what, |levels, told| {
        told.observe(lock(&levels.builds).cpu_percent, &[]);
    });
    let what = "Disk of the files of the builds that run here";
    gauges.whole("builderd_disk_usage_bytes", what, |levels, told| {
        told.observe(lock(&levels.builds).disk_bytes, &[]);
    });
}

fn observe_storage(gauges: &Gauges<'_>) {
    let what = "Bytes of all artifacts and of all layer packs; of a tenant, what counts against \
                its quota";
    gauges.whole("builderd_storage_usage_bytes", what, |levels, told| {
        let kind = |kind: &'static str| KeyValue::new("storage_type", kind);
        let storage = *lock(&levels.storage);
        if let Some(bytes) = storage.artifact_bytes {
            told.observe(bytes, &[kind("artifacts")]);
        }
        if let Some(bytes) = storage.cache_bytes {
            told.observe(bytes, &[kind("cache")]);
        }
        for of in lock(&levels.tenants).iter() {
            told.observe(of.storage_bytes, &[kind("tenant"), of.label()]);
        }
    });
    let what = "Free bytes where artifacts are";
    gauges.whole("builderd_storage_free_bytes", what, |levels, told| {
        if let Some((free, _)) = lock(&levels.storage).space {
            told.observe(free, &[]);
        }
    });
    let what = "All bytes where artifacts are";
    gauges.whole("builderd_storage_total_bytes", what, |levels, told| {
        if let Some((_, all)) = lock(&levels.storage).space {
            told.observe(all, &[]);
        }
    });
}

fn observe_tenants(gauges: &Gauges<'_>) {
    gauges.whole("builderd_tenant_builds_active", "Builds of a tenant that run", |levels, told| {
        for of in lock(&levels.tenants).iter() {
            told.observe(of.running, &[of.label()]);
        }
    });
    let what = "What a tenant uses of its quotas: builds that run, builds of today, bytes";
    gauges.whole("builderd_tenant_quota_usage", what, |levels, told| {
        for of in lock(&levels.tenants).iter() {
            let kind = |kind: &'static str| [of.label(), KeyValue::new("quota_type", kind)];
            told.observe(of.running, &kind("concurrent_builds"));
            told.observe(of.created_today, &kind("daily_builds"));
            told.observe(of.storage_bytes, &kind("storage"));
        }
    });
    let what = "Bytes of a tenant's artifacts over what it may keep";
    gauges.ratio("builderd_storage_quota_usage_ratio", what, |levels, told| {
        for of in lock(&levels.tenants).iter().filter(|of| of.storage_bytes_max > 0) {
            let ratio = approximate(of.storage_bytes) / approximate(of.storage_bytes_max);
            told.observe(ratio, &[of.label()]);
        }
    });
}

impl TenantLevels {
    fn label(&self) -> KeyValue {
        KeyValue::new("tenant_id", self.tenant.to_string())
    }
}

/// Numbers that are whole by themselves: who panicked while holding them left them so.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Exact up to 2^53, and what is beyond is not measured that closely.
pub(super) fn approximate(count: u64) -> f64 {
    count as f64
}
