//! `builderd build`: arguments → [`BuildSpec`] → the engine → closing summary.

use std::num::NonZero;

use oci::{ClientOptions, Platform, Source};
use sandbox::Wall;

use super::args::{BuildArgs, ChecksumArg, CompressionArg, ProgressArg};
use super::interrupt::Watched;
use super::progress::Progress;
use super::{Failure, cache, text};
use crate::build::{
    self, BuildReport, BuildSpec, Checksum, Compression, ImageOptions, PackStorage, SumBy, record,
};
use crate::config::Environment;
use crate::packs::SharingDomain;

pub(super) fn run(args: &BuildArgs) -> Result<(), Failure> {
    let spec = spec(args, &Environment::read())?;
    let progress = Progress::new(args.progress);
    let watched = Watched::new(&progress);
    let report = build::run(&spec, &watched).inspect_err(|error| {
        let failure = error.failure(watched.phase());
        // Whoever builds here has the disk and the command line that it speaks of.
        let remedy = error.hint().unwrap_or_else(|| failure.remedy.clone());
        progress.failed(&record::Failure { remedy, ..failure });
    })?;
    progress.finish(&report);
    if matches!(args.progress, ProgressArg::Auto | ProgressArg::Tty | ProgressArg::Plain) {
        print_summary(&report);
    }
    Ok(())
}

fn spec(args: &BuildArgs, environment: &Environment) -> Result<BuildSpec, Failure> {
    let source: Source = args.source.parse().map_err(|error| Failure {
        code: Failure::USAGE,
        error: Box::<dyn std::error::Error + Send + Sync>::from(format!(
            "`{}` is not a source: {error}",
            args.source
        )),
        hint: Some("see `builderd build --help` for what a SOURCE may be".into()),
    })?;
    let platform = match &args.platform {
        Some(text) => text.parse::<Platform>().map_err(|error| {
            Failure::usage(format!("--platform `{text}` cannot be read: {error}"))
        })?,
        None => Platform::of_this_machine(),
    };
    let size = match (args.size, args.free_space) {
        (Some(bytes), _) if !bytes.is_multiple_of(ext4::BLOCK_SIZE) => {
            let next = bytes.next_multiple_of(ext4::BLOCK_SIZE);
            let message =
                format!("--size must be a multiple of {}, such as {next}", ext4::BLOCK_SIZE);
            return Err(Failure::usage(message));
        }
        (Some(bytes), _) => ext4::Size::Exact { bytes },
        (None, free) => {
            ext4::Size::FreeSpace { bytes: free.unwrap_or(build::DEFAULT_FREE_SPACE_BYTES) }
        }
    };
    let packs = if args.no_cache {
        PackStorage::Temporary
    } else {
        PackStorage::Cache {
            cache: cache::open(&args.cache, environment)?,
            domain: SharingDomain::local(),
            limit_bytes: args.cache.cache_limit,
        }
    };
    let metadata_file = args.metadata_file.clone();
    Ok(BuildSpec {
        source,
        platform,
        client: client_options(args, environment)?,
        metadata_file: metadata_file
            .unwrap_or_else(|| build::sibling(&args.output, ".metadata.json")),
        output: args.output.clone(),
        image: ImageOptions {
            size,
            bytes_max: None,
            journal: !args.no_journal,
            source_date_epoch: source_date_epoch(environment)?,
        },
        compression: match args.compression {
            CompressionArg::None => Compression::None,
            CompressionArg::Gzip => Compression::Gzip,
            CompressionArg::Zstd => Compression::Zstd,
        },
        checksum: match args.checksum {
            ChecksumArg::Sha256 => Checksum::Sha256,
            ChecksumArg::None => Checksum::None,
        },
        packs,
        commands: None,
        jobs: args.jobs.map_or_else(
            || std::thread::available_parallelism().map_or(1, NonZero::get),
            usize::from,
        ),
        layer_limits: rootfs::Limits::default(),
        tree_limits: rootfs::TreeLimits::default(),
        // Whoever builds for himself builds also where a host gives less.
        walls: vec![Wall::NoNewPrivileges, Wall::Seccomp],
        sum_by: SumBy::Worker,
    })
}

fn source_date_epoch(environment: &Environment) -> Result<Option<i64>, Failure> {
    let Some(text) = &environment.source_date_epoch else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        Failure::usage(format!("SOURCE_DATE_EPOCH is `{text}`, expected seconds since the epoch"))
    })
}

fn client_options(args: &BuildArgs, environment: &Environment) -> Result<ClientOptions, Failure> {
    let registry = &args.registry;
    // Only the usual place may be empty. Not opened: what stands there may be a pipe.
    if let Some(path) = &registry.docker_config {
        std::fs::metadata(path).map_err(|error| {
            Failure::usage(format!("--docker-config {} cannot be read: {error}", path.display()))
        })?;
    }
    let mut options = ClientOptions {
        docker_config: registry.docker_config.clone().or_else(|| environment.docker_config.clone()),
        connections_per_host: usize::from(registry.connections),
        ..ClientOptions::default()
    };
    // An empty variable is no value.
    let plain_http = registry.plain_http.iter().filter(|host| !host.is_empty());
    options.plain_http.extend(plain_http.cloned());
    for mirror in registry.mirror.iter().filter(|mirror| !mirror.is_empty()) {
        options.add_mirror(mirror);
    }
    for path in &registry.ca_file {
        let pem = std::fs::read(path).map_err(|error| {
            Failure::usage(format!("--ca-file {} cannot be read: {error}", path.display()))
        })?;
        options.extra_ca_pem.push(pem);
    }
    Ok(options)
}

fn print_summary(report: &BuildReport) {
    let (metadata, filesystem) = (&report.metadata, &report.metadata.filesystem);
    let layers = report.layers_cached + report.layers_packed;
    tell!();
    tell!("image       {} ({})", text::printable(&metadata.original_image), metadata.platform);
    tell!("digest      {}", metadata.image_digest);
    tell!(
        "layers      {layers}, {} from the cache, {} fetched ({})",
        report.layers_cached,
        report.layers_packed,
        text::bytes(report.fetched_bytes)
    );
    tell!(
        "filesystem  ext4, {} ({} of data in {} inodes, {} free)",
        text::bytes(filesystem.size_bytes),
        text::bytes(filesystem.data_bytes),
        filesystem.inodes_used,
        text::bytes(filesystem.free_bytes)
    );
    if metadata.artifact.compression != "none" {
        let size = text::bytes(metadata.artifact.size_bytes);
        tell!("stored as   {size}, {}", metadata.artifact.compression);
    }
    if let Some(sha256) = &metadata.artifact.sha256 {
        tell!("sha256      {sha256}");
    }
    for (index, (path, bytes, files)) in report.biggest_directories.iter().enumerate() {
        let title = if index == 0 { "biggest" } else { "" };
        let path = text::printable(path);
        tell!("{title:<11} {:>11}  {files:>7} files  {path}", text::bytes(*bytes));
    }
    let phases: Vec<String> = report
        .phase_secs
        .iter()
        .map(|(phase, secs)| format!("{} {}", phase.as_str(), text::seconds(*secs)))
        .collect();
    tell!("time        {} ({})", text::seconds(report.total_secs), phases.join(", "));
    tell!("written     {}", report.output.display());
}
