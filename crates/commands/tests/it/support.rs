//! A small image of busybox, the program that runs commands on it, and what came of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use commands::{Base, CommandLimits, Event, Order, PackPart};

const PROGRAM: &str = env!("CARGO_BIN_EXE_commands-worker");
const BUSYBOX: &str = "/bin/busybox";
/// Programs of busybox that the tests use.
const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "echo",
    "mkdir",
    "rm",
    "ln",
    "chmod",
    "chown",
    "sleep",
    "head",
    "mkfifo",
    "mknod",
    "mount",
    "id",
    "mv",
    "touch",
    "kill",
    "grep",
    "dd",
    "true",
    "false",
    "ls",
    "setsid",
    "wc",
    "unshare",
    "hostname",
    "tr",
    "cp",
    "stat",
    "nc",
    "cut",
    "date",
    "env",
    "fallocate",
    "touch",
    "seq",
    "setfattr",
    "printf",
    "tail",
    "xargs",
    "dmesg",
    "pwd",
    "sort",
    "sync",
];

/// Whether this host can run commands. If not, that is printed.
pub(crate) fn can_run() -> bool {
    let accepted: Vec<String> =
        commands::accepted_names().iter().map(|name| (*name).to_owned()).collect();
    match commands::check("runc", &accepted) {
        Ok(_) if Path::new(BUSYBOX).is_file() => true,
        Ok(_) => {
            eprintln!("SKIPPED: no {BUSYBOX}: apt-get install busybox-static");
            false
        }
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            false
        }
    }
}

/// The tar of one layer.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub(crate) fn busybox() -> Self {
        let mut layer = Self::new();
        for directory in ["bin", "etc", "tmp", "var"] {
            layer = layer.entry(directory, tar::EntryType::Directory, 0o755, (0, 0), b"", "");
        }
        layer = layer.file("bin/busybox", 0o755, &fs::read(BUSYBOX).unwrap());
        for applet in APPLETS {
            let path = format!("bin/{applet}");
            layer = layer.entry(&path, tar::EntryType::Symlink, 0o777, (0, 0), b"", "busybox");
        }
        layer
    }

    pub(crate) fn file(self, path: &str, mode: u32, bytes: &[u8]) -> Self {
        self.entry(path, tar::EntryType::Regular, mode, (0, 0), bytes, "")
    }

    pub(crate) fn entry(
        mut self,
        path: &str,
        kind: tar::EntryType,
        mode: u32,
        (uid, gid): (u64, u64),
        bytes: &[u8],
        target: &str,
    ) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(1_000_000_000);
        header.set_size(bytes.len() as u64);
        if matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link) {
            self.0.append_link(&mut header, path, target).unwrap();
        } else {
            if kind.is_character_special() {
                header.set_device_major(1).unwrap();
                header.set_device_minor(5).unwrap();
            }
            self.0.append_data(&mut header, path, bytes).unwrap();
        }
        self
    }

    /// An attribute of the entry that follows.
    pub(crate) fn attribute(mut self, name: &str, value: &[u8]) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value)]).unwrap();
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// What is to be run, and how.
pub(crate) struct Run {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) order: Order,
    pub(crate) base: Base,
    /// What the commands work on is made there.
    pub(crate) place: tempfile::TempDir,
    /// Which program runs it.
    pub(crate) program: PathBuf,
}

/// An entry of the layer that came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) kind: char,
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    pub(crate) contents: Vec<u8>,
    pub(crate) target: String,
    pub(crate) attributes: BTreeMap<String, Vec<u8>>,
}

/// What came of it.
pub(crate) struct Ended {
    pub(crate) events: Vec<Event>,
    pub(crate) error: Option<String>,
    pub(crate) tar: Vec<u8>,
}

impl Run {
    pub(crate) fn on(layers: Vec<Vec<u8>>, commands: &[&str]) -> Self {
        let runtime = commands::check("runc", &accepted()).unwrap();
        let mut run = Self::by(runtime.program, layers, commands);
        run.order.joins = runtime.joins;
        run
    }

    /// By a runtime that need not be one.
    pub(crate) fn by(runtime: PathBuf, layers: Vec<Vec<u8>>, commands: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut packs = Vec::new();
        for (file, blob) in layers.into_iter().enumerate() {
            let mut out = File::create(directory.path().join(file.to_string())).unwrap();
            let limits = rootfs::Limits::default();
            let summary = rootfs::make_pack(&blob[..], &mut out, &limits).unwrap();
            packs.push(PackPart { file, base: 0, length: summary.pack_bytes });
        }
        let place = tempfile::tempdir().unwrap();
        let order = Order {
            scratch_directory: place.path().to_owned(),
            scratch: commands::Scratch::Sized,
            disk_bytes: 256 << 20,
            runtime,
            joins: commands::Joins::default(),
            commands: commands.iter().map(|&command| command.to_owned()).collect(),
            limits: CommandLimits { memory_bytes: 128 << 20, pids_max: 64, secs_max: Some(60) },
            tree_limits: rootfs::TreeLimits::default(),
            layer_bytes_max: 1 << 30,
            has_door: false,
        };
        let environment = vec!["PATH=/bin".into(), "COLOUR=red".into()];
        let base = Base { environment, working_directory: String::new(), packs };
        Self { directory, order, base, place, program: PROGRAM.into() }
    }

    pub(crate) fn busybox(commands: &[&str]) -> Self {
        Self::on(vec![Layer::busybox().bytes()], commands)
    }

    /// Starts it and does not wait.
    pub(crate) fn start(&self) -> std::process::Child {
        let texts = [serde_json::to_vec(&self.order), serde_json::to_vec(&self.base)];
        for (name, text) in ["order.json", "base.json"].into_iter().zip(texts) {
            fs::write(self.directory.path().join(name), text.unwrap()).unwrap();
        }
        Command::new(&self.program)
            .arg("run")
            .arg(self.directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    pub(crate) fn end(self) -> Ended {
        let output = self.start().wait_with_output().unwrap();
        assert!(output.status.success(), "{:?}", output.status);
        let read = |name: &str| fs::read(self.directory.path().join(name)).ok();
        Ended {
            events: serde_json::from_slice(&read("events.json").unwrap()).unwrap(),
            error: read("error").map(|text| String::from_utf8(text).unwrap()),
            tar: read("layer.tar").unwrap(),
        }
    }
}

/// A command that was started as `sleep MARK` and sleeps: its place below `/proc`.
pub(crate) fn sleeping(mark: &str) -> PathBuf {
    let words = format!("sleep\0{mark}\0");
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let all = fs::read_dir("/proc").unwrap().flatten().map(|process| process.path());
        let is_it = |path: &PathBuf| {
            fs::read(path.join("cmdline")).is_ok_and(|line| line == words.as_bytes())
        };
        if let Some(process) = all.into_iter().find(is_it) {
            return process;
        }
        assert!(Instant::now() < until, "it never ran");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Who root of a process is outside.
pub(crate) fn first_user(process: &Path) -> u32 {
    let map = fs::read_to_string(process.join("uid_map")).unwrap();
    map.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn accepted() -> Vec<String> {
    commands::accepted_names().iter().map(|name| (*name).to_owned()).collect()
}

impl Ended {
    pub(crate) fn output(&self) -> Vec<&str> {
        let lines = self.events.iter().filter_map(|event| match event {
            Event::Output { line, .. } => Some(line.as_str()),
            _ => None,
        });
        lines.collect()
    }

    pub(crate) fn well(self) -> Self {
        assert_eq!(self.error, None, "{:?}", self.events);
        self
    }

    /// The layer by paths, whiteouts under their own names. The packer takes it as well.
    pub(crate) fn changed(&self) -> BTreeMap<String, Changed> {
        let mut pack = Vec::new();
        rootfs::make_pack(&self.tar[..], &mut pack, &rootfs::Limits::default()).unwrap();
        let mut archive = tar::Archive::new(&self.tar[..]);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).unwrap();
            let mut attributes = BTreeMap::new();
            if let Some(extensions) = entry.pax_extensions().unwrap() {
                for extension in extensions {
                    let extension = extension.unwrap();
                    if let Some(name) = extension.key().unwrap().strip_prefix("SCHILY.xattr.") {
                        attributes.insert(name.to_owned(), extension.value_bytes().to_vec());
                    }
                }
            }
            let header = entry.header();
            let target = entry.link_name().unwrap().map(|path| path.to_str().unwrap().to_owned());
            let changed = Changed {
                kind: char::from(header.entry_type().as_byte()),
                mode: header.mode().unwrap(),
                owner: (header.uid().unwrap(), header.gid().unwrap()),
                contents,
                target: target.unwrap_or_default(),
                attributes,
            };
            (entry.path().unwrap().to_str().unwrap().to_owned(), changed)
        });
        entries.collect()
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        self.changed().into_keys().collect()
    }
}
