//! The version before this one, for stories about nodes that are not all replaced at once. Knows
//! git and cargo, nothing of what the version does.

use std::path::PathBuf;

use anyhow::Result;

use crate::process::Program;
use crate::workspace;

/// The last version before the newest changes of the schema. Named, and not looked for: what goes in
/// together comes in pieces, of which only the last is a version.
const VERSION: &str = "dd94bdd217419bfdd218e7bebc86e432f62ce03e";

/// builderd as it was before the newest changes of the schema, compiled once if that is not too much
/// now; or why it cannot be had.
pub(super) fn binary(may_compile: bool) -> Result<Result<PathBuf, String>> {
    let kept = workspace::kept("older")?;
    let binary = kept.join(format!("builderd-{VERSION}"));
    if binary.exists() {
        return Ok(Ok(binary));
    }
    if !may_compile {
        return Ok(Err("an older version must be compiled: `cargo xtask soak`".into()));
    }
    if !is_known()? {
        return Ok(Err(format!("the history here does not go back to {VERSION}")));
    }
    eprintln!("compiling builderd as it was at {VERSION}");
    let source = kept.join("source");
    if source.exists() {
        std::fs::remove_dir_all(&source)?;
    }
    std::fs::create_dir_all(&source)?;
    Program::shell("git archive \"$0\" | tar --extract --directory \"$1\"")
        .arg(VERSION)
        .arg(&source)
        .dir(workspace::top())
        .run()?;
    // Not where this version's own is: that one is what the other stories run.
    let target = kept.with_file_name("mutations-target");
    Program::new("cargo")
        .args(["build", "--locked", "--package", "builderd", "--bin", "builderd"])
        .env("CARGO_TARGET_DIR", &target)
        .dir(&source)
        .loud_checked()?;
    std::fs::copy(target.join("debug/builderd"), &binary)?;
    Ok(Ok(binary))
}

fn is_known() -> Result<bool> {
    let commit = format!("{VERSION}^{{commit}}");
    let asked = Program::new("git").args(["cat-file", "-e", &commit]).dir(workspace::top());
    Ok(asked.outcome()?.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_version_has_not_the_newest_migration() {
        const MIGRATIONS: &str = "crates/builderd/migrations/";
        if !is_known().unwrap() {
            eprintln!("SKIPPED: the history here does not go back to {VERSION}");
            return;
        }
        let files = std::fs::read_dir(workspace::top().join(MIGRATIONS)).unwrap();
        let newest = files.map(|file| file.unwrap().file_name()).max().unwrap();
        let list = ["ls-tree", "--name-only", VERSION, MIGRATIONS];
        let names = Program::new("git").args(list).dir(workspace::top()).text().unwrap();
        assert!(names.contains("0001_store.sql"), "{names}");
        assert!(!names.contains(&*newest.to_string_lossy()), "{names}");
    }
}
