//! A server with TLS and the command as its client: who may talk to whom, and how certificates
//! change while the server runs.

use std::io::{BufRead as _, BufReader, Lines};
use std::process::{Child, ChildStderr, Output, Stdio};

use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use serde_json::Value;

use crate::support::{Workshop, stderr};

/// A server with files `c.pem`, `k.pem` and `ca.pem`, whose clients are in `clients.toml`.
struct Site {
    workshop: Workshop,
    authority: Issuer<'static, KeyPair>,
    server: Child,
    lines: Lines<BufReader<ChildStderr>>,
    address: String,
    metrics: String,
}

fn authority(workshop: &Workshop, file: &str) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    std::fs::write(workshop.path(file), params.self_signed(&key).unwrap().pem()).unwrap();
    Issuer::new(params, key)
}

/// Writes a certificate for this machine, and `id`, and its key.
fn issue(workshop: &Workshop, authority: &Issuer<'static, KeyPair>, id: &str, files: [&str; 2]) {
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let id = SanType::URI(Ia5String::try_from(id.to_owned()).unwrap());
    params.subject_alt_names.push(id);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    std::fs::write(workshop.path(files[0]), certificate.pem()).unwrap();
    std::fs::write(workshop.path(files[1]), key.serialize_pem()).unwrap();
}

impl Site {
    fn new() -> Self {
        let workshop = Workshop::new();
        let authority = authority(&workshop, "ca.pem");
        issue(&workshop, &authority, "urn:x:server", ["c.pem", "k.pem"]);
        let clients = "[[client]]\nid = \"spiffe://example.org/ci\"\ntenant = \"acme\"\n";
        std::fs::write(workshop.path("clients.toml"), clients).unwrap();
        let mut command = workshop.command(&["serve", "--listen", "127.0.0.1:0"]);
        for (name, value) in [("DATABASE_DATA_DIR", "data"), ("ROOTFS_OUTPUT_DIR", "rootfs")] {
            command.env(format!("UNKEY_BUILDERD_{name}"), workshop.path(value));
        }
        for (name, value) in [("CERT", "c.pem"), ("KEY", "k.pem"), ("CA", "ca.pem")] {
            command.env(format!("UNKEY_BUILDERD_TLS_{name}_FILE"), workshop.path(value));
        }
        let walls = sandbox::Wall::ALL.map(sandbox::Wall::as_str).join(",");
        command
            .env("UNKEY_BUILDERD_ACCEPT_MISSING_WALLS", walls)
            .env("UNKEY_BUILDERD_TLS_MODE", "file")
            .env("UNKEY_BUILDERD_TLS_CLIENT_AUTH", "optional")
            .env("UNKEY_BUILDERD_TLS_CLIENTS_FILE", workshop.path("clients.toml"))
            .env("UNKEY_BUILDERD_OTEL_PROMETHEUS_PORT", "0")
            .stderr(Stdio::piped());
        let mut server = command.spawn().unwrap();
        let lines = BufReader::new(server.stderr.take().unwrap()).lines();
        let (address, metrics) = (String::new(), String::new());
        let mut site = Self { workshop, authority, server, lines, address, metrics };
        let mut told = |message| site.until(message)["address"].as_str().unwrap().to_owned();
        let metrics = told("listening for metrics");
        let address = told("listening");
        (site.metrics, site.address) = (metrics, address);
        site
    }

    /// Reads the log up to a line with this message.
    fn until(&mut self, message: &str) -> Value {
        let mut said = String::new();
        loop {
            let line = self.lines.next().unwrap_or_else(|| panic!("no {message}:\n{said}"));
            let line = line.unwrap();
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["message"] == message {
                return event;
            }
            said.push_str(&line);
        }
    }

    /// The command, with the address as it is given and the flags.
    fn ask(&self, scheme: &str, flags: &[&str]) -> Output {
        let mut command = self.workshop.command(&["builds", "list"]);
        command.env("UNKEY_BUILDERD_SERVER_ADDRESS", format!("{scheme}{}", self.address));
        command.env("NO_PROXY", "127.0.0.1").args(flags).stdin(Stdio::null()).output().unwrap()
    }

    /// The page of the metrics port, over TLS or not; none if that is no way to get it.
    fn metrics(&self, is_secure: bool) -> Option<String> {
        let pem = std::fs::read(self.workshop.path("ca.pem")).unwrap();
        let root = reqwest::Certificate::from_pem(&pem).unwrap();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([root]);
        let scheme = if is_secure { "https" } else { "http" };
        let url = format!("{scheme}://{}/metrics", self.metrics);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let response = client.build().unwrap().get(url).send().await.ok()?;
            response.text().await.ok()
        })
    }

    fn hangup(&self) {
        let process = rustix::process::Pid::from_child(&self.server);
        rustix::process::kill_process(process, rustix::process::Signal::HUP).unwrap();
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[test]
fn the_command_talks_tls_and_says_who_it_is() {
    let mut site = Site::new();
    let (workshop, ca) = (&site.workshop, ["--ca-file", "ca.pem"]);
    issue(workshop, &site.authority, "spiffe://example.org/ci", ["ci.pem", "ci.key"]);
    let own = ["--cert-file", "ci.pem", "--key-file", "ci.key"];
    let both = [ca, [own[0], own[1]], [own[2], own[3]]].concat();
    let good = site.ask("https://", &both);
    assert!(good.status.success(), "{}", stderr(&good));
    // Without a certificate a token is needed.
    assert_eq!(site.ask("https://", &ca).status.code(), Some(3));
    // Whom nobody here has signed is not believed; and this is no server of plain HTTP.
    let unknown = site.ask("https://", &own);
    assert_eq!(unknown.status.code(), Some(4), "{}", stderr(&unknown));
    assert!(stderr(&unknown).contains("UnknownIssuer"), "{}", stderr(&unknown));
    assert_eq!(site.ask("http://", &[]).status.code(), Some(4));
    let page = site.metrics(true).unwrap();
    assert!(page.contains("builderd_queued_builds"), "{page}");
    assert!(site.metrics(false).is_none());
    // Files that would not be used are a mistake.
    for (flags, word) in [(&ca[..], "https://"), (&own[..], "https://")] {
        let output = site.ask("http://", flags);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
    for (flags, word) in [
        (&["--ca-file", "none.pem"][..], "none.pem"),
        (&["--ca-file", "ci.key"], "no certificate"),
        (&["--cert-file", "ci.pem"], "give both"),
        (&["--cert-file", "ci.pem", "--key-file", "ca.pem"], "--cert-file"),
    ] {
        let output = site.ask("https://", flags);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{flags:?}: {}", stderr(&output));
    }
    // New files at SIGHUP: another authority for both sides, and the old one is nobody's.
    site.authority = authority(&site.workshop, "ca.pem");
    issue(&site.workshop, &site.authority, "urn:x:server", ["c.pem", "k.pem"]);
    site.hangup();
    site.until("new certificates are in use");
    let old = site.ask("https://", &both);
    assert_eq!(old.status.code(), Some(4), "{}", stderr(&old));
    issue(&site.workshop, &site.authority, "spiffe://example.org/ci", ["ci.pem", "ci.key"]);
    let new = site.ask("https://", &both);
    assert!(new.status.success(), "{}", stderr(&new));
    // Bad ones change nothing.
    std::fs::write(site.workshop.path("k.pem"), "").unwrap();
    site.hangup();
    site.until("what was there before stays in use");
    assert!(site.ask("https://", &both).status.success());
}

#[test]
fn who_asks_for_tls_gets_it_or_nothing() {
    let workshop = Workshop::new();
    let directories = [("DATABASE_DATA_DIR", "data"), ("ROOTFS_OUTPUT_DIR", "rootfs")];
    for (variables, code, word) in [
        (&[("TLS_MODE", "file")][..], 2, "TLS_CERT_FILE is not set"),
        (
            &[("TLS_MODE", "file"), ("TLS_CERT_FILE", "/none.pem"), ("TLS_KEY_FILE", "/none")],
            1,
            "/none.pem",
        ),
        (&[("TLS_CERT_FILE", "/none.pem")], 2, "TLS_MODE is `disabled`"),
    ] {
        let mut command = workshop.command(&["serve", "--listen", "127.0.0.1:0"]);
        for (name, value) in directories {
            command.env(format!("UNKEY_BUILDERD_{name}"), workshop.path(value));
        }
        let walls = sandbox::Wall::ALL.map(sandbox::Wall::as_str).join(",");
        command.env("UNKEY_BUILDERD_ACCEPT_MISSING_WALLS", walls);
        for (name, value) in variables {
            command.env(format!("UNKEY_BUILDERD_{name}"), value);
        }
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}
