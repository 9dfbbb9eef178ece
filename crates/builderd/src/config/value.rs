//! From a setting's text to its value, and back to text.
//!
//! Durations are read as Go's `time.ParseDuration` reads them (pkg.go.dev/time), because that is
//! how they are written in every document this service has to honour: `15s`, `1h30m`, `1.5h`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

use super::table::Kind;
use crate::tenant::TenantId;

/// A setting's value.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// Nothing was said and there is no default.
    Unset,
    /// Words.
    Text(String),
    /// Words that nobody sees again.
    Secret(SecretString),
    /// A file or directory.
    Path(PathBuf),
    /// Yes or no.
    Flag(bool),
    /// A count.
    Number(u32),
    /// From 0 to 1.
    Ratio(f64),
    /// A stretch of time.
    Duration(Duration),
    /// Bytes.
    Size(u64),
    /// Several words.
    Names(Vec<String>),
    /// Where to listen.
    Ip(IpAddr),
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Secret(one), Self::Secret(two)) => one.expose_secret() == two.expose_secret(),
            (Self::Secret(_), _) | (_, Self::Secret(_)) => false,
            (one, two) => one.to_string() == two.to_string(),
        }
    }
}

/// As it would be written in a file of settings; a secret as `***`.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unset => Ok(()),
            Self::Text(text) => f.write_str(text),
            Self::Secret(_) => f.write_str("***"),
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Ratio(ratio) => write!(f, "{ratio:?}"),
            Self::Duration(duration) => f.write_str(&duration_text(*duration)),
            Self::Size(bytes) => f.write_str(&size_text(*bytes)),
            Self::Names(names) => f.write_str(&names.join(",")),
            Self::Ip(ip) => write!(f, "{ip}"),
        }
    }
}

impl Kind {
    /// Reads `text`, which is not empty, as it was written under `name`; says what is expected
    /// when it cannot be read.
    pub(super) fn read(&self, name: &str, text: &str) -> Result<Value, String> {
        match self {
            Self::Text => Ok(Value::Text(text.to_owned())),
            Self::Secret => Ok(Value::Secret(SecretString::from(text))),
            Self::Path => Ok(Value::Path(PathBuf::from(text))),
            Self::Flag => flag(text).map(Value::Flag).ok_or_else(|| "true or false".to_owned()),
            Self::Number { min, max } => number(text, *min, *max),
            Self::Ratio => ratio(text),
            Self::Duration => match duration(text) {
                Some(duration) if !duration.is_zero() => Ok(Value::Duration(duration)),
                _ => Err("a duration such as `15s`, `10m`, `1h30m` or `1.5h`, more than 0".into()),
            },
            Self::Size => size(text, name.ends_with("_GB")),
            Self::Names => Ok(Value::Names(names(text))),
            Self::Hosts => each(text, host),
            Self::Registries => each(text, registry),
            Self::Places => each(text, place),
            Self::PlacesOfTenants => each(text, place_of_tenant),
            Self::NamesOfTiers => each(text, super::egress::name_of_tier),
            Self::NamesOfTenants => each(text, super::egress::name_of_tenant),
            Self::Domains => each(text, domain),
            Self::OneOf(words) => one_of(text, words),
            Self::Choice { words, later, why } => match one_of(text, later) {
                Ok(_) => Err(format!("unimplemented: {why}")),
                Err(_) => one_of(text, words),
            },
            Self::Ip => ip(text),
            Self::Later { accepts, why } => {
                fixed(text, accepts).ok_or_else(|| format!("unimplemented: {why}"))
            }
            Self::Never { accepts, why } => {
                fixed(text, accepts).ok_or_else(|| format!("refused: {why}"))
            }
        }
    }
}

fn fixed(text: &str, accepts: &[&str]) -> Option<Value> {
    let same = |word: &&str| match (flag(text), flag(word)) {
        (Some(one), Some(two)) => one == two,
        _ => word.eq_ignore_ascii_case(text),
    };
    accepts.iter().any(same).then(|| Value::Text(text.to_owned()))
}

fn flag(text: &str) -> Option<bool> {
    // What Go's strconv.ParseBool takes.
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

fn number(text: &str, min: u32, max: u32) -> Result<Value, String> {
    let expected = || match max {
        u32::MAX => format!("a whole number, {min} or more"),
        _ => format!("a whole number from {min} to {max}"),
    };
    match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(Value::Number(number)),
        _ => Err(expected()),
    }
}

fn ratio(text: &str) -> Result<Value, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(Value::Ratio(ratio)),
        _ => Err("a number from 0.0 to 1.0".into()),
    }
}

fn size(text: &str, in_gib: bool) -> Result<Value, String> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let text = if in_gib && plain { format!("{text}G") } else { text.to_owned() };
    match parse_size(&text) {
        Ok(0) | Err(_) if in_gib => Err("a number of GiB, 1 or more, such as `100`".into()),
        Ok(0) | Err(_) => Err("a size such as `100GB` or bytes, more than 0".into()),
        Ok(bytes) => Ok(Value::Size(bytes)),
    }
}

fn names(text: &str) -> Vec<String> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

/// Words that are all of one sort; else what is expected in the place of each that is not.
fn each(text: &str, read: fn(&str) -> Result<String, String>) -> Result<Value, String> {
    let (mut good, mut expected) = (Vec::new(), Vec::new());
    for name in names(text) {
        match read(&name) {
            Ok(word) => good.push(word),
            Err(other) if expected.contains(&other) => {}
            Err(other) => expected.push(other),
        }
    }
    if expected.is_empty() { Ok(Value::Names(good)) } else { Err(expected.join(", and ")) }
}

/// A registry as it is named without a scheme; a URL would never be the same as one.
fn host(text: &str) -> Result<String, String> {
    match (oci::check_registry(text), oci::registry_named(text)) {
        (Ok(()), _) => Ok(text.to_owned()),
        (Err(_), Some(host)) => Err(format!("`HOST[:PORT]`: write `{host}`")),
        (Err(_), None) => Err("`HOST[:PORT]`, such as `localhost:5000`".into()),
    }
}

/// A registry as images are told apart by it (Docker Hub has several names), or `*` for all.
fn registry(text: &str) -> Result<String, String> {
    match text {
        "*" => Ok(text.to_owned()),
        name => host(name).map(|host| oci::registry_named(&host).unwrap_or(host)),
    }
}

/// A place that is not public, as the guard of builds takes it.
fn place(text: &str) -> Result<String, String> {
    let read = text.parse::<oci::AllowedPlace>();
    read.map(|place| place.to_string()).map_err(|problem| match problem {
        oci::PlaceError::Shape => {
            let expected = "`HOST[:PORT]` or `NETWORK/BITS[:PORT]`, such as `10.0.0.0/8:5000`";
            format!("{expected}, without a scheme")
        }
        problem @ (oci::PlaceError::Bits(..) | oci::PlaceError::Never(_)) => {
            format!("a place that can be allowed: {problem}")
        }
    })
}

/// `TENANT=PLACE`.
fn place_of_tenant(text: &str) -> Result<String, String> {
    let Some((tenant, of)) = text.split_once('=') else {
        return Err("`TENANT=HOST[:PORT]`, such as `acme=hub.internal:5000`".into());
    };
    let tenant: TenantId = tenant.trim().parse().map_err(|error| format!("a tenant: {error}"))?;
    Ok(format!("{tenant}={}", place(of.trim())?))
}

/// A domain, which stands for all below it; `*.` says the same.
fn domain(text: &str) -> Result<String, String> {
    let name = text.strip_prefix("*.").unwrap_or(text).trim_end_matches('.');
    match oci::check_registry(name) {
        Ok(()) if !name.contains(':') => Ok(name.to_ascii_lowercase()),
        _ => Err("domains, such as `example.com`".into()),
    }
}

/// As [`registry`], for the command line.
pub(crate) fn parse_registry(text: &str) -> Result<String, String> {
    registry(text.trim()).map_err(|expected| format!("expected {expected}"))
}

/// A registry in a list of the command line, where nothing is nothing: variables may be empty.
pub(crate) fn parse_host(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Ok(String::new()),
        name => host(name).map_err(|expected| format!("expected {expected}")),
    }
}

/// A mirror as users write it: `HOST=MIRROR`, `*=MIRROR` or `MIRROR`, each `HOST[:PORT]`, the
/// mirror with a path perhaps. Nothing is nothing, as in [`parse_host`].
pub(crate) fn parse_mirror(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(String::new());
    }
    let (of, mirror) = match text.split_once('=') {
        Some((of, mirror)) => (Some(parse_registry(of)?), mirror.trim()),
        None => (None, text),
    };
    let is_url = mirror.contains("://");
    let name = if is_url { mirror } else { mirror.split('/').next().unwrap_or_default() };
    host(name).map_err(|expected| format!("expected {expected}"))?;
    if !oci::is_mirror(mirror) {
        return Err(format!(
            "`{mirror}`: expected `HOST[:PORT]/PATH`, such as `localhost:5000/hub`"
        ));
    }
    Ok(of.map_or_else(|| mirror.to_owned(), |of| format!("{of}={mirror}")))
}

fn one_of(text: &str, words: &[&str]) -> Result<Value, String> {
    let found = words.iter().find(|word| word.eq_ignore_ascii_case(text));
    let all = || words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ");
    found.map(|word| Value::Text((*word).to_owned())).ok_or_else(|| format!("one of {}", all()))
}

fn ip(text: &str) -> Result<Value, String> {
    if text == "localhost" {
        return Ok(Value::Ip(Ipv4Addr::LOCALHOST.into()));
    }
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let ip = bare.parse().map(Value::Ip);
    ip.map_err(|_| "an IP address such as `0.0.0.0` or `::1`, or `localhost`".into())
}

/// A duration as Go writes it; none if it is none, is negative or does not fit.
fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut nanos: u128 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number_end = rest.find(|char: char| !char.is_ascii_digit() && char != '.')?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|char: char| char.is_ascii_digit() || char == '.');
        let (unit, tail) = tail.split_at(unit_end.unwrap_or(tail.len()));
        nanos = nanos.checked_add(part(number, unit)?)?;
        rest = tail;
    }
    u64::try_from(nanos).ok().map(Duration::from_nanos)
}

/// One `1.5h`, in nanoseconds.
fn part(number: &str, unit: &str) -> Option<u128> {
    let unit: u128 = match unit {
        "ns" => 1,
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60 * 1_000_000_000,
        "h" => 3600 * 1_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.len() + fraction.len() == 0 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut nanos = whole.checked_mul(unit)?;
    let mut place = unit;
    for digit in fraction.bytes() {
        place /= 10;
        nanos = nanos.checked_add(u128::from(digit - b'0').checked_mul(place)?)?;
    }
    Some(nanos)
}

fn duration_text(duration: Duration) -> String {
    let (secs, nanos) = (duration.as_secs(), duration.subsec_nanos());
    if nanos != 0 {
        return format!("{}s", duration.as_secs_f64());
    }
    let parts = [(secs / 3600, "h"), (secs / 60 % 60, "m"), (secs % 60, "s")];
    let text: String = parts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, unit)| format!("{count}{unit}"))
        .collect();
    if text.is_empty() { "0s".to_owned() } else { text }
}

fn size_text(bytes: u64) -> String {
    let units = [(40, "TB"), (30, "GB"), (20, "MB"), (10, "KB")];
    let whole = units.iter().find(|(shift, _)| bytes != 0 && bytes.is_multiple_of(1 << shift));
    whole.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

/// A size as users write it: `512M`, `2G`, `1GiB`, `4096`; units are powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 =
        number.parse().map_err(|_| "expected a number, with K, M, G or T if wanted".to_owned())?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        other => return Err(format!("unknown unit `{other}`: use K, M, G or T (powers of 1024)")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "the size is too large".to_owned())
}

/// A duration as Go writes it, also with days (`90d`), which Go does not know.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u64>().ok());
    let read = match days {
        Some(days) => days.checked_mul(86_400).map(Duration::from_secs),
        None => duration(text),
    };
    read.ok_or_else(|| "expected a duration such as `90d`, `12h` or `1h30m`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        let cases: [(&str, u64); 12] = [
            ("15s", 15_000),
            ("15m", 900_000),
            ("1h", 3_600_000),
            ("300s", 300_000),
            ("900s", 900_000),
            ("1h30m", 5_400_000),
            ("1.5h", 5_400_000),
            (".5s", 500),
            ("1.s", 1000),
            ("2h45m30.5s", 9_930_500),
            ("250ms", 250),
            ("1000000us", 1000),
        ];
        for (text, millis) in cases {
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(duration("1µs"), Some(Duration::from_micros(1)));
        assert_eq!(duration("7ns"), Some(Duration::from_nanos(7)));
        assert_eq!(duration("0"), Some(Duration::ZERO));
        for bad in ["", "15", "s", ".s", "1x", "-1s", "1 s", "1h 30m", "1..5h", "9999999h", "1d"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        for text in ["15s", "1h30m", "10m", "0.25s", "1h0.5s"] {
            let read = duration(text).unwrap();
            assert_eq!(duration(&duration_text(read)), Some(read), "{text}");
        }
        for bytes in [1, 4096, 5 << 30, (5 << 30) + 1, 2_147_483_648, 3 << 40] {
            assert_eq!(parse_size(&size_text(bytes)), Ok(bytes));
        }
    }

    #[test]
    fn registries_are_named_as_images_name_them() {
        let read = |text| Kind::Registries.read("DOCKER_ALLOWED_REGISTRIES", text);
        let shown = |text| read(text).unwrap().to_string();
        assert_eq!(shown("GHCR.io, localhost:5000,*"), "ghcr.io,localhost:5000,*");
        assert_eq!(shown("index.docker.io"), "docker.io");
        assert!(read("quay.io,https://ghcr.io/").unwrap_err().contains("write `ghcr.io`"));
        for bad in ["ghcr.io/org", "a b", "*.example.com", "host:0", "[::1"] {
            assert!(read(bad).unwrap_err().contains("HOST[:PORT]"), "{bad}");
        }
    }

    #[test]
    fn a_mirror_that_no_build_could_use_is_refused() {
        for (written, read) in [
            ("", ""),
            ("localhost:5000", "localhost:5000"),
            ("GHCR.io = localhost:5000/hub-cache/x/", "ghcr.io=localhost:5000/hub-cache/x/"),
            ("*=[::1]:5000", "*=[::1]:5000"),
        ] {
            assert_eq!(parse_mirror(written).as_deref(), Ok(read), "{written}");
        }
        for bad in ["=a.b", "ghcr.io=", "a.b/../x", "a.b/UPPER", "a.b//x", "a/b=c.d", "a.b?x=y"] {
            assert!(parse_mirror(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn places_and_domains_that_mean_nothing_are_refused_with_what_to_write() {
        let places = |text| Kind::Places.read("EGRESS_ALLOWED_PRIVATE", text);
        let shown = |text| places(text).unwrap().to_string();
        let all = "Hub.internal:5000, 10.0.0.0/8,[fd00::/8]:443";
        assert_eq!(shown(all), "hub.internal:5000,10.0.0.0/8,[fd00::/8]:443");
        assert!(places("http://hub.internal").unwrap_err().contains("without a scheme"));
        assert!(places("10.0.0.5/8").unwrap_err().contains("write `10.0.0.0/8`"));
        assert!(places("169.254.169.254").unwrap_err().contains("cannot be allowed"));
        let of = |text| Kind::PlacesOfTenants.read("EGRESS_ALLOWED_PRIVATE_OF_TENANTS", text);
        let all = "acme=Hub.internal:5000, a.b = 10.0.0.0/8,acme=[fd00::/8]:443";
        let shown = "acme=hub.internal:5000,a.b=10.0.0.0/8,acme=[fd00::/8]:443";
        assert_eq!(of(all).unwrap().to_string(), shown);
        for (bad, word) in [
            ("hub.internal", "acme=hub.internal:5000"),
            ("=hub.internal", "a tenant"),
            ("../x=hub.internal", "a tenant"),
            ("acme=", "HOST[:PORT]"),
            ("acme=http://hub.internal", "without a scheme"),
            ("acme=169.254.169.254", "cannot be allowed"),
        ] {
            assert!(of(bad).unwrap_err().contains(word), "{bad}");
        }
        let domains = |text| Kind::Domains.read("BLOCKED_DOMAINS", text);
        assert_eq!(domains("*.Evil.example,a.b").unwrap().to_string(), "evil.example,a.b");
        for bad in ["https://evil.example", "a.b:80", "a b", "*", "[::1]"] {
            assert!(domains(bad).unwrap_err().contains("example.com"), "{bad}");
        }
    }

    #[test]
    fn a_tokens_life_may_be_said_in_days() {
        assert_eq!(parse_duration("90d"), Ok(Duration::from_secs(90 * 86_400)));
        assert_eq!(parse_duration("36h"), Ok(Duration::from_secs(36 * 3600)));
        assert!(parse_duration("soon").is_err());
    }
}
