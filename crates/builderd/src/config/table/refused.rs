//! What is known by name and refused: a part that does not exist, or a thing that is not done.

use super::{Setting, later, never};

pub(super) const LATER: &[Setting] = &[
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

pub(super) const NEVER: &[Setting] = &[
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
