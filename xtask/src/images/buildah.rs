//! Layers made with buildah, in a storage of our own below `target/`.
//!
//! Knows nothing of what the layers are for.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use super::debian;
use super::recipe::{BASE_PACKAGES, Recipe, Step};
use crate::process::Program;

/// One private container storage.
pub(crate) struct Buildah {
    dir: PathBuf,
    driver: &'static str,
}

impl Buildah {
    pub(crate) fn new(dir: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let driver = if overlay_works(&dir) { "overlay" } else { "vfs" };
        Ok(Self { dir, driver })
    }

    fn buildah(&self) -> Program {
        Program::new("nice")
            .arg("buildah")
            .arg("--root")
            .arg(self.dir.join("storage"))
            .arg("--runroot")
            .arg(self.dir.join("run"))
            .args(["--storage-driver", self.driver])
            .env("STORAGE_DRIVER", self.driver)
    }

    fn has(&self, image: &str) -> bool {
        self.buildah()
            .args(["inspect", "--type", "image", image])
            .outcome()
            .is_ok_and(|outcome| outcome.status.success())
    }

    /// Makes every layer that storage does not hold and writes the OCI layout.
    pub(crate) fn make(&self, recipe: &Recipe, layout: &Path) -> Result<()> {
        let mut chain = Sha256::new();
        chain.update(BASE_PACKAGES);
        let mut image = self.base()?;
        for (index, step) in recipe.steps.iter().enumerate() {
            let (kind, text) = match step {
                Step::Inside(script) => ("inside", *script),
                Step::Packages(names) => ("packages", *names),
                Step::Outside(script) => ("outside", *script),
            };
            let last = index + 1 == recipe.steps.len();
            chain.update(kind);
            chain.update(text);
            let config = if last { recipe.config } else { &[] };
            config.iter().for_each(|word| chain.update(word));
            let key: String =
                chain.clone().finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
            let name = format!("localhost/builderd-test:{key}");
            if !self.has(&name) {
                eprintln!("{}: layer {} of {}", recipe.name, index + 2, recipe.steps.len() + 1);
                self.layer(&image, &name, step, config)
                    .with_context(|| format!("layer {} of {}", index + 2, recipe.name))?;
            }
            image = name;
        }
        let part = crate::process::with_suffix(layout, ".part");
        let _ = std::fs::remove_dir_all(&part);
        let target = format!("oci:{}:latest", part.display());
        self.buildah().args(["push", "--quiet", &image, &target]).run()?;
        let _ = std::fs::remove_dir_all(layout);
        std::fs::rename(&part, layout)?;
        Ok(())
    }

    /// The common lowest layer.
    fn base(&self) -> Result<String> {
        let name = "localhost/builderd-test:base".to_owned();
        let tar = self.dir.join("base.tar");
        debian::base_system(&tar, BASE_PACKAGES)?;
        if !self.has(&name) {
            let container = self.buildah().args(["from", "scratch"]).text()?;
            let root = self.buildah().args(["mount", &container]).text()?;
            Program::new("tar")
                .args(["--extract", "--numeric-owner", "--preserve-permissions", "--xattrs"])
                .args(["--xattrs-include=*", "--directory", &root, "--file"])
                .arg(&tar)
                .run()?;
            self.buildah().args(["commit", "--quiet", "--rm", &container, &name]).run()?;
        }
        Ok(name)
    }

    fn layer(&self, from: &str, to: &str, step: &Step, config: &[&str]) -> Result<()> {
        // A machine without CAP_SYS_RESOURCE cannot raise limits: ask for modest ones.
        let container = self
            .buildah()
            .args(["from", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096", from])
            .text()?;
        let done = self.apply(&container, step, config);
        let committed =
            done.and_then(|()| self.buildah().args(["commit", "--quiet", &container, to]).run());
        let removed = self.buildah().args(["rm", &container]).run();
        committed.and(removed)
    }

    fn apply(&self, container: &str, step: &Step, config: &[&str]) -> Result<()> {
        match step {
            Step::Inside(script) => self.inside(container, script)?,
            Step::Packages(names) => {
                let options: String =
                    debian::apt_options()?.iter().map(|o| format!("-o {o} ")).collect();
                self.inside(
                    container,
                    &format!(
                        "export DEBIAN_FRONTEND=noninteractive
                         apt-get {options} -qq update
                         apt-get {options} -qq --no-install-recommends install {names} >/dev/null
                         apt-get clean; rm -rf /var/lib/apt/lists/*_dists_*"
                    ),
                )?;
            }
            Step::Outside(script) => {
                let root = self.buildah().args(["mount", container]).text()?;
                Program::new("nice")
                    .args(["sh", "-euc", script])
                    .env("ROOT", root)
                    .env("npm_config_cache", self.dir.join("npm"))
                    .run()?;
                self.buildah().args(["umount", container]).run()?;
            }
        }
        if config.is_empty() {
            return Ok(());
        }
        self.buildah().arg("config").args(config).arg(container).run()
    }

    fn inside(&self, container: &str, script: &str) -> Result<()> {
        self.buildah()
            .args(["run", "--isolation=chroot", "--user=0", container, "--"])
            .args(["sh", "-euc", script])
            .run()
    }
}

/// Can the kernel put an overlay on the file system of this directory?
fn overlay_works(dir: &Path) -> bool {
    let script = "d=$(mktemp -d -p \"$0\"); cd \"$d\"; mkdir l u w m; s=0
                  mount -t overlay -o lowerdir=l,upperdir=u,workdir=w overlay m 2>/dev/null || s=1
                  [ $s = 1 ] || umount m
                  cd /; rm -rf \"$d\"; exit $s";
    Program::shell(script).arg(dir).outcome().is_ok_and(|outcome| outcome.status.success())
}
