//! Stories about the size of the file system: what was asked for, and what it can become.

use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context as _, Result, bail};

use super::Verdict;
use super::lab::{Lab, root_needed};
use crate::chores::fsck;
use crate::compare::{self, Rules, walk};
use crate::mount::Mount;
use crate::process::Program;

const GROWTH: u64 = 16;

pub(super) fn an_image_grows_sixteenfold_offline_and_online(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let corner = lab.corner()?;
    let source = lab.pushed("small")?;
    let image = corner.output("rootfs.ext4");
    corner.build(&source, &image, &[])?;
    let size = image.metadata()?.len();
    let wanted = walk::walk(Mount::image(&image, "ro,noload")?.path())?;
    let grow = |name: &str| -> Result<_> {
        let grown = corner.output(name);
        Program::new("cp").arg("--sparse=always").args([&image, &grown]).run()?;
        std::fs::File::options().write(true).open(&grown)?.set_len(size * GROWTH)?;
        Ok(grown)
    };
    let offline = grow("offline.ext4")?;
    Program::new("resize2fs").arg(&offline).run()?;
    fsck(&offline)?;
    // Online as a guest does it: its own resize2fs on its mounted root, in its own kernel.
    let online = grow("online.ext4")?;
    let command = "resize2fs /dev/vda 2>&1; echo free=$(stat -f -c %f /)
                   head -c 4000000 /dev/urandom > /root/after; rm /root/after";
    let proof = lab.kernel()?.boot_and_keep(&online, command)?;
    let free = proof.console.lines().find_map(|line| line.strip_prefix("free="));
    let blocks: u64 = free.context("the guest did not say what is free")?.parse()?;
    if blocks * 4096 < size * (GROWTH - 2) {
        bail!("{} bytes are free after growing from {size}:\n{}", blocks * 4096, proof.console);
    }
    fsck(&online)?;
    for grown in [&offline, &online] {
        let mount = Mount::image(grown, "ro")?;
        // A guest that boots leaves traces in these.
        let ignored = vec!["lost+found", "run", "root"];
        let rules = Rules { ignored, mtime_unknown: vec![Vec::new()], ..Rules::default() };
        let lines = compare::differences(&wanted, &walk::walk(mount.path())?, &rules);
        if let Some(line) = lines.first() {
            bail!("growing changed the tree: {line}");
        }
    }
    Ok(Verdict::Passed)
}

pub(super) fn size_and_free_space_are_what_was_asked_for(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let corner = lab.corner()?;
    let source = lab.pushed("tiny")?;
    let image = corner.output("rootfs.ext4");
    corner.build(&source, &image, &["--size", "3G"])?;
    if image.metadata()?.len() != 3 << 30 {
        bail!("--size 3G made {} bytes", image.metadata()?.len());
    }
    if image.metadata()?.blocks() * 512 > 256 << 20 {
        bail!("an empty image of 3 GiB takes {} bytes", image.metadata()?.blocks() * 512);
    }
    fsck(&image)?;
    for free in [0_u64, 10, 700] {
        corner.build(&source, &image, &["--free-space", &format!("{free}M"), "--no-journal"])?;
        fsck(&image)?;
        let mount = Mount::image(&image, "ro")?;
        let found = rustix::fs::statvfs(mount.path())?;
        let bytes = found.f_bavail * found.f_frsize;
        if bytes < free << 20 || bytes > (free << 20) + (16 << 20) {
            bail!("--free-space {free}M leaves {bytes} bytes");
        }
    }
    let features = Program::new("dumpe2fs").arg("-h").arg(&image).text()?;
    let line = features.lines().find(|line| line.starts_with("Filesystem features"));
    if line.context("dumpe2fs names no features")?.contains("has_journal") {
        bail!("--no-journal made a journal");
    }
    lab.corner()?.refuse(&source, &["--size", "1M"], 3, "at least")?;
    Ok(Verdict::Passed)
}
