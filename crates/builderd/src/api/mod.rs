//! A request enters here: [`router`] lists every way in.

/// Proof that a credential was checked; only this module's `auth` can make one.
#[derive(Debug)]
pub struct Checked(());
