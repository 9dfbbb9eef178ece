//! An S3 server on loopback: `moto`, which keeps objects in memory; and what of Cloud Storage is
//! like it. Alive as long as the value lives. Knows nothing of builderd.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::wire::{Connection, Request};
use super::{clients, free_port, until};
use crate::process::{Background, Program};

/// The one bucket.
pub(crate) const BUCKET: &str = "artifacts";

pub(crate) struct ObjectStore {
    address: String,
    _server: Background,
    log: tempfile::NamedTempFile,
}

impl ObjectStore {
    /// Starts it and makes the bucket.
    pub(crate) fn start() -> Result<Self> {
        let program = clients::python()?.join("bin/moto_server");
        let port = free_port()?;
        let options = ["--host", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned);
        Self::of(Program::new(program).args(options), port)
    }

    /// A program that is moto on `port`.
    fn of(program: Program, port: u16) -> Result<Self> {
        let log = tempfile::NamedTempFile::new()?;
        let address = format!("127.0.0.1:{port}");
        // It must not outlive us, however we end.
        let wrapper = Program::new("setpriv").args(["--pdeathsig", "KILL"]);
        let mut server = program.under(wrapper).background(log.path())?;
        let store = until("moto answers", Duration::from_secs(60), || {
            if let Some(status) = server.finished()? {
                let said = std::fs::read_to_string(log.path()).unwrap_or_default();
                bail!("moto ended with {status}:\n{said}");
            }
            Ok(request(&address, "PUT", &format!("/{BUCKET}")).ok())
        });
        store?;
        Ok(Self { address, _server: server, log })
    }

    /// `http://127.0.0.1:PORT`
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The keys of all objects, sorted.
    pub(crate) fn keys(&self) -> Result<Vec<String>> {
        let listing = request(&self.address, "GET", &format!("/{BUCKET}?list-type=2"))?;
        if listing.contains("<IsTruncated>true") {
            bail!("the bucket holds more than one page of keys");
        }
        let keys = listing.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
        let mut keys: Vec<String> = keys.map(str::to_owned).collect();
        keys.sort();
        Ok(keys)
    }

    /// Whether parts lie there of an upload that was neither completed nor aborted.
    pub(crate) fn holds_parts(&self) -> Result<bool> {
        Ok(request(&self.address, "GET", &format!("/{BUCKET}?uploads="))?.contains("<Upload>"))
    }

    /// How many requests have been answered whose first line contains all the words.
    pub(crate) fn answered(&self, words: &[&str]) -> Result<usize> {
        let log = std::fs::read_to_string(self.log.path())?;
        let lines = log.lines().filter(|line| line.contains(" HTTP/1.1"));
        Ok(lines.filter(|line| words.iter().all(|word| line.contains(word))).count())
    }
}

/// Cloud Storage as far as its XML API is that of S3: `xtask/clients/python/gcs_stand_in.py`.
pub(crate) struct Google {
    /// The same objects, by another way in.
    pub(crate) objects: ObjectStore,
    dir: tempfile::TempDir,
}

impl Google {
    /// Starts it and makes the bucket.
    pub(crate) fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (plain, tls) = (free_port()?, free_port()?);
        let program = clients::google()?.arg(dir.path()).args([plain, tls].map(|p| p.to_string()));
        Ok(Self { objects: ObjectStore::of(program, plain)?, dir })
    }

    /// Whom to trust.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.dir.path().join("server.crt")
    }

    /// The service account's key file, which says where the server is, too.
    pub(crate) fn account(&self) -> PathBuf {
        self.dir.path().join("account.json")
    }
}

fn request(address: &str, method: &str, path: &str) -> Result<String> {
    let request = Request { method, path, headers: &[], body: b"" };
    let answer = Connection::open(address)?.send(request)?;
    if answer.status() != 200 {
        bail!("{method} {path} answered {}: {}", answer.status(), answer.text());
    }
    String::from_utf8(answer.body).context("the object store does not answer in text")
}
