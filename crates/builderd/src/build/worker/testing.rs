//! What the process of a build says, read as its server reads it, but from anybody: a fuzz target has
//! no other way in. What is passed on must be what can be; anything else is a panic here.

use std::time::Duration;

use super::claims::{Claims, TEXT_BYTES_MAX};
use crate::build::BuildEvent;
use crate::build::child::ChildLine;
use crate::build::confined::NUMBER_MAX;
use crate::build::confined::testing::{check_secs, check_written};

/// Reads the lines of the process of a build.
///
/// # Panics
/// When something is passed on that cannot be.
pub fn read_build(lines: &[u8]) {
    let (mut claims, mut phases) = (Claims::new(), Duration::ZERO);
    for line in lines.split(|byte| *byte == b'\n') {
        let Ok(line) = claims.read(line) else { return };
        match line {
            None => {}
            Some(ChildLine::Event(event)) => check_event(&event, &mut phases),
            Some(ChildLine::Done(report)) => {
                let numbers = [
                    report.image_bytes,
                    report.fetched_bytes,
                    report.memory_peak_bytes,
                    report.cpu_ms,
                ];
                assert!(numbers.iter().all(|number| *number <= NUMBER_MAX));
                report.phase_secs.iter().for_each(|(_, secs)| phases += time(*secs));
                return;
            }
            Some(ChildLine::Failed(failure)) => {
                let texts = [&failure.step, &failure.cause, &failure.blame, &failure.remedy];
                texts.into_iter().for_each(|text| check_text(text));
                return;
            }
        }
    }
}

fn check_event(event: &BuildEvent, phases: &mut Duration) {
    match event {
        BuildEvent::PhaseStarted { .. } => {}
        BuildEvent::PhaseFinished { secs, .. } => *phases += time(*secs),
        BuildEvent::Resolved { image, manifest_digest, platform, layers, compressed_bytes } => {
            [image, manifest_digest, platform].into_iter().for_each(|text| check_text(text));
            assert!(layers.checked_add(1).is_some() && *compressed_bytes <= NUMBER_MAX);
        }
        BuildEvent::LayerWaiting { layer, digest }
        | BuildEvent::LayerReady { layer, digest, .. } => {
            check_text(digest);
            assert!(layer.checked_add(1).is_some());
        }
        BuildEvent::LayerStarted { layer, digest, size_bytes } => {
            check_text(digest);
            assert!(layer.checked_add(1).is_some() && *size_bytes <= NUMBER_MAX);
        }
        BuildEvent::LayerProgress { layer, bytes } => {
            assert!(layer.checked_add(1).is_some() && *bytes <= NUMBER_MAX);
        }
        BuildEvent::CommandStarted { command, text }
        | BuildEvent::CommandOutput { command, line: text } => {
            check_text(text);
            assert!(command.checked_add(1).is_some());
        }
        BuildEvent::WriteProgress { bytes, total_bytes } => {
            check_written(*bytes, *total_bytes);
        }
        BuildEvent::Warning { message } => check_text(message),
    }
}

/// A time that has passed since the process began.
fn time(secs: f64) -> Duration {
    check_secs(secs);
    Duration::try_from_secs_f64(secs).unwrap_or_default()
}

fn check_text(text: &str) {
    let steers = |letter: char| letter.is_control() && !matches!(letter, '\n' | '\t');
    assert!(!text.chars().any(steers), "{text:?} steers a terminal");
    assert!(text.len() < 2 * TEXT_BYTES_MAX, "{} bytes", text.len());
}
