//! `cargo xtask test` and `cargo xtask soak`: everything that is a check, counted.
//!
//! The last line is always `N passed, N failed, N skipped`.

use anyhow::{Result, bail};

use crate::arguments::Arguments;
use crate::process::{self, Program};
use crate::stories::{self, Size, Tally};
use crate::workspace::cargo;
use crate::{fuzz, machine, mutations, workspace};

/// `cargo xtask test [--no-stories] [--install]`
pub(crate) fn test(mut arguments: Arguments) -> Result<()> {
    let with_stories = !arguments.flag("--no-stories");
    let install = arguments.flag("--install");
    arguments.end()?;
    // Tests of the store want a database, those of the metrics their checker.
    if with_stories {
        machine::require(machine::ALL)?;
    }
    let mut tally = Tally::default();
    tally.add(step("cargo fmt --check", cargo().args(["fmt", "--all", "--check"])));
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "--deny=warnings"];
    tally.add(step("cargo clippy", cargo().args(clippy)));
    let doc = cargo().args(["doc", "--workspace", "--no-deps", "--document-private-items"]);
    tally.add(step("cargo doc", doc.env("RUSTDOCFLAGS", "--deny=warnings")));
    tally.add(unit_tests()?);
    tally.add(doc_tests()?);
    for tool in TOOLS {
        tally.add(optional(tool, install));
    }
    tally.add(fuzz_targets_compile()?);
    if with_stories {
        tally.add(run_stories(Size::Reduced)?);
    }
    conclude(tally)
}

/// `cargo xtask soak`: the stories at the sizes that the specification states, and the mutations.
pub(crate) fn soak(arguments: Arguments) -> Result<()> {
    arguments.end()?;
    let mut tally = run_stories(Size::Full)?;
    heading("mutations");
    tally.add(mutations::check()?);
    conclude(tally)
}

fn run_stories(size: Size) -> Result<Tally> {
    heading(match size {
        Size::Reduced => {
            "stories, reduced: images tiny, small, node-reduced; 50k files in one directory; \
             series of 10k and 100k files; base layer of 96 MiB; 30 builds of 6 tenants through 5 \
             kills, on each database; 24 builds cancelled, 6 killed; the attacks of a \
             tenant here alone (`cargo xtask soak`: full sizes)"
        }
        Size::Full => {
            "stories, full: images tiny, small, node, large; 200k files in one directory; \
             series of 10k, 100k and 1M files; base layer of 2.2 GiB; 200 builds of 20 tenants \
             through 20 kills, on each database; 1000 builds cancelled, 200 killed; the attacks of a \
             tenant here and in a machine with version 2 of cgroups"
        }
    });
    machine::require(machine::ALL)?;
    stories::run(size, "", None, None)
}

fn conclude(tally: Tally) -> Result<()> {
    println!("\n{tally}");
    if tally.failed > 0 {
        bail!("{} checks failed", tally.failed);
    }
    Ok(())
}

fn heading(what: &str) {
    println!("\n=== {what}");
}

/// One program that passes or fails as a whole.
fn step(what: &str, program: Program) -> Tally {
    heading(what);
    match program.loud() {
        Ok(status) if status.success() => Tally { passed: 1, ..Tally::default() },
        Ok(status) => {
            println!("FAIL  {what}: {status}");
            Tally { failed: 1, ..Tally::default() }
        }
        Err(error) => {
            println!("FAIL  {what}: {error:#}");
            Tally { failed: 1, ..Tally::default() }
        }
    }
}

fn skip(what: &str, reason: &str) -> Tally {
    heading(what);
    println!("SKIP  {what}: {reason}");
    Tally { skipped: 1, ..Tally::default() }
}

/// All tests of the workspace; nextest runs them in parallel, cargo itself where it is missing.
fn unit_tests() -> Result<Tally> {
    heading("tests of the workspace");
    if !process::found("cargo-nextest") {
        eprintln!("installing cargo-nextest");
        let installed =
            cargo().args(["install", "--locked", "--profile=dev", "cargo-nextest"]).loud()?;
        if !installed.success() {
            let tests = cargo().args(["test", "--workspace", "--no-fail-fast"]);
            return counted(tests, plain_tally);
        }
    }
    let words = ["nextest", "run", "--workspace", "--no-fail-fast", "--color=never"];
    // The summary goes to standard error.
    let script = format!("cargo {} 2>&1", words.join(" "));
    counted(Program::shell(&script).dir(workspace::top()), nextest_tally)
}

fn doc_tests() -> Result<Tally> {
    heading("documentation tests");
    let script = "cargo test --doc --workspace --no-fail-fast 2>&1";
    let mut tally = counted(Program::shell(script).dir(workspace::top()), plain_tally)?;
    // A crate without examples is no failure.
    if tally == Tally::default() {
        tally.passed = 1;
    }
    Ok(tally)
}

/// Runs tests and reads how many there were; a failure that names none still counts.
fn counted(program: Program, read: fn(&str) -> Tally) -> Result<Tally> {
    let (status, text) = program.loud_text()?;
    let mut tally = read(&text);
    if !status.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    Ok(tally)
}

/// `Summary [ 0.1s] 12 tests run: 11 passed (1 slow), 1 failed, 2 skipped`
fn nextest_tally(text: &str) -> Tally {
    let line = text.lines().rfind(|line| line.trim_start().starts_with("Summary ["));
    let counts = line.and_then(|line| line.split_once("run: ")).map_or("", |(_, counts)| counts);
    Tally {
        passed: count_before(counts, "passed"),
        failed: ["failed", "timed out"].iter().map(|word| count_before(counts, word)).sum(),
        skipped: count_before(counts, "skipped"),
    }
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`, once for each crate.
fn plain_tally(text: &str) -> Tally {
    let mut tally = Tally::default();
    for line in text.lines().filter(|line| line.starts_with("test result:")) {
        tally.add(Tally {
            passed: count_before(line, "passed"),
            failed: count_before(line, "failed"),
            skipped: count_before(line, "ignored"),
        });
    }
    tally
}

/// The number that stands before a word.
fn count_before(text: &str, word: &str) -> usize {
    let before = text.find(word).map_or("", |at| text[..at].trim_end());
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}

/// A checker that a machine may lack.
struct Tool {
    program: &'static str,
    package: &'static str,
    words: &'static [&'static str],
}

/// Advisories need a database from the network: left to the day that one looks for them.
const TOOLS: &[Tool] = &[
    Tool { program: "typos", package: "typos-cli", words: &["typos"] },
    Tool { program: "cargo-machete", package: "cargo-machete", words: &["cargo", "machete"] },
    Tool {
        program: "cargo-deny",
        package: "cargo-deny",
        words: &["cargo", "deny", "--offline", "check", "bans", "licenses", "sources"],
    },
];

fn optional(tool: &Tool, install: bool) -> Tally {
    let what = tool.words.join(" ");
    if !process::found(tool.program) && install {
        let installing = cargo().args(["install", "--locked", "--profile=dev", tool.package]);
        if !matches!(installing.loud(), Ok(status) if status.success()) {
            return skip(&what, "it cannot be installed");
        }
    }
    if !process::found(tool.program) {
        return skip(&what, &format!("not installed: cargo install {}", tool.package));
    }
    let (program, words) = tool.words.split_first().unwrap_or((&"false", &[]));
    step(&what, Program::new(program).args(words).dir(workspace::top()))
}

fn fuzz_targets_compile() -> Result<Tally> {
    let what = "fuzz targets compile";
    if !process::found("c++") {
        return Ok(skip(what, "no C++ compiler: apt-get install g++"));
    }
    Ok(step(what, fuzz::compile_check()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_of_nextest_and_of_cargo_test_are_read() {
        let nextest = "\n     Summary [   0.133s] 14 tests run: 11 passed (2 slow), 1 failed, \
                       1 timed out, 3 skipped\n";
        assert_eq!(nextest_tally(nextest), Tally { passed: 11, failed: 2, skipped: 3 });
        let plain = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured\n\
                     test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured\n";
        assert_eq!(plain_tally(plain), Tally { passed: 4, failed: 2, skipped: 1 });
    }
}
