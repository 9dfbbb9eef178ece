//! Platforms: what a user asks for, what an index offers, and which offer is best.
//!
//! Names are normalised as containerd's `platforms` package does. Variants are compared
//! inside one architecture only: asking for `linux/amd64` never yields a `386` image. It does
//! not know what the machine that runs the image can do.

use std::fmt;
use std::str::FromStr;

/// An operating system, an architecture and, for some architectures, a variant.
///
/// Values are normalised: `aarch64` is `arm64`, `arm` without variant is `arm/v7`,
/// `arm64/v8` and `amd64/v1` are written without their variant.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Platform {
    /// `linux`, in Go's GOOS words.
    pub os: String,
    /// `amd64`, `arm64`, …, in Go's GOARCH words.
    pub architecture: String,
    /// `v7`, `v3`, …; none for the base variant.
    pub variant: Option<String>,
}

/// Why a text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a platform: expected os/architecture[/variant] like linux/arm64")]
pub struct PlatformError(String);

impl Platform {
    /// The normalised platform of these words, as found in an index entry or a config.
    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Platform {
        let os = os.to_ascii_lowercase();
        let os = if os == "macos" { "darwin".to_owned() } else { os };
        let architecture = architecture.to_ascii_lowercase();
        let variant = variant.unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = normalised(&architecture, &variant);
        let variant = (!variant.is_empty()).then(|| variant.to_owned());
        Platform { os, architecture: architecture.to_owned(), variant }
    }

    /// Linux on the architecture this program was compiled for.
    #[must_use]
    pub fn of_this_machine() -> Platform {
        Platform::new("linux", std::env::consts::ARCH, None)
    }

    /// How well `offered` serves someone who asks for `self`: 0 is exact, larger is an older
    /// variant, none is not at all.
    #[must_use]
    pub fn rank(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        if self.variant == offered.variant {
            return Some(0);
        }
        let wanted = self.level()?;
        let offered = offered.level()?;
        wanted.checked_sub(offered)
    }

    /// The variant as a number that grows with what the machine must be able to do.
    fn level(&self) -> Option<u32> {
        let base = match self.architecture.as_str() {
            "amd64" => 1,
            "arm" => 7,
            "arm64" => 8,
            _ => return None,
        };
        match &self.variant {
            None => Some(base),
            Some(variant) => variant.strip_prefix('v')?.parse().ok(),
        }
    }

    /// Attestations and other entries that are no image carry `unknown/unknown`.
    pub(crate) fn is_unknown(&self) -> bool {
        self.os == "unknown" || self.architecture == "unknown"
    }
}

/// containerd `platforms/database.go`, `normalizeArch`.
fn normalised<'a>(architecture: &'a str, variant: &'a str) -> (&'a str, &'a str) {
    match (architecture, variant) {
        ("i386" | "i486" | "i586" | "i686" | "x86" | "386", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1" | "1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", with_v(variant)),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64" | "arm64", "9" | "v9.0") => ("arm64", "v9"),
        ("aarch64" | "arm64", variant) => ("arm64", variant),
        ("armhf", _) => ("arm", "v7"),
        ("armel", _) => ("arm", "v6"),
        ("arm", "" | "7") => ("arm", "v7"),
        ("arm", variant) => ("arm", with_v(variant)),
        ("riscv64gc", variant) => ("riscv64", variant),
        ("powerpc64le", variant) => ("ppc64le", variant),
        _ => (architecture, variant),
    }
}

fn with_v(variant: &str) -> &str {
    match variant {
        "2" => "v2",
        "3" => "v3",
        "4" => "v4",
        "5" => "v5",
        "6" => "v6",
        "8" => "v8",
        _ => variant,
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    /// Reads `os/arch/variant`, `os/arch`, or an architecture alone, which means Linux.
    fn from_str(text: &str) -> Result<Platform, PlatformError> {
        let parts: Vec<&str> = text.split('/').collect();
        let word = |part: &&str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.len() <= 64
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
        };
        if !parts.iter().all(word) {
            return Err(PlatformError(text.chars().take(100).collect()));
        }
        match parts.as_slice() {
            [architecture] if !matches!(*architecture, "linux" | "windows" | "darwin") => {
                Ok(Platform::new("linux", architecture, None))
            }
            [os, architecture] => Ok(Platform::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Platform::new(os, architecture, Some(variant))),
            _ => Err(PlatformError(text.chars().take(100).collect())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_normalised_like_containerd_does() {
        for (text, normal) in [
            ("linux/amd64", "linux/amd64"),
            ("amd64", "linux/amd64"),
            ("x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm64/8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/i686", "linux/386"),
            ("LINUX/ARM64", "linux/arm64"),
            ("linux/s390x", "linux/s390x"),
        ] {
            assert_eq!(platform(text).to_string(), normal);
        }
    }

    #[test]
    fn the_normal_form_parses_to_itself() {
        for text in ["linux/amd64", "linux/amd64/v3", "linux/arm/v5", "linux/arm64", "linux/386"] {
            assert_eq!(platform(text).to_string(), text);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "/", "linux/", "linux", "a/b/c/d", "linux/am d64", "linux/../etc"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_older_variant_serves_a_newer_machine_but_never_the_reverse() {
        let rank = |wanted: &str, offered: &str| platform(wanted).rank(&platform(offered));
        assert_eq!(rank("linux/arm/v7", "linux/arm/v7"), Some(0));
        assert_eq!(rank("linux/arm/v7", "linux/arm/v6"), Some(1));
        assert_eq!(rank("linux/arm/v7", "linux/arm/v5"), Some(2));
        assert_eq!(rank("linux/arm/v6", "linux/arm/v7"), None);
        assert_eq!(rank("linux/amd64/v3", "linux/amd64"), Some(2));
        assert_eq!(rank("linux/amd64", "linux/amd64/v2"), None);
        assert_eq!(rank("linux/arm64/v9", "linux/arm64"), Some(1));
        assert_eq!(rank("linux/amd64", "linux/386"), None);
        assert_eq!(rank("linux/arm64", "linux/arm/v7"), None);
        assert_eq!(rank("linux/amd64", "windows/amd64"), None);
    }
}
