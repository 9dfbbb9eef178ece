//! A command's output, line by line: bounded, and without what would steer a terminal.

use std::io::{self, BufRead, BufReader, Read};

/// Bytes of one line that are kept.
const LINE_BYTES_MAX: usize = 4 << 10;
/// Bytes of the output of all commands of a build that are kept.
pub(crate) const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// What each line takes beside its text, where it is kept: many short ones are a flood as well.
const LINE_COST: usize = 64;

/// Reads `from` to its end and gives each line to `take`, as long as `room` lasts. What is beyond
/// is read and thrown away, so that nobody waits for this side.
pub(crate) fn lines(
    from: impl Read,
    room: &mut usize,
    mut take: impl FnMut(String) -> io::Result<()>,
) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    let mut is_cut = false;
    loop {
        let buffer = match from.fill_buf() {
            Ok(buffer) => buffer,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let is_end = buffer.is_empty();
        let stop = buffer.iter().position(|byte| *byte == b'\n');
        let piece = &buffer[..stop.unwrap_or(buffer.len())];
        let more = piece.len().min(LINE_BYTES_MAX - line.len());
        line.extend_from_slice(&piece[..more]);
        let consumed = stop.map_or(buffer.len(), |stop| stop + 1);
        from.consume(consumed);
        if stop.is_some() || (is_end && !line.is_empty()) {
            let text = clean(&line);
            line.clear();
            if is_cut || text.is_empty() {
                // Nothing to say, or nobody who keeps it.
            } else if text.len() + LINE_COST > *room {
                is_cut = true;
                *room = 0;
                take("the output of the commands is too long: the rest is not kept".to_owned())?;
            } else {
                *room -= text.len() + LINE_COST;
                take(text)?;
            }
        }
        if is_end {
            return Ok(());
        }
    }
}

/// The text of a line as it would stand on the screen in the end: no escape sequences (ECMA-48),
/// no control characters; of what a carriage return writes over itself the last.
fn clean(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let last = line.rsplit(|byte| *byte == b'\r').find(|part| !part.is_empty()).unwrap_or(&[]);
    let text = String::from_utf8_lossy(last);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(next) = chars.next() {
        match next {
            '\u{1b}' => skip_escape(&mut chars),
            // CSI in one character.
            '\u{9b}' => skip_sequence(&mut chars),
            '\t' => out.push(' '),
            _ if next.is_control() || is_direction(next) => {}
            _ => out.push(next),
        }
    }
    out.truncate(out.trim_end().len());
    out
}

fn skip_escape(chars: &mut std::str::Chars<'_>) {
    match chars.next() {
        Some('[') => skip_sequence(chars),
        // OSC, DCS, SOS, PM, APC: up to BEL or ST.
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while let Some(next) = chars.next() {
                match next {
                    '\u{7}' | '\u{9c}' => return,
                    '\u{1b}' => {
                        chars.next();
                        return;
                    }
                    _ => {}
                }
            }
        }
        // Choice of a character set: one more character.
        Some('(' | ')' | '*' | '+' | '#' | '%') => {
            chars.next();
        }
        _ => {}
    }
}

/// Up to the final character of a control sequence.
fn skip_sequence(chars: &mut std::str::Chars<'_>) {
    for next in chars.by_ref() {
        if ('@'..='~').contains(&next) {
            return;
        }
    }
}

/// Characters that turn the direction of the text behind them (UAX 9).
fn is_direction(next: char) -> bool {
    matches!(next, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(input: &[u8], mut room: usize) -> Vec<String> {
        let mut kept = Vec::new();
        lines(input, &mut room, |line| {
            kept.push(line);
            Ok(())
        })
        .unwrap();
        kept
    }

    #[test]
    fn what_steers_a_terminal_is_taken_out() {
        for (raw, text) in [
            (&b"\x1b[31mred\x1b[0m"[..], "red"),
            (b"\x1b]0;title\x07text", "text"),
            (b"\x1b]8;;http://x\x1b\\link", "link"),
            (b" 10%\r 50%\r100%\r", "100%"),
            (b"a\x00\x08b\tc", "ab c"),
            (b"\x1b", ""),
            (b"\x1b[", ""),
            (b"caf\xc3\xa9 \xff", "caf\u{e9} \u{fffd}"),
            ("\u{9b}2Jgone \u{202e}txt".as_bytes(), "gone txt"),
        ] {
            assert_eq!(clean(raw), text, "{raw:?}");
        }
    }

    #[test]
    fn output_is_told_by_lines_and_empty_ones_are_not() {
        assert_eq!(kept(b"one\n\ntwo\nthree", 1000), ["one", "two", "three"]);
        assert_eq!(kept(b"", 100), [""; 0]);
    }

    #[test]
    fn a_line_and_the_whole_have_an_end() {
        let long = vec![b'x'; 3 * LINE_BYTES_MAX];
        assert_eq!(kept(&long, 1 << 20)[0].len(), LINE_BYTES_MAX);
        let told = kept(&b"12345678\n".repeat(100), 2 * LINE_COST + 20);
        assert_eq!(told.len(), 3);
        assert!(told[2].contains("not kept"), "{told:?}");
        let short = kept(&b"x\n".repeat(1 << 20), OUTPUT_BYTES_MAX);
        assert!((1000..20_000).contains(&short.len()), "{}", short.len());
    }
}
