//! How the doors are secured: `TLS_*` and `SPIFFE_SOCKET`. A setting that asks for TLS while
//! there is to be none is a mistake, not a wish for plain text.

use std::path::PathBuf;

use super::PREFIX;
use super::settings::Settings;

/// TLS of the doors.
#[derive(Clone, Debug)]
pub(crate) struct TlsConfig {
    /// Where certificates come from.
    pub(crate) source: TlsSource,
    /// Whether clients show theirs.
    pub(crate) client_auth: ClientAuth,
    /// Whose certificates are known, and what each may do.
    pub(crate) clients_file: Option<PathBuf>,
    /// Whether the port of its own for metrics has TLS, too.
    pub(crate) for_metrics: bool,
}

/// Where certificates come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TlsSource {
    /// PEM files.
    Files {
        /// The server's chain.
        certificate: PathBuf,
        /// Its key.
        key: PathBuf,
        /// Who signs clients' certificates.
        ca: Option<PathBuf>,
        /// What they have revoked.
        revoked: Option<PathBuf>,
    },
    /// SPIFFE's Workload API.
    Spiffe {
        /// The agent's socket.
        socket: PathBuf,
    },
}

/// Whether clients show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientAuth {
    /// They are not asked.
    None,
    /// They may; a bad one is refused.
    Optional,
    /// They must.
    Required,
}

impl ClientAuth {
    /// As it stands in the setting.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Optional => "optional",
            Self::Required => "required",
        }
    }
}

/// Those that mean nothing without TLS, or in its other mode.
const OF_FILES: [&str; 4] = ["TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CA_FILE", "TLS_CRL_FILE"];
const OF_BOTH: [&str; 2] = ["TLS_CLIENT_AUTH", "TLS_CLIENTS_FILE"];

/// None for plain text.
pub(super) fn tls(settings: &Settings, problems: &mut Vec<String>) -> Option<TlsConfig> {
    let mode = mode(settings, problems);
    let [certificate, key, ca, revoked] = OF_FILES.map(|name| settings.path(name));
    let (socket, clients_file) =
        (settings.path("SPIFFE_SOCKET"), settings.path("TLS_CLIENTS_FILE"));
    let demand = settings.text("TLS_CLIENT_AUTH");
    let for_metrics = settings.flag("OTEL_PROMETHEUS_TLS");
    let mut useless: Vec<&str> = match mode {
        Mode::Disabled => OF_FILES.into_iter().chain(OF_BOTH).collect(),
        Mode::File => Vec::new(),
        Mode::Spiffe => OF_FILES.to_vec(),
    };
    // The socket has a default: who names it and no mode expects the README's, which is SPIFFE.
    if mode == Mode::Disabled && !settings.is_set("TLS_MODE") {
        useless.push("SPIFFE_SOCKET");
    }
    for name in useless.into_iter().filter(|name| settings.is_set(name)) {
        problems.push(format!(
            "{} is set, but {PREFIX}TLS_MODE is `{}`: set the mode that uses it, or leave it out",
            settings.written(name),
            mode.as_str()
        ));
    }
    let source = match mode {
        Mode::Disabled => return None,
        Mode::Spiffe => TlsSource::Spiffe { socket: socket.unwrap_or_default() },
        Mode::File => {
            let mut needed = |name: &str, path: Option<PathBuf>| {
                path.unwrap_or_else(|| {
                    problems.push(format!("{PREFIX}{name} is not set: TLS_MODE `file` needs it"));
                    PathBuf::new()
                })
            };
            let certificate = needed("TLS_CERT_FILE", certificate);
            TlsSource::Files { certificate, key: needed("TLS_KEY_FILE", key), ca, revoked }
        }
    };
    if let TlsSource::Spiffe { socket } = &source
        && !socket.is_absolute()
    {
        let name = settings.written("SPIFFE_SOCKET");
        problems.push(format!("{name} is `{}`, expected an absolute path", socket.display()));
    }
    let has_authorities = !matches!(&source, TlsSource::Files { ca: None, .. });
    let client_auth = match demand.as_deref() {
        Some("optional") => ClientAuth::Optional,
        Some("required") => ClientAuth::Required,
        Some(_) => ClientAuth::None,
        None if has_authorities => ClientAuth::Required,
        None => ClientAuth::None,
    };
    if client_auth != ClientAuth::None && !has_authorities {
        problems.push(format!(
            "{} is `{}`, but {PREFIX}TLS_CA_FILE is not set: it says whose certificates count",
            settings.written("TLS_CLIENT_AUTH"),
            client_auth.as_str()
        ));
    }
    let revokes = matches!(&source, TlsSource::Files { revoked: Some(_), .. });
    let of_clients = [("TLS_CLIENTS_FILE", clients_file.is_some()), ("TLS_CRL_FILE", revokes)];
    for (name, is_set) in of_clients {
        if is_set && client_auth == ClientAuth::None {
            problems.push(format!(
                "{} is set, but no client is asked for a certificate: set {PREFIX}TLS_CLIENT_AUTH{}",
                settings.written(name),
                if has_authorities { "" } else { " and TLS_CA_FILE" }
            ));
        }
    }
    Some(TlsConfig { source, client_auth, clients_file, for_metrics })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Disabled,
    File,
    Spiffe,
}

impl Mode {
    fn as_str(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::File => "file",
            Self::Spiffe => "spiffe",
        }
    }
}

/// `TLS_MODE`, or its older form `TLS_ENABLED`, which only knows files.
fn mode(settings: &Settings, problems: &mut Vec<String>) -> Mode {
    let mode = match settings.text("TLS_MODE").as_deref() {
        Some("file") => Mode::File,
        Some("spiffe") => Mode::Spiffe,
        _ => Mode::Disabled,
    };
    let enabled = settings.flag("TLS_ENABLED");
    match (settings.is_set("TLS_ENABLED"), settings.is_set("TLS_MODE")) {
        (false, _) => mode,
        (true, false) if enabled => Mode::File,
        (true, false) => mode,
        (true, true) => {
            if enabled == (mode == Mode::Disabled) {
                problems.push(format!(
                    "{} and {} differ: set TLS_MODE alone",
                    settings.written("TLS_ENABLED"),
                    settings.written("TLS_MODE")
                ));
            }
            mode
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Sources};
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<TlsConfig>, String> {
        let owned = |(name, text): &(&str, &str)| (format!("{PREFIX}{name}"), (*text).to_owned());
        let environment = variables.iter().map(owned).collect();
        let loaded = Config::load(&Sources { environment, ..Sources::default() });
        loaded.map(|(_, config)| config.tls).map_err(|error| error.to_string())
    }

    const FILES: [(&str, &str); 3] =
        [("TLS_MODE", "file"), ("TLS_CERT_FILE", "/c"), ("TLS_KEY_FILE", "/k")];

    #[test]
    fn clients_are_asked_for_certificates_where_somebody_signs_them() {
        assert!(read(&[]).unwrap().is_none());
        assert!(read(&[("TLS_MODE", "disabled"), ("SPIFFE_SOCKET", "/s")]).unwrap().is_none());
        assert!(read(&[("TLS_MODE", "disabled"), ("TLS_ENABLED", "false")]).unwrap().is_none());
        let plain = read(&FILES).unwrap().unwrap();
        assert_eq!((plain.client_auth, plain.for_metrics), (ClientAuth::None, true));
        let ca = ("TLS_CA_FILE", "/a");
        let mutual = read(&[FILES[0], FILES[1], FILES[2], ca]).unwrap().unwrap();
        assert_eq!(mutual.client_auth, ClientAuth::Required);
        let optional = ("TLS_CLIENT_AUTH", "optional");
        let enabled = ("TLS_ENABLED", "true");
        let either = read(&[enabled, FILES[1], FILES[2], ca, optional]).unwrap().unwrap();
        assert_eq!(either.client_auth, ClientAuth::Optional);
        let lists = ("TLS_CRL_FILE", "/r");
        let strict = read(&[FILES[0], FILES[1], FILES[2], ca, lists]).unwrap().unwrap();
        let [certificate, key, ca, revoked] = ["/c", "/k", "/a", "/r"].map(PathBuf::from);
        let (ca, revoked) = (Some(ca), Some(revoked));
        assert_eq!(strict.source, TlsSource::Files { certificate, key, ca, revoked });
        let spiffe = read(&[("TLS_MODE", "spiffe")]).unwrap().unwrap();
        let socket = "/run/spire/sockets/agent.sock".into();
        assert_eq!(spiffe.source, TlsSource::Spiffe { socket });
        assert_eq!(spiffe.client_auth, ClientAuth::Required);
    }

    #[test]
    fn a_wish_for_tls_that_cannot_be_met_stops_the_start() {
        let (clients, lists) = (("TLS_CLIENTS_FILE", "/x"), ("TLS_CRL_FILE", "/x"));
        for (variables, word) in [
            (vec![("TLS_MODE", "file")], "TLS_CERT_FILE is not set"),
            (vec![("TLS_MODE", "file"), FILES[1]], "TLS_KEY_FILE is not set"),
            (vec![FILES[1]], "TLS_MODE is `disabled`"),
            (vec![("SPIFFE_SOCKET", "/s")], "TLS_MODE is `disabled`"),
            (vec![("TLS_MODE", "spiffe"), FILES[1]], "TLS_MODE is `spiffe`"),
            (vec![("TLS_MODE", "spiffe"), ("SPIFFE_SOCKET", "s")], "absolute path"),
            (vec![("TLS_MODE", "spiffe"), ("TLS_ENABLED", "false")], "differ"),
            (vec![("TLS_MODE", "disabled"), ("TLS_ENABLED", "true")], "differ"),
            ([&FILES[..], &[("TLS_CLIENT_AUTH", "required")]].concat(), "TLS_CA_FILE is not set"),
            ([&FILES[..], &[clients]].concat(), "no client is asked"),
            ([&FILES[..], &[lists]].concat(), "TLS_CRL_FILE is set, but no client is asked"),
            (vec![lists], "TLS_MODE is `disabled`"),
            (vec![("TLS_MODE", "spiffe"), lists], "TLS_MODE is `spiffe`"),
        ] {
            let problem = read(&variables).map(drop).unwrap_err();
            assert!(problem.contains(word), "{word}: {problem}");
        }
    }
}
