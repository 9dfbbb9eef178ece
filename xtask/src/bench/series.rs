//! Series of generated images: how time and memory grow with the number of files.

use std::path::Path;

use anyhow::Result;

use super::measure::{self, Run, mebibytes};
use crate::images::generated;
use crate::process::Program;

/// (files, files in each directory)
const SERIES: &[(u64, u64)] =
    &[(10_000, 1000), (100_000, 1000), (1_000_000, 1000), (200_000, 200_000)];

/// Prints one line for each size.
pub(crate) fn run(builderd: &Path, work: &Path) -> Result<()> {
    println!("\n### Files\n\nSmall generated files, `--no-cache`, from an OCI layout.\n");
    println!("| files | in each directory | wall | per file | RSS | beyond 10k, per file |");
    println!("|---:|---:|---:|---:|---:|---:|");
    let mut first: Option<(u64, Run)> = None;
    for (files, per_directory) in SERIES {
        let layout = work.join("series");
        let _ = std::fs::remove_dir_all(&layout);
        generated::many_files(&layout, *files, *per_directory)?;
        let output = work.join("series.ext4");
        let run = measure::once(
            Program::new(builderd)
                .args(["build", &format!("oci:{}", layout.display()), "--no-cache"])
                .args(["--progress", "quiet", "--checksum", "none", "--cache-dir"])
                .arg(work.join("series-cache"))
                .arg("--output")
                .arg(&output),
        )?;
        crate::chores::fsck(&output)?;
        let (few, small) = *first.get_or_insert((*files, run));
        let beyond = run.rss_bytes.saturating_sub(small.rss_bytes).checked_div(files - few);
        println!(
            "| {files} | {per_directory} | {:.2} s | {} µs | {:.1} MiB | {} |",
            run.wall.as_secs_f64(),
            run.wall.as_micros() / u128::from(*files),
            mebibytes(run.rss_bytes),
            beyond.map_or("–".into(), |bytes| format!("{bytes} B")),
        );
        std::fs::remove_file(&output)?;
        std::fs::remove_dir_all(&layout)?;
    }
    Ok(())
}
