//! Images made by our own hand: `tiny` in a second, and series of many files.

use std::io;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::layout::{LayerTar, LayoutWriter};
use super::recipe::CANARY;
use super::tar::{Node, Tar, What};

/// Commands that the tiny image's busybox answers to.
const APPLETS: &[&str] =
    &["sh", "cat", "ls", "echo", "mount", "sync", "sleep", "uname", "id", "stat", "sha256sum"];

/// A bootable busybox system of three layers with one of everything.
pub(crate) fn tiny(layout: &Path) -> Result<()> {
    let busybox = std::fs::read("/bin/busybox")
        .context("cannot read /bin/busybox: install busybox-static")?;
    let mut writer = LayoutWriter::create(layout)?;
    writer.layer(|tar| tiny_base(tar, &busybox))?;
    writer.layer(tiny_middle)?;
    writer.layer(|tar| {
        tar.whiteout("srv/canary")?;
        tar.whiteout("etc/motd")?;
        tar.add("srv/app/config", &Node::file("three"))
    })?;
    writer.finish(&json!({
        "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/srv",
        "Labels": {"org.opencontainers.image.title": "tiny"},
    }))
}

fn tiny_base(tar: &mut LayerTar<'_>, busybox: &[u8]) -> io::Result<()> {
    for dir in ["bin", "dev", "etc", "proc", "srv", "srv/app", "sys", "root", "var"] {
        tar.add(dir, &Node::directory())?;
    }
    tar.add("tmp", &Node::directory().mode(0o1777))?;
    tar.add("bin/busybox", &Node::file(busybox).mode(0o755))?;
    for applet in APPLETS {
        tar.add(format!("bin/{applet}"), &Node::link("bin/busybox").mode(0o755))?;
    }
    tar.add("etc/os-release", &Node::file("NAME=tiny\nVERSION_CODENAME=tiny\n"))?;
    tar.add("etc/motd", &Node::file("gone later\n"))?;
    tar.add("srv/app/config", &Node::file("one"))?;
    let mut canary = CANARY.as_bytes().repeat(2000);
    canary.extend_from_slice(b"\n");
    tar.add("srv/canary", &Node::file(canary))
}

fn tiny_middle(tar: &mut LayerTar<'_>) -> io::Result<()> {
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    tar.add("srv/app/config", &Node::file("two").owner(1001, 1002))?;
    tar.add("srv/app/capable", &Node::file("x").xattr("security.capability", capability))?;
    tar.add("srv/app/noted", &Node::file("y").xattr("user.note", "a note"))?;
    tar.add("srv/app/old", &Node::file("z").mtime(-86_400, 123_456_789))?;
    tar.add("srv/app/escape", &Node::symlink("../../../../../tmp/escape"))?;
    tar.add("srv/app/pipe", &Node::new(What::Fifo))?;
    tar.add("dev/null", &Node::new(What::CharDevice(1, 3)).mode(0o666))?;
    let mut holes = vec![0; 3 << 20];
    holes[2 << 20] = 1;
    tar.add("srv/app/holes", &Node::file(holes))
}

/// An image of two layers with `files` small files, `per_directory` in each directory.
pub(crate) fn many_files(layout: &Path, files: u64, per_directory: u64) -> Result<()> {
    let mut writer = LayoutWriter::create(layout)?;
    writer.layer(|tar| {
        for index in 0..files {
            let directory = index / per_directory;
            if index % per_directory == 0 {
                tar.add(format!("files/d{directory}"), &Node::directory())?;
            }
            let name = format!("files/d{directory}/file-number-{index:08}.txt");
            tar.add(name, &Node::file(format!("this is file {index}\n")))?;
        }
        Ok(())
    })?;
    writer.layer(|tar| tar.add("top", &Node::file("top\n")))?;
    writer.finish(&json!({}))
}

/// A small image that differs from others by its number: a base that all share, and a layer of
/// `bytes` that do not compress.
pub(crate) fn numbered(layout: &Path, number: u64, bytes: u64) -> Result<()> {
    let mut writer = LayoutWriter::create(layout)?;
    writer.layer(|tar| {
        tar.add("etc", &Node::directory())?;
        tar.add("etc/os-release", &Node::file("NAME=numbered\n"))
    })?;
    writer.layer(|tar| {
        tar.add("srv", &Node::directory())?;
        tar.add("srv/number", &Node::file(format!("{number}\n")))?;
        tar.add("srv/noise", &Node::file(noise(number, bytes)))
    })?;
    writer.finish(&json!({"Cmd": ["/srv/number"]}))
}

/// Bytes that do not compress and differ with every seed.
pub(crate) fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let block = |n: u64| Sha256::new_with_prefix(seed.to_le_bytes()).chain_update(n.to_le_bytes());
    (0..bytes / 32).flat_map(|n| <[u8; 32]>::from(block(n).finalize())).collect()
}

/// A tar stream in memory.
pub(crate) fn tar_bytes(
    fill: impl FnOnce(&mut Tar<Vec<u8>>) -> io::Result<()>,
) -> io::Result<Vec<u8>> {
    let mut tar = Tar::new(Vec::new());
    fill(&mut tar)?;
    tar.finish()
}
