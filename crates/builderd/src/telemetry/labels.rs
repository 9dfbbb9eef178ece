//! Words that may stand in a label: a label never holds what a caller made up.

/// Registries that many use.
const REGISTRIES: [&str; 12] = [
    "docker.io",
    "ghcr.io",
    "quay.io",
    "gcr.io",
    "registry.k8s.io",
    "registry.gitlab.com",
    "public.ecr.aws",
    "mcr.microsoft.com",
    "registry.access.redhat.com",
    "registry.redhat.io",
    "docker.elastic.co",
    "nvcr.io",
];

/// What stands for everything else.
const OTHER: &str = "other";

/// Registries that are named: those that many use, and those in the operator's settings.
#[derive(Debug, Default)]
pub(super) struct Registries {
    own: Vec<String>,
}

impl Registries {
    pub(super) fn with(own: impl IntoIterator<Item = String>) -> Self {
        Self { own: own.into_iter().filter(|name| name != "*").collect() }
    }

    /// The registry, if it is named.
    pub(super) fn label(&self, registry: &str) -> String {
        let is_named = REGISTRIES.contains(&registry) || self.own.iter().any(|own| own == registry);
        if is_named { registry } else { OTHER }.to_owned()
    }
}

/// The method of a path.
pub(super) fn method(path: &str) -> &'static str {
    const METHODS: [&str; 15] = [
        "CreateBuild",
        "GetBuild",
        "ListBuilds",
        "CancelBuild",
        "DeleteBuild",
        "StreamBuildLogs",
        "GetTenantQuotas",
        "GetBuildStats",
        "GetBuildStatus",
        "GetBuildArtifact",
        "GetBuildLogs",
        "health",
        "stats",
        "metrics",
        "refused",
    ];
    let is_part = |method: &&str| path.split('/').any(|part| part == *method);
    METHODS.into_iter().find(is_part).unwrap_or(OTHER)
}
