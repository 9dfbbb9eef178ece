//! A command's output, line by line: bounded, with its end, and without what would steer a terminal.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};

/// Bytes of one line that are kept.
const LINE_BYTES_MAX: usize = 4 << 10;
/// Bytes of the output of all commands of a build that are kept as they come.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Bytes that are kept of the end of a command's output, where there is more: what failed stands there.
/// It is the keeper's memory for them, since one command runs at a time: 910 lines of 8 bytes, 61 of
/// 1000, or 15 of the longest. The ends of 32 commands, as many as the service takes, come to 2 MiB
/// behind the 1 MiB above: with it less than a fifth of the log of a build.
const END_BYTES_MAX: usize = 64 << 10;
/// What each line takes beside its text, where it is kept: many short ones are a flood as well.
const LINE_COST: usize = 64;

/// A piece of what a command said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Line(String),
    /// From here on the end alone is kept, and told when it has come.
    Held,
    /// So many lines stood here that are not kept.
    LeftOut(u64),
}

/// What is kept of the output of all commands of a build: the beginning of it, and the end of each
/// command's.
pub(crate) struct Output {
    room: usize,
    end_bytes_max: usize,
}

impl Default for Output {
    fn default() -> Self {
        Self { room: OUTPUT_BYTES_MAX, end_bytes_max: END_BYTES_MAX }
    }
}

impl Output {
    /// Reads what a command writes to its end, and gives `take` what is kept of it. What is beyond
    /// is read as well, so that nobody waits for this side.
    ///
    /// # Errors
    /// What reading fails with, and what `take` does.
    pub(crate) fn pass_on(
        &mut self,
        from: impl Read,
        mut take: impl FnMut(Said) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut end = End::default();
        lines(from, |text| {
            let cost = text.len() + LINE_COST;
            if cost <= self.room {
                self.room -= cost;
                return take(Said::Line(text));
            }
            // Nothing shorter comes past it.
            self.room = 0;
            let is_first = end.is_untouched();
            end.push(text, self.end_bytes_max);
            // Said at once: who is ended for its time says no more.
            if is_first { take(Said::Held) } else { Ok(()) }
        })?;
        if end.left_out > 0 {
            take(Said::LeftOut(end.left_out))?;
        }
        end.lines.into_iter().try_for_each(|text| take(Said::Line(text)))
    }
}

/// The last lines of an output.
#[derive(Default)]
struct End {
    lines: VecDeque<String>,
    bytes: usize,
    /// Lines that stood before them.
    left_out: u64,
}

impl End {
    fn is_untouched(&self) -> bool {
        self.lines.is_empty() && self.left_out == 0
    }

    fn push(&mut self, mut text: String, bytes_max: usize) {
        // What was taken out of a line has its room still.
        text.shrink_to_fit();
        self.bytes += text.len() + LINE_COST;
        self.lines.push_back(text);
        while self.bytes > bytes_max {
            let Some(first) = self.lines.pop_front() else { return };
            self.bytes -= first.len() + LINE_COST;
            self.left_out += 1;
        }
    }
}

/// Reads `from` to its end and gives each line with a text to `take`.
fn lines(from: impl Read, mut take: impl FnMut(String) -> io::Result<()>) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
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
            if !text.is_empty() {
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

    fn kept_by(output: &mut Output, input: &[u8]) -> Vec<Said> {
        let mut kept = Vec::new();
        output
            .pass_on(input, |said| {
                kept.push(said);
                Ok(())
            })
            .unwrap();
        kept
    }

    fn kept(input: &[u8]) -> Vec<Said> {
        kept_by(&mut Output::default(), input)
    }

    fn said(lines: &[&str]) -> Vec<Said> {
        lines.iter().map(|line| Said::Line((*line).to_owned())).collect()
    }

    /// So many short lines, each with its number.
    fn numbered(count: u64) -> Vec<u8> {
        (0..count).flat_map(|number| format!("line {number}\n").into_bytes()).collect()
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
        assert_eq!(kept(b"one\n\ntwo\nthree"), said(&["one", "two", "three"]));
        assert_eq!(kept(b""), []);
    }

    #[test]
    fn a_line_has_an_end() {
        let long = vec![b'x'; 3 * LINE_BYTES_MAX];
        assert_eq!(kept(&long), said(&[&"x".repeat(LINE_BYTES_MAX)]));
    }

    #[test]
    fn of_output_without_end_the_beginning_and_the_end_are_kept_and_the_rest_is_counted() {
        const LINES: u64 = 60_000;
        let mut input = numbered(LINES);
        input.extend_from_slice(b"FATAL: no space left\n");
        let kept = kept(&input);
        let gap = kept.iter().position(|said| matches!(said, Said::LeftOut(_))).unwrap();
        let Said::LeftOut(left_out) = kept[gap] else { panic!() };
        assert_eq!(kept[0], Said::Line("line 0".to_owned()));
        assert_eq!(kept[gap - 1], Said::Held);
        assert_eq!(kept[gap - 2], Said::Line(format!("line {}", gap - 2)));
        assert_eq!(kept[gap + 1], Said::Line(format!("line {}", gap as u64 - 1 + left_out)));
        assert_eq!(kept.last(), Some(&Said::Line("FATAL: no space left".to_owned())));
        assert_eq!(kept.len() as u64 - 2 + left_out, LINES + 1, "each is there or counted");
        let cost = |said: &Said| match said {
            Said::Line(line) => line.len() + LINE_COST,
            Said::Held | Said::LeftOut(_) => panic!("two gaps"),
        };
        let bytes = |said: &[Said]| said.iter().map(cost).sum::<usize>();
        assert!((OUTPUT_BYTES_MAX - 100..=OUTPUT_BYTES_MAX).contains(&bytes(&kept[..gap - 1])));
        assert!((END_BYTES_MAX - 100..=END_BYTES_MAX).contains(&bytes(&kept[gap + 1..])));
    }

    #[test]
    fn an_end_takes_no_more_memory_than_it_may() {
        let mut end = End::default();
        let colours = [b"\x1b[31m".repeat(LINE_BYTES_MAX / 5), b"x".to_vec()].concat();
        for _ in 0..2000 {
            end.push(clean(&colours), END_BYTES_MAX);
        }
        assert_eq!(end.lines.len(), END_BYTES_MAX / (1 + LINE_COST));
        let taken: usize = end.lines.iter().map(|line| line.capacity() + LINE_COST).sum();
        assert!(taken <= END_BYTES_MAX, "{taken} bytes");
    }

    #[test]
    fn each_command_has_an_end_where_the_room_of_all_is_used_up() {
        let mut output = Output { room: 10 * LINE_COST, end_bytes_max: 2 * (LINE_COST + 10) };
        let first = kept_by(&mut output, &numbered(20));
        assert_eq!(first.len(), 9 + 2 + 2, "{first:?}");
        let cut = |left_out, lines: &[&str]| {
            [&[Said::Held, Said::LeftOut(left_out)], &said(lines)[..]].concat()
        };
        assert_eq!(first[9..], cut(9, &["line 18", "line 19"]));
        // What fits is not said to be left out.
        let few = kept_by(&mut output, b"a\nb\n");
        assert_eq!(few, [&[Said::Held], &said(&["a", "b"])[..]].concat());
        assert_eq!(kept_by(&mut output, &numbered(3)), cut(1, &["line 1", "line 2"]));
    }
}
