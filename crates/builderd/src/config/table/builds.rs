//! Running builds, and where their files are.

use super::{Kind, Setting, setting};

pub(super) const BUILDS: &[Setting] = &[
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
