//! A boot proof: the image as the root disk of a QEMU microVM with Debian's cloud kernel.
//!
//! The kernel comes from the machine's own apt sources and never touches the machine's `/boot`.
//! Knows nothing of how the image was made.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::process::Program;
use crate::workspace;

/// Printed by the image's own shell, assembled there so that the command line's echo never counts.
const MARKER: &str = "builderd-boot-proof-ok";

/// How long a boot may take under emulation on a loaded machine.
const BOOT_SECS_MAX: u64 = 120;

/// How often a boot is tried: emulated clocks hang now and then on a busy machine.
const ATTEMPTS: u32 = 2;

/// Memory of a machine whose user asks for no more, in MiB.
const MEMORY_MIB: u32 = 512;

/// Modules the initial RAM disk needs to see the disk, and those that a service's commands need.
const MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "ext4", "loop", "overlay"];

/// A kernel with what is needed to reach the root disk.
pub(crate) struct Kernel {
    image: PathBuf,
    initramfs: PathBuf,
}

/// What a boot showed.
pub(crate) struct Proof {
    pub(crate) wall: Duration,
    /// What the shell of the image printed.
    pub(crate) console: String,
}

impl Kernel {
    /// Downloads and unpacks the kernel on first use.
    pub(crate) fn fetch() -> Result<Self> {
        let dir = workspace::kept("boot")?;
        // Named by what is in it: one with other modules is made anew.
        let initramfs_file = dir.join(format!("{}.cpio", MODULES.join("-")));
        let kernel = Self { image: dir.join("vmlinuz"), initramfs: initramfs_file };
        if kernel.image.exists() && kernel.initramfs.exists() {
            return Ok(kernel);
        }
        let package = match package()? {
            Some(package) => package,
            // A machine that has never asked its mirrors knows no package.
            None => {
                Program::new("apt-get").args(["-qq", "update"]).run()?;
                package()?.context("apt knows no linux-image-cloud-amd64")?
            }
        };
        eprintln!("fetching {package} for the boot proof");
        let scratch = tempfile::tempdir_in(&dir)?;
        let root = scratch.path().join("root");
        Program::new("apt-get")
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download", &package])
            .dir(scratch.path())
            .run()?;
        Program::shell("dpkg-deb -x ./*.deb root").dir(scratch.path()).run()?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        std::fs::write(&kernel.initramfs, initramfs(&root, &release)?)?;
        std::fs::rename(root.join(format!("boot/vmlinuz-{release}")), &kernel.image)?;
        Ok(kernel)
    }

    /// Boots the image (which stays as it is) and runs a shell command of it as process 1.
    pub(crate) fn boot(&self, disk: &Path, command: &str) -> Result<Proof> {
        self.attempts(disk, command, "on")
    }

    /// The same once, with more time and more memory.
    pub(crate) fn boot_within(
        &self,
        disk: &Path,
        command: &str,
        limit: Duration,
        memory_mib: u32,
    ) -> Result<Proof> {
        self.attempt(disk, command, "on", limit, memory_mib)
    }

    /// The same, but what the guest writes stays in the image.
    pub(crate) fn boot_and_keep(&self, disk: &Path, command: &str) -> Result<Proof> {
        self.attempts(disk, command, "off")
    }

    fn attempts(&self, disk: &Path, command: &str, snapshot: &str) -> Result<Proof> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let limit = Duration::from_secs(BOOT_SECS_MAX);
            match self.attempt(disk, command, snapshot, limit, MEMORY_MIB) {
                Ok(proof) => return Ok(proof),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no attempt was made")?)
    }

    fn attempt(
        &self,
        disk: &Path,
        command: &str,
        snapshot: &str,
        limit: Duration,
        memory_mib: u32,
    ) -> Result<Proof> {
        let scratch = tempfile::tempdir()?;
        let initramfs = scratch.path().join("initramfs");
        std::fs::copy(&self.initramfs, &initramfs)?;
        let mut extra = Archive::default();
        let script = format!("{command}\necho builderd-boot-\"proof-ok\"\n");
        extra.add("init", 0o100_755, INIT.as_bytes());
        extra.add("command", 0o100_755, script.as_bytes());
        File::options().append(true).open(&initramfs)?.write_all(&extra.finish())?;
        let log = scratch.path().join("console");
        let started = Instant::now();
        let mut machine = Program::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-M", "microvm,accel=tcg", "-cpu", "max", "-smp", "1", "-m"])
            .arg(memory_mib.to_string())
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio", "-kernel"])
            .arg(&self.image)
            .arg("-initrd")
            .arg(&initramfs)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet reboot=t panic=-1 tsc_early_khz={}",
                processor_khz()?
            ))
            .arg("-drive")
            .arg(format!("id=root,file={},format=raw,if=none,snapshot={snapshot}", disk.display()))
            .args(["-device", "virtio-blk-device,drive=root"])
            .background(&log)?;
        let ended = machine.wait_for(limit)?;
        let console = String::from_utf8_lossy(&std::fs::read(&log)?).replace('\r', "");
        if !console.contains(MARKER) {
            let how = if ended.is_some() { "ended" } else { "hung" };
            let tail: Vec<&str> = console.lines().rev().take(25).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("the machine {how} before the image's shell spoke:\n{}", tail.join("\n"));
        }
        Ok(Proof { wall: started.elapsed(), console })
    }
}

/// The package that holds the release's current cloud kernel, if apt knows one.
fn package() -> Result<Option<String>> {
    let depends = Program::new("apt-cache")
        .args(["depends", "--important", "linux-image-cloud-amd64"])
        .outcome()?;
    let text = String::from_utf8_lossy(&depends.stdout).into_owned();
    let found = text.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    Ok(found.map(|rest| format!("linux-image-{rest}")))
}

/// The clock rate that the kernel cannot measure in an emulated machine without timers.
fn processor_khz() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu MHz"));
    let Some(rate) = line.and_then(|rest| rest.split(':').nth(1)) else { return Ok(2_000_000) };
    let whole = rate.trim().split('.').next().unwrap_or_default();
    Ok(whole.parse::<u64>().context("cpu MHz is not a number")? * 1000)
}

/// The RAM disk's first process: load modules, mount the disk, become its shell.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
for module in $(cat /modules/order); do insmod /modules/$module; done
n=0; while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do sleep 0.05; n=$((n+1)); done
mount -t ext4 -o rw /dev/vda /mnt || exec reboot -f
mkdir -p /mnt/proc /mnt/dev /mnt/sys
mount --move /dev /mnt/dev; mount --move /proc /mnt/proc; mount --move /sys /mnt/sys
export COMMAND="$(cat /command)" PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec switch_root -c /dev/console /mnt /bin/sh -c \
  'eval "$COMMAND"; mount -o remount,ro /; sync; echo b > /proc/sysrq-trigger; exec sleep 5'
"#;

/// The part of the RAM disk that stays the same for all boots: busybox and modules.
fn initramfs(root: &Path, release: &str) -> Result<Vec<u8>> {
    // depmod looks below lib/modules of the base directory only.
    Program::new("depmod").arg("-b").arg(root).arg(release).run()?;
    let mut files: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let lines = Program::new("modprobe")
            .arg("-d")
            .arg(root)
            .args(["-S", release, "--show-depends", module])
            .text()?;
        for path in lines.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = PathBuf::from(path.trim());
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "mnt", "modules"] {
        archive.add(dir, 0o040_755, b"");
    }
    let busybox = std::fs::read("/bin/busybox")
        .context("cannot read /bin/busybox: install busybox-static")?;
    archive.add("bin/busybox", 0o100_755, &busybox);
    let mut names = Vec::new();
    for file in &files {
        let name = file.file_name().context("a module without a name")?.to_string_lossy();
        archive.add(&format!("modules/{name}"), 0o100_644, &std::fs::read(file)?);
        names.push(name.into_owned());
    }
    archive.add("modules/order", 0o100_644, names.join("\n").as_bytes());
    Ok(archive.finish())
}

/// A `newc` archive, as the kernel's initramfs wants it (Documentation/driver-api/early-userspace).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let fields = [
            self.inode as usize,
            mode as usize,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, b"");
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_aligned_and_ends_with_the_trailer() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"07070100000001"));
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
