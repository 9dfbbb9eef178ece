//! The project's chores: `cargo xtask <chore>`.
#![expect(dead_code, reason = "the chores come one after the other")]

mod arguments;
mod boot;
mod chores;
mod compare;
mod http;
mod images;
mod mount;
mod process;
mod registry;
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
        "serve" => chores::serve(arguments),
        "boot" => chores::boot(arguments),
        "compare" => chores::compare(arguments),
        "images" => images::run(arguments.rest()?),
        other => bail!("unknown chore {other:?}"),
    }
}
