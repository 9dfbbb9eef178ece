//! Loop mounts of image files, undone when dropped, or by the next run if that one was killed. Needs
//! root.

use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context as _, Result, bail};

use crate::process::Program;

/// How the directory of a mount is called, before the number of the process that made it.
const PREFIX: &str = "builderd-mount-";

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
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| std::env::temp_dir().read_dir().into_iter().flatten().for_each(sweep));
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir()?;
        let point = dir.path().join("m");
        std::fs::create_dir(&point)?;
        program(&point).run().context("cannot mount")?;
        Ok(Self { point, _dir: dir })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.point
    }
}

/// Undoes a mount whose process was killed.
fn sweep(entry: std::io::Result<std::fs::DirEntry>) {
    let Ok(entry) = entry else { return };
    let name = entry.file_name();
    let Some(maker) = name.to_str().and_then(maker) else { return };
    if Path::new("/proc").join(maker.to_string()).exists() {
        return;
    }
    let point = entry.path().join("m");
    eprintln!("unmounting {}, which a killed run has left", point.display());
    // Perhaps it was killed before it mounted anything.
    let _ = Program::new("umount").arg(&point).run();
    let _ = std::fs::remove_dir(&point).and_then(|()| std::fs::remove_dir(entry.path()));
}

/// The process that made a mount's directory.
fn maker(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maker_of_a_mount_is_in_its_name() {
        assert_eq!(maker("builderd-mount-4711-aB3xYz"), Some(4711));
        for other in ["builderd-mount-aB3xYz", "builderd-mount-", "4711-aB3xYz"] {
            assert_eq!(maker(other), None, "{other}");
        }
    }
}
