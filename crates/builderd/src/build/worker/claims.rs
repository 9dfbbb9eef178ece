//! What the process of a build says, held against what can be. It speaks to registries, and one that
//! was taken over may say anything; what is passed on from here can be added up, shown and stored.

use std::time::Instant;

use serde_json::Error;

use crate::build::child::{ChildLine, ChildReport};
use crate::build::confined::{NUMBER_MAX, passed};
use crate::build::record::Failure;
use crate::build::remedy::usual_remedy;
use crate::build::{Blame, BuildEvent, Phase};

/// Lines of one process: there is one for each MiB of its layers, so these are enough for 4 TiB, and of
/// others there are far fewer. Nothing is kept of them here, and the log of a build has its own end: at
/// the bound they cost the service a second or two of a CPU.
const LINES_MAX: u32 = 1 << 22;
/// Bytes of all lines: four times those of so many about layers. One alone may have a mebibyte, so that
/// without this bound the other would be one of hours; with it reading them takes two seconds or three.
const BYTES_MAX: u64 = 1 << 30;
/// Bytes of a text: a log keeps no more of a line.
pub(super) const TEXT_BYTES_MAX: usize = 8 << 10;
/// There are eight.
const PHASES_MAX: usize = 8;

/// See the module.
pub(super) struct Claims {
    began: Instant,
    lines: u32,
    bytes: u64,
    started: Vec<Phase>,
    finished: Vec<Phase>,
}

impl Claims {
    /// Of a process that begins now.
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            lines: 0,
            bytes: 0,
            started: Vec::new(),
            finished: Vec::new(),
        }
    }

    /// What a line means; none if it is of no account.
    ///
    /// # Errors
    /// What is wrong with it, if no process of ours says that.
    pub(super) fn read(&mut self, line: &[u8]) -> Result<Option<ChildLine>, String> {
        self.lines += 1;
        self.bytes += line.len() as u64;
        if self.lines > LINES_MAX || self.bytes > BYTES_MAX {
            return Err("it talks without end".to_owned());
        }
        let line = serde_json::from_slice(line).map_err(|error: Error| text(&error.to_string()))?;
        Ok(match line {
            ChildLine::Event(event) => self.event(event).map(ChildLine::Event),
            ChildLine::Done(report) => Some(ChildLine::Done(Box::new(self.report(*report)))),
            ChildLine::Failed(failure) => Some(ChildLine::Failed(checked(failure))),
        })
    }

    fn event(&mut self, event: BuildEvent) -> Option<BuildEvent> {
        use BuildEvent as Event;
        Some(match event {
            Event::PhaseStarted { phase } => {
                note(&mut self.started, phase)?;
                Event::PhaseStarted { phase }
            }
            Event::PhaseFinished { phase, secs } => {
                note(&mut self.finished, phase)?;
                Event::PhaseFinished { phase, secs: self.secs(secs) }
            }
            Event::Resolved { image, manifest_digest, platform, layers, compressed_bytes } => {
                Event::Resolved {
                    image: text(&image),
                    manifest_digest: text(&manifest_digest),
                    platform: text(&platform),
                    layers: place(layers),
                    compressed_bytes: compressed_bytes.min(NUMBER_MAX),
                }
            }
            Event::LayerWaiting { layer, digest } => {
                Event::LayerWaiting { layer: place(layer), digest: text(&digest) }
            }
            Event::LayerStarted { layer, digest, size_bytes } => Event::LayerStarted {
                layer: place(layer),
                digest: text(&digest),
                size_bytes: size_bytes.min(NUMBER_MAX),
            },
            Event::LayerProgress { layer, bytes } => {
                Event::LayerProgress { layer: place(layer), bytes: bytes.min(NUMBER_MAX) }
            }
            Event::LayerReady { layer, digest, origin } => {
                Event::LayerReady { layer: place(layer), digest: text(&digest), origin }
            }
            Event::CommandStarted { command, text: said } => {
                Event::CommandStarted { command: place(command), text: text(&said) }
            }
            Event::CommandOutput { command, line } => {
                Event::CommandOutput { command: place(command), line: text(&line) }
            }
            Event::WriteProgress { bytes, total_bytes } => {
                let total_bytes = total_bytes.min(NUMBER_MAX);
                Event::WriteProgress { bytes: bytes.min(total_bytes), total_bytes }
            }
            Event::Warning { message } => Event::Warning { message: text(&message) },
        })
    }

    /// What was made, and what it took: of its size the file itself has the last word.
    fn report(&self, report: ChildReport) -> ChildReport {
        let phases = report.phase_secs.into_iter().take(PHASES_MAX);
        ChildReport {
            phase_secs: phases.map(|(phase, secs)| (phase, self.secs(secs))).collect(),
            image_bytes: report.image_bytes.min(NUMBER_MAX),
            fetched_bytes: report.fetched_bytes.min(NUMBER_MAX),
            layers_cached: place(report.layers_cached),
            memory_peak_bytes: report.memory_peak_bytes.min(NUMBER_MAX),
            cpu_ms: report.cpu_ms.min(NUMBER_MAX),
            ..report
        }
    }

    /// No phase takes longer than all of them.
    fn secs(&self, secs: f64) -> f64 {
        passed(self.began, secs)
    }
}

/// Each begins, and ends, once.
fn note(seen: &mut Vec<Phase>, phase: Phase) -> Option<()> {
    (!seen.contains(&phase)).then(|| seen.push(phase))
}

/// The place of a layer or a command, to which one may be added.
fn place(place: usize) -> usize {
    place.min(1 << 24)
}

/// The beginning of a text; what would steer a terminal is spelt out.
fn text(text: &str) -> String {
    let mut plain = String::new();
    for letter in text.chars() {
        if plain.len() >= TEXT_BYTES_MAX {
            break;
        }
        match letter.is_control() && !matches!(letter, '\n' | '\t') {
            true => plain.extend(letter.escape_default()),
            false => plain.push(letter),
        }
    }
    plain
}

fn checked(failure: Failure) -> Failure {
    let words = [Blame::Yours, Blame::Ours, Blame::Upstream];
    let blame = words.into_iter().find(|blame| blame.as_str() == failure.blame);
    let blame = blame.unwrap_or(Blame::Ours);
    let step = Phase::ALL.into_iter().find(|phase| phase.as_str() == failure.step);
    let remedy = match failure.remedy.trim().is_empty() {
        true => usual_remedy(failure.code, blame).to_owned(),
        false => text(&failure.remedy),
    };
    Failure {
        code: failure.code,
        // Nothing of a build's process fails before it is asked what the image is.
        step: step.unwrap_or(Phase::Resolve).as_str().to_owned(),
        cause: text(&failure.cause),
        blame: blame.as_str().to_owned(),
        remedy,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;

    fn read(claims: &mut Claims, line: &Value) -> Option<ChildLine> {
        claims.read(line.to_string().as_bytes()).unwrap()
    }

    fn event(claims: &mut Claims, event: Value) -> Option<BuildEvent> {
        match read(claims, &json!({ "event": event })) {
            Some(ChildLine::Event(event)) => Some(event),
            None => None,
            Some(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn times_of_a_build_can_be_added_up_and_each_phase_is_timed_once() {
        let mut claims = Claims::new();
        let finished = |phase: &str, secs: f64| json!({"event": "phase_finished", "phase": phase, "secs": secs});
        let mut all = Duration::ZERO;
        for (phase, secs) in [("layers", 1.8e19), ("write", 1.8e19), ("flatten", -1e300)] {
            let Some(BuildEvent::PhaseFinished { secs, .. }) =
                event(&mut claims, finished(phase, secs))
            else {
                panic!("{phase} is not timed")
            };
            all += Duration::try_from_secs_f64(secs).unwrap();
        }
        assert!(all < Duration::from_secs(60), "{all:?}");
        let started = json!({"event": "phase_started", "phase": "layers"});
        assert!(event(&mut claims, finished("write", 0.0)).is_none());
        assert!(event(&mut claims, started.clone()).is_some());
        assert!(event(&mut claims, started).is_none());
    }

    #[test]
    fn numbers_of_a_build_can_be_added_up_and_its_texts_are_cut() {
        let mut claims = Claims::new();
        let (most, long) = (u64::MAX, "\u{1b}[2J\n".repeat(200_000));
        let progress = json!({"event": "layer_progress", "layer": most, "bytes": most});
        let Some(BuildEvent::LayerProgress { layer, bytes }) = event(&mut claims, progress) else {
            panic!("no progress")
        };
        assert!(layer.checked_add(1).is_some() && bytes.checked_mul(1000).is_some());
        let progress = json!({"event": "write_progress", "bytes": most, "total_bytes": 7});
        let Some(BuildEvent::WriteProgress { bytes, .. }) = event(&mut claims, progress) else {
            panic!("no progress")
        };
        assert_eq!(bytes, 7);
        let warning = json!({"event": "warning", "message": long});
        let Some(BuildEvent::Warning { message }) = event(&mut claims, warning) else {
            panic!("no warning")
        };
        assert!(message.starts_with("\\u{1b}[2J\n\\u{1b}") && message.len() < 2 * TEXT_BYTES_MAX);
        let failed = json!({"failed": {
            "code": "INTERNAL", "step": long, "cause": long, "blame": long, "remedy": long,
        }});
        let Some(ChildLine::Failed(failure)) = read(&mut claims, &failed) else {
            panic!("no failure")
        };
        let all = [&failure.step, &failure.cause, &failure.blame, &failure.remedy];
        assert!(all.iter().all(|text| text.len() < 2 * TEXT_BYTES_MAX && !text.contains('\u{1b}')));
        assert_eq!((&*failure.blame, &*failure.step), ("ours", "resolve"));
        let silent = json!({"failed": {
            "code": "NETWORK_ERROR", "step": "layers", "cause": "x", "blame": "upstream", "remedy": "",
        }});
        let Some(ChildLine::Failed(failure)) = read(&mut claims, &silent) else {
            panic!("no failure")
        };
        assert_eq!(failure.step, "layers");
        assert!(!failure.remedy.is_empty(), "each failure carries a remedy");
    }

    #[test]
    fn a_report_of_a_build_has_numbers_that_can_be() {
        let mut claims = Claims::new();
        let most = u64::MAX;
        let done = json!({"done": {
            "metadata": {},
            "artifact_bytes": most,
            "image_bytes": most,
            "fetched_bytes": most,
            "layers_cached": most,
            "phase_secs": [["layers", 1e300], ["write", -1.0]],
            "memory_peak_bytes": most,
            "cpu_ms": most,
        }});
        let Some(ChildLine::Done(report)) = read(&mut claims, &done) else { panic!("no report") };
        for number in
            [report.image_bytes, report.fetched_bytes, report.memory_peak_bytes, report.cpu_ms]
        {
            assert!(number.checked_mul(1000).is_some());
        }
        assert!(report.phase_secs.iter().all(|(_, secs)| (0.0..60.0).contains(secs)));
    }

    #[test]
    fn a_build_that_talks_for_ever_makes_no_sense() {
        let mut claims = Claims::new();
        claims.lines = LINES_MAX - 1;
        let line = br#"{"event": {"event": "warning", "message": "x"}}"#;
        assert!(claims.read(line).is_ok());
        assert_eq!(claims.read(line).unwrap_err(), "it talks without end");
        // Nor does one whose lines are few, and long.
        let mut claims = Claims::new();
        claims.bytes = BYTES_MAX - line.len() as u64;
        assert!(claims.read(line).is_ok());
        assert_eq!(claims.read(line).unwrap_err(), "it talks without end");
        let error = Claims::new().read(b"\"\\u001b[2J\"").unwrap_err();
        assert!(!error.contains('\u{1b}'), "{error}");
    }
}
