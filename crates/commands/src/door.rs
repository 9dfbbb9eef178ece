//! The one way out of the commands' network: a listener on the loopback address of the keeper's
//! network namespace, which has no other address. The keeper makes it and hands its descriptor
//! out; who serves it decides what is let through. This side knows no rules.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::handing;

/// rtnetlink(7), linux/rtnetlink.h and linux/netlink.h.
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
/// netdevice(7).
const IFF_UP: u32 = 1;
/// In a namespace of its own the loopback device is the first.
const LOOPBACK_INDEX: i32 = 1;

/// Opens the door in this process's network namespace and hands it through `to`; where it is.
pub(crate) fn open(to: impl AsFd) -> io::Result<SocketAddr> {
    raise_loopback()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    handing::hand(to, &[listener.as_fd()])?;
    Ok(address)
}

/// The loopback device of a new network namespace is down.
fn raise_loopback() -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &up_request(), SendFlags::empty(), &kernel)?;
    let mut answer = [0; 1024];
    let (length, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    acknowledged(&answer[..length.min(answer.len())])
}

/// `struct nlmsghdr` and `struct ifinfomsg`: device 1 is to be up.
fn up_request() -> [u8; 32] {
    let mut request = [0; 32];
    let mut put = |at: usize, bytes: &[u8]| request[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &32_u32.to_ne_bytes());
    put(4, &RTM_NEWLINK.to_ne_bytes());
    put(6, &NLM_F_REQUEST_ACK.to_ne_bytes());
    put(20, &LOOPBACK_INDEX.to_ne_bytes());
    put(24, &IFF_UP.to_ne_bytes());
    put(28, &IFF_UP.to_ne_bytes());
    request
}

/// An acknowledgement is an error of 0.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
