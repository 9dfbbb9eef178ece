//! What the user wrote. What it means is decided in the commands themselves.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use super::service_args::{
    AdminArgs, BuildsArgs, ConfigArgs, QuotasArgs, ServeArgs, StatsArgs, TenantArgs, TokenArgs,
};
use super::text::parse_size;
use crate::config::{parse_host, parse_mirror};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the builder or its machine failed
  2    wrong command line
  3    the request or the image is at fault (not found, not allowed, malformed, does not fit)
  4    a registry or the network failed; trying again may help
  5    out of disk space
  130  interrupted";

const BUILD_EXAMPLES: &str = "\
Examples:
  builderd build nginx -o rootfs.ext4
  builderd build ghcr.io/org/app:1.4 -o app.ext4 --platform linux/arm64 --free-space 2G
  builderd build localhost:5000/app -o app.ext4 --plain-http localhost:5000
  docker save app | builderd build - -o app.ext4
  builderd build oci:layout:latest -o app.ext4.zst --compression zstd --metadata-file app.json";

/// Turns container images into bootable root filesystems for microVMs.
#[derive(Debug, Parser)]
#[command(name = "builderd", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Build a root filesystem from a container image
    Build(Box<BuildArgs>),
    /// Look into an image file: superblock, tree, contents, checksums
    Inspect(InspectArgs),
    /// List, prune or check the layer cache
    Cache(CacheArgs),
    /// Run the service
    Serve(ServeArgs),
    /// Print the settings that hold
    Config(ConfigArgs),
    /// Create, look at, cancel, delete and download builds of a server
    Builds(Box<BuildsArgs>),
    /// Show what the tenant may use, and uses
    Quotas(QuotasArgs),
    /// Show figures over the tenant's builds
    Stats(StatsArgs),
    /// Make, list and revoke tokens, in the server's database
    Token(TokenArgs),
    /// Set up and list tenants, in the server's database
    Tenant(TenantArgs),
    /// Check, back up, restore or move the server's database
    Admin(AdminArgs),
    /// One build of the service, in a process of its own
    #[command(hide = true)]
    BuildChild,
    /// Compute the sum of what such a process has made
    #[command(hide = true)]
    BuildSum,
    /// Work on foreign bytes, in a process that can reach nothing
    #[command(hide = true)]
    Confined,
    /// Keep, unpack or read what commands of a build work on
    #[command(hide = true)]
    CommandsProcess {
        /// Which of them
        role: String,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Parser)]
#[command(after_help = format!("{BUILD_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(super) struct BuildArgs {
    /// Registry reference, `oci:DIR[:TAG]`, `oci-archive:FILE`, `docker-archive:FILE`,
    /// or `-` for an archive on standard input
    pub(super) source: String,

    /// The image file to write
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: PathBuf,

    /// Where the metadata goes [default: OUTPUT.metadata.json]
    #[arg(long, value_name = "FILE")]
    pub(super) metadata_file: Option<PathBuf>,

    /// Which platform of the image, e.g. linux/arm64 [default: linux on this machine's CPU]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(super) platform: Option<String>,

    /// How the image file is stored
    #[arg(long, value_enum, default_value_t = CompressionArg::None)]
    pub(super) compression: CompressionArg,

    /// Which sum is computed over the file (`none` saves a pass over it)
    #[arg(long, value_enum, default_value_t = ChecksumArg::Sha256)]
    pub(super) checksum: ChecksumArg,

    /// Make the file system exactly this large
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "free_space")]
    pub(super) size: Option<u64>,

    /// Leave at least this much free space [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) free_space: Option<u64>,

    /// Make the file system without a journal
    #[arg(long)]
    pub(super) no_journal: bool,

    /// Keep no layer: everything temporary is gone when the build ends
    #[arg(long)]
    pub(super) no_cache: bool,

    #[command(flatten)]
    pub(super) cache: CacheLocation,

    #[command(flatten)]
    pub(super) registry: RegistryArgs,

    /// How progress is shown
    #[arg(long, value_enum, default_value_t = ProgressArg::Auto)]
    pub(super) progress: ProgressArg,

    /// Worker threads [default: the CPUs of this machine]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(super) jobs: Option<u16>,
}

#[derive(Debug, Parser)]
pub(super) struct CacheLocation {
    /// Where layer packs are kept [default: $XDG_CACHE_HOME/builderd or ~/.cache/builderd]
    #[arg(long, value_name = "DIR", env = "UNKEY_BUILDERD_CACHE_DIR", global = true)]
    pub(super) cache_dir: Option<PathBuf>,

    /// What the cache is pruned to after a build
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "20G",
          env = "UNKEY_BUILDERD_CACHE_LIMIT", global = true)]
    pub(super) cache_limit: u64,
}

#[derive(Debug, Parser)]
#[command(next_help_heading = "Registry")]
pub(super) struct RegistryArgs {
    /// A registry to reach over plain HTTP (never tried unless named here)
    #[arg(
        long,
        value_name = "HOST[:PORT]",
        value_delimiter = ',',
        value_parser = parse_host,
        env = "UNKEY_BUILDERD_DOCKER_INSECURE_REGISTRIES"
    )]
    pub(super) plain_http: Vec<String>,

    /// Ask MIRROR before HOST; without HOST, before Docker Hub
    #[arg(
        long,
        value_name = "[HOST=]MIRROR",
        value_delimiter = ',',
        value_parser = parse_mirror,
        env = "UNKEY_BUILDERD_DOCKER_REGISTRY_MIRROR"
    )]
    pub(super) mirror: Vec<String>,

    /// Trust the certificate authorities in this PEM file, too
    #[arg(long, value_name = "FILE")]
    pub(super) ca_file: Vec<PathBuf>,

    /// Docker's config.json with credentials and helpers
    /// [default: $DOCKER_CONFIG/config.json or ~/.docker/config.json]
    #[arg(long, value_name = "FILE")]
    pub(super) docker_config: Option<PathBuf>,

    /// Parallel connections to one registry
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) connections: u16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum CompressionArg {
    None,
    Gzip,
    Zstd,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum ChecksumArg {
    Sha256,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ProgressArg {
    /// Bars on a terminal, plain lines elsewhere
    Auto,
    /// Bars
    Tty,
    /// One line for each step
    Plain,
    /// One JSON object for each event, on standard output; the last is `finished` or `failed`
    Rawjson,
    /// Nothing but errors
    Quiet,
}

#[derive(Debug, Parser)]
pub(super) struct InspectArgs {
    /// The image file (uncompressed ext4)
    pub(super) image: PathBuf,

    /// List the tree below this path
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "/")]
    pub(super) tree: Option<String>,

    /// Write a file's content to standard output
    #[arg(long, value_name = "PATH", conflicts_with = "tree")]
    pub(super) cat: Option<String>,

    /// Check every checksum of the file system
    #[arg(long)]
    pub(super) verify: bool,

    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Parser)]
pub(super) struct CacheArgs {
    #[command(flatten)]
    pub(super) location: CacheLocation,

    #[command(subcommand)]
    pub(super) command: CacheCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum CacheCommand {
    /// List the layer packs, the least recently used first
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove the least recently used packs until the rest fits into the limit
    Prune {
        /// Remove all
        #[arg(long)]
        all: bool,
    },
    /// Check every byte of every pack; damaged ones are removed (the next build makes them anew)
    Verify,
}
