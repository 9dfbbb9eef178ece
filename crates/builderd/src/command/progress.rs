//! Progress as people and programs want it: bars on a terminal, plain lines
//! elsewhere, one JSON object for each event, or nothing.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::args::ProgressArg;
use super::text;
use crate::build::record::Failure;
use crate::build::{BuildEvent, BuildReport, LayerOrigin, Observer, Phase};

/// Shows a build's events.
pub(super) enum Progress {
    Bars(Box<Bars>),
    Plain,
    RawJson,
    Quiet,
}

impl Progress {
    pub(super) fn new(wanted: ProgressArg) -> Self {
        match wanted {
            ProgressArg::Auto if std::io::stderr().is_terminal() => Self::Bars(Box::default()),
            ProgressArg::Tty => Self::Bars(Box::default()),
            ProgressArg::Auto | ProgressArg::Plain => Self::Plain,
            ProgressArg::Rawjson => Self::RawJson,
            ProgressArg::Quiet => Self::Quiet,
        }
    }

    /// The build is done.
    pub(super) fn finish(&self, report: &BuildReport) {
        #[derive(Serialize)]
        struct Finished<'a> {
            event: &'static str,
            report: &'a BuildReport,
        }
        match self {
            Self::Bars(bars) => bars.clear(),
            Self::RawJson => print_json(&Finished { event: "finished", report }),
            Self::Plain | Self::Quiet => {}
        }
    }

    /// There will be no image; what people are told comes from the command's own failure.
    pub(super) fn failed(&self, failure: &Failure) {
        #[derive(Serialize)]
        struct Failed<'a> {
            event: &'static str,
            #[serde(flatten)]
            failure: &'a Failure,
        }
        match self {
            Self::Bars(bars) => bars.clear(),
            Self::RawJson => print_json(&Failed { event: "failed", failure }),
            Self::Plain | Self::Quiet => {}
        }
    }
}

impl Observer for Progress {
    fn event(&self, event: &BuildEvent) {
        match self {
            Self::Bars(bars) => bars.event(event),
            Self::Plain => {
                if let Some(line) = plain_line(event) {
                    tell!("{line}");
                }
            }
            Self::RawJson => print_json(event),
            Self::Quiet => {}
        }
    }
}

/// A reader that went away must not fail the build.
fn print_json(value: &impl Serialize) {
    if let Ok(mut line) = serde_json::to_vec(value) {
        line.push(b'\n');
        let _ = std::io::stdout().lock().write_all(&line);
    }
}

fn short(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}

/// The line of an event, for the events that deserve one.
fn plain_line(event: &BuildEvent) -> Option<String> {
    Some(match event {
        BuildEvent::PhaseFinished { phase, secs } => {
            format!("{:<8} done in {}", phase.as_str(), text::seconds(*secs))
        }
        BuildEvent::Resolved { image, manifest_digest, platform, layers, compressed_bytes } => {
            let (image, size) = (text::printable(image), text::bytes(*compressed_bytes));
            format!("image    {image} {manifest_digest} {platform}, {layers} layers, {size}")
        }
        BuildEvent::LayerStarted { layer, digest, size_bytes } => {
            format!(
                "layer {:>2} {} fetching {}",
                layer + 1,
                short(digest),
                text::bytes(*size_bytes)
            )
        }
        BuildEvent::LayerWaiting { layer, digest } => {
            format!("layer {:>2} {} waiting for another build to pack it", layer + 1, short(digest))
        }
        BuildEvent::LayerReady { layer, digest, origin } => {
            format!("layer {:>2} {} {}", layer + 1, short(digest), origin_word(*origin))
        }
        BuildEvent::CommandStarted { command, text } => {
            format!("command {:>2} {}", command + 1, text::printable(text))
        }
        BuildEvent::CommandOutput { line, .. } => text::printable(line).to_string(),
        BuildEvent::Warning { message } => format!("warning: {}", text::printable(message)),
        BuildEvent::PhaseStarted { .. }
        | BuildEvent::LayerProgress { .. }
        | BuildEvent::WriteProgress { .. } => return None,
    })
}

fn origin_word(origin: LayerOrigin) -> &'static str {
    match origin {
        LayerOrigin::Cached => "from the cache",
        LayerOrigin::Packed => "packed",
    }
}

/// A bar for each layer on its way and one for the phase.
pub(super) struct Bars {
    all: MultiProgress,
    phase: ProgressBar,
    layers: Mutex<BTreeMap<usize, ProgressBar>>,
}

impl Default for Bars {
    fn default() -> Self {
        let all = MultiProgress::new();
        let phase = all.add(ProgressBar::new_spinner());
        phase.set_style(style("{spinner} {msg}"));
        Self { all, phase, layers: Mutex::default() }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

const LAYER_STYLE: &str = "  {prefix:<19} {bar:30} {binary_bytes:>11}/{binary_total_bytes:<11} {binary_bytes_per_sec:>13}";
const WRITE_STYLE: &str = "{spinner} {msg:<8} {bar:30} {binary_bytes:>11}/{binary_total_bytes:<11}";

impl Bars {
    fn event(&self, event: &BuildEvent) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            BuildEvent::PhaseStarted { phase } => {
                let wide = if *phase == Phase::Write { WRITE_STYLE } else { "{spinner} {msg}" };
                self.phase.set_style(style(wide));
                self.phase.set_message(phase.as_str());
                self.phase.tick();
            }
            BuildEvent::LayerStarted { layer, digest, size_bytes } => {
                let bar = ProgressBar::new(*size_bytes).with_style(style(LAYER_STYLE));
                bar.set_prefix(short(digest).to_owned());
                layers.insert(*layer, self.all.insert_before(&self.phase, bar));
            }
            BuildEvent::LayerProgress { layer, bytes } => {
                if let Some(bar) = layers.get(layer) {
                    bar.set_position(*bytes);
                }
                self.phase.tick();
            }
            BuildEvent::LayerReady { layer, .. } => {
                if let Some(bar) = layers.remove(layer) {
                    bar.finish_and_clear();
                }
            }
            BuildEvent::WriteProgress { bytes, total_bytes } => {
                self.phase.set_length(*total_bytes);
                self.phase.set_position(*bytes);
            }
            BuildEvent::Resolved { .. }
            | BuildEvent::LayerWaiting { .. }
            | BuildEvent::CommandStarted { .. }
            | BuildEvent::CommandOutput { .. }
            | BuildEvent::Warning { .. } => {
                if let Some(line) = plain_line(event) {
                    // Without a terminal there is nowhere to print above the bars.
                    let _ = self.all.println(line);
                }
            }
            BuildEvent::PhaseFinished { .. } => {}
        }
    }

    fn clear(&self) {
        self.phase.finish_and_clear();
        let _ = self.all.clear();
    }
}
