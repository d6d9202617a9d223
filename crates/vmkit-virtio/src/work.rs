//! Who does a device's work.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use vmkit_device::thread_builder;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::lane::Lane;

/// Who does a device's work.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum WorkModel {
    /// A thread for each group of queues that a device serves independently.
    #[default]
    Thread,
    /// The vCPU thread whose guest notifies a queue: nothing of the request is left when the write
    /// returns. Events of the host (input, packets, I/O that ends later, the end of a rate limit's
    /// wait) still come on a thread of the device's, and what they bring is done there. So is what a
    /// guest adds while it is worked for without an end: a vCPU thread is not kept for ever.
    Inline,
    /// The embedder's own event loop.
    Loop(EventLoop),
}

/// The end of a device that an embedder's event loop holds. Clones are the same.
///
/// Wait until the descriptor ([`AsRawFd`]) is readable, then call
/// [`process_ready`](Self::process_ready); any number of devices can share one.
///
/// ```
/// use std::os::fd::AsRawFd;
/// use vmkit_virtio::{EventLoop, WorkModel};
///
/// let events = EventLoop::new()?;
/// let model = WorkModel::Loop(events.clone());
/// assert!(events.as_raw_fd() >= 0);
/// assert_eq!(events.process_ready()?, 0);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct EventLoop {
    inner: Arc<LoopInner>,
}

struct LoopInner {
    epoll: Epoll,
    lanes: Mutex<Lanes>,
}

#[derive(Default)]
struct Lanes {
    next: u64,
    by_token: HashMap<u64, Weak<Lane>>,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop").field("fd", &self.as_raw_fd()).finish_non_exhaustive()
    }
}

impl EventLoop {
    /// A loop with no devices.
    ///
    /// # Errors
    /// What the host said.
    pub fn new() -> io::Result<Self> {
        Ok(Self { inner: Arc::new(LoopInner { epoll: Epoll::new()?, lanes: Mutex::default() }) })
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.inner.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does the work that is there, without waiting. Returns how many groups of queues had some.
    ///
    /// # Errors
    /// What the host said of the descriptors themselves.
    pub fn process_ready(&self) -> io::Result<usize> {
        let mut events = [EpollEvent::default(); 16];
        let count = self.inner.epoll.wait(0, &mut events)?;
        for event in events.iter().take(count) {
            let lane = self.lanes().by_token.get(&event.data()).and_then(Weak::upgrade);
            if let Some(lane) = lane {
                lane.turn(0)?;
            }
        }
        Ok(count)
    }

    fn add(&self, lane: &Arc<Lane>) -> io::Result<()> {
        let mut lanes = self.lanes();
        lanes.by_token.retain(|_, lane| lane.strong_count() > 0);
        let token = lanes.next;
        lanes.next += 1;
        let event = EpollEvent::new(EventSet::IN, token);
        self.inner.epoll.ctl(ControlOperation::Add, lane.as_raw_fd(), event)?;
        lanes.by_token.insert(token, Arc::downgrade(lane));
        Ok(())
    }
}

impl AsRawFd for EventLoop {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.epoll.as_raw_fd()
    }
}

impl WorkModel {
    /// True if the thread that notifies a queue works on it.
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self, Self::Inline)
    }

    /// Has `lane` turned from now on. Lanes of a loop stay in it until they are dropped; `first` is
    /// true the first time.
    pub(crate) fn start(
        &self,
        device: &str,
        lane: &Arc<Lane>,
        first: bool,
    ) -> io::Result<Option<JoinHandle<()>>> {
        lane.resume();
        match self {
            Self::Loop(events) if first => events.add(lane).map(|()| None),
            Self::Loop(_) => Ok(None),
            Self::Inline if !lane.has_sources() => Ok(None),
            Self::Thread | Self::Inline => spawn(device, lane),
        }
    }
}

/// Has `lane` turned by a thread until it is halted, if none does yet.
pub(crate) fn spawn(device: &str, lane: &Arc<Lane>) -> io::Result<Option<JoinHandle<()>>> {
    if lane.take_thread() {
        return Ok(None);
    }
    let (turned, name) = (lane.clone(), device.to_owned());
    let thread = thread_builder(name.clone()).spawn(move || {
        while turned.running() {
            if let Err(error) = turned.turn(-1) {
                log::error!("{name}: its worker cannot wait for events: {error}");
                return;
            }
        }
    });
    thread.map(Some).inspect_err(|_| lane.give_thread())
}
