//! A PostgreSQL server of its own for a test: in a temporary directory, reached by a socket
//! there, gone with the test. Knows no tables.
#![expect(clippy::disallowed_methods, reason = "the server is a program")]

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest that a server may take to start.
const START_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Postgres {
    programs: PathBuf,
    directory: TempDir,
    server: Option<Child>,
    databases: AtomicU32,
}

/// Debian keeps the server's programs off the path, one folder for each version.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let programs = versions.flatten().map(|version| version.path().join("bin"));
    programs.filter(|programs| programs.join("initdb").exists()).max()
}

/// User and group that the server runs as when the test runs as root, which it refuses.
fn postgres_user() -> (u32, u32) {
    let number = |option: &str| -> u32 {
        let output = Command::new("id").args([option, "postgres"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().parse().unwrap()
    };
    (number("-u"), number("-g"))
}

impl Postgres {
    /// Starts a server; none, said aloud, where PostgreSQL is not installed.
    pub(crate) fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            println!("SKIPPED: PostgreSQL is not installed: apt-get install postgresql");
            eprintln!("SKIPPED: PostgreSQL is not installed: apt-get install postgresql");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        if rustix::process::geteuid().is_root() {
            let (user, group) = postgres_user();
            chown(directory.path(), Some(user), Some(group)).unwrap();
        }
        let readable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path(), readable).unwrap();
        let databases = AtomicU32::new(0);
        let mut postgres = Self { programs, directory, server: None, databases };
        let made = postgres
            .program("initdb")
            // An order of letters that is not the order of bytes.
            .args(["--locale-provider=icu", "--icu-locale=en-US", "--locale=C.UTF-8"])
            .args(["--encoding=UTF8", "--username=postgres", "--auth=trust", "--no-sync", "-D"])
            .arg(postgres.data())
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        postgres.restart();
        Some(postgres)
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// One of the server's programs, as a user that it accepts; it dies with the test.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.arg("--pdeathsig=QUIT");
        if rustix::process::geteuid().is_root() {
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        }
        command.arg(self.programs.join(name)).current_dir(self.directory.path());
        command
    }

    /// Starts the server again after [`crash`](Self::crash).
    pub(crate) fn restart(&mut self) {
        let log = std::fs::File::create(self.directory.path().join("log")).unwrap();
        let socket = format!("unix_socket_directories={}", self.directory.path().display());
        let settings = [&socket, "listen_addresses=", "fsync=off", "max_connections=300"];
        let mut command = self.program("postgres");
        command.arg("-D").arg(self.data());
        for setting in settings {
            command.args(["-c", setting]);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.server = Some(command.spawn().unwrap());
        let start = Instant::now();
        while !self.is_ready() {
            assert!(start.elapsed() < START_MAX, "PostgreSQL does not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_ready(&self) -> bool {
        let mut command = self.program("pg_isready");
        let command = command.arg("-q").arg("-h").arg(self.directory.path());
        command.status().is_ok_and(|status| status.success())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Ends the server as a power failure would: nothing is written that was not.
    pub(crate) fn crash(&mut self) {
        if let Some(mut server) = self.server.take() {
            let pid = rustix::process::Pid::from_child(&server);
            rustix::process::kill_process(pid, rustix::process::Signal::QUIT).unwrap();
            server.wait().unwrap();
        }
    }

    /// Where it is.
    pub(crate) fn place(&self) -> String {
        self.directory.path().display().to_string()
    }

    /// Makes an empty database; gives its address.
    pub(crate) fn database(&self) -> String {
        let name = format!("test{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let mut command = self.program("createdb");
        let made = command.args(["-U", "postgres", "-h"]).arg(self.directory.path()).arg(&name);
        let made = made.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let socket: &Path = self.directory.path();
        format!("postgres:///{name}?host={}&user=postgres", socket.display())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.crash();
    }
}
