//! Debian's `docker-registry`, alive on a free loopback port as long as the value lives.
//!
//! Its blobs are kept between runs. Knows nothing of builderd.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::process::{Background, Program};
use crate::{http, workspace};

/// How long the registry may take to answer at first.
const START_SECS_MAX: u64 = 15;

pub(crate) struct Registry {
    address: String,
    log: PathBuf,
    _server: Background,
    _scratch: tempfile::TempDir,
}

impl Registry {
    /// Starts one over the blobs kept below `target/registry/`.
    pub(crate) fn start() -> Result<Self> {
        let mut last = None;
        for _ in 0..3 {
            // Another program may take the free port first: then try the next one.
            match Self::attempt() {
                Ok(registry) => return Ok(registry),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no attempt was made")?)
    }

    fn attempt() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        let config = scratch.path().join("config.yml");
        let storage = workspace::kept("registry")?;
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: warn\n  accesslog:\n    disabled: false\n\
                 storage:\n  delete:\n    enabled: true\n  filesystem:\n    rootdirectory: {}\n\
                 http:\n  addr: {address}\n",
                storage.display()
            ),
        )?;
        let log = scratch.path().join("log");
        // It must not outlive us, however we end.
        let mut server = Program::new("setpriv")
            .args(["--pdeathsig", "KILL", "docker-registry", "serve"])
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .background(&log)?;
        let end = Instant::now() + Duration::from_secs(START_SECS_MAX);
        while http::get_bytes(&address, "/v2/", "*/*", 1024).is_err() {
            if let Some(status) = server.finished()? {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                bail!("docker-registry ended with {status}:\n{said}");
            }
            if Instant::now() > end {
                bail!("docker-registry did not answer on {address} in {START_SECS_MAX} s");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { address, log, _server: server, _scratch: scratch })
    }

    /// `127.0.0.1:PORT`
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The reference of an image pushed as `name`.
    pub(crate) fn reference(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.address)
    }

    /// Copies an OCI layout's `latest` into the registry, blobs as they are.
    pub(crate) fn push(&self, layout: &Path, name: &str) -> Result<String> {
        self.push_as(layout, &format!("{name}:latest"))
    }

    /// The same under a name with a tag.
    pub(crate) fn push_as(&self, layout: &Path, name: &str) -> Result<String> {
        let reference = format!("{}/{name}", self.address);
        Program::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(format!("docker://{reference}"))
            .run()
            .with_context(|| format!("cannot push {name}"))?;
        Ok(reference)
    }

    /// How many times a blob was asked for since the start.
    pub(crate) fn blob_requests(&self) -> Result<usize> {
        let log = std::fs::read_to_string(&self.log)?;
        Ok(log.lines().filter(|l| l.contains("GET /v2/") && l.contains("/blobs/")).count())
    }
}
