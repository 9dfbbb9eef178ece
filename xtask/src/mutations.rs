//! `cargo xtask mutations`: takes a safeguard out of the store and sees that its tests notice.
//!
//! A test that would pass without the thing it tests is worth nothing; here that is asked of the
//! fence. The copy lies in `target/mutations`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::process::Program;
use crate::stories::Tally;
use crate::workspace;

/// One safeguard taken out.
struct Mutation {
    /// What no longer holds, as a sentence.
    sentence: &'static str,
    /// Below the repository's top directory.
    file: &'static str,
    /// Found there exactly once.
    from: &'static str,
    to: &'static str,
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        sentence: "a worker that lost its lease writes all the same",
        file: "crates/builderd/src/store/sql/mod.rs",
        from: "held.state.is_running() && held.token == lease.token",
        to: "held.state.is_running() && held.token >= lease.token",
    },
    Mutation {
        sentence: "a heartbeat prolongs somebody else's lease",
        file: "crates/builderd/src/store/sql/queue.rs",
        from: "lease_token = $3 AND lease_owner IS NOT NULL",
        to: "lease_token >= $3 AND lease_owner IS NOT NULL",
    },
    Mutation {
        sentence: "a lease that ran out is taken over under the same token",
        file: "crates/builderd/src/store/sql/queue.rs",
        from: "let token = held.token + 1;\n    let expires_at",
        to: "let token = held.token;\n    let expires_at",
    },
];

/// `cargo xtask mutations`
pub(crate) fn run() -> Result<()> {
    let tally = check()?;
    println!("{tally}");
    if tally.failed > 0 {
        bail!("{} mutations were not noticed", tally.failed);
    }
    Ok(())
}

/// Every mutation is one check; it passes when a test of the store fails by it.
pub(crate) fn check() -> Result<Tally> {
    let copy = copy()?;
    let whole = tests(&copy)?;
    if !whole.passes {
        bail!("the store's tests fail without any mutation:\n{}", whole.said);
    }
    let mut tally = Tally::default();
    for mutation in MUTATIONS {
        let file = copy.join(mutation.file);
        let text = std::fs::read_to_string(&file)?;
        std::fs::write(&file, mutated(mutation, &text)?)?;
        let outcome = tests(&copy);
        std::fs::write(&file, text)?;
        let outcome = outcome?;
        if outcome.ran && !outcome.passes {
            println!("ok    noticed: {}", mutation.sentence);
            tally.passed += 1;
        } else {
            println!("FAIL  not noticed: {}\n{}", mutation.sentence, outcome.said);
            tally.failed += 1;
        }
    }
    Ok(tally)
}

/// The text of a file with the safeguard taken out.
fn mutated(mutation: &Mutation, text: &str) -> Result<String> {
    if text.matches(mutation.from).count() != 1 {
        bail!("{}: `{}` is not there exactly once", mutation.file, mutation.from);
    }
    Ok(text.replacen(mutation.from, mutation.to, 1))
}

struct Tested {
    /// Tests ran at all: what does not compile proves nothing.
    ran: bool,
    passes: bool,
    said: String,
}

fn tests(copy: &Path) -> Result<Tested> {
    let outcome = Program::new("cargo")
        .args(["test", "--quiet", "--package", "builderd", "--lib", "--", "store::"])
        .env("CARGO_TARGET_DIR", copy.with_file_name("mutations-target"))
        .dir(copy)
        .outcome()?;
    // The whole of it: of what is said for a person, long compiles leave nothing of the tests.
    let ran = String::from_utf8_lossy(&outcome.stdout).contains("test result:");
    Ok(Tested { ran, passes: ran && outcome.status.success(), said: outcome.said() })
}

/// A copy of every file that git knows here, as it is now.
fn copy() -> Result<PathBuf> {
    let copy = workspace::kept("mutations")?;
    let names = Program::new("git").args(["ls-files", "-z"]).dir(workspace::top()).text()?;
    for name in names.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (workspace::top().join(name), copy.join(name));
        // One that was taken away but is not committed yet.
        let Ok(bytes) = std::fs::read(&from) else { continue };
        if std::fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&to, bytes).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_safeguard_is_where_its_mutation_looks_for_it() {
        for mutation in MUTATIONS {
            let text = std::fs::read_to_string(workspace::top().join(mutation.file)).unwrap();
            assert_ne!(mutated(mutation, &text).unwrap(), text);
        }
    }
}
