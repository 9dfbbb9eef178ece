//! Paths of a layer: any bytes but NUL, cleaned lexically. Knows no tree and follows no links.

use crate::{Limits, whiteout};

/// What is wrong with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathProblem {
    /// A NUL byte, which no Linux path can hold.
    #[error("the path holds a NUL byte")]
    Nul,
    /// More bytes than `Limits::path_bytes_max`.
    #[error("the path is longer than {0} bytes")]
    TooLong(usize),
    /// A component of more bytes than `Limits::component_bytes_max`.
    #[error("a name in the path is longer than {0} bytes")]
    ComponentTooLong(usize),
    /// More components than `Limits::depth_max`.
    #[error("the path is deeper than {0} directories")]
    TooDeep(usize),
}

/// Cleans `raw` into `out`: components joined by single slashes, nothing before the first or
/// after the last; empty for the root.
///
/// As `filepath.Clean` joined to a root does in containerd and Docker: `.` and empty
/// components vanish, `..` removes the component before it, whatever that is, and stays at
/// the root when there is none, so that `/../x` is `x`.
pub(crate) fn clean(raw: &[u8], limits: &Limits, out: &mut Vec<u8>) -> Result<(), PathProblem> {
    clean_names(raw, limits, limits.component_bytes_max, out)
}

/// As [`clean`], for the path of an entry. A whiteout's own name is longer than the one that it
/// deletes: Docker writes `.wh.` before 255 bytes, though no file system could hold it.
pub(crate) fn clean_entry(
    raw: &[u8],
    limits: &Limits,
    out: &mut Vec<u8>,
) -> Result<(), PathProblem> {
    let marker_bytes_max = limits.component_bytes_max + whiteout::PREFIX.len();
    clean_names(raw, limits, marker_bytes_max, out)
}

fn clean_names(
    raw: &[u8],
    limits: &Limits,
    marker_bytes_max: usize,
    out: &mut Vec<u8>,
) -> Result<(), PathProblem> {
    out.clear();
    if raw.contains(&0) {
        return Err(PathProblem::Nul);
    }
    let mut depth = 0_usize;
    for component in raw.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                let parent = out.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                out.truncate(parent);
                depth = depth.saturating_sub(1);
            }
            name => {
                let is_marker = name.starts_with(whiteout::PREFIX);
                let bytes_max =
                    if is_marker { marker_bytes_max } else { limits.component_bytes_max };
                if name.len() > bytes_max {
                    return Err(PathProblem::ComponentTooLong(limits.component_bytes_max));
                }
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(name);
                depth += 1;
            }
        }
    }
    let bytes_max = limits.path_bytes_max.min(Limits::PATH_BYTES_MAX);
    if out.len() > bytes_max {
        return Err(PathProblem::TooLong(bytes_max));
    }
    if depth > limits.depth_max {
        return Err(PathProblem::TooDeep(limits.depth_max));
    }
    Ok(())
}

/// Whether the components of `path` from byte `from` on are what [`clean`] leaves. `from` is
/// the first byte of a component.
pub(crate) fn is_clean(path: &[u8], from: usize) -> bool {
    if path.is_empty() {
        return true;
    }
    path[from..]
        .split(|byte| *byte == b'/')
        .all(|name| !matches!(name, b"" | b"." | b"..") && name.len() <= 255 && !name.contains(&0))
}

/// The directory part and the name of a clean path that is not the root.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// A path for people: foreign bytes and control characters escaped, never longer than a few lines.
pub(crate) fn printable(path: &[u8]) -> String {
    const SHOWN_MAX: usize = 512;
    let shown = &path[..path.len().min(SHOWN_MAX)];
    let mut text = String::from_utf8_lossy(shown).escape_debug().to_string();
    if path.len() > SHOWN_MAX {
        text.push('…');
    }
    if text.is_empty() { "/".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(raw: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        clean(raw, &Limits::default(), &mut out).unwrap();
        assert!(is_clean(&out, 0));
        out
    }

    #[test]
    fn every_way_to_write_a_path_gives_one_clean_form() {
        for raw in [&b"a/b"[..], b"/a/b", b"./a/b", b"a//b/", b"//a/./b/.", b"a/x/../b", b"../a/b"]
        {
            assert_eq!(cleaned(raw), b"a/b", "{}", raw.escape_ascii());
        }
        for raw in [&b""[..], b".", b"./", b"/", b"..", b"a/..", b"../../.."] {
            assert_eq!(cleaned(raw), b"", "{}", raw.escape_ascii());
        }
    }

    #[test]
    fn dots_that_are_part_of_a_name_stay() {
        assert_eq!(cleaned(b"...//..a/.b/c."), b".../..a/.b/c.");
    }

    #[test]
    fn names_need_not_be_utf8() {
        assert_eq!(cleaned(b"/\xff\xfe/a"), b"\xff\xfe/a");
        assert_eq!(printable(b"\xff\n"), "\u{fffd}\\n");
    }

    #[test]
    fn what_linux_cannot_hold_is_refused() {
        let limits = Limits::default();
        let mut out = Vec::new();
        assert_eq!(clean(b"a\0b", &limits, &mut out), Err(PathProblem::Nul));
        for name in [vec![b'a'; 256], [b".wh.", &[b'a'; 252][..]].concat()] {
            let refused = Err(PathProblem::ComponentTooLong(255));
            assert_eq!(clean(&name, &limits, &mut out), refused);
        }
        assert_eq!(clean(&b"a/".repeat(257), &limits, &mut out), Err(PathProblem::TooDeep(256)));
        let long = [vec![b'a'; 200], b"/".to_vec()].concat().repeat(21);
        assert_eq!(clean(&long, &limits, &mut out), Err(PathProblem::TooLong(4096)));
    }
}
