//! What the user wrote to the commands of the service.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use secrecy::SecretString;

use super::args::CompressionArg;
use crate::build::record::Micros;
use crate::config::parse_duration;
use crate::tenant::{NAME_BYTES_MAX, Right, TenantId, Tier};

/// Most registries of a tenant's own.
const REGISTRIES_MAX: usize = 100;
/// Longest note of a token, in bytes.
const NOTE_BYTES_MAX: usize = 1024;

const SERVER_HELP: &str = "Server";

const BUILDS_EXAMPLES: &str = "\
Examples:
  builderd builds create nginx --follow
  builderd builds create ghcr.io/org/app:1.4 --label env=prod --compression zstd
  echo $PASSWORD | builderd builds create registry.example.com/app --username me --password-stdin
  builderd builds list --state failed
  builderd builds logs -f build_01HZQQR7X8N9PN0Z2KG5WV7H3M
  builderd builds download build_01HZQQR7X8N9PN0Z2KG5WV7H3M -o rootfs.ext4

Exit codes:
  0    done; with --follow: the build completed
  1    the server failed, or the build failed by its fault, or it was cancelled
  2    wrong command line
  3    the request or the image is at fault (not found, not allowed, malformed, over a quota)
  4    the server, a registry or the network cannot be reached; trying again may help
  5    out of disk space
  130  interrupted";

/// Which settings.
#[derive(Debug, Args)]
pub(super) struct SettingsArgs {
    /// A TOML file with settings [env: UNKEY_BUILDERD_CONFIG]
    #[arg(long, value_name = "FILE", global = true)]
    pub(super) config: Option<PathBuf>,

    /// Development mode: on the loopback address alone, everybody is believed, and data goes
    /// below ./builderd-data
    #[arg(long, global = true)]
    pub(super) dev: bool,
}

#[derive(Debug, Parser)]
#[command(after_help = "Every setting: `builderd config --explain`, docs/configuration.md")]
pub(super) struct ServeArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,

    /// Where to listen [env: UNKEY_BUILDERD_ADDRESS, UNKEY_BUILDERD_PORT] [default: 0.0.0.0:8082]
    #[arg(long, value_name = "IP:PORT")]
    pub(super) listen: Option<std::net::SocketAddr>,
}

#[derive(Debug, Parser)]
pub(super) struct ConfigArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,

    /// Say where each value comes from
    #[arg(long)]
    pub(super) origin: bool,

    /// Say what settings mean: those whose name contains WORD, or all
    #[arg(long, value_name = "WORD", num_args = 0..=1, default_missing_value = "",
          conflicts_with = "origin")]
    pub(super) explain: Option<String>,

    /// Print docs/configuration.md
    #[arg(long, hide = true, conflicts_with_all = ["origin", "explain"])]
    pub(super) document: bool,
}

/// Which server, and who asks.
#[derive(Debug, Args)]
#[command(next_help_heading = SERVER_HELP)]
pub(super) struct ServerArgs {
    /// The server [env: UNKEY_BUILDERD_SERVER_ADDRESS] [default: http://localhost:8082]
    #[arg(long, value_name = "URL", global = true)]
    pub(super) server: Option<String>,

    /// The token; the environment is the better place for it [env: UNKEY_BUILDERD_TOKEN]
    #[arg(long, value_name = "TOKEN", global = true)]
    pub(super) token: Option<String>,

    /// The tenant, where no token says it (development mode) [env: UNKEY_BUILDERD_TENANT_ID]
    #[arg(long, value_name = "TENANT", global = true)]
    pub(super) tenant: Option<String>,

    /// The customer within the tenant [env: UNKEY_BUILDERD_CUSTOMER_ID]
    #[arg(long, value_name = "CUSTOMER", global = true)]
    pub(super) customer: Option<String>,

    /// Who signs the server's certificate, in PEM, instead of those that the system trusts
    /// [env: UNKEY_BUILDERD_SERVER_CA_FILE]
    #[arg(long, value_name = "FILE", global = true)]
    pub(super) ca_file: Option<String>,

    /// The client's certificate, in PEM [env: UNKEY_BUILDERD_CLIENT_CERT_FILE]
    #[arg(long, value_name = "FILE", global = true)]
    pub(super) cert_file: Option<String>,

    /// Its key, in PEM [env: UNKEY_BUILDERD_CLIENT_KEY_FILE]
    #[arg(long, value_name = "FILE", global = true)]
    pub(super) key_file: Option<String>,
}

/// How an answer is printed.
#[derive(Debug, Args)]
pub(super) struct FormatArgs {
    /// How the answer is printed
    #[arg(short = 'o', long = "format", value_enum, default_value_t = Format::Text)]
    pub(super) format: Format,
}

impl FormatArgs {
    pub(super) fn is_json(&self) -> bool {
        self.format == Format::Json
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    Text,
    /// As the server sent it
    Json,
}

#[derive(Debug, Parser)]
#[command(after_help = BUILDS_EXAMPLES)]
pub(super) struct BuildsArgs {
    #[command(flatten)]
    pub(super) server: ServerArgs,

    #[command(subcommand)]
    pub(super) command: BuildsCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum BuildsCommand {
    /// Ask for a build; prints its id
    Create(Box<CreateArgs>),
    /// Show a build
    Get {
        /// The build
        id: String,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// List builds, newest first
    List {
        /// Only builds in this state; may be repeated
        #[arg(long, value_enum)]
        state: Vec<StateArg>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Print a build's log
    Logs {
        /// The build
        id: String,
        /// Go on until the build has ended
        #[arg(short, long)]
        follow: bool,
        /// Begin at this line, counted from 0
        #[arg(long, value_name = "N", default_value_t = 0)]
        from: u64,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Cancel a build that waits or runs
    Cancel {
        /// The build
        id: String,
        /// Why, for its record
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Delete a build with its log and its claim on the artifact
    Delete {
        /// The build
        id: String,
        /// Cancel it first if it has not ended
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Fetch the artifact of a completed build
    Download {
        /// The build
        id: String,
        /// Where the artifact goes; an interrupted download is taken up again
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Ask for the same build again
    Retry {
        /// The build
        id: String,
        #[command(flatten)]
        credentials: CredentialArgs,
        /// Print the log until the build has ended
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        format: FormatArgs,
    },
}

#[derive(Debug, Parser)]
pub(super) struct CreateArgs {
    /// The image, as `docker pull` takes it
    pub(super) image: String,

    /// Print the log until the build has ended; the exit code says how
    #[arg(short, long)]
    pub(super) follow: bool,

    /// How the artifact is stored and downloaded
    #[arg(long, value_enum)]
    pub(super) compression: Option<CompressionArg>,

    /// The image may not be larger than this, uncompressed
    #[arg(long, value_name = "SIZE", value_parser = super::text::parse_size)]
    pub(super) size_limit: Option<u64>,

    /// A label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(super) label: Vec<(String, String)>,

    /// What you call the build
    #[arg(long)]
    pub(super) name: Option<String>,

    #[command(flatten)]
    pub(super) credentials: CredentialArgs,

    /// Two requests with the same key are one build [default: a new key]
    #[arg(long, value_name = "KEY")]
    pub(super) idempotency_key: Option<String>,

    /// The tenant's tier; believed in development mode only
    #[arg(long, value_name = "TIER", value_parser = parse_tier)]
    pub(super) tier: Option<Tier>,

    #[command(flatten)]
    pub(super) format: FormatArgs,
}

/// How to get at the image.
#[derive(Debug, Args)]
#[command(next_help_heading = "Registry")]
pub(super) struct CredentialArgs {
    /// User name at the image's registry
    #[arg(long, value_name = "NAME", requires = "password_stdin")]
    pub(super) username: Option<String>,

    /// Read the password, or with no --username a token, from standard input
    #[arg(long)]
    pub(super) password_stdin: bool,
}

/// Where a build stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum StateArg {
    /// Waits
    Queued,
    /// A worker has it
    Running,
    /// Has its artifact
    Completed,
    /// Failed, or took too long
    Failed,
    /// Took too long
    Timeout,
    /// Was cancelled
    Cancelled,
}

#[derive(Debug, Parser)]
pub(super) struct QuotasArgs {
    #[command(flatten)]
    pub(super) server: ServerArgs,

    #[command(flatten)]
    pub(super) format: FormatArgs,
}

#[derive(Debug, Parser)]
pub(super) struct StatsArgs {
    #[command(flatten)]
    pub(super) server: ServerArgs,

    /// Only builds of the last so long, such as 24h or 30d
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(super) since: Option<Duration>,

    #[command(flatten)]
    pub(super) format: FormatArgs,
}

#[derive(Debug, Parser)]
pub(super) struct AdminArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,

    #[command(subcommand)]
    pub(super) command: AdminCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum AdminCommand {
    /// Check the rules that the database must always obey
    Check,
    /// Copy the SQLite database to a file, also while the server runs
    Backup {
        /// The file to write; it must not exist
        file: PathBuf,
    },
    /// Bring a copy back, into an empty data directory
    Restore {
        /// What `backup` wrote
        file: PathBuf,
    },
    /// Read the audit log: who did what, and who was refused
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Let the next server bring a new master key, because the old one is lost; no server may run
    ForgetKey,
    /// Give a tenant a new key: its artifacts are encrypted with it from now on
    RotateKey {
        /// Whose key
        tenant: TenantId,
    },
    /// Destroy a tenant's keys and forget its encrypted artifacts: nobody can read them again
    DestroyKeys {
        /// Whose keys
        tenant: TenantId,
    },
    /// Copy everything from SQLite to an empty PostgreSQL database
    MigrateStore {
        /// The data directory with the SQLite database; its server must not run
        #[arg(long, value_name = "DIR")]
        from: PathBuf,
        /// postgres://user:password@host/name
        #[arg(long, value_name = "URL")]
        to: SecretString,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Print rows in the order of time, one JSON object on each line
    Export(AuditExportArgs),
    /// Check that no row is missing or was changed
    Verify,
}

#[derive(Debug, Args)]
pub(super) struct AuditExportArgs {
    /// Only rows from then on: 2026-01-31T00:00:00Z, or 30d ago
    #[arg(long, value_name = "MOMENT", value_parser = super::audit::parse_moment)]
    pub(super) since: Option<Micros>,
    /// Only rows before then
    #[arg(long, value_name = "MOMENT", value_parser = super::audit::parse_moment)]
    pub(super) until: Option<Micros>,
    /// Only a tenant's rows
    #[arg(long)]
    pub(super) tenant: Option<TenantId>,
    /// How the rows are printed
    #[arg(short = 'o', long = "format", value_enum, default_value_t = AuditFormat::Jsonl)]
    pub(super) format: AuditFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum AuditFormat {
    /// One JSON object on each line
    Jsonl,
}

#[derive(Debug, Parser)]
pub(super) struct TokenArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,

    #[command(subcommand)]
    pub(super) command: TokenCommand,
}

/// The token that `token create` makes.
#[derive(Debug, Args)]
pub(super) struct TokenCreateArgs {
    /// Whose token
    #[arg(long)]
    pub(super) tenant: TenantId,
    /// Set the tenant's tier, too [default: as it is]
    #[arg(long, value_name = "TIER", value_parser = parse_tier)]
    pub(super) tier: Option<Tier>,
    /// The customer within the tenant
    #[arg(long, value_parser = parse_name)]
    pub(super) customer: Option<String>,
    /// The organization that the tenant acts for; its builds show it
    #[arg(long, value_parser = parse_name)]
    pub(super) organization: Option<String>,
    /// What it allows; may be repeated [default: everything]
    #[arg(long, value_name = "RIGHT", value_parser = parse_right)]
    pub(super) permission: Vec<Right>,
    /// How long it works, such as 90d [default: until it is revoked]
    #[arg(long, value_name = "DURATION", value_parser = parse_life)]
    pub(super) expires: Option<Duration>,
    /// A note for the list
    #[arg(long, default_value = "", value_parser = parse_note)]
    pub(super) note: String,
    #[command(flatten)]
    pub(super) format: FormatArgs,
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make a token; it is shown once and never again
    Create(TokenCreateArgs),
    /// List tokens, without their secrets
    List {
        #[command(flatten)]
        format: FormatArgs,
    },
    /// Make a token stop to work
    Revoke {
        /// Its id, as `list` shows it
        id: String,
    },
}

#[derive(Debug, Parser)]
pub(super) struct TenantArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,

    #[command(subcommand)]
    pub(super) command: TenantCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum TenantCommand {
    /// Set a tenant's tier and, where they are to differ from the tier's, its limits
    Set(Box<TenantSetArgs>),
    /// List tenants
    List {
        #[command(flatten)]
        format: FormatArgs,
    },
}

#[derive(Debug, Parser)]
pub(super) struct TenantSetArgs {
    /// The tenant
    pub(super) tenant: TenantId,
    /// Its tier [default: as it is, or free]
    #[arg(long, value_name = "TIER", value_parser = parse_tier)]
    pub(super) tier: Option<Tier>,
    /// Forget limits that were set before: the tier's hold again
    #[arg(long)]
    pub(super) tier_limits: bool,
    /// Builds that run at once
    #[arg(long, value_name = "N")]
    pub(super) concurrent_builds: Option<u32>,
    /// Builds in one day (UTC)
    #[arg(long, value_name = "N")]
    pub(super) daily_builds: Option<u32>,
    /// Artifacts
    #[arg(long, value_name = "SIZE", value_parser = super::text::parse_size)]
    pub(super) storage: Option<u64>,
    /// Memory of one build
    #[arg(long, value_name = "SIZE", value_parser = super::text::parse_size)]
    pub(super) memory: Option<u64>,
    /// CPU cores of one build
    #[arg(long, value_name = "N")]
    pub(super) cpu_cores: Option<u32>,
    /// Disk of one build
    #[arg(long, value_name = "SIZE", value_parser = super::text::parse_size)]
    pub(super) disk: Option<u64>,
    /// Wall time of one build
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(super) timeout: Option<Duration>,
    /// A registry images may come from, `*` for all; may be repeated
    #[arg(long, value_name = "HOST", value_parser = crate::config::parse_registry)]
    pub(super) registry: Vec<String>,
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// A token that works for no moment is a slip.
fn parse_life(text: &str) -> Result<Duration, String> {
    let life = parse_duration(text)?;
    if life.is_zero() { Err("expected more than 0".to_owned()) } else { Ok(life) }
}

impl TenantSetArgs {
    /// What the flags cannot say each by itself; each build keeps a list of its tenant's registries.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn check(&self) -> Result<(), String> {
        match self.registry.len() {
            ..=REGISTRIES_MAX => Ok(()),
            _ => Err(format!("--registry: expected at most {REGISTRIES_MAX} of them")),
        }
    }
}

/// Whom a token names: as long as a request, or a client's certificate, may name somebody.
fn parse_name(text: &str) -> Result<String, String> {
    match text.len() {
        1..=NAME_BYTES_MAX => Ok(text.to_owned()),
        _ => Err(format!("expected 1 to {NAME_BYTES_MAX} bytes")),
    }
}

fn parse_note(text: &str) -> Result<String, String> {
    match text.len() {
        ..=NOTE_BYTES_MAX => Ok(text.to_owned()),
        _ => Err(format!("expected at most {NOTE_BYTES_MAX} bytes")),
    }
}

fn parse_tier(text: &str) -> Result<Tier, String> {
    text.parse()
}

fn parse_right(text: &str) -> Result<Right, String> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_nobody_by_more_than_is_kept() {
        let made = |flag: &str, text: &str| {
            TokenArgs::try_parse_from(["token", "create", "--tenant", "acme", flag, text])
        };
        for (flag, bytes_max) in
            [("--customer", NAME_BYTES_MAX), ("--organization", NAME_BYTES_MAX), ("--note", 1024)]
        {
            assert!(made(flag, &"x".repeat(bytes_max)).is_ok(), "{flag}");
            let error = made(flag, &"x".repeat(bytes_max + 1)).unwrap_err().to_string();
            assert!(error.contains(&format!("{bytes_max} bytes")), "{flag}: {error}");
            assert_eq!(made(flag, "").is_ok(), flag == "--note", "{flag}");
        }
    }

    #[test]
    fn a_tenant_has_so_many_registries_of_its_own() {
        let set = |count: usize| {
            let names = (0..count).map(|number| format!("--registry=r{number}.example"));
            let words = ["set".to_owned(), "acme".to_owned()].into_iter().chain(names);
            TenantSetArgs::try_parse_from(words).unwrap().check()
        };
        assert_eq!(set(REGISTRIES_MAX), Ok(()));
        assert!(set(REGISTRIES_MAX + 1).unwrap_err().contains("at most 100"));
    }
}
