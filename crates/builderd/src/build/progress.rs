//! What a build's process says, as its tenant sees it: state, percent, step and log. Knows no
//! process and no store.

use oci::Image;

use super::journal::Journal;
use super::state::BuildState;
use super::{BuildEvent as Event, LayerOrigin, Phase};

/// What is being done, for people.
pub(super) const RESOLVING: &str = "Resolving the image";
const EXTRACTING: &str = "Extracting image layers";
const COMMANDS: &str = "Running commands";
const MERGING: &str = "Merging layers";
const LAYING_OUT: &str = "Laying out the file system";
const WRITING: &str = "Writing the file system";
const COMPRESSING: &str = "Compressing the image";
const PACKAGING: &str = "Packaging the image";
pub(super) const STORING: &str = "Storing the artifact";
pub(super) const TAKING: &str = "Taking the artifact that exists";

/// The same for programs.
const STEPS: [(&str, Phase); 10] = [
    (RESOLVING, Phase::Resolve),
    (EXTRACTING, Phase::Layers),
    (COMMANDS, Phase::Commands),
    (MERGING, Phase::Flatten),
    (LAYING_OUT, Phase::Layout),
    (WRITING, Phase::Write),
    (COMPRESSING, Phase::Compress),
    (PACKAGING, Phase::Publish),
    (STORING, Phase::Publish),
    (TAKING, Phase::Publish),
];

/// What the step of a [`Failure`](super::record::Failure) is called where this is what is said of
/// the build: the phase's name, and `prepare` before there is one.
pub(crate) fn step_name(said: &str) -> &'static str {
    let step = STEPS.iter().find(|(known, _)| *known == said);
    step.map_or("prepare", |(_, phase)| phase.as_str())
}

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
                    journal.enter(BuildState::Downloading, 5, EXTRACTING).await;
                }
                Phase::Commands => {
                    journal.enter(BuildState::Building, 68, COMMANDS).await;
                }
                Phase::Flatten => journal.enter(BuildState::Building, 70, MERGING).await,
                Phase::Layout => {
                    journal.enter(BuildState::Building, 73, LAYING_OUT).await;
                }
                Phase::Write => {
                    journal.enter(BuildState::Building, 75, WRITING).await;
                }
                Phase::Compress => {
                    journal.enter(BuildState::Optimizing, 93, COMPRESSING).await;
                }
                Phase::Publish => {
                    journal.enter(BuildState::Packaging, 97, PACKAGING).await;
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
                journal.enter(BuildState::Downloading, self.percent(), EXTRACTING).await;
            }
            Event::LayerReady { layer, digest, origin } => {
                self.layer(*layer, u64::MAX);
                let origin = match origin {
                    LayerOrigin::Cached => "from the cache",
                    LayerOrigin::Packed => "extracted",
                };
                journal.say("info", "extractor", format!("layer {digest}: {origin}"));
                journal.enter(BuildState::Downloading, self.percent(), EXTRACTING).await;
            }
            Event::CommandStarted { command, text } => {
                let line = format!("command {}: {text}", command + 1);
                journal.say("info", "commands", line);
                journal.enter(BuildState::Building, 69, COMMANDS).await;
            }
            Event::CommandOutput { line, .. } => journal.say("info", "commands", line.clone()),
            Event::WriteProgress { bytes, total_bytes } => {
                let part = 17 * bytes / (*total_bytes).max(1);
                let percent = 75 + u32::try_from(part).unwrap_or(0);
                journal.enter(BuildState::Building, percent, WRITING).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_step_leads_back_to_its_phase() {
        for (said, phase) in STEPS {
            assert_eq!(step_name(said), phase.as_str());
        }
        assert_eq!(step_name("prepare"), "prepare");
        assert_eq!(step_name(""), "prepare");
        assert_eq!(step_name("what a newer version says"), "prepare");
    }
}
