//! `builderd builds download`: the artifact, whole and right, under its name; or no file.
//!
//! Bytes go into a hidden file beside the target, named after the artifact's sum, so that an
//! interrupted download of the same artifact is taken up where it stopped. The sum is computed
//! over every byte, those from before included.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::OFlags;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::builds::{number, state};
use super::client::{CallError, Client, Patience};
use super::{Failure, text};
use crate::build::{BuildError, check_name, hex};

/// Tries to take up a download that was cut, without a byte in between.
const TRIES: u32 = 10;

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
enum DownloadError {
    #[error("cannot write {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} is in the way: it is not a regular file")]
    Taken { path: PathBuf },
    #[error("another download to this file is running: {path} is locked")]
    Running { path: PathBuf },
    #[error("the artifact is damaged: its sha256 is {found}, expected {expected}")]
    Damaged { expected: String, found: String },
    #[error("the server does not say the artifact's sha256")]
    NoSum,
}

impl From<DownloadError> for Failure {
    fn from(error: DownloadError) -> Self {
        let (code, hint) = match &error {
            DownloadError::File { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                (5, Some("make room and run the same command again: it goes on from there"))
            }
            DownloadError::File { .. } | DownloadError::Taken { .. } | DownloadError::NoSum => {
                (1, None)
            }
            DownloadError::Running { .. } => (1, Some("wait for it")),
            DownloadError::Damaged { .. } => (
                4,
                Some("what came was thrown away; try again, and tell the operator if it repeats"),
            ),
        };
        Self { code, error: Box::new(error), hint: hint.map(str::to_owned) }
    }
}

pub(super) async fn run(client: &Client, id: &str, output: &Path) -> Result<(), Failure> {
    check_name(output).map_err(unnameable)?;
    let answer = client.call("GetBuild", &json!({"buildId": id})).await?;
    let build = &answer["build"];
    let word = state(build);
    if word != "completed" {
        let hint = match word.as_str() {
            "failed" | "cancelled" | "timeout" => "build it again: builderd builds retry",
            _ => "wait for it: builderd builds logs -f",
        };
        let error = format!("the build is {word}: it has no artifact").into();
        return Err(Failure { code: 3, error, hint: Some(format!("{hint} {id}")) });
    }
    let sum = build["rootfsChecksum"].as_str().unwrap_or_default().to_ascii_lowercase();
    if sum.len() != 64 || !sum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(why_no_sum(client, id).await);
    }
    let mut partial = Partial::open(output, &sum)?;
    if partial.length > 0 {
        tell!("going on behind the first {}", text::bytes(partial.length));
    }
    let bar = bar(number(&build["rootfsSizeBytes"]));
    let fetched = fetch(client, id, &mut partial, &bar).await;
    bar.finish_and_clear();
    if let Err(failure) = fetched {
        partial.discard_if_empty();
        return Err(failure);
    }
    let bytes = partial.length;
    partial.publish(output)?;
    tell!("written     {} ({}, sha256 {sum})", output.display(), text::bytes(bytes));
    Ok(())
}

/// A name that no file can have, with what to do about it here.
fn unnameable(error: BuildError) -> Failure {
    let failure = Failure::from(error);
    let hint = failure.hint.is_some();
    let hint = hint.then(|| "make the directory first, or choose another place with -o".to_owned());
    Failure { hint, ..failure }
}

/// A server that is older knows no sum of a build whose artifact is gone: who hands artifacts out says
/// why.
async fn why_no_sum(client: &Client, id: &str) -> Failure {
    let mut patience = Patience::new(TRIES);
    loop {
        let error = match client.artifact(id, 0, "").await {
            Ok(_) => return DownloadError::NoSum.into(),
            Err(error) => error,
        };
        if !error.may_pass() || !patience.wait(error.wait()).await {
            return error.into();
        }
    }
}

fn bar(bytes: u64) -> ProgressBar {
    const STYLE: &str =
        "{bar:30} {binary_bytes:>11}/{binary_total_bytes:<11} {binary_bytes_per_sec:>13}";
    let style = ProgressStyle::with_template(STYLE);
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Fetches what is missing, and again what is missing after a cut.
async fn fetch(
    client: &Client,
    id: &str,
    partial: &mut Partial,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut patience = Patience::new(TRIES);
    loop {
        let before = partial.length;
        let error = match fetch_once(client, id, partial, bar).await {
            Ok(Fetched::Whole) => return Ok(()),
            Ok(Fetched::Part(error)) => error,
            Err(failure) => return Err(failure),
        };
        if !error.may_pass() {
            return Err(error.into());
        }
        if partial.length > before {
            patience.renew();
        }
        if !patience.wait(error.wait()).await {
            return Err(error.into());
        }
    }
}

enum Fetched {
    Whole,
    /// The rest has to be asked for; why.
    Part(CallError),
}

async fn fetch_once(
    client: &Client,
    id: &str,
    partial: &mut Partial,
    bar: &ProgressBar,
) -> Result<Fetched, Failure> {
    let mut artifact = match client.artifact(id, partial.length, &partial.sum).await {
        Ok(artifact) => artifact,
        Err(error) => return Ok(Fetched::Part(error)),
    };
    if artifact.start != partial.length {
        // The server has another artifact now, or knows no ranges: from the beginning.
        partial.restart()?;
    }
    if let Some(total) = artifact.total {
        bar.set_length(total);
    }
    loop {
        match artifact.next().await {
            Ok(Some(bytes)) => partial.append(&bytes)?,
            Ok(None) if artifact.total.is_none_or(|total| partial.length == total) => {
                return Ok(Fetched::Whole);
            }
            Ok(None) => {
                let server = client.server().to_owned();
                return Ok(Fetched::Part(CallError::Cut { server }));
            }
            Err(error) => return Ok(Fetched::Part(error)),
        }
        bar.set_position(partial.length);
    }
}

/// The part of an artifact that is here.
struct Partial {
    path: PathBuf,
    file: File,
    sum: String,
    hash: Sha256,
    length: u64,
}

impl Partial {
    fn open(output: &Path, sum: &str) -> Result<Self, DownloadError> {
        let mut name = std::ffi::OsString::from(".");
        name.push(output.file_name().unwrap_or_default());
        name.push(format!(".{}.part", &sum[..16]));
        let path = output.with_file_name(name);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        // Whatever has the name, opening it must not wait or lead elsewhere.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
        let file = options.custom_flags(flags.cast_signed()).open(&path);
        let failed = |source| DownloadError::File { path: path.clone(), source };
        let file = file.map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(DownloadError::Taken { path });
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DownloadError::Running { path }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let (sum, hash) = (sum.to_owned(), Sha256::new());
        let mut partial = Self { path, file, sum, hash, length: 0 };
        partial.read_again()?;
        Ok(partial)
    }

    fn failed(&self, source: io::Error) -> DownloadError {
        DownloadError::File { path: self.path.clone(), source }
    }

    /// Hashes what an earlier download left here.
    fn read_again(&mut self) -> Result<(), DownloadError> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = self.file.read(&mut buffer).map_err(|error| self.failed(error))?;
            if count == 0 {
                return Ok(());
            }
            self.hash.update(&buffer[..count]);
            self.length += u64::try_from(count).unwrap_or_default();
        }
    }

    fn restart(&mut self) -> Result<(), DownloadError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|error| self.failed(error))?;
        (self.hash, self.length) = (Sha256::new(), 0);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), DownloadError> {
        self.file.write_all(bytes).map_err(|error| self.failed(error))?;
        self.hash.update(bytes);
        self.length += u64::try_from(bytes.len()).unwrap_or_default();
        Ok(())
    }

    /// Leaves nothing behind where nothing came. Its lock is held, so it is nobody else's.
    fn discard_if_empty(self) {
        if self.length == 0 {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Gives the file its name if it is the artifact, else removes it.
    fn publish(self, output: &Path) -> Result<(), DownloadError> {
        let found = hex(&self.hash.clone().finalize());
        if found != self.sum {
            std::fs::remove_file(&self.path).map_err(|error| self.failed(error))?;
            return Err(DownloadError::Damaged { expected: self.sum, found });
        }
        self.file.sync_all().map_err(|error| self.failed(error))?;
        std::fs::rename(&self.path, output)
            .map_err(|source| DownloadError::File { path: output.to_owned(), source })
    }
}
