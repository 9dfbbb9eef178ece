//! The table of settings: every name this service knows, what it means, and what may stand there.
//!
//! Reading, checking, `builderd config` and `docs/configuration.md` are made from this table; a
//! name that is not in it stops the start. A setting whose part of the service does not exist
//! is in it as well, so that it is refused by name and never ignored. The rows themselves stand
//! in a file for each group.

mod builds;
mod client;
mod database;
mod refused;
mod registries;
mod server;
mod storage;
mod telemetry;
mod tenants;
mod tls;

/// The beginning of every name in the environment.
pub(crate) const PREFIX: &str = "UNKEY_BUILDERD_";

/// What may stand in a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything.
    Text,
    /// Anything, and it is never shown.
    Secret,
    /// A file or directory.
    Path,
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Number {
        /// The smallest.
        min: u32,
        /// The largest.
        max: u32,
    },
    /// A number from 0.0 to 1.0.
    Ratio,
    /// A duration, as Go writes it.
    Duration,
    /// Bytes, or with a unit; under a name that ends in `_GB` a number of GiB.
    Size,
    /// Words, with commas between them.
    Names,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// One of these words; others are known, but do not exist yet.
    Choice {
        /// The words.
        words: &'static [&'static str],
        /// The others.
        later: &'static [&'static str],
        /// What is there instead of them.
        why: &'static str,
    },
    /// `HOST[:PORT]`, several with commas.
    Hosts,
    /// Registries as images are told apart by them, or `*`, several with commas.
    Registries,
    /// Hosts and networks that are not public, each with a port perhaps, several with commas.
    Places,
    /// The same, each with a tenant and `=` before it.
    PlacesOfTenants,
    /// Hosts that commands may reach, each with a tier and `=` before it, several with commas.
    NamesOfTiers,
    /// The same, each with a tenant and `=` before it.
    NamesOfTenants,
    /// Domains, several with commas.
    Domains,
    /// An IP address, or `localhost`.
    Ip,
    /// Of a part that does not exist yet: anything but these values is refused.
    Later {
        /// Values that ask for nothing.
        accepts: &'static [&'static str],
        /// What is there instead.
        why: &'static str,
    },
    /// Of something that this service does not do: anything but these values is refused.
    Never {
        /// Values that ask for nothing, or for what happens anyway.
        accepts: &'static [&'static str],
        /// Why, and what to do.
        why: &'static str,
    },
}

impl Kind {
    /// In a word, for people.
    pub(super) fn in_words(self) -> String {
        match self {
            Self::Text => "text".into(),
            Self::Secret => "secret".into(),
            Self::Path => "path".into(),
            Self::Flag => "true or false".into(),
            Self::Number { .. } => "number".into(),
            Self::Ratio => "0.0 to 1.0".into(),
            Self::Duration => "duration".into(),
            Self::Size => "size".into(),
            Self::Names
            | Self::Hosts
            | Self::Registries
            | Self::Places
            | Self::PlacesOfTenants
            | Self::NamesOfTiers
            | Self::NamesOfTenants
            | Self::Domains => "list".into(),
            Self::OneOf(words) | Self::Choice { words, .. } => words.join(", "),
            Self::Ip => "address".into(),
            Self::Later { accepts, .. } if !accepts.is_empty() => accepts.join(", "),
            Self::Never { accepts, .. } if !accepts.is_empty() => accepts.join(", "),
            Self::Later { .. } | Self::Never { .. } => "none".into(),
        }
    }
}

/// Who reads a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    /// `builderd serve` and the commands that work on its database.
    Server,
    /// The commands that talk to a server.
    Client,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// Its name, without [`PREFIX`]; the last sign is `*` for all names that begin so.
    pub(crate) name: &'static str,
    /// Other names for the same thing.
    pub(crate) others: &'static [&'static str],
    /// What may stand there.
    pub(crate) kind: Kind,
    /// What stands there if nothing was said; nothing when empty.
    pub(crate) default: &'static str,
    /// The same under `--dev`, where it differs.
    pub(crate) dev_default: Option<&'static str>,
    /// Where it comes from: `README`, `guide` (the configuration guide), `code` (the service
    /// this one follows) or `ours`.
    pub(crate) origin: &'static str,
    /// Who reads it.
    pub(crate) reader: Reader,
    /// What it means.
    pub(crate) meaning: &'static str,
}

impl Setting {
    const fn also(self, others: &'static [&'static str]) -> Self {
        Self { others, ..self }
    }

    const fn dev(self, default: &'static str) -> Self {
        Self { dev_default: Some(default), ..self }
    }

    const fn said_in(self, origin: &'static str) -> Self {
        Self { origin, ..self }
    }

    const fn read_by(self, reader: Reader) -> Self {
        Self { reader, ..self }
    }

    /// Whether `name`, without the prefix, is a name of this setting.
    pub(super) fn is_called(&self, name: &str) -> bool {
        let matches = |own: &str| match own.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => own == name,
        };
        matches(self.name) || self.others.iter().any(|other| matches(other))
    }

    /// Every name of the setting.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.others.iter().copied())
    }

    /// Whether it is refused, whatever it says.
    pub(super) fn is_refused(&self) -> bool {
        matches!(self.kind, Kind::Later { .. } | Kind::Never { .. })
    }

    /// Whether what stands there may be shown, in errors too.
    pub(super) fn may_be_shown(&self) -> bool {
        self.kind != Kind::Secret && !self.name.ends_with('*')
    }
}

const fn setting(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    origin: &'static str,
    meaning: &'static str,
) -> Setting {
    let (others, dev_default, reader): (&[&str], _, _) = (&[], None, Reader::Server);
    Setting { name, others, kind, default, dev_default, origin, reader, meaning }
}

const fn later(name: &'static str, why: &'static str) -> Setting {
    later_but(name, &[], why)
}

/// The same, with words that ask for nothing.
const fn later_but(
    name: &'static str,
    accepts: &'static [&'static str],
    why: &'static str,
) -> Setting {
    setting(name, Kind::Later { accepts, why }, "", "guide", why)
}

const fn never(name: &'static str, why: &'static str) -> Setting {
    never_but(name, &[], why)
}

/// The same, with words that ask for nothing, or for what happens anyway.
const fn never_but(
    name: &'static str,
    accepts: &'static [&'static str],
    why: &'static str,
) -> Setting {
    setting(name, Kind::Never { accepts, why }, "", "guide", why)
}

const ANY: Kind = Kind::Number { min: 0, max: u32::MAX };
const SOME: Kind = Kind::Number { min: 1, max: u32::MAX };
const PORT: Kind = Kind::Number { min: 1, max: 65_535 };

/// Settings in groups, in the order in which they are shown.
pub(crate) const GROUPS: &[(&str, &[Setting])] = &[
    ("Server", server::SERVER),
    ("TLS", tls::TLS),
    ("Builds", builds::BUILDS),
    ("Storage", storage::STORAGE),
    ("Registries", registries::REGISTRIES),
    ("Tenants", tenants::TENANTS),
    ("Database", database::DATABASE),
    ("Telemetry", telemetry::TELEMETRY),
    ("Client", client::CLIENT),
    ("Refused: parts that do not exist yet", refused::LATER),
    ("Refused: things this service does not do", refused::NEVER),
];

/// Every setting.
pub(crate) fn all() -> impl Iterator<Item = &'static Setting> {
    GROUPS.iter().flat_map(|(_, settings)| settings.iter())
}

/// The setting called `name`, without the prefix.
pub(super) fn find(name: &str) -> Option<&'static Setting> {
    all().find(|setting| setting.is_called(name))
}
