//! Where the attacks take place: a service that asks for tokens, a tenant that attacks, one that
//! does not, a registry of the attacker's own and a neighbour that nobody may reach.

use std::cell::Cell;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::names::Names;
use super::rogue::Rogue;
use crate::images::generated;
use crate::images::layout::LayoutWriter;
use crate::images::tar::{Node, What};
use crate::process::Program;
use crate::service::api::{Api, Order, retry_after};
use crate::service::throttle::Throttle;
use crate::service::wire::{Answer, Connection, Request};
use crate::service::{Place, Server};
use crate::stories::walls::Held;
use crate::workspace;

/// How long any build of these may take; an emulated machine is slow.
pub(super) const BUILD: Duration = Duration::from_secs(300);

/// What no tenant may ever see: an operator's own, in the environment of the service.
pub(super) const OPERATORS_SECRET: &str = "secret-of-the-operator-5d0f";
/// A tenant's own: credentials for its registry.
pub(super) const VICTIMS_TOKEN: &str = "secret-of-the-victim-77c1";
/// What a private image holds.
pub(super) const VICTIMS_CANARY: &str = "canary-of-the-victim-e3b2";

/// What the attacker's builds may take: little, so that it is soon used up.
const MEMORY_BYTES: u64 = 256 << 20;
const DISK_BYTES: u64 = 256 << 20;

/// Slow enough that what fetches it can be looked at.
const SLOW_BYTES_PER_SEC: u64 = 1 << 20;

/// Where hostile layers and commands try to write on the host.
pub(super) const ESCAPE: &str = "/tmp/builderd-escape";

/// What busybox is called in the attacker's image.
const APPLETS: &[&str] =
    &["sh", "cat", "echo", "grep", "head", "ls", "rm", "sleep", "tr", "true", "wc"];

/// The attacker's programs, compiled.
pub(super) struct Programs {
    /// One attack for each word.
    pub(super) attack: PathBuf,
    /// What is loaded into the OCI runtime.
    pub(super) overwrite: PathBuf,
}

impl Programs {
    /// Compiles them into a directory; one that has them already is left as it is.
    pub(super) fn make(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let programs = Self { attack: dir.join("attack"), overwrite: dir.join("overwrite.so") };
        for (source, program, how) in [
            ("attack.c", &programs.attack, &["-static"][..]),
            ("overwrite.c", &programs.overwrite, &["-shared", "-fPIC"]),
        ] {
            if !program.exists() {
                let source = workspace::top().join("xtask/attacks").join(source);
                let options = ["-O1", "-Wall", "-Wextra", "-Werror", "-o"];
                let compiler = Program::new("cc").args(how).args(options);
                compiler.arg(program).arg(source).run()?;
            }
        }
        Ok(programs)
    }
}

/// How a build of the attacker's ended.
pub(super) struct Ended {
    pub(super) build: Value,
    pub(super) lines: Vec<String>,
}

impl Ended {
    /// Fails unless the build completed.
    pub(super) fn completed(self) -> Result<Vec<String>> {
        if self.build["state"] != "BUILD_STATE_COMPLETED" {
            bail!("{}: {}", self.build["state"], self.build["failure"]);
        }
        Ok(self.lines)
    }

    /// Fails unless the build failed with this code and these words; gives both.
    pub(super) fn failed(&self, code: &str, words: &str) -> Result<String> {
        let failure = &self.build["failure"];
        let cause = failure["cause"].as_str().unwrap_or_default();
        if failure["code"] != code || !cause.contains(words) {
            bail!("{} with {failure}, not {code} with {words:?}", self.build["state"]);
        }
        Ok(format!("{code}: {}", shortened(cause)))
    }

    /// What an attack printed, whatever it was called with.
    pub(super) fn said(&self, word: &str) -> Vec<&str> {
        let prefix = format!("attack {word}: ");
        self.lines.iter().filter_map(|line| line.strip_prefix(&prefix)).collect()
    }
}

/// The end of a long cause says what it is about.
fn shortened(text: &str) -> String {
    const LENGTH: usize = 110;
    let skipped = text.chars().count().saturating_sub(LENGTH);
    let dots = if skipped > 0 { "… " } else { "" };
    format!("{dots}{}", text.chars().skip(skipped).collect::<String>().trim())
}

pub(super) struct Ground {
    pub(super) dir: PathBuf,
    pub(super) place: Place,
    pub(super) server: Server,
    pub(super) registry: Rogue,
    /// A way to the same registry that takes its time.
    pub(super) slow: Throttle,
    pub(super) neighbour: Rogue,
    /// A name that leads to it, every second time.
    pub(super) names: Names,
    /// Where the packs of layers lie, those of other tenants, too.
    pub(super) cache: PathBuf,
    /// What the service held before anything was built.
    pub(super) held: Held,
    pub(super) attacker: Api,
    /// The attacker under another name, under which its commands may reach every public host, at
    /// the neighbour's port as well.
    pub(super) roamer: Api,
    pub(super) victim: Api,
    pub(super) programs: Programs,
    runtime: PathBuf,
    honest_builds: Cell<u64>,
    slowest_honest: Cell<Duration>,
}

impl Ground {
    /// Starts everything below `dir`; `programs` is where the attacker's programs are, or are made.
    pub(super) fn open(binary: &Path, dir: &Path, programs: &Path) -> Result<Self> {
        let (registry, neighbour) = (Rogue::start()?, Rogue::start()?);
        let slow = Throttle::start(registry.address(), SLOW_BYTES_PER_SEC)?;
        let names = Names::start(neighbour.port().parse()?)?;
        let cache = dir.join("cache");
        let insecure = format!("{},{}", registry.address(), slow.address());
        std::fs::create_dir_all(dir)?;
        let wrapped = with_hosts(binary, dir, names.server())?;
        let runtime = PathBuf::from(Program::shell("command -v runc || ls /usr/sbin/runc").text()?);
        let place = Place::new(&wrapped, &dir.join("service"))?
            .set("ADDRESS", "127.0.0.1")
            .set("CACHE_DIR", &cache.display().to_string())
            .set("EGRESS_ALLOWED_PRIVATE", &names.lure().to_string())
            .set("COMMANDS_EGRESS_OF_TENANTS", &format!("roamer=*,roamer=*:{}", neighbour.port()))
            .set("DOCKER_INSECURE_REGISTRIES", &insecure)
            .env("AWS_SECRET_ACCESS_KEY", OPERATORS_SECRET)
            .set("OCI_RUNTIME", &runtime.display().to_string())
            .set("OCI_RUNTIME_ACCEPT_VULNERABLE", "CVE-2025-31133,CVE-2025-52565,CVE-2025-52881");
        let server = place.start_guarded()?;
        let held = Held::by(&server)?;
        let tenant = |name: &str| -> Result<Api> {
            let words = ["token", "create", "--tier", "pro", "--tenant", name];
            let outcome = place.command().args(words).checked()?;
            let token = String::from_utf8(outcome.stdout)?;
            Ok(Api::new(server.address(), name, "PRO").with_token(token.trim()))
        };
        let [attacker, roamer, victim] = ["attacker", "roamer", "victim"].map(tenant);
        let (attacker, roamer, victim) = (attacker?, roamer?, victim?);
        Ok(Self {
            dir: dir.into(),
            programs: Programs::make(programs)?,
            place,
            server,
            registry,
            slow,
            neighbour,
            names,
            cache,
            held,
            attacker,
            roamer,
            victim,
            runtime,
            honest_builds: Cell::new(0),
            slowest_honest: Cell::new(Duration::ZERO),
        })
    }

    /// Makes an image and serves it from the attacker's registry.
    pub(super) fn image(
        &self,
        name: &str,
        config: &Value,
        fill: impl FnOnce(&mut LayoutWriter) -> Result<()>,
    ) -> Result<String> {
        self.registry.serve(&self.layout(name, config, fill)?, name)
    }

    /// Makes an image that nobody serves yet.
    pub(super) fn layout(
        &self,
        name: &str,
        config: &Value,
        fill: impl FnOnce(&mut LayoutWriter) -> Result<()>,
    ) -> Result<PathBuf> {
        let layout = self.dir.join("layouts").join(name);
        let mut writer = LayoutWriter::create(&layout)?;
        fill(&mut writer)?;
        writer.finish(config)?;
        Ok(layout)
    }

    /// The layer of an image in which the attacker's programs run.
    pub(super) fn tools(&self, writer: &mut LayoutWriter) -> Result<()> {
        let busybox = std::fs::read("/bin/busybox")
            .context("cannot read /bin/busybox: install busybox-static")?;
        let attack = std::fs::read(&self.programs.attack)?;
        writer.layer(|tar| {
            for dir in ["bin", "dev", "etc", "proc", "srv", "sys", "tmp", "var"] {
                tar.add(dir, &Node::directory())?;
            }
            tar.add("bin/busybox", &Node::file(busybox).mode(0o755))?;
            for applet in APPLETS {
                tar.add(format!("bin/{applet}"), &Node::link("bin/busybox").mode(0o755))?;
            }
            tar.add("bin/attack", &Node::file(attack.clone()).mode(0o755))?;
            tar.add("bin/raised", &Node::file(attack).mode(0o4755))?;
            tar.add("srv/disk", &Node::new(What::BlockDevice(254, 0)).mode(0o666))
        })
    }

    /// The configuration of such an image.
    pub(super) fn tools_config() -> Value {
        json!({"Env": ["PATH=/bin"], "WorkingDir": "/srv"})
    }

    /// CreateBuild of the attacker, which tries once and may take little.
    pub(super) fn order(&self, image: &str, commands: &[&str]) -> Value {
        Self::order_by(&self.attacker, image, commands)
    }

    fn order_by(who: &Api, image: &str, commands: &[&str]) -> Value {
        let mut message = who.message(&Order::of(image));
        let config = &mut message["config"];
        config["retryPolicy"] = json!({"maxRetries": 0});
        config["limits"] = json!({"maxMemoryBytes": MEMORY_BYTES, "maxDiskBytes": DISK_BYTES});
        if !commands.is_empty() {
            config["strategy"] = json!({"dockerStrategy": {"customCommands": commands}});
        }
        message
    }

    /// Sends an order and returns the build's id.
    pub(super) fn create(&self, order: &Value) -> Result<String> {
        Self::create_by(&self.attacker, order)
    }

    fn create_by(who: &Api, order: &Value) -> Result<String> {
        let answer = who.ask("CreateBuild", order)?;
        Ok(answer["buildId"].as_str().context("the answer names no build")?.to_owned())
    }

    /// Waits for the end of a build of the attacker's.
    pub(super) fn end(&self, id: &str) -> Result<Ended> {
        let text = |line: &Value| line["message"].as_str().unwrap_or_default().to_owned();
        let lines = self.followed(id)?.iter().map(text).collect();
        Ok(Ended { build: self.attacker.build(id)?, lines })
    }

    /// A log to its end; a tenant that asks too often waits like everybody else.
    pub(super) fn followed(&self, id: &str) -> Result<Vec<Value>> {
        loop {
            match self.attacker.follow(id) {
                Err(error) if error.to_string().contains("rate limit exceeded") => {
                    std::thread::sleep(Duration::from_secs(1));
                }
                other => return other,
            }
        }
    }

    /// Builds an image with these commands as the roamer, to whatever end.
    pub(super) fn roam(&self, image: &str, commands: &[&str]) -> Result<Ended> {
        let id = Self::create_by(&self.roamer, &Self::order_by(&self.roamer, image, commands))?;
        let text = |line: Value| line["message"].as_str().unwrap_or_default().to_owned();
        let lines = self.roamer.follow(&id)?.into_iter().map(text).collect();
        Ok(Ended { build: self.roamer.build(&id)?, lines })
    }

    /// The ids of all builds of all tenants.
    pub(super) fn all_builds(&self) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for tenant in [&self.attacker, &self.roamer, &self.victim] {
            let (builds, _) = tenant.list()?;
            ids.extend(
                builds.iter().filter_map(|build| build["buildId"].as_str().map(str::to_owned)),
            );
        }
        Ok(ids)
    }

    /// Builds an image with these commands, to whatever end.
    pub(super) fn build(&self, image: &str, commands: &[&str]) -> Result<Ended> {
        self.end(&self.create(&self.order(image, commands))?)
    }

    /// An answer to the attacker that is none to asking too often.
    pub(super) fn patiently(&self, ask: impl Fn(&Api) -> Result<Answer>) -> Result<Answer> {
        loop {
            let answer = ask(&self.attacker)?;
            if answer.status() != 429 {
                return Ok(answer);
            }
            std::thread::sleep(retry_after(&answer.head));
        }
    }

    /// A request as it comes, with whatever headers; not one that waits for a build.
    pub(super) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<Answer> {
        let mut all = vec![("Content-Type", "application/json")];
        all.extend_from_slice(headers);
        let request = Request { method, path, headers: &all, body: body.as_bytes() };
        Connection::open(self.server.address())?.send(request)
    }

    /// The service answers, and builds a new image for somebody else.
    pub(super) fn is_healthy(&self) -> Result<()> {
        let health = self.send("GET", "/health", &[], "")?;
        if health.status() != 200 {
            bail!("/health answers {}: {}", health.status(), health.text());
        }
        let number = self.honest_builds.get() + 1;
        self.honest_builds.set(number);
        let name = format!("honest-{number}");
        let layout = self.dir.join("layouts").join(&name);
        generated::numbered(&layout, number, 64 << 10)?;
        let started = Instant::now();
        let id = self.victim.create(&Order::of(&self.registry.serve(&layout, &name)?))?;
        self.victim.follow(&id)?;
        self.victim.completed(&id, BUILD).context("an honest build")?;
        self.slowest_honest.set(self.slowest_honest.get().max(started.elapsed()));
        Ok(())
    }

    /// How many honest builds there were, and how long the slowest took.
    pub(super) fn honest(&self) -> (u64, Duration) {
        (self.honest_builds.get(), self.slowest_honest.get())
    }

    /// The OCI runtime of this host.
    pub(super) fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Fails if anything is where hostile layers and commands try to write.
    pub(super) fn nothing_escaped(&self) -> Result<()> {
        match Path::new(ESCAPE).symlink_metadata() {
            Ok(_) => bail!("{ESCAPE} was made on the host"),
            Err(_) => Ok(()),
        }
    }
}

/// The binary, in mounts of its own where names lead wherever the attacker likes: those of a file,
/// and those that the attacker's own server of names knows.
fn with_hosts(binary: &Path, dir: &Path, server: Ipv4Addr) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let hosts = dir.join("hosts");
    std::fs::write(
        &hosts,
        "127.0.0.1 localhost\n\
         127.0.0.1 inside.attacker.example\n\
         169.254.169.254 metadata.attacker.example\n\
         192.0.43.8 both.attacker.example\n\
         127.0.0.1 both.attacker.example\n",
    )?;
    let servers = dir.join("resolv.conf");
    std::fs::write(&servers, format!("nameserver {server}\noptions timeout:2 attempts:2\n"))?;
    let script = dir.join("builderd");
    let line = format!(
        "#!/bin/sh\nmount --make-rprivate / && mount --bind '{}' /etc/hosts && \
         mount --bind '{}' /etc/resolv.conf && exec '{}' \"$@\"\n",
        hosts.display(),
        servers.display(),
        binary.display()
    );
    let inner = dir.join("builderd-inside");
    std::fs::write(&inner, line)?;
    let outer = format!("#!/bin/sh\nexec unshare --mount '{}' \"$@\"\n", inner.display());
    std::fs::write(&script, outer)?;
    for file in [&inner, &script] {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(script)
}
