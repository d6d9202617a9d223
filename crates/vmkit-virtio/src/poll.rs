//! Host descriptors that a lane waits for.
//!
//! All are edge-triggered: an event says that something changed, and its receiver goes on until the
//! descriptor would block. Eventfds are therefore never read.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bitflags::bitflags;
use vmkit_device::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

bitflags! {
    /// What to wait for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interest: u8 {
        /// There is something to read, or the other side is gone.
        const READ = 1;
        /// There is room to write.
        const WRITE = 2;
    }
}

/// What happened to a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The number it was registered under.
    pub token: u32,
    /// It can be read, or the other side is gone.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
}

/// A set of queues, by number below 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSet(u64);

impl QueueSet {
    /// None.
    pub const EMPTY: Self = Self(0);

    /// Just `queue`.
    pub fn one(queue: u16) -> Self {
        Self(1_u64.checked_shl(queue.into()).unwrap_or(0))
    }

    /// These and `queue`.
    #[must_use]
    pub fn and(self, queue: u16) -> Self {
        Self(self.0 | Self::one(queue).0)
    }

    /// Those in either set.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// True if there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = u16> {
        (0..64).filter(move |n| self.0 >> n & 1 != 0)
    }
}

/// The descriptors of one lane. Clones are the same set.
#[derive(Clone)]
pub struct Poller {
    epoll: Arc<Epoll>,
    has_sources: Arc<AtomicBool>,
}

impl std::fmt::Debug for Poller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller").field("has_sources", &self.has_sources).finish_non_exhaustive()
    }
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Arc::new(Epoll::new()?), has_sources: Arc::default() })
    }

    /// Waits for `interest` on `fd` from now on; its events carry `token`. What is there already
    /// makes an event too.
    ///
    /// # Errors
    /// What the host said.
    pub fn add(&self, fd: &impl AsRawFd, token: u32, interest: Interest) -> io::Result<()> {
        self.has_sources.store(true, Ordering::Release);
        self.control(ControlOperation::Add, fd.as_raw_fd(), token.into(), interest)
    }

    /// True once [`add`](Self::add) has been called.
    pub(crate) fn has_sources(&self) -> bool {
        self.has_sources.load(Ordering::Acquire)
    }

    /// Waits for something else on `fd`.
    ///
    /// # Errors
    /// What the host said.
    pub fn modify(&self, fd: &impl AsRawFd, token: u32, interest: Interest) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), token.into(), interest)
    }

    /// Stops waiting for `fd`. A closed descriptor leaves by itself.
    ///
    /// # Errors
    /// What the host said.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())
    }

    pub(crate) fn add_raw(&self, fd: RawFd, data: u64) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, data, Interest::READ)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        data: u64,
        interest: Interest,
    ) -> io::Result<()> {
        let mut events = EventSet::EDGE_TRIGGERED;
        if interest.contains(Interest::READ) {
            events |= EventSet::IN | EventSet::READ_HANG_UP;
        }
        if interest.contains(Interest::WRITE) {
            events |= EventSet::OUT;
        }
        self.epoll.ctl(operation, fd, EpollEvent::new(events, data))
    }

    /// Waits up to `timeout` milliseconds (-1: for ever) and returns how many of `events` it set.
    pub(crate) fn wait(&self, timeout: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
        match self.epoll.wait(timeout, events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            other => other,
        }
    }
}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

pub(crate) fn event(of: &EpollEvent) -> Event {
    let set = of.event_set();
    let gone = set.intersects(EventSet::ERROR | EventSet::HANG_UP | EventSet::READ_HANG_UP);
    Event {
        token: of.data() as u32,
        readable: gone || set.contains(EventSet::IN),
        writable: gone || set.contains(EventSet::OUT),
    }
}

/// Wakes a lane from any thread: register it with [`Poller::add`]. Clones wake the same lane.
#[derive(Clone)]
pub struct Wake {
    fd: Arc<EventFd>,
}

impl std::fmt::Debug for Wake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wake").field("fd", &self.fd.as_raw_fd()).finish()
    }
}

impl Wake {
    /// One that wakes nobody yet.
    ///
    /// # Errors
    /// What the host said.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?) })
    }

    /// Wakes the lane.
    pub fn wake(&self) {
        // It can only fail when the counter is full, and then the lane has been woken.
        let _ = self.fd.write(1);
    }

    pub(crate) fn fd(&self) -> &Arc<EventFd> {
        &self.fd
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "flags of descriptors")]
    fn programs_that_the_embedder_starts_inherit_no_descriptor() {
        const CLOSE_ON_EXEC: u32 = 0o200_0000;
        let (poller, wake) = (Poller::new().unwrap(), Wake::new().unwrap());
        for fd in [poller.as_raw_fd(), wake.as_raw_fd()] {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            assert_ne!(u32::from_str_radix(flags.trim(), 8).unwrap() & CLOSE_ON_EXEC, 0, "{info}");
        }
    }
}
