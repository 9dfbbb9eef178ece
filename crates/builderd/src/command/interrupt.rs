//! Ctrl-C, SIGTERM and SIGHUP while a build runs: it ends at once, and says truly what it leaves.
//!
//! Nothing named exists before a build publishes, so leaving before that leaves nothing behind;
//! while files get their names, a moment's patience spares an image beside another's checksum.
//! This module does not know what a build does, only in which step it is.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::progress::Progress;
use crate::build::{BuildEvent, Observer, Phase};

/// How long an interrupted build may take to name its files; it takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    At(Phase),
    Published,
}

/// What an interrupted build says of its output.
fn words(stage: Stage) -> &'static str {
    match stage {
        Stage::At(Phase::Publish) => {
            "interrupted while the files got their names: \
             the image may not be the one that its checksum and metadata are about"
        }
        Stage::At(
            Phase::Resolve
            | Phase::Layers
            | Phase::Commands
            | Phase::Flatten
            | Phase::Layout
            | Phase::Write
            | Phase::Compress,
        ) => "interrupted: no output was written",
        Stage::Published => "interrupted: the output was written",
    }
}

#[derive(Debug)]
struct Watch {
    stage: Mutex<Stage>,
    moved: Condvar,
}

impl Watch {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self, event: &BuildEvent) {
        let next = match event {
            BuildEvent::PhaseStarted { phase } => Stage::At(*phase),
            BuildEvent::PhaseFinished { phase: Phase::Publish, .. } => Stage::Published,
            BuildEvent::PhaseFinished { .. }
            | BuildEvent::Resolved { .. }
            | BuildEvent::LayerWaiting { .. }
            | BuildEvent::LayerStarted { .. }
            | BuildEvent::LayerProgress { .. }
            | BuildEvent::LayerReady { .. }
            | BuildEvent::CommandStarted { .. }
            | BuildEvent::CommandOutput { .. }
            | BuildEvent::WriteProgress { .. }
            | BuildEvent::Warning { .. } => return,
        };
        *self.stage() = next;
        self.moved.notify_all();
    }

    /// The stage that the build is left in: it goes no further while the guard lives.
    fn stop(&self, patience: Duration) -> MutexGuard<'_, Stage> {
        let is_naming = |stage: &mut Stage| *stage == Stage::At(Phase::Publish);
        let stopped = self.moved.wait_timeout_while(self.stage(), patience, is_naming);
        stopped.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Passes a build's events on, and ends the process well when a signal says so.
pub(super) struct Watched<'a> {
    progress: &'a Progress,
    watch: Arc<Watch>,
}

impl<'a> Watched<'a> {
    /// Listens for signals from now on.
    pub(super) fn new(progress: &'a Progress) -> Self {
        let stage = Mutex::new(Stage::At(Phase::Resolve));
        let watch = Arc::new(Watch { stage, moved: Condvar::new() });
        leave_on_signals(Arc::clone(&watch));
        Self { progress, watch }
    }

    /// The step the build is in, or was in last.
    pub(super) fn phase(&self) -> Phase {
        match *self.watch.stage() {
            Stage::At(phase) => phase,
            Stage::Published => Phase::Publish,
        }
    }
}

impl Observer for Watched<'_> {
    fn event(&self, event: &BuildEvent) {
        self.watch.event(event);
        self.progress.event(event);
    }
}

fn leave_on_signals(watch: Arc<Watch>) {
    let listen = async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result,
            _ = terminate.recv() => Ok(()),
            _ = hang_up.recv() => Ok(()),
        }
    };
    let spawned = std::thread::Builder::new().name("signals".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        if let Ok(runtime) = runtime
            && runtime.block_on(listen).is_ok()
        {
            let stage = watch.stop(PATIENCE);
            tell!("\n{}", words(*stage));
            std::process::exit(130);
        }
    });
    // Without the thread the default action of the signals ends the process as well.
    drop(spawned);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(events: &[BuildEvent]) -> Watch {
        let stage = Mutex::new(Stage::At(Phase::Resolve));
        let watch = Watch { stage, moved: Condvar::new() };
        events.iter().for_each(|event| watch.event(event));
        watch
    }

    #[test]
    fn an_interrupted_build_claims_no_more_than_is_true() {
        use Phase::{Publish, Write};
        let started = |phase| BuildEvent::PhaseStarted { phase };
        let finished = |phase| BuildEvent::PhaseFinished { phase, secs: 0.0 };
        let said = |events: &[BuildEvent]| words(*watch(events).stop(Duration::ZERO));
        assert!(said(&[]).contains("no output was written"));
        assert!(said(&[started(Write), finished(Write)]).contains("no output was written"));
        let naming = said(&[started(Write), finished(Write), started(Publish)]);
        assert!(naming.contains("may not be"), "{naming}");
        let published = said(&[started(Publish), finished(Publish)]);
        assert!(published.contains("the output was written"), "{published}");
    }

    #[test]
    fn an_interrupt_waits_for_the_names_to_be_given() {
        let naming = watch(&[BuildEvent::PhaseStarted { phase: Phase::Publish }]);
        std::thread::scope(|scope| {
            let stopped = scope.spawn(|| *naming.stop(Duration::from_secs(600)));
            naming.event(&BuildEvent::PhaseFinished { phase: Phase::Publish, secs: 0.0 });
            assert_eq!(stopped.join().unwrap(), Stage::Published);
        });
    }
}
