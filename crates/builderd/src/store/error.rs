//! Why the store did not do it. What a caller is told of it is not decided here.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::engine;
use crate::build::state::IllegalTransition;

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, or is too busy.
    #[error("the database is not available")]
    Unavailable(#[source] sqlx::Error),
    /// The disk of the database is full.
    #[error("the disk of the database is full")]
    Full(#[source] sqlx::Error),
    /// What stands in the database is not what was written there.
    #[error("the database holds something it should not: {0}")]
    Corrupt(String),
    /// A build's state does not allow it.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// Anything else the database said.
    #[error("the database failed")]
    Database(#[source] sqlx::Error),
    /// The data directory cannot be used.
    #[error("the data directory {path:?} cannot be used: {problem}")]
    DataDirectory {
        /// Where it is.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: DirectoryProblem,
    },
    /// A database that is elsewhere lets nobody in, or does not answer any more.
    #[error("the database {place} cannot be reached")]
    Unreachable {
        /// Its name, with host and port, or socket.
        place: String,
        /// Why.
        source: Box<StoreError>,
    },
    /// A migration failed.
    #[error("the database's schema could not be brought up to date")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

/// Why a data directory cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryProblem {
    /// There is one server at a time.
    #[error("a server uses it")]
    InUse,
    /// Anything else, and what to do.
    #[error("{0}")]
    Other(String),
}

impl StoreError {
    /// Whether the same may work a moment later.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::Full(_) => true,
            Self::Unreachable { source, .. } => source.may_pass(),
            Self::Corrupt(_)
            | Self::Illegal(_)
            | Self::Database(_)
            | Self::DataDirectory { .. }
            | Self::Migrate(_) => false,
        }
    }

    /// Whether the row that was worked on is to blame: the others can be worked on all the same.
    pub(super) fn is_of_a_row(&self) -> bool {
        match self {
            Self::Corrupt(_) | Self::Illegal(_) => true,
            Self::Database(error) => engine::is_refused_row(error),
            Self::Unavailable(_)
            | Self::Full(_)
            | Self::DataDirectory { .. }
            | Self::Unreachable { .. }
            | Self::Migrate(_) => false,
        }
    }

    /// What kind of trouble it is, in one word for programs.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Unavailable(error) if engine::is_read_only(error) => "database_read_only",
            Self::Unavailable(_) => "database_unavailable",
            Self::Unreachable { source, .. } => source.class(),
            Self::Full(_) => "database_full",
            Self::Corrupt(_)
            | Self::Illegal(_)
            | Self::Database(_)
            | Self::DataDirectory { .. }
            | Self::Migrate(_) => "database_failed",
        }
    }

    /// The database has not answered in time, for so many seconds.
    pub(super) fn late(waited: Duration) -> Self {
        let problem = format!("it has not answered for {} s", waited.as_secs());
        Self::Unavailable(sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, problem)))
    }
}
