//! Where things lie in this repository. Knows no chore.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::process::Program;

/// The directory of the root `Cargo.toml`.
pub(crate) fn top() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map(PathBuf::from).unwrap_or(manifest)
}

/// Things made once and kept between runs: images, kernels, the registry's blobs.
pub(crate) fn kept(name: &str) -> Result<PathBuf> {
    let dir = top().join("target").join(name);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Where cargo puts what it compiles, whatever the environment says.
pub(crate) fn cargo_target() -> Result<PathBuf> {
    let text = cargo().args(["metadata", "--format-version=1", "--no-deps"]).text()?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let dir = json["target_directory"].as_str().context("cargo metadata names no target")?;
    Ok(PathBuf::from(dir))
}

/// Cargo, run in the repository's top directory.
pub(crate) fn cargo() -> Program {
    Program::new("cargo").dir(top())
}

/// Builds a binary of the workspace with the release profile and says where it is.
pub(crate) fn release_binary(package: &str) -> Result<PathBuf> {
    cargo()
        .args(["build", "--release", "--package", package, "--bin", package])
        .loud_checked()
        .with_context(|| format!("cannot build {package}"))?;
    Ok(cargo_target()?.join("release").join(package))
}
