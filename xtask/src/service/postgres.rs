//! Debian's PostgreSQL over a directory of its own, alive as long as the value lives; it can be
//! crashed and started again. Knows no table.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{free_port, until};
use crate::process::{self, Background, Program};

/// Where Debian puts the server's programs, one directory for each version.
const PROGRAMS: &str = "/usr/lib/postgresql";

/// How long a start may take, after a crash too.
const START: Duration = Duration::from_secs(30);

pub(crate) struct Postgres {
    programs: PathBuf,
    dir: tempfile::TempDir,
    port: u16,
    server: Option<Background>,
}

impl Postgres {
    /// Makes a cluster and starts it.
    pub(crate) fn start() -> Result<Self> {
        // Not below `target`: the user postgres may not reach a home directory.
        let dir = tempfile::Builder::new().prefix("builderd-postgres-").tempdir()?;
        let mut postgres = Self { programs: programs()?, dir, port: free_port()?, server: None };
        if process::is_root() {
            Program::new("chown").arg("postgres:").arg(postgres.dir.path()).run()?;
        }
        postgres
            .program("initdb")
            .args(["--username=builderd", "--auth=trust", "--encoding=UTF8", "--locale=C"])
            .arg("--pgdata")
            .arg(postgres.data())
            .run()?;
        postgres.start_again()?;
        Ok(postgres)
    }

    /// Starts it where it was; a crash is recovered from.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        let server = self
            .program("postgres")
            .arg("-D")
            .arg(self.data())
            .args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c"])
            .arg(format!("unix_socket_directories={}", self.dir.path().display()))
            .background(&self.log())?;
        self.server = Some(server);
        until("PostgreSQL accepts connections", START, || {
            if let Some(status) =
                self.server.as_mut().map(Background::finished).transpose()?.flatten()
            {
                let said = std::fs::read_to_string(self.log()).unwrap_or_default();
                bail!("PostgreSQL ended with {status}:\n{said}");
            }
            Ok(self.query("SELECT 1").is_ok().then_some(()))
        })
    }

    /// Ends all its processes without a checkpoint; open transactions are lost.
    pub(crate) fn crash(&mut self) -> Result<()> {
        self.program("pg_ctl")
            .args(["stop", "--mode=immediate", "--wait", "--pgdata"])
            .arg(self.data())
            .run()?;
        self.server = None;
        Ok(())
    }

    /// The URL for clients.
    pub(crate) fn url(&self) -> String {
        format!("postgres://builderd@127.0.0.1:{}/postgres", self.port)
    }

    /// What a query answers, one row on each line.
    pub(crate) fn query(&self, sql: &str) -> Result<String> {
        Program::new(self.programs.join("psql"))
            .args(["--no-psqlrc", "--tuples-only", "--no-align", "--quiet", "--command", sql])
            .arg(self.url())
            .env("PGCONNECT_TIMEOUT", "5")
            .text()
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn log(&self) -> PathBuf {
        // Written by us, not by the user postgres.
        self.dir.path().join("log")
    }

    /// One of its programs, as the user it accepts; it must not outlive us.
    fn program(&self, name: &str) -> Program {
        let wrapper = Program::new("setpriv").args(["--pdeathsig", "KILL"]);
        let wrapper = if process::is_root() {
            wrapper.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
        } else {
            wrapper
        };
        wrapper.arg(self.programs.join(name)).dir(self.dir.path())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.server.is_some()
            && let Err(error) = self.crash()
        {
            eprintln!("PostgreSQL does not stop: {error:#}");
        }
    }
}

/// The programs of the newest version.
fn programs() -> Result<PathBuf> {
    let list = std::fs::read_dir(PROGRAMS)
        .with_context(|| format!("{PROGRAMS} is missing: apt-get install postgresql"))?;
    let mut versions: Vec<(u32, PathBuf)> = list
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))
        })
        .filter(|(_, bin)| bin.join("postgres").exists())
        .collect();
    versions.sort();
    Ok(versions.pop().context("no PostgreSQL server is installed: apt-get install postgresql")?.1)
}

/// Whether Debian's server is there.
pub(crate) fn installed() -> bool {
    Path::new(PROGRAMS).exists() && programs().is_ok()
}
