//! Names that delete: `.wh.NAME` and `.wh..wh..opq`, as the OCI image specification's
//! `layer.md` ("Representing Changes") and AUFS have them. Knows names only, no tree.

use crate::path;

/// What the name of every marker begins with.
pub(crate) const PREFIX: &[u8] = b".wh.";
const META_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a path of a layer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// An ordinary entry.
    Plain,
    /// The entry at this path is deleted from the layers below.
    Whiteout(Vec<u8>),
    /// The directory at this path hides what the layers below have in it.
    Opaque(Vec<u8>),
    /// Bookkeeping of AUFS (`.wh..wh.plnk`, `.wh..wh.aufs`, and what lies below): skipped.
    Skipped,
}

/// Why a marker means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WhiteoutProblem {
    #[error("the whiteout deletes no name")]
    NoName,
    #[error("the entry lies below a whiteout")]
    Below,
}

/// Reads the meaning of a clean path.
pub(crate) fn meaning(clean: &[u8]) -> Result<Meaning, WhiteoutProblem> {
    // Nearly every path of every image leaves here.
    if !clean.windows(PREFIX.len()).any(|window| window == PREFIX) {
        return Ok(Meaning::Plain);
    }
    let (directory, name) = path::split(clean);
    for component in directory.split(|byte| *byte == b'/') {
        if component.starts_with(META_PREFIX) {
            return Ok(Meaning::Skipped);
        }
        if component.starts_with(PREFIX) {
            return Err(WhiteoutProblem::Below);
        }
    }
    if name == OPAQUE {
        return Ok(Meaning::Opaque(directory.to_vec()));
    }
    if name.starts_with(META_PREFIX) {
        return Ok(Meaning::Skipped);
    }
    match name.strip_prefix(PREFIX) {
        None => Ok(Meaning::Plain),
        Some(b"" | b"." | b"..") => Err(WhiteoutProblem::NoName),
        Some(deleted) if directory.is_empty() => Ok(Meaning::Whiteout(deleted.to_vec())),
        Some(deleted) => Ok(Meaning::Whiteout([directory, b"/", deleted].concat())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whiteout_names_what_it_deletes() {
        assert_eq!(meaning(b"a/.wh.b"), Ok(Meaning::Whiteout(b"a/b".to_vec())));
        assert_eq!(meaning(b".wh.b"), Ok(Meaning::Whiteout(b"b".to_vec())));
        assert_eq!(meaning(b".wh..hidden"), Ok(Meaning::Whiteout(b".hidden".to_vec())));
        assert_eq!(meaning(b".wh...."), Ok(Meaning::Whiteout(b"...".to_vec())));
    }

    #[test]
    fn an_opaque_marker_names_its_directory() {
        assert_eq!(meaning(b"a/b/.wh..wh..opq"), Ok(Meaning::Opaque(b"a/b".to_vec())));
        assert_eq!(meaning(b".wh..wh..opq"), Ok(Meaning::Opaque(Vec::new())));
    }

    #[test]
    fn bookkeeping_of_aufs_is_skipped_with_everything_below() {
        for path in [
            &b".wh..wh.plnk"[..],
            b".wh..wh.plnk/12.34",
            b".wh..wh.aufs",
            b"a/.wh..wh.orph/x/.wh.y",
            b".wh..wh..opq/x",
        ] {
            assert_eq!(meaning(path), Ok(Meaning::Skipped), "{}", path.escape_ascii());
        }
    }

    #[test]
    fn a_marker_without_a_name_is_refused() {
        for path in [&b".wh."[..], b"a/.wh..", b".wh..."] {
            assert_eq!(meaning(path), Err(WhiteoutProblem::NoName), "{}", path.escape_ascii());
        }
        assert_eq!(meaning(b".wh.a/b"), Err(WhiteoutProblem::Below));
    }

    #[test]
    fn names_that_only_look_alike_are_plain() {
        for path in [&b"a.wh.b"[..], b"a/x.wh.", b".wh", b"wh.a", b""] {
            assert_eq!(meaning(path), Ok(Meaning::Plain), "{}", path.escape_ascii());
        }
    }
}
