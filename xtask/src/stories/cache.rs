//! Stories about the layer cache: it saves work, never changes a byte, and forgets on request.

use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, bail};

use super::Verdict;
use super::lab::{Lab, files_below, nothing_in, same_bytes};

pub(super) fn a_warm_build_asks_for_no_layer(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let source = lab.pushed("small")?;
    let cold = corner.output("cold.ext4");
    let before = lab.registry().blob_requests()?;
    corner.build(&source, &cold, &[])?;
    let between = lab.registry().blob_requests()?;
    if between < before + 6 {
        bail!("a cold build of 5 layers asked for {} blobs", between - before);
    }
    let warm = corner.output("warm.ext4");
    corner.build(&source, &warm, &[])?;
    let asked = lab.registry().blob_requests()? - between;
    if asked > 1 {
        bail!("a warm build asked for {asked} blobs; only the config is new");
    }
    same_bytes(&cold, &warm)?;
    Ok(Verdict::Passed)
}

pub(super) fn a_damaged_pack_is_detected_and_made_anew(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let source = lab.pushed("small")?;
    let first = corner.output("first.ext4");
    corner.build(&source, &first, &[])?;
    let packs = || -> Result<_> {
        let mut sized = Vec::new();
        for file in files_below(&corner.path("cache"))? {
            sized.push((file.metadata()?.len(), file));
        }
        sized.sort();
        sized.pop().context("the cache is empty after a build")
    };
    let damage = || -> Result<()> {
        let (length, pack) = packs()?;
        let file = std::fs::File::options().write(true).open(pack)?;
        file.write_all_at(b"damage", length / 3)?;
        Ok(())
    };
    damage()?;
    let second = corner.output("second.ext4");
    corner.build(&source, &second, &[])?;
    same_bytes(&first, &second)?;
    damage()?;
    let verdict = corner.builderd().args(["cache", "verify"]).outcome()?;
    if !verdict.said().contains("damaged") {
        bail!("verify saw nothing wrong:\n{}", verdict.said());
    }
    let after = corner.builderd().args(["cache", "verify"]).checked()?;
    if !after.status.success() {
        bail!("a damaged pack was left in the cache:\n{}", after.said());
    }
    corner.build(&source, &second, &[])?;
    same_bytes(&first, &second)?;
    Ok(Verdict::Passed)
}

pub(super) fn two_processes_share_one_cache(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let source = lab.pushed("small")?;
    let before = lab.registry().blob_requests()?;
    let mut builds = Vec::new();
    let outputs: Vec<_> = (0..3).map(|n| corner.output(&format!("{n}.ext4"))).collect();
    for output in &outputs {
        builds.push(corner.start(&source, output, &[])?);
    }
    for build in &mut builds {
        let status = build.wait_for(std::time::Duration::from_secs(120))?;
        if !status.is_some_and(|status| status.success()) {
            let said = std::fs::read_to_string(corner.path("log")).unwrap_or_default();
            bail!("one of three builds ended with {status:?}:\n{said}");
        }
    }
    same_bytes(&outputs[0], &outputs[1])?;
    same_bytes(&outputs[0], &outputs[2])?;
    // Five layers once, and the config of each of the three.
    let asked = lab.registry().blob_requests()? - before;
    if asked > 8 {
        bail!("three builds of one image asked for {asked} blobs: layers were fetched twice");
    }
    Ok(Verdict::Passed)
}

pub(super) fn prune_and_no_cache_leave_nothing(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let source = lab.pushed("tiny")?;
    let output = corner.output("rootfs.ext4");
    corner.build(&source, &output, &["--no-cache"])?;
    let bytes = |what: &str| -> Result<u64> {
        let mut sum = 0;
        for file in files_below(&corner.path("cache"))? {
            sum += file.metadata()?.len();
        }
        println!("      {what}: {sum} bytes in the cache");
        Ok(sum)
    };
    if bytes("after --no-cache")? != 0 {
        bail!("--no-cache left bytes in the cache");
    }
    nothing_in(&corner.path("tmp"))?;
    corner.build(&source, &output, &[])?;
    if bytes("after a build")? < 1 << 20 {
        bail!("a build left nothing in the cache");
    }
    let listed = corner.builderd().args(["cache", "ls", "--json"]).text()?;
    if !listed.contains("sha256:") {
        bail!("`cache ls` lists no pack: {listed}");
    }
    corner.builderd().args(["cache", "prune", "--all"]).run()?;
    if bytes("after prune --all")? != 0 {
        bail!("prune --all left bytes in the cache");
    }
    Ok(Verdict::Passed)
}
