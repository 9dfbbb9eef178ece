//! An S3 server on loopback: `moto`, which keeps objects in memory. Alive as long as the value
//! lives. Knows nothing of builderd.

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
    _log: tempfile::NamedTempFile,
}

impl ObjectStore {
    /// Starts it and makes the bucket.
    pub(crate) fn start() -> Result<Self> {
        let program = clients::python()?.join("bin/moto_server");
        let log = tempfile::NamedTempFile::new()?;
        let port = free_port()?;
        let address = format!("127.0.0.1:{port}");
        // It must not outlive us, however we end.
        let mut server = Program::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .background(log.path())?;
        let store = until("moto answers", Duration::from_secs(60), || {
            if let Some(status) = server.finished()? {
                let said = std::fs::read_to_string(log.path()).unwrap_or_default();
                bail!("moto_server ended with {status}:\n{said}");
            }
            Ok(request(&address, "PUT", &format!("/{BUCKET}")).ok())
        });
        store?;
        Ok(Self { address, _server: server, _log: log })
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
}

fn request(address: &str, method: &str, path: &str) -> Result<String> {
    let request = Request { method, path, headers: &[], body: b"" };
    let answer = Connection::open(address)?.send(request)?;
    if answer.status() != 200 {
        bail!("{method} {path} answered {}: {}", answer.status(), answer.text());
    }
    String::from_utf8(answer.body).context("the object store does not answer in text")
}
