//! What goes over a console's queues: bytes of a port, and control messages (virtio 1.2 §5.3.6).

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::port::{Port, owed};
use super::{CONTROL_TO_DEVICE, CONTROL_TO_DRIVER, Shared};
use crate::fault::Rarely;
use crate::queue::TURN_BYTES;
use crate::{Chain, Event, Fault, Interest, Poller, Progress, QueueSet, Queues, VirtQueue, Worker};

/// Control events (§5.3.6.2).
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Bytes copied at a time.
const PIECE: usize = 4096;
/// Most bytes of output taken from one chain. A driver sends less than a page at a time.
const MOST_OUTPUT: u64 = 1 << 20;

/// Serves the two queues of one port.
pub(super) struct PortWorker {
    port: Arc<Port>,
    to_driver: u16,
    chain: Chain,
    /// Output on its way.
    piece: Box<[u8]>,
    errors: Rarely,
}

impl PortWorker {
    pub(super) fn new(port: Arc<Port>, to_driver: u16) -> Self {
        let piece = vec![0; PIECE].into();
        Self { port, to_driver, chain: Chain::new(), piece, errors: Rarely::default() }
    }

    fn to_device(&self) -> u16 {
        self.to_driver + 1
    }

    fn feed(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        let mut input = self.port.input();
        // A port that nobody has opened would lose its input: Linux drops it.
        let listens = self.port.is_console || self.port.open.load(Ordering::Acquire);
        if input.is_empty() || !listens {
            return Ok(Progress::Waiting);
        }
        // A driver can lend buffers without room for ever.
        for _ in 0..queue.size() {
            if input.is_empty() {
                return Ok(Progress::Waiting);
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let mut writer = self.chain.writer(queue.memory());
            while writer.remaining() > 0 && !input.is_empty() {
                let (front, _) = input.as_slices();
                let count = front.len().min(usize::try_from(writer.remaining()).unwrap_or(0));
                writer.write_all(front.get(..count).unwrap_or_default())?;
                input.drain(..count);
            }
            let written = writer.written();
            queue.complete(self.chain.head(), written)?;
        }
        Ok(Progress::More)
    }

    fn take(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        let mut output = self.port.output();
        let mut bytes = 0;
        for _ in 0..queue.size() {
            if bytes >= TURN_BYTES {
                break;
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let mut reader = self.chain.reader(queue.memory());
            if reader.remaining() > MOST_OUTPUT {
                return Err(Fault::Request("a console buffer of more than a mebibyte"));
            }
            bytes += reader.remaining();
            while reader.remaining() > 0 {
                let count = reader.read(&mut self.piece)?;
                let written = output.write_all(self.piece.get(..count).unwrap_or_default());
                if let Err(error) = written.and_then(|()| output.flush()) {
                    let name = &self.port.name;
                    self.errors.log(|n| log::warn!("console port {name:?}: lost {n}: {error}"));
                }
            }
            queue.complete(self.chain.head(), 0)?;
        }
        Ok(Progress::More)
    }
}

impl Worker for PortWorker {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.port.wake, 0, Interest::READ)
    }

    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        let Some(queue) = queues.get(index) else { return Ok(Progress::Waiting) };
        if index == self.to_driver { self.feed(queue) } else { self.take(queue) }
    }

    fn event(&mut self, _: &mut Queues, _: Event) -> Result<QueueSet, Fault> {
        Ok(QueueSet::one(self.to_driver))
    }

    fn outgoing(&self) -> QueueSet {
        QueueSet::one(self.to_device())
    }
}

/// Serves the control channel.
pub(super) struct ControlWorker {
    ports: Vec<Arc<Port>>,
    shared: Arc<Shared>,
    chain: Chain,
}

impl ControlWorker {
    pub(super) fn new(ports: Vec<Arc<Port>>, shared: Arc<Shared>) -> Self {
        Self { ports, shared, chain: Chain::new() }
    }

    /// Sends the messages that are owed, while the driver has room for them.
    fn tell(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        for (id, port) in (0_u32..).zip(&self.ports) {
            loop {
                let owes = port.owed.load(Ordering::Acquire);
                let next = owes & owes.wrapping_neg();
                if next == 0 {
                    break;
                }
                if !queue.pop(&mut self.chain)? {
                    return Ok(Progress::Drained);
                }
                // Forgotten first: what changes from here on is owed anew.
                port.owed.fetch_and(!next, Ordering::AcqRel);
                let (columns, rows) = self.shared.size_now().unwrap_or_default();
                let size = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
                let (event, value, more): (_, u16, &[u8]) = match next {
                    owed::ADD => (event::PORT_ADD, 1, &[]),
                    owed::CONSOLE => (event::CONSOLE_PORT, 1, &[]),
                    owed::NAME => (event::PORT_NAME, 1, port.name.as_bytes()),
                    owed::SIZE => (event::RESIZE, 0, &size),
                    _ => (event::PORT_OPEN, 1, &[]),
                };
                let mut writer = self.chain.writer(queue.memory());
                writer.write_all(&id.to_le_bytes())?;
                writer.write_all(&event.to_le_bytes())?;
                writer.write_all(&value.to_le_bytes())?;
                // A name may be longer than a driver has room for.
                let room = usize::try_from(writer.remaining()).unwrap_or(usize::MAX);
                writer.write_all(more.get(..room).unwrap_or(more))?;
                let written = writer.written();
                queue.complete(self.chain.head(), written)?;
            }
        }
        Ok(Progress::Waiting)
    }

    fn listen(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let message = self.chain.reader(queue.memory()).read_array()?;
            queue.complete(self.chain.head(), 0)?;
            self.handle(message);
        }
        Ok(Progress::More)
    }

    fn handle(&self, message: [u8; 8]) {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let value = u16::from_le_bytes([v0, v1]);
        let owe = |port: &Port, what| port.owed.fetch_or(what, Ordering::AcqRel);
        let port = self.ports.get(id as usize);
        match (u16::from_le_bytes([e0, e1]), port) {
            (event::DEVICE_READY, _) if value == 1 => {
                self.shared.ready.store(true, Ordering::Release);
                for port in &self.ports {
                    owe(port, owed::ADD);
                }
            }
            (event::PORT_READY, Some(port)) if value == 1 => {
                let kind = if port.is_console { owed::CONSOLE } else { owed::NAME };
                // A driver with several ports is told of the size here and ignores the
                // configuration space's.
                let sized = port.is_console && self.shared.size_now().is_some();
                owe(port, owed::OPEN | kind | if sized { owed::SIZE } else { 0 });
            }
            (event::PORT_OPEN, Some(port)) => {
                port.open.store(value == 1, Ordering::Release);
                // What was typed before somebody listened.
                port.wake.wake();
            }
            // Anything else is about a port that does not exist, or news of no use here.
            _ => return,
        }
        self.shared.control.wake();
    }
}

impl Worker for ControlWorker {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.shared.control, 0, Interest::READ)
    }

    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        if index == CONTROL_TO_DEVICE
            && let Some(queue) = queues.get(index)
        {
            let progress = self.listen(queue)?;
            if let Some(queue) = queues.get(CONTROL_TO_DRIVER) {
                self.tell(queue)?;
            }
            return Ok(progress);
        }
        match queues.get(CONTROL_TO_DRIVER) {
            Some(queue) => self.tell(queue),
            None => Ok(Progress::Waiting),
        }
    }

    fn event(&mut self, _: &mut Queues, _: Event) -> Result<QueueSet, Fault> {
        Ok(QueueSet::one(CONTROL_TO_DRIVER))
    }
}
