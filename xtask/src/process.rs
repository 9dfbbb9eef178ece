//! Other programs: start one, wait for it, keep what it said.
//!
//! The only place of xtask that makes a `Command`. Knows nothing of what the programs do.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How many trailing lines of a failed program's output an error repeats.
const OUTPUT_LINES_MAX: usize = 40;

/// A program about to be started.
pub(crate) struct Program {
    command: Command,
    line: String,
}

/// What a finished program said.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Outcome {
    /// Both streams as text, for a message.
    pub(crate) fn said(&self) -> String {
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&self.stdout),
            String::from_utf8_lossy(&self.stderr)
        );
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(OUTPUT_LINES_MAX)..].join("\n")
    }
}

impl Program {
    #[expect(clippy::disallowed_methods, reason = "xtask's one door to other programs")]
    pub(crate) fn new(name: impl AsRef<OsStr>) -> Self {
        let line = name.as_ref().to_string_lossy().into_owned();
        let mut command = Command::new(name);
        command.stdin(Stdio::null());
        Self { command, line }
    }

    /// A `sh -euc` script.
    pub(crate) fn shell(script: &str) -> Self {
        Self::new("sh").args(["-euc", script])
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.line.push(' ');
        self.line.push_str(&quoted(&arg.as_ref().to_string_lossy()));
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    pub(crate) fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub(crate) fn without_env(mut self, key: impl AsRef<OsStr>) -> Self {
        self.command.env_remove(key);
        self
    }

    pub(crate) fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    pub(crate) fn stdin(mut self, input: File) -> Self {
        self.command.stdin(input);
        self
    }

    /// This program as the last arguments of another one, which keeps its environment.
    pub(crate) fn under(self, mut wrapper: Self) -> Self {
        for (key, value) in self.command.get_envs() {
            match value {
                Some(value) => wrapper.command.env(key, value),
                None => wrapper.command.env_remove(key),
            };
        }
        wrapper = wrapper.arg(self.command.get_program());
        wrapper.args(self.command.get_args())
    }

    /// The command line as a shell reads it.
    pub(crate) fn line(&self) -> &str {
        &self.line
    }

    /// Runs to the end and returns everything, whatever the exit status was.
    pub(crate) fn outcome(mut self) -> Result<Outcome> {
        let output =
            self.command.output().with_context(|| format!("cannot start `{}`", self.line))?;
        Ok(Outcome { status: output.status, stdout: output.stdout, stderr: output.stderr })
    }

    /// Runs to the end; a failure is an error that repeats what the program said.
    pub(crate) fn checked(self) -> Result<Outcome> {
        let line = self.line.clone();
        let outcome = self.outcome()?;
        if !outcome.status.success() {
            bail!("`{line}` ended with {}:\n{}", outcome.status, outcome.said());
        }
        Ok(outcome)
    }

    pub(crate) fn run(self) -> Result<()> {
        self.checked().map(drop)
    }

    /// Standard output, trimmed.
    pub(crate) fn text(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.checked()?.stdout).trim().to_owned())
    }

    /// Runs with the terminal's own output.
    pub(crate) fn loud(mut self) -> Result<ExitStatus> {
        eprintln!("$ {}", self.line);
        self.command.status().with_context(|| format!("cannot start `{}`", self.line))
    }

    /// Like `loud`, a failure is an error.
    pub(crate) fn loud_checked(self) -> Result<()> {
        let line = self.line.clone();
        let status = self.loud()?;
        if !status.success() {
            bail!("`{line}` ended with {status}");
        }
        Ok(())
    }

    /// Runs with standard output shown as it comes and kept as well.
    pub(crate) fn loud_text(mut self) -> Result<(ExitStatus, String)> {
        eprintln!("$ {}", self.line);
        self.command.stdout(Stdio::piped());
        let mut child =
            self.command.spawn().with_context(|| format!("cannot start `{}`", self.line))?;
        let mut kept = Vec::new();
        if let Some(mut pipe) = child.stdout.take() {
            let mut buffer = [0; 8192];
            loop {
                let count = pipe.read(&mut buffer)?;
                if count == 0 {
                    break;
                }
                std::io::stdout().write_all(&buffer[..count])?;
                kept.extend_from_slice(&buffer[..count]);
            }
        }
        Ok((child.wait()?, String::from_utf8_lossy(&kept).into_owned()))
    }

    /// Starts it with both output streams going to `log`.
    pub(crate) fn background(mut self, log: &Path) -> Result<Background> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        self.command.stdout(file.try_clone()?).stderr(file);
        let child =
            self.command.spawn().with_context(|| format!("cannot start `{}`", self.line))?;
        Ok(Background { child })
    }
}

/// A running program, killed when dropped.
pub(crate) struct Background {
    child: Child,
}

impl Background {
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn finished(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits at most `limit`; `None` when it still runs then.
    pub(crate) fn wait_for(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal by name, such as `KILL` or `INT`.
    pub(crate) fn signal(&self, name: &str) -> Result<()> {
        Program::new("kill").arg(format!("-{name}")).arg(self.id().to_string()).run()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // An error only says that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Is there a program of this name on the search path?
pub(crate) fn found(name: &str) -> bool {
    Program::shell("command -v \"$0\"").arg(name).outcome().is_ok_and(|o| o.status.success())
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A path with something appended to its last component.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> std::path::PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    name.into()
}
