//! Tenants for whom nothing else was set.

use super::{ANY, Kind, SOME, Setting, setting};

const TIERS: Kind = Kind::OneOf(&["free", "pro", "enterprise", "dedicated"]);

pub(super) const TENANTS: &[Setting] = &[
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
