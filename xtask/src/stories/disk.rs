//! Stories about builds that do not end well: no half-made file may stand where a whole one goes.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Verdict;
use super::lab::{Corner, Lab, files_below, nothing_in, root_needed, same_bytes};
use crate::mount;

/// The exit code that `builderd --help` documents.
const EXIT_NO_SPACE: i32 = 5;

/// At how many moments of a build it is stopped.
const MOMENTS: u32 = 8;

pub(super) fn a_full_disk_leaves_no_output(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let source = lab.pushed("small")?;
    for (what, mebibytes, no_cache) in
        [("packs do not fit", 100, true), ("the image does not fit", 150, false)]
    {
        let corner = lab.corner()?;
        let disk = mount::fresh(&corner.path("disk"), "ext4", mebibytes << 20)?;
        let output = disk.path().join("rootfs.ext4");
        let mut program = corner.build_program(&source, &output);
        if no_cache {
            program = program.arg("--no-cache").env("TMPDIR", disk.path());
        }
        let outcome = program.outcome()?;
        if outcome.status.code() != Some(EXIT_NO_SPACE) {
            bail!("{what}: expected exit {EXIT_NO_SPACE}:\n{}", outcome.said());
        }
        let left: Vec<_> = files_below(disk.path())?;
        if !left.is_empty() {
            bail!("{what}: {left:?} is left");
        }
        corner.no_temporary()?;
    }
    Ok(Verdict::Passed)
}

/// Data is shared, shifted or copied, depending on the file systems; nobody may see which.
pub(super) fn wherever_packs_and_image_lie_the_bytes_are_the_same(lab: &Lab) -> Result<Verdict> {
    /// Blocks of 1 KiB, as mke2fs gives them to small file systems, make files end early.
    const DISKS: [&str; 4] = ["ext4 of 1 KiB blocks", "ext4", "xfs", "btrfs"];
    const DISK_BYTES: u64 = 2 << 30;
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let source = lab.pushed("small")?;
    let corner = lab.corner()?;
    let expected = corner.output("rootfs.ext4");
    corner.build(&source, &expected, &[])?;
    let mut disks = Vec::new();
    for (index, kind) in DISKS.into_iter().enumerate() {
        let file = corner.path(&format!("disk{index}"));
        disks.push((kind, mount::fresh(&file, kind, DISK_BYTES)?));
    }
    for (kind, disk) in &disks {
        let output = disk.path().join("rootfs.ext4");
        corner.build(&source, &output, &["--no-cache"])?;
        same_bytes(&expected, &output).with_context(|| format!("--no-cache on {kind}"))?;
        std::fs::remove_file(&output)?;
    }
    for (packs_on, packs) in &disks[1..] {
        let cache = packs.path().join("cache").display().to_string();
        for (image_on, disk) in &disks[1..] {
            let output = disk.path().join("rootfs.ext4");
            corner.build(&source, &output, &["--cache-dir", &cache])?;
            let place = || format!("packs on {packs_on}, image on {image_on}");
            same_bytes(&expected, &output).with_context(place)?;
            std::fs::remove_file(&output)?;
        }
    }
    Ok(Verdict::Passed)
}

/// XFS and btrfs share blocks between packs and image, and hole for hole: the second image of known
/// layers costs its metadata, and none of the bytes that an upper layer hid.
pub(super) fn where_blocks_can_be_shared_a_known_image_takes_its_metadata_alone(
    lab: &Lab,
) -> Result<Verdict> {
    /// What an image of `small` has of metadata, rounded up by much; its files have 250 MB.
    const METADATA_BYTES_MAX: u64 = 40 << 20;
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let source = lab.pushed("small")?;
    let corner = lab.corner()?;
    for kind in ["xfs", "btrfs"] {
        let disk = mount::fresh(&corner.path(kind), kind, 2 << 30)?;
        let cache = disk.path().join("cache").display().to_string();
        let used = || -> Result<u64> {
            // Blocks are given to a file when it is written out.
            rustix::fs::syncfs(std::fs::File::open(disk.path())?)?;
            let stat = rustix::fs::statvfs(disk.path())?;
            Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
        };
        let image = |name: &str| disk.path().join(name);
        corner.build(&source, &image("first.ext4"), &["--cache-dir", &cache])?;
        let before = used()?;
        corner.build(&source, &image("second.ext4"), &["--cache-dir", &cache])?;
        let grown = used()?.saturating_sub(before);
        crate::chores::fsck(&image("second.ext4"))?;
        same_bytes(&image("first.ext4"), &image("second.ext4")).context(kind)?;
        let allocated = image("second.ext4").metadata()?.blocks() * 512;
        println!(
            "      {kind}: {:.1} MiB more on disk for an image of {} MiB",
            grown as f64 / 1_048_576.0,
            allocated >> 20
        );
        if grown > METADATA_BYTES_MAX {
            bail!("{kind}: a known image took {grown} bytes: its blocks were copied");
        }
    }
    Ok(Verdict::Passed)
}

/// What a file system takes for itself to hold some files more.
const UPKEEP_BYTES: u64 = 4 << 20;

pub(super) fn packs_and_image_are_all_that_a_build_puts_on_the_disk(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let source = lab.pushed("small")?;
    let corner = lab.corner()?;
    let disk = mount::fresh(&corner.path("disk"), "ext4", 2 << 30)?;
    let cache = disk.path().join("cache");
    let output = disk.path().join("rootfs.ext4");
    let used = || -> Result<u64> {
        let stat = rustix::fs::statvfs(disk.path())?;
        Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
    };
    // Files without a name count as well.
    let peak = |options: &[&str]| -> Result<u64> {
        let before = used()?;
        let program = corner.build_program(&source, &output).args(options);
        let mut build = program.env("TMPDIR", disk.path()).background(&corner.path("log"))?;
        let mut peak = 0;
        loop {
            peak = used()?.saturating_sub(before).max(peak);
            match build.finished()? {
                Some(status) if status.success() => return Ok(peak),
                Some(status) => bail!("{options:?}: {status}"),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    };
    let with_cache = peak(&["--cache-dir", &cache.display().to_string()])?;
    let on_disk = |path: &Path| path.metadata().map(|metadata| metadata.blocks() * 512);
    let mut packs = 0;
    for file in files_below(&cache)? {
        packs += on_disk(&file)?;
    }
    let both = packs + on_disk(&output)?;
    std::fs::remove_dir_all(&cache)?;
    std::fs::remove_file(&output)?;
    let without_cache = peak(&["--no-cache"])?;
    let mebibytes = |bytes: u64| bytes >> 20;
    println!(
        "      packs and image: {} MiB, most on disk: {} MiB with a cache, {} MiB without",
        mebibytes(both),
        mebibytes(with_cache),
        mebibytes(without_cache)
    );
    for (what, most) in [("with a cache", with_cache), ("without", without_cache)] {
        if most > both + UPKEEP_BYTES {
            bail!("{what}: {most} bytes on disk at once, packs and image are {both}");
        }
    }
    Ok(Verdict::Passed)
}

/// Stops builds at several moments; `after` looks at what is left.
fn stop_at_every_moment(
    lab: &Lab,
    signal: &str,
    options: &[&str],
    after: impl Fn(&Corner<'_>) -> Result<()>,
) -> Result<()> {
    let corner = lab.corner()?;
    let source = lab.pushed("small")?;
    let whole = corner.output("whole.ext4");
    let mut wall = Duration::MAX;
    for _ in 0..2 {
        let _ = std::fs::remove_dir_all(corner.path("cache"));
        let started = Instant::now();
        corner.build(&source, &whole, options)?;
        wall = wall.min(started.elapsed());
    }
    let mut stopped = 0;
    for moment in 0..MOMENTS {
        let _ = std::fs::remove_dir_all(corner.path("cache"));
        std::fs::create_dir(corner.path("cache"))?;
        let output = corner.output("stopped.ext4");
        let mut build = corner.start(&source, &output, options)?;
        std::thread::sleep(wall * (2 * moment + 1) / (2 * MOMENTS));
        if build.finished()?.is_none() {
            build.signal(signal)?;
        }
        let status = build.wait_for(Duration::from_secs(20))?.context("it does not stop")?;
        if status.success() {
            for file in ["stopped.ext4", "stopped.ext4.sha256", "stopped.ext4.metadata.json"] {
                std::fs::remove_file(corner.output(file))?;
            }
        } else {
            stopped += 1;
        }
        for file in files_below(&corner.path("out"))? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.starts_with("whole.ext4") {
                bail!("{signal} at moment {moment} left {}", file.display());
            }
        }
        after(&corner)?;
    }
    if stopped < MOMENTS / 2 {
        bail!("only {stopped} of {MOMENTS} builds were stopped before their end");
    }
    // And the next build is none the wiser.
    let again = corner.output("again.ext4");
    corner.build(&source, &again, options)?;
    same_bytes(&whole, &again)
}

pub(super) fn a_killed_build_leaves_no_file(lab: &Lab) -> Result<Verdict> {
    stop_at_every_moment(lab, "KILL", &["--no-cache"], |corner| {
        nothing_in(&corner.path("tmp"))?;
        let cached = files_below(&corner.path("cache"))?;
        if cached.iter().any(|file| file.metadata().is_ok_and(|m| m.len() > 0)) {
            bail!("a killed build without cache left {cached:?}");
        }
        Ok(())
    })?;
    stop_at_every_moment(lab, "KILL", &[], |corner| nothing_in(&corner.path("tmp")))?;
    Ok(Verdict::Passed)
}

pub(super) fn an_interrupted_build_leaves_no_file(lab: &Lab) -> Result<Verdict> {
    stop_at_every_moment(lab, "INT", &[], |corner| nothing_in(&corner.path("tmp")))?;
    Ok(Verdict::Passed)
}

pub(super) fn an_earlier_image_survives_a_failed_build(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let output = corner.output("rootfs.ext4");
    let kept = corner.path("kept");
    corner.build(&lab.pushed("tiny")?, &output, &[])?;
    std::fs::copy(&output, &kept)?;
    let outcome =
        corner.build_program(&lab.registry().reference("no-such-image"), &output).outcome()?;
    if outcome.status.success() {
        bail!("a build of nothing succeeded");
    }
    same_bytes(&output, &kept)?;
    Ok(Verdict::Passed)
}
