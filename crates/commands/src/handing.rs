//! Open files on their way from one process to another: unix(7), `SCM_RIGHTS`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Files in one message; the kernel takes 253.
const AT_ONCE: usize = 64;

/// Two ends of a way for files.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Hands files on, in their order.
pub(crate) fn hand(to: impl AsFd, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    for some in files.chunks(AT_ONCE) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        if !message.push(SendAncillaryMessage::ScmRights(some)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let byte = [IoSlice::new(&[1])];
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&to, &byte, &mut message, SendFlags::NOSIGNAL)
        })?;
    }
    Ok(())
}

/// Takes so many files that [`hand`] has handed on; fewer when the other end is closed.
///
/// # Errors
/// When the other side sends something else, or this process may not have so many open.
pub(crate) fn take(from: impl AsFd, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))];
        let mut message = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let received = rustix::io::retry_on_intr(|| {
            let mut bytes = [IoSliceMut::new(&mut byte)];
            rustix::net::recvmsg(&from, &mut bytes, &mut message, RecvFlags::CMSG_CLOEXEC)
        })?;
        if received.bytes == 0 {
            break;
        }
        let before = taken.len();
        for part in message.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = part {
                taken.extend(files);
            }
        }
        // What is left out now does not come later.
        let is_cut = received.flags.contains(ReturnFlags::CTRUNC);
        if is_cut || taken.len() == before || taken.len() > count {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn as_many_files_arrive_as_were_handed_on_and_in_their_order() {
        let (one, other) = pair().unwrap();
        let (null, zero) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
        let mut files = vec![null.as_fd(); 2 * AT_ONCE];
        files.push(zero.as_fd());
        hand(&one, &files).unwrap();
        let taken = take(&other, files.len()).unwrap();
        let device = |file: BorrowedFd<'_>| rustix::fs::fstat(file).unwrap().st_rdev;
        let places: Vec<u64> = taken.iter().map(|file| device(file.as_fd())).collect();
        let wanted: Vec<u64> = files.iter().map(|file| device(*file)).collect();
        assert_eq!(places, wanted);
    }

    #[test]
    fn what_is_left_out_of_a_message_is_not_waited_for() {
        const TOO_MANY: usize = 2 * AT_ONCE;
        let (one, other) = pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let files = [null.as_fd(); TOO_MANY];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(TOO_MANY))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        assert!(message.push(SendAncillaryMessage::ScmRights(&files)));
        rustix::net::sendmsg(&one, &[IoSlice::new(&[1])], &mut message, SendFlags::empty())
            .unwrap();
        let (taken, is_taken) = std::sync::mpsc::channel();
        std::thread::spawn(move || taken.send(take(&other, TOO_MANY).map(drop)));
        let waited = is_taken.recv_timeout(std::time::Duration::from_secs(20));
        assert!(waited.expect("it is waited for").is_err());
        drop(one);
    }

    #[test]
    fn whoever_sends_something_else_is_not_listened_to() {
        let (one, other) = pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        hand(&one, &[null.as_fd(), null.as_fd()]).unwrap();
        assert!(take(&other, 1).is_err(), "more than was wanted");
        rustix::io::write(&one, b"x").unwrap();
        assert!(take(&other, 1).is_err(), "no file at all");
        hand(&one, &[null.as_fd()]).unwrap();
        drop(one);
        assert_eq!(take(&other, 2).unwrap().len(), 1, "the other end is closed");
    }
}
