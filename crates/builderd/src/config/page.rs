//! The settings as people read them: the effective ones, the whole table, and
//! `docs/configuration.md`, which is made here and compared by a test.

use std::fmt::Write as _;

use super::settings::Settings;
use super::table::{self, GROUPS, PREFIX, Setting};

/// Every setting that holds, as `NAME=value`; with where it comes from if wanted.
pub(crate) fn effective(settings: &Settings, with_origin: bool) -> String {
    let mut text = String::new();
    for setting in table::all().filter(|setting| !setting.is_refused()) {
        let Some(chosen) = settings.chosen(setting.name) else { continue };
        let line = format!("{PREFIX}{}={}", setting.name, chosen.value);
        // Writing to a string never fails.
        let _ = match with_origin {
            true => writeln!(text, "{line:<64} # {}", chosen.origin),
            false => writeln!(text, "{line}"),
        };
    }
    text
}

/// What the settings whose names contain `word` mean.
pub(crate) fn explain(word: &str) -> String {
    let word = word.to_ascii_uppercase();
    let word = word.strip_prefix(PREFIX).unwrap_or(&word);
    let mut text = String::new();
    for (group, settings) in GROUPS {
        let found = |setting: &&Setting| setting.names().any(|name| name.contains(word));
        for (index, setting) in settings.iter().filter(found).enumerate() {
            if index == 0 {
                let _ = writeln!(text, "{group}\n");
            }
            let names: Vec<String> =
                setting.names().map(|name| format!("{PREFIX}{name}")).collect();
            let _ = writeln!(text, "  {}", names.join(", "));
            let _ = writeln!(
                text,
                "      {} ({}{})\n",
                setting.meaning,
                kind(setting),
                shown_default(setting)
            );
        }
    }
    text
}

fn kind(setting: &Setting) -> String {
    setting.kind.in_words()
}

fn shown_default(setting: &Setting) -> String {
    match (setting.default, setting.dev_default) {
        ("", _) => String::new(),
        (default, None) => format!(", default {default}"),
        (default, Some(dev)) => format!(", default {default}, with --dev {dev}"),
    }
}

const HEAD: &str = "\
# Configuration

<!-- Made by `builderd config --document > docs/configuration.md`; a test compares it. -->

A setting is a flag, a variable of the environment, a key of a TOML file (`--config FILE`), or its
default; the first that is there holds. In a file the name is written without the prefix and in
lower case, at the top or in tables: `storage_backend = \"s3\"`, or `backend = \"s3\"` below
`[storage]`. An empty value is no value.

`builderd config` prints what holds, `builderd config --origin` also where each value comes from,
`builderd config --explain WORD` what settings mean.

A value that cannot be read stops the start, and so does a name nobody knows: every problem is told
at once, by name, with what is expected. Where a setting has two names both work; if both are set
they must agree. Durations are Go's (`15s`, `1h30m`, `1.5h`). Sizes are bytes, or have a unit
(`512MB`, `100GB`; powers of 1024).

What only a store, a database or a mode of TLS reads that is not chosen (`S3_BUCKET` beside local storage,
`DATABASE_HOST` beside SQLite) stops the start as well, unless it says what stands there anyway.

\"From\" says whose setting it is: of the README or the configuration guide (`guide`) of the service
whose API this one has, of its program (`code`), or `ours`.
";

/// `docs/configuration.md`.
pub(crate) fn document() -> String {
    let mut text = String::from(HEAD);
    for (group, settings) in GROUPS {
        let refused = settings.iter().all(Setting::is_refused);
        let _ = match refused {
            true => write!(
                text,
                "\n## {group}\n\nAnything but the accepted values stops the start, with the \
                 reason.\n\n| setting | accepted | from | why |\n|---|---|---|---|\n"
            ),
            false => write!(
                text,
                "\n## {group}\n\n| setting | value | default | from | meaning |\n\
                 |---|---|---|---|---|\n"
            ),
        };
        for setting in *settings {
            text.push_str(&row(setting, refused));
        }
    }
    text
}

fn row(setting: &Setting, refused: bool) -> String {
    let names: Vec<String> = setting.names().map(|name| format!("`{PREFIX}{name}`")).collect();
    let names = names.join("<br>");
    let (kind, origin, meaning) = (kind(setting), setting.origin, setting.meaning);
    if refused {
        return format!("| {names} | {kind} | {origin} | {meaning} |\n");
    }
    let default = match (setting.default, setting.dev_default) {
        ("", _) => String::new(),
        (default, None) => format!("`{default}`"),
        (default, Some(dev)) => format!("`{default}`; `--dev`: `{dev}`"),
    };
    format!("| {names} | {kind} | {default} | {origin} | {meaning} |\n")
}

#[cfg(test)]
mod tests {
    use super::super::settings::Sources;
    use super::*;

    #[test]
    fn the_page_in_docs_is_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == document(),
            "docs/configuration.md is old: `builderd config --document > docs/configuration.md`"
        );
    }

    #[test]
    fn secrets_are_not_printed() {
        let environment = ["TOKEN", "S3_SECRET_ACCESS_KEY", "DATABASE_URL", "DATABASE_PASSWORD"]
            .map(|name| (format!("{PREFIX}{name}"), "canary".to_owned()))
            .to_vec();
        let settings = Settings::resolve(&Sources { environment, ..Sources::default() }).unwrap();
        let text = effective(&settings, true);
        assert!(!text.contains("canary"), "{text}");
        assert_eq!(text.matches("=***").count(), 4, "{text}");
    }

    #[test]
    fn what_is_printed_is_what_can_be_set() {
        let settings = Settings::resolve(&Sources::default()).unwrap();
        let lines = effective(&settings, false);
        let lines = lines.lines().filter_map(|line| line.split_once('='));
        let environment: Vec<_> =
            lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let again = Settings::resolve(&Sources { environment, ..Sources::default() }).unwrap();
        assert_eq!(effective(&again, false), effective(&settings, false));
    }

    #[test]
    fn a_setting_can_be_explained() {
        let text = explain("unkey_builderd_rate_limit");
        assert!(text.contains("UNKEY_BUILDERD_RATE_LIMIT\n"), "{text}");
        assert!(text.contains("RATE_LIMIT_REQUESTS"), "{text}");
        assert!(!text.contains("PORT"), "{text}");
    }
}
