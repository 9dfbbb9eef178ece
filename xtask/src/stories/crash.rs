//! Stories about a service that dies at any moment: no build may be lost, none may count twice,
//! nothing may be left behind.
//!
//! Tenants order builds while nodes are killed and started again. A caller whose answer got lost
//! asks again with the same idempotency key, so that what was accepted is known exactly; in the
//! end the service must know the same, and so must the disks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::{Value, json};

use super::lab::{Corner, Lab, Size, files_below, same_bytes};
use super::service::{hex, place};
use super::{Verdict, older};
use crate::chores::fsck;
use crate::compare::walk;
use crate::process::Program;
use crate::service::api::{Api, Order, ended, number, retry_after};
use crate::service::objects::{BUCKET, ObjectStore};
use crate::service::postgres::Postgres;
use crate::service::throttle::Throttle;
use crate::service::{Place, Server, until};

/// Big enough that fetching one takes a while through the throttle.
const IMAGE_BYTES: u64 = 512 << 10;
const BYTES_PER_SEC: u64 = 512 << 10;

/// The longest pause between two kills; a build's try takes about a second.
const PAUSE_MS_MAX: u64 = 3000;

/// How long a caller asks again, and how long all builds may take in the end.
const PATIENCE: Duration = Duration::from_secs(300);

const TIERS: &[&str] = &["PRO", "ENTERPRISE", "DEDICATED"];

/// SplitMix64 (Steele, Lea, Flood 2014): the same seed gives the same moments.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.next() % (to - from))
    }
}

/// How much happens.
struct Plan {
    builds: usize,
    tenants: usize,
    kills: usize,
    images: usize,
    compressions: &'static [&'static str],
}

impl Plan {
    fn of(lab: &Lab, compressions: &'static [&'static str]) -> Self {
        let size = |reduced, full| usize::try_from(lab.scale(reduced, full)).unwrap_or(0);
        Self {
            builds: size(30, 200),
            tenants: size(6, 20),
            kills: size(5, 20),
            images: size(10, 40),
            compressions,
        }
    }

    /// How long the killing goes on, about; the orders are spread over it.
    fn window(&self) -> Duration {
        let kills = u32::try_from(self.kills).unwrap_or(u32::MAX);
        Duration::from_millis(PAUSE_MS_MAX / 2) * kills
    }
}

/// One order of a tenant.
struct Wish {
    tenant: usize,
    order: Order,
}

/// The nodes, as those outside see them: addresses that may answer.
#[derive(Default)]
struct Doors {
    addresses: Mutex<BTreeMap<usize, String>>,
    /// No node will come back.
    abandoned: AtomicBool,
}

impl Doors {
    fn change(&self, node: usize, address: Option<&str>) {
        let mut doors = self.addresses.lock().unwrap_or_else(|broken| broken.into_inner());
        match address {
            Some(address) => doors.insert(node, address.to_owned()),
            None => doors.remove(&node),
        };
    }

    fn any(&self, dice: &mut Dice) -> Option<String> {
        let doors = self.addresses.lock().unwrap_or_else(|broken| broken.into_inner());
        let addresses: Vec<&String> = doors.values().collect();
        if addresses.is_empty() {
            return None;
        }
        Some(addresses[dice.below(addresses.len())].clone())
    }
}

/// A tenant that asks whichever node there is until it gets an answer.
struct Caller<'a> {
    doors: &'a Doors,
    api: Api,
    dice: Dice,
}

impl<'a> Caller<'a> {
    fn new(doors: &'a Doors, tenant: usize, seed: u64) -> Self {
        let name = format!("tenant-{tenant}");
        let api = Api::new("", &name, TIERS[tenant % TIERS.len()]);
        Self { doors, api, dice: Dice(seed ^ tenant as u64) }
    }

    fn ask(&mut self, method: &str, message: &Value) -> Result<Value> {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut wait = Duration::from_millis(50);
            let mut problem = anyhow!("no node is up");
            if let Some(address) = self.doors.any(&mut self.dice) {
                self.api.address = address;
                match self.api.call(method, message) {
                    Ok(answer) => match answer.status() {
                        200 => return answer.json(),
                        // Too fast, or a database that is away.
                        429 | 503 => {
                            wait = retry_after(&answer.head);
                            problem = anyhow!("{}", answer.text());
                        }
                        status => bail!("{method} answered {status}: {}", answer.text()),
                    },
                    // Killed in the middle.
                    Err(error) => problem = error,
                }
            }
            if Instant::now() > end || self.doors.abandoned.load(Ordering::Relaxed) {
                return Err(problem.context(format!("{method} gets no answer")));
            }
            std::thread::sleep(wait);
        }
    }

    fn create(&mut self, order: &Order) -> Result<String> {
        let answer = self.ask("CreateBuild", &self.api.message(order))?;
        Ok(answer["buildId"].as_str().context("no buildId")?.to_owned())
    }

    /// All builds, page by page.
    fn list(&mut self) -> Result<Vec<Value>> {
        let (mut builds, mut token) = (Vec::new(), String::new());
        loop {
            let mut page = self.ask("ListBuilds", &json!({"pageSize": 7, "pageToken": token}))?;
            if let Value::Array(list) = page["builds"].take() {
                builds.extend(list);
            }
            token = page["nextPageToken"].as_str().unwrap_or_default().to_owned();
            if token.is_empty() {
                return Ok(builds);
            }
        }
    }
}

/// Everything that takes part in one campaign.
struct Campaign<'a> {
    lab: &'a Lab,
    plan: Plan,
    wishes: Vec<Wish>,
    places: Vec<Place>,
    servers: Vec<Option<Server>>,
    doors: Doors,
    /// Of the service: each may have bytes of its own.
    versions: usize,
    postgres: Option<Postgres>,
    _throttle: Throttle,
}

impl<'a> Campaign<'a> {
    /// Pushes the images and writes the orders; starts nothing.
    fn new(lab: &'a Lab, plan: Plan, places: Vec<Place>) -> Result<Self> {
        let throttle = Throttle::start(lab.registry().address(), BYTES_PER_SEC)?;
        let mut images = Vec::new();
        for number in 0..plan.images {
            let name = lab.numbered(number as u64, IMAGE_BYTES)?;
            images.push(format!("{}/{name}", throttle.address()));
        }
        let wish = |n: usize| Wish {
            tenant: n % plan.tenants,
            order: Order {
                image: images[n % plan.images].clone(),
                compression: plan.compressions[n / plan.images % plan.compressions.len()],
                key: format!("order-{n}"),
            },
        };
        let insecure = |place: Place| place.set("DOCKER_INSECURE_REGISTRIES", throttle.address());
        Ok(Self {
            lab,
            wishes: (0..plan.builds).map(wish).collect(),
            servers: places.iter().map(|_| None).collect(),
            places: places.into_iter().map(insecure).collect(),
            plan,
            doors: Doors::default(),
            versions: 1,
            postgres: None,
            _throttle: throttle,
        })
    }

    fn start(&mut self, node: usize) -> Result<()> {
        let server = self.places[node].start()?;
        self.doors.change(node, Some(server.address()));
        self.servers[node] = Some(server);
        Ok(())
    }

    /// Runs to the end and returns every build with its tenant, in the order of the wishes.
    fn run(&mut self) -> Result<Vec<Value>> {
        let seed = self.lab.seed();
        println!(
            "      {} builds, {} tenants, {} kills, {} nodes; --seed {seed}",
            self.plan.builds,
            self.plan.tenants,
            self.plan.kills,
            self.places.len()
        );
        for node in 0..self.places.len() {
            self.start(node)?;
        }
        let wishes = std::mem::take(&mut self.wishes);
        let doors = std::mem::take(&mut self.doors);
        let pace = self.plan.window() / u32::try_from(self.plan.builds)?;
        // Servers die with the thread that starts them: the killing stays on this one.
        let ids = std::thread::scope(|scope| {
            let order_all = |tenant| order_all(&doors, &wishes, tenant, pace, seed);
            let callers: Vec<_> = (0..self.plan.tenants)
                .map(|tenant| scope.spawn(move || order_all(tenant)))
                .collect();
            let killed = self.kill_again_and_again(&doors, &mut Dice(seed));
            doors.abandoned.store(killed.is_err(), Ordering::Relaxed);
            killed?;
            let mut ids = BTreeMap::new();
            for caller in callers {
                ids.extend(caller.join().unwrap_or_else(|_| bail!("a caller panicked"))?);
            }
            Ok::<_, anyhow::Error>(ids)
        })?;
        let builds = self.wait_for_all(&doors, seed);
        let checked = builds.and_then(|builds| {
            same_sums(&wishes, &ids, &builds, self.versions)?;
            check_builds(&doors, &wishes, &ids, builds, seed)
        });
        (self.wishes, self.doors) = (wishes, doors);
        checked
    }

    /// Kills nodes while builds run on them, and starts them again.
    fn kill_again_and_again(&mut self, doors: &Doors, dice: &mut Dice) -> Result<()> {
        for turn in 0..self.plan.kills {
            std::thread::sleep(dice.millis(200, PAUSE_MS_MAX));
            let node = dice.below(self.places.len());
            let server = self.servers[node].take().context("the node is down")?;
            // A kill between two builds would prove little; but at the end there may be none.
            let busy = until("a build runs", Duration::from_secs(2), || {
                Ok((!server.children().is_empty()).then_some(()))
            });
            if busy.is_ok() {
                std::thread::sleep(dice.millis(0, 400));
            }
            server.kill()?;
            doors.change(node, None);
            if let Some(postgres) = self.postgres.as_mut().filter(|_| turn == self.plan.kills / 2) {
                std::thread::sleep(dice.millis(0, 300));
                postgres.crash()?;
                std::thread::sleep(dice.millis(0, 1000));
                postgres.start_again()?;
                println!("      PostgreSQL crashed and came back");
            }
            let server = self.places[node].start()?;
            doors.change(node, Some(server.address()));
            self.servers[node] = Some(server);
        }
        Ok(())
    }

    fn wait_for_all(&self, doors: &Doors, seed: u64) -> Result<Vec<Value>> {
        let started = Instant::now();
        let mut builds = Vec::new();
        for tenant in 0..self.plan.tenants {
            let mut caller = Caller::new(doors, tenant, seed);
            builds.extend(until("all builds end", PATIENCE, || {
                let builds = caller.list()?;
                if builds.iter().all(ended) {
                    return Ok(Some(builds));
                }
                std::thread::sleep(Duration::from_millis(300));
                Ok(None)
            })?);
        }
        println!("      all ended {:.1} s after the last kill", started.elapsed().as_secs_f64());
        Ok(builds)
    }

    fn complaints(&self) -> String {
        let texts: Vec<String> = self.places.iter().map(Place::complaints).collect();
        format!("the service warned of:\n{}", texts.join("\n"))
    }

    /// Stops a node for good.
    fn retire(&mut self, node: usize) -> Result<()> {
        self.doors.change(node, None);
        let server = self.servers[node].take().context("the node is down")?;
        let status = server.stop(Duration::from_secs(20))?;
        if !status.success() {
            bail!("SIGTERM ended a node with {status}");
        }
        self.places[node].nothing_staged()
    }

    /// Stops all nodes; then nothing unfinished may be left on any disk.
    fn stop(&mut self) -> Result<()> {
        for (server, place) in self.servers.iter_mut().zip(&self.places) {
            let Some(server) = server.take() else { continue };
            let children = server.children();
            if !children.is_empty() {
                bail!("no build runs, but processes {children:?} do");
            }
            let status = server.stop(Duration::from_secs(10))?;
            if !status.success() {
                bail!("SIGTERM ended a node with {status}");
            }
            place.nothing_staged()?;
        }
        Ok(())
    }
}

/// Orders all that a tenant wishes, one after the other; returns the ids by the wish's number.
fn order_all(
    doors: &Doors,
    wishes: &[Wish],
    tenant: usize,
    pace: Duration,
    seed: u64,
) -> Result<Vec<(usize, String)>> {
    let started = Instant::now();
    let mut caller = Caller::new(doors, tenant, seed);
    let mut ids = Vec::new();
    for (number, wish) in wishes.iter().enumerate().filter(|(_, wish)| wish.tenant == tenant) {
        let due = pace * u32::try_from(number)?;
        std::thread::sleep(due.saturating_sub(started.elapsed()));
        ids.push((number, caller.create(&wish.order)?));
    }
    Ok(ids)
}

/// Builds of one image have the same bytes, whichever of so many versions made them.
fn same_sums(
    wishes: &[Wish],
    ids: &BTreeMap<usize, String>,
    builds: &[Value],
    versions: usize,
) -> Result<()> {
    let mut sums: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for (number, wish) in wishes.iter().enumerate() {
        let is_it = |build: &&Value| ids.get(&number).is_some_and(|id| build["buildId"] == **id);
        let sum = builds.iter().find(is_it).and_then(|build| build["rootfsChecksum"].as_str());
        sums.entry((&wish.order.image, wish.order.compression)).or_default().extend(sum);
    }
    match sums.into_iter().find(|(_, sums)| sums.len() > versions) {
        Some(((image, _), sums)) => bail!("builds of {image} have {} different sums", sums.len()),
        None => Ok(()),
    }
}

/// What was accepted and what the service knows must be the same, build by build.
fn check_builds(
    doors: &Doors,
    wishes: &[Wish],
    ids: &BTreeMap<usize, String>,
    builds: Vec<Value>,
    seed: u64,
) -> Result<Vec<Value>> {
    let mut by_id: BTreeMap<String, Value> = BTreeMap::new();
    for build in builds {
        let id = build["buildId"].as_str().context("a build without id")?.to_owned();
        if by_id.insert(id.clone(), build).is_some() {
            bail!("{id} is listed twice");
        }
    }
    let mut tries_cut = 0;
    let mut found = Vec::new();
    for number in 0..wishes.len() {
        let id = ids.get(&number).with_context(|| format!("order {number} was not accepted"))?;
        let build = by_id.remove(id).with_context(|| format!("{id} is lost"))?;
        if build["state"] != "BUILD_STATE_COMPLETED" {
            bail!("{id} ended as {}: {} {}", build["state"], build["failure"], build["attempts"]);
        }
        tries_cut += build["attempts"].as_array().map_or(0, Vec::len);
        found.push(build);
    }
    if let Some(id) = by_id.keys().next() {
        bail!("{} builds too many: nobody was told of {id}", by_id.len());
    }
    println!("      {} builds completed, {tries_cut} tries were cut short", found.len());
    if tries_cut == 0 {
        bail!("no kill met a running build: nothing was shown; try another --seed");
    }
    check_quotas(doors, wishes, &found, seed)?;
    Ok(found)
}

/// Each tenant's counters are what its builds add up to.
fn check_quotas(doors: &Doors, wishes: &[Wish], builds: &[Value], seed: u64) -> Result<()> {
    let tenants: BTreeSet<usize> = wishes.iter().map(|wish| wish.tenant).collect();
    for tenant in tenants {
        let own = wishes.iter().zip(builds).filter(|(wish, _)| wish.tenant == tenant);
        let own: Vec<&Value> = own.map(|(_, build)| build).collect();
        let artifacts: BTreeMap<String, u64> = own
            .iter()
            .filter(|build| build["rootfsPath"].is_string())
            .map(|build| (build["rootfsPath"].to_string(), number(&build["rootfsSizeBytes"])))
            .collect();
        let mut caller = Caller::new(doors, tenant, seed);
        let quotas = caller.ask("GetTenantQuotas", &json!({}))?;
        for (field, wanted) in [
            ("dailyBuildsUsed", own.len() as u64),
            ("buildsCompletedToday", own.len() as u64),
            ("buildsFailedToday", 0),
            ("activeBuilds", 0),
            ("buildsQueued", 0),
            ("storageBytesUsed", artifacts.values().sum()),
        ] {
            let found = number(&quotas["currentUsage"][field]);
            if found != wanted {
                bail!("tenant-{tenant}: {field} is {found}, not {wanted}: {quotas}");
            }
        }
    }
    Ok(())
}

/// Downloads every artifact once and judges it; returns where they lie.
fn check_artifacts(
    campaign: &Campaign<'_>,
    corner: &Corner<'_>,
    builds: &[Value],
) -> Result<BTreeSet<String>> {
    let mut dice = Dice(1);
    let mut paths = BTreeSet::new();
    for (wish, build) in campaign.wishes.iter().zip(builds) {
        let path = build["rootfsPath"].as_str().context("no rootfsPath")?;
        if !paths.insert(path.to_owned()) {
            continue;
        }
        let mut api = Caller::new(&campaign.doors, wish.tenant, 0).api;
        api.address = campaign.doors.any(&mut dice).context("no node is up")?;
        let file = corner.output("artifact");
        api.download(build["buildId"].as_str().unwrap_or_default(), &file)?;
        if build["rootfsChecksum"] != json!(hex(walk::sha256_of(&file)?)) {
            bail!("{path} is not what its checksum says");
        }
        if wish.order.compression == "none" {
            fsck(&file)?;
            check_command(corner, wish, &file)?;
        }
    }
    println!("      {} artifacts are whole", paths.len());
    Ok(paths)
}

/// The command makes the same bytes of the same image.
fn check_command(corner: &Corner<'_>, wish: &Wish, file: &Path) -> Result<()> {
    let output = corner.output("command.ext4");
    let registry = wish.order.image.split('/').next().unwrap_or_default();
    corner.build(&wish.order.image, &output, &["--plain-http", registry])?;
    same_bytes(file, &output)
}

pub(super) fn builds_survive_a_service_that_is_killed_again_and_again(
    lab: &Lab,
) -> Result<Verdict> {
    let corner = lab.corner()?;
    let plan = Plan::of(lab, &["none", "gzip", "zstd"]);
    let mut campaign = Campaign::new(lab, plan, vec![place(lab, &corner)?])?;
    let checked = campaign.run().and_then(|builds| {
        let paths = check_artifacts(&campaign, &corner, &builds)?;
        campaign.stop()?;
        let place = &campaign.places[0];
        let files = files_below(&place.artifacts())?;
        let files: BTreeSet<String> = files.iter().map(|file| file.display().to_string()).collect();
        if files != paths {
            bail!("the artifacts on the disk are {files:?}, those of builds {paths:?}");
        }
        if sqlite(place, "PRAGMA integrity_check")? != "ok" {
            bail!("the database is damaged");
        }
        check_database(place, |sql| sqlite(place, sql))
    });
    checked.with_context(|| campaign.complaints())?;
    Ok(Verdict::Passed)
}

/// What no database may hold once all builds have completed; each query counts violations.
const NEVER: &[(&str, &str)] = &[
    ("builds that have not ended", "SELECT count(*) FROM build WHERE state <> 'completed'"),
    (
        "builds that ended never or twice",
        "SELECT count(*) FROM build WHERE 1 <> (SELECT count(*) FROM build_event
           WHERE build_event.tenant_id = build.tenant_id AND build_event.build_id = build.id
           AND to_state IN ('completed', 'failed', 'cancelled', 'timeout'))",
    ),
    (
        "events that do not follow the one before",
        "SELECT count(*) FROM build_event JOIN build_event AS earlier
           ON earlier.tenant_id = build_event.tenant_id
           AND earlier.build_id = build_event.build_id AND earlier.seq = build_event.seq - 1
           WHERE build_event.from_state <> earlier.to_state",
    ),
    (
        "leases and credentials of ended builds",
        "SELECT count(*) FROM build WHERE lease_owner IS NOT NULL OR sealed_credentials IS NOT NULL",
    ),
    (
        "artifacts that no build has",
        "SELECT count(*) FROM artifact WHERE NOT EXISTS
           (SELECT 1 FROM build WHERE build.artifact_key = artifact.artifact_key)",
    ),
];

/// Asks the database itself, by its own client, then the command.
fn check_database(place: &Place, query: impl Fn(&str) -> Result<String>) -> Result<()> {
    for (what, sql) in NEVER {
        let count = query(sql)?;
        if count != "0" {
            bail!("the database holds {count} {what}");
        }
    }
    let said = place.command().args(["admin", "check"]).checked()?.said();
    println!("      admin check: {}", said.lines().last().unwrap_or_default());
    Ok(())
}

fn sqlite(place: &Place, sql: &str) -> Result<String> {
    Program::new("sqlite3").arg("-bail").arg(place.database()).arg(sql).text()
}

pub(super) fn builds_survive_killed_nodes_and_a_crashed_database(lab: &Lab) -> Result<Verdict> {
    survived_by_a_fleet(lab, &[lab.binary(); 3])
}

pub(super) fn builds_survive_while_nodes_of_two_versions_share_a_database(
    lab: &Lab,
) -> Result<Verdict> {
    match older::binary(lab.size == Size::Full)? {
        // The first brings the schema up to date.
        Ok(older) => survived_by_a_fleet(lab, &[lab.binary(), &older, lab.binary()]),
        Err(reason) => Ok(Verdict::Skipped(reason)),
    }
}

/// One node for each binary, all of them on one PostgreSQL and one object store.
fn survived_by_a_fleet(lab: &Lab, binaries: &[&Path]) -> Result<Verdict> {
    let corner = lab.corner()?;
    let (postgres, objects) = (Postgres::start()?, ObjectStore::start()?);
    let key = corner.path("master.key").display().to_string();
    let mut places = Vec::new();
    for (node, binary) in binaries.iter().enumerate() {
        let dir = corner.path(&format!("node-{node}"));
        places.push(
            Place::new(binary, &dir)?
                .set("MASTER_KEY_FILE", &key)
                .set("DATABASE_TYPE", "postgres")
                .set("DATABASE_URL", &postgres.url())
                .set("STORAGE_BACKEND", "s3")
                .set("S3_BUCKET", BUCKET)
                .set("S3_ENDPOINT", &objects.endpoint())
                .set("S3_ALLOW_HTTP", "true")
                .set("S3_ACCESS_KEY_ID", "test")
                .set("S3_SECRET_ACCESS_KEY", "test"),
        );
    }
    let mut campaign = Campaign::new(lab, Plan::of(lab, &["zstd", "gzip"]), places)?;
    campaign.postgres = Some(postgres);
    campaign.versions = binaries.iter().collect::<BTreeSet<_>>().len();
    let checked = campaign.run().and_then(|builds| {
        // An older version cannot read all that this one stores.
        for (node, binary) in binaries.iter().enumerate() {
            if *binary != lab.binary() {
                campaign.retire(node)?;
            }
        }
        let paths = check_artifacts(&campaign, &corner, &builds)?;
        campaign.stop()?;
        let url = format!("s3://{BUCKET}/");
        let keys: BTreeSet<String> =
            objects.keys()?.into_iter().map(|key| format!("{url}{key}")).collect();
        // What a try has stored that was cut short then is the next one's, if that makes the same
        // bytes; else nobody names it, and a sweep removes it when it is old enough.
        let is_whole = match campaign.versions {
            1 => keys == paths,
            _ => keys.is_superset(&paths) && keys.len() <= paths.len() + campaign.plan.kills,
        };
        if !is_whole {
            bail!("the objects are {keys:?}, those of builds {paths:?}");
        }
        let postgres = campaign.postgres.as_ref().context("no database")?;
        check_database(&campaign.places[0], |sql| postgres.query(sql))
    });
    checked.with_context(|| campaign.complaints())?;
    Ok(Verdict::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_throws_the_same_dice() {
        let throws = |seed| {
            let mut dice = Dice(seed);
            (0..5).map(|_| dice.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(throws(7), throws(7));
        assert_ne!(throws(7), throws(8));
        assert!(throws(7).iter().all(|throw| *throw < 1000));
    }
}
