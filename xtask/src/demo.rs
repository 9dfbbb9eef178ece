//! `cargo xtask demo`: from nothing to a booted image, on a fresh Debian machine: once by the
//! command alone, once by the service, with the same bytes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::arguments::Arguments;
use crate::bench::measure::mebibytes;
use crate::boot::Kernel;
use crate::compare::walk;
use crate::process::{self, Program};
use crate::registry::Registry;
use crate::service::Place;
use crate::service::api::{Api, PRINTED_IMAGE, PRINTED_ORDER, SERVICE};
use crate::{chores, images, machine, workspace};

/// What the image's shell is asked for.
const COMMAND: &str = "cat /etc/os-release; uname -r; ls -l /srv";

/// `cargo xtask demo [--binary FILE]`
pub(crate) fn run(mut arguments: Arguments) -> Result<()> {
    let binary = arguments.value("--binary")?;
    arguments.end()?;
    step("programs");
    machine::require(&[machine::DEMO, &[("curl", "curl")]])?;
    step("builderd, release build");
    let builderd = match binary {
        Some(path) => Path::new(&path).canonicalize()?,
        None => workspace::release_binary("builderd")?,
    };
    // Debian's tools make owners and devices as root only; busybox needs neither.
    let image = if process::is_root() { "small" } else { images::TINY };
    step(&format!("image `{image}`"));
    let layout = images::layout(image)?;
    step("registry on loopback");
    let registry = Registry::start()?;
    let reference = registry.push(&layout, image)?;
    println!("serving {reference}");
    let scratch = chores::scratch()?;
    let (output, wall) = by_the_command(&builderd, &registry, &reference, scratch.path())?;
    registry.push_as(&layout, PRINTED_IMAGE)?;
    let (downloaded, served) = by_the_service(&builderd, &registry, scratch.path())?;
    if walk::sha256_of(&output)? != walk::sha256_of(&downloaded)? {
        bail!("the service and the command made different images");
    }
    println!("the same bytes as the command's");
    step("e2fsck -fn");
    chores::fsck(&downloaded)?;
    println!("clean");
    step("boot in QEMU");
    let proof = Kernel::fetch()?.boot(&downloaded, COMMAND)?;
    println!("{}", proof.console.trim());
    if !proof.console.contains("VERSION_CODENAME=") {
        bail!("the shell did not show /etc/os-release");
    }
    println!(
        "\ndemo: {reference} became {:.1} MiB of ext4 in {:.2} s by the command and in {:.2} s by \
         the service, e2fsck is content, and it booted to its own shell in {:.1} s",
        mebibytes(downloaded.metadata()?.len()),
        wall.as_secs_f64(),
        served.as_secs_f64(),
        proof.wall.as_secs_f64()
    );
    Ok(())
}

fn by_the_command(
    builderd: &Path,
    registry: &Registry,
    reference: &str,
    scratch: &Path,
) -> Result<(PathBuf, Duration)> {
    step("build by the command");
    let output = scratch.join("rootfs.ext4");
    let started = Instant::now();
    Program::new(builderd)
        .args(["build", reference, "--plain-http", registry.address(), "--cache-dir"])
        .arg(scratch.join("cache"))
        .arg("--output")
        .arg(&output)
        .loud_checked()?;
    Ok((output, started.elapsed()))
}

/// Nothing beside `builderd serve` runs: database and artifacts are files of its own.
fn by_the_service(
    builderd: &Path,
    registry: &Registry,
    scratch: &Path,
) -> Result<(PathBuf, Duration)> {
    step("build by the service: the documentation's own CreateBuild, by curl");
    let mirror = registry.address();
    let server = Place::new(builderd, &scratch.join("service"))?
        .set("DOCKER_INSECURE_REGISTRIES", mirror)
        .set("DOCKER_REGISTRY_MIRROR", &format!("ghcr.io={mirror}"))
        .start()?;
    println!("builderd serve --dev on {}", server.address());
    let url = format!("http://{}{SERVICE}", server.address());
    let started = Instant::now();
    let (status, created) = Program::new("curl")
        .args(["--silent", "--show-error", "--fail-with-body", "--request", "POST"])
        .arg(format!("{url}/CreateBuild"))
        .args(["--header", "Content-Type: application/json"])
        .args(["--header", "X-Tenant-ID: tenant-123", "--header", "X-Customer-ID: customer-456"])
        .args(["--data", PRINTED_ORDER])
        .loud_text()?;
    println!();
    if !status.success() {
        bail!("CreateBuild was refused");
    }
    let created: Value = serde_json::from_str(&created)?;
    let id = created["build_id"].as_str().context("the answer names no build")?;
    Api::new(server.address(), "tenant-123", "PRO").follow_with(id, |line| {
        let word = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
        println!("{:>5} {:>9}  {}", word("level"), word("component"), word("message"));
        Ok(())
    })?;
    let served = started.elapsed();
    let file = scratch.join("downloaded.ext4");
    Program::new("curl")
        .args(["--silent", "--show-error", "--fail-with-body", "--output"])
        .arg(&file)
        .args(["--header", "X-Tenant-ID: tenant-123"])
        .arg(format!("{url}/GetBuildArtifact/{id}"))
        .loud_checked()?;
    let status = server.stop(Duration::from_secs(20))?;
    if !status.success() {
        bail!("SIGTERM ended the service with {status}");
    }
    Ok((file, served))
}

fn step(what: &str) {
    println!("\n=== {what}");
}
