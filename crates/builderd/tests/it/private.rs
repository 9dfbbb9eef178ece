//! Stories about the other users of the machine: what is kept here is not for them, whatever the
//! umask is and whoever made the directories.

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::support::{Layer, TestImage, Workshop, noise, sha256, stderr};

/// The same command under a umask.
fn under(umask: &str, command: &Command) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", &format!("umask {umask} && exec \"$0\" \"$@\"")]);
    shell.arg(command.get_program()).args(command.get_args()).env_clear();
    for (name, value) in command.get_envs() {
        shell.env(name, value.unwrap_or_default());
    }
    if let Some(directory) = command.get_current_dir() {
        shell.current_dir(directory);
    }
    shell
}

/// A command of an operator or a server, whose files lie below the workshop.
fn operated(workshop: &Workshop, umask: &str, arguments: &[&str]) -> Command {
    let mut command = workshop.command(arguments);
    for (name, path) in
        [("DATABASE_DATA_DIR", "data"), ("ROOTFS_OUTPUT_DIR", "rootfs"), ("WORKSPACE_DIR", "work")]
    {
        command.env(format!("UNKEY_BUILDERD_{name}"), workshop.path(path));
    }
    command.env("UNKEY_BUILDERD_OTEL_PROMETHEUS_ENABLED", "false");
    command.env("UNKEY_BUILDERD_CACHE_DIR", "");
    under(umask, &command)
}

struct Server {
    child: Child,
    /// What it said before it listened.
    said: Vec<Value>,
}

impl Server {
    fn start(workshop: &Workshop, umask: &str) -> Self {
        let mut command = operated(workshop, umask, &["serve", "--listen", "127.0.0.1:0"]);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        loop {
            let line = lines.next().unwrap_or_else(|| panic!("no server: {said:?}")).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap_or(Value::String(line));
            if event["message"] == "listening" {
                break;
            }
            said.push(event);
        }
        // The server must not wait for a full pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, said }
    }

    /// Whether it said this of a path.
    fn warned(&self, words: &str, path: &Path) -> bool {
        self.said.iter().any(|event| {
            event["message"].as_str().is_some_and(|message| message.contains(words))
                && event["path"] == path.to_str().unwrap()
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Everything below a directory, itself included, with its mode.
fn modes(path: &Path) -> Vec<(String, bool, u32)> {
    let found = fs::symlink_metadata(path).unwrap();
    let mut all = vec![(path.display().to_string(), found.is_dir(), mode(path))];
    if found.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            all.extend(modes(&entry.unwrap().path()));
        }
    }
    all
}

fn assert_closed(path: &Path) {
    for (name, is_directory, mode) in modes(path) {
        let most = if is_directory { 0o750 } else { 0o640 };
        assert_eq!(mode & !most & 0o777, 0, "{name} has {mode:o}");
    }
}

#[test]
fn what_a_first_command_and_a_server_make_is_closed_under_every_umask() {
    for umask in ["0000", "0022", "0077"] {
        let workshop = Workshop::new();
        let create = ["token", "create", "--tenant", "acme"];
        let created = operated(&workshop, umask, &create).output().unwrap();
        assert!(created.status.success(), "{}", stderr(&created));
        assert_closed(&workshop.path("data"));
        let server = Server::start(&workshop, umask);
        // While it runs there are the files beside the database.
        assert!(workshop.path("data/builderd.db-wal").exists());
        assert!(workshop.path("data/builderd.db-shm").exists());
        assert_closed(&workshop.path("data"));
        for directory in ["rootfs/artifacts", "rootfs/staging", "work/cache/packs-v3"] {
            assert!(workshop.path(directory).is_dir(), "{directory}");
        }
        for directory in ["rootfs", "work"] {
            assert_closed(&workshop.path(directory));
        }
        let open = server.said.iter().find(|event| event.to_string().contains("other users"));
        assert!(open.is_none(), "what is new was never open: {open:?}");
        // A copy that comes back is closed, too.
        let backup = ["admin", "backup", "backup.db"];
        assert!(operated(&workshop, umask, &backup).status().unwrap().success());
        let other = workshop.path("other");
        let restore = ["admin", "restore", "backup.db"];
        let mut restore = operated(&workshop, umask, &restore);
        restore.env("UNKEY_BUILDERD_DATABASE_DATA_DIR", &other);
        assert!(restore.status().unwrap().success());
        assert_closed(&other);
    }
}

#[test]
fn what_an_earlier_version_left_open_is_closed_or_named_at_the_start() {
    let workshop = Workshop::new();
    drop(Server::start(&workshop, "0022"));
    let (data, packs) = (workshop.path("data"), workshop.path("work/cache/packs-v3"));
    let earlier = workshop.path("work/cache/packs-v1");
    fs::create_dir_all(earlier.join("local")).unwrap();
    // It was killed, so they are there still.
    let files = ["builderd.db", "builderd.db-wal", "builderd.db-shm", "builderd.lock"];
    for file in files {
        fs::set_permissions(data.join(file), Permissions::from_mode(0o644)).unwrap();
    }
    let staging = workshop.path("rootfs/staging");
    for directory in [&data, &packs, &earlier, &workshop.path("rootfs"), &staging] {
        fs::set_permissions(directory, Permissions::from_mode(0o755)).unwrap();
    }
    let server = Server::start(&workshop, "0022");
    for file in files {
        assert_eq!(mode(&data.join(file)), 0o640, "{file}");
        assert!(server.warned("let other users read it", &data.join(file)), "{:?}", server.said);
    }
    for directory in [&packs, &earlier] {
        assert_eq!(mode(directory), 0o750, "{}", directory.display());
        assert!(server.warned("could be read by other users", directory), "{:?}", server.said);
    }
    assert_eq!(mode(&staging), 0o750, "nobody has any business there");
    // These an operator may have made, for whom he likes: they are named.
    for (setting, path) in [("DATABASE_DATA_DIR", "data"), ("ROOTFS_OUTPUT_DIR", "rootfs")] {
        let path = workshop.path(path);
        assert_eq!(mode(&path), 0o755);
        assert!(server.warned("every user of this machine", &path), "{:?}", server.said);
        let said = Value::from(server.said.clone()).to_string();
        assert!(said.contains(&format!("UNKEY_BUILDERD_{setting}")), "{said}");
    }
}

#[test]
fn packs_are_closed_in_any_directory_and_an_image_is_the_same_under_every_umask() {
    let files = Layer::new().directory("bin").file("bin/app", b"app").file("d", &noise(7, 100_000));
    let image = TestImage::new(vec![files]);
    let mut sums = Vec::new();
    for umask in ["0000", "0022", "0077"] {
        let workshop = Workshop::with(&image);
        // Everybody may enter and write here.
        let cache = workshop.path("cache");
        fs::create_dir(&cache).unwrap();
        fs::set_permissions(&cache, Permissions::from_mode(0o777)).unwrap();
        let build = ["build", "oci:image", "--progress", "plain", "-o", "out.ext4"];
        // The second one finds the packs of the first.
        for _ in 0..2 {
            let built = under(umask, &workshop.command(&build)).output().unwrap();
            assert!(built.status.success(), "{umask}: {}", stderr(&built));
            sums.push(sha256(&workshop.read("out.ext4")));
        }
        assert_eq!(workshop.packs().len(), 1);
        assert_closed(&cache.join("packs-v3"));
        assert_eq!(mode(&cache), 0o777, "it is not ours");
        let most = 0o666 & !u32::from_str_radix(umask, 8).unwrap();
        assert_eq!(mode(&workshop.path("out.ext4")), most, "the image is its user's to share");
    }
    sums.dedup();
    assert_eq!(sums.len(), 1, "{sums:?}");
}
