//! What an error of accept(2) means for whoever takes connections: that he goes on, mostly.

use std::io;
use std::time::Duration;

/// How long to wait before the next try, when the machine is out of something.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// Whether accepting may work again, as it may unless the listener itself is broken: accept(2)
/// also hands over what the network says of a new connection (EPROTO, ENETDOWN and others), what
/// a firewall says (EPERM), and that the machine is out of something (EMFILE, ENOBUFS, ...).
pub(crate) fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let broken = [Errno::BADF, Errno::FAULT, Errno::INVAL, Errno::NOTSOCK];
    Errno::from_io_error(error).is_some_and(|errno| !broken.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_network_says_of_one_connection_does_not_end_the_listener() {
        use rustix::io::Errno;
        let network = [
            Errno::NETDOWN,
            Errno::PROTO,
            Errno::NOPROTOOPT,
            Errno::HOSTDOWN,
            Errno::NONET,
            Errno::HOSTUNREACH,
            Errno::OPNOTSUPP,
            Errno::NETUNREACH,
        ];
        let kernel = [Errno::PERM, Errno::CONNABORTED, Errno::TIMEDOUT, Errno::NOSR, Errno::INTR];
        let short = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
        for errno in network.into_iter().chain(kernel).chain(short) {
            assert!(is_passing(&errno.into()), "{errno}");
        }
        for errno in [Errno::BADF, Errno::INVAL, Errno::NOTSOCK] {
            assert!(!is_passing(&errno.into()), "{errno}");
        }
        assert!(!is_passing(&io::Error::other("the runtime is gone")));
    }
}
