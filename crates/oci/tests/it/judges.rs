//! Second opinions: what skopeo writes, we read; what a real registry serves, we pull.
//!
//! These need Debian's `skopeo` and `docker-registry`. Where one is missing the story says so
//! and ends.

use std::path::Path;
use std::process::{Child, Stdio};

use oci::{ClientOptions, Image};

use crate::layouts::LayoutOnDisk;
use crate::support::{drain, options, resolve};

#[expect(clippy::disallowed_methods, reason = "the judges are programs")]
fn program(name: &str) -> std::process::Command {
    std::process::Command::new(name)
}

fn is_here(name: &str) -> bool {
    let found = program("sh").args(["-c", &format!("command -v {name}")]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        println!("SKIPPED: {name} is not installed");
    }
    found
}

fn skopeo(arguments: &[&str]) {
    let output =
        program("skopeo").args(["copy", "--insecure-policy", "--quiet"]).args(arguments).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn digests(source: &str, options: &ClientOptions) -> Image {
    let (fetcher, image) =
        resolve(source, options).await.unwrap_or_else(|e| panic!("{source}: {e:?}"));
    for layer in &image.layers {
        let mut stream = fetcher.blob(&image, layer).await.unwrap();
        drain(&mut stream).await.unwrap();
    }
    image
}

fn layout_of_one_image() -> LayoutOnDisk {
    let mut layout = LayoutOnDisk::new();
    layout.put_image(Some("v1"), "amd64", 1);
    layout
}

#[tokio::test]
async fn what_skopeo_writes_is_read() {
    if !is_here("skopeo") {
        return;
    }
    let layout = layout_of_one_image();
    let from = format!("oci:{}:v1", layout.path().display());
    let (none, _) = options(&[]);
    let original = digests(&from, &none).await;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for to in [
        format!("oci:{}:copy", path("layout")),
        format!("oci-archive:{}:copy", path("oci.tar")),
        format!("docker-archive:{}:copy:v1", path("docker.tar")),
    ] {
        skopeo(&[&from, &to]);
        let read = digests(&to, &none).await;
        assert_eq!(read.config.diff_ids, original.config.diff_ids, "{to}");
        assert_eq!(read.platform, original.platform);
        if to.starts_with("oci") {
            assert_eq!(read.manifest_digest, original.manifest_digest, "{to}");
        }
    }
}

/// A real registry that ends with the story.
struct Registry(Child);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn real_registry(dir: &Path) -> (Registry, String) {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let host = format!("127.0.0.1:{port}");
    let config = dir.join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http: {{addr: \"{host}\"}}\n",
        dir.join("data").display()
    );
    std::fs::write(&config, text).unwrap();
    let child = program("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let registry = Registry(child);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while std::net::TcpStream::connect(&host).is_err() {
        assert!(std::time::Instant::now() < deadline, "docker-registry does not start");
        std::thread::yield_now();
    }
    (registry, host)
}

#[tokio::test]
async fn what_a_real_registry_serves_is_pulled() {
    if !is_here("skopeo") || !is_here("docker-registry") {
        return;
    }
    let layout = layout_of_one_image();
    let from = format!("oci:{}:v1", layout.path().display());
    let dir = tempfile::tempdir().unwrap();
    let (_registry, host) = real_registry(dir.path());
    let (mut options, waits) = options(&[]);
    options.plain_http.insert(host.clone());
    let original = digests(&from, &options).await;
    for (tag, format) in [("oci", "oci"), ("docker", "v2s2")] {
        let to = format!("docker://{host}/team/app:{tag}");
        skopeo(&["--dest-tls-verify=false", "--format", format, &from, &to]);
        let pulled = digests(&to, &options).await;
        assert_eq!(pulled.config.diff_ids, original.config.diff_ids);
        assert!(pulled.anonymous);
        if format == "oci" {
            assert_eq!(pulled.manifest_digest, original.manifest_digest);
        }
    }
    assert!(waits.seen().is_empty());
}
