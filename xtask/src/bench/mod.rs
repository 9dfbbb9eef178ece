//! `cargo xtask bench`: the peers' table, in one run on one machine.
//!
//! Prints markdown for `docs/benchmarks.md`. Judges speed only; whether the results are right is
//! the stories' business.

mod contender;
pub(crate) mod floor;
mod isolation;
pub(crate) mod measure;
mod series;
mod service;
mod variant;

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use contender::{Contender, Course};
use measure::{Measured, mebibytes};

use crate::arguments::Arguments;
use crate::compare::reference;
use crate::mount;
use crate::process::Program;
use crate::registry::Registry;
use crate::{chores, images, machine, workspace};

/// What the user wants measured.
struct Plan {
    images: Vec<String>,
    runs: u64,
    peer_runs: u64,
    peers: bool,
    failing_peers: bool,
    series: bool,
    reflink: Option<String>,
    binary: Option<String>,
}

impl Plan {
    fn read(mut arguments: Arguments) -> Result<Self> {
        let plan = Self {
            images: arguments
                .list("--images")?
                .unwrap_or_else(|| ["small", "node", "large"].map(str::to_owned).to_vec()),
            runs: arguments.number("--runs")?.unwrap_or(5),
            peer_runs: arguments.number("--peer-runs")?.unwrap_or(1),
            peers: !arguments.flag("--no-peers"),
            failing_peers: !arguments.flag("--no-failing-peers"),
            series: !arguments.flag("--no-series"),
            reflink: arguments.value("--reflink")?.or_else(|| Some("xfs".into())),
            binary: arguments.value("--binary")?,
        };
        arguments.end()?;
        if plan.runs == 0 || plan.peer_runs == 0 {
            bail!("at least one run is needed");
        }
        Ok(plan)
    }
}

/// `cargo xtask bench [--images a,b] [--runs N] [--peer-runs N] [--no-peers] [--no-failing-peers]
/// [--no-series] [--reflink xfs|btrfs|none] [--binary FILE]`, or `--service [--binary FILE]`, or
/// `--isolation [--runs N] [--noise WORD] [--binary FILE]`
pub(crate) fn run(mut arguments: Arguments) -> Result<()> {
    if arguments.flag("--service") {
        let binary = arguments.value("--binary")?;
        arguments.end()?;
        machine::require(&[machine::DEMO, machine::SERVICE])?;
        return service::run(binary);
    }
    if arguments.flag("--isolation") {
        let (binary, rounds) = (arguments.value("--binary")?, arguments.number("--runs")?);
        let noise = arguments.value("--noise")?;
        arguments.end()?;
        machine::require(&[machine::DEMO, machine::SERVICE])?;
        return isolation::run(binary, rounds, noise.as_deref());
    }
    let plan = Plan::read(arguments)?;
    machine::require(&[machine::DEMO, machine::STORIES])?;
    let builderd = match &plan.binary {
        Some(path) => Path::new(path).canonicalize()?,
        None => workspace::release_binary("builderd")?,
    };
    let xtask = workspace::release_binary("xtask")?;
    let registry = Registry::start()?;
    let scratch = chores::scratch()?;
    environment(&builderd)?;
    for image in &plan.images {
        let layout = images::layout(image)?;
        let course = Course {
            reference: registry.push(&layout, image)?,
            inodes: if plan.peers { names_in(&layout, scratch.path())? } else { 0 },
            registry: &registry,
            image,
            layout,
            builderd: builderd.clone(),
            xtask: xtask.clone(),
        };
        one_image(&plan, &course, scratch.path())?;
    }
    if plan.series {
        series::run(&builderd, scratch.path())?;
    }
    Ok(())
}

/// How many inodes the merged image has.
fn names_in(layout: &Path, scratch: &Path) -> Result<usize> {
    Ok(reference::umoci(layout, scratch)?.tree.len())
}

fn one_image(plan: &Plan, course: &Course<'_>, work: &Path) -> Result<()> {
    println!("\n### {}\n\n{}\n", course.image, weight(&course.layout)?);
    println!("| on ext4 | wall min | median | CPU | RSS | of the floor | builderd is |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    let ours = [
        Contender::Floor,
        Contender::NoCache,
        Contender::NoCacheNoChecksum,
        Contender::Cold,
        Contender::ColdNoChecksum,
        Contender::Warm,
        Contender::WarmNoChecksum,
        Contender::ChangedTop,
        Contender::ChangedTopNoChecksum,
    ];
    let measured = race(course, &ours, work, plan.runs)?;
    let wall = |wanted: Contender| {
        measured.iter().find(|(who, _)| *who == wanted).map(|(_, m)| m.wall_min())
    };
    let floor = wall(Contender::Floor).context("no floor")?;
    let cold = wall(Contender::Cold).context("no cold run")?;
    for (who, figures) in &measured {
        row(who.label(), figures, floor, None);
    }
    if plan.peers {
        for peer in peers(plan, course) {
            match race(course, &[peer], work, plan.peer_runs) {
                Ok(figures) => figures.iter().for_each(|(who, figures)| {
                    row(who.label(), figures, floor, Some(cold));
                }),
                Err(error) => {
                    let text = format!("{error:#}");
                    let last = text.lines().last().unwrap_or_default();
                    println!("| {} | fails: {last} | | | | | |", peer.label());
                }
            }
            peer.clear(work)?;
        }
    }
    if let Some(kind) = plan.reflink.as_deref().filter(|kind| *kind != "none") {
        on_reflinks(plan, course, work, kind)?;
    }
    Ok(())
}

/// Who else takes part. On the node image mke2fs must be told the number of inodes; that it
/// fails otherwise is shown once.
fn peers(plan: &Plan, course: &Course<'_>) -> Vec<Contender> {
    let many_files = course.image == "node";
    let mut list = vec![
        Contender::UmociMke2fs { inodes_given: many_files },
        Contender::PodmanExport { inodes_given: many_files },
    ];
    if many_files && plan.failing_peers {
        list.push(Contender::UmociMke2fs { inodes_given: false });
        list.push(Contender::PodmanExport { inodes_given: false });
    }
    list
}

/// The same builds where the host's file system shares blocks.
fn on_reflinks(plan: &Plan, course: &Course<'_>, work: &Path, kind: &str) -> Result<()> {
    println!("\n| on {kind} in a loop file | wall min | median | CPU | RSS | of the floor | |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    let disk = work.join("disk");
    let measured = {
        let mount = mount::fresh(&disk, kind, 24 << 30)?;
        let list = [
            Contender::Floor,
            Contender::NoCache,
            Contender::NoCacheNoChecksum,
            Contender::Cold,
            Contender::ColdNoChecksum,
            Contender::Warm,
            Contender::WarmNoChecksum,
            Contender::ChangedTopNoChecksum,
        ];
        race(course, &list, mount.path(), plan.runs)?
    };
    std::fs::remove_file(&disk)?;
    let floor = measured.first().map_or(f64::NAN, |(_, figures)| figures.wall_min());
    for (who, figures) in &measured {
        row(who.label(), figures, floor, None);
    }
    Ok(())
}

/// Runs all contenders in turn, so that a slow minute of the machine hits everyone.
fn race(
    course: &Course<'_>,
    list: &[Contender],
    work: &Path,
    runs: u64,
) -> Result<Vec<(Contender, Measured)>> {
    let mut measured: Vec<(Contender, Measured)> =
        list.iter().map(|who| (*who, Measured::default())).collect();
    for turn in 0..runs {
        for (who, figures) in &mut measured {
            let program = who.prepare(course, work, turn)?;
            figures.add(measure::once(program)?);
            who.clear(work)?;
        }
    }
    Ok(measured)
}

fn row(label: &str, figures: &Measured, floor: f64, cold: Option<f64>) {
    let wall = figures.wall_min();
    println!(
        "| {label} | {wall:.2} s | {:.2} s | {:.2} s | {:.0} MiB | {:.2} | {} |",
        figures.wall_median(),
        figures.cpu_min(),
        mebibytes(figures.rss_bytes_max()),
        wall / floor,
        cold.map_or(String::new(), |cold| format!("{:.1}× faster", wall / cold)),
    );
}

/// Layers and bytes of an image in one sentence.
fn weight(layout: &Path) -> Result<String> {
    let blobs = reference::layer_blobs(layout)?;
    let mut bytes = 0;
    for blob in &blobs {
        bytes += blob.metadata()?.len();
    }
    Ok(format!("{} layers, {:.1} MB compressed.", blobs.len(), mebibytes(bytes) * 1.048_576))
}

/// On what the figures were taken.
fn environment(builderd: &Path) -> Result<()> {
    let read = |script: &str| Program::shell(script).text().unwrap_or_else(|_| "?".into());
    println!("### Machine and tools\n");
    println!("- {}", read("grep -m1 'model name' /proc/cpuinfo | cut -d: -f2"));
    println!("- {} CPUs, {}", read("nproc"), read("grep MemTotal /proc/meminfo | tr -s ' '"));
    println!("- Linux {}, {}", read("uname -r"), read(". /etc/os-release; echo $PRETTY_NAME"));
    println!("- file system of the work directory: {}", {
        let top = workspace::top();
        Program::new("stat").args(["-f", "-c", "%T"]).arg(top).text()?
    });
    println!("- {}", Program::new(builderd).arg("--version").text()?);
    for package in ["skopeo", "umoci", "podman", "e2fsprogs", "docker-registry"] {
        let version = format!("dpkg-query -W -f '${{Package}} ${{Version}}' {package}");
        println!("- {}", read(&version));
    }
    Ok(())
}
