//! What is known by name and refused: a part that does not exist, or a thing that is not done.

use super::{Setting, later, later_but, never, never_but};

pub(super) const LATER: &[Setting] = &[
    later("STORAGE_TLS_*", "certificates of object stores are those the system trusts"),
    later_but(
        "ASSETMANAGER_ENABLED",
        &["false"],
        "artifacts are not registered with assetmanagerd yet: download them, and set `false`",
    )
    .said_in("README"),
    later("ASSETMANAGER_ENDPOINT", "see ASSETMANAGER_ENABLED").said_in("README"),
    later("S3_ENCRYPTION", "set the encryption of the bucket itself"),
    later("ISCSI_*", "mount the volume and use STORAGE_BACKEND=local"),
    later("AZURE_*", "Azure's store does not exist yet: use `s3` or `gcs`"),
    later("CEPH_*", "use Ceph's S3 gateway with STORAGE_BACKEND=s3"),
    later("STORAGE_NODES", "there is no store of our own over several nodes: use `s3` or `gcs`"),
    later("DATABASE_BACKUP_*", "nothing is backed up by itself: see docs/operations.md"),
];

pub(super) const NEVER: &[Setting] = &[
    never_but(
        "USE_PIPELINE_EXECUTOR",
        &["false"],
        "there is one engine; leave it out or set `false`",
    )
    .said_in("code"),
    never_but(
        "TENANT_ISOLATION_ENABLED",
        &["true"],
        "tenants are always kept apart; leave it out or set `true`",
    )
    .said_in("README")
    .also(&["ENABLE_ISOLATION"]),
    never_but(
        "ENABLE_SECCOMP",
        &["true"],
        "foreign bytes and commands are always behind seccomp; leave it out or set `true`",
    ),
    never_but(
        "ENABLE_CGROUPS",
        &["true"],
        "builds are always held by cgroups; ACCEPT_MISSING_WALLS=cgroup is for a host that has \
         none",
    ),
    never(
        "BUILD_USER_ID",
        "each process that touches foreign bytes has a user of its own, which no other has; \
         leave it out",
    )
    .also(&["BUILD_GROUP_ID"]),
    never(
        "APPARMOR_PROFILE",
        "workers are shut in by landlock and seccomp; set the service's own profile outside, see \
         AppArmorProfile= in systemd.exec(5)",
    ),
    never(
        "SELINUX_CONTEXT",
        "workers are shut in by landlock and seccomp; set the service's own context outside, see \
         SELinuxContext= in systemd.exec(5)",
    ),
    never_but(
        "NETWORK_MODE",
        &["isolated"],
        "builds are always isolated: COMMANDS_EGRESS says what their commands may reach",
    ),
    never_but(
        "ENABLE_AUDIT_LOGGING",
        &["true"],
        "the audit log is always written, and kept for AUDIT_RETENTION_DAYS",
    ),
    never(
        "AUDIT_LOG_FILE",
        "the audit log is in the database: `builderd admin audit export` writes it to a file",
    ),
    never_but(
        "TENANT_QUOTA_CHECK_INTERVAL",
        &["5m", "300s"],
        "quotas are checked in the transaction that accepts a build, not now and then; \
         leave it out",
    )
    .said_in("README"),
    never(
        "DOCKER_SOCKET",
        "no Docker is used: images come straight from their registry; leave it out",
    ),
    never_but(
        "RATE_LIMIT_ENABLED",
        &["true"],
        "every tier has its rate limit; leave it out or set `true`",
    ),
    never("RATE_LIMIT_REQUESTS", "each tier has its own rate limit; leave it out"),
    never_but(
        "HEALTH_CHECK_ENABLED",
        &["true"],
        "`/health` always answers; leave it out or set `true`",
    ),
    never_but(
        "HEALTH_CHECK_INTERVAL",
        &["30s"],
        "`/health` looks when it is asked, never in between; leave it out",
    ),
    never_but(
        "DATABASE_IDLE_TIMEOUT",
        &["10m", "600s"],
        "a connection without work is closed after 10 minutes; leave it out",
    ),
    never(
        "DATABASE_PRAGMA_*",
        "journal and synchronous mode decide whether an accepted build survives a power \
         failure, so they are fixed; leave it out",
    ),
    never(
        "NFS_*",
        "mount the export and use STORAGE_BACKEND=local, with DATABASE_DATA_DIR elsewhere",
    ),
    never("GCS_PROJECT", "a bucket's name is enough; leave it out"),
];
