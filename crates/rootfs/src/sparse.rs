//! Maps of sparse files in tars: old GNU headers, PAX 0.0, 0.1 and 1.0, as the GNU tar manual
//! ("Storing Sparse Files") describes them. Knows maps only; who reads the bytes is `tar`.

/// One piece of a file that is stored in the tar; what lies between pieces is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// The map does not describe the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadMap;

/// The `GNU.sparse.*` records of one PAX header.
#[derive(Clone, Debug, Default)]
pub(crate) struct Records {
    pub(crate) major: Option<Vec<u8>>,
    pub(crate) minor: Option<Vec<u8>>,
    pub(crate) name: Option<Vec<u8>>,
    /// `GNU.sparse.size`, which wins over `GNU.sparse.realsize`.
    pub(crate) size: Option<u64>,
    pub(crate) real_size: Option<u64>,
    /// `GNU.sparse.map`, comma-separated (0.1).
    pub(crate) map: Option<Vec<u8>>,
    /// `GNU.sparse.offset` and `GNU.sparse.numbytes` in turn (0.0).
    pub(crate) pairs: Vec<u64>,
}

/// Where the map of a PAX sparse file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PaxVersion {
    /// In the PAX records (0.0 and 0.1).
    InRecords,
    /// Before the file's data (1.0).
    InData,
    /// A version nobody wrote; reading the file as plain would give wrong bytes.
    Unknown,
}

impl Records {
    /// `None` for a file that is not sparse.
    pub(crate) fn version(&self) -> Option<PaxVersion> {
        match (self.major.as_deref(), self.minor.as_deref()) {
            (Some(b"0"), Some(b"0" | b"1")) => Some(PaxVersion::InRecords),
            (Some(b"1"), Some(b"0")) => Some(PaxVersion::InData),
            (None, None) if self.has_map() => Some(PaxVersion::InRecords),
            (None, None) => None,
            _ => Some(PaxVersion::Unknown),
        }
    }

    fn has_map(&self) -> bool {
        self.map.as_ref().is_some_and(|map| !map.is_empty()) || !self.pairs.is_empty()
    }

    /// The map of versions 0.0 and 0.1; where a header has both, that of 0.0 counts.
    pub(crate) fn segments(&self) -> Result<Vec<Segment>, BadMap> {
        let map = self.map.as_ref().filter(|_| self.pairs.is_empty());
        let Some(map) = map else { return pair_up(&self.pairs) };
        let numbers: Option<Vec<u64>> = match map.as_slice() {
            b"" => Some(Vec::new()),
            map => map.split(|byte| *byte == b',').map(decimal).collect(),
        };
        pair_up(&numbers.ok_or(BadMap)?)
    }
}

/// Numbers in turn offset and length.
pub(crate) fn pair_up(numbers: &[u64]) -> Result<Vec<Segment>, BadMap> {
    if !numbers.len().is_multiple_of(2) {
        return Err(BadMap);
    }
    let pairs = numbers.chunks_exact(2);
    Ok(pairs.map(|pair| Segment { offset: pair[0], length: pair[1] }).collect())
}

/// An unsigned decimal number: digits only, no sign, no space.
pub(crate) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(*digit - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

/// The segments ascend, do not overlap, end within the file and need exactly the bytes the tar has.
pub(crate) fn check(segments: &[Segment], real_size: u64, stored: u64) -> Result<(), BadMap> {
    let mut end = 0_u64;
    let mut total = 0_u64;
    for segment in segments {
        if segment.offset < end {
            return Err(BadMap);
        }
        end = segment.offset.checked_add(segment.length).ok_or(BadMap)?;
        total = total.checked_add(segment.length).ok_or(BadMap)?;
    }
    if end > real_size || total != stored { Err(BadMap) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(offset: u64, length: u64) -> Segment {
        Segment { offset, length }
    }

    #[test]
    fn a_map_must_fit_the_file_and_the_stored_bytes() {
        assert_eq!(check(&[segment(0, 5), segment(10, 5), segment(20, 0)], 20, 10), Ok(()));
        assert_eq!(check(&[], 100, 0), Ok(()));
        assert_eq!(check(&[segment(0, 5)], 20, 6), Err(BadMap));
        assert_eq!(check(&[segment(10, 5), segment(0, 5)], 20, 10), Err(BadMap));
        assert_eq!(check(&[segment(0, 5), segment(4, 5)], 20, 10), Err(BadMap));
        assert_eq!(check(&[segment(16, 5)], 20, 5), Err(BadMap));
        assert_eq!(check(&[segment(u64::MAX, 5)], u64::MAX, 5), Err(BadMap));
    }

    #[test]
    fn a_map_in_records_is_pairs_of_numbers() {
        let records = Records { map: Some(b"0,5,10,5".to_vec()), ..Records::default() };
        assert_eq!(records.version(), Some(PaxVersion::InRecords));
        assert_eq!(records.segments(), Ok(vec![segment(0, 5), segment(10, 5)]));
        for bad in ["0", "0,5,", "a,5", "-1,5", "99999999999999999999,1"] {
            let records = Records { map: Some(bad.into()), ..Records::default() };
            assert_eq!(records.segments(), Err(BadMap), "{bad}");
        }
    }

    #[test]
    fn of_two_maps_the_pairs_count() {
        let records =
            Records { map: Some(b"0,5".to_vec()), pairs: vec![8, 2], ..Records::default() };
        assert_eq!(records.segments(), Ok(vec![segment(8, 2)]));
    }

    #[test]
    fn an_unknown_version_is_not_taken_for_a_plain_file() {
        let records = Records { major: Some(b"2".to_vec()), ..Records::default() };
        assert_eq!(records.version(), Some(PaxVersion::Unknown));
        assert_eq!(Records::default().version(), None);
        let named =
            Records { name: Some(b"x".to_vec()), map: Some(Vec::new()), ..Records::default() };
        assert_eq!(named.version(), None);
    }
}
