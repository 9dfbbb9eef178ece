//! The command line: arguments → what they mean → the engine → what the user sees.

#[macro_use]
mod text;

mod admin;
mod args;
mod audit;
mod build;
mod builds;
mod cache;
mod client;
mod client_tls;
mod config;
mod download;
mod inspect;
mod interrupt;
mod keys;
mod progress;
mod quotas;
mod serve;
mod service_args;
mod token;

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::build::{Blame, BuildError};
use crate::causes::causes;
use args::{Args, Command};

/// How a command ends when it does not end well.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    error: Box<dyn Error + Send + Sync>,
    hint: Option<String>,
}

impl Failure {
    /// Exit code for a wrong command line, as clap's own.
    const USAGE: u8 = 2;

    fn usage(message: impl Into<String>) -> Self {
        Self { code: Self::USAGE, error: message.into().into(), hint: Some("see --help".into()) }
    }

    fn ours(error: impl Error + Send + Sync + 'static) -> Self {
        Self { code: 1, error: Box::new(error), hint: None }
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        let code = match error.blame() {
            _ if error.is_out_of_space() => 5,
            Blame::Ours => 1,
            Blame::Yours => 3,
            Blame::Upstream => 4,
        };
        let hint = error.hint();
        Self { code, error: Box::new(error), hint }
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    raise_descriptor_limit();
    let result = match Args::parse().command {
        Command::Build(args) => build::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Cache(args) => cache::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Builds(args) => builds::run(&args),
        Command::Quotas(args) => quotas::quotas(&args),
        Command::Stats(args) => quotas::stats(&args),
        Command::Token(args) => token::tokens(&args),
        Command::Admin(args) => admin::run(&args),
        Command::Tenant(args) => token::tenants(&args),
        Command::BuildChild => crate::build::child::main().map_err(Failure::ours),
        Command::BuildSum => crate::build::worker::build_sum().map_err(Failure::ours),
        Command::CommandsProcess { role } => ::commands::main(&role).map_err(Failure::ours),
        Command::Confined => crate::build::confined::main().map_err(Failure::ours),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "builderd", &mut script);
            text::given(std::io::stdout().write_all(&script));
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.code == 0 => ExitCode::SUCCESS,
        Err(failure) => {
            report(&failure);
            ExitCode::from(failure.code)
        }
    }
}

/// Every layer's pack stays open until the image is written, and an image may have 1,024 of them,
/// as many as the usual soft limit of open files (getrlimit(2)). That one is low for the sake of
/// select(2), which nothing here uses.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Refused, all goes on as before: most images have some dozen layers.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// The error, its causes and the remedy, on standard error.
fn report(failure: &Failure) {
    for (place, words) in causes(&*failure.error).iter().enumerate() {
        let before = if place == 0 { "error" } else { "  caused by" };
        tell!("{before}: {}", text::printable(words));
    }
    if let Some(hint) = &failure.hint {
        tell!("hint: {}", text::printable(hint));
    }
}
