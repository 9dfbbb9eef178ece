//! The commands of a build: run in the image's own file system, and what they changed packed as
//! one more layer. The processes are `commands`' own; this side hands them the packs, and their
//! layer to a confined worker like any other. It starts none of them but their overseer, and that
//! before it fetches: by then it has no right to.

mod proxy;

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, PipeReader, Read as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{Scope, ScopedJoinHandle};

use ::commands::{
    Base, CommandEnd, CommandLimits, CommandsError, Event, Joins, Order, Overseer, PackPart,
    Scratch, Serve,
};
use bytes::Bytes;
use oci::{EgressPolicy, Image};
use rootfs::{PackSummary, Tally, TreeLimits};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::confined::{self, PackTask, Taken};
use super::disk::{Disk, Liking};
use super::layers::{LayerPacks, shared, stage};
use super::{BuildError, BuildEvent, BuildSpec, Observer, Phase, hex};
use crate::packs::OpenPack;
use proxy::Gate;

/// Pieces of the layer on their way to the worker.
const PIECES_IN_FLIGHT: usize = 16;
const PIECE_BYTES: usize = 64 << 10;

/// Commands, and what they are run with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CommandsSpec {
    /// Each is run by `/bin/sh -c`, in this order.
    pub commands: Vec<String>,
    /// The OCI runtime.
    pub runtime: PathBuf,
    /// How it goes into a user namespace.
    #[serde(default)]
    pub joins: Joins,
    /// What a command may take of memory, in bytes.
    pub memory_bytes: u64,
    /// Processes and threads of a command.
    pub pids_max: u32,
    /// The size of the file system they work on: tree and changes together, in bytes.
    pub disk_bytes: u64,
    /// How they are held to it.
    #[serde(default)]
    pub scratch: Scratch,
    /// Where it is made: a directory that the process that fetches does not reach.
    pub scratch_directory: PathBuf,
    /// What they may reach; nothing if none.
    #[serde(default)]
    pub egress: Option<EgressSpec>,
}

/// What the commands of a build may reach.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct EgressSpec {
    /// Hosts by name, as [`oci::AllowedName`] writes them.
    pub names: Vec<String>,
    /// Places that are not public and that these names may lead to, as [`oci::AllowedPlace`]
    /// writes them.
    pub allowed_private: Vec<String>,
    /// Domains that nothing is fetched from.
    pub blocked_domains: Vec<String>,
    /// What all commands together may send and get, in bytes.
    pub bytes_max: u64,
}

impl EgressSpec {
    fn gate(&self) -> Gate {
        // What another version of this program has written and this one cannot read allows nothing.
        let names = self.names.iter().filter_map(|name| name.parse().ok()).collect();
        let allowed = self.allowed_private.iter().filter_map(|place| place.parse().ok()).collect();
        let policy = EgressPolicy::closed(allowed, self.blocked_domains.clone());
        Gate::new(names, policy, self.bytes_max)
    }
}

/// Commands, and the process that will have them run.
#[derive(Clone, Debug)]
pub struct Commands {
    wanted: CommandsSpec,
    overseer: Arc<Overseer>,
}

impl Commands {
    /// Starts that process, with the rights that this one has still. To be called by the main thread,
    /// before anything foreign is read; `layer_bytes_max` is of all files that the commands may make
    /// or change together.
    ///
    /// # Errors
    /// [`CommandsError`] when it cannot be started.
    pub fn start(
        wanted: &CommandsSpec,
        tree_limits: TreeLimits,
        layer_bytes_max: u64,
    ) -> Result<Self, CommandsError> {
        let order = Order {
            scratch_directory: wanted.scratch_directory.clone(),
            scratch: wanted.scratch,
            disk_bytes: wanted.disk_bytes,
            runtime: wanted.runtime.clone(),
            joins: wanted.joins,
            commands: wanted.commands.clone(),
            limits: CommandLimits {
                memory_bytes: wanted.memory_bytes,
                pids_max: wanted.pids_max,
                // Those of the build.
                secs_max: None,
            },
            tree_limits,
            layer_bytes_max,
            has_door: wanted.egress.is_some(),
        };
        Ok(Self { wanted: wanted.clone(), overseer: Arc::new(Overseer::start(&order)?) })
    }
}

type Packed = Result<(PackSummary, Taken), BuildError>;

/// Runs the commands on the image of `packs`, and adds the pack of what they changed. Gives the
/// sum of that layer's tar, in hex.
///
/// # Errors
/// [`BuildError::Commands`], and those of a layer.
pub(super) fn run(
    spec: &BuildSpec,
    commands: &Commands,
    image: &Image,
    packs: &mut LayerPacks,
    disk: &Disk,
    observer: &dyn Observer,
) -> Result<String, BuildError> {
    let mut files: Vec<&Arc<File>> = Vec::new();
    let mut parts = Vec::with_capacity(packs.packs.len());
    for open in &packs.packs {
        let known = files.iter().position(|file| Arc::ptr_eq(file, &open.file));
        let file = known.unwrap_or_else(|| {
            files.push(&open.file);
            files.len() - 1
        });
        parts.push(PackPart { file, base: open.base, length: open.length() });
    }
    let base = Base {
        environment: image.config.env.clone(),
        working_directory: image.config.working_dir.clone(),
        packs: parts,
    };
    let staged = stage(spec)?;
    let file = shared(staged.file())?;
    let failed = |source| BuildError::Worker { phase: Phase::Commands, source };
    let task = PackTask {
        layer: packs.packs.len(),
        // Its own is known when it is whole; until then messages name the image.
        digest: image.manifest_digest,
        part: 0..u64::MAX,
        liking: Liking::Faster,
        second: None,
        limits: spec.layer_limits.clone(),
        counted: [0; 3],
        writes: disk.writes().without_bytes(),
    };
    // Other builds may use the same packs: nobody is handed them to be written.
    let read_only =
        files.iter().map(|file| confined::read_only(file)).collect::<io::Result<Vec<_>>>();
    let read_only = read_only.map_err(failed)?;
    let open: Vec<&File> = read_only.iter().collect();
    let layer = commands.overseer.hand(&base, &open)?;
    let (ran, packed) = std::thread::scope(|scope| {
        let packer = scope.spawn(|| pack(layer, task, &file, spec, disk));
        let ran = run_with_door(scope, commands, observer);
        (ran, packer.join())
    });
    ran?;
    let lost = || BuildError::WorkerLost { phase: Phase::Commands };
    let (summary, taken) = packed.map_err(|_| lost())?.ok_or_else(lost)??;
    let digest = image.manifest_digest;
    let open = OpenPack::new(file, 0, summary.pack_bytes)
        .map_err(|source| BuildError::PackUnread { layer: packs.packs.len(), digest, source })?;
    packs.packs.push(open);
    packs.taken.push(taken);
    Ok(hex(&summary.diff_id))
}

/// Listens to the commands, and lets them out if there is something that they may reach.
fn run_with_door<'scope>(
    scope: &'scope Scope<'scope, '_>,
    Commands { wanted, overseer }: &Commands,
    observer: &'scope dyn Observer,
) -> Result<(), CommandsError> {
    let Some(egress) = &wanted.egress else {
        return overseer.listen(None, &mut |event| tell(observer, wanted, event));
    };
    let gate = Arc::new(egress.gate());
    let mut served = None;
    let mut serve = |door| served = Some(Served::start(scope, door, &gate, observer));
    let serve: Serve<'_> = &mut serve;
    let ran = overseer.listen(Some(serve), &mut |event| {
        if let Event::Started { .. } = event {
            gate.begin();
        }
        tell(observer, wanted, event);
    });
    // The last words about refusals come before those about the failure.
    drop(served);
    ran.map_err(|error| refused(error, &gate))
}

/// A command that was refused the network, and then ended with an error, most likely did for that.
fn refused(error: CommandsError, gate: &Gate) -> CommandsError {
    match (error, gate.refusal()) {
        (
            CommandsError::Failed { index, command, end: end @ CommandEnd::Exited(_) },
            Some(rule),
        ) => CommandsError::Denied { index, command, end, rule },
        (error, _) => error,
    }
}

/// What keeps the commands' door served; dropped, it is closed.
struct Served<'scope> {
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

impl<'scope> Served<'scope> {
    fn start(
        scope: &'scope Scope<'scope, '_>,
        door: TcpListener,
        gate: &Arc<Gate>,
        observer: &'scope dyn Observer,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let gate = Arc::clone(gate);
        let thread = scope.spawn(move || {
            let warn = |message| observer.event(&BuildEvent::Warning { message });
            if let Err(error) = proxy::serve(door, &gate, stopped, &warn) {
                warn(format!("the commands have no network any more: {error}"));
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        drop(self.stop.take());
        // A panic there has been printed, and the commands have had nobody to speak to since.
        let _ = self.thread.take().map(ScopedJoinHandle::join);
    }
}

/// Packs the layer, once there is one: commands that fail make none.
fn pack(
    mut layer: PipeReader,
    task: PackTask,
    file: &File,
    spec: &BuildSpec,
    disk: &Disk,
) -> Option<Packed> {
    let first = piece(&mut layer)?;
    let (sender, chunks) = mpsc::channel(PIECES_IN_FLIGHT);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut next = Some(first);
            while let Some(chunk) = next {
                // A worker that wants no more says why.
                if sender.blocking_send(chunk).is_err() {
                    return;
                }
                next = piece(&mut layer);
            }
        });
        Some(confined::pack(task, &[file], chunks, &spec.walls, &Tally::default(), disk))
    })
}

/// Some bytes; none at the end.
fn piece(layer: &mut PipeReader) -> Option<io::Result<Bytes>> {
    let mut bytes = vec![0; PIECE_BYTES];
    match layer.read(&mut bytes) {
        Ok(0) => None,
        Ok(count) => {
            bytes.truncate(count);
            Some(Ok(bytes.into()))
        }
        Err(error) => Some(Err(error)),
    }
}

fn tell(observer: &dyn Observer, wanted: &CommandsSpec, event: Event) {
    observer.event(&match event {
        Event::Unpacked => return,
        Event::Started { index } => BuildEvent::CommandStarted {
            command: index,
            text: wanted.commands.get(index).cloned().unwrap_or_default(),
        },
        Event::Output { index, line } => BuildEvent::CommandOutput { command: index, line },
        Event::Warning { message } => BuildEvent::Warning { message },
    });
}

/// What to do about commands that failed.
pub(super) fn hint(error: &CommandsError) -> Option<String> {
    let text = match error {
        CommandsError::Failed { end: CommandEnd::OutOfMemory, .. } => {
            "have it take less memory, or allow the build more (`limits.max_memory_bytes`, of which \
             commands have seven eighths), or use a tier that does"
        }
        CommandsError::Failed { end: CommandEnd::DiskFull, .. } => {
            "have it write less, or allow the build more disk (`limits.max_disk_bytes`, of which \
             commands have half), or use a tier that does"
        }
        CommandsError::Failed { .. } => {
            "see the command's output in the build's log; commands have no network but to the \
             hosts that the operator allows"
        }
        CommandsError::Denied { .. } => {
            "do without it, or have the operator allow the host \
             (UNKEY_BUILDERD_COMMANDS_EGRESS, UNKEY_BUILDERD_COMMANDS_EGRESS_OF_TENANTS)"
        }
        CommandsError::Unable(_) => "run the service where it can run commands, or leave them out",
        CommandsError::Refused(_)
        | CommandsError::Sandbox(_)
        | CommandsError::Io { .. }
        | CommandsError::Broken(_) => return None,
    };
    Some(text.to_owned())
}

/// The same for whoever asked the service: where it runs is not his to choose.
pub(super) fn remedy(error: &CommandsError) -> Option<String> {
    match error {
        CommandsError::Unable(_) => {
            Some("leave the commands out, or ask the operator for a service that runs them".into())
        }
        CommandsError::Failed { .. }
        | CommandsError::Denied { .. }
        | CommandsError::Refused(_)
        | CommandsError::Sandbox(_)
        | CommandsError::Io { .. }
        | CommandsError::Broken(_) => hint(error),
    }
}
