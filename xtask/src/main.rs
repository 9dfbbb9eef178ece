//! The project's chores: `cargo xtask <chore>`.

mod apidoc;
mod arguments;
mod bench;
mod boot;
mod check;
mod chores;
mod compare;
mod demo;
mod fuzz;
mod http;
mod images;
mod machine;
mod mount;
mod mutations;
mod process;
mod registry;
mod service;
mod stories;
#[cfg(test)]
mod tidy;
mod workspace;

use std::process::ExitCode;

use anyhow::{Result, bail};
use arguments::Arguments;

const HELP: &str = "\
usage: cargo xtask CHORE
  demo                 make an image, serve it, build it by the command and by the service,
                       check it, boot it; [--binary FILE]
  test                 everything that CI checks; [--no-stories] [--install]
  soak                 the stories at full size
  bench                the peers' table; [--images a,b] [--runs N] [--peer-runs N] [--no-peers]
                       [--no-failing-peers] [--no-series] [--reflink xfs|btrfs|none]
                       [--binary FILE]
  bench --service      the service's figures; [--binary FILE]
  bench --isolation    what shutting in costs; [--runs N] [--noise WORD] [--binary FILE]
  attacks              attack a service of its own and print the table; [--binary FILE]
                       [--programs DIR] [--dir DIR]
  docs                 write docs/api.md from the proto file
  fuzz [TARGET...]     every parser of foreign bytes; [--seconds N]
  mutations            take the queue's fence out and see that the tests notice
  stories [WORDS]      stories whose sentence contains WORDS; [--full] [--binary FILE] [--seed N]
  images [NAME...]     make the test images
  serve [NAME...]      serve them from a registry until standard input ends
  boot IMAGE [COMMAND] boot an image in QEMU and run a command of its shell; [--keep]
  compare IMAGE LAYOUT an image beside an independent unpack; [--reference umoci|overlay|podman]
  floor REF OUTPUT     the least that any builder must do with an image's bytes
";

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
    if words.first().is_some_and(|word| word == "--help" || word == "-h") {
        print!("{HELP}");
        return Ok(());
    }
    let arguments = Arguments::new(words);
    match chore.as_str() {
        "demo" => demo::run(arguments),
        "test" => check::test(arguments),
        "soak" => check::soak(arguments),
        "attacks" => stories::attacks::run(arguments),
        "bench" => bench::run(arguments),
        "docs" => arguments.end().and_then(|()| apidoc::run()),
        "fuzz" => fuzz::run(arguments),
        "stories" => stories(arguments),
        "images" => images::run(arguments.rest()?),
        "serve" => chores::serve(arguments),
        "mutations" => arguments.end().and_then(|()| mutations::run()),
        "boot" => chores::boot(arguments),
        "compare" => chores::compare(arguments),
        "floor" => floor(arguments),
        "" | "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => bail!("unknown chore {other:?}\n{HELP}"),
    }
}

/// `cargo xtask floor REFERENCE OUTPUT`: what `bench` measures everything against.
fn floor(arguments: Arguments) -> Result<()> {
    let words = arguments.rest()?;
    let [reference, output] = &words[..] else { bail!("wanted: REFERENCE OUTPUT") };
    bench::floor::run(reference, output.as_ref())
}

/// `cargo xtask stories [WORDS] [--full] [--binary FILE] [--seed N]`: some of what `test` and `soak` run.
fn stories(mut arguments: Arguments) -> Result<()> {
    let size = if arguments.flag("--full") { stories::Size::Full } else { stories::Size::Reduced };
    let binary = arguments.value("--binary")?.map(Into::into);
    let seed = arguments.number("--seed")?;
    let words = arguments.rest()?.join(" ");
    machine::require(machine::ALL)?;
    let tally = stories::run(size, &words, binary, seed)?;
    println!("{tally}");
    if tally.failed > 0 {
        bail!("{} stories failed", tally.failed);
    }
    Ok(())
}
