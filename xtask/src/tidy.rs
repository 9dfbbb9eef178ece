//! Rules of the house that a compiler does not know, each with its reason. Runs with the tests.
//!
//! Knows files and their text; what the code means is clippy's business.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::workspace;

/// Who may depend on whom (dev-dependencies aside): arrows run one way, so that a library can
/// be read, tested and published without the service above it.
const ARROWS: &[(&str, &[&str])] = &[
    ("builderd", &["api", "commands", "oci", "rootfs", "ext4", "sandbox", "sealed"]),
    ("commands", &["ext4", "rootfs", "sandbox"]),
    ("rootfs", &["ext4"]),
    ("api", &[]),
    ("oci", &[]),
    ("ext4", &[]),
    ("sandbox", &[]),
    ("sealed", &[]),
    ("xtask", &[]),
];

/// Text that has no place in the repository, and why. Written in halves: this file is checked too.
const FORBIDDEN: &[(&str, &str, &str)] = &[
    ("todo", "!(", "a stub claims what is not there"),
    ("unimplemented", "!(", "a stub claims what is not there"),
    ("dbg", "!(", "left over from a search for a bug"),
    ("FIX", "ME", "mend it, or write an issue"),
    ("#[ig", "nore", "a test that does not run is no test: skip it aloud, with a reason"),
    ("allow(dead_", "code", "delete what nobody uses"),
    ("/wo", "rk/", "no path of one machine"),
];

/// Endings that say nothing of what a type does.
const EMPTY_NAMES: &[&str] = &["Manager", "Helper", "Helpers", "Util", "Utils"];

/// Names of crates and modules that collect what has no home.
const HOMELESS: &[&str] = &["common", "util", "utils", "core", "types", "helpers", "misc"];

fn metadata() -> Value {
    let text = workspace::cargo()
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .text()
        .unwrap();
    serde_json::from_str(&text).unwrap()
}

/// All files below the top that git would know of, with their text.
fn texts() -> Vec<(PathBuf, String)> {
    let top = workspace::top();
    let mut todo = vec![top.clone()];
    let mut found = Vec::new();
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                let made = ["target", ".git", "corpus", "artifacts", "coverage"];
                if !made.contains(&name.as_str()) {
                    todo.push(path);
                }
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                found.push((path.strip_prefix(&top).unwrap().to_path_buf(), text));
            }
        }
    }
    found.sort();
    found
}

fn rust_texts() -> Vec<(PathBuf, String)> {
    texts().into_iter().filter(|(path, _)| path.extension().is_some_and(|e| e == "rs")).collect()
}

#[test]
fn crates_depend_on_each_other_one_way_only() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) = ARROWS
            .iter()
            .find(|(from, _)| *from == name)
            .unwrap_or_else(|| panic!("{name} has no line in ARROWS: say what it may depend on"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let local = !dependency["path"].is_null() && dependency["kind"] != "dev";
            let to = dependency["name"].as_str().unwrap();
            assert!(!local || allowed.contains(&to), "{name} must not depend on {to}");
        }
    }
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    for package in metadata()["packages"].as_array().unwrap() {
        let manifest = package["manifest_path"].as_str().unwrap();
        let text = std::fs::read_to_string(manifest).unwrap();
        assert!(text.contains("[lints]\nworkspace = true"), "{manifest}");
    }
}

/// A file that no `mod` reaches is never compiled, and nobody notices when it rots.
#[test]
fn every_source_file_is_compiled() {
    let mut reached: HashSet<PathBuf> = HashSet::new();
    let metadata = metadata();
    let mut roots: Vec<PathBuf> = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        for target in package["targets"].as_array().unwrap() {
            roots.push(target["src_path"].as_str().unwrap().into());
        }
    }
    let top = workspace::top();
    roots.push(top.join("fuzz/src/lib.rs"));
    for target in crate::fuzz::TARGETS {
        roots.push(top.join(format!("fuzz/fuzz_targets/{target}.rs")));
    }
    for root in roots {
        let dir = root.parent().unwrap().to_path_buf();
        reach(&root, &dir, &mut reached);
    }
    for (path, _) in rust_texts() {
        assert!(reached.contains(&top.join(&path)), "{} is in no module tree", path.display());
    }
}

/// Follows the `mod` lines of a file whose children lie in `dir`.
fn reach(file: &Path, dir: &Path, reached: &mut HashSet<PathBuf>) {
    if !reached.insert(file.to_path_buf()) {
        return;
    }
    let Ok(text) = std::fs::read_to_string(file) else { return };
    let mut elsewhere = None;
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("#[path = \"") {
            elsewhere = rest.split('"').next().map(str::to_owned);
        }
        let words: Vec<&str> = line.split_whitespace().filter(|w| !w.starts_with("pub")).collect();
        let ["mod", name] = words[..] else { continue };
        let Some(name) = name.strip_suffix(';') else { continue };
        if let Some(path) = elsewhere.take() {
            reach(&dir.join(path), &dir.join(name), reached);
        } else if dir.join(format!("{name}.rs")).exists() {
            reach(&dir.join(format!("{name}.rs")), &dir.join(name), reached);
        } else {
            reach(&dir.join(name).join("mod.rs"), &dir.join(name), reached);
        }
    }
}

/// A reader of a file must learn at its top what it is for, and what it does not know.
#[test]
fn every_source_file_says_what_it_is() {
    for (path, text) in rust_texts() {
        assert!(text.starts_with("//!"), "{} has no module documentation", path.display());
    }
}

#[test]
fn nothing_forbidden_is_written_anywhere() {
    let mut wrong = Vec::new();
    for (path, text) in texts() {
        for (index, line) in text.lines().enumerate() {
            for (left, right, reason) in FORBIDDEN {
                // A test that another test starts in a process of its own does run.
                let started_elsewhere = line.contains("= \"runs inside ");
                if line.contains(&format!("{left}{right}")) && !started_elsewhere {
                    wrong.push(format!(
                        "{}:{}: {left}{right}: {reason}",
                        path.display(),
                        index + 1
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_type_and_no_module_has_an_empty_name() {
    for (path, text) in rust_texts() {
        let stem = path.file_stem().unwrap().to_string_lossy();
        assert!(!HOMELESS.contains(&stem.as_ref()), "{}: name it by its subject", path.display());
        for line in text.lines() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            while let Some(word) = words.next() {
                if !matches!(word, "struct" | "enum" | "trait") {
                    continue;
                }
                let name = words.next().unwrap_or_default();
                assert!(
                    !EMPTY_NAMES.iter().any(|ending| name.ends_with(ending)),
                    "{}: {name}: say what it does",
                    path.display()
                );
            }
        }
    }
}

/// The table must never send a newcomer to a place that has moved.
#[test]
fn the_one_minute_table_points_at_things_that_exist() {
    let top = workspace::top();
    let text = std::fs::read_to_string(top.join("ARCHITECTURE.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| Where "));
    let mut count = 0;
    for row in rows {
        let quoted: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        let [file, name] = quoted[..] else { panic!("a row names one file and one thing: {row}") };
        let source = std::fs::read_to_string(top.join(file))
            .unwrap_or_else(|_| panic!("{file} does not exist"));
        let last = name.rsplit("::").next().unwrap_or(name);
        let defined = ["fn", "struct", "enum", "trait"].iter().any(|kind| {
            [" ", "(", "<", "{"].iter().any(|end| source.contains(&format!("{kind} {last}{end}")))
        });
        assert!(defined, "{file} defines no {name}");
        count += 1;
    }
    assert!(count >= 5, "the table has {count} rows");
}

#[test]
fn links_between_documents_lead_somewhere() {
    for (path, text) in texts() {
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let dir = workspace::top().join(path.parent().unwrap());
        for link in text.split("](").skip(1) {
            let target = link.split(&[')', '#', ' '][..]).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            assert!(dir.join(target).exists(), "{}: {target} does not exist", path.display());
        }
    }
}

/// A wall that no test proves is a promise, and a test that was renamed proves nothing.
#[test]
fn every_wall_of_the_threat_model_has_its_test() {
    let text = std::fs::read_to_string(workspace::top().join("docs/tenancy.md")).unwrap();
    let sources = rust_texts();
    let (mut count, mut missing) = (0, Vec::new());
    let mut is_of_walls = false;
    for line in text.lines() {
        if !line.starts_with('|') {
            is_of_walls = false;
        }
        if is_of_walls && !line.starts_with("|---") {
            let cell = line.trim_end_matches(['|', ' ']).rsplit(" | ").next().unwrap();
            let names: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
            assert!(!names.is_empty(), "no test proves this: {line}");
            count += names.len();
            let is_missing = |name: &&str| !sources.iter().any(|(_, text)| is_test(text, name));
            missing.extend(names.into_iter().filter(is_missing));
        }
        is_of_walls |= line == "| wall | proved by |";
    }
    assert!(missing.is_empty(), "docs/tenancy.md names what is no test: {missing:?}");
    assert!(count >= 50, "the threat model names {count} tests");
}

/// Whether a source has a test of that name: by an attribute above it, or in the list of stories
/// that run on both databases.
fn is_test(source: &str, name: &str) -> bool {
    let Some((before, _)) = source.split_once(&format!("fn {name}(")) else {
        let is_listed = |line: &str| line.trim().trim_end_matches([',', ';']) == name;
        return source.contains("stories! {") && source.lines().any(is_listed);
    };
    let mut above = before.lines().rev().take(3);
    above.any(|line| line.trim().starts_with("#[") && line.contains("test"))
}
