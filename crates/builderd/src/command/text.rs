//! Text for people: sizes, durations, and foreign strings made harmless.

pub(super) use crate::config::parse_size;

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
