//! The connection to the host.

use super::call::{call, number};
use super::file::{self, Fd, flag};
use crate::service::Errno;

const VSOCK: u16 = 40;

/// `struct sockaddr_vm` (Linux, include/uapi/linux/vm_sockets.h).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: [u8; 4],
}

/// Connects to `port` of `cid`; waits for the answer, at most the two seconds that the kernel does.
pub(crate) fn dial(cid: u32, port: u32) -> Result<Fd, Errno> {
    const STREAM: usize = 1;
    // SAFETY: the call touches no memory.
    let made = unsafe { call(number::SOCKET, [VSOCK.into(), STREAM | flag::CLOEXEC, 0]) };
    let fd = Fd::from_call(made)?;
    let address = Address { family: VSOCK, reserved: 0, port, cid, flags: [0; 4] };
    let (at, len) = (&raw const address as usize, size_of::<Address>());
    // SAFETY: the kernel reads `address`, whose layout is its own.
    unsafe { call(number::CONNECT, [fd.number(), at, len]) }?;
    Ok(fd)
}

/// Takes a connected socket that whoever started this process left open as `number`.
pub(crate) fn adopt(number: i32) -> Result<Fd, Errno> {
    file::duplicate(number)
}

/// Without waiting and without a signal if the other side is gone.
const AT_ONCE: usize = 0x40 | 0x4000;

/// Receives what is there. No bytes: the connection has ended.
pub(crate) fn receive(fd: &Fd, into: &mut [u8]) -> Result<usize, Errno> {
    let (at, len) = (into.as_mut_ptr() as usize, into.len());
    // SAFETY: the kernel writes at most the length of `into` there, and no address.
    unsafe { call(number::RECVFROM, [fd.number(), at, len, AT_ONCE, 0, 0]) }
}

/// Sends as much as there is room for.
pub(crate) fn send(fd: &Fd, bytes: &[u8]) -> Result<usize, Errno> {
    let (at, len) = (bytes.as_ptr() as usize, bytes.len());
    // SAFETY: the kernel reads at most the length of `bytes` there, and no address.
    unsafe { call(number::SENDTO, [fd.number(), at, len, AT_ONCE, 0, 0]) }
}
