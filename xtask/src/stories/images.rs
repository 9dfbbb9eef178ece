//! Stories about the test images as they come out of a registry.

use anyhow::{Context as _, Result, bail};

use super::Verdict;
use super::lab::{Lab, root_needed};
use crate::bench::measure;
use crate::compare::{reference, walk};
use crate::images;
use crate::mount::Mount;

/// The largest process of a build may take this much.
const RSS_BYTES_MAX: u64 = 100 << 20;

pub(super) fn every_test_image_equals_an_independent_unpack_and_fsck_is_silent(
    lab: &Lab,
) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    for image in lab.images() {
        let corner = lab.corner()?;
        let output = corner.output("rootfs.ext4");
        corner.build(&lab.pushed(image)?, &output, &[])?;
        let layout = images::layout(image)?;
        let scratch = corner.path("tmp");
        let by_overlay = reference::overlay(&layout, &scratch)?;
        corner.judge(&output, by_overlay).with_context(|| format!("{image}, overlay"))?;
        let by_umoci = reference::umoci(&layout, &scratch)?;
        corner.judge(&output, by_umoci).with_context(|| format!("{image}, umoci"))?;
    }
    Ok(Verdict::Passed)
}

pub(super) fn the_metadata_repeats_what_the_image_says_of_itself(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let output = corner.output("rootfs.ext4");
    let source = lab.pushed("small")?;
    corner.build(&source, &output, &[])?;
    let text = std::fs::read_to_string(corner.output("rootfs.ext4.metadata.json"))?;
    let found: serde_json::Value = serde_json::from_str(&text)?;
    let wanted = serde_json::json!({
        "entrypoint": ["/usr/sbin/nginx"], "command": ["-g", "daemon off;"],
        "working_dir": "/srv/app", "exposed_ports": ["80"], "user": "www-data",
        "volumes": ["/srv/data"],
    });
    for (key, value) in wanted.as_object().into_iter().flatten() {
        if &found[key] != value {
            bail!("{key}: expected {value}, found {}", found[key]);
        }
    }
    if found["env"]["APP_HOME"] != "/srv/app" || found["layers"].as_array().map(Vec::len) != Some(5)
    {
        bail!("env or layers are wrong:\n{text}");
    }
    let sums = std::fs::read_to_string(corner.output("rootfs.ext4.sha256"))?;
    let hex: String = walk::sha256_of(&output)?.iter().map(|byte| format!("{byte:02x}")).collect();
    if !sums.starts_with(&hex) || !text.contains(&hex) {
        bail!("the checksum of the file is {hex}, but beside it stands {sums}");
    }
    Ok(Verdict::Passed)
}

pub(super) fn our_own_reader_agrees_with_the_kernel(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let corner = lab.corner()?;
    let output = corner.output("rootfs.ext4");
    corner.build(&lab.pushed("small")?, &output, &[])?;
    corner.builderd().args(["inspect", "--verify"]).arg(&output).run()?;
    let mount = Mount::image(&output, "ro,noload")?;
    let paths =
        ["etc/passwd", "usr/bin/perl", "srv/app/hard.py", "var/lib/dpkg/status", "usr/sbin/nginx"];
    for path in paths {
        let ours = corner.builderd().arg("inspect").arg(&output).args(["--cat", path]).checked()?;
        if ours.stdout != std::fs::read(mount.path().join(path))? {
            bail!("{path} reads differently through the kernel");
        }
    }
    let listed = corner.builderd().arg("inspect").arg(&output).arg("--tree").checked()?;
    let names = walk::walk(mount.path())?.len();
    let lines = listed.stdout.split(|byte| *byte == b'\n').filter(|l| !l.is_empty()).count();
    if lines + 8 < names {
        bail!("inspect lists {lines} lines for {names} names");
    }
    Ok(Verdict::Passed)
}

pub(super) fn the_image_boots_to_its_own_shell(lab: &Lab) -> Result<Verdict> {
    let kernel = lab.kernel()?;
    for image in ["tiny", "small"] {
        let corner = lab.corner()?;
        let output = corner.output("rootfs.ext4");
        corner.build(&lab.pushed(image)?, &output, &[])?;
        let command = "cat /etc/os-release; echo written > /root/proof; cat /root/proof";
        let proof = kernel.boot(&output, command)?;
        if !proof.console.contains("VERSION_CODENAME=") || !proof.console.contains("written") {
            bail!("{image} booted but said:\n{}", proof.console);
        }
    }
    Ok(Verdict::Passed)
}

pub(super) fn peak_memory_stays_below_100_mib(lab: &Lab) -> Result<Verdict> {
    for image in lab.images() {
        let source = lab.pushed(image)?;
        for options in ["", "--no-cache"] {
            let corner = lab.corner()?;
            let program = corner
                .build_program(&source, &corner.output("rootfs.ext4"))
                .args(options.split_whitespace());
            let run = measure::once(program)?;
            println!(
                "      {image:14} {options:10} {:6.1} MiB at most, {:.2} s",
                measure::mebibytes(run.rss_bytes),
                run.wall.as_secs_f64()
            );
            if run.rss_bytes > RSS_BYTES_MAX {
                bail!("{image} {options}: {:.1} MiB", measure::mebibytes(run.rss_bytes));
            }
        }
    }
    Ok(Verdict::Passed)
}
