//! The documentation's own commands on an image of Debian.

use std::path::{Path, PathBuf};

use crate::support::{Run, can_run};

/// The layers of the OCI layout that `cargo xtask images` makes.
pub(crate) fn layers() -> Option<Vec<Vec<u8>>> {
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
    run.base.environment.clear();
    run.order.disk_bytes = 4 << 30;
    run.order.limits.memory_bytes = 512 << 20;
    let ended = run.end().well();
    assert!(ended.paths().contains(&"usr/share/.wh.doc".to_owned()), "{:?}", ended.paths());
    assert!(ended.output().iter().any(|line| line.contains("Debian")), "{:?}", ended.output());
}

#[test]
fn sockets_are_those_of_programs_that_fetch_and_nothing_else_is_loaded_for() {
    if !can_run() {
        return;
    }
    let Some(layers) = layers() else {
        eprintln!("SKIPPED: no target/images/small: cargo xtask images");
        return;
    };
    // Family, type, protocol; what is refused says EPERM, what the kernel has not another error.
    let script = r#"perl -e 'for (@ARGV) { my ($f, $t, $p) = split /,/;
        print "$_ ", (socket(my $s, $f, $t, $p) ? "made" : $! + 0 == 1 ? "refused" : "other"), "\n" }'"#;
    let good = ["1,1,0", "1,2,0", "2,1,0", "2,1,6", "2,2,17", "10,1,0", "16,3,0"];
    let bad = [
        "2,1,132", "2,1,262", "2,6,0", "2,2,1", "2,3,255", "10,2,58", "16,3,12", "16,3,6",
        "17,3,0", "21,5,0", "29,3,1", "30,1,0", "31,1,0", "38,5,0", "39,3,0", "40,1,0", "41,2,0",
        "44,3,0",
    ];
    let command = format!("{script} {} {}", good.join(" "), bad.join(" "));
    let mut run = Run::on(layers, &[&command, "useradd somebody && id -u somebody"]);
    run.base.environment.clear();
    run.order.disk_bytes = 4 << 30;
    run.order.limits.memory_bytes = 512 << 20;
    let ended = run.end().well();
    let output = ended.output();
    for socket in good {
        assert!(output.contains(&format!("{socket} made").as_str()), "{output:?}");
    }
    for socket in bad {
        assert!(output.contains(&format!("{socket} refused").as_str()), "{output:?}");
    }
    assert_eq!(output.last(), Some(&"1000"), "{output:?}");
}
