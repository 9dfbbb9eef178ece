//! Text for people: sizes, durations, and foreign strings made harmless.

/// A line for people; nobody may be there to read it.
macro_rules! tell {
    ($($word:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($word)*);
    }};
}

/// A line of the answer; an answer that cannot be given ends the command.
macro_rules! put {
    ($($word:tt)*) => {{
        use std::io::Write as _;
        $crate::command::text::given(writeln!(std::io::stdout(), $($word)*));
    }};
}

/// Ends the process when standard output failed: well, if only the reader went away.
pub(super) fn given(result: std::io::Result<()>) {
    if let Err(error) = result {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        tell!("error: cannot write to standard output: {error}");
        std::process::exit(1);
    }
}

/// Bytes in binary units, as `ls -h` shows them: `1.4 GiB`.
pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Seconds, with the digits that matter: `0.034 s`, `12.3 s`.
pub(super) fn seconds(secs: f64) -> String {
    if secs < 1.0 { format!("{secs:.3} s") } else { format!("{secs:.2} s") }
}

/// Foreign text on one line, without control and direction characters, so that an image cannot
/// drive the terminal or forge our lines.
pub(super) fn printable(text: &str) -> String {
    let harmless = |char: char| {
        !char.is_control()
            && !matches!(char, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars()
        .map(|char| if harmless(char) { char } else { char::REPLACEMENT_CHARACTER })
        .collect()
}

/// A size as users write it: `512M`, `2G`, `1GiB`, `4096`; units are powers of 1024.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2 GiB"), Ok(2 << 30));
        for bad in ["", "M", "-1", "1.5G", "1X", "99999999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\u{7}"), "a\u{fffd}[31mb\u{fffd}");
        assert_eq!(printable("x\nhint: \u{202e}y"), "x\u{fffd}hint: \u{fffd}y");
    }
}
