//! Stories about the bytes of the image file: always the same, and none too many.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use sha2::{Digest as _, Sha256};

use super::Verdict;
use super::lab::{Lab, same_bytes};
use crate::images;
use crate::images::layout::LayoutWriter;
use crate::images::recipe::CANARY;
use crate::images::tar::Node;
use crate::process::{Program, is_root};

/// The grain at which equal base layers must be equal (`docs/ext4.md`).
const CHUNK_BYTES: usize = 512 * 1024;

pub(super) fn two_builds_give_the_same_bytes_whatever_surrounds_them(lab: &Lab) -> Result<Verdict> {
    for image in lab.images() {
        let corner = lab.corner()?;
        let source = lab.pushed(image)?;
        let first = corner.output("first.ext4");
        corner.build(&source, &first, &["--jobs", "1", "--no-cache"])?;
        let variations: &[(&str, &str, &str, &[&str])] = &[
            ("Pacific/Kiritimati", "C", "000", &["--jobs", "7"]),
            ("America/St_Johns", "tr_TR.UTF-8", "077", &["--jobs", "2"]),
            ("UTC", "C.UTF-8", "022", &["--checksum", "none"]),
        ];
        for (zone, locale, mask, options) in variations {
            let next = corner.output("next.ext4");
            let program = corner.build_program(&source, &next).args(*options);
            let script = format!("umask {mask}; exec {}", program.line());
            Program::shell(&script)
                .env("TZ", zone)
                .env("LANG", locale)
                .env("LC_ALL", locale)
                .env("HOME", corner.path("home"))
                .env("XDG_CACHE_HOME", corner.path("cache"))
                .run()?;
            same_bytes(&first, &next)?;
        }
    }
    Ok(Verdict::Passed)
}

pub(super) fn an_unprivileged_user_builds_the_same_bytes(lab: &Lab) -> Result<Verdict> {
    if !is_root() {
        return Ok(Verdict::Skipped("only root can become another user".into()));
    }
    let corner = lab.corner()?;
    let source = lab.pushed("tiny")?;
    let by_root = corner.output("root.ext4");
    corner.build(&source, &by_root, &[])?;
    let dir = corner.path("other");
    std::fs::create_dir(&dir)?;
    let parent = dir.parent().unwrap_or(&dir);
    Program::new("chmod").arg("711").arg(parent).run()?;
    Program::new("chown").arg("65534:65534").arg(&dir).run()?;
    // The binary may lie where another user cannot go.
    let binary = corner.path("builderd");
    std::fs::copy(lab.binary(), &binary)?;
    let by_nobody = dir.join("nobody.ext4");
    Program::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&binary)
        .args(["build", &source, "--plain-http", lab.registry().address(), "--output"])
        .arg(&by_nobody)
        .env("HOME", &dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .run()?;
    same_bytes(&by_root, &by_nobody)?;
    Ok(Verdict::Passed)
}

pub(super) fn source_date_epoch_changes_the_times_and_nothing_else_does(
    lab: &Lab,
) -> Result<Verdict> {
    let corner = lab.corner()?;
    let source = lab.pushed("tiny")?;
    let build = |name: &str, epoch: &str| -> Result<PathBuf> {
        let output = corner.output(name);
        corner.build_program(&source, &output).env("SOURCE_DATE_EPOCH", epoch).run()?;
        Ok(output)
    };
    let one = build("one.ext4", "1000000000")?;
    same_bytes(&one, &build("two.ext4", "1000000000")?)?;
    if same_bytes(&one, &build("three.ext4", "1100000000")?).is_ok() {
        bail!("SOURCE_DATE_EPOCH changed nothing");
    }
    let dump = Program::new("debugfs").args(["-R", "stat /etc/os-release"]).arg(&one).text()?;
    if !dump.contains("0x3b9aca00") {
        bail!("a later time was not clamped:\n{dump}");
    }
    Ok(Verdict::Passed)
}

pub(super) fn what_an_upper_layer_deleted_is_not_in_the_image(lab: &Lab) -> Result<Verdict> {
    for image in ["tiny", "small"] {
        let corner = lab.corner()?;
        let source = lab.pushed(image)?;
        for options in [&[][..], &["--no-cache"]] {
            let output = corner.output("rootfs.ext4");
            corner.build(&source, &output, options)?;
            if contains(&output, CANARY.as_bytes())? {
                bail!("{image} {options:?}: the canary lives");
            }
        }
        // The test must be able to fail: the layers do hold it.
        let held = images::layout(image)?;
        let blobs = crate::compare::reference::layer_blobs(&held)?;
        let mut found = false;
        for blob in blobs {
            found |= gzip_contains(&blob, CANARY.as_bytes())?;
        }
        if !found {
            bail!("no layer of {image} holds the canary");
        }
    }
    Ok(Verdict::Passed)
}

pub(super) fn images_that_share_a_base_share_its_chunks(lab: &Lab) -> Result<Verdict> {
    let corner = lab.corner()?;
    let mut chunks = Vec::new();
    for (name, extra) in [("a", 3_usize), ("b", 700)] {
        let layout = corner.path(name);
        two_layers(&layout, lab.scale(96, 2200), extra)?;
        let output = corner.output(&format!("{name}.ext4"));
        corner.build(&format!("oci:{}", layout.display()), &output, &[])?;
        crate::chores::fsck(&output)?;
        chunks.push(chunk_sums(&output)?);
    }
    let shared = chunks[0].intersection(&chunks[1]).count();
    let all = chunks[0].len();
    println!("      {shared} of {all} data chunks of 512 KiB are shared");
    // Metadata and the upper layers are a handful of chunks; everything else is the base.
    if shared + 24 < all {
        bail!("only {shared} of {all} chunks are shared");
    }
    Ok(Verdict::Passed)
}

/// A base of files of 1 MiB that all differ, and an upper layer of `extra` small files.
fn two_layers(layout: &Path, base_mib: u64, extra: usize) -> Result<()> {
    let mut writer = LayoutWriter::create(layout)?;
    writer.layer(|tar| {
        for index in 0..base_mib {
            let seed: [u8; 32] = Sha256::digest(index.to_le_bytes()).into();
            // Half of it is a pattern, so that the layer compresses quickly.
            let content: Vec<u8> = seed.iter().copied().cycle().take(1 << 20).collect();
            tar.add(format!("base/{index}"), &Node::file(content))?;
        }
        Ok(())
    })?;
    writer.layer(|tar| {
        for index in 0..extra {
            tar.add(format!("upper/{index}"), &Node::file(format!("{extra} {index}").repeat(999)))?;
        }
        Ok(())
    })?;
    writer.finish(&serde_json::json!({}))
}

/// Sums of every chunk that is not all zero.
fn chunk_sums(image: &Path) -> Result<HashSet<[u8; 32]>> {
    let mut sums = HashSet::new();
    let mut file = File::open(image)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let mut filled = 0;
        while filled < CHUNK_BYTES {
            match file.read(&mut chunk[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            return Ok(sums);
        }
        if chunk[..filled].iter().any(|byte| *byte != 0) {
            sums.insert(Sha256::digest(&chunk[..filled]).into());
        }
    }
}

/// Does a file hold these bytes anywhere?
fn contains(path: &Path, needle: &[u8]) -> Result<bool> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(0))?;
    stream_contains(file, needle)
}

fn gzip_contains(path: &Path, needle: &[u8]) -> Result<bool> {
    stream_contains(flate2::read::MultiGzDecoder::new(File::open(path)?), needle)
}

fn stream_contains(mut stream: impl std::io::Read, needle: &[u8]) -> Result<bool> {
    let mut window = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(false);
        }
        window.extend_from_slice(&buffer[..count]);
        let rare = needle[0];
        let mut rest = &window[..];
        while let Some(at) = rest.iter().position(|byte| *byte == rare) {
            if rest[at..].starts_with(needle) {
                return Ok(true);
            }
            rest = &rest[at + 1..];
        }
        let keep = window.len().saturating_sub(needle.len() - 1);
        window.drain(..keep);
    }
}
