//! Everyone who takes part: each turns a registry reference into an ext4 file, or pretends to.
//!
//! A contender is asked for a program that is then measured; what it does before is not.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::variant;
use crate::process::Program;
use crate::registry::Registry;

/// What stays the same for all contenders of one image.
pub(crate) struct Course<'a> {
    pub(crate) registry: &'a Registry,
    pub(crate) image: &'a str,
    pub(crate) layout: PathBuf,
    pub(crate) reference: String,
    pub(crate) builderd: PathBuf,
    pub(crate) xtask: PathBuf,
    /// Names in the merged tree, for peers that must be told.
    pub(crate) inodes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    Floor,
    NoCache,
    NoCacheNoChecksum,
    Cold,
    ColdNoChecksum,
    Warm,
    WarmNoChecksum,
    /// All layers but the top one are known.
    ChangedTop,
    ChangedTopNoChecksum,
    UmociMke2fs {
        inodes_given: bool,
    },
    PodmanExport {
        inodes_given: bool,
    },
}

impl Contender {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Floor => "floor (download, inflate, hash twice, write once)",
            Self::NoCache => "builderd --no-cache",
            Self::NoCacheNoChecksum => "builderd --no-cache, --checksum none",
            Self::Cold => "builderd, empty cache",
            Self::ColdNoChecksum => "builderd, empty cache, --checksum none",
            Self::Warm => "builderd, layers known",
            Self::WarmNoChecksum => "builderd, layers known, --checksum none",
            Self::ChangedTop => "builderd, top layer changed",
            Self::ChangedTopNoChecksum => "builderd, top layer changed, --checksum none",
            Self::UmociMke2fs { inodes_given: true } => "skopeo + umoci + mke2fs -d -N",
            Self::UmociMke2fs { inodes_given: false } => "skopeo + umoci + mke2fs -d",
            Self::PodmanExport { inodes_given: true } => "podman export + tar + mkfs -d -N",
            Self::PodmanExport { inodes_given: false } => "podman export + tar + mkfs -d",
        }
    }

    /// Its own directory below the work directory.
    pub(crate) fn dir(self, work: &Path) -> PathBuf {
        let name: String =
            format!("{self:?}").chars().take_while(char::is_ascii_alphanumeric).collect();
        work.join(name.to_lowercase())
    }

    /// Everything that may be done before the clock starts; `turn` counts the runs.
    pub(crate) fn prepare(self, course: &Course<'_>, work: &Path, turn: u64) -> Result<Program> {
        let fresh = self.dir(work);
        self.clear(work)?;
        std::fs::create_dir_all(&fresh)?;
        let program = match self {
            Self::Floor => Program::new(&course.xtask)
                .arg("floor")
                .arg(&course.reference)
                .arg(fresh.join("bytes")),
            Self::NoCache => self.builderd(course, &fresh, &course.reference, &["--no-cache"]),
            Self::NoCacheNoChecksum => {
                let options = ["--no-cache", "--checksum", "none"];
                self.builderd(course, &fresh, &course.reference, &options)
            }
            Self::Cold | Self::ColdNoChecksum => {
                self.builderd(course, &fresh, &course.reference, self.options())
            }
            Self::Warm | Self::WarmNoChecksum => {
                self.builderd(course, &fresh, &course.reference, &["--checksum", "none"]).run()?;
                std::fs::remove_file(fresh.join("rootfs.ext4"))?;
                self.builderd(course, &fresh, &course.reference, self.options())
            }
            Self::ChangedTop | Self::ChangedTopNoChecksum => {
                self.builderd(course, &fresh, &course.reference, &["--checksum", "none"]).run()?;
                std::fs::remove_file(fresh.join("rootfs.ext4"))?;
                let layout = fresh.join("layout");
                variant::changed_top(&course.layout, &layout, turn)?;
                let name = format!("{}-changed", course.image);
                let reference = course.registry.push(&layout, &name)?;
                self.builderd(course, &fresh, &reference, self.options())
            }
            Self::UmociMke2fs { inodes_given } => {
                Program::shell(&umoci_script(course, &fresh, inodes_given))
            }
            Self::PodmanExport { inodes_given } => {
                Program::shell(&podman_script(course, &fresh, inodes_given))
            }
        };
        // What earlier runs wrote must not be flushed on this one's time.
        Program::new("sync").run()?;
        Ok(program)
    }

    /// Removes what an earlier run left.
    pub(crate) fn clear(self, work: &Path) -> Result<()> {
        let dir = self.dir(work);
        if let Self::PodmanExport { .. } = self {
            let storage = dir.join("storage/overlay");
            let _ = Program::new("umount").arg(storage).outcome()?;
            Program::new("rm").args(["-rf", PODMAN_RUN]).run()?;
        }
        Program::new("rm").arg("-rf").arg(dir).run()
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Self::ColdNoChecksum | Self::WarmNoChecksum | Self::ChangedTopNoChecksum => {
                &["--checksum", "none"]
            }
            Self::Floor
            | Self::NoCache
            | Self::NoCacheNoChecksum
            | Self::Cold
            | Self::Warm
            | Self::ChangedTop
            | Self::UmociMke2fs { .. }
            | Self::PodmanExport { .. } => &[],
        }
    }

    fn builderd(
        self,
        course: &Course<'_>,
        dir: &Path,
        reference: &str,
        options: &[&str],
    ) -> Program {
        Program::new(&course.builderd)
            .args(["build", reference, "--plain-http", course.registry.address()])
            .args(["--progress", "quiet", "--cache-dir"])
            .arg(dir.join("cache"))
            .arg("--output")
            .arg(dir.join("rootfs.ext4"))
            .args(options)
    }
}

/// Podman refuses a longer path here.
const PODMAN_RUN: &str = "/tmp/builderd-bench-podman";

/// What many scripts do: unpack, guess a size, let mke2fs copy the directory.
fn umoci_script(course: &Course<'_>, dir: &Path, inodes_given: bool) -> String {
    let reference = &course.reference;
    let inodes = inodes_option(course, inodes_given);
    format!(
        "cd {}; skopeo --insecure-policy copy -q --src-tls-verify=false \
           docker://{reference} oci:oci:latest
         umoci unpack --image oci:latest bundle
         size=$(($(du -s -k bundle/rootfs | cut -f1) * 3 / 2))
         mke2fs -q -t ext4 {inodes} -d bundle/rootfs rootfs.ext4 ${{size}}k",
        dir.display()
    )
}

/// What Unkey's builderd did, with podman in the place of docker. Its guess of the size (the bytes
/// of the files and a fifth) is too small for many small files, with any number of inodes: where
/// inodes are given, so is enough room.
fn podman_script(course: &Course<'_>, dir: &Path, inodes_given: bool) -> String {
    let reference = &course.reference;
    let inodes = inodes_option(course, inodes_given);
    let size = match inodes_given {
        true => "$(du -s -k rootfs | cut -f1) * 3 / 2",
        false => "$(du -s -k --apparent-size rootfs | cut -f1) * 6 / 5 + 20480",
    };
    format!(
        "cd {}; mkdir rootfs
         p() {{ podman --root \"$PWD/storage\" --runroot {PODMAN_RUN} --storage-driver overlay \
                  --cgroup-manager cgroupfs \"$@\"; }}
         p pull -q --tls-verify=false {reference} >/dev/null
         id=$(p create --network none {reference} /bin/true)
         p export \"$id\" | tar -x -C rootfs
         size=$(({size}))
         mkfs.ext4 -q -F {inodes} -d rootfs rootfs.ext4 ${{size}}k",
        dir.display()
    )
}

fn inodes_option(course: &Course<'_>, given: bool) -> String {
    if given { format!("-N {}", course.inodes + course.inodes / 10 + 1000) } else { String::new() }
}
