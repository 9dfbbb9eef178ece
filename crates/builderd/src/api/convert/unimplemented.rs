//! What a request may ask for one day: refused by name until then, never ignored.

use api::v1;
use v1::build_source::SourceType;
use v1::build_strategy::StrategyType;
use v1::build_target::TargetType;

use crate::build::service::ServiceError;

/// Something that does not exist yet.
pub(in super::super) struct Later {
    /// What, as a request names it.
    pub(in super::super) what: &'static str,
    /// What to do until then.
    pub(in super::super) instead: &'static str,
    /// Whether a request needs it.
    asked: fn(&v1::BuildConfig) -> bool,
}

const fn later(
    what: &'static str,
    instead: &'static str,
    asked: fn(&v1::BuildConfig) -> bool,
) -> Later {
    Later { what, instead, asked }
}

const DOCKER_ONLY: &str = "use a source.docker_image and strategy.docker_extract";
const AS_IT_IS: &str = "leave it out; the image is built with every file it has";

/// Everything that is refused, in the order in which requests are checked.
pub(in super::super) const UNIMPLEMENTED: &[Later] = &[
    later(
        "source.git_repository",
        "build an image elsewhere and use source.docker_image",
        |config| matches!(&config.source.source_type, Some(SourceType::GitRepository(_))),
    ),
    later("source.archive", "build an image elsewhere and use source.docker_image", |config| {
        matches!(&config.source.source_type, Some(SourceType::Archive(_)))
    }),
    later("target.container_image", "use target.microvm_rootfs", |config| {
        matches!(&config.target.target_type, Some(TargetType::ContainerImage(_)))
    }),
    later("strategy.go_api", DOCKER_ONLY, |config| {
        matches!(&config.strategy.strategy_type, Some(StrategyType::GoApi(_)))
    }),
    later("strategy.sinatra", DOCKER_ONLY, |config| {
        matches!(&config.strategy.strategy_type, Some(StrategyType::Sinatra(_)))
    }),
    later("strategy.nodejs", DOCKER_ONLY, |config| {
        matches!(&config.strategy.strategy_type, Some(StrategyType::Nodejs(_)))
    }),
    later("strategy.git_strategy", DOCKER_ONLY, |config| {
        matches!(&config.strategy.strategy_type, Some(StrategyType::GitStrategy(_)))
    }),
    later("strategy.archive_strategy", DOCKER_ONLY, |config| {
        matches!(&config.strategy.strategy_type, Some(StrategyType::ArchiveStrategy(_)))
    }),
    later("docker_extract.preserve_layers", "leave it out; layers become one tree", |config| {
        extract(config).is_some_and(|strategy| strategy.preserve_layers)
    }),
    later("docker_extract.exclude_patterns", AS_IT_IS, |config| {
        extract(config).is_some_and(|strategy| !strategy.exclude_patterns.is_empty())
    }),
    later("docker_strategy.optimize_for_size", AS_IT_IS, |config| {
        docker(config).is_some_and(|strategy| strategy.optimize_for_size)
    }),
    later("docker_strategy.remove_dev_packages", AS_IT_IS, |config| {
        docker(config).is_some_and(|strategy| strategy.remove_dev_packages)
    }),
    later("docker_strategy.preserve_layers", "leave it out; layers become one tree", |config| {
        docker(config).is_some_and(|strategy| strategy.preserve_layers)
    }),
    later("microvm_rootfs.format", "leave it out, or \"ext4\"", |config| {
        rootfs(config).is_some_and(|target| !matches!(target.format.as_str(), "" | "ext4"))
    }),
    // The documentation's first example asks for it. The image would need a tini that it need not
    // have, and an image without one is not what was asked for.
    later(
        "microvm_rootfs.init_strategy INIT_STRATEGY_TINI",
        "leave it out, or INIT_STRATEGY_DIRECT_EXEC; an image that has a tini names it in its \
         entrypoint",
        |config| asks_for_init(config, v1::InitStrategy::INIT_STRATEGY_TINI),
    ),
    later(
        "microvm_rootfs.init_strategy INIT_STRATEGY_SYSTEMD",
        "use an image that has systemd, and name it on the kernel's command line",
        |config| asks_for_init(config, v1::InitStrategy::INIT_STRATEGY_SYSTEMD),
    ),
    later(
        "microvm_rootfs.init_strategy INIT_STRATEGY_CUSTOM",
        "put the script into the image, and name it on the kernel's command line",
        |config| asks_for_init(config, v1::InitStrategy::INIT_STRATEGY_CUSTOM),
    ),
    later("microvm_rootfs.runtime_config", "set it in the image's own config", |config| {
        rootfs(config).is_some_and(|target| target.runtime_config.is_set())
    }),
    later("microvm_rootfs.optimization", AS_IT_IS, |config| {
        let asked = rootfs(config).and_then(|target| target.optimization.as_option());
        asked.is_some_and(|asked| *asked != v1::OptimizationSettings::default())
    }),
    later("microvm_rootfs.preserve_paths", AS_IT_IS, |config| {
        rootfs(config).is_some_and(|target| !target.preserve_paths.is_empty())
    }),
    later("config.webhook", "follow the build's log, or ask for its state", |config| {
        config.webhook.is_set()
    }),
    later("config.limits of the whole tenant", "the operator sets them", |config| {
        let limits = &config.limits;
        limits.max_concurrent_builds != 0
            || limits.max_daily_builds != 0
            || limits.max_storage_bytes != 0
            || !limits.allowed_registries.is_empty()
            || !limits.allowed_git_hosts.is_empty()
    }),
    later("config.limits of commands", "leave them out; they are the tier's", |config| {
        let limits = &config.limits;
        limits.allow_privileged_builds
            || limits.sandbox_level != 0
            || !limits.blocked_commands.is_empty()
    }),
];

/// Refuses a request that needs something of the table.
pub(super) fn refuse_unimplemented(config: &v1::BuildConfig) -> Result<(), ServiceError> {
    match UNIMPLEMENTED.iter().find(|later| (later.asked)(config)) {
        Some(later) => Err(ServiceError::Unimplemented {
            what: later.what.to_owned(),
            instead: later.instead.to_owned(),
        }),
        None => Ok(()),
    }
}

pub(super) fn rootfs(config: &v1::BuildConfig) -> Option<&v1::MicroVMRootfs> {
    match config.target.target_type.as_ref()? {
        TargetType::MicrovmRootfs(target) => Some(target),
        TargetType::ContainerImage(_) => None,
    }
}

fn extract(config: &v1::BuildConfig) -> Option<&v1::DockerExtractStrategy> {
    match config.strategy.strategy_type.as_ref()? {
        StrategyType::DockerExtract(strategy) => Some(strategy),
        StrategyType::GoApi(_)
        | StrategyType::Sinatra(_)
        | StrategyType::Nodejs(_)
        | StrategyType::DockerStrategy(_)
        | StrategyType::GitStrategy(_)
        | StrategyType::ArchiveStrategy(_) => None,
    }
}

pub(super) fn docker(config: &v1::BuildConfig) -> Option<&v1::DockerStrategy> {
    match config.strategy.strategy_type.as_ref()? {
        StrategyType::DockerStrategy(strategy) => Some(strategy),
        StrategyType::DockerExtract(_)
        | StrategyType::GoApi(_)
        | StrategyType::Sinatra(_)
        | StrategyType::Nodejs(_)
        | StrategyType::GitStrategy(_)
        | StrategyType::ArchiveStrategy(_) => None,
    }
}

fn asks_for_init(config: &v1::BuildConfig, strategy: v1::InitStrategy) -> bool {
    rootfs(config).is_some_and(|target| target.init_strategy == strategy)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For each entry of the table, in its order, a request that needs it.
    const EXAMPLES: &[(&str, &str)] = &[
        ("source.git_repository", r#"{"source":{"git_repository":{"clone_url":"https://a/b"}}}"#),
        ("source.archive", r#"{"source":{"archive":{"download_url":"https://a/b.tar"}}}"#),
        ("target.container_image", r#"{"target":{"container_image":{}}}"#),
        ("strategy.go_api", r#"{"strategy":{"go_api":{}}}"#),
        ("strategy.sinatra", r#"{"strategy":{"sinatra":{}}}"#),
        ("strategy.nodejs", r#"{"strategy":{"nodejs":{}}}"#),
        ("strategy.git_strategy", r#"{"strategy":{"git_strategy":{}}}"#),
        ("strategy.archive_strategy", r#"{"strategy":{"archive_strategy":{}}}"#),
        (
            "docker_extract.preserve_layers",
            r#"{"strategy":{"docker_extract":{"preserve_layers":true}}}"#,
        ),
        (
            "docker_extract.exclude_patterns",
            r#"{"strategy":{"docker_extract":{"exclude_patterns":["*.md"]}}}"#,
        ),
        (
            "docker_strategy.optimize_for_size",
            r#"{"strategy":{"docker_strategy":{"optimize_for_size":true}}}"#,
        ),
        (
            "docker_strategy.remove_dev_packages",
            r#"{"strategy":{"docker_strategy":{"remove_dev_packages":true}}}"#,
        ),
        (
            "docker_strategy.preserve_layers",
            r#"{"strategy":{"docker_strategy":{"preserve_layers":true}}}"#,
        ),
        ("microvm_rootfs.format", r#"{"target":{"microvm_rootfs":{"format":"squashfs"}}}"#),
        (
            "microvm_rootfs.init_strategy INIT_STRATEGY_TINI",
            r#"{"target":{"microvm_rootfs":{"init_strategy":"INIT_STRATEGY_TINI"}}}"#,
        ),
        (
            "microvm_rootfs.init_strategy INIT_STRATEGY_SYSTEMD",
            r#"{"target":{"microvm_rootfs":{"init_strategy":"INIT_STRATEGY_SYSTEMD"}}}"#,
        ),
        (
            "microvm_rootfs.init_strategy INIT_STRATEGY_CUSTOM",
            r#"{"target":{"microvm_rootfs":{"init_strategy":"INIT_STRATEGY_CUSTOM"}}}"#,
        ),
        (
            "microvm_rootfs.runtime_config",
            r#"{"target":{"microvm_rootfs":{"runtime_config":{"command":["sh"]}}}}"#,
        ),
        (
            "microvm_rootfs.optimization",
            r#"{"target":{"microvm_rootfs":{"optimization":{"remove_docs":true}}}}"#,
        ),
        (
            "microvm_rootfs.preserve_paths",
            r#"{"target":{"microvm_rootfs":{"preserve_paths":["/a"]}}}"#,
        ),
        ("config.webhook", r#"{"webhook":{"url":"https://a"}}"#),
        ("config.limits of the whole tenant", r#"{"limits":{"max_daily_builds":1}}"#),
        ("config.limits of commands", r#"{"limits":{"sandbox_level":1}}"#),
    ];

    #[test]
    fn every_entry_of_the_table_is_refused_by_its_name() {
        assert_eq!(
            UNIMPLEMENTED.iter().map(|later| later.what).collect::<Vec<_>>(),
            EXAMPLES.iter().map(|(what, _)| *what).collect::<Vec<_>>(),
        );
        for (name, json) in EXAMPLES {
            let config: v1::BuildConfig = serde_json::from_str(json).unwrap();
            match refuse_unimplemented(&config) {
                Err(ServiceError::Unimplemented { what, instead }) => {
                    assert_eq!(what, *name);
                    assert!(!instead.is_empty());
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn values_that_change_nothing_are_taken() {
        for json in [
            r#"{"target":{"microvm_rootfs":{"format":"ext4","optimization":{}}}}"#,
            r#"{"target":{"microvm_rootfs":{"init_strategy":"INIT_STRATEGY_DIRECT_EXEC"}}}"#,
            r#"{"target":{"microvm_rootfs":{"init_strategy":"INIT_STRATEGY_DIRECT"}}}"#,
            r#"{"target":{"microvm_rootfs":{"init_strategy":"INIT_STRATEGY_UNSPECIFIED"}}}"#,
            r#"{"strategy":{"docker_extract":{"flatten_filesystem":true}}}"#,
            r#"{"strategy":{"docker_strategy":{"preserve_layers":false}}}"#,
            r#"{"limits":{"max_memory_bytes":"1","timeout_seconds":5,"allow_external_network":true}}"#,
        ] {
            let config: v1::BuildConfig = serde_json::from_str(json).unwrap();
            assert!(refuse_unimplemented(&config).is_ok(), "{json}");
        }
    }
}
