use super::Failure;
use super::args::InspectArgs;

pub(super) fn run(args: &InspectArgs) -> Result<(), Failure> {
    Err(Failure::usage(format!("{args:?}")))
}
