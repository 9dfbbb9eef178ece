//! Debian on this machine: its own package sources, and a base system made from them.
//!
//! Host names of mirrors are read from apt's configuration, never written here.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::process::Program;

/// The release this machine runs, such as `bookworm`.
pub(crate) fn codename() -> Result<String> {
    let text = std::fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME: is this Debian?")
}

/// Apt's source files that hold nothing but this release's own suites.
fn sources(codename: &str) -> Result<Vec<PathBuf>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(list) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(list.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    files.retain(|file| {
        let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let Ok(text) = std::fs::read_to_string(file) else { return false };
        matches!(extension, "list" | "sources") && only_debian(&text, codename)
    });
    if files.is_empty() {
        bail!("no file below /etc/apt lists the sources of {codename} alone");
    }
    Ok(files)
}

/// Do all suites of this source file belong to the release?
fn only_debian(text: &str, codename: &str) -> bool {
    let mut suites = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(names) = line.strip_prefix("Suites:") {
            suites.extend(names.split_whitespace());
        } else if line.starts_with("deb ") {
            let mut words = line.split_whitespace().filter(|w| !w.contains(['[', ']', '=']));
            suites.extend(words.nth(2));
        }
    }
    !suites.is_empty() && suites.iter().all(|suite| suite.starts_with(codename))
}

/// Options that hand this machine's apt proxies and check settings to another apt.
pub(crate) fn apt_options() -> Result<Vec<String>> {
    let text = Program::new("apt-config").args(["dump", "Acquire"]).text()?;
    let wanted = ["Acquire::http::", "Acquire::https::", "Acquire::Check-"];
    Ok(text
        .lines()
        .filter(|line| wanted.iter().any(|prefix| line.starts_with(prefix)))
        .filter(|line| !line.contains("Timeout") && !line.contains("\"\""))
        .map(|line| line.trim_end_matches(';').replacen(' ', "=", 1).replace('"', ""))
        .collect())
}

/// Makes a tar file of a minimal system; an existing one is kept.
pub(crate) fn base_system(tar: &Path, packages: &str) -> Result<()> {
    if tar.exists() {
        return Ok(());
    }
    eprintln!("making {} with mmdebstrap", tar.display());
    let codename = codename()?;
    let part = crate::process::with_suffix(tar, ".part");
    let mut program = Program::new("mmdebstrap")
        .args(["--variant=minbase", "--format=tar", "--quiet"])
        .arg(format!("--include={packages}"))
        .arg("--customize-hook=printf '#!/bin/sh\\nexit 101\\n' > \"$1/usr/sbin/policy-rc.d\"")
        .arg("--customize-hook=chmod 755 \"$1/usr/sbin/policy-rc.d\"");
    for option in apt_options()? {
        program = program.arg(format!("--aptopt={}", option.replacen('=', " \"", 1) + "\""));
    }
    program.arg(&codename).arg(&part).args(sources(&codename)?).run()?;
    std::fs::rename(&part, tar)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_file_of_another_vendor_is_left_out() {
        let own = "Types: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n";
        assert!(only_debian(own, "bookworm"));
        assert!(only_debian("deb [arch=amd64] http://mirror bookworm main\n", "bookworm"));
        assert!(!only_debian("deb http://vendor nodistro main\n", "bookworm"));
        assert!(!only_debian("# nothing\n", "bookworm"));
    }
}
