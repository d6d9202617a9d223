//! Waiting for descriptors and for time.

use super::call::{call, number};
use super::file::Fd;

/// There is something to read, or there will never be.
pub(crate) const POLL_READ: i16 = 1;
/// There is room to write.
pub(crate) const POLL_WRITE: i16 = 4;

/// A descriptor and what it is waited for (`struct pollfd`).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct PollFd {
    fd: i32,
    events: i16,
    /// What there is, hang-ups and errors among it.
    found: i16,
}

impl PollFd {
    /// Waits for nothing.
    pub(crate) const NONE: Self = Self { fd: -1, events: 0, found: 0 };

    pub(crate) fn new(fd: &Fd, events: i16) -> Self {
        Self { fd: fd.raw(), events, found: 0 }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.found != 0
    }
}

/// Waits until one of `fds` is ready.
pub(crate) fn poll(fds: &mut [PollFd]) {
    const FOREVER: usize = -1_isize as usize;
    // An interruption is a reason to look again.
    // SAFETY: the kernel reads and writes the elements of `fds`, whose layout is its own.
    let _ = unsafe { call(number::POLL, [fds.as_mut_ptr() as usize, fds.len(), FOREVER]) };
}

/// Sleeps, or is interrupted.
pub(crate) fn sleep_ms(milliseconds: u32) {
    let time = [i64::from(milliseconds / 1000), i64::from(milliseconds % 1000) * 1_000_000];
    // SAFETY: the kernel reads two numbers; it is given nowhere to write.
    let _ = unsafe { call(number::NANOSLEEP, [time.as_ptr() as usize, 0]) };
}
