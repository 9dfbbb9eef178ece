//! The `builderd` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    builderd::command::main()
}
