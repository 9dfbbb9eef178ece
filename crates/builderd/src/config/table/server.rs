//! The server itself: where it listens, what it wants of its host, what it says.

use super::{ANY, Kind, SOME, Setting, setting};

const LEVELS: Kind = Kind::OneOf(&["trace", "debug", "info", "warn", "error"]);

pub(super) const SERVER: &[Setting] = &[
    setting("ADDRESS", Kind::Ip, "0.0.0.0", "README", "Address to listen on.")
        .also(&["HOST"])
        .dev("127.0.0.1"),
    setting(
        "PORT",
        Kind::Number { min: 0, max: 65_535 },
        "8082",
        "README",
        "Port to listen on; 0 takes a free one.",
    ),
    setting(
        "DEV",
        Kind::Flag,
        "false",
        "ours",
        "Development mode: headers and request bodies are believed without a credential. \
         On the loopback address alone, and for requests whose `Host` (and `Origin`) is \
         localhost, 127.0.0.0/8 or [::1]. The same as `--dev`.",
    ),
    setting(
        "CONFIG",
        Kind::Path,
        "",
        "ours",
        "A TOML file with settings, the same as `--config`; not to be set in the file itself.",
    ),
    setting(
        "MASTER_KEY_FILE",
        Kind::Path,
        "",
        "ours",
        "The key under which secrets of waiting builds and the keys of tenants are sealed. When \
         empty: systemd's credential `builderd-master-key` if the service has it, else \
         `master.key` in DATABASE_DATA_DIR, made at the first start. All nodes on one database \
         need the same key: one with another does not start.",
    ),
    setting(
        "SHUTDOWN_TIMEOUT",
        Kind::Duration,
        "15s",
        "README",
        "How long a stopping server waits for its builds and requests; builds that are \
         not done by then go back to the queue.",
    ),
    setting(
        "RATE_LIMIT",
        SOME,
        "100",
        "README",
        "Requests to `/health` that one address may make each second, and as many to `/stats`; \
         an IPv6 address counts as its /64, those behind a proxy as one. Requests of tenants \
         are limited by tier.",
    ),
    setting(
        "MAX_CONNECTIONS_PER_ADDRESS",
        ANY,
        "1000",
        "ours",
        "Connections that one address may have open at once to the API, and as many to the port of \
         the metrics; one more is closed at once. An IPv6 address counts as its /64, those behind a \
         proxy as one: set more where a proxy on another machine stands before many clients. Those \
         of this machine are not counted, and none are when it is 0.",
    ),
    setting(
        "ACCEPT_MISSING_WALLS",
        Kind::Names,
        "",
        "ours",
        "Walls around builds that this host may lack, by the names that the refused start and \
         `/stats` show: `cgroup`, `user-namespace`, `landlock` and so on. Without them hostile \
         images are held back by less. Development mode accepts all.",
    ),
    setting(
        "OCI_RUNTIME",
        Kind::Text,
        "runc",
        "ours",
        "The program that runs the commands of builds (`custom_commands`): a path, or a name in the \
         usual places. It must have runc's command line. Commands need root, loop devices, the \
         file system overlay and `mkfs.ext4` as well; what is missing is named in the log at the \
         start and to whoever asks for commands.",
    ),
    setting(
        "OCI_RUNTIME_ACCEPT_VULNERABLE",
        Kind::Names,
        "",
        "ours",
        "Known holes that the runtime may have, each by its name, as `CVE-2025-31133`; without \
         them a runc before 1.2.8, 1.3.3 or 1.4.0 runs no commands.",
    ),
    setting(
        "COMMANDS_EGRESS",
        Kind::NamesOfTiers,
        "",
        "ours",
        "Hosts that the commands of builds may reach, each `TIER=HOST`, `TIER=HOST:PORT`, \
         `TIER=*.DOMAIN` or `TIER=*`, without a port at 80 and 443: for that tier and those above. \
         Commands of the free tier reach nothing, and none do when empty. They go through a proxy, \
         by HTTP or CONNECT, which is in `http_proxy` and its like. A name that leads to a private \
         address needs EGRESS_ALLOWED_PRIVATE as well; BLOCKED_DOMAINS counts here, too.",
    ),
    setting(
        "COMMANDS_EGRESS_OF_TENANTS",
        Kind::NamesOfTenants,
        "",
        "ours",
        "The same for one tenant of any tier, each `TENANT=` and hosts as in COMMANDS_EGRESS.",
    ),
    setting(
        "COMMANDS_EGRESS_MAX_SIZE_GB",
        Kind::Size,
        "5",
        "ours",
        "What the commands of one build may send and get together.",
    ),
    setting(
        "CORS_ALLOWED_ORIGINS",
        Kind::Names,
        "",
        "ours",
        "Origins whose pages may call the API from a browser (CORS), each as browsers write \
         it: `https://host` or `http://host:port`; `*` alone for every origin, but not in \
         development mode; no page of another origin may when empty. A page sends its token \
         itself: cookies are never asked for.",
    ),
    setting("LOG_LEVEL", LEVELS, "info", "guide", "What is logged."),
    setting(
        "LOG_FORMAT",
        Kind::OneOf(&["json", "text"]),
        "json",
        "guide",
        "One JSON object for each line, or text for people.",
    ),
];
