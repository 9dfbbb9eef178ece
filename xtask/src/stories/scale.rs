//! Stories about very many files.

use anyhow::{Result, bail};

use super::Verdict;
use super::lab::Lab;
use crate::bench::measure;
use crate::chores::fsck;
use crate::images::generated;
use crate::process::Program;

pub(super) fn one_directory_of_very_many_files_is_whole(lab: &Lab) -> Result<Verdict> {
    let files = lab.scale(50_000, 200_000);
    println!("      {files} files in one directory");
    let corner = lab.corner()?;
    let layout = corner.path("layout");
    generated::many_files(&layout, files, files)?;
    let output = corner.output("rootfs.ext4");
    corner.build(&format!("oci:{}", layout.display()), &output, &[])?;
    fsck(&output)?;
    for index in [0, files / 2, files - 1] {
        let path = format!("/files/d0/file-number-{index:08}.txt");
        let said =
            Program::new("debugfs").args(["-R", &format!("cat {path}")]).arg(&output).text()?;
        if said != format!("this is file {index}") {
            bail!("{path} holds {said:?}");
        }
    }
    Ok(Verdict::Passed)
}

/// Beyond a fixed part, a file may cost this much memory.
const BYTES_PER_FILE_MAX: u64 = 700;

pub(super) fn time_and_memory_grow_linearly_with_files(lab: &Lab) -> Result<Verdict> {
    let series = match lab.scale(0, 1) {
        0 => vec![10_000, 100_000],
        _ => vec![10_000, 100_000, 1_000_000],
    };
    let mut runs = Vec::new();
    for files in &series {
        let corner = lab.corner()?;
        let layout = corner.path("layout");
        generated::many_files(&layout, *files, 1000)?;
        let output = corner.output("rootfs.ext4");
        let source = format!("oci:{}", layout.display());
        let run = measure::once(corner.build_program(&source, &output).arg("--no-cache"))?;
        fsck(&output)?;
        println!(
            "      {files:8} files: {:6.2} s, {:6.1} MiB at most",
            run.wall.as_secs_f64(),
            measure::mebibytes(run.rss_bytes)
        );
        runs.push((*files, run));
    }
    for pair in runs.windows(2) {
        let [(few, small), (many, big)] = pair else { continue };
        let per_file = big.rss_bytes.saturating_sub(small.rss_bytes) / (many - few);
        if per_file > BYTES_PER_FILE_MAX {
            bail!("{per_file} bytes of memory for each file between {few} and {many}");
        }
        // Ten times the files in at most fifteen times the time: startup and noise aside.
        let ratio = big.wall.as_secs_f64() / small.wall.as_secs_f64().max(0.05);
        if ratio > 15.0 {
            bail!("{few} → {many} files took {ratio:.1} times as long");
        }
    }
    Ok(Verdict::Passed)
}
