//! Users of confined processes, outside: numbers that no other running process of this host has.
//!
//! Whoever starts such processes takes a range of users by a name of which the kernel gives each to
//! one holder at a time (unix(7), abstract sockets), so nothing of it is left when the holder ends,
//! however it ends. Services that share a host but no network do not see each other's names.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::{SandboxError, UserNamespace, account};

/// The first of all: above what systems give to people, services and dynamic users (systemd.io,
/// "Users, Groups, UIDs and GIDs on systemd Systems").
pub(crate) const START: u32 = 0x6400_0000;

/// Ranges of one size, beside each other.
struct Kind {
    name: &'static str,
    start: u32,
    count: u32,
    ranges: u32,
}

/// Of one process that starts others: a user for each of them.
const SINGLE: Kind = Kind { name: "single", start: START, count: 1 << 10, ranges: 1 << 14 };
/// For processes that have many users.
const MANY: Kind = Kind { name: "many", start: 0x6500_0000, count: Users::COUNT, ranges: 1 << 10 };

/// Users of a process, outside: inside they are 0 and those that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Users {
    /// The first, which is root inside.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Users {
    /// So many has each of those that get a range.
    pub const COUNT: u32 = 1 << 20;

    /// A range that nobody else of this host has, until the answer is dropped.
    ///
    /// # Errors
    /// [`SandboxError`] when more than a thousand ranges are in use.
    pub fn hold() -> Result<HeldUsers, SandboxError> {
        hold(&MANY).map_err(|source| SandboxError::new("find users that nobody else has", source))
    }

    /// A thousand of the same kind, for a process [that fetches](crate::narrow) and its workers. It
    /// must not be that process which holds them: taken over, it could let go of them and stay.
    ///
    /// # Errors
    /// [`SandboxError`] when more than sixteen thousand are in use.
    pub fn hold_few() -> Result<HeldUsers, SandboxError> {
        hold(&SINGLE).map_err(|source| SandboxError::new("find users that nobody else has", source))
    }

    /// A user namespace in which the first is root and the others follow. It is the first one's, outside:
    /// what the kernel counts for a namespace's owner as well as inside of it (instances of inotify(7),
    /// signals that wait, namespaces below), it counts for nobody else. Needs root.
    ///
    /// # Errors
    /// [`SandboxError`] when the kernel refuses.
    pub fn namespace(self) -> Result<UserNamespace, SandboxError> {
        let map = format!("0 {} {}", self.first, self.count);
        UserNamespace::new(self, &map)
            .map_err(|source| SandboxError::new("make a user namespace", source))
    }

    /// Does something as the first of these users, but with root's capabilities: the files it makes are that
    /// user's, also where the kernel makes them later on its behalf, as for an overlay's mount. Needs root;
    /// not to be called by `work`.
    ///
    /// # Errors
    /// What `work` says, or that no thread could become that user.
    pub fn as_first<T: Send>(self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        account::as_user(self.first, work)
    }
}

/// Users that are nobody else's for as long as this lives.
#[derive(Debug)]
pub struct HeldUsers {
    users: Users,
    _name: UnixDatagram,
}

impl HeldUsers {
    /// Which ones.
    #[must_use]
    pub fn users(&self) -> Users {
        self.users
    }
}

fn hold(kind: &Kind) -> io::Result<HeldUsers> {
    /// How many this process has held. Who was given up last may still be somebody's that is ending.
    static HELD_SO_FAR: AtomicU32 = AtomicU32::new(0);
    let so_far = HELD_SO_FAR.fetch_add(1, Ordering::Relaxed);
    // Others began elsewhere, mostly.
    let begin = std::process::id().wrapping_add(so_far) % kind.ranges;
    for number in (begin..kind.ranges).chain(0..begin) {
        let name = format!("builderd-users-{}-{number}", kind.name);
        match UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
            Ok(name) => {
                // Nobody has anything to say to it.
                let _ = name.shutdown(std::net::Shutdown::Both);
                let first = kind.start + number * kind.count;
                return Ok(HeldUsers { users: Users { first, count: kind.count }, _name: name });
            }
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Users of the processes that this one starts.
struct Own {
    users: Users,
    given: u32,
    /// None where somebody else holds them for as long as this process runs.
    _held: Option<HeldUsers>,
}

impl Own {
    fn held() -> io::Result<Self> {
        let held = hold(&SINGLE)?;
        Ok(Self { users: held.users(), given: 0, _held: Some(held) })
    }
}

static OWN: Mutex<Option<Own>> = Mutex::new(None);

/// Takes the users of the processes that this one will start, before it may take no more names.
pub(crate) fn hold_own() -> io::Result<()> {
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    if own.is_none() {
        *own = Some(Own::held()?);
    }
    Ok(())
}

/// Those of the processes that this one will start are these, which somebody holds for it.
pub(crate) fn take(users: Users) {
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    *own = Some(Own { users, given: 0, _held: None });
}

/// A user for one more process that this one starts: another one than its last thousand had.
pub(crate) fn next() -> io::Result<u32> {
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    let own = match &mut *own {
        Some(own) => own,
        None => own.insert(Own::held()?),
    };
    let user = own.users.first + own.given % own.users.count;
    own.given = own.given.wrapping_add(1);
    Ok(user)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_range_has_one_holder_at_a_time() {
        let held: Vec<HeldUsers> = (0..16).map(|_| Users::hold().unwrap()).collect();
        let firsts: BTreeSet<u32> = held.iter().map(|held| held.users().first).collect();
        assert_eq!(firsts.len(), held.len());
    }

    #[test]
    fn a_range_that_is_dropped_is_there_for_others() {
        // More than there are.
        for _ in 0..MANY.ranges + 1 {
            Users::hold().unwrap();
        }
    }

    #[test]
    fn ranges_lie_beside_each_other_and_end_before_the_last_number() {
        assert_eq!(SINGLE.start + SINGLE.ranges * SINGLE.count, MANY.start);
        let end = u64::from(MANY.start) + u64::from(MANY.ranges) * u64::from(MANY.count);
        assert!(end < u64::from(u32::MAX));
    }

    #[test]
    fn each_process_gets_another_user() {
        let users: BTreeSet<u32> = (0..1 << 10).map(|_| next().unwrap()).collect();
        assert_eq!(users.len(), 1 << 10);
        assert!(users.iter().all(|user| (START..MANY.start).contains(user)));
    }
}
