//! A build's artifact: its name, taking the one that exists, storing the one that was made.

use std::io;
use std::path::Path;
use std::time::Duration;

use oci::Image;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::running::{Running, millis};
use super::sum::Summed;
use super::{HEARTBEAT, MADE, internal, is_own_file, sum};
use crate::artifact::sealed_name;
use crate::build::child::ChildReport;
use crate::build::progress::STORING;
use crate::build::record::{BuildMetrics, BuildResult, Failure, FailureCode};
use crate::build::state::BuildState;
use crate::build::{DEFAULT_FREE_SPACE_BYTES, ENGINE, Phase, hex};
use crate::causes::chain;
use crate::store::{ArtifactDomain, ArtifactName, NewFile, Reserved};

impl Running<'_> {
    /// Who may share the artifact, and what decides its bytes.
    pub(super) fn artifact_name(&self, image: &Image) -> ArtifactName {
        let build = self.build();
        let is_protected = self.workers.protects(build);
        let commands = &build.request.commands;
        let domain = match commands.is_empty() {
            true => self.domain(image),
            // What somebody's commands have made is for nobody else.
            false => ArtifactDomain::Tenant(build.tenant.clone()),
        };
        let mut recipe = serde_json::json!({
            "engine": ENGINE.as_str(),
            "registry": self.registry_name(),
            "manifest": image.manifest_digest.to_string(),
            "compression": build.request.compression,
            "free_space": DEFAULT_FREE_SPACE_BYTES,
        });
        if !commands.is_empty() {
            recipe["commands"] = commands.clone().into();
            if !self.workers.rules.commands_egress.names(build.tier, &build.tenant).is_empty() {
                // What the network gives is not the same twice: nobody is given this one again.
                recipe["build"] = build.id.to_string().into();
            }
        }
        if is_protected {
            // What was made in the open, before the tenant was protected, is not found.
            recipe["sealed"] = true.into();
        }
        ArtifactName { domain, recipe: hex(&Sha256::digest(recipe.to_string())) }
    }

    /// Who may share what is made of the image as it is.
    pub(super) fn domain(&self, image: &Image) -> ArtifactDomain {
        let build = self.build();
        match image.anonymous && !self.workers.protects(build) {
            true => ArtifactDomain::Public,
            false => ArtifactDomain::Tenant(build.tenant.clone()),
        }
    }

    /// Who serves the image. Should it take over the process that fetches, it could put other bytes
    /// in the place of what is made there: nothing of one registry is for who asked another.
    fn registry_name(&self) -> String {
        let reference: Option<oci::Reference> = self.build().request.image.parse().ok();
        reference.map_or_else(String::new, |reference| reference.registry().to_owned())
    }

    /// Who may share the packs of the image's layers.
    pub(super) fn packs_domain(&self, image: &Image) -> String {
        format!("{} {}", self.domain(image), self.registry_name())
    }

    /// The artifact, if it may be handed out again and there is one.
    pub(super) async fn known(&self, name: &ArtifactName) -> Option<BuildResult> {
        if !self.workers.rules.cache_enabled {
            return None;
        }
        let known = self.made_before(name).await;
        self.meter.looked_up(known.is_some());
        known
    }

    /// The artifact, if it was made before, is still there, and is not too large for this build.
    async fn made_before(&self, name: &ArtifactName) -> Option<BuildResult> {
        let lease = self.workers.store.lease(&self.claimed.lease);
        let known = lease.known_artifact(name).await.ok().flatten()?.result;
        let fits = known.image_bytes <= self.image_bytes_max();
        let artifacts = &self.workers.artifacts;
        if artifacts.was_damaged(&known.artifact_key) {
            return None;
        }
        let there = artifacts.open(&known.artifact_key).await.ok().flatten();
        there.filter(|open| fits && open.size_bytes == known.artifact_bytes).map(|_| known)
    }

    /// The largest image that this build may make, or be given.
    pub(super) fn image_bytes_max(&self) -> u64 {
        let disk = self.build().limits.disk_bytes;
        self.build().request.size_limit_bytes.map_or(disk, |max| max.min(disk))
    }

    /// Says which file is about to be stored, so that no janitor removes one of that name; waits
    /// while one just does.
    async fn reserve(&self, file: &NewFile<'_>) -> Result<(), Failure> {
        let lease = self.workers.store.lease(&self.claimed.lease);
        let mut is_told = false;
        loop {
            match lease.reserve(file, self.workers.clock.now()).await {
                Ok(Reserved::Yes) => return Ok(()),
                Ok(Reserved::Lost) => return Err(internal("another worker has the build")),
                Ok(Reserved::BeingRemoved) if !is_told => {
                    is_told = true;
                    let line = "an old file of the same content is being removed; waiting";
                    self.journal.say("info", "packager", line.into());
                }
                // Whoever keeps the lease knows when to give up.
                Ok(Reserved::BeingRemoved) => {}
                Err(error) if error.may_pass() => {}
                Err(error) => return Err(internal(&error.to_string())),
            }
            tokio::time::sleep(HEARTBEAT).await;
        }
    }

    /// What the artifact is stored under.
    async fn artifact_key(&self, name: &ArtifactName, sha256: &str) -> Result<String, Failure> {
        let build = self.build();
        let extension = match build.request.compression.as_str() {
            "gzip" => "ext4.gz",
            "zstd" => "ext4.zst",
            _ => "ext4",
        };
        let called = |file: &str| format!("{}/{file}.{extension}", name.domain);
        if !self.workers.protects(build) {
            return Ok(called(sha256));
        }
        let now = self.workers.clock.now();
        match self.workers.keys.name(&build.tenant, sha256, now).await {
            Ok((key, file)) => Ok(sealed_name(&called(&file), key)),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "there is no key");
                Err(Failure {
                    code: FailureCode::TemporaryResourceError,
                    step: "publish".into(),
                    cause: format!("there is no key to encrypt the artifact with: {error}"),
                    blame: "ours".into(),
                    remedy: "try again later; if that fails, tell the operator the build's id"
                        .into(),
                })
            }
        }
    }

    /// Says how long something took that is no phase of the build's process.
    fn took(&self, what: &str, since: Instant) {
        let secs = since.elapsed().as_secs_f64();
        self.journal.say("debug", "packager", format!("{what} took {secs:.3} s"));
    }

    pub(super) async fn publish(
        &self,
        name: &ArtifactName,
        image: &Image,
        report: ChildReport,
        pull_ms: u64,
        started: Instant,
    ) -> Result<BuildResult, Failure> {
        self.journal.enter(BuildState::Packaging, 98, STORING).await;
        self.meter.publishing();
        let usage = self.meter.sample().await;
        let request = &self.build().request;
        let staged = self.staging().join(MADE);
        must_be_a_file(&staged, report.artifact_bytes).await?;
        // All processes of the build have ended: nobody writes to it any more.
        let since = Instant::now();
        let Summed { sha256, cpu_ms } = self.sum(report.artifact_bytes).await.map_err(unread)?;
        self.took("the artifact's sum", since);
        let artifact_key = self.artifact_key(name, &sha256).await?;
        let (key, size_bytes) = (artifact_key.as_str(), report.artifact_bytes);
        self.reserve(&NewFile { key, size_bytes, sha256: &sha256 }).await?;
        let since = Instant::now();
        self.workers.artifacts.publish(&staged, &artifact_key).await.map_err(|error| {
            tracing::warn!(error = chain(&error), key, "an artifact could not be stored");
            not_stored(&error)
        })?;
        self.took("storing the artifact", since);
        let secs = |wanted: &[Phase]| {
            let all = report.phase_secs.iter().filter(|(phase, _)| wanted.contains(phase));
            rounded_ms(all.map(|(_, secs)| secs).sum())
        };
        let mut metadata = report.metadata;
        set_name(&mut metadata, &request.image);
        sum::tell(&mut metadata, &sha256);
        let metrics = BuildMetrics {
            pull_ms,
            extract_ms: secs(&[Phase::Layers]),
            build_ms: secs(&[Phase::Commands, Phase::Flatten, Phase::Layout, Phase::Write]),
            optimize_ms: secs(&[Phase::Compress]),
            total_ms: millis(started),
            source_bytes: image.layers.iter().map(|layer| layer.size_bytes).sum(),
            fetched_bytes: report.fetched_bytes,
            memory_peak_bytes: report.memory_peak_bytes,
            disk_bytes: usage.so_far.disk_bytes,
            cpu_ms: report.cpu_ms.saturating_add(cpu_ms),
            isolation: usage.so_far.isolation,
        };
        Ok(BuildResult {
            artifact_key,
            artifact_bytes: report.artifact_bytes,
            sha256,
            image_bytes: report.image_bytes,
            metadata,
            from_cache: false,
            metrics,
        })
    }
}

/// What the tenant is told: the rest names paths and hosts of the operator's.
fn not_stored(error: &io::Error) -> Failure {
    let is_full = error.kind() == io::ErrorKind::StorageFull;
    Failure {
        code: match is_full {
            true => FailureCode::StorageFull,
            false => FailureCode::TemporaryResourceError,
        },
        step: "publish".into(),
        cause: format!("the artifact could not be stored: {}", error.kind()),
        blame: "ours".into(),
        remedy: "try again later".into(),
    }
}

async fn must_be_a_file(path: &Path, size_bytes: u64) -> Result<(), Failure> {
    match tokio::fs::symlink_metadata(path).await {
        Ok(made) if is_own_file(&made) && made.len() == size_bytes => Ok(()),
        Ok(_) => Err(internal("the build's process made something else than it said")),
        Err(error) => {
            Err(internal(&format!("what the build's process made is not there: {error}")))
        }
    }
}

fn unread(error: io::Error) -> Failure {
    Failure {
        code: FailureCode::TemporaryResourceError,
        step: "publish".into(),
        cause: format!("the artifact cannot be read: {error}"),
        blame: "ours".into(),
        remedy: "try again later".into(),
    }
}

pub(super) fn set_name(metadata: &mut serde_json::Value, name: &str) {
    if let Some(field) = metadata.get_mut("original_image") {
        *field = name.into();
    }
}

fn rounded_ms(secs: f64) -> u64 {
    let whole = Duration::try_from_secs_f64(secs).unwrap_or_default();
    u64::try_from(whole.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_artifacts_lie_is_told_to_no_tenant() {
        for (kind, code) in [
            (io::ErrorKind::StorageFull, FailureCode::StorageFull),
            (io::ErrorKind::PermissionDenied, FailureCode::TemporaryResourceError),
        ] {
            let error = io::Error::new(kind, "/srv/secret: put https://bucket.internal/key");
            let failure = not_stored(&error);
            assert_eq!(failure.code, code);
            assert!(failure.cause.ends_with(&kind.to_string()), "{}", failure.cause);
            assert!(!failure.cause.contains("secret"), "{}", failure.cause);
        }
    }
}
