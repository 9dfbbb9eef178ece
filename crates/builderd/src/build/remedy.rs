//! What whoever asked the service for a build can do about its failure.
//!
//! He has neither the service's disk nor its command line, so what `builderd build` and the library
//! advise, which is about options, files and a login of one's own, is said anew here: in the terms of a
//! request, or as what to ask the operator for. It does not know why a build failed.

use oci::{EgressDenied, PullError};

use super::error::REPORT_BUG;
use super::record::FailureCode;
use super::{Blame, BuildError, commands};

/// What to do; there is always something.
pub(super) fn remedy(error: &BuildError) -> String {
    let code = error.code();
    let known = match error {
        // Whatever else is wrong, the disk is not his.
        _ if code == FailureCode::StorageFull => None,
        BuildError::Pull { source, .. } => pull_remedy(source),
        BuildError::Commands(error) => commands::remedy(error),
        BuildError::Walls { .. } => Some(
            "ask the operator for a host that shuts builds in, or to accept what it lacks by name \
             (UNKEY_BUILDERD_ACCEPT_MISSING_WALLS)"
                .to_owned(),
        ),
        // Places and processes of the service.
        BuildError::OutputName { .. }
        | BuildError::WorkerLost { .. }
        | BuildError::WorkerEnded { .. }
        | BuildError::WorkerStopped { .. } => None,
        BuildError::Pack { .. }
        | BuildError::PackUnread { .. }
        | BuildError::DiffId { .. }
        | BuildError::Cache(_)
        | BuildError::Flatten(_)
        | BuildError::Layout { .. }
        | BuildError::TooLarge { .. }
        | BuildError::Write { .. }
        | BuildError::Output { .. }
        | BuildError::Worker { .. }
        | BuildError::Told(_)
        // A worker has told one what it says on the command line, too.
        | BuildError::OutOfMemory { .. } => {
            error.hint().filter(|hint| !hint.is_empty() && hint != REPORT_BUG)
        }
    };
    known.unwrap_or_else(|| usual_remedy(code, error.blame()).to_owned())
}

/// What to do about an image that could not be had, where more is known than its code says.
fn pull_remedy(error: &PullError) -> Option<String> {
    match error {
        PullError::Unauthorized { sent_credentials: true, .. } => Some(
            "check the credentials that were sent with the build, and that they may read the \
             repository: the registry refuses them"
                .to_owned(),
        ),
        PullError::PlainHttpServer { host, .. }
        | PullError::InsecureRealm { realm: host, .. }
        | PullError::RedirectRefused { target: host, .. } => Some(format!(
            "use a registry that speaks TLS, or ask the operator to allow plain HTTP to {host} \
             (UNKEY_BUILDERD_DOCKER_INSECURE_REGISTRIES)"
        )),
        PullError::Certificate { host, .. } => Some(format!(
            "use a registry with a certificate of a public authority, or ask the operator to \
             install the authority of {host} on the service's machine"
        )),
        PullError::Connect { .. } | PullError::Timeout { .. } => Some(
            "check the name of the registry; if it is right, try again later, and then ask whoever \
             runs it"
                .to_owned(),
        ),
        PullError::NoSuchPlatform { wanted, .. } => {
            Some(format!("use an image that is made for {wanted}: others are not built here"))
        }
        PullError::EgressDenied { source, .. } => egress_remedy(source),
        PullError::NotFound { .. } | PullError::ForeignLayer { .. } | PullError::Manifest { .. } => {
            error.hint()
        }
        // The rest is told by its code, is nothing to be done about, or of files and options that no
        // request names.
        PullError::Unauthorized { sent_credentials: false, .. }
        | PullError::RateLimited { .. }
        | PullError::Status { .. }
        | PullError::Cut { .. }
        | PullError::TooManyRedirects { .. }
        | PullError::Protocol { .. }
        | PullError::Token { .. }
        | PullError::DigestMismatch { .. }
        | PullError::SizeMismatch { .. }
        | PullError::TooLarge { .. }
        | PullError::Config { .. }
        | PullError::LayerCount { .. }
        | PullError::IndexTooDeep { .. }
        | PullError::Credentials { .. }
        | PullError::Option { .. }
        | PullError::Client { .. }
        | PullError::Archive { .. }
        | PullError::NoSuchTag { .. }
        | PullError::SeveralImages { .. }
        | PullError::NotALayout { .. }
        | PullError::MissingBlob { .. }
        | PullError::Spool { .. }
        | PullError::Io { .. } => None,
    }
}

/// What to do about a place that may not be reached, where there is something to do.
pub(super) fn egress_remedy(denied: &EgressDenied) -> Option<String> {
    let remedy = "use a registry on a public address, or ask the operator to allow this one \
                  (UNKEY_BUILDERD_EGRESS_ALLOWED_PRIVATE)";
    denied.can_be_allowed().then(|| remedy.to_owned())
}

/// What to do about a failure where nothing is known that helps more: there is always something.
pub(super) fn usual_remedy(code: FailureCode, blame: Blame) -> &'static str {
    match (code, blame) {
        (FailureCode::QuotaExceeded, _) => {
            "use a smaller image, or a tier that allows a build more"
        }
        (FailureCode::InvalidSource, Blame::Yours) => {
            "check the image's name, and that `docker pull` takes the image; if it does not, build \
             and push it again"
        }
        (FailureCode::InvalidSource, _) => {
            "check the image's name, and ask whoever runs its registry"
        }
        (FailureCode::BuildTimeout, _) => {
            "use a smaller image, or a tier whose builds may take longer"
        }
        (FailureCode::StorageFull, _) => "try again later: the service is out of disk space",
        (FailureCode::NetworkDenied, _) => {
            "use a registry that is at a public address, and leads to public addresses alone"
        }
        (FailureCode::AuthenticationFailed, _) => {
            "check the image's name, and send credentials for its registry with the build: \
             registries answer like this to private images and to ones that do not exist"
        }
        (FailureCode::NetworkError, _) => {
            "try again later; if that fails in the same way, ask whoever runs the registry"
        }
        (FailureCode::RegistryRateLimit, _) => {
            "wait, or send credentials for the registry with the build: limits are higher for known \
             users"
        }
        (FailureCode::TemporaryResourceError | FailureCode::Internal, _) => {
            "try again later; if that fails in the same way, tell the operator the build's id"
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use oci::{Digest, Source};
    use rootfs::PackError;

    use super::*;
    use crate::build::Phase;

    #[test]
    fn no_failure_is_without_a_remedy() {
        for code in FailureCode::ALL {
            for blame in [Blame::Yours, Blame::Ours, Blame::Upstream] {
                assert!(usual_remedy(code, blame).len() > 20, "{code:?} {blame:?}");
            }
        }
        let source: Source = "127.0.0.1:1/app".parse().unwrap();
        let host = || "127.0.0.1:1".to_owned();
        let (what, message) = (|| "the manifest of app".to_owned(), String::new);
        let answered = |status| PullError::Status {
            host: host(),
            status,
            what: what(),
            retry_after: None,
            message: message(),
        };
        let senseless =
            PullError::Protocol { host: host(), what: what(), reason: "it is HTML".into() };
        let missing = PullError::NotFound { host: host(), what: what(), message: message() };
        // Of 169.254.169.254, where a redirect leads.
        let never = EgressDenied::Never { class: "a metadata service", by_name: false };
        let denied = PullError::EgressDenied { host: host(), source: never };
        let pulls = [answered(503), answered(400), senseless, missing, denied];
        let refused =
            BuildError::Worker { phase: Phase::Layers, source: io::ErrorKind::WouldBlock.into() };
        let digest: Digest = format!("sha256:{:064}", 0).parse().unwrap();
        let layer = BuildError::Pack { layer: 0, digest, source: PackError::ImageDataBytes(1) };
        let errors = pulls.into_iter().map(|error| BuildError::pull(&source, error));
        for error in errors.chain([refused, layer, BuildError::WorkerLost { phase: Phase::Write }])
        {
            let failure = error.failure(Phase::Resolve);
            assert!(failure.remedy.len() > 20, "{failure:?}");
        }
    }

    /// What is said of an image that could not be had.
    fn said(error: PullError) -> String {
        let source: Source = "127.0.0.1:1/app".parse().unwrap();
        BuildError::pull(&source, error).failure(Phase::Resolve).remedy
    }

    #[test]
    fn nobody_is_told_to_use_a_command_line_that_he_has_not() {
        let host = || "r.example:5000".to_owned();
        let what = || "the manifest of app".to_owned();
        let unauthorized = |sent_credentials| PullError::Unauthorized {
            host: host(),
            what: what(),
            sent_credentials,
            message: String::new(),
        };
        let redirect = PullError::RedirectRefused { host: host(), target: host(), reason: "x" };
        let realm = PullError::InsecureRealm { host: host(), realm: host() };
        let limited =
            PullError::RateLimited { host: host(), retry_after: None, message: String::new() };
        let arm: oci::Platform = "linux/arm64".parse().unwrap();
        let platform =
            PullError::NoSuchPlatform { name: "app".into(), wanted: arm, available: Vec::new() };
        let silent = PullError::Timeout {
            host: host(),
            what: what(),
            waited: std::time::Duration::from_secs(1),
        };
        for (error, words) in [
            (unauthorized(true), "check the credentials that were sent with the build"),
            (unauthorized(false), "send credentials for its registry with the build"),
            (redirect, "r.example:5000 (UNKEY_BUILDERD_DOCKER_INSECURE_REGISTRIES)"),
            (realm, "UNKEY_BUILDERD_DOCKER_INSECURE_REGISTRIES"),
            (limited, "send credentials for the registry with the build"),
            (platform, "made for linux/arm64"),
            (silent, "check the name of the registry"),
        ] {
            let remedy = said(error);
            assert!(remedy.contains(words), "{words}: {remedy}");
            for word in ["docker login", "--", "plain-HTTP host", "proxy settings"] {
                assert!(!remedy.contains(word), "{remedy}");
            }
        }
        let source = Some(io::ErrorKind::NotFound.into());
        let nowhere = BuildError::OutputName { path: "/x".into(), problem: "is odd", source };
        assert!(nowhere.hint().unwrap().contains("--output"));
        assert!(!nowhere.failure(Phase::Resolve).remedy.contains("--output"));
    }
}
