//! What the environment says, read here and nowhere else.
//!
//! Settings that have a flag are read by the flag's own declaration (`env = …` in
//! `command/args.rs`), so that `--help` names them; here is only what has no flag.

use std::path::PathBuf;

/// The environment as the engine uses it.
#[derive(Debug)]
pub(crate) struct Environment {
    /// Where caches of this user go, `builderd` below it (XDG Base Directory Specification).
    pub(crate) cache_home: Option<PathBuf>,
    /// `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`.
    pub(crate) docker_config: Option<PathBuf>,
    /// `SOURCE_DATE_EPOCH` as written (reproducible-builds.org/specs/source-date-epoch).
    pub(crate) source_date_epoch: Option<String>,
}

impl Environment {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads it")]
    pub(crate) fn read() -> Self {
        // Empty means unset, as every reader of these variables has it.
        let path = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = path("HOME");
        let cache_home = path("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        let docker_home = path("DOCKER_CONFIG");
        Self {
            cache_home: cache_home.or_else(|| home.as_ref().map(|home| home.join(".cache"))),
            docker_config: docker_home
                .or_else(|| home.map(|home| home.join(".docker")))
                .map(|directory| directory.join("config.json")),
            source_date_epoch: std::env::var("SOURCE_DATE_EPOCH").ok().filter(|v| !v.is_empty()),
        }
    }
}
