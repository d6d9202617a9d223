//! Serves a queue of a disk in a file through io_uring: many requests in flight, each completed when
//! it is done. What a request means is in [`request`](super::request).

use std::fs::File;
use std::io;

use vmkit_memory::{FileRing, GuestRam};

use super::request::{Action, RequestTarget, Status, Work};
use super::{LIMIT, RING};
use crate::limit::Limiter;
use crate::queue::TURN_BYTES;
use crate::{Chain, Event, Fault, Interest, Poller, Progress, QueueSet, Queues, VirtQueue, Worker};

/// Most requests in flight.
const MOST_IN_FLIGHT: u16 = 256;
/// Bytes in flight from which on none is begun: a stop waits for all of them.
const MOST_BYTES_IN_FLIGHT: u64 = 64 << 20;

pub(super) struct RingWorker {
    queue: u16,
    target: RequestTarget,
    limiter: Limiter,
    ring: FileRing,
    memory: GuestRam,
    /// The chain taken last.
    chain: Chain,
    /// The requests in flight, by the number of their operation.
    flights: Vec<Flight>,
    /// Bytes they read and write.
    bytes: u64,
    /// Requests were left in the queue because as many, or as much, was in flight as may be.
    full: bool,
}

/// A request in flight.
#[derive(Default)]
struct Flight {
    chain: Chain,
    /// Bytes of guest memory it fills, without its status.
    fills: u64,
    /// Bytes it reads or writes.
    bytes: u64,
    /// It is a write that must be durable before it is done.
    then_sync: bool,
}

impl RingWorker {
    pub(super) fn new(
        queue: (u16, u16),
        target: RequestTarget,
        limiter: Limiter,
        file: File,
        memory: GuestRam,
    ) -> io::Result<Self> {
        let (queue, size) = queue;
        let entries = size.min(MOST_IN_FLIGHT);
        let ring = FileRing::new(file, memory.clone(), entries)?;
        let flights = (0..entries).map(|_| Flight::default()).collect();
        Ok(Self {
            queue,
            target,
            limiter,
            ring,
            memory,
            chain: Chain::new(),
            flights,
            bytes: 0,
            full: false,
        })
    }

    /// True if another request may be begun.
    fn has_room(&mut self) -> bool {
        self.bytes < MOST_BYTES_IN_FLIGHT && self.ring.entry().is_some()
    }

    /// Takes requests until none is left, none may be begun, or others should have their turn.
    fn begin(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        self.full = false;
        let mut work = Work::default();
        for _ in 0..queue.size() {
            if work.taken >= TURN_BYTES {
                break;
            }
            if !self.limiter.ready() {
                return Ok(Progress::Waiting);
            }
            if !self.has_room() {
                self.submit()?;
                self.reap(Some(&mut *queue))?;
                if !self.has_room() {
                    self.full = true;
                    return Ok(Progress::Waiting);
                }
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            self.limiter.spend(|| self.chain.bytes());
            self.begin_one(queue, &mut work)?;
        }
        Ok(Progress::More)
    }

    /// Begins the request in `chain`, and adds to `work` what it takes: what is in the page
    /// cache is done when it is submitted.
    fn begin_one(&mut self, queue: &mut VirtQueue, work: &mut Work) -> Result<(), Fault> {
        let mut request = self.target.parse(&self.chain, &self.memory)?;
        let fills = request.data.remaining();
        let action = self.target.action(&request);
        let Some(entry) = self.ring.entry() else { return Ok(()) };
        let number = entry.number();
        let bytes = match action {
            Action::Read { .. } => fills,
            Action::Write { .. } => request.from.remaining(),
            _ => 0,
        };
        work.taken += bytes;
        let begun = match action {
            Action::Read { offset } => entry.read(offset, request.data.pieces()),
            Action::Write { offset } => entry.write(offset, request.from.pieces()),
            Action::Flush => entry.sync(),
            Action::Other => {
                let written = self.target.perform(request, work)?;
                self.limiter.spend_more(work.zeroed);
                return queue.complete(self.chain.head(), written);
            }
        };
        begun.map_err(|_| Fault::Request("a buffer that is not in guest memory"))?;
        if let Some(flight) = self.flights.get_mut(usize::from(number)) {
            std::mem::swap(&mut flight.chain, &mut self.chain);
            let is_write = matches!(action, Action::Write { .. });
            flight.fills = if matches!(action, Action::Read { .. }) { fills } else { 0 };
            (flight.bytes, self.bytes) = (bytes, self.bytes + bytes);
            flight.then_sync = is_write && self.target.writes_are_durable();
        }
        Ok(())
    }

    fn submit(&mut self) -> Result<(), Fault> {
        self.ring.submit().map_err(|error| {
            log::error!("{}: the host takes no more I/O: {error}", self.target.name());
            Fault::Request("the host takes no more I/O")
        })
    }

    /// Completes what is done. Without a queue it is only forgotten.
    fn reap(&mut self, mut queue: Option<&mut VirtQueue>) -> Result<(), Fault> {
        while let Some((number, result)) = self.ring.completed() {
            let Some(flight) = self.flights.get_mut(usize::from(number)) else { continue };
            if result.is_ok() && std::mem::take(&mut flight.then_sync) {
                let flight = std::mem::take(flight);
                let Some(entry) = self.ring.entry() else { continue };
                let number = usize::from(entry.number());
                // Without pieces of memory it cannot fail.
                if entry.sync().is_ok()
                    && let Some(to) = self.flights.get_mut(number)
                {
                    *to = flight;
                }
                continue;
            }
            self.bytes -= std::mem::take(&mut flight.bytes);
            let Some(queue) = queue.as_deref_mut() else { continue };
            let status = self.target.done(result);
            let fills = if status == Status::Ok { flight.fills } else { 0 };
            let mut writer = flight.chain.writer(&self.memory);
            writer.skip(writer.remaining().saturating_sub(1));
            writer.write_all(&[status as u8])?;
            let written = u32::try_from(fills.saturating_add(1)).unwrap_or(u32::MAX);
            queue.complete(flight.chain.head(), written)?;
        }
        // What goes on: the rest of requests done in part, and flushes of writes.
        self.submit()
    }
}

impl Worker for RingWorker {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        self.limiter.register(poller, LIMIT)?;
        poller.add(&self.ring, RING, Interest::READ)
    }

    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        let Some(queue) = queues.get(index) else { return Ok(Progress::Drained) };
        let progress = self.begin(queue)?;
        self.submit()?;
        // What was in the page cache is done by now.
        self.reap(Some(queue))?;
        // Perhaps the last in flight is done, so that no event comes for what was left.
        if self.full && self.has_room() {
            return Ok(Progress::More);
        }
        Ok(progress)
    }

    fn event(&mut self, queues: &mut Queues, event: Event) -> Result<QueueSet, Fault> {
        if event.token == RING {
            self.reap(queues.get(self.queue))?;
        }
        // There is room again for what may be left in the queue.
        Ok(QueueSet::one(self.queue))
    }

    fn quiesce(&mut self, queues: &mut Queues) -> Result<(), Fault> {
        let mut outcome = Ok(());
        while self.ring.in_flight() > 0 {
            self.ring.wait().map_err(|error| {
                log::error!("{}: cannot wait for I/O: {error}", self.target.name());
                Fault::Request("the host does not finish its I/O")
            })?;
            // Whatever is wrong with one request, the others must end before memory is left alone.
            let queue = queues.get(self.queue).filter(|_| outcome.is_ok());
            outcome = outcome.and(self.reap(queue));
        }
        outcome
    }
}
