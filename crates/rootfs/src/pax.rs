//! PAX extended headers: length-checked records (POSIX.1-2017 `pax`, "pax Extended Header")
//! and the few keys that mean something to an image. Knows nothing of the entry they belong to.

use std::collections::BTreeMap;

use ext4::Timestamp;

use crate::sparse::{self, decimal};
use crate::{Limits, TarProblem, xattr};

/// What one extended header overrides. An empty value leaves the header's own, as Go's
/// `archive/tar` has it, and with it Docker, containerd and skopeo.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link_path: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) mtime: Option<Timestamp>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) sparse: sparse::Records,
}

impl Pax {
    /// Reads all records of a header's data.
    pub(crate) fn parse(mut data: &[u8], limits: &Limits) -> Result<Self, TarProblem> {
        let mut pax = Self::default();
        while !data.is_empty() {
            let (key, value, rest) = record(data).ok_or(TarProblem::PaxRecord)?;
            pax.apply(key, value)?;
            data = rest;
        }
        let bytes: usize = pax.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes > limits.xattr_bytes_max {
            return Err(TarProblem::XattrBytes(limits.xattr_bytes_max));
        }
        if pax.xattrs.len() > limits.xattrs_max {
            return Err(TarProblem::Xattrs(limits.xattrs_max));
        }
        Ok(pax)
    }

    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            return self.xattr(name, value);
        }
        if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
            return self.sparse(name, value);
        }
        // An empty value takes back what the header said before.
        let given = (!value.is_empty()).then_some(value);
        match key {
            b"path" => self.path = given.map(without_nul).transpose()?,
            b"linkpath" => self.link_path = given.map(without_nul).transpose()?,
            b"size" => self.size = given.map(number).transpose()?,
            b"uid" => self.uid = given.map(owner).transpose()?,
            b"gid" => self.gid = given.map(owner).transpose()?,
            b"mtime" => {
                let time = |value| timestamp(value).ok_or(TarProblem::PaxNumber);
                self.mtime = given.map(time).transpose()?;
            }
            // atime, ctime, comment, uname, gname, hdrcharset, vendors' own: LIBARCHIVE.xattr, too.
            _ => {}
        }
        Ok(())
    }

    fn xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        if name.is_empty() || name.len() > 255 || name.contains(&0) {
            return Err(TarProblem::XattrName);
        }
        if xattr::is_kept(name) {
            self.xattrs.insert(name.to_vec(), value.to_vec());
        }
        Ok(())
    }

    fn sparse(&mut self, name: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        let records = &mut self.sparse;
        let given = (!value.is_empty()).then_some(value);
        match name {
            b"major" => records.major = given.map(<[u8]>::to_vec),
            b"minor" => records.minor = given.map(<[u8]>::to_vec),
            b"name" => records.name = given.map(without_nul).transpose()?,
            b"size" => records.size = given.map(number).transpose()?,
            b"realsize" => records.real_size = given.map(number).transpose()?,
            b"map" => records.map = Some(value.to_vec()),
            b"offset" if records.pairs.len().is_multiple_of(2) => {
                records.pairs.push(number(value)?);
            }
            b"numbytes" if !records.pairs.len().is_multiple_of(2) => {
                records.pairs.push(number(value)?);
            }
            b"offset" | b"numbytes" => return Err(TarProblem::SparseMap),
            // numblocks counts what follows; we count ourselves.
            _ => {}
        }
        Ok(())
    }
}

/// `"LENGTH KEY=VALUE\n"`, where LENGTH counts all of it: key, value and what follows.
fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    const LENGTH_DIGITS_MAX: usize = 20;
    let space = data.iter().take(LENGTH_DIGITS_MAX + 1).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&data[..space])?).ok()?;
    if length > data.len() {
        return None;
    }
    let (whole, rest) = data.split_at(length);
    let body = whole.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    if key.is_empty() || key.contains(&0) { None } else { Some((key, value, rest)) }
}

fn without_nul(value: &[u8]) -> Result<Vec<u8>, TarProblem> {
    if value.contains(&0) { Err(TarProblem::PaxRecord) } else { Ok(value.to_vec()) }
}

fn number(value: &[u8]) -> Result<u64, TarProblem> {
    decimal(value).filter(|value| i64::try_from(*value).is_ok()).ok_or(TarProblem::PaxNumber)
}

fn owner(value: &[u8]) -> Result<u32, TarProblem> {
    u32::try_from(number(value)?).map_err(|_| TarProblem::Owner)
}

/// `[-]SECONDS[.FRACTION]`; digits after the ninth of the fraction are cut.
fn timestamp(value: &[u8]) -> Option<Timestamp> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let (whole, fraction) = match value.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&value[..dot], &value[dot + 1..]),
        None => (value, &[][..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let secs = i64::try_from(decimal(whole)?).ok()?;
    let nanos = (0..9).fold(0_u32, |nanos, digit| {
        nanos * 10 + fraction.get(digit).map_or(0, |byte| u32::from(byte - b'0'))
    });
    Some(match (negative, nanos) {
        (false, nanos) => Timestamp { secs, nanos },
        (true, 0) => Timestamp { secs: -secs, nanos: 0 },
        (true, nanos) => Timestamp { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(data: &[u8]) -> Result<Pax, TarProblem> {
        Pax::parse(data, &Limits::default())
    }

    /// Records with the lengths they should have.
    fn records(bodies: &[&[u8]]) -> Vec<u8> {
        let one = |body: &&[u8]| {
            let rest = [&b" "[..], body, b"\n"].concat();
            let length = (rest.len() + 1..).find(|n| n.to_string().len() + rest.len() == *n);
            [length.unwrap().to_string().into_bytes(), rest].concat()
        };
        bodies.iter().map(one).collect::<Vec<_>>().concat()
    }

    #[test]
    fn records_override_what_the_header_says() {
        let bodies = ["path=a/b", "linkpath=l", "size=7", "uid=70000", "gid=5", "mtime=17.5"];
        let pax = parse(&records(&bodies.map(str::as_bytes))).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(pax.link_path.as_deref(), Some(&b"l"[..]));
        assert_eq!((pax.size, pax.uid, pax.gid), (Some(7), Some(70_000), Some(5)));
        assert_eq!(pax.mtime, Some(Timestamp { secs: 17, nanos: 500_000_000 }));
    }

    #[test]
    fn the_last_of_two_records_with_one_key_counts() {
        assert_eq!(parse(&records(&[b"path=a", b"path=b"])).unwrap().path.unwrap(), b"b");
    }

    #[test]
    fn a_record_whose_length_lies_is_refused() {
        for bad in [
            &b"11 path=a/b\n"[..],
            b"13 path=a/b\n",
            b"99 path=a/b\n",
            b" path=a\n",
            b"12path=a/b\n",
            b"-12 path=a/b\n",
            b"99999999999999999999999 path=a\n",
            b"5 =a\n",
            b"8 patha\n",
            b"3 \n",
            b"0 a=b\n",
            b"12 path=a\0b\n",
            b"\0\0\0\0",
        ] {
            assert!(parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn the_value_of_an_attribute_may_hold_any_bytes() {
        let pax = parse(&records(&[b"SCHILY.xattr.user.k=\0=\n\xff 1"])).unwrap();
        assert_eq!(pax.xattrs[&b"user.k"[..]], b"\0=\n\xff 1");
    }

    #[test]
    fn an_empty_value_leaves_the_header_alone() {
        let pax = parse(b"8 path=\n7 uid=\n").unwrap();
        assert_eq!((pax.path, pax.uid), (None, None));
    }

    #[test]
    fn an_empty_value_takes_back_what_was_said_before() {
        let bodies = ["path=a", "uid=7", "mtime=1", "path=", "uid=", "mtime=", "uid=8"];
        let pax = parse(&records(&bodies.map(str::as_bytes))).unwrap();
        assert_eq!((pax.path, pax.uid, pax.mtime), (None, Some(8), None));
        let bodies = ["GNU.sparse.major=1", "GNU.sparse.major=", "GNU.sparse.name=x"];
        assert_eq!(parse(&records(&bodies.map(str::as_bytes))).unwrap().sparse.version(), None);
    }

    #[test]
    fn times_before_1970_and_fractions_are_exact() {
        let time = |text: &str| timestamp(text.as_bytes()).map(|time| (time.secs, time.nanos));
        assert_eq!(time("1.25"), Some((1, 250_000_000)));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-0.5"), Some((-1, 500_000_000)));
        assert_eq!(time("-3"), Some((-3, 0)));
        assert_eq!(time("7."), Some((7, 0)));
        assert_eq!(time("7.1234567899"), Some((7, 123_456_789)));
        for bad in ["", "-", ".5", "1.x", "1e5", "+1", "9223372036854775808", "1.2.3"] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }

    /// Docker and containerd read no other; `bsdtar` writes every attribute under both names.
    #[test]
    fn attributes_are_those_of_schily_alone() {
        let data = records(&[b"SCHILY.xattr.user.a=raw", b"LIBARCHIVE.xattr.user.b=aGVsbG8="]);
        let names: Vec<_> = parse(&data).unwrap().xattrs.into_keys().collect();
        assert_eq!(names, [b"user.a"]);
    }
}
