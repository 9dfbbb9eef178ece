//! The steps of the engine, which runs in a process of its own, as spans of its build.

use tracing::Span;

use super::step_span;
use crate::build::{BuildEvent, Phase};

/// The steps that run, opened and closed as the engine tells of them; what it has not finished ends
/// when this is dropped. Each is a span below the one that is current when it begins.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    running: Vec<(Phase, Span)>,
}

impl Steps {
    /// Takes one event.
    pub(crate) fn apply(&mut self, event: &BuildEvent) {
        if let BuildEvent::PhaseStarted { phase } | BuildEvent::PhaseFinished { phase, .. } = event
        {
            // One that begins twice has ended in between, whatever the engine says.
            self.running.retain(|(running, _)| running != phase);
        }
        if let BuildEvent::PhaseStarted { phase } = event {
            self.running.push((*phase, step_span(phase.as_str())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_runs_from_its_beginning_to_its_end_and_once() {
        let mut steps = Steps::default();
        let mut running = |event: BuildEvent| {
            steps.apply(&event);
            steps.running.iter().map(|(phase, _)| *phase).collect::<Vec<_>>()
        };
        let started = |phase| BuildEvent::PhaseStarted { phase };
        let finished = |phase| BuildEvent::PhaseFinished { phase, secs: 1.0 };
        assert_eq!(running(started(Phase::Layers)), [Phase::Layers]);
        assert_eq!(running(BuildEvent::LayerProgress { layer: 0, bytes: 1 }), [Phase::Layers]);
        assert_eq!(running(started(Phase::Layers)), [Phase::Layers]);
        assert_eq!(running(started(Phase::Write)), [Phase::Layers, Phase::Write]);
        assert_eq!(running(finished(Phase::Layers)), [Phase::Write]);
        assert_eq!(running(finished(Phase::Flatten)), [Phase::Write]);
        assert_eq!(running(finished(Phase::Write)), []);
    }
}
