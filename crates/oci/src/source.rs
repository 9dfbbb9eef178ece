//! What a user can name as an image: a registry reference, a layout, an archive, stdin.
//!
//! Parsing looks at the text alone: whether a file or an image exists, it does not know.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::reference::{Reference, ReferenceError};

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A registry: `nginx`, `ghcr.io/a/b:tag`, `docker://nginx`.
    Registry(Reference),
    /// An OCI image layout directory: `oci:DIR[:tag]`.
    Layout {
        /// The directory.
        dir: PathBuf,
        /// The image in it, needed when there are several.
        tag: Option<String>,
    },
    /// A tar (or tar.gz) of an OCI image layout: `oci-archive:FILE[:tag]`.
    OciArchive {
        /// The archive.
        file: PathBuf,
        /// The image in it, needed when there are several.
        tag: Option<String>,
    },
    /// What `docker save` writes, gzip too: `docker-archive:FILE[:reference]`.
    DockerArchive {
        /// The archive.
        file: PathBuf,
        /// The image in it, needed when there are several.
        tag: Option<String>,
    },
    /// Either archive on standard input: `-`.
    Stdin,
}

/// Why a text names no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// A transport that exists elsewhere and not here.
    #[error(
        "transport {0:?} is not supported: use a registry reference, oci:, oci-archive:, docker-archive: or -"
    )]
    Transport(String),
    /// The transport is there, the path is not.
    #[error("{0} needs a path")]
    NoPath(&'static str),
    /// A path without a transport.
    #[error("{0:?} looks like a path: write oci:DIR, oci-archive:FILE or docker-archive:FILE")]
    Path(String),
    /// Not a registry reference.
    #[error("{text:?} is not an image reference")]
    Reference {
        /// What was written.
        text: String,
        /// What is wrong with it.
        source: ReferenceError,
    },
}

const FOREIGN_TRANSPORTS: [&str; 6] =
    ["containers-storage:", "docker-daemon:", "dir:", "ostree:", "tarball:", "sif:"];

impl FromStr for Source {
    type Err = SourceError;

    /// As skopeo does, a path ends at its first colon; what follows selects the image.
    fn from_str(text: &str) -> Result<Source, SourceError> {
        if text == "-" {
            return Ok(Source::Stdin);
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = path_and_tag(rest, "oci:")?;
            return Ok(Source::Layout { dir, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = path_and_tag(rest, "oci-archive:")?;
            return Ok(Source::OciArchive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, tag) = path_and_tag(rest, "docker-archive:")?;
            return Ok(Source::DockerArchive { file, tag });
        }
        if let Some(transport) = FOREIGN_TRANSPORTS.iter().find(|t| text.starts_with(**t)) {
            return Err(SourceError::Transport((*transport).to_owned()));
        }
        if text.starts_with(['/', '.', '~']) {
            return Err(SourceError::Path(text.to_owned()));
        }
        let reference = text.strip_prefix("docker://").unwrap_or(text);
        let parsed = reference.parse();
        let as_error = |source| SourceError::Reference { text: without_userinfo(text), source };
        Ok(Source::Registry(parsed.map_err(as_error)?))
    }
}

/// A URL in place of a reference may carry a password: what stands before `@` is not repeated.
fn without_userinfo(text: &str) -> String {
    match (text.split_once("://"), text.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://{rest}"),
        _ => text.to_owned(),
    }
}

fn path_and_tag(
    text: &str,
    transport: &'static str,
) -> Result<(PathBuf, Option<String>), SourceError> {
    let (path, tag) = match text.split_once(':') {
        Some((path, tag)) if !tag.is_empty() => (path, Some(tag.to_owned())),
        Some((path, _)) => (path, None),
        None => (text, None),
    };
    if path.is_empty() {
        return Err(SourceError::NoPath(transport));
    }
    Ok((PathBuf::from(path), tag))
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, tag) = match self {
            Source::Registry(reference) => return reference.fmt(f),
            Source::Stdin => return f.write_str("-"),
            Source::Layout { dir, tag } => ("oci", dir, tag),
            Source::OciArchive { file, tag } => ("oci-archive", file, tag),
            Source::DockerArchive { file, tag } => ("docker-archive", file, tag),
        };
        write!(f, "{transport}:{}", path.display())?;
        match tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_understood_and_printed_back() {
        for (text, printed) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("docker://ghcr.io/a/b:c", "ghcr.io/a/b:c"),
            ("oci:/srv/layout", "oci:/srv/layout"),
            ("oci:layout:v1", "oci:layout:v1"),
            ("oci:layout:docker.io/library/x:v1", "oci:layout:docker.io/library/x:v1"),
            ("oci:layout:", "oci:layout"),
            ("oci-archive:x.tar", "oci-archive:x.tar"),
            ("docker-archive:x.tar.gz:repo/x:v2", "docker-archive:x.tar.gz:repo/x:v2"),
            ("-", "-"),
        ] {
            let source: Source = text.parse().unwrap();
            assert_eq!(source.to_string(), printed);
            assert_eq!(printed.parse::<Source>().unwrap(), source);
        }
    }

    #[test]
    fn mistakes_are_told_apart() {
        let error = |text: &str| text.parse::<Source>().unwrap_err();
        assert!(matches!(error("oci:"), SourceError::NoPath("oci:")));
        assert!(matches!(error("oci-archive::tag"), SourceError::NoPath(_)));
        assert!(matches!(error("./image.tar"), SourceError::Path(_)));
        assert!(matches!(error("/srv/image.tar"), SourceError::Path(_)));
        assert!(matches!(error("docker-daemon:x:y"), SourceError::Transport(_)));
        assert!(matches!(error("https://ghcr.io/a"), SourceError::Reference { .. }));
        assert!(matches!(error(""), SourceError::Reference { .. }));
    }

    #[test]
    fn a_password_in_a_url_is_not_repeated() {
        let error = "https://me:hunter2@ghcr.io/a".parse::<Source>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}
