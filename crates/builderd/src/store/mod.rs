//! What outlives the process: builds, their logs, tenants, tokens and artifacts, in SQL.
//!
//! One body (`sql/`) for two engines (`engine.rs`), SQLite and PostgreSQL, one schema
//! (`migrations/`), one conformance suite that runs on both (`tests/`). A tenant's rows are reached
//! with a [`Permit`] through [`TenantStore`], a running build's with its [`Lease`] through
//! [`LeaseStore`]; what belongs to nobody is [`SystemStore`]'s. Every change of a build's state is
//! one transaction that asks [`BuildState::next`](crate::build::state::BuildState::next), compares
//! and sets, counts, and adds an event row.
//!
//! It does not know doors, the engine, or where artifacts lie.

pub mod admin;
pub(crate) mod audit;
mod changes;
mod data;
mod engine;
mod error;
mod keys;
mod lease;
mod open;
mod readers;
mod sql;
mod system;
mod tenant;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::time::Duration;

use audit::Author;
pub use changes::Changes;
pub use data::{
    Accepted, ArtifactDomain, ArtifactName, Cancel, Claimed, Delete, Depth, Fenced, Filter,
    Heartbeat, KnownArtifact, Lease, Leases, Listed, NewBuild, NewFile, Outcome, Page,
    QuotaExceeded, Removal, Reserved, Revision, Seen, TenantLoad, TenantRow, TokenRow, Unread,
};
pub use error::{DirectoryProblem, StoreError};
pub(crate) use keys::SEALED;
pub use keys::{Destroyed, TenantKeyRow};
pub use lease::LeaseStore;
pub(crate) use open::check_postgres_url;
pub(crate) use sql::Rows;
pub use system::SystemStore;
pub use tenant::TenantStore;

use crate::tenant::Permit;

/// The database.
#[derive(Clone)]
pub struct Store {
    rows: Arc<Rows>,
}

impl Store {
    /// The rows of the permit's tenant.
    pub fn tenant<'a>(&'a self, permit: &'a Permit<'_>) -> TenantStore<'a> {
        TenantStore { rows: &self.rows, permit }
    }

    /// The build that the lease is for.
    pub fn lease<'a>(&'a self, lease: &'a Lease) -> LeaseStore<'a> {
        LeaseStore { rows: &self.rows, lease }
    }

    /// What belongs to no tenant.
    pub fn system(&self) -> SystemStore<'_> {
        SystemStore { rows: &self.rows, author: None }
    }

    /// What is wrong with a database that its caller has waited for in vain.
    pub(crate) fn late(&self, waited: Duration) -> StoreError {
        self.rows.placed(StoreError::late(waited))
    }

    /// The same as [`system`](Self::system), for somebody whose changes are told of in the audit log.
    pub(crate) fn system_for<'a>(&'a self, author: &'a Author) -> SystemStore<'a> {
        SystemStore { rows: &self.rows, author: Some(author) }
    }
}
