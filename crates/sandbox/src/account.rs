//! The accounts of one build: what the kernel counts for all processes of a user together, it counts
//! for the processes of that build alone.
//!
//! Descriptors on their way through sockets (unix(7)), watches of epoll(7) and inotify(7), processes,
//! signals that wait, keys and namespaces are counted by user, and one user's are shared by whoever is
//! that user. So a process gets users that nobody else has, in a user namespace of which they are all
//! there are: its capabilities lead to no other user, and so to no account of somebody else.
//! The kernel counts the namespace itself, and those made in it, for who has made it: the first of
//! the users.
//!
//! It does not know which users are free (`users.rs`), nor what the process does afterwards.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{Gid, LinkNameSpaceType, Uid};

use crate::{UserNamespace, Users, users};

/// The users of one build, and the namespace in which there are no others.
pub(crate) struct Account {
    users: Users,
    namespace: UserNamespace,
}

impl Account {
    /// As root.
    pub(crate) fn open(users: Users) -> io::Result<Self> {
        Ok(Self { users, namespace: UserNamespace::new(users, &map(users))? })
    }

    /// Where there are no others.
    pub(crate) fn namespace(&self) -> &UserNamespace {
        &self.namespace
    }

    /// Goes on as the first of the users, who is root of them alone. What it starts may have the others.
    ///
    /// To be called by the only thread, as root.
    pub(crate) fn enter(self) -> io::Result<()> {
        let user = Some(LinkNameSpaceType::User);
        rustix::thread::move_into_link_name_space(self.namespace.as_fd(), user)?;
        rustix::thread::set_thread_groups(&[])?;
        let (uid, gid) = (Uid::ROOT, Gid::ROOT);
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        // Its `/proc` is its own again, and with it what it starts. No other process is its user, so
        // nobody else can look into it that way; and a crash starts no program of the host: core(5).
        rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?;
        users::take(Users { first: self.users.first + 1, count: self.users.count - 1 });
        Ok(())
    }
}

/// Does what the kernel is to count for a user, or to do in its name and in that of the group of the same
/// number, with the capabilities of root. By a thread that is gone afterwards: nothing but its own user is
/// ever another, and the end of who started this process still ends it, prctl(2). Not within itself.
pub(crate) fn as_user<T: Send>(
    user: u32,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // What all threads have together changes with the user of one.
    let dumpable = rustix::process::dumpable_behavior()?;
    let become_user = || {
        let all = rustix::thread::capabilities(None)?;
        rustix::thread::set_thread_res_gid(None, Gid::from_raw(user), None)?;
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(user), None)?;
        rustix::thread::set_capabilities(None, all)
    };
    let done = std::thread::scope(|scope| {
        let thread = move || {
            let done = become_user().map_err(io::Error::from).and_then(|()| work());
            (rustix::thread::gettid(), done)
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, thread)?;
        thread.join().map_err(|_| io::Error::other("the thread of another user panicked"))
    });
    let restored = rustix::process::set_dumpable_behavior(dumpable);
    let (thread, done) = done?;
    let done = done?;
    restored?;
    // To the kernel it is one of this process's threads for a moment longer: setns(2), user namespaces.
    let thread = format!("/proc/self/task/{}", thread.as_raw_nonzero());
    while Path::new(&thread).exists() {
        std::thread::yield_now();
    }
    Ok(done)
}

/// Inside the first is root, and the others are called as they are outside.
fn map(users: Users) -> String {
    let Users { first, count } = users;
    format!("0 {first} 1\n{0} {0} {1}", first + 1, count - 1)
}

/// No cores, and none for a program of the host: the limit at which the kernel starts no such program is
/// 1, core(5).
pub(crate) fn without_cores() -> io::Result<()> {
    let limit = Rlimit { current: Some(1), maximum: Some(1) };
    Ok(rustix::process::setrlimit(Resource::Core, limit)?)
}
