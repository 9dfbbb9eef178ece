//! The test images: made once, kept as OCI layouts below `target/images/`.
//!
//! Knows neither builderd nor the registry that serves them.

mod buildah;
pub(crate) mod debian;
pub(crate) mod generated;
pub(crate) mod layout;
pub(crate) mod recipe;
pub(crate) mod tar;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use recipe::{RECIPES, Recipe, Step};
use sha2::{Digest as _, Sha256};

use crate::workspace;

/// Makes sure that an image exists and returns its OCI layout (`oci:DIR:latest`).
pub(crate) fn layout(name: &str) -> Result<PathBuf> {
    if name == TINY {
        return tiny();
    }
    let recipe = RECIPES
        .iter()
        .find(|recipe| recipe.name == name)
        .with_context(|| format!("no recipe is called {name}"))?;
    let layout = workspace::kept("images")?.join(name);
    let stamp = crate::process::with_suffix(&layout, ".stamp");
    let wanted = fingerprint(recipe);
    if layout.join("index.json").exists()
        && std::fs::read_to_string(&stamp).is_ok_and(|text| text == wanted)
    {
        return Ok(layout);
    }
    eprintln!("making image {name} ({})", recipe.about);
    buildah::Buildah::new(workspace::kept("images/buildah")?)?
        .make(recipe, &layout)
        .with_context(|| format!("cannot make image {name}"))?;
    std::fs::write(stamp, wanted)?;
    Ok(layout)
}

/// The name of the image that is made without buildah, in a second.
pub(crate) const TINY: &str = "tiny";

fn tiny() -> Result<PathBuf> {
    let layout = workspace::kept("images")?.join(TINY);
    if layout.exists() {
        std::fs::remove_dir_all(&layout)?;
    }
    generated::tiny(&layout)?;
    Ok(layout)
}

/// Changes whenever the recipe does.
fn fingerprint(recipe: &Recipe) -> String {
    let mut hash = Sha256::new();
    hash.update(recipe::BASE_PACKAGES);
    for step in recipe.steps {
        match step {
            Step::Inside(text) | Step::Packages(text) | Step::Outside(text) => hash.update(text),
        }
    }
    recipe.config.iter().for_each(|word| hash.update(word));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `cargo xtask images [NAME...]`
pub(crate) fn run(names: Vec<String>) -> Result<()> {
    let recipes = RECIPES.iter().map(|recipe| recipe.name);
    let all: Vec<String> = std::iter::once(TINY).chain(recipes).map(str::to_owned).collect();
    for name in if names.is_empty() { all } else { names } {
        println!("{name}: oci:{}:latest", layout(&name)?.display());
    }
    Ok(())
}
