//! The parts of a service live together: when one of them ends before all were told to, the
//! others are told at once, so that nobody goes on behind a closed door. It does not know what
//! the parts do.

use std::collections::HashMap;
use std::io;

use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};

/// Why a service ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PartError {
    /// A part met something it cannot go on with.
    #[error("{part} failed")]
    Failed {
        /// Which.
        part: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A part has a bug.
    #[error("{part} panicked")]
    Panicked {
        /// Which.
        part: &'static str,
        /// What is known of it.
        source: JoinError,
    },
    /// A part ended as if it had been told to.
    #[error("{0} ended by itself")]
    Ended(&'static str),
}

type Ended = Result<(Id, io::Result<()>), JoinError>;

/// Parts that run.
pub(crate) struct Parts {
    stop: watch::Sender<bool>,
    tasks: JoinSet<io::Result<()>>,
    names: HashMap<Id, &'static str>,
}

impl Parts {
    /// None yet.
    pub(crate) fn new() -> Self {
        let stop = watch::Sender::new(false);
        Self { stop, tasks: JoinSet::new(), names: HashMap::new() }
    }

    /// Says true when the parts are to end.
    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    /// Starts a part that ends when [`stopping`](Self::stopping) says so.
    pub(crate) fn start(
        &mut self,
        name: &'static str,
        part: impl Future<Output = io::Result<()>> + Send + 'static,
    ) {
        let task = self.tasks.spawn(part);
        self.names.insert(task.id(), name);
    }

    /// Waits for `stopped`, or for the first part to end, then for all to end.
    ///
    /// # Errors
    /// The first [`PartError`].
    pub(crate) async fn run(mut self, mut stopped: watch::Receiver<bool>) -> Result<(), PartError> {
        let mut problem = tokio::select! {
            biased;
            // A sender that is gone will never say it; nobody wants us any more.
            _ = stopped.wait_for(|stopping| *stopping) => None,
            Some(ended) = self.tasks.join_next_with_id() => Some(self.early(ended)),
        };
        if let Some(problem) = &problem {
            tracing::error!(%problem, "the service cannot go on; it stops");
        }
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next_with_id().await {
            if let Some(more) = self.wrong(ended) {
                tracing::error!(problem = %more, "a part did not end well");
                problem.get_or_insert(more);
            }
        }
        problem.map_or(Ok(()), Err)
    }

    /// What is wrong with a part that ended before it was told to: that alone, if nothing else.
    fn early(&self, ended: Ended) -> PartError {
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        self.wrong(ended).unwrap_or(PartError::Ended(self.name(id)))
    }

    fn wrong(&self, ended: Ended) -> Option<PartError> {
        match ended {
            Ok((_, Ok(()))) => None,
            Ok((id, Err(source))) => Some(PartError::Failed { part: self.name(id), source }),
            Err(source) => Some(PartError::Panicked { part: self.name(source.id()), source }),
        }
    }

    fn name(&self, id: Id) -> &'static str {
        self.names.get(&id).copied().unwrap_or("a part")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Three parts of which the last is `odd`; how it ended, and how many others were told.
    async fn told(
        odd: impl Future<Output = io::Result<()>> + Send + 'static,
        stopped: watch::Receiver<bool>,
    ) -> (Result<(), PartError>, u32) {
        let (mut parts, ended) = (Parts::new(), Arc::new(AtomicU32::new(0)));
        for name in ["doors", "janitor"] {
            let (mut stopping, ended) = (parts.stopping(), Arc::clone(&ended));
            parts.start(name, async move {
                let told = stopping.wait_for(|stopping| *stopping).await.is_ok();
                ended.fetch_add(u32::from(told), Ordering::SeqCst);
                Ok(())
            });
        }
        parts.start("workers", odd);
        let result = parts.run(stopped).await;
        (result, ended.load(Ordering::SeqCst))
    }

    #[tokio::test]
    async fn a_part_that_ends_early_ends_the_others() {
        let (_stop, stopped) = watch::channel(false);
        let (broken, others) = told(async { Err(io::Error::other("x")) }, stopped.clone()).await;
        assert_eq!((broken.unwrap_err().to_string(), others), ("workers failed".into(), 2));
        let panics = async { panic!("a bug, as the test wants it") };
        let (panicked, others) = told(panics, stopped.clone()).await;
        assert_eq!((panicked.unwrap_err().to_string(), others), ("workers panicked".into(), 2));
        let (ended, others) = told(async { Ok(()) }, stopped).await;
        assert_eq!((ended.unwrap_err().to_string(), others), ("workers ended by itself".into(), 2));
    }

    #[tokio::test]
    async fn parts_that_are_told_to_end_end_well() {
        let (stop, stopped) = watch::channel(false);
        let mut listener = stopped.clone();
        let odd = async move {
            drop(listener.wait_for(|stopping| *stopping).await);
            Ok(())
        };
        let (ended, ()) = tokio::join!(told(odd, stopped.clone()), async {
            stop.send_replace(true);
        });
        assert!(matches!(ended, (Ok(()), 2)), "{ended:?}");
        // A problem on the way down is a problem, too.
        let (broken, others) = told(async { Err(io::Error::other("x")) }, stopped).await;
        assert_eq!((broken.unwrap_err().to_string(), others), ("workers failed".into(), 2));
    }
}
