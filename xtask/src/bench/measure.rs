//! One command measured several times: wall, CPU of its process tree, its biggest process.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::process::Program;

/// One run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
    pub(crate) rss_bytes: u64,
}

/// All runs of one command.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    runs: Vec<Run>,
}

impl Measured {
    pub(crate) fn wall_min(&self) -> f64 {
        self.walls().first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn wall_median(&self) -> f64 {
        let walls = self.walls();
        walls.get(walls.len() / 2).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn cpu_min(&self) -> f64 {
        self.runs.iter().map(|run| run.cpu.as_secs_f64()).fold(f64::INFINITY, f64::min)
    }

    pub(crate) fn rss_bytes_max(&self) -> u64 {
        self.runs.iter().map(|run| run.rss_bytes).max().unwrap_or(0)
    }

    pub(crate) fn add(&mut self, run: Run) {
        self.runs.push(run);
    }

    fn walls(&self) -> Vec<f64> {
        let mut walls: Vec<f64> = self.runs.iter().map(|run| run.wall.as_secs_f64()).collect();
        walls.sort_by(f64::total_cmp);
        walls
    }
}

/// One run under GNU time, which counts every process that was waited for.
pub(crate) fn once(program: Program) -> Result<Run> {
    let notes = tempfile::NamedTempFile::new()?;
    let line = program.line().to_owned();
    let time =
        Program::new("/usr/bin/time").args(["--format=%U %S %M", "--output"]).arg(notes.path());
    let program = program.under(time);
    let started = Instant::now();
    let outcome = program.outcome()?;
    let wall = started.elapsed();
    if !outcome.status.success() {
        bail!("`{line}` ended with {}:\n{}", outcome.status, outcome.said());
    }
    let (cpu, rss_bytes) = figures(notes.path())?;
    Ok(Run { wall, cpu, rss_bytes })
}

/// Bytes as MiB, for people.
#[expect(clippy::cast_precision_loss, reason = "a figure with one decimal")]
pub(crate) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn figures(notes: &Path) -> Result<(Duration, u64)> {
    let text = std::fs::read_to_string(notes)?;
    let line = text.lines().last().context("GNU time wrote nothing")?;
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [user, system, _] = numbers[..] else { bail!("GNU time wrote {line:?}") };
    let rss_kib: u64 = line.rsplit(' ').next().unwrap_or_default().parse()?;
    Ok((Duration::from_secs_f64(user + system), rss_kib * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_no_measurement() {
        assert!(once(Program::shell("exit 3")).is_err());
    }

    #[test]
    fn the_minimum_and_the_median_are_of_the_walls() {
        let run = |secs| Run {
            wall: Duration::from_secs(secs),
            cpu: Duration::from_secs(1),
            rss_bytes: secs,
        };
        let measured = Measured { runs: vec![run(3), run(1), run(2)] };
        assert!((measured.wall_min() - 1.0).abs() < 1e-9);
        assert!((measured.wall_median() - 2.0).abs() < 1e-9);
        assert_eq!(measured.rss_bytes_max(), 3);
    }
}
