//! `builderd serve`: the settings, then the service.

use super::Failure;
use super::service_args::ServeArgs;

pub(super) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let mut flags = Vec::new();
    if let Some(address) = args.listen {
        flags.push(("--listen", "ADDRESS", address.ip().to_string()));
        flags.push(("--listen", "PORT", address.port().to_string()));
    }
    let config = super::config::load(&args.settings, flags)?;
    crate::serve::run(config).map_err(|error| {
        let hint = error.hint().map(str::to_owned);
        Failure { hint, ..Failure::ours(error) }
    })
}
