//! Two trees side by side: what differs, and where a tool is known to differ from the rest.

pub(crate) mod reference;
pub(crate) mod walk;

use walk::{Entry, Kind, Tree};

/// Where one of the two trees is known not to tell the truth.
#[derive(Clone, Default)]
pub(crate) struct Rules {
    /// Paths (and all below) that only one side has and that mean nothing.
    pub(crate) ignored: Vec<&'static str>,
    /// Paths whose modification time a reference tool invents.
    pub(crate) mtime_unknown: Vec<Vec<u8>>,
    /// Extended attributes that a reference tool drops, by prefix.
    pub(crate) xattrs_dropped: Vec<&'static str>,
}

impl Rules {
    /// For a mounted image: its own `lost+found` is in no layer.
    pub(crate) fn image() -> Self {
        Self { ignored: vec!["lost+found"], ..Self::default() }
    }

    fn ignores(&self, path: &[u8]) -> bool {
        self.ignored.iter().any(|prefix| {
            path.strip_prefix(prefix.as_bytes())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        })
    }
}

/// Every difference as one line; empty when the trees are the same.
pub(crate) fn differences(expected: &Tree, found: &Tree, rules: &Rules) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, want) in expected {
        if rules.ignores(path) {
            continue;
        }
        match found.get(path) {
            None => lines.push(format!("{}: missing", show(path))),
            Some(have) => compare(path, want, have, rules, &mut lines),
        }
    }
    for path in found.keys().filter(|path| !expected.contains_key(*path) && !rules.ignores(path)) {
        lines.push(format!("{}: unexpected", show(path)));
    }
    lines
}

fn compare(path: &[u8], want: &Entry, have: &Entry, rules: &Rules, lines: &mut Vec<String>) {
    let mut say = |what: &str, want: String, have: String| {
        if want != have {
            lines.push(format!("{}: {what}: expected {want}, found {have}", show(path)));
        }
    };
    say("type", kind(&want.kind), kind(&have.kind));
    say("mode", format!("{:o}", want.mode), format!("{:o}", have.mode));
    say("owner", format!("{:?}", want.owner), format!("{:?}", have.owner));
    if !rules.mtime_unknown.iter().any(|unknown| unknown == path) {
        say("mtime", format!("{:?}", want.mtime), format!("{:?}", have.mtime));
    }
    say("links", want.links.to_string(), have.links.to_string());
    say("hard link of", show(&want.twin), show(&have.twin));
    say("xattrs", xattrs(want, rules), xattrs(have, rules));
}

fn kind(kind: &Kind) -> String {
    match kind {
        Kind::Directory => "directory".into(),
        Kind::File { size, sha256 } => {
            let hex: String = sha256.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
            format!("file of {size} bytes, sha256 {hex}…")
        }
        Kind::Symlink { target } => format!("symlink to {}", show(target)),
        Kind::CharDevice { device } => format!("character device {device:#x}"),
        Kind::BlockDevice { device } => format!("block device {device:#x}"),
        Kind::Fifo => "fifo".into(),
        Kind::Socket => "socket".into(),
    }
}

fn xattrs(entry: &Entry, rules: &Rules) -> String {
    let kept = entry.xattrs.iter().filter(|(name, _)| {
        !rules.xattrs_dropped.iter().any(|prefix| name.starts_with(prefix.as_bytes()))
    });
    let shown: Vec<String> =
        kept.map(|(name, value)| format!("{}={}", show(name), show(value))).collect();
    format!("{{{}}}", shown.join(", "))
}

/// Bytes as text, the odd ones escaped.
fn show(bytes: &[u8]) -> String {
    if bytes.is_empty() { "/".into() } else { bytes.escape_ascii().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree_of(files: &[(&str, &str)]) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        walk::walk(dir.path()).unwrap()
    }

    fn rules() -> Rules {
        let mtime_unknown = ["", "a", "b"].map(|name| name.as_bytes().to_vec()).to_vec();
        Rules { mtime_unknown, ..Rules::image() }
    }

    #[test]
    fn equal_trees_have_no_differences_and_lost_found_does_not_count() {
        let left = tree_of(&[("a", "1"), ("b", "2")]);
        let right = tree_of(&[("a", "1"), ("b", "2"), ("lost+found", "")]);
        assert_eq!(differences(&left, &right, &rules()), Vec::<String>::new());
    }

    #[test]
    fn content_a_missing_and_an_extra_name_are_each_reported() {
        let left = tree_of(&[("a", "1"), ("b", "2")]);
        let right = tree_of(&[("a", "x"), ("c", "2")]);
        let lines = differences(&left, &right, &rules());
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].starts_with("a: type: expected file of 1 bytes"));
        assert_eq!(lines[1..], ["b: missing".to_owned(), "c: unexpected".to_owned()]);
    }

    #[test]
    fn a_hard_link_is_not_the_same_as_two_equal_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "1").unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        let linked = walk::walk(dir.path()).unwrap();
        let apart = tree_of(&[("a", "1"), ("b", "1")]);
        assert_eq!(differences(&apart, &linked, &rules()).len(), 4);
    }
}
