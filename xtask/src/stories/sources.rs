//! Stories about where an image may come from, and in which form it may leave.

use std::fs::File;

use anyhow::{Result, bail};

use super::Verdict;
use super::lab::{Lab, Size, root_needed, same_bytes};
use crate::compare::walk::{self, Tree};
use crate::compare::{self, Rules, reference};
use crate::images;
use crate::images::layout::LayoutWriter;
use crate::mount::Mount;
use crate::process::Program;

/// Exit codes that `builderd --help` documents.
const EXIT_IMAGE: i32 = 3;
const EXIT_UPSTREAM: i32 = 4;

fn skopeo(from: &str, to: &str, options: &[&str]) -> Result<()> {
    Program::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(options)
        .args([from, to])
        .run()
}

fn tree_of(image: &std::path::Path) -> Result<Tree> {
    walk::walk(Mount::image(image, "ro,noload")?.path())
}

fn same_tree(wanted: &Tree, image: &std::path::Path, what: &str) -> Result<()> {
    crate::chores::fsck(image)?;
    let lines = compare::differences(wanted, &tree_of(image)?, &Rules::image());
    if !lines.is_empty() {
        bail!("{what}: {} differences, the first: {}", lines.len(), lines[0]);
    }
    Ok(())
}

pub(super) fn archives_layouts_and_registries_give_the_same_tree(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let corner = lab.corner()?;
    let from_registry = corner.output("registry.ext4");
    corner.build(&lab.pushed("small")?, &from_registry, &[])?;
    let wanted = tree_of(&from_registry)?;
    let layout = format!("oci:{}:latest", images::layout("small")?.display());
    let next = corner.output("next.ext4");
    corner.build(&layout, &next, &[])?;
    same_bytes(&from_registry, &next)?;
    let oci = corner.path("small.oci");
    let docker = corner.path("small.docker");
    skopeo(&layout, &format!("oci-archive:{}:latest", oci.display()), &[])?;
    skopeo(&layout, &format!("docker-archive:{}:small:latest", docker.display()), &[])?;
    Program::new("gzip").args(["-1", "-k"]).arg(&docker).run()?;
    let zipped = crate::process::with_suffix(&docker, ".gz");
    for source in [
        format!("oci-archive:{}", oci.display()),
        format!("docker-archive:{}", docker.display()),
        format!("docker-archive:{}", zipped.display()),
    ] {
        corner.build(&source, &next, &[])?;
        same_tree(&wanted, &next, &source)?;
    }
    for file in [&oci, &docker, &zipped] {
        corner.build_program("-", &next).stdin(File::open(file)?).run()?;
        same_tree(&wanted, &next, &format!("standard input from {}", file.display()))?;
    }
    corner.no_temporary()?;
    Ok(Verdict::Passed)
}

pub(super) fn zstd_layers_and_plain_ones_give_the_same_tree(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let corner = lab.corner()?;
    let gzip = corner.output("gzip.ext4");
    let layout = images::layout("small")?;
    corner.build(&format!("oci:{}", layout.display()), &gzip, &[])?;
    let wanted = tree_of(&gzip)?;
    for (tool, suffix) in [("zstd -1", "+zstd"), ("zstd --fast --long=27", "+zstd"), ("cat", "")] {
        let dir = corner.path("recompressed");
        let mut writer = LayoutWriter::create(&dir)?;
        for blob in reference::layer_blobs(&layout)? {
            let script = format!("gzip -dc < \"$0\" | tee plain | {tool} > blob");
            Program::shell(&script).arg(blob).dir(corner.path("tmp")).run()?;
            let read = |name: &str| std::fs::read(corner.path("tmp").join(name));
            writer.raw_layer_as(suffix, &read("blob")?, &read("plain")?)?;
        }
        writer.finish(&serde_json::json!({}))?;
        for name in ["blob", "plain"] {
            std::fs::remove_file(corner.path("tmp").join(name))?;
        }
        let output = corner.output("next.ext4");
        corner.build(&format!("oci:{}", dir.display()), &output, &[])?;
        same_tree(&wanted, &output, tool)?;
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(Verdict::Passed)
}

/// Blobs of zstd:chunked, as skopeo makes them: a frame for each file and, in frames that readers of
/// zstd skip, a table of the files behind them.
pub(super) fn layers_of_zstd_chunked_give_the_same_tree(lab: &Lab) -> Result<Verdict> {
    if let Some(reason) = root_needed() {
        return Ok(Verdict::Skipped(reason));
    }
    let corner = lab.corner()?;
    let gzip = corner.output("gzip.ext4");
    // To make such blobs takes skopeo a minute where others take seconds.
    let image = if lab.size == Size::Full { "small" } else { images::TINY };
    let source = format!("oci:{}:latest", images::layout(image)?.display());
    corner.build(&source, &gzip, &[])?;
    let wanted = tree_of(&gzip)?;
    let chunked = corner.path("chunked");
    let packed = ["--dest-compress-format", "zstd:chunked"];
    // An OCI layout keeps layers as they are; a plain directory has them compressed anew.
    let directory = corner.path("directory");
    let to = format!("dir:{}", directory.display());
    skopeo(&source, &to, &[&["--dest-compress"], &packed[..]].concat())?;
    skopeo(&to, &format!("oci:{}:latest", chunked.display()), &[])?;
    let reference = lab.registry().reference("chunked");
    let registry = ["--dest-tls-verify=false"];
    skopeo(&to, &format!("docker://{reference}"), &registry)?;
    let mut frames = 0;
    for blob in reference::layer_blobs(&chunked)? {
        let bytes = std::fs::read(&blob)?;
        if !has_skipped_frame_of_files(&bytes) {
            bail!("{} is no zstd:chunked blob", blob.display());
        }
        frames += bytes.windows(4).filter(|window| *window == ZSTD).count();
    }
    println!("      {frames} frames of zstd in the layers of {image}");
    for source in [format!("oci:{}", chunked.display()), reference] {
        let output = corner.output("next.ext4");
        corner.build(&source, &output, &["--no-cache"])?;
        same_tree(&wanted, &output, &source)?;
    }
    Ok(Verdict::Passed)
}

/// What a frame of zstd begins with.
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Whether a blob ends with the footer of zstd:chunked, in a frame that a decoder skips.
fn has_skipped_frame_of_files(blob: &[u8]) -> bool {
    const SKIPPED: &[u8] = &[0x50, 0x2a, 0x4d, 0x18];
    const MAGIC: &[u8] = b"GnUlInUx";
    let tail = &blob[blob.len().saturating_sub(128)..];
    blob.starts_with(ZSTD)
        && tail.ends_with(MAGIC)
        && tail.windows(SKIPPED.len()).any(|window| window == SKIPPED)
}

pub(super) fn a_compressed_image_unpacks_to_the_plain_one(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let source = lab.pushed("tiny")?;
    let plain = corner.output("plain.ext4");
    corner.build(&source, &plain, &[])?;
    for (format, tool) in [("gzip", "gzip"), ("zstd", "zstd")] {
        if !crate::process::found(tool) {
            return Ok(Verdict::Skipped(format!("{tool} is not installed")));
        }
        let packed = corner.output(&format!("image.{tool}"));
        corner.build(&source, &packed, &["--compression", format])?;
        let unpacked = corner.output("unpacked.ext4");
        Program::shell(&format!("{tool} -dc < \"$0\" > \"$1\""))
            .arg(&packed)
            .arg(&unpacked)
            .run()?;
        same_bytes(&plain, &unpacked)?;
    }
    Ok(Verdict::Passed)
}

pub(super) fn an_unknown_image_and_a_dead_registry_are_told_apart(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let unknown = lab.registry().reference("no-such-image");
    corner.refuse(&unknown, &[], EXIT_IMAGE, "no-such-image")?;
    // Port 9 of loopback: nothing listens there.
    let dead = ["--plain-http", "127.0.0.1:9"];
    corner.refuse("127.0.0.1:9/dead:latest", &dead, EXIT_UPSTREAM, "127.0.0.1:9")?;
    Ok(Verdict::Passed)
}
