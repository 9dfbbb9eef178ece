//! What was set where, and what holds: flag > environment > file > default.
//!
//! Nothing is ever skipped: a name nobody knows, a value nobody can read and two names of one
//! setting that disagree are problems, and all of them are told at once.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;

use super::table::{self, PREFIX, Reader, Setting};
use super::value::Value;

/// Where settings come from.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// Flags: how the flag is written, the setting's name, its value.
    pub(crate) flags: Vec<(&'static str, &'static str, String)>,
    /// The environment's variables with our prefix.
    pub(crate) environment: Vec<(String, String)>,
    /// A TOML file: where it is, what is in it.
    pub(crate) file: Option<(PathBuf, String)>,
    /// Where systemd puts the credentials of this service, if it has any.
    pub(crate) credentials: Option<PathBuf>,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nobody said anything.
    Default,
    /// A key of the file.
    File {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: String,
    },
    /// A variable.
    Environment(String),
    /// A flag.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, key } => write!(f, "{}: {key}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// Everything that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.problems.join("; "))]
pub(crate) struct ConfigError {
    /// One line each: the name, what it says, what is expected.
    pub(crate) problems: Vec<String>,
}

/// One thing that was written somewhere.
struct Word {
    /// The name, without prefix and in capitals.
    name: String,
    text: String,
    origin: Origin,
}

/// What holds for one setting.
#[derive(Clone, Debug)]
pub(crate) struct Chosen {
    /// The value.
    pub(crate) value: Value,
    /// Who said so.
    pub(crate) origin: Origin,
}

/// What holds for every setting.
#[derive(Debug)]
pub(crate) struct Settings {
    chosen: BTreeMap<&'static str, Chosen>,
    credentials: Option<PathBuf>,
    /// What cannot be read of them, and is as if nobody had said it.
    broken: BTreeSet<&'static str>,
    /// Whether somebody asked for one of those.
    met_broken: Cell<bool>,
    /// Names that somebody asked for, so that a test finds those nobody does.
    read: RefCell<BTreeSet<&'static str>>,
}

impl Settings {
    /// Reads all sources against the table.
    pub(crate) fn resolve(sources: &Sources) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let settings = Self::read(sources, &mut problems);
        match problems.is_empty() {
            true => Ok(settings),
            false => Err(ConfigError { problems }),
        }
    }

    /// The same, with what cannot be read left out.
    pub(super) fn read(sources: &Sources, problems: &mut Vec<String>) -> Self {
        let mut broken = BTreeSet::new();
        let file = match &sources.file {
            Some((path, text)) => {
                let words = file_words(path, text, problems);
                // Whatever stands in it.
                words.unwrap_or_else(|| {
                    broken.extend(table::all().map(|setting| setting.name));
                    Vec::new()
                })
            }
            None => Vec::new(),
        };
        let mut chosen = BTreeMap::new();
        for words in [flag_words(sources), environment_words(sources), file] {
            for (name, value) in read_layer(&words, &mut broken, problems) {
                chosen.entry(name).or_insert(value);
            }
        }
        let is_dev = matches!(chosen.get("DEV"), Some(Chosen { value: Value::Flag(true), .. }));
        for setting in table::all() {
            let default = setting.dev_default.filter(|_| is_dev).unwrap_or(setting.default);
            let value = match default {
                "" => Ok(Value::Unset),
                text => setting.kind.read(setting.name, text),
            };
            match value {
                Ok(value) => {
                    let unsaid = Chosen { value, origin: Origin::Default };
                    chosen.entry(setting.name).or_insert(unsaid);
                }
                Err(expected) => problems.push(format!("{}: default: {expected}", setting.name)),
            }
        }
        let (credentials, met_broken) = (sources.credentials.clone(), Cell::new(false));
        Self { chosen, credentials, broken, met_broken, read: RefCell::default() }
    }

    /// Does `look`, and takes what it finds wrong with settings together unless one of them cannot be
    /// read: that one is told of already, and what it would come to is not known.
    pub(super) fn judge<T>(
        &self,
        problems: &mut Vec<String>,
        look: impl FnOnce(&mut Vec<String>) -> T,
    ) -> T {
        self.met_broken.set(false);
        let mut found = Vec::new();
        let done = look(&mut found);
        if !self.met_broken.get() {
            problems.append(&mut found);
        }
        done
    }

    fn meet(&self, name: &str) {
        if self.broken.contains(name) {
            self.met_broken.set(true);
        }
    }

    /// What a client needs of the environment, below its flags: a client does not mind what a
    /// server on the same machine is told.
    pub(crate) fn of_client(
        flags: Vec<(&'static str, &'static str, String)>,
    ) -> Result<Self, ConfigError> {
        let is_ours = |(variable, _): &(String, String)| {
            let name = variable.strip_prefix(PREFIX);
            let setting = name.and_then(table::find);
            setting.is_some_and(|setting| setting.reader == Reader::Client)
        };
        let environment = super::variables().into_iter().filter(is_ours).collect();
        Self::resolve(&Sources { flags, environment, ..Sources::default() })
    }

    /// What holds for a setting, and who said so.
    pub(crate) fn chosen(&self, name: &str) -> Option<&Chosen> {
        self.chosen.get(name)
    }

    /// Whether somebody set it.
    pub(crate) fn is_set(&self, name: &'static str) -> bool {
        self.meet(name);
        self.chosen.get(name).is_some_and(|chosen| chosen.origin != Origin::Default)
    }

    /// Refuses those of `names` that somebody set to something else than what stands there anyway:
    /// what `choice` says leaves nobody to read them.
    pub(super) fn refuse_unused(
        &self,
        names: &[&'static str],
        choice: &'static str,
        problems: &mut Vec<String>,
    ) {
        self.meet(choice);
        let chosen = self.chosen.get(choice).map(|chosen| chosen.value.to_string());
        for &name in names {
            if !self.is_changed(name) {
                continue;
            }
            problems.push(format!(
                "{} is set, but {PREFIX}{choice} is `{}`, which has no use for it: set the one that \
                 has, or leave it out",
                self.written(name),
                chosen.as_deref().unwrap_or_default()
            ));
        }
    }

    /// Whether it was set to something else than its default.
    fn is_changed(&self, name: &'static str) -> bool {
        let Some(setting) = table::find(name) else { return false };
        let default = match setting.default {
            "" => None,
            text => setting.kind.read(setting.name, text).ok(),
        };
        self.is_set(name) && self.chosen.get(name).map(|chosen| &chosen.value) != default.as_ref()
    }

    /// How the user wrote the name of a setting, for errors.
    pub(crate) fn written(&self, name: &'static str) -> String {
        match self.chosen.get(name).map(|chosen| &chosen.origin) {
            None | Some(Origin::Default) => format!("{PREFIX}{name}"),
            Some(origin) => origin.to_string(),
        }
    }

    /// The names that nobody asked for.
    #[cfg(test)]
    pub(super) fn unread(&self) -> BTreeSet<&'static str> {
        let read = self.read.borrow();
        self.chosen.keys().copied().filter(|name| !read.contains(name)).collect()
    }

    fn value(&self, name: &'static str) -> Option<&Value> {
        self.read.borrow_mut().insert(name);
        self.meet(name);
        debug_assert!(self.chosen.contains_key(name), "{name} is not in the table");
        self.chosen.get(name).map(|chosen| &chosen.value)
    }

    /// Words; none if unset.
    pub(crate) fn text(&self, name: &'static str) -> Option<String> {
        match self.value(name) {
            Some(Value::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }

    /// A secret; none if unset.
    pub(crate) fn secret(&self, name: &'static str) -> Option<SecretString> {
        match self.value(name) {
            Some(Value::Secret(secret)) => Some(secret.clone()),
            _ => None,
        }
    }

    /// A path; none if unset.
    pub(crate) fn path(&self, name: &'static str) -> Option<PathBuf> {
        match self.value(name) {
            Some(Value::Path(path)) => Some(path.clone()),
            _ => None,
        }
    }

    /// The file of a credential, if the service has it.
    pub(crate) fn credential(&self, name: &str) -> Option<PathBuf> {
        self.credentials.as_ref().map(|directory| directory.join(name)).filter(|file| file.exists())
    }

    /// Yes or no.
    pub(crate) fn flag(&self, name: &'static str) -> bool {
        matches!(self.value(name), Some(Value::Flag(true)))
    }

    /// A number; none if unset.
    pub(crate) fn number(&self, name: &'static str) -> Option<u32> {
        match self.value(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// A port.
    pub(crate) fn port(&self, name: &'static str) -> u16 {
        self.number(name).and_then(|port| u16::try_from(port).ok()).unwrap_or_default()
    }

    /// A share.
    pub(crate) fn ratio(&self, name: &'static str) -> f64 {
        match self.value(name) {
            Some(Value::Ratio(ratio)) => *ratio,
            _ => 0.0,
        }
    }

    /// A stretch of time.
    pub(crate) fn duration(&self, name: &'static str) -> Duration {
        match self.value(name) {
            Some(Value::Duration(duration)) => *duration,
            _ => Duration::ZERO,
        }
    }

    /// Bytes; none if unset.
    pub(crate) fn size(&self, name: &'static str) -> Option<u64> {
        match self.value(name) {
            Some(Value::Size(bytes)) => Some(*bytes),
            _ => None,
        }
    }

    /// Words.
    pub(crate) fn names(&self, name: &'static str) -> Vec<String> {
        match self.value(name) {
            Some(Value::Names(names)) => names.clone(),
            _ => Vec::new(),
        }
    }

    /// An address; none if unset.
    pub(crate) fn ip(&self, name: &'static str) -> Option<IpAddr> {
        match self.value(name) {
            Some(Value::Ip(ip)) => Some(*ip),
            _ => None,
        }
    }
}

fn flag_words(sources: &Sources) -> Vec<Word> {
    let word = |(flag, name, text): &(&'static str, &'static str, String)| Word {
        name: (*name).to_owned(),
        text: text.clone(),
        origin: Origin::Flag(flag),
    };
    sources.flags.iter().map(word).collect()
}

fn environment_words(sources: &Sources) -> Vec<Word> {
    let word = |(variable, text): &(String, String)| {
        let name = variable.strip_prefix(PREFIX)?.to_owned();
        Some(Word { name, text: text.clone(), origin: Origin::Environment(variable.clone()) })
    };
    sources.environment.iter().filter_map(word).collect()
}

/// The file's words: `port = 8082`, or a table `[storage]` with `backend = "s3"`; none if it is no
/// TOML.
fn file_words(path: &Path, text: &str, problems: &mut Vec<String>) -> Option<Vec<Word>> {
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => {
            let error = error.to_string().replace('\n', " ");
            problems.push(format!("{} is no TOML: {error}", path.display()));
            return None;
        }
    };
    let mut words = Vec::new();
    let mut tables = vec![(String::new(), table)];
    while let Some((above, table)) = tables.pop() {
        for (key, value) in table {
            let key = format!("{above}{key}");
            if let toml::Value::Table(inner) = value {
                tables.push((format!("{key}_"), inner));
                continue;
            }
            let text = plain_text(&value);
            let name = key.to_ascii_uppercase();
            let name = name.strip_prefix(PREFIX).unwrap_or(&name).to_owned();
            let origin = Origin::File { path: path.to_owned(), key };
            match text {
                _ if name == "CONFIG" => {
                    problems.push(format!("{origin}: a file cannot name the file to read"));
                }
                None => problems.push(format!("{origin}: expected a value or a list of values")),
                Some(text) => words.push(Word { name, text, origin }),
            }
        }
    }
    Some(words)
}

/// A value as it would stand in the environment; none if it cannot.
fn plain_text(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(format!("{number:?}")),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Datetime(moment) => Some(moment.to_string()),
        toml::Value::Array(items) => {
            let texts: Option<Vec<String>> = items.iter().map(plain_text).collect();
            texts.map(|texts| texts.join(","))
        }
        toml::Value::Table(_) => None,
    }
}

/// What one source says, setting by setting; which of them cannot be read goes to `broken`.
fn read_layer(
    words: &[Word],
    broken: &mut BTreeSet<&'static str>,
    problems: &mut Vec<String>,
) -> BTreeMap<&'static str, Chosen> {
    let mut layer: BTreeMap<&'static str, Chosen> = BTreeMap::new();
    // Empty is unset, as every document shows it (`…_MIRROR=""`).
    for word in words.iter().filter(|word| !word.text.is_empty()) {
        let Some(setting) = table::find(&word.name) else {
            problems.push(unknown(word));
            continue;
        };
        match setting.kind.read(&word.name, &word.text) {
            Err(expected) => {
                broken.insert(setting.name);
                problems.push(unreadable(setting, word, &expected));
            }
            Ok(value) => {
                let new = Chosen { value, origin: word.origin.clone() };
                match layer.get(setting.name) {
                    Some(old) if old.value != new.value => {
                        broken.insert(setting.name);
                        problems.push(format!(
                            "{} and {} are two names of one setting and differ: set one of them",
                            old.origin, new.origin
                        ));
                    }
                    Some(_) => {}
                    None => {
                        layer.insert(setting.name, new);
                    }
                }
            }
        }
    }
    layer
}

fn unreadable(setting: &Setting, word: &Word, expected: &str) -> String {
    let text = if setting.may_be_shown() { word.text.as_str() } else { "***" };
    let origin = &word.origin;
    match setting.is_refused() || expected.starts_with("unimplemented") {
        true => format!("{origin} is `{text}`: {expected}"),
        false => format!("{origin} is `{text}`, expected {expected}"),
    }
}

fn unknown(word: &Word) -> String {
    let known = table::all().flat_map(Setting::names).filter(|name| !name.ends_with('*'));
    let nearest = known.map(|name| (distance(&word.name, name), name)).min();
    let hint = match nearest {
        Some((distance, name)) if distance <= (word.name.len() / 3).max(2) => {
            let name = match &word.origin {
                Origin::File { .. } => name.to_ascii_lowercase(),
                Origin::Default | Origin::Environment(_) | Origin::Flag(_) => {
                    format!("{PREFIX}{name}")
                }
            };
            format!("did you mean {name}?")
        }
        _ => "see `builderd config --explain` for all of them".to_owned(),
    };
    format!("{} is no setting: {hint}", word.origin)
}

/// How many letters must be added, removed or changed to get from one word to the other
/// (Levenshtein's distance).
fn distance(one: &str, two: &str) -> usize {
    let two: Vec<char> = two.chars().collect();
    let mut row: Vec<usize> = (0..=two.len()).collect();
    for (index, letter) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, other) in two.iter().enumerate() {
            let change = diagonal + usize::from(letter != *other);
            diagonal = row[column + 1];
            row[column + 1] = change.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[two.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Sources {
        let owned = |(name, text): &(&str, &str)| (format!("{PREFIX}{name}"), (*text).to_owned());
        Sources { environment: variables.iter().map(owned).collect(), ..Sources::default() }
    }

    fn problems(variables: &[(&str, &str)]) -> Vec<String> {
        match Settings::resolve(&environment(variables)) {
            Ok(_) => Vec::new(),
            Err(error) => error.problems,
        }
    }

    fn problem(name: &str, text: &str) -> String {
        let mut problems = problems(&[(name, text)]);
        assert_eq!(problems.len(), 1, "{name}={text}: {problems:?}");
        let problem = problems.remove(0);
        assert!(problem.contains(&format!("{PREFIX}{name}")), "not by name: {problem}");
        problem
    }

    #[test]
    fn every_default_can_be_read() {
        let settings = Settings::resolve(&Sources::default()).unwrap();
        for setting in table::all() {
            let chosen = settings.chosen(setting.name).unwrap();
            assert_eq!(chosen.origin, Origin::Default);
            assert_eq!(chosen.value == Value::Unset, setting.default.is_empty(), "{setting:?}");
        }
        let dev = Settings::resolve(&environment(&[("DEV", "true")])).unwrap();
        assert_eq!(dev.ip("ADDRESS").unwrap().to_string(), "127.0.0.1");
    }

    #[test]
    fn no_name_stands_in_the_table_twice() {
        let mut seen = BTreeSet::new();
        for name in table::all().flat_map(Setting::names) {
            assert!(seen.insert(name), "{name}");
            assert!(!name.starts_with(PREFIX), "{name}");
        }
        for name in seen.iter().filter(|name| !name.ends_with('*')) {
            let found: Vec<_> =
                table::all().filter(|setting| setting.is_called(name)).map(|s| s.name).collect();
            assert_eq!(found.len(), 1, "{name} is read as {found:?}");
        }
    }

    #[test]
    fn flag_before_environment_before_file_before_default() {
        let file = "port = 1111\nshutdown_timeout = \"1h30m\"\nlog_level = \"warn\"\n";
        let sources = Sources {
            flags: vec![("--listen", "PORT", "3333".into())],
            file: Some(("some.toml".into(), file.into())),
            ..environment(&[("PORT", "2222"), ("LOG_LEVEL", "debug")])
        };
        let settings = Settings::resolve(&sources).unwrap();
        assert_eq!(settings.port("PORT"), 3333);
        assert_eq!(settings.text("LOG_LEVEL").unwrap(), "debug");
        assert_eq!(settings.duration("SHUTDOWN_TIMEOUT"), Duration::from_secs(5400));
        assert_eq!(settings.number("RATE_LIMIT"), Some(100));
        let origin = |name| settings.chosen(name).unwrap().origin.to_string();
        assert_eq!(origin("PORT"), "--listen");
        assert_eq!(origin("LOG_LEVEL"), "UNKEY_BUILDERD_LOG_LEVEL");
        assert_eq!(origin("SHUTDOWN_TIMEOUT"), "some.toml: shutdown_timeout");
        assert_eq!(origin("RATE_LIMIT"), "default");
    }

    #[test]
    fn a_file_may_have_tables_and_lists() {
        let file = "[storage]\nbackend = \"minio\"\nmax_size_gb = 7\n[otel]\nenabled = true\n\
                    sampling_rate = 0.5\n[docker]\n\
                    allowed_registries = [\"ghcr.io\", \"quay.io\"]\n";
        let file = Some(("x.toml".into(), file.to_owned()));
        let settings = Settings::resolve(&Sources { file, ..Sources::default() }).unwrap();
        assert_eq!(settings.text("STORAGE_BACKEND").unwrap(), "minio");
        assert_eq!(settings.size("STORAGE_MAX_SIZE_GB"), Some(7 << 30));
        assert!(settings.flag("OTEL_ENABLED"));
        assert!((settings.ratio("OTEL_SAMPLING_RATE") - 0.5).abs() < f64::EPSILON);
        assert_eq!(settings.names("DOCKER_ALLOWED_REGISTRIES"), ["ghcr.io", "quay.io"]);
        for bad in ["port = ", "prot = 1", "config = \"y.toml\"", "[port]\nx = 1"] {
            let file = Some(("x.toml".into(), bad.to_owned()));
            let error = Settings::resolve(&Sources { file, ..Sources::default() }).unwrap_err();
            assert!(error.to_string().contains("x.toml"), "{error}");
        }
    }

    #[test]
    fn both_names_of_a_setting_work_and_may_not_disagree() {
        for (one, two, same, other) in [
            ("TENANT_DEFAULT_TIER", "DEFAULT_TENANT_TIER", ("pro", "pro"), "free"),
            ("STORAGE_MAX_SIZE_GB", "MAX_STORAGE_SIZE", ("100", "100GB"), "100"),
            ("DOCKER_PULL_TIMEOUT", "DOCKER_TIMEOUT", ("5m", "300s"), "10m"),
            ("ADDRESS", "HOST", ("127.0.0.1", "localhost"), "0.0.0.0"),
            ("OTEL_SAMPLING_RATE", "OTEL_SAMPLE_RATE", ("0.50", ".5"), "1"),
            ("S3_SECRET_ACCESS_KEY", "MINIO_SECRET_KEY", ("canary-1", "canary-1"), "canary-2"),
        ] {
            assert_eq!(problems(&[(one, same.0)]), [""; 0], "{one}");
            assert_eq!(problems(&[(two, same.1)]), [""; 0], "{two}");
            assert_eq!(problems(&[(one, same.0), (two, same.1)]), [""; 0], "{one} {two}");
            let found = problems(&[(one, same.0), (two, other)]);
            assert_eq!(found.len(), 1, "{one} {two}");
            assert!(found[0].contains(one) && found[0].contains(two), "{found:?}");
            assert!(!found[0].contains("canary"), "{found:?}");
        }
    }

    #[test]
    fn a_bad_value_is_named_and_what_is_expected_is_said() {
        for (name, text, expected) in [
            ("PORT", "http", "from 0 to 65535"),
            ("PORT", "70000", "from 0 to 65535"),
            ("PORT", "-1", "whole number"),
            ("MAX_CONCURRENT_BUILDS", "0", "from 1"),
            ("MAX_CONCURRENT_BUILDS", "many", "whole number"),
            ("BUILD_TIMEOUT", "15", "15s"),
            ("BUILD_TIMEOUT", "0s", "more than 0"),
            ("BUILD_TIMEOUT", "-15m", "duration"),
            ("STORAGE_MAX_SIZE_GB", "0", "GiB"),
            ("STORAGE_MAX_SIZE_GB", "lots", "GiB"),
            ("MAX_STORAGE_SIZE", "100XB", "100GB"),
            ("DOCKER_MAX_IMAGE_SIZE_GB", "5.5", "GiB"),
            ("OTEL_SAMPLING_RATE", "1.5", "0.0 to 1.0"),
            ("OTEL_SAMPLING_RATE", "NaN", "0.0 to 1.0"),
            ("OTEL_ENABLED", "yes", "true or false"),
            ("STORAGE_BACKEND", "floppy", "`local`"),
            ("TENANT_DEFAULT_TIER", "gold", "`enterprise`"),
            ("ADDRESS", "example.com", "IP address"),
            ("LOG_LEVEL", "loud", "`info`"),
            ("DATABASE_TYPE", "oracle", "`postgres`"),
        ] {
            let problem = problem(name, text);
            assert!(problem.contains(text) && problem.contains(expected), "{problem}");
        }
        assert_eq!(problems(&[("PORT", "x"), ("RATE_LIMIT", "y")]).len(), 2, "all are told");
    }

    #[test]
    fn what_does_not_exist_yet_is_refused_by_name() {
        for (name, text) in [
            ("ASSETMANAGER_ENABLED", "true"),
            ("STORAGE_BACKEND", "nfs"),
            ("STORAGE_BACKEND", "ceph"),
            ("AZURE_ACCESS_KEY", "canary"),
        ] {
            let problem = problem(name, text);
            assert!(problem.contains("unimplemented"), "{problem}");
            assert!(!problem.contains("canary"), "{problem}");
        }
        for (name, text) in [
            ("USE_PIPELINE_EXECUTOR", "true"),
            ("TENANT_ISOLATION_ENABLED", "false"),
            ("ENABLE_ISOLATION", "false"),
            ("ENABLE_SECCOMP", "0"),
            ("ENABLE_CGROUPS", "false"),
            ("BUILD_USER_ID", "0"),
            ("APPARMOR_PROFILE", "p"),
            ("NETWORK_MODE", "host"),
            ("DOCKER_SOCKET", "/var/run/docker.sock"),
            ("DOCKER_PULL_POLICY", "never"),
            ("RATE_LIMIT_REQUESTS", "100"),
            ("NFS_SERVER", "host"),
            ("DATABASE_PRAGMA_SYNCHRONOUS", "NORMAL"),
        ] {
            assert!(problem(name, text).contains("refused"), "{name}");
        }
        for (name, text) in [
            ("TLS_MODE", "disabled"),
            ("ASSETMANAGER_ENABLED", "false"),
            ("TENANT_ISOLATION_ENABLED", "1"),
            ("ENABLE_SECCOMP", "1"),
            ("ENABLE_CGROUPS", "true"),
            ("NETWORK_MODE", "isolated"),
            ("USE_PIPELINE_EXECUTOR", "F"),
            ("TENANT_QUOTA_CHECK_INTERVAL", "5m"),
            ("DOCKER_PULL_POLICY", "always"),
            ("TLS_CERT_FILE", ""),
        ] {
            assert_eq!(problems(&[(name, text)]), [""; 0], "{name}={text} asks for nothing");
        }
    }

    #[test]
    fn a_name_nobody_knows_is_an_error_with_a_suggestion() {
        assert!(problem("PROT", "1").contains("did you mean UNKEY_BUILDERD_PORT?"));
        let found = problem("STORAGE_RETENTION_DAY", "1");
        assert!(found.contains("did you mean UNKEY_BUILDERD_STORAGE_RETENTION_DAYS?"), "{found}");
        assert!(problem("SOMETHING_ELSE_ENTIRELY", "1").contains("--explain"));
    }

    #[test]
    fn empty_means_unset() {
        let settings = Settings::resolve(&environment(&[("PORT", ""), ("S3_REGION", "")])).unwrap();
        assert_eq!(settings.port("PORT"), 8082);
        assert_eq!(settings.text("S3_REGION").unwrap(), "us-east-1");
    }
}
