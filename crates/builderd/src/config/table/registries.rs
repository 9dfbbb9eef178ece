//! Where images come from.

use super::{Kind, Setting, setting};

pub(super) const REGISTRIES: &[Setting] = &[
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
