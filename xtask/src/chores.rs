//! The small chores: serve the test images, boot an image, compare one with a reference.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::arguments::Arguments;
use crate::boot::Kernel;
use crate::compare::{self, Rules, reference, walk};
use crate::mount::Mount;
use crate::process::Program;
use crate::registry::Registry;
use crate::{images, workspace};

/// How many differences are worth printing.
const DIFFERENCES_SHOWN_MAX: usize = 30;

/// `cargo xtask serve [NAME...]`: a registry with the images until standard input ends.
pub(crate) fn serve(arguments: Arguments) -> Result<()> {
    let registry = Registry::start()?;
    for name in arguments.rest()? {
        println!("{}", registry.push(&images::layout(&name)?, &name)?);
    }
    println!("serving on {}; end of input stops it", registry.address());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

/// `cargo xtask boot IMAGE [COMMAND] [--keep]`
pub(crate) fn boot(mut arguments: Arguments) -> Result<()> {
    let keep = arguments.flag("--keep");
    let words = arguments.rest()?;
    let image = words.first().context("which image file?")?;
    let command = words.get(1).map_or("cat /etc/os-release", String::as_str);
    let kernel = Kernel::fetch()?;
    let image = Path::new(image);
    let proof =
        if keep { kernel.boot_and_keep(image, command)? } else { kernel.boot(image, command)? };
    println!("{}\nbooted in {:.1} s", proof.console.trim(), proof.wall.as_secs_f64());
    Ok(())
}

/// `cargo xtask compare IMAGE LAYOUT [--reference umoci|overlay|podman]`
pub(crate) fn compare(mut arguments: Arguments) -> Result<()> {
    let tool = arguments.value("--reference")?.unwrap_or_else(|| "overlay".into());
    let words = arguments.rest()?;
    let [image, layout] = &words[..] else { bail!("wanted: IMAGE LAYOUT") };
    let scratch = workspace::kept("scratch")?;
    let expected = match tool.as_str() {
        "umoci" => reference::umoci(Path::new(layout), &scratch)?,
        "podman" => reference::podman(Path::new(layout), &scratch)?,
        "overlay" => reference::overlay(Path::new(layout), &scratch)?,
        other => bail!("no reference tool is called {other}"),
    };
    let lines = image_differences(Path::new(image), expected)?;
    for line in lines.iter().take(DIFFERENCES_SHOWN_MAX) {
        println!("{line}");
    }
    if !lines.is_empty() {
        bail!("{} differences", lines.len());
    }
    println!("no differences");
    Ok(())
}

/// Mounts an image and names every difference from a reference.
pub(crate) fn image_differences(
    image: &Path,
    expected: reference::Reference,
) -> Result<Vec<String>> {
    let mount = Mount::image(image, "ro,noload")?;
    let found = walk::walk(mount.path())?;
    let mut rules = Rules { mtime_unknown: expected.mtime_unknown, ..Rules::image() };
    if !expected.root_known {
        rules.ignored.push("");
    }
    Ok(compare::differences(&expected.tree, &found, &rules))
}

/// `e2fsck -fn`: anything but a clean bill is an error that repeats its complaints.
pub(crate) fn fsck(image: &Path) -> Result<()> {
    let outcome = Program::new("e2fsck").args(["-f", "-n"]).arg(image).outcome()?;
    if !outcome.status.success() {
        bail!("e2fsck -fn {}: {}\n{}", image.display(), outcome.status, outcome.said());
    }
    Ok(())
}

/// A directory for one chore's temporary files on the disk that holds `target/`.
pub(crate) fn scratch() -> Result<tempfile::TempDir> {
    let dir: PathBuf = workspace::kept("scratch")?;
    Ok(tempfile::tempdir_in(dir)?)
}
