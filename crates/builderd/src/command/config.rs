//! `builderd config`, and how every command that needs settings gets them.

use super::Failure;
use super::service_args::{ConfigArgs, SettingsArgs};
use crate::config::{self, Config, ConfigError, PREFIX, Sources};

pub(super) fn run(args: &ConfigArgs) -> Result<(), Failure> {
    if args.document {
        print(&config::document());
        return Ok(());
    }
    if let Some(word) = &args.explain {
        let text = config::explain(word);
        if text.is_empty() {
            return Err(Failure::usage(format!("no setting has `{word}` in its name")));
        }
        print(&text);
        return Ok(());
    }
    // What holds is shown only if the service would start with it.
    let (settings, _) = resolved(Config::load(&sources(&args.settings, Vec::new())?))?;
    print(&config::effective(&settings, args.origin));
    Ok(())
}

fn print(text: &str) {
    for line in text.lines() {
        put!("{line}");
    }
}

/// What the flags, the environment and the file say, checked.
pub(super) fn load(
    args: &SettingsArgs,
    flags: Vec<(&'static str, &'static str, String)>,
) -> Result<Config, Failure> {
    let (_, config) = resolved(Config::load(&sources(args, flags)?))?;
    Ok(config)
}

fn sources(
    args: &SettingsArgs,
    mut flags: Vec<(&'static str, &'static str, String)>,
) -> Result<Sources, Failure> {
    if args.dev {
        flags.push(("--dev", "DEV", "true".into()));
    }
    let environment = config::variables();
    let named = format!("{PREFIX}CONFIG");
    let from_environment = environment
        .iter()
        .find(|(name, path)| *name == named && !path.is_empty())
        .map(|(_, path)| path.into());
    if let Some(path) = &args.config {
        flags.push(("--config", "CONFIG", path.display().to_string()));
    }
    let file = match args.config.clone().or(from_environment) {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(&path).map_err(|error| {
                let path = path.display();
                Failure::usage(format!("the settings in {path} cannot be read: {error}"))
            })?;
            Some((path, text))
        }
    };
    Ok(Sources { flags, environment, file, credentials: config::credentials() })
}

/// Every problem on a line of its own.
pub(super) fn resolved<T>(result: Result<T, ConfigError>) -> Result<T, Failure> {
    result.map_err(|error| {
        let message = match error.problems.as_slice() {
            [problem] => problem.clone(),
            problems => {
                for problem in problems {
                    tell!("error: {}", super::text::printable(problem));
                }
                format!("{} settings cannot be used", problems.len())
            }
        };
        let hint = Some("see `builderd config --explain WORD`, docs/configuration.md".to_owned());
        Failure { code: Failure::USAGE, error: message.into(), hint }
    })
}
