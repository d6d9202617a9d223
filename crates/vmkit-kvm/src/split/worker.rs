//! The board's thread: waits for the 8254's timer and for irqfds, and for nothing in between.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use vmkit_device::thread_builder;
use vmkit_hypervisor::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::chips::Chips;

// What the thread wakes up for.
const STOP: u64 = 0;
const TIMER: u64 = 1;
const IRQFD: u64 = 2;

/// What the thread waits for. Which irqfds were written to is taken by who holds the board, and not by
/// waiting: so no write is ever on its way in a place that a saved state has not.
pub(super) struct Inputs {
    epoll: Epoll,
    /// The irqfds, by GSI. Readable while one of them has news.
    irqfds: Epoll,
    stop: EventFd,
}

impl Inputs {
    pub(super) fn new(timer: RawFd) -> io::Result<Self> {
        let inputs = Self {
            epoll: Epoll::new()?,
            irqfds: Epoll::new()?,
            stop: EventFd::new(libc::EFD_CLOEXEC)?,
        };
        for (fd, event) in
            [(timer, TIMER), (inputs.stop.as_raw_fd(), STOP), (inputs.irqfds.as_raw_fd(), IRQFD)]
        {
            add(&inputs.epoll, fd, EventSet::IN, event)?;
        }
        Ok(inputs)
    }

    /// Has writes to `fd`, which must stay open, pulse input `gsi`. The descriptor is not read, in case
    /// somebody else does: a write is an event whether or not the one before was read.
    pub(super) fn watch(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        add(&self.irqfds, fd.as_raw_fd(), events, u64::from(gsi))
    }

    /// Takes the GSIs of those of `count` irqfds that were written to since they were last taken.
    pub(super) fn take_irqfds(&self, count: usize, mut each: impl FnMut(u32)) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 16];
        // As many rounds as all of them need: writers that do not stop cannot keep the caller here.
        for _ in 0..count.div_ceil(events.len()) {
            let taken = self.irqfds.wait(0, &mut events)?;
            events.iter().take(taken).for_each(|event| each(event.data() as u32));
            if taken < events.len() {
                break;
            }
        }
        Ok(())
    }
}

fn add(epoll: &Epoll, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
}

/// The thread.
pub(super) struct Worker(JoinHandle<()>);

impl Worker {
    pub(super) fn start(chips: Arc<Chips>) -> io::Result<Self> {
        Ok(Self(thread_builder("vmkit-board").spawn(move || serve(&chips))?))
    }

    /// Ends the thread and waits for it.
    pub(super) fn stop(self, inputs: &Inputs) {
        if let Err(error) = inputs.stop.write(1) {
            log::error!("the board's thread could not be stopped: {error}");
            return;
        }
        if self.0.join().is_err() {
            log::error!("the board's thread panicked");
        }
    }
}

fn serve(chips: &Chips) {
    let mut events = [EpollEvent::default(); 16];
    loop {
        let count = match chips.inputs.epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("the board's thread cannot wait: {error}");
                return;
            }
        };
        for event in events.iter().take(count) {
            match event.data() {
                STOP => return,
                TIMER => chips.tick(),
                _ => chips.drain_irqfds(&mut chips.lock()),
            }
        }
    }
}
