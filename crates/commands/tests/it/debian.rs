//! The documentation's own commands on an image of Debian.

use std::path::{Path, PathBuf};

use crate::support::{Run, can_run};

/// The layers of the OCI layout that `cargo xtask images` makes.
fn layers() -> Option<Vec<Vec<u8>>> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/images/small");
    let json = |path: PathBuf| -> Option<serde_json::Value> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    };
    let blob = |value: &serde_json::Value| {
        Some(top.join("blobs/sha256").join(value["digest"].as_str()?.strip_prefix("sha256:")?))
    };
    let index = json(top.join("index.json"))?;
    let manifest = json(blob(&index["manifests"][0])?)?;
    let layers = manifest["layers"].as_array()?.iter();
    layers.map(|layer| std::fs::read(blob(layer)?).ok()).collect()
}

#[test]
fn the_documented_commands_run_on_debian_and_what_they_remove_is_gone() {
    if !can_run() {
        return;
    }
    let Some(layers) = layers() else {
        eprintln!("SKIPPED: no target/images/small: cargo xtask images");
        return;
    };
    let mut run = Run::on(
        layers,
        &[
            "apt-get autoremove -y",
            "apt-get clean",
            "rm -rf /var/lib/apt/lists/*",
            "rm -rf /tmp/*",
            "rm -rf /var/tmp/*",
            "rm -rf /usr/share/doc && dpkg --version && test ! -e /usr/share/doc",
        ],
    );
    run.order.environment.clear();
    run.order.disk_bytes = 4 << 30;
    run.order.limits.memory_bytes = 512 << 20;
    let ended = run.end().well();
    assert!(ended.paths().contains(&"usr/share/.wh.doc".to_owned()), "{:?}", ended.paths());
    assert!(ended.output().iter().any(|line| line.contains("Debian")), "{:?}", ended.output());
}
