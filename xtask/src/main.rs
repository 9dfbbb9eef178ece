//! The project's chores: `cargo xtask <chore>`.
#![expect(dead_code, reason = "the chores come one after the other")]

mod arguments;
mod bench;
mod boot;
mod chores;
mod compare;
mod http;
mod images;
mod mount;
mod process;
mod registry;
mod stories;
mod workspace;

use std::process::ExitCode;

use anyhow::{Result, bail};
use arguments::Arguments;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let chore = if words.is_empty() { String::new() } else { words.remove(0) };
    let arguments = Arguments::new(words);
    match chore.as_str() {
        "bench" => bench::run(arguments),
        "stories" => stories(arguments),
        "serve" => chores::serve(arguments),
        "boot" => chores::boot(arguments),
        "compare" => chores::compare(arguments),
        "floor" => {
            let words = arguments.rest()?;
            bench::floor::run(&words[0], std::path::Path::new(&words[1]))
        }
        "images" => images::run(arguments.rest()?),
        other => bail!("unknown chore {other:?}"),
    }
}

/// `cargo xtask stories [WORDS] [--full] [--binary FILE]`: some of what `test` and `soak` run.
fn stories(mut arguments: Arguments) -> Result<()> {
    let size = if arguments.flag("--full") { stories::Size::Full } else { stories::Size::Reduced };
    let binary = arguments.value("--binary")?.map(Into::into);
    let tally = stories::run(size, &arguments.rest()?.join(" "), binary)?;
    println!("{tally}");
    if tally.failed > 0 {
        bail!("{} stories failed", tally.failed);
    }
    Ok(())
}
