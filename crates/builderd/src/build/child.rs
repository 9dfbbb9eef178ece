//! One build in a process of its own: `builderd build-child`.
//!
//! The service writes a [`ChildSpec`] to its standard input and reads one [`ChildLine`] per line
//! from its standard output; killing it ends the build and leaves nothing, since all it makes is
//! nameless until it is done. Secrets come by standard input, never by argument or environment.
//! The child knows no database, no tenant and no other build, and sees no file of theirs. What
//! commands need more than that is done by another process, which it starts first.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, lchown};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use oci::{AllowedPlace, ClientOptions, Credentials, Platform, Source};
use rootfs::TreeLimits;
use rustix::process::{Resource, Rlimit, Signal};
use sandbox::{Pipes, Processes, Sandbox, Users, Wall};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use super::admission::MEMORY_BYTES_USUAL;
use super::disk::lock;
use super::error::out_of_memory;
use super::process::status_bytes;
use super::record::Failure;
use super::service::RegistryCredentials;
use super::{
    Blame, BuildEvent, BuildSpec, Checksum, Commands, CommandsSpec, Compression, ImageOptions,
    Observer, PackStorage, Phase, SumBy,
};
use crate::causes::chain;
use crate::packs::{PackCache, SharingDomain};
use crate::staged::Staged;
use crate::tenant::TenantId;

/// Longest line that the service reads from a child.
pub(super) const LINE_BYTES_MAX: usize = 1 << 20;
/// How much of what a probe says is kept.
const PROBE_BYTES_MAX: u64 = 4 << 10;

/// How registries are reached: the part of the settings that a child needs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct RegistrySpec {
    /// Asked before the registry itself, each `[HOST=]MIRROR`.
    pub(crate) mirrors: Vec<String>,
    /// Reached over plain HTTP.
    pub(crate) insecure: Vec<String>,
    /// The same, where `allowed_private` lets one go there.
    #[serde(default)]
    pub(crate) insecure_of_tenants: Vec<String>,
    /// Places that are not public and may be reached, besides those above.
    #[serde(default)]
    pub(crate) allowed_private: Vec<String>,
    /// The same for one tenant alone. No child is told of other tenants.
    #[serde(skip)]
    pub(crate) private_of_tenants: Vec<(TenantId, String)>,
    /// Domains that nothing is fetched from.
    #[serde(default)]
    pub(crate) blocked_domains: Vec<String>,
    /// Largest image, compressed.
    pub(crate) image_bytes_max: u64,
    /// For the build's own registry.
    pub(crate) credentials: Option<SentCredentials>,
}

/// Credentials on their way through the pipe.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct SentCredentials {
    registry: String,
    username: String,
    secret: String,
}

impl std::fmt::Debug for SentCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SentCredentials").field("registry", &self.registry).finish_non_exhaustive()
    }
}

impl SentCredentials {
    /// For the registry they name, else for `home`.
    pub(crate) fn new(credentials: &RegistryCredentials, home: &str) -> Self {
        let registry = match credentials.registry.as_str() {
            "" => home.to_owned(),
            // A node that is older took it as it came.
            named => oci::registry_named(named).unwrap_or_else(|| named.to_owned()),
        };
        Self {
            registry,
            username: credentials.username.clone(),
            secret: credentials.secret.expose_secret().to_owned(),
        }
    }
}

impl RegistrySpec {
    /// The same with places for one tenant alone, each `TENANT=PLACE`: they are closed to the
    /// others even if they are named as `insecure`, too.
    pub(crate) fn with_places_of_tenants(self, entries: &[String]) -> Self {
        let entries = entries.iter().filter_map(|entry| entry.split_once('='));
        let named = |(tenant, place): (&str, &str)| Some((tenant.parse().ok()?, place.to_owned()));
        let private_of_tenants: Vec<(TenantId, String)> = entries.filter_map(named).collect();
        let places = private_of_tenants.iter().filter_map(|(_, place)| place.parse().ok());
        let places: Vec<AllowedPlace> = places.collect();
        let is_own = |host: &String| places.iter().any(|place| place.holds_registry(host));
        let (insecure_of_tenants, insecure) = self.insecure.into_iter().partition(is_own);
        Self { insecure, insecure_of_tenants, private_of_tenants, ..self }
    }

    /// The same for a tenant that has places of its own; none for one that has none.
    pub(crate) fn of_tenant(&self, tenant: &TenantId) -> Option<Self> {
        let own = self.private_of_tenants.iter().filter(|(of, _)| of == tenant);
        let mut own: Vec<String> = own.map(|(_, place)| place.clone()).collect();
        let has_any = !own.is_empty();
        own.extend_from_slice(&self.allowed_private);
        has_any.then(|| Self { allowed_private: own, ..self.clone() })
    }

    /// The clients of the tenants that have places of their own.
    pub(crate) fn of_tenants(&self) -> HashMap<TenantId, ClientOptions> {
        let tenants = self.private_of_tenants.iter().map(|(tenant, _)| tenant);
        let client = |tenant: &TenantId| self.of_tenant(tenant).map(|spec| spec.client_options());
        tenants.filter_map(|tenant| Some((tenant.clone(), client(tenant)?))).collect()
    }

    /// The same for the client. No file and no environment of the service's user takes part, and
    /// nobody but the operator leads to a place that is not public.
    pub(crate) fn client_options(&self) -> ClientOptions {
        let mut options = ClientOptions { system_proxy: false, ..ClientOptions::default() };
        options.limits.image_bytes_max = self.image_bytes_max;
        options.limits.layer_bytes_max = self.image_bytes_max;
        options.plain_http.extend(self.insecure.iter().cloned());
        self.mirrors.iter().for_each(|mirror| options.add_mirror(mirror));
        // What an older program cannot read allows nothing.
        let allowed = self.allowed_private.iter().filter_map(|place| place.parse().ok()).collect();
        options.close_egress(allowed, self.blocked_domains.clone());
        // Behind what opens doors: this says how they are spoken to alone.
        options.plain_http.extend(self.insecure_of_tenants.iter().cloned());
        if let Some(sent) = &self.credentials {
            let secret = SecretString::from(sent.secret.clone());
            let credentials = match sent.username.is_empty() {
                true => Credentials::RegistryToken(secret),
                false => {
                    Credentials::Password { username: sent.username.clone(), password: secret }
                }
            };
            options.credentials.insert(sent.registry.clone(), credentials);
        }
        options
    }
}

/// Where the layer packs of a child's build are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PackSpec {
    pub(crate) directory: PathBuf,
    pub(crate) domain: String,
    pub(crate) limit_bytes: u64,
}

/// One build, as the service tells its child.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ChildSpec {
    /// The image by digest.
    pub(crate) image: String,
    /// Which platform of it.
    pub(crate) platform: String,
    pub(crate) registry: RegistrySpec,
    pub(crate) output: PathBuf,
    /// `none`, `gzip` or `zstd`.
    pub(crate) compression: String,
    /// Nameless files beside the output when there is no cache.
    pub(crate) packs: Option<PackSpec>,
    /// What is run in the image.
    #[serde(default)]
    pub(crate) commands: Option<CommandsSpec>,
    pub(crate) jobs: usize,
    /// Largest uncompressed image.
    pub(crate) image_bytes_max: Option<u64>,
    /// Memory the process may use for data; the kernel keeps it to that.
    pub(crate) memory_bytes: u64,
    /// Largest file it may write.
    pub(crate) disk_bytes: u64,
    /// What must stand between foreign bytes and this host.
    #[serde(default)]
    pub(crate) walls: Vec<Wall>,
    /// Whether this host lets the process see the build's own directories alone.
    #[serde(default)]
    pub(crate) has_own_files: bool,
    /// Whether it lets it name the build's own processes alone.
    #[serde(default)]
    pub(crate) has_own_processes: bool,
    /// Whose the process and its workers are to the kernel, where this host lets them be of their own. The
    /// service holds them for as long as they run.
    #[serde(default)]
    pub(crate) users: Option<Users>,
}

/// What is asked of a process that tries to be a user of its own.
#[derive(Debug, Serialize, Deserialize)]
struct UsersTrial {
    users: Users,
    has_own_processes: bool,
    /// Where builds read and write.
    places: Vec<PathBuf>,
}

/// What a process says that tried to be shut in, as one line of JSON: why it could not.
#[derive(Debug, Serialize, Deserialize)]
struct Tried {
    refused: Option<String>,
}

/// What a child says, one JSON object per line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ChildLine {
    /// The build goes on.
    Event(BuildEvent),
    /// The image is there.
    Done(Box<ChildReport>),
    /// There will be none.
    Failed(Failure),
}

/// What a child has made.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ChildReport {
    pub(super) metadata: serde_json::Value,
    pub(super) artifact_bytes: u64,
    pub(super) image_bytes: u64,
    pub(super) fetched_bytes: u64,
    pub(super) layers_cached: usize,
    pub(super) phase_secs: Vec<(Phase, f64)>,
    pub(super) memory_peak_bytes: u64,
    pub(super) cpu_ms: u64,
}

/// The whole life of a child.
///
/// # Errors
/// When its pipes are of no use; the build's own failure is a line and no error.
pub(crate) fn main() -> io::Result<()> {
    // Whoever started us may be killed at any moment; then nobody would want the result.
    let end_with_parent = || rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    end_with_parent()?;
    let mut text = String::new();
    io::stdin().lock().read_to_string(&mut text)?;
    if let Ok(wall) = serde_json::from_str(&text) {
        return try_wall(wall);
    }
    if let Ok(trial) = serde_json::from_str(&text) {
        return try_users(&trial);
    }
    let spec: ChildSpec = serde_json::from_str(&text)?;
    drop(text);
    limit(Resource::Fsize, spec.disk_bytes)?;
    let commands = spec.commands.as_ref().map(|wanted| overseen(&spec, wanted)).transpose()?;
    // Not of who runs commands: runtimes reserve more than they take, and what they and the commands
    // take is counted in groups.
    limit(Resource::Data, spec.memory_bytes)?;
    shut_in(&spec)?;
    // Forgotten where rights change: prctl(2).
    end_with_parent()?;
    let speaker = Speaker(Mutex::new(io::stdout()));
    let line = match run(&spec, commands, &speaker) {
        Ok(report) => ChildLine::Done(Box::new(report)),
        Err(failure) => ChildLine::Failed(failure),
    };
    speaker.say(&line)
}

/// Tries a wall around this process, and says what came of it.
fn try_wall(wall: Wall) -> io::Result<()> {
    let tried = sandbox::narrow(&[], processes(wall == Wall::OwnProcesses), None);
    tell(tried.err().map(|error| chain(&error)))
}

/// The same with users of its own: whether it can write where builds do, and give a worker another one.
fn try_users(trial: &UsersTrial) -> io::Result<()> {
    let places: Vec<&Path> = trial.places.iter().map(PathBuf::as_path).collect();
    let narrowed = sandbox::narrow(&places, processes(trial.has_own_processes), Some(trial.users));
    if let Err(error) = narrowed {
        return tell(Some(chain(&error)));
    }
    for place in places {
        if let Err(error) = Staged::create_private_in(place) {
            return tell(Some(format!("cannot write in {}: {error}", place.display())));
        }
    }
    tell((!sandbox::can_isolate()).then(|| "its workers get no users of their own".to_owned()))
}

fn tell(refused: Option<String>) -> io::Result<()> {
    println!("{}", serde_json::to_string(&Tried { refused })?);
    Ok(())
}

fn processes(are_own: bool) -> Processes {
    if are_own { Processes::Own } else { Processes::All }
}

/// The walls that this host gives the process of a build, and why not the others: whether it can
/// see the build's own directories alone, and name the build's own processes alone.
pub(super) fn probe() -> [(Wall, Result<(), String>); 2] {
    let (files, processes) = match asked(&Wall::OwnProcesses) {
        // They are tried together.
        Ok(()) => (Ok(()), Ok(())),
        refused => (asked(&Wall::OwnFiles), refused),
    };
    [(Wall::OwnFiles, files), (Wall::OwnProcesses, processes)]
}

/// Whether this host lets the process of a build be a user of its own, who reads and writes in `places`.
pub(super) fn probe_users(has_own_processes: bool, places: &[&Path]) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("the server is not root".to_owned());
    }
    let absolute = places.iter().map(std::path::absolute).collect::<io::Result<_>>();
    let places = absolute.map_err(|error| chain(&error))?;
    let held = Users::hold_few().map_err(|error| chain(&error))?;
    asked(&UsersTrial { users: held.users(), has_own_processes, places })
}

/// Has a process try what it is asked.
fn asked(question: &impl Serialize) -> Result<(), String> {
    let failed = |error: &dyn std::error::Error| chain(error);
    let program = File::open("/proc/self/exe").map_err(|error| failed(&error))?;
    let arguments = [c"builderd", c"build-child"];
    let (process, mut pipes) =
        Sandbox::spawn_beside(&program, &arguments, &[]).map_err(|error| failed(&error))?;
    let question = serde_json::to_vec(question).map_err(|error| failed(&error))?;
    // One that has ended already says so by its end.
    let _ = pipes.stdin.write_all(&question);
    tried(process, pipes)
}

/// What a process says that tried a wall. Nothing of what it says otherwise is made sense of.
fn tried(mut process: Sandbox, pipes: Pipes) -> Result<(), String> {
    let failed = |error: &dyn std::error::Error| chain(error);
    drop(pipes.stdin);
    let mut said = String::new();
    let read = pipes.stdout.take(PROBE_BYTES_MAX).read_to_string(&mut said);
    let outcome = read.and_then(|_| process.wait()).map_err(|error| failed(&error))?;
    match serde_json::from_str(&said) {
        Ok(Tried { refused: Some(reason) }) => Err(reason),
        Ok(Tried { refused: None }) if outcome.is_success() => Ok(()),
        Ok(Tried { refused: None }) | Err(_) => {
            Err(format!("a process that tried it ended: {outcome}"))
        }
    }
}

/// Commands need mounts and a runtime: who will have them run is started as long as this process
/// may.
fn overseen(spec: &ChildSpec, wanted: &CommandsSpec) -> io::Result<Commands> {
    let layer_bytes_max = layer_limits(spec.disk_bytes).image_data_bytes_max;
    Commands::start(wanted, TreeLimits::default(), layer_bytes_max).map_err(io::Error::other)
}

/// Leaves the directories of this build alone, before anything foreign is read.
fn shut_in(spec: &ChildSpec) -> io::Result<()> {
    if !spec.has_own_files {
        return Ok(());
    }
    let packs = spec.packs.as_ref().map(own_packs).transpose()?;
    if spec.users.is_some() {
        packs.as_deref().map_or(Ok(()), take_over)?;
    }
    let staging = spec.output.parent();
    let kept: Vec<&Path> = staging.into_iter().chain(packs.as_deref()).collect();
    sandbox::narrow(&kept, processes(spec.has_own_processes), spec.users)
        .map_err(io::Error::other)?;
    // By the name that was kept: another one of the same directory leads nowhere now.
    staging.map_or(Ok(()), std::env::set_current_dir)
}

/// Where the packs lie that the build may use, and no others: it is to see no layer of other tenants.
fn own_packs(packs: &PackSpec) -> io::Result<PathBuf> {
    let cache = PackCache::open(&packs.directory).map_err(io::Error::other)?;
    cache.directory_of(&SharingDomain::named(&packs.domain)).map_err(io::Error::other)
}

/// Makes root's what lies in a directory that another user has made, whom a server ran as before: of
/// what is his nothing can be used as a user of its own.
fn take_over(directory: &Path) -> io::Result<()> {
    let root = Some(0);
    if fs::metadata(directory)?.uid() == 0 {
        return Ok(());
    }
    for entry in fs::read_dir(directory)? {
        match lchown(entry?.path(), root, root) {
            // Pruned meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done?,
        }
    }
    // The last, or who is ended before would leave the rest as it is.
    lchown(directory, root, root)
}

fn limit(resource: Resource, bytes: u64) -> io::Result<()> {
    let most = rustix::process::getrlimit(resource).maximum;
    let bytes = most.map_or(bytes, |most| most.min(bytes));
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    Ok(rustix::process::setrlimit(resource, limit)?)
}

fn run(
    spec: &ChildSpec,
    commands: Option<Commands>,
    speaker: &Speaker,
) -> Result<ChildReport, Failure> {
    let step = Mutex::new(Phase::Resolve);
    let observer = Steps { speaker, step: &step };
    let failed = |error: super::BuildError| {
        let step = *lock(&step);
        if spec.memory_bytes < MEMORY_BYTES_USUAL && error.may_be_out_of_memory() {
            return out_of_memory(step.as_str().to_owned(), spec.memory_bytes);
        }
        let mut failure = error.failure(step);
        if matches!(error, super::BuildError::OutputName { source: Some(_), .. }) {
            // The place is the service's choice, not the tenant's.
            failure.blame = Blame::Ours.as_str().to_owned();
        }
        failure
    };
    let spec = engine_spec(spec, commands).map_err(failed)?;
    let report = super::run(&spec, &observer).map_err(failed)?;
    let metadata = &report.metadata;
    Ok(ChildReport {
        artifact_bytes: metadata.artifact.size_bytes,
        image_bytes: metadata.filesystem.size_bytes,
        fetched_bytes: report.fetched_bytes,
        layers_cached: report.layers_cached,
        phase_secs: report.phase_secs,
        memory_peak_bytes: memory_peak_bytes() + report.workers.memory_peak_bytes,
        cpu_ms: cpu_ms() + report.workers.cpu_ms,
        metadata: serde_json::to_value(&report.metadata).unwrap_or_default(),
    })
}

fn engine_spec(
    spec: &ChildSpec,
    commands: Option<Commands>,
) -> Result<BuildSpec, super::BuildError> {
    let wrong = |problem| {
        let path = spec.output.clone();
        super::BuildError::OutputName { path, problem, source: None }
    };
    let source: Source = spec.image.parse().map_err(|_| wrong("its image has no valid name"))?;
    let platform: Platform =
        spec.platform.parse().map_err(|_| wrong("its platform has no valid name"))?;
    let packs = match &spec.packs {
        None => PackStorage::Temporary,
        Some(packs) => PackStorage::Cache {
            cache: PackCache::open(&packs.directory)?,
            domain: SharingDomain::named(&packs.domain),
            limit_bytes: packs.limit_bytes,
        },
    };
    Ok(BuildSpec {
        source,
        platform,
        client: spec.registry.client_options(),
        metadata_file: super::sibling(&spec.output, ".metadata.json"),
        output: spec.output.clone(),
        image: ImageOptions { bytes_max: spec.image_bytes_max, ..ImageOptions::default() },
        compression: match spec.compression.as_str() {
            "gzip" => Compression::Gzip,
            "zstd" => Compression::Zstd,
            _ => Compression::None,
        },
        checksum: match spec.compression.as_str() {
            "gzip" | "zstd" => Checksum::Sha256,
            // Of the file itself the service computes the sum that counts.
            _ => Checksum::None,
        },
        packs,
        commands,
        jobs: spec.jobs,
        layer_limits: layer_limits(spec.disk_bytes),
        tree_limits: TreeLimits::default(),
        walls: spec.walls.clone(),
        sum_by: SumBy::Parent,
    })
}

/// The packs of all layers lie on the build's disk, so together they are no larger than it.
fn layer_limits(disk_bytes: u64) -> rootfs::Limits {
    let limits = rootfs::Limits::default();
    let image_data_bytes_max = limits.image_data_bytes_max.min(disk_bytes);
    rootfs::Limits { image_data_bytes_max, ..limits }
}

/// Writes lines to the service.
struct Speaker(Mutex<io::Stdout>);

impl Speaker {
    fn say(&self, line: &ChildLine) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let mut out = lock(&self.0);
        out.write_all(&text)?;
        out.flush()
    }
}

/// Passes events on and remembers the step, for the failure.
struct Steps<'a> {
    speaker: &'a Speaker,
    step: &'a Mutex<Phase>,
}

impl Observer for Steps<'_> {
    fn event(&self, event: &BuildEvent) {
        if let BuildEvent::PhaseStarted { phase } = event {
            *lock(self.step) = *phase;
        }
        // A service that does not listen any more has killed us already.
        let _ = self.speaker.say(&ChildLine::Event(event.clone()));
    }
}

fn memory_peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status_bytes(&status, "VmHWM:")
}

/// CPU time that this process has taken so far, in milliseconds.
pub(super) fn cpu_ms() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let time = Duration::try_from(time).unwrap_or_default();
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The registry that credentials for `registry` are for, in a build of an image of Docker Hub.
    fn sent_to(registry: &str) -> Vec<String> {
        let credentials = RegistryCredentials {
            registry: registry.into(),
            username: "me".into(),
            secret: SecretString::from("secret"),
        };
        let sent = SentCredentials::new(&credentials, "docker.io");
        let spec = RegistrySpec { credentials: Some(sent), ..RegistrySpec::default() };
        spec.client_options().credentials.into_keys().collect()
    }

    #[test]
    fn the_packs_of_all_layers_together_are_held_to_the_disk_of_a_build() {
        let limits = layer_limits(8192);
        let (tally, two_blocks) = (rootfs::Tally::default(), 8192);
        tally.add(1, 1, two_blocks, &limits).unwrap();
        let source = tally.add(1, 1, 1, &limits).unwrap_err();
        let digest = format!("sha256:{:064}", 0).parse().unwrap();
        let failure = super::super::BuildError::Pack { layer: 1, digest, source };
        let failure = failure.failure(Phase::Layers);
        assert_eq!(failure.code, crate::build::record::FailureCode::QuotaExceeded, "{failure:?}");
        assert_eq!(layer_limits(u64::MAX), rootfs::Limits::default());
    }

    /// What is made of a process that says and does this when it should try a wall.
    fn told(script: &str) -> Result<(), String> {
        let script = std::ffi::CString::new(script).unwrap();
        let shell = File::open("/bin/sh").unwrap();
        let (process, pipes) =
            Sandbox::spawn_beside(&shell, &[c"sh", c"-c", &script], &[]).unwrap();
        tried(process, pipes)
    }

    #[test]
    fn why_a_wall_is_missing_is_one_line_and_no_text_that_is_guessed_at() {
        assert_eq!(told(r#"echo '{"refused":null}'"#), Ok(()));
        let reason = told(r#"echo '{"refused":"no room"}'; echo noise >&2"#);
        assert_eq!(reason, Err("no room".into()));
        for script in [
            "echo own-files",
            "echo 'error: made up' >&2",
            r#"echo '{"refused":null}'; echo more"#,
            r#"echo '{"refused":null}'; exit 3"#,
            "",
        ] {
            let reason = told(script).expect_err(script);
            assert!(reason.starts_with("a process that tried it ended: exit code"), "{reason}");
        }
    }

    #[test]
    fn a_builds_client_reaches_what_is_public_and_what_the_operator_names() {
        let spec = RegistrySpec {
            mirrors: vec!["quay.io=10.0.0.7:5000/quay".into()],
            insecure: vec!["10.0.0.8:5000".into()],
            allowed_private: vec!["10.9.0.0/16".into(), "of a later version".into()],
            blocked_domains: vec!["evil.example".into()],
            ..RegistrySpec::default()
        };
        let options = spec.client_options();
        let reaches = |image: &str| options.check_registry(&image.parse().unwrap()).is_ok();
        for image in ["nginx", "10.0.0.7:5000/x", "10.0.0.8:5000/x", "10.9.1.1/x"] {
            assert!(reaches(image), "{image}");
        }
        for image in ["10.0.0.7/x", "10.0.0.8/x", "127.0.0.1:5000/x", "evil.example/x"] {
            assert!(!reaches(image), "{image}");
        }
        assert!(!RegistrySpec::default().client_options().egress.is_open());
    }

    #[test]
    fn a_place_that_is_named_for_a_tenant_is_closed_to_the_others() {
        let spec = RegistrySpec {
            insecure: vec!["10.0.0.8:5000".into(), "10.7.1.1:80".into(), "10.0.0.9:5000".into()],
            ..RegistrySpec::default()
        };
        let entries =
            ["acme=10.0.0.8:5000", "acme=10.7.0.0/16", "bank=10.8.0.0/16", "acme=10.9.9.9"];
        let spec = spec.with_places_of_tenants(&entries.map(str::to_owned));
        let clients = spec.of_tenants();
        assert_eq!(clients.len(), 2);
        let reaches = |tenant: &str, image: &str| {
            let own = clients.get(&tenant.parse().unwrap()).cloned();
            let options = own.unwrap_or_else(|| spec.client_options());
            options.check_registry(&image.parse().unwrap()).is_ok()
        };
        for image in ["10.0.0.8:5000/x", "10.7.1.1:80/x", "10.7.3.3/x", "10.9.9.9:7/x"] {
            assert!(reaches("acme", image), "{image}");
            assert!(!reaches("bank", image) && !reaches("other", image), "{image}");
        }
        assert!(reaches("bank", "10.8.1.1/x") && !reaches("acme", "10.8.1.1/x"));
        // What is named for nobody is for all, and metadata services for none.
        for tenant in ["acme", "bank", "other"] {
            assert!(reaches(tenant, "10.0.0.9:5000/x") && reaches(tenant, "nginx"));
            assert!(!reaches(tenant, "169.254.169.254/x") && !reaches(tenant, "10.0.0.8:5001/x"));
        }
        // A child is told of its own tenant's places alone, and may speak plain HTTP there.
        let own = spec.of_tenant(&"acme".parse().unwrap()).unwrap();
        let text = serde_json::to_string(&own).unwrap();
        assert!(!text.contains("bank") && !text.contains("10.8.0.0"), "{text}");
        let own: RegistrySpec = serde_json::from_str(&text).unwrap();
        let options = own.client_options();
        assert!(options.check_registry(&"10.0.0.8:5000/x".parse().unwrap()).is_ok());
        assert!(options.plain_http.contains("10.0.0.8:5000"));
        assert!(spec.of_tenant(&"other".parse().unwrap()).is_none());
    }

    #[test]
    fn credentials_go_to_the_registry_that_they_name_in_any_of_its_names() {
        for hub in ["", "https://index.docker.io/v1/", "index.docker.io", "docker.io"] {
            assert_eq!(sent_to(hub), ["docker.io"], "{hub:?}");
        }
        assert_eq!(sent_to("https://GHCR.io/"), ["ghcr.io"]);
        assert_eq!(sent_to("gcr.io/project"), ["gcr.io/project"], "no registry gets them");
    }
}
