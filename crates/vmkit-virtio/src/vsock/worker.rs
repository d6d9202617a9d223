//! Packets between a driver's queues and the connections.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::host::Host;
use super::packet::Header;
use super::table::{MOST, Table};
use super::{EVENT, RX, TX};
use crate::{
    Chain, Event, Fault, FaultCounter, Interest, Poller, Progress, QueueSet, Queues, VirtQueue,
    Wake, Worker,
};

/// Tokens beside those of the connections.
const LISTENER: u32 = MOST as u32;
const REQUESTS: u32 = LISTENER + 1;
const AGAIN: u32 = LISTENER + 2;
const RETRY: u32 = LISTENER + 3;

/// How long host programs wait for a process without descriptors to have some again.
const PATIENCE: Duration = Duration::from_millis(100);

/// Event: the connections of before are gone (§5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

pub(super) struct VsockWorker {
    name: String,
    host: Arc<Mutex<Host>>,
    table: Table,
    restored: Arc<AtomicBool>,
    misuse: FaultCounter,
    chain: Chain,
    /// Wakes this worker itself.
    again: Wake,
    /// Has it look at the listening socket again, if there is one.
    retry: Option<TimerFd>,
    /// Packets of the guest wait until refusals have found buffers.
    held_back: bool,
    /// They need wait no more.
    let_go: bool,
}

impl VsockWorker {
    pub(super) fn new(
        name: String,
        cid: u64,
        host: Arc<Mutex<Host>>,
        restored: Arc<AtomicBool>,
        misuse: FaultCounter,
    ) -> io::Result<Self> {
        Ok(Self {
            name,
            host,
            table: Table::new(cid),
            restored,
            misuse,
            chain: Chain::new(),
            again: Wake::new()?,
            retry: None,
            held_back: false,
            let_go: false,
        })
    }

    fn listen(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        let host = self.host.clone();
        let host = host.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..queue.size() {
            if self.table.is_congested() {
                self.held_back = true;
                return Ok(Progress::Waiting);
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let mut reader = self.chain.reader(queue.memory());
            let header = Header::parse(&reader.read_array()?);
            if let Err(what) = self.table.handle(&header, &mut reader, &host)? {
                self.misuse.note(&self.name, &what);
            }
            queue.complete(self.chain.head(), 0)?;
        }
        Ok(Progress::More)
    }

    fn speak(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        for _ in 0..queue.size() {
            if !self.table.wants_to_speak() {
                return Ok(Progress::Waiting);
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let mut writer = self.chain.writer(queue.memory());
            if !self.table.speak(&mut writer)? {
                queue.undo_pop();
                return Ok(Progress::Waiting);
            }
            let written = writer.written();
            queue.complete(self.chain.head(), written)?;
            if self.held_back && !self.table.is_congested() {
                (self.held_back, self.let_go) = (false, true);
                self.again.wake();
            }
        }
        Ok(Progress::More)
    }

    /// Accepts the host programs that wait.
    fn accept_all(&mut self, listener: &UnixListener) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => self.table.greet(stream),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    // Descriptors or memory are short. Those that wait make no event any more.
                    _ => {
                        log::warn!("{}: host programs must wait: {error}", self.name);
                        if let Some(Err(error)) =
                            self.retry.as_mut().map(|retry| retry.reset(PATIENCE, None))
                        {
                            log::error!("{}: for the next to come: {error}", self.name);
                        }
                        return;
                    }
                },
            }
        }
    }

    fn announce(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        if !self.restored.load(Ordering::Acquire) {
            return Ok(Progress::Waiting);
        }
        if !queue.pop(&mut self.chain)? {
            return Ok(Progress::Drained);
        }
        let mut writer = self.chain.writer(queue.memory());
        writer.write_all(&TRANSPORT_RESET.to_le_bytes())?;
        let written = writer.written();
        queue.complete(self.chain.head(), written)?;
        self.restored.store(false, Ordering::Release);
        Ok(Progress::Waiting)
    }
}

impl Worker for VsockWorker {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        self.table.set_poller(poller.clone());
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = &host.listener {
            poller.add(listener, LISTENER, Interest::READ)?;
            let retry = TimerFd::new().map_err(io::Error::from)?;
            poller.add(&retry, RETRY, Interest::READ)?;
            self.retry = Some(retry);
        }
        poller.add(&host.wake, REQUESTS, Interest::READ)?;
        poller.add(&self.again, AGAIN, Interest::READ)
    }

    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        let Some(queue) = queues.get(index) else { return Ok(Progress::Waiting) };
        match index {
            TX => {
                let progress = self.listen(queue)?;
                // Answers at once, if the driver has buffers out; if they run short, the lane must
                // ask for more.
                if self.table.wants_to_speak()
                    && let Some(queue) = queues.get(RX)
                    && self.speak(queue)? != Progress::Waiting
                {
                    self.again.wake();
                }
                Ok(progress)
            }
            EVENT => self.announce(queue),
            _ => self.speak(queue),
        }
    }

    fn event(&mut self, _: &mut Queues, event: Event) -> Result<QueueSet, Fault> {
        let host = self.host.clone();
        match event.token {
            LISTENER | RETRY => {
                let host = host.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(listener) = &host.listener {
                    self.accept_all(listener);
                }
            }
            REQUESTS => {
                let host = host.lock().unwrap_or_else(PoisonError::into_inner);
                while let Some((port, stream)) = host.request() {
                    self.table.ask(port, stream);
                }
            }
            // The queue to the device only if it was held back: its turn ends here again as long as the
            // driver has no buffers out.
            AGAIN if std::mem::take(&mut self.let_go) => return Ok(QueueSet::one(RX).and(TX)),
            AGAIN => return Ok(QueueSet::one(RX)),
            token => self.table.socket_event(token as usize, event.readable, event.writable),
        }
        let speak = self.table.wants_to_speak();
        Ok(if speak { QueueSet::one(RX) } else { QueueSet::EMPTY })
    }

    fn outgoing(&self) -> QueueSet {
        QueueSet::one(TX)
    }
}
