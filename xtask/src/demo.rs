//! `cargo xtask demo`: from nothing to a booted image, on a fresh Debian machine.

use std::time::Instant;

use anyhow::{Result, bail};

use crate::boot::Kernel;
use crate::process::{self, Program};
use crate::registry::Registry;
use crate::{chores, images, machine, workspace};

/// What the image's shell is asked for.
const COMMAND: &str = "cat /etc/os-release; uname -r; ls -l /srv";

pub(crate) fn run() -> Result<()> {
    step("programs");
    machine::require(&[machine::DEMO])?;
    step("builderd, release build");
    let builderd = workspace::release_binary("builderd")?;
    // Debian's tools make owners and devices as root only; busybox needs neither.
    let image = if process::is_root() { "small" } else { images::TINY };
    step(&format!("image `{image}`"));
    let layout = images::layout(image)?;
    step("registry on loopback");
    let registry = Registry::start()?;
    let reference = registry.push(&layout, image)?;
    println!("serving {reference}");
    step("build");
    let scratch = chores::scratch()?;
    let output = scratch.path().join("rootfs.ext4");
    let started = Instant::now();
    Program::new(&builderd)
        .args(["build", &reference, "--plain-http", registry.address(), "--cache-dir"])
        .arg(scratch.path().join("cache"))
        .arg("--output")
        .arg(&output)
        .loud_checked()?;
    let wall = started.elapsed();
    step("e2fsck -fn");
    chores::fsck(&output)?;
    println!("clean");
    step("boot in QEMU");
    let proof = Kernel::fetch()?.boot(&output, COMMAND)?;
    println!("{}", proof.console.trim());
    if !proof.console.contains("VERSION_CODENAME=") {
        bail!("the shell did not show /etc/os-release");
    }
    println!(
        "\ndemo: {reference} became {:.1} MiB of ext4 in {:.2} s, e2fsck is content, \
         and it booted to its own shell in {:.1} s",
        crate::bench::measure::mebibytes(output.metadata()?.len()),
        wall.as_secs_f64(),
        proof.wall.as_secs_f64()
    );
    Ok(())
}

fn step(what: &str) {
    println!("\n=== {what}");
}
