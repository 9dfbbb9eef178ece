//! Where a build's image comes from: its registry is asked, with the build's own credentials.

use std::pin::pin;
use std::time::Duration;

use oci::{ClientOptions, Fetcher, Image, Platform, PullError, Source};
use tokio::time::error::Elapsed;

use super::internal;
use super::running::Running;
use crate::build::child::{RegistrySpec, SentCredentials};
use crate::build::record::{Failure, FailureCode};
use crate::build::{BuildError, Phase};
use crate::store::ArtifactDomain;

/// How often the fetcher is asked what went wrong meanwhile: a try may be stopped at any moment.
const NOTES_EVERY: Duration = Duration::from_millis(500);

impl Running<'_> {
    /// How registries are reached, with this build's own credentials.
    pub(super) fn registry(&self) -> Result<RegistrySpec, Failure> {
        let mut registry = self.workers.rules.registry.clone();
        if let Some(sealed) = &self.claimed.sealed_credentials {
            let build = self.build();
            let opened = self.workers.key.open(&build.tenant, &build.id, sealed);
            let opened = opened.map_err(|error| Failure {
                remedy: "build it again with its credentials; if that fails in the same way, tell \
                         the operator the build's id"
                    .into(),
                ..internal(&error.to_string())
            })?;
            self.journal.hide(opened.secret.clone());
            let reference: oci::Reference =
                build.request.image.parse().map_err(|_| internal("the image has no valid name"))?;
            registry.credentials = Some(SentCredentials::new(&opened, reference.registry()));
        }
        Ok(registry)
    }

    /// Finds the image, and says how registries are reached for it from then on. The places that
    /// the tenant alone may reach take part in what stays with the tenant, never in what may be
    /// shared with those who cannot reach them.
    pub(super) async fn resolve(
        &self,
        registry: RegistrySpec,
    ) -> Result<(Image, RegistrySpec), Failure> {
        let found = self.resolve_by(&registry).await;
        let Some(own) = registry.of_tenant(&self.build().tenant) else {
            return found.map(|image| (image, registry));
        };
        match found {
            Ok(image) if self.domain(&image) == ArtifactDomain::Public => Ok((image, registry)),
            Ok(image) => Ok((image, own)),
            Err(failure) if failure.code == FailureCode::NetworkDenied => {
                let image = self.resolve_by(&own).await?;
                // Without a credential, perhaps, but not for anybody.
                Ok((Image { anonymous: false, ..image }, own))
            }
            Err(failure) => Err(failure),
        }
    }

    async fn resolve_by(&self, registry: &RegistrySpec) -> Result<Image, Failure> {
        let options = registry.client_options();
        let mut failure = None;
        for reference in self.references()? {
            // Never parsed as a source: a tenant's name must not become a file of this machine.
            let source = Source::Registry(reference);
            match self.resolve_one(&source, &options).await {
                Ok(Ok(image)) => return Ok(image),
                Ok(Err(error)) => {
                    let missing = matches!(error, PullError::NotFound { .. });
                    let error = BuildError::pull(&source, error);
                    failure.get_or_insert(error.failure(Phase::Resolve));
                    if !missing {
                        break;
                    }
                }
                Err(_) => {
                    failure.get_or_insert(self.slow_pull());
                    break;
                }
            }
        }
        Err(failure.unwrap_or_else(|| internal("no image was tried")))
    }

    /// Tells what goes wrong meanwhile: mirrors that cost the time, when it is up.
    async fn resolve_one(
        &self,
        source: &Source,
        options: &ClientOptions,
    ) -> Result<Result<Image, PullError>, Elapsed> {
        // Nothing is asked of a registry yet.
        let fetcher = match Fetcher::open(source, options, self.workers.artifacts.staging()).await {
            Ok(fetcher) => fetcher,
            Err(error) => return Ok(Err(error)),
        };
        let platform = platform();
        let work = fetcher.resolve(&platform);
        let mut work = pin!(tokio::time::timeout(self.workers.rules.pull_timeout, work));
        loop {
            let ended = tokio::time::timeout(NOTES_EVERY, &mut work).await;
            for note in fetcher.take_notes() {
                self.journal.say("warn", "puller", note);
            }
            if let Ok(resolved) = ended {
                return resolved;
            }
        }
    }

    /// What to look for, one after the other: the image, and where its name leaves the tag open,
    /// the tags that may be taken instead.
    fn references(&self) -> Result<Vec<oci::Reference>, Failure> {
        let request = &self.build().request;
        let parsed = |name: &str| {
            name.parse::<oci::Reference>().map_err(|error| Failure {
                code: FailureCode::InvalidSource,
                step: "resolve".into(),
                cause: format!("{name}: {error}"),
                blame: "yours".into(),
                remedy: "name an image as docker pull takes it".into(),
            })
        };
        let mut references = vec![parsed(&request.image)?];
        // Asked of the text: a reference without a tag is read as `latest`.
        let is_open = parsed(&format!("{}:tag", request.image)).is_ok();
        if is_open {
            for tag in &request.pull_tags {
                references.push(parsed(&format!("{}:{tag}", request.image))?);
            }
        }
        Ok(references)
    }

    fn slow_pull(&self) -> Failure {
        let secs = self.workers.rules.pull_timeout.as_secs();
        Failure {
            code: FailureCode::NetworkError,
            step: "resolve".into(),
            cause: format!("the registry took longer than {secs} seconds"),
            blame: "upstream".into(),
            remedy: "try again later".into(),
        }
    }
}

/// Root file systems are built for the machines that boot them: this kind, for now.
fn platform() -> Platform {
    Platform::of_this_machine()
}
