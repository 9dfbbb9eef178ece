//! Loop mounts of image files, undone when dropped. Needs root.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::process::Program;

/// A mounted file system.
pub(crate) struct Mount {
    point: PathBuf,
    _dir: tempfile::TempDir,
}

impl Mount {
    /// Mounts an image file through a loop device.
    pub(crate) fn image(image: &Path, options: &str) -> Result<Self> {
        Self::new(|point| {
            Program::new("mount").arg("-o").arg(format!("loop,{options}")).args([image, point])
        })
    }

    /// Mounts an overlay of directories, the topmost first.
    pub(crate) fn overlay(lower: &[PathBuf]) -> Result<Self> {
        let list: Vec<String> = lower.iter().map(|dir| dir.display().to_string()).collect();
        Self::new(|point| {
            Program::new("mount")
                .args(["-t", "overlay", "overlay", "-o"])
                .arg(format!("ro,lowerdir={}", list.join(":")))
                .arg(point)
        })
    }

    fn new(program: impl FnOnce(&Path) -> Program) -> Result<Self> {
        if !crate::process::is_root() {
            bail!("a mount needs root");
        }
        let dir = tempfile::Builder::new().prefix("builderd-mount-").tempdir()?;
        let point = dir.path().join("m");
        std::fs::create_dir(&point)?;
        program(&point).run().context("cannot mount")?;
        Ok(Self { point, _dir: dir })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.point
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let line = Program::new("umount").arg(&self.point);
        if let Err(error) = line.run() {
            eprintln!("cannot unmount {}: {error:#}", self.point.display());
        }
    }
}

/// A fresh file system in a sparse file: a small disk, or one that reflinks.
pub(crate) fn fresh(file: &Path, kind: &str, size_bytes: u64) -> Result<Mount> {
    std::fs::File::create(file)?.set_len(size_bytes)?;
    let make = match kind {
        "ext4" => Program::new("mkfs.ext4").args(["-q", "-F"]),
        "ext4 of 1 KiB blocks" => Program::new("mkfs.ext4").args(["-q", "-F", "-b", "1024"]),
        "xfs" => Program::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]),
        "btrfs" => Program::new("mkfs.btrfs").arg("-q"),
        other => bail!("no recipe for a {other} file system"),
    };
    make.arg(file).run()?;
    Mount::image(file, "rw")
}
