//! What every story works with: the release binary, a registry, a private corner of the disk.
//!
//! Also looks, after each story, for what must not be left behind.

use std::cell::OnceCell;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::boot::Kernel;
use crate::chores;
use crate::compare::{reference, walk};
use crate::images;
use crate::images::generated;
use crate::process::{self, Background, Outcome, Program};
use crate::registry::Registry;
use crate::workspace;

/// How much work the stories do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// What CI can afford.
    Reduced,
    /// The sizes that the issue states.
    Full,
}

pub(crate) struct Lab {
    pub(crate) size: Size,
    builderd: PathBuf,
    registry: Registry,
    scratch: tempfile::TempDir,
    kernel: OnceCell<Kernel>,
    seed: u64,
}

impl Lab {
    /// Uses the given binary, or builds the release one; the given seed, or a new one.
    pub(crate) fn open(size: Size, binary: Option<PathBuf>, seed: Option<u64>) -> Result<Self> {
        let scratch = chores::scratch()?;
        // An unprivileged story must be able to reach its own directory.
        Program::new("chmod").arg("755").arg(scratch.path()).run()?;
        Ok(Self {
            size,
            builderd: match binary {
                Some(path) => path.canonicalize()?,
                None => workspace::release_binary("builderd")?,
            },
            registry: Registry::start()?,
            scratch,
            kernel: OnceCell::new(),
            // The standard library's own source of randomness.
            seed: seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()),
        })
    }

    /// The images that a story about real images goes through.
    pub(crate) fn images(&self) -> &'static [&'static str] {
        match self.size {
            Size::Reduced => &["tiny", "small", "node-reduced"],
            Size::Full => &["tiny", "small", "node", "large"],
        }
    }

    /// A number that depends on the size.
    pub(crate) fn scale(&self, reduced: u64, full: u64) -> u64 {
        match self.size {
            Size::Reduced => reduced,
            Size::Full => full,
        }
    }

    pub(crate) fn kernel(&self) -> Result<&Kernel> {
        if self.kernel.get().is_none() {
            let _ = self.kernel.set(Kernel::fetch()?);
        }
        self.kernel.get().context("the kernel was just set")
    }

    /// Decides what is left to chance.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn binary(&self) -> &Path {
        &self.builderd
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The image's reference in the registry, pushed when it is not there.
    pub(crate) fn pushed(&self, image: &str) -> Result<String> {
        self.registry.push(&images::layout(image)?, image)
    }

    /// The name and tag in the registry of a numbered image with a layer of so many bytes.
    pub(crate) fn numbered(&self, number: u64, bytes: u64) -> Result<String> {
        let name = format!("numbered-{bytes}-{number}");
        let corner = self.corner()?;
        let layout = corner.path("layout");
        generated::numbered(&layout, number, bytes)?;
        self.registry.push(&layout, &name)?;
        Ok(format!("{name}:latest"))
    }

    /// A directory that is gone with the story.
    pub(crate) fn corner(&self) -> Result<Corner<'_>> {
        let dir = tempfile::tempdir_in(self.scratch.path())?;
        for name in ["out", "cache", "tmp", "home"] {
            std::fs::create_dir(dir.path().join(name))?;
        }
        Ok(Corner { lab: self, dir })
    }

    /// Processes of the binary that still run; those that are being ended get a moment.
    fn survivors(&self) -> Vec<String> {
        let end = Instant::now() + Duration::from_secs(1);
        loop {
            let found = self.running();
            if found.is_empty() || Instant::now() > end {
                return found;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn running(&self) -> Vec<String> {
        let Ok(list) = std::fs::read_dir("/proc") else { return Vec::new() };
        list.filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                std::fs::read_link(path.join("exe")).is_ok_and(|exe| exe == self.builderd)
            })
            .map(|path| format!("process {} still runs", path.display()))
            .collect()
    }

    /// Whatever a finished story left: processes, files, mounts.
    pub(crate) fn leftovers(&self) -> Result<Vec<String>> {
        let mut found = self.survivors();
        for entry in std::fs::read_dir(self.scratch.path())? {
            found.push(format!("{} is left", entry?.path().display()));
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts")?;
        let scratch = self.scratch.path().display().to_string();
        let ours = mounts.lines().filter(|l| l.contains("builderd-mount-") || l.contains(&scratch));
        found.extend(ours.map(|line| format!("mounted: {line}")));
        Ok(found)
    }
}

/// One story's own directory: outputs, a cache, a temporary directory, a home.
pub(crate) struct Corner<'a> {
    lab: &'a Lab,
    dir: tempfile::TempDir,
}

impl Corner<'_> {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn output(&self, name: &str) -> PathBuf {
        self.path("out").join(name)
    }

    /// The command, with this corner's cache and nothing of the caller's settings.
    pub(crate) fn builderd(&self) -> Program {
        Program::new(&self.lab.builderd)
            .env("HOME", self.path("home"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("TMPDIR", self.path("tmp"))
            .without_env("SOURCE_DATE_EPOCH")
            .without_env("DOCKER_CONFIG")
    }

    /// `builderd build`, not yet started.
    pub(crate) fn build_program(&self, source: &str, output: &Path) -> Program {
        self.builderd()
            .args(["build", source, "--plain-http", self.lab.registry.address()])
            .args(["--progress", "plain", "--output"])
            .arg(output)
    }

    /// Builds and insists on success.
    pub(crate) fn build(&self, source: &str, output: &Path, options: &[&str]) -> Result<Outcome> {
        self.build_program(source, output).args(options).checked()
    }

    /// Builds and insists on a failure that exits with `code` and mentions `words`.
    pub(crate) fn refuse(
        &self,
        source: &str,
        options: &[&str],
        code: i32,
        words: &str,
    ) -> Result<()> {
        let output = self.output("refused.ext4");
        let outcome = self.build_program(source, &output).args(options).outcome()?;
        let said = outcome.said();
        if outcome.status.code() != Some(code) {
            bail!("expected exit {code}, found {}:\n{said}", outcome.status);
        }
        if !said.to_lowercase().contains(words) {
            bail!("the message does not mention {words:?}:\n{said}");
        }
        self.no_output()
    }

    /// Nothing may lie in the output directory, hidden or not.
    pub(crate) fn no_output(&self) -> Result<()> {
        nothing_in(&self.path("out"))
    }

    /// Nothing may lie in the directory for temporary files.
    pub(crate) fn no_temporary(&self) -> Result<()> {
        nothing_in(&self.path("tmp"))
    }

    /// Starts a build and leaves it running.
    pub(crate) fn start(
        &self,
        source: &str,
        output: &Path,
        options: &[&str],
    ) -> Result<Background> {
        self.build_program(source, output).args(options).background(&self.path("log"))
    }

    /// `e2fsck -fn` and, as root, a kernel mount beside an independent unpack.
    pub(crate) fn judge(&self, image: &Path, expected: reference::Reference) -> Result<()> {
        chores::fsck(image)?;
        let lines = chores::image_differences(image, expected)?;
        if !lines.is_empty() {
            let shown: Vec<&str> = lines.iter().take(20).map(String::as_str).collect();
            bail!("{} differences from the reference:\n{}", lines.len(), shown.join("\n"));
        }
        Ok(())
    }
}

/// Fails when the directory holds anything.
pub(crate) fn nothing_in(dir: &Path) -> Result<()> {
    let names: Vec<String> = std::fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    if !names.is_empty() {
        bail!("{} holds {names:?}", dir.display());
    }
    Ok(())
}

/// All files below a directory.
pub(crate) fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let tree = walk::walk(dir)?;
    let files = tree.iter().filter(|(_, entry)| matches!(entry.kind, walk::Kind::File { .. }));
    Ok(files.map(|(path, _)| dir.join(String::from_utf8_lossy(path).into_owned())).collect())
}

/// Fails unless two files hold the same bytes.
pub(crate) fn same_bytes(left: &Path, right: &Path) -> Result<()> {
    if walk::sha256_of(left)? != walk::sha256_of(right)? {
        bail!("{} and {} differ", left.display(), right.display());
    }
    Ok(())
}

/// Why a story that needs root cannot run, if it cannot.
pub(crate) fn root_needed() -> Option<String> {
    (!process::is_root()).then(|| "needs root for a kernel mount".to_owned())
}
