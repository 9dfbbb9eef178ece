//! Certificates: ours and those of clients.

use super::{Kind, Setting, setting};

const TLS_MODES: Kind = Kind::OneOf(&["disabled", "file", "spiffe"]);

pub(super) const TLS: &[Setting] = &[
    setting(
        "TLS_MODE",
        TLS_MODES,
        "disabled",
        "README",
        "`file`: certificates from files. `spiffe`: from SPIFFE's Workload API. `disabled`: plain \
         HTTP. A mode that cannot be had stops the start. Certificates that change are taken \
         without a restart.",
    ),
    setting("TLS_ENABLED", Kind::Flag, "", "guide", "`true` is TLS_MODE=file, `false` disabled."),
    setting(
        "TLS_CERT_FILE",
        Kind::Path,
        "",
        "code",
        "With `file`: the server's certificate and those between it and the root, in PEM. This \
         file and the next ones are read at SIGHUP and every 30 s; bad ones are not used.",
    ),
    setting("TLS_KEY_FILE", Kind::Path, "", "code", "With `file`: its private key, in PEM."),
    setting(
        "TLS_CA_FILE",
        Kind::Path,
        "",
        "code",
        "With `file`: who signs clients' certificates, in PEM; clients are not asked for one when \
         empty.",
    ),
    setting(
        "TLS_CRL_FILE",
        Kind::Path,
        "",
        "ours",
        "With TLS_CA_FILE: the revocation lists of everybody who signs clients' certificates, in \
         PEM, one of each. A certificate of somebody whose list is missing, or has run out, is \
         refused.",
    ),
    setting(
        "TLS_CLIENT_AUTH",
        Kind::OneOf(&["none", "optional", "required"]),
        "",
        "ours",
        "Whether clients show a certificate. When empty: `required` with TLS_CA_FILE and with \
         `spiffe`, else `none`.",
    ),
    setting(
        "TLS_CLIENTS_FILE",
        Kind::Path,
        "",
        "ours",
        "A TOML file that says which tenant each client certificate acts for, by the exact URI \
         in it (docs/operations.md); without it every client needs a token. With `spiffe` only \
         ids in it may connect, and without it every id of the trust domain.",
    ),
    setting(
        "SPIFFE_SOCKET",
        Kind::Path,
        "/run/spire/sockets/agent.sock",
        "README",
        "With `spiffe`: the agent's socket.",
    ),
];
