//! The table of settings: every name this service knows, what it means, and what may stand there.
//!
//! Reading, checking, `builderd config` and `docs/configuration.md` are made from this table; a
//! name that is not in it stops the start. A setting whose part of the service does not exist
//! is in it as well, so that it is refused by name and never ignored.

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

const fn later(
    name: &'static str,
    accepts: &'static [&'static str],
    origin: &'static str,
    why: &'static str,
) -> Setting {
    setting(name, Kind::Later { accepts, why }, "", origin, why)
}

const fn never(
    name: &'static str,
    accepts: &'static [&'static str],
    origin: &'static str,
    why: &'static str,
) -> Setting {
    setting(name, Kind::Never { accepts, why }, "", origin, why)
}

const ANY: Kind = Kind::Number { min: 0, max: u32::MAX };
const SOME: Kind = Kind::Number { min: 1, max: u32::MAX };
const PORT: Kind = Kind::Number { min: 1, max: 65_535 };
const TIERS: Kind = Kind::OneOf(&["free", "pro", "enterprise", "dedicated"]);
const LEVELS: Kind = Kind::OneOf(&["trace", "debug", "info", "warn", "error"]);
const TLS_MODES: Kind = Kind::OneOf(&["disabled", "file", "spiffe"]);
const BACKENDS: Kind = Kind::Choice {
    words: &["local", "filesystem", "s3", "minio", "gcs"],
    later: &["nfs", "iscsi", "azure", "ceph", "distributed"],
    why: "mount a file system and use `local`, or an S3-compatible server with `s3`",
};
const DATABASES: Kind = Kind::OneOf(&["sqlite", "postgres", "postgresql"]);
const SSL_MODES: Kind =
    Kind::OneOf(&["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]);

/// Settings in groups, in the order in which they are shown.
pub(crate) const GROUPS: &[(&str, &[Setting])] = &[
    ("Server", SERVER),
    ("TLS", TLS),
    ("Builds", BUILDS),
    ("Storage", STORAGE),
    ("Registries", REGISTRIES),
    ("Tenants", TENANTS),
    ("Database", DATABASE),
    ("Telemetry", TELEMETRY),
    ("Client", CLIENT),
    ("Refused: parts that do not exist yet", LATER),
    ("Refused: things this service does not do", NEVER),
];

const SERVER: &[Setting] = &[
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

const TLS: &[Setting] = &[
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

const BUILDS: &[Setting] = &[
    setting(
        "MAX_CONCURRENT_BUILDS",
        Kind::Number { min: 1, max: 1024 },
        "5",
        "README",
        "Builds that run at once on this node; more wait.",
    ),
    setting(
        "BUILD_TIMEOUT",
        Kind::Duration,
        "15m",
        "README",
        "The longest any build may take. A tenant's own limit may be shorter, never longer.",
    ),
    setting(
        "SCRATCH_DIR",
        Kind::Path,
        "/tmp/builderd",
        "README",
        "Where an artifact is made before it goes to an object store; of this server \
         alone. With local storage artifacts are made in ROOTFS_OUTPUT_DIR, so that \
         publishing is a rename, and this is not used.",
    )
    .dev("builderd-data/scratch"),
    setting(
        "ROOTFS_OUTPUT_DIR",
        Kind::Path,
        "/opt/builderd/rootfs",
        "README",
        "Where artifacts lie with local storage.",
    )
    .dev("builderd-data/rootfs"),
    setting(
        "WORKSPACE_DIR",
        Kind::Path,
        "/opt/builderd/workspace",
        "README",
        "What builds share: the layer cache is `cache` in it unless CACHE_DIR says \
         otherwise. A build has no other files of its own.",
    )
    .dev("builderd-data/workspace"),
    setting(
        "CLEANUP_INTERVAL",
        Kind::Duration,
        "1h",
        "code",
        "How often artifacts that are too old, too many or nobody's are removed.",
    ),
    setting(
        "AUDIT_RETENTION_DAYS",
        Kind::Number { min: 1, max: 36_500 },
        "365",
        "ours",
        "Days after which a row of the audit log is removed.",
    ),
];

const STORAGE: &[Setting] = &[
    setting(
        "STORAGE_BACKEND",
        BACKENDS,
        "local",
        "README",
        "Where artifacts are kept; `filesystem` is `local`, `minio` is `s3`. `nfs`, \
         `iscsi`, `azure`, `ceph` and `distributed` are unimplemented: mount a file \
         system and use `local`, or an S3-compatible server.",
    ),
    setting(
        "ENABLE_ENCRYPTION",
        Kind::Flag,
        "false",
        "guide",
        "Whether artifacts of every tenant are encrypted where they lie (AES-256-GCM, each tenant \
         with keys of its own). Those of the tiers enterprise and dedicated always are. What is \
         encrypted is shared with nobody, and its layers are not kept for later builds.",
    ),
    setting(
        "STORAGE_RETENTION_DAYS",
        SOME,
        "30",
        "README",
        "Days after which an artifact is removed.",
    ),
    setting(
        "STORAGE_MAX_SIZE_GB",
        Kind::Size,
        "100",
        "README",
        "All artifacts together; the oldest go when there are more.",
    )
    .also(&["MAX_STORAGE_SIZE"]),
    setting(
        "STORAGE_CACHE_ENABLED",
        Kind::Flag,
        "true",
        "README",
        "Whether layers are kept for the next build, and whether the same image is built \
         only once.",
    ),
    setting(
        "STORAGE_CACHE_MAX_SIZE_GB",
        Kind::Size,
        "50",
        "README",
        "What the layer cache is pruned to. `builderd build` reads it under the name \
         CACHE_LIMIT.",
    )
    .also(&["CACHE_LIMIT"]),
    setting(
        "CACHE_DIR",
        Kind::Path,
        "",
        "guide",
        "Where the layer cache is; `cache` in WORKSPACE_DIR when empty. `builderd build` \
         reads it, too.",
    ),
    setting("S3_BUCKET", Kind::Text, "", "guide", "Bucket of `s3` and `minio`.")
        .also(&["MINIO_BUCKET"]),
    setting("S3_REGION", Kind::Text, "us-east-1", "guide", "Its region."),
    setting(
        "S3_ENDPOINT",
        Kind::Text,
        "",
        "ours",
        "URL of an S3-compatible server; Amazon's when empty.",
    )
    .also(&["MINIO_ENDPOINT"]),
    setting("S3_ACCESS_KEY_ID", Kind::Text, "", "guide", "Access key.").also(&["MINIO_ACCESS_KEY"]),
    setting("S3_SECRET_ACCESS_KEY", Kind::Secret, "", "guide", "Its secret.")
        .also(&["MINIO_SECRET_KEY"]),
    setting("STORAGE_PREFIX", Kind::Text, "", "ours", "Put before every key of the bucket."),
    setting(
        "S3_ALLOW_HTTP",
        Kind::Flag,
        "false",
        "ours",
        "Whether S3_ENDPOINT may be a plain `http://` URL.",
    ),
    setting("GCS_BUCKET", Kind::Text, "", "guide", "Bucket of `gcs`."),
    setting(
        "GCS_CREDENTIALS_FILE",
        Kind::Path,
        "",
        "guide",
        "Key file of the service account of `gcs`; the machine's own when empty.",
    ),
];

const REGISTRIES: &[Setting] = &[
    setting(
        "DOCKER_REGISTRY_AUTH",
        Kind::Flag,
        "true",
        "README",
        "Whether a build may bring credentials for its registry.",
    ),
    setting(
        "DOCKER_MAX_IMAGE_SIZE_GB",
        Kind::Size,
        "5",
        "README",
        "The largest image, compressed as its registry stores it.",
    ),
    setting(
        "DOCKER_ALLOWED_REGISTRIES",
        Kind::Registries,
        "",
        "code",
        "Registries images may come from, for every tenant, each `HOST[:PORT]`; all when empty \
         or `*`. A tier may allow fewer.",
    )
    .also(&["ALLOWED_REGISTRIES"]),
    setting(
        "DOCKER_PULL_TIMEOUT",
        Kind::Duration,
        "10m",
        "README",
        "How long fetching an image may take.",
    )
    .also(&["DOCKER_TIMEOUT"]),
    setting(
        "DOCKER_REGISTRY_MIRROR",
        Kind::Text,
        "",
        "README",
        "`[HOST=]MIRROR`, with commas between several: ask MIRROR before HOST; without \
         HOST, before Docker Hub. `builderd build` reads it, too.",
    ),
    setting(
        "DOCKER_INSECURE_REGISTRIES",
        Kind::Hosts,
        "",
        "code",
        "`HOST[:PORT]` of registries that are reached over plain HTTP; no other is. \
         `builderd build` reads it, too.",
    ),
    setting(
        "EGRESS_ALLOWED_PRIVATE",
        Kind::Places,
        "",
        "ours",
        "Places that are not public and that builds may fetch from all the same, each `HOST`, \
         `HOST:PORT`, `10.0.0.0/8` or `10.0.0.0/8:PORT`. Mirrors and DOCKER_INSECURE_REGISTRIES \
         need not be named again; metadata services cannot be allowed.",
    ),
    setting(
        "EGRESS_ALLOWED_PRIVATE_OF_TENANTS",
        Kind::PlacesOfTenants,
        "",
        "ours",
        "The same for one tenant alone, each `TENANT=` and a place as in EGRESS_ALLOWED_PRIVATE. A \
         registry of DOCKER_INSECURE_REGISTRIES that stands here as well is for the tenants alone \
         that it is named for. What is fetched like that is shared with no other tenant.",
    ),
    setting(
        "BLOCKED_DOMAINS",
        Kind::Domains,
        "",
        "guide",
        "Domains that builds never fetch from, with all below them: neither as a registry nor by \
         a redirect or as a token server.",
    ),
    setting(
        "DOCKER_PULL_POLICY",
        Kind::Never {
            accepts: &["always", "missing"],
            why: "a registry is always asked what a tag names, and what is known by digest is \
         never fetched again: `always` and `missing` are the same here, `never` is not \
         possible",
        },
        "",
        "guide",
        "`always` and `missing` are what happens anyway: a registry is asked what the tag \
         names, and what is known by digest is not fetched again.",
    ),
];

const TENANTS: &[Setting] = &[
    setting(
        "TENANT_DEFAULT_TIER",
        TIERS,
        "free",
        "README",
        "Tier of a tenant for which none was set.",
    )
    .also(&["DEFAULT_TENANT_TIER"]),
    setting(
        "TENANT_DEFAULT_MAX_MEMORY_BYTES",
        Kind::Size,
        "",
        "README",
        "Memory of one build, in the default tier; the tier table's when empty. So are \
         the next ones.",
    ),
    setting("TENANT_DEFAULT_MAX_CPU_CORES", SOME, "", "README", "CPU cores of one build."),
    setting("TENANT_DEFAULT_MAX_DISK_BYTES", Kind::Size, "", "README", "Disk of one build."),
    setting(
        "TENANT_DEFAULT_TIMEOUT_SECONDS",
        SOME,
        "",
        "README",
        "Wall time of one build, in seconds.",
    ),
    setting(
        "TENANT_DEFAULT_MAX_CONCURRENT_BUILDS",
        SOME,
        "",
        "README",
        "Builds of a tenant that run at once.",
    ),
    setting(
        "TENANT_DEFAULT_MAX_DAILY_BUILDS",
        ANY,
        "",
        "README",
        "Builds of a tenant in one day (UTC).",
    ),
    setting("TENANT_DEFAULT_MAX_STORAGE_BYTES", Kind::Size, "", "code", "Artifacts of a tenant."),
    setting(
        "TENANT_DEFAULT_MAX_BUILD_TIME_MINUTES",
        SOME,
        "",
        "code",
        "Wall time of one build, in minutes; the shorter of both counts.",
    ),
];

const DATABASE: &[Setting] = &[
    setting(
        "DATABASE_TYPE",
        DATABASES,
        "sqlite",
        "code",
        "`sqlite` for one node, `postgres` for several.",
    ),
    setting(
        "DATABASE_DATA_DIR",
        Kind::Path,
        "/opt/builderd/data",
        "code",
        "What this node keeps: the SQLite database `builderd.db` and the master key. Not \
         on a network file system.",
    )
    .dev("builderd-data/data"),
    setting(
        "DATABASE_URL",
        Kind::Secret,
        "",
        "guide",
        "`postgres://user:password@host:port/name?sslmode=…`, in the place of the next \
         six. For SQLite `file:PATH`, which must be `builderd.db` in DATABASE_DATA_DIR.",
    ),
    setting("DATABASE_HOST", Kind::Text, "localhost", "code", "PostgreSQL's host."),
    setting("DATABASE_PORT", PORT, "5432", "code", "Its port."),
    setting("DATABASE_NAME", Kind::Text, "builderd", "code", "The database."),
    setting("DATABASE_USERNAME", Kind::Text, "builderd", "code", "The user."),
    setting("DATABASE_PASSWORD", Kind::Secret, "", "code", "Its password."),
    setting(
        "DATABASE_SSL_MODE",
        SSL_MODES,
        "disable",
        "code",
        "Whether the connection is encrypted, and what is checked.",
    ),
    setting(
        "DATABASE_MAX_CONNECTIONS",
        Kind::Number { min: 2, max: 1000 },
        "25",
        "guide",
        "Connections to PostgreSQL; one more hears of changes. SQLite has one writer and \
         four readers.",
    ),
];

const TELEMETRY: &[Setting] = &[
    setting(
        "OTEL_ENABLED",
        Kind::Flag,
        "false",
        "README",
        "Whether traces and metrics are sent to OTEL_ENDPOINT.",
    ),
    setting(
        "OTEL_SERVICE_NAME",
        Kind::Text,
        "builderd",
        "README",
        "What this service calls itself there.",
    ),
    setting(
        "OTEL_SERVICE_VERSION",
        Kind::Text,
        "",
        "code",
        "Its version; the program's when empty.",
    ),
    setting(
        "OTEL_SAMPLING_RATE",
        Kind::Ratio,
        "1.0",
        "README",
        "Share of the traces that are sent, unless the caller's trace decides.",
    )
    .also(&["OTEL_SAMPLE_RATE"]),
    setting(
        "OTEL_ENDPOINT",
        Kind::Text,
        "localhost:4318",
        "README",
        "OTLP over HTTP: `host:port` or a URL, to which `/v1/traces` and `/v1/metrics` \
         are added.",
    ),
    setting(
        "OTEL_INSECURE",
        Kind::Flag,
        "true",
        "guide",
        "Whether OTEL_ENDPOINT is reached over plain HTTP if it names no scheme.",
    ),
    setting(
        "OTEL_PROMETHEUS_ENABLED",
        Kind::Flag,
        "true",
        "README",
        "Whether `/metrics` has a port of its own; it is on PORT in any case.",
    )
    .also(&["METRICS_ENABLED"]),
    setting("OTEL_PROMETHEUS_PORT", PORT, "9466", "README", "That port.").also(&["METRICS_PORT"]),
    setting(
        "OTEL_PROMETHEUS_INTERFACE",
        Kind::Ip,
        "127.0.0.1",
        "code",
        "The address it listens on.",
    ),
    setting(
        "OTEL_PROMETHEUS_TLS",
        Kind::Flag,
        "true",
        "ours",
        "Whether that port has TLS when the API has, with the same certificates and demands.",
    ),
    setting(
        "OTEL_HIGH_CARDINALITY_ENABLED",
        Kind::Flag,
        "false",
        "code",
        "Whether metrics carry `tenant_id`: one series for each tenant.",
    ),
];

const CLIENT: &[Setting] = &[
    setting(
        "SERVER_ADDRESS",
        Kind::Text,
        "http://localhost:8082",
        "code",
        "The server, for `--server`.",
    )
    .read_by(Reader::Client),
    setting("TOKEN", Kind::Secret, "", "ours", "The token, for `--token`.").read_by(Reader::Client),
    setting("TENANT_ID", Kind::Text, "", "code", "Sent as `X-Tenant-ID`, for `--tenant`.")
        .read_by(Reader::Client),
    setting("CUSTOMER_ID", Kind::Text, "", "ours", "Sent as `X-Customer-ID`, for `--customer`.")
        .also(&["USER_ID"])
        .read_by(Reader::Client),
    setting(
        "SERVER_CA_FILE",
        Kind::Path,
        "",
        "ours",
        "Who signs the server's certificate, in PEM, for `--ca-file`; those that the system \
         trusts when empty.",
    )
    .read_by(Reader::Client),
    setting(
        "CLIENT_CERT_FILE",
        Kind::Path,
        "",
        "ours",
        "The client's certificate, in PEM, for `--cert-file`.",
    )
    .read_by(Reader::Client),
    setting("CLIENT_KEY_FILE", Kind::Path, "", "ours", "Its key, in PEM, for `--key-file`.")
        .read_by(Reader::Client),
];

const LATER: &[Setting] = &[
    later(
        "STORAGE_TLS_*",
        &[],
        "guide",
        "certificates of object stores are those the system trusts",
    ),
    later(
        "ASSETMANAGER_ENABLED",
        &["false"],
        "README",
        "artifacts are not registered with assetmanagerd yet: download them, and set `false`",
    ),
    later("ASSETMANAGER_ENDPOINT", &[], "README", "see ASSETMANAGER_ENABLED"),
    later("S3_ENCRYPTION", &[], "guide", "set the encryption of the bucket itself"),
    later("ISCSI_*", &[], "guide", "mount the volume and use STORAGE_BACKEND=local"),
    later("AZURE_*", &[], "guide", "Azure's store does not exist yet: use `s3` or `gcs`"),
    later("CEPH_*", &[], "guide", "use Ceph's S3 gateway with STORAGE_BACKEND=s3"),
    later(
        "STORAGE_NODES",
        &[],
        "guide",
        "there is no store of our own over several nodes: use `s3` or `gcs`",
    ),
    later(
        "DATABASE_BACKUP_*",
        &[],
        "guide",
        "nothing is backed up by itself: see docs/operations.md",
    ),
];

const NEVER: &[Setting] = &[
    never(
        "USE_PIPELINE_EXECUTOR",
        &["false"],
        "code",
        "there is one engine; leave it out or set `false`",
    ),
    never(
        "TENANT_ISOLATION_ENABLED",
        &["true"],
        "README",
        "tenants are always kept apart; leave it out or set `true`",
    )
    .also(&["ENABLE_ISOLATION"]),
    never(
        "ENABLE_SECCOMP",
        &["true"],
        "guide",
        "foreign bytes and commands are always behind seccomp; leave it out or set `true`",
    ),
    never(
        "ENABLE_CGROUPS",
        &["true"],
        "guide",
        "builds are always held by cgroups; ACCEPT_MISSING_WALLS=cgroup is for a host that has none",
    ),
    never(
        "BUILD_USER_ID",
        &[],
        "guide",
        "each process that touches foreign bytes has a user of its own, which no other has; \
         leave it out",
    )
    .also(&["BUILD_GROUP_ID"]),
    never(
        "APPARMOR_PROFILE",
        &[],
        "guide",
        "workers are shut in by landlock and seccomp; set the service's own profile outside, see \
         AppArmorProfile= in systemd.exec(5)",
    ),
    never(
        "SELINUX_CONTEXT",
        &[],
        "guide",
        "workers are shut in by landlock and seccomp; set the service's own context outside, see \
         SELinuxContext= in systemd.exec(5)",
    ),
    never(
        "NETWORK_MODE",
        &["isolated"],
        "guide",
        "builds are always isolated: COMMANDS_EGRESS says what their commands may reach",
    ),
    never(
        "ENABLE_AUDIT_LOGGING",
        &["true"],
        "guide",
        "the audit log is always written, and kept for AUDIT_RETENTION_DAYS",
    ),
    never(
        "AUDIT_LOG_FILE",
        &[],
        "guide",
        "the audit log is in the database: `builderd admin audit export` writes it to a file",
    ),
    never(
        "TENANT_QUOTA_CHECK_INTERVAL",
        &["5m", "300s"],
        "README",
        "quotas are checked in the transaction that accepts a build, not now and then; \
         leave it out",
    ),
    never(
        "DOCKER_SOCKET",
        &[],
        "guide",
        "no Docker is used: images come straight from their registry; leave it out",
    ),
    never(
        "RATE_LIMIT_ENABLED",
        &["true"],
        "guide",
        "every tier has its rate limit; leave it out or set `true`",
    ),
    never("RATE_LIMIT_REQUESTS", &[], "guide", "each tier has its own rate limit; leave it out"),
    never(
        "HEALTH_CHECK_ENABLED",
        &["true"],
        "guide",
        "`/health` always answers; leave it out or set `true`",
    ),
    never(
        "HEALTH_CHECK_INTERVAL",
        &["30s"],
        "guide",
        "`/health` looks when it is asked, never in between; leave it out",
    ),
    never(
        "DATABASE_IDLE_TIMEOUT",
        &["10m", "600s"],
        "guide",
        "a connection without work is closed after 10 minutes; leave it out",
    ),
    never(
        "DATABASE_PRAGMA_*",
        &[],
        "guide",
        "journal and synchronous mode decide whether an accepted build survives a power \
         failure, so they are fixed; leave it out",
    ),
    never(
        "NFS_*",
        &[],
        "guide",
        "mount the export and use STORAGE_BACKEND=local, with DATABASE_DATA_DIR elsewhere",
    ),
    never("GCS_PROJECT", &[], "guide", "a bucket's name is enough; leave it out"),
];

/// Every setting.
pub(crate) fn all() -> impl Iterator<Item = &'static Setting> {
    GROUPS.iter().flat_map(|(_, settings)| settings.iter())
}

/// The setting called `name`, without the prefix.
pub(super) fn find(name: &str) -> Option<&'static Setting> {
    all().find(|setting| setting.is_called(name))
}
