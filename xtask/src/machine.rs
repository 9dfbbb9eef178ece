//! What must be installed on a Debian machine, and how it gets there. Knows no chore.

use anyhow::{Result, bail};

use crate::process::{self, Program};

/// A program and the Debian package that brings it.
pub(crate) type Need = (&'static str, &'static str);

/// For an image, a registry, a check and a boot.
pub(crate) const DEMO: &[Need] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("buildah", "buildah"),
    ("skopeo", "skopeo"),
    ("docker-registry", "docker-registry"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("e2fsck", "e2fsprogs"),
    ("setpriv", "util-linux"),
    ("nice", "coreutils"),
];

/// For the stories, beside the demo's.
pub(crate) const STORIES: &[Need] = &[
    ("umoci", "umoci"),
    ("podman", "podman"),
    ("npm", "npm"),
    ("time", "time"),
    ("zstd", "zstd"),
    ("gzip", "gzip"),
    ("strip", "binutils"),
    ("debugfs", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
];

/// For the service: databases, other people's clients, a browser, and who checks its metrics.
pub(crate) const SERVICE: &[Need] = &[
    ("curl", "curl"),
    ("node", "nodejs"),
    ("npm", "npm"),
    ("chromium", "chromium"),
    ("python3", "python3-venv"),
    ("sqlite3", "sqlite3"),
    // Runs the commands of builds.
    ("runc", "runc"),
    ("postgresql", "postgresql"),
    // Comes with the server, which Debian starts where systemd runs; nothing here needs it.
    ("promtool", "prometheus"),
];

/// For everything that is tested.
pub(crate) const ALL: &[&[Need]] = &[DEMO, STORIES, SERVICE];

/// Makes sure that every program is there: installs as root, else says what to run.
pub(crate) fn require(needs: &[&[Need]]) -> Result<()> {
    let mut missing: Vec<&str> = needs
        .iter()
        .flat_map(|list| list.iter())
        .filter(|(program, _)| !there(program))
        .map(|(_, package)| *package)
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    if !process::is_root() {
        bail!(
            "some programs are missing; install them with:\n  \
             sudo apt-get update && sudo apt-get install --no-install-recommends {}",
            missing.join(" ")
        );
    }
    eprintln!("installing {}", missing.join(" "));
    Program::new("apt-get").args(["-qq", "update"]).run()?;
    Program::new("apt-get")
        .args(["-qq", "-y", "--no-install-recommends", "install"])
        .args(&missing)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .run()
}

/// `time` is also a word of the shell, and busybox must be the static one.
fn there(program: &str) -> bool {
    match program {
        "time" => std::path::Path::new("/usr/bin/time").exists(),
        "busybox" => {
            let ldd = Program::shell("ldd /bin/busybox 2>&1 || [ -x /bin/busybox ]").outcome();
            let is_static =
                |said: String| said.contains("not a dynamic") || said.contains("statically linked");
            ldd.is_ok_and(|outcome| outcome.status.success() && is_static(outcome.said()))
        }
        // Its programs are on nobody's path.
        "postgresql" => crate::service::postgres::installed(),
        "python3" => {
            let module = Program::new("python3").args(["-c", "import venv, ensurepip"]);
            module.outcome().is_ok_and(|outcome| outcome.status.success())
        }
        // Tools of the system administrator may not be on a user's path.
        other => {
            process::found(other)
                || ["/usr/sbin", "/sbin"]
                    .iter()
                    .any(|dir| std::path::Path::new(dir).join(other).exists())
        }
    }
}
