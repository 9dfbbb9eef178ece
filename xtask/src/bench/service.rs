//! `cargo xtask bench --service`: what the service costs, by the kernel's own figures of its
//! process. The load comes from this process and is not counted.

use std::io::Read as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::measure::mebibytes;
use crate::images::{self, generated};
use crate::process::Program;
use crate::registry::Registry;
use crate::service::api::{Api, Order};
use crate::service::throttle::Throttle;
use crate::service::wire::Connection;
use crate::service::{Place, Server, until};
use crate::{chores, workspace};

/// Builds of the tenant whose list is read; [`OTHERS`] more tenants have as many together.
const HISTORIES: [u64; 2] = [1_000, 100_000];
const OTHERS: u64 = 50;

/// How often each call is made whose time is a median.
const CALLS: usize = 21;

/// How often GetBuild is asked for, and by how many at once.
const REQUESTS: usize = 12_000;
const CALLERS: [usize; 2] = [1, 4];

const FOLLOWERS: usize = 1_000;
const FOLLOWERS_AT_ONCE: usize = 400;

/// What is measured, and where.
struct Bench {
    place: Place,
    registry: Registry,
    throttle: Throttle,
    scratch: tempfile::TempDir,
}

/// Prints markdown for `docs/benchmarks.md`.
pub(crate) fn run(binary: Option<String>) -> Result<()> {
    let binary = match binary {
        Some(path) => Path::new(&path).canonicalize()?,
        None => workspace::release_binary("builderd")?,
    };
    more_files()?;
    let registry = Registry::start()?;
    let throttle = Throttle::start(registry.address(), 50_000)?;
    let scratch = chores::scratch()?;
    let insecure = format!("{},{}", registry.address(), throttle.address());
    let place = Place::new(&binary, &scratch.path().join("service"))?
        .set("DOCKER_INSECURE_REGISTRIES", &insecure);
    let bench = Bench { place, registry, throttle, scratch };
    println!("\n### The service\n\n| | |\n|---|---:|");
    bench.warm_repeats()?;
    for history in HISTORIES {
        bench.with_history(history)?;
    }
    bench.followers()
}

fn row(what: &str, figure: &str) {
    println!("| {what} | {figure} |");
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1000.0)
}

/// A socket for each follower needs more files than a shell allows by default.
fn more_files() -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = maximum.map_or(1 << 16, |most| most.min(1 << 16));
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum })?)
}

impl Bench {
    /// From CreateBuild to the end of the log of an image that is known.
    fn warm_repeats(&self) -> Result<()> {
        let server = self.place.start()?;
        std::thread::sleep(Duration::from_secs(3));
        row("idle memory, just started", &format!("{:.1} MiB", mebibytes(server.rss_bytes()?)));
        let image = if crate::process::is_root() { "small" } else { images::TINY };
        let order = Order::of(&self.registry.push(&images::layout(image)?, image)?);
        let api = Api::new(server.address(), "template", "DEDICATED");
        let first = api.create(&order)?;
        api.follow(&first)?;
        api.completed(&first, Duration::from_secs(120))?;
        let (mut times, mut own) = (Vec::new(), Vec::new());
        for _ in 0..CALLS {
            let started = Instant::now();
            let id = api.create(&order)?;
            api.follow(&id)?;
            times.push(started.elapsed());
            let build = api.completed(&id, Duration::from_secs(5))?;
            let ms = crate::service::api::number(&build["metrics"]["totalDurationMs"]);
            own.push(Duration::from_millis(ms));
        }
        let figure = milliseconds(median(times));
        row(&format!("`{image}` again, CreateBuild → end of its log, median of {CALLS}"), &figure);
        row("of which a worker had it", &milliseconds(median(own)));
        std::thread::sleep(Duration::from_secs(3));
        row("idle memory, after them", &format!("{:.1} MiB", mebibytes(server.rss_bytes()?)));
        stop(server)
    }

    /// Calls whose cost must not depend on how much is stored.
    fn with_history(&self, builds: u64) -> Result<()> {
        let total = self.fill(builds)?;
        let server = self.place.start()?;
        let api = Api::new(server.address(), "big", "DEDICATED");
        for (what, message) in [
            ("the first page", json!({"pageSize": 50})),
            (
                "failed ones, of which there are none",
                json!({
                    "pageSize": 50, "stateFilter": ["BUILD_STATE_FAILED"],
                }),
            ),
        ] {
            let time = median_of(&api, "ListBuilds", &message)?;
            row(&format!("ListBuilds, {what}, {builds} builds"), &milliseconds(time));
        }
        let time = median_of(&api, "GetTenantQuotas", &json!({}))?;
        row(&format!("GetTenantQuotas, {builds} builds"), &milliseconds(time));
        // One caller leaves the server a core of its own; several share both with it.
        for callers in CALLERS {
            let (cpu, started) = (server.cpu()?, Instant::now());
            get_builds(&server, total / 2 / OTHERS, callers)?;
            let (wall, cpu) = (started.elapsed(), server.cpu()? - cpu);
            let each = cpu / u32::try_from(REQUESTS)?;
            let what = format!("GetBuild, {total} builds stored, callers: {callers}");
            row(&format!("{what}, server CPU each"), &milliseconds(each));
            let rate = f64::from(u32::try_from(REQUESTS)?) / wall.as_secs_f64();
            row(&what, &format!("{rate:.0} requests/s"));
        }
        row(
            &format!("memory, {total} builds stored"),
            &format!("{:.1} MiB", mebibytes(server.rss_bytes()?)),
        );
        stop(server)
    }

    /// Copies the newest completed build until its tenant's twin `big` has so many, and the
    /// others as many together. Returns how many there are.
    fn fill(&self, builds: u64) -> Result<u64> {
        let sql = |text: &str| {
            Program::new("sqlite3").arg("-bail").arg(self.place.database()).arg(text).text()
        };
        let id = sql("SELECT max(id) FROM build WHERE state = 'completed'
                      AND tenant_id = 'template'")?;
        let tables = [("build", "id"), ("build_event", "build_id"), ("build_log", "build_id")];
        let mut script = String::from("BEGIN;");
        for tenant in std::iter::once("big".to_owned()).chain((0..OTHERS).map(other)) {
            script.push_str(&clone_tenant(&sql, &tenant)?);
        }
        for (table, key) in tables {
            let columns = sql(&format!("SELECT name FROM pragma_table_info('{table}')"))?;
            let copied = |big: bool| {
                let tenant =
                    if big { "'big'".into() } else { format!("'other-' || (n.i % {OTHERS})") };
                let value = |column: &str| match column {
                    "tenant_id" => tenant.clone(),
                    "idempotency_key" => "NULL".into(),
                    column if column == key => "'build_' || printf('%026d', n.i)".into(),
                    column => format!("t.{column}"),
                };
                let values: Vec<String> = columns.lines().map(value).collect();
                format!(
                    "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n
                       WHERE i < {builds} - 1)
                     INSERT OR IGNORE INTO {table} SELECT {} FROM {table} t, n
                       WHERE t.tenant_id = 'template' AND t.{key} = '{id}';",
                    values.join(", ")
                )
            };
            script.push_str(&copied(true));
            script.push_str(&copied(false));
        }
        script.push_str(
            "UPDATE tenant SET completed = (SELECT count(*) FROM build
               WHERE tenant_id = tenant.id AND state = 'completed');
             COMMIT;",
        );
        sql(&script)?;
        sql("SELECT count(*) FROM build WHERE tenant_id <> 'template'")?
            .parse()
            .context("sqlite3 counted nothing")
    }

    /// Many who follow one log; each must get every line.
    fn followers(&self) -> Result<()> {
        let layout = self.scratch.path().join("slow");
        generated::numbered(&layout, 1, 8 << 20)?;
        self.registry.push(&layout, "slow")?;
        let server = self.place.start()?;
        let before = server.rss_bytes()?;
        let api = Api::new(server.address(), "followed", "DEDICATED");
        let image = format!("{}/slow:latest", self.throttle.address());
        let id = api.create(&Order::of(&image))?;
        let opened = AtomicUsize::new(0);
        let mut rss_bytes = 0;
        let bodies = std::thread::scope(|scope| -> Result<Vec<Vec<u8>>> {
            let follow = || -> Result<Vec<u8>> {
                let mut body = api.open_log(&id)?;
                opened.fetch_add(1, Ordering::Relaxed);
                let mut bytes = Vec::new();
                body.read_to_end(&mut bytes)?;
                Ok(bytes)
            };
            let mut threads = Vec::new();
            for number in 0..FOLLOWERS {
                // The tier's rate: so many at once, the others one after the other.
                if number > FOLLOWERS_AT_ONCE {
                    std::thread::sleep(Duration::from_millis(15));
                }
                let small = std::thread::Builder::new().stack_size(256 << 10);
                threads.push(small.spawn_scoped(scope, follow)?);
            }
            until("all follow", Duration::from_secs(60), || {
                Ok((opened.load(Ordering::Relaxed) == FOLLOWERS).then_some(()))
            })?;
            std::thread::sleep(Duration::from_secs(2));
            rss_bytes = server.rss_bytes()?;
            self.throttle.set(u64::MAX);
            let ended = threads.into_iter().map(|thread| thread.join());
            ended.map(|body| body.unwrap_or_else(|_| bail!("a follower panicked"))).collect()
        })?;
        let longest = bodies.iter().max_by_key(|body| body.len()).context("nobody follows")?;
        if let Some(other) = bodies.iter().find(|body| *body != longest) {
            let count = bodies.iter().filter(|body| *body != longest).count();
            let said = String::from_utf8_lossy(other);
            bail!("{count} of {FOLLOWERS} followers got something else, one of them: {said}");
        }
        let figure = |bytes| format!("{:.1} MiB", mebibytes(bytes));
        row("memory before anybody follows", &figure(before));
        row(&format!("memory with {FOLLOWERS} followers of one log"), &figure(rss_bytes));
        row("and after its end", &figure(server.rss_bytes()?));
        stop(server)
    }
}

fn stop(server: Server) -> Result<()> {
    let status = server.stop(Duration::from_secs(20))?;
    if !status.success() {
        bail!("SIGTERM ended the service with {status}");
    }
    Ok(())
}

fn other(number: u64) -> String {
    format!("other-{number}")
}

/// The statements that copy the tenant `template` and its artifact.
fn clone_tenant(sql: &impl Fn(&str) -> Result<String>, tenant: &str) -> Result<String> {
    let mut script = String::new();
    for (table, key) in
        [("tenant", "id"), ("tenant_day", "tenant_id"), ("tenant_artifact", "tenant_id")]
    {
        let columns = sql(&format!("SELECT name FROM pragma_table_info('{table}')"))?;
        let value =
            |column: &str| if column == key { format!("'{tenant}'") } else { column.to_owned() };
        let values: Vec<String> = columns.lines().map(value).collect();
        script.push_str(&format!(
            "INSERT OR IGNORE INTO {table} SELECT {} FROM {table} WHERE {key} = 'template';",
            values.join(", ")
        ));
    }
    Ok(script)
}

fn median_of(api: &Api, method: &str, message: &serde_json::Value) -> Result<Duration> {
    let rpc = api.rpc(method, message);
    let mut connection = Connection::open(&api.address)?;
    let mut times = Vec::new();
    for _ in 0..CALLS {
        let started = Instant::now();
        let answer = connection.send(rpc.request())?;
        times.push(started.elapsed());
        if answer.status() != 200 {
            bail!("{method} answered {}: {}", answer.status(), answer.text());
        }
    }
    Ok(median(times))
}

/// Asks for builds of all the other tenants in turn: no single one may ask so often.
fn get_builds(server: &Server, builds_each: u64, callers: usize) -> Result<()> {
    let asked = AtomicU64::new(0);
    let ask = || -> Result<()> {
        let mut connection = Connection::open(server.address())?;
        loop {
            let turn = asked.fetch_add(1, Ordering::Relaxed);
            if turn >= REQUESTS as u64 {
                return Ok(());
            }
            // Spread over the tenant's builds; a build's number decides its tenant.
            let number = turn % OTHERS + OTHERS * (turn * 7919 % builds_each.max(1));
            let api = Api::new(server.address(), &other(turn % OTHERS), "DEDICATED");
            let message = json!({"buildId": format!("build_{number:026}")});
            let answer = connection.send(api.rpc("GetBuild", &message).request())?;
            if answer.status() != 200 {
                bail!("GetBuild answered {}: {}", answer.status(), answer.text());
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..callers).map(|_| scope.spawn(ask)).collect();
        let mut ended = threads.into_iter().map(|thread| thread.join());
        ended.try_for_each(|result| result.unwrap_or_else(|_| bail!("a caller panicked")))
    })
}
