//! What a worker may do with the build that it has a [`Lease`] on.

use super::{
    ArtifactName, Fenced, Heartbeat, KnownArtifact, Lease, NewFile, Outcome, Reserved, Rows,
    StoreError,
};
use crate::build::record::{LiveUsage, LogLine, Micros};
use crate::build::state::BuildState;

/// A build with a lease on it.
#[derive(Clone, Copy)]
pub struct LeaseStore<'a> {
    pub(super) rows: &'a Rows,
    pub(super) lease: &'a Lease,
}

impl LeaseStore<'_> {
    /// Says that the worker lives and what the build takes, and hears whether to go on.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn heartbeat(
        &self,
        lease_secs: u64,
        usage: Option<&LiveUsage>,
        now: Micros,
    ) -> Result<Heartbeat, StoreError> {
        self.rows.heartbeat(self.lease, lease_secs, usage, now).await
    }

    /// Enters a step, or goes on in it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn progress(
        &self,
        state: BuildState,
        percent: u32,
        step: &str,
        now: Micros,
    ) -> Result<Fenced, StoreError> {
        self.rows.progress(self.lease, state, percent, step, now).await
    }

    /// Adds lines to the log; their offsets are given by the store.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn append_log(&self, lines: &[LogLine]) -> Result<Fenced, StoreError> {
        self.rows.append_log(self.lease, lines).await
    }

    /// Ends the try. With [`Outcome::Completed`] the artifact is published in the same
    /// transaction, under `artifact` for other builds to find. Returns the state in which the
    /// build is now, which may be another than the worker thinks: cancelled meanwhile, or failed
    /// because its tenant's storage has no room left. None if the lease was lost.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn finish(
        &self,
        artifact: Option<&ArtifactName>,
        outcome: Outcome,
        now: Micros,
    ) -> Result<Option<BuildState>, StoreError> {
        self.rows.finish(self.lease, artifact, &outcome, now).await
    }

    /// Says that the build is about to store a file, before it does: from then on nobody removes
    /// what has its name, until this try ends.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn reserve(&self, file: &NewFile<'_>, now: Micros) -> Result<Reserved, StoreError> {
        self.rows.reserve(self.lease, file, now).await
    }

    /// An artifact that was made for the same name and still exists. It goes on to exist until
    /// this try ends, so that the try can end with it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn known_artifact(
        &self,
        name: &ArtifactName,
    ) -> Result<Option<KnownArtifact>, StoreError> {
        self.rows.known_artifact(self.lease, name).await
    }
}
