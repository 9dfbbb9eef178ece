//! What a build's process says, as its tenant sees it: state, percent, step and log. Knows no
//! process and no store.

use oci::Image;

use super::journal::Journal;
use super::state::BuildState;
use super::{BuildEvent as Event, LayerOrigin, Phase};

/// What the events of a build mean for its state, its progress and its log.
pub(super) struct Progress {
    layers: Vec<(u64, u64)>,
}

impl Progress {
    pub(super) fn new(image: &Image) -> Self {
        Self { layers: image.layers.iter().map(|layer| (0, layer.size_bytes.max(1))).collect() }
    }

    pub(super) async fn apply(&mut self, event: &Event, journal: &Journal<'_>) {
        match event {
            Event::PhaseStarted { phase } => match phase {
                Phase::Resolve => {}
                Phase::Layers => {
                    journal.enter(BuildState::Downloading, 5, "Extracting image layers").await;
                }
                Phase::Commands => {
                    journal.enter(BuildState::Building, 68, "Running commands").await;
                }
                Phase::Flatten => journal.enter(BuildState::Building, 70, "Merging layers").await,
                Phase::Layout => {
                    journal.enter(BuildState::Building, 73, "Laying out the file system").await;
                }
                Phase::Write => {
                    journal.enter(BuildState::Building, 75, "Writing the file system").await;
                }
                Phase::Compress => {
                    journal.enter(BuildState::Optimizing, 93, "Compressing the image").await;
                }
                Phase::Publish => {
                    journal.enter(BuildState::Packaging, 97, "Packaging the image").await;
                }
            },
            Event::PhaseFinished { phase, secs } => {
                let line = format!("{} took {secs:.3} s", phase.as_str());
                journal.say("debug", component(*phase), line);
            }
            Event::Resolved { .. } => {}
            Event::LayerWaiting { digest, .. } => {
                journal.say(
                    "info",
                    "extractor",
                    format!("layer {digest}: waiting for another build to extract it"),
                );
            }
            Event::LayerStarted { digest, size_bytes, .. } => {
                journal.say("info", "puller", format!("layer {digest}: {size_bytes} bytes"));
            }
            Event::LayerProgress { layer, bytes } => {
                self.layer(*layer, *bytes);
                journal
                    .enter(BuildState::Downloading, self.percent(), "Extracting image layers")
                    .await;
            }
            Event::LayerReady { layer, digest, origin } => {
                self.layer(*layer, u64::MAX);
                let origin = match origin {
                    LayerOrigin::Cached => "from the cache",
                    LayerOrigin::Packed => "extracted",
                };
                journal.say("info", "extractor", format!("layer {digest}: {origin}"));
                journal
                    .enter(BuildState::Downloading, self.percent(), "Extracting image layers")
                    .await;
            }
            Event::CommandStarted { command, text } => {
                let line = format!("command {}: {text}", command + 1);
                journal.say("info", "commands", line);
                journal.enter(BuildState::Building, 69, "Running commands").await;
            }
            Event::CommandOutput { line, .. } => journal.say("info", "commands", line.clone()),
            Event::WriteProgress { bytes, total_bytes } => {
                let part = 17 * bytes / (*total_bytes).max(1);
                let percent = 75 + u32::try_from(part).unwrap_or(0);
                journal.enter(BuildState::Building, percent, "Writing the file system").await;
            }
            Event::Warning { message } => journal.say("warn", "builder", message.clone()),
        }
    }

    fn layer(&mut self, layer: usize, bytes: u64) {
        if let Some((done, size)) = self.layers.get_mut(layer) {
            *done = bytes.min(*size);
        }
    }

    fn percent(&self) -> u32 {
        let (done, all) =
            self.layers.iter().fold((0, 0), |(done, all), (d, a)| (done + d, all + a));
        5 + u32::try_from(65 * done / all.max(1)).unwrap_or(0)
    }
}

fn component(phase: Phase) -> &'static str {
    match phase {
        Phase::Resolve => "puller",
        Phase::Layers => "extractor",
        Phase::Commands => "commands",
        Phase::Flatten | Phase::Layout | Phase::Write => "builder",
        Phase::Compress | Phase::Publish => "packager",
    }
}
