//! Frames between a driver's queues and a network (virtio 1.2 §5.1.6).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::backend::{MAX_FRAME, MIN_FRAME, NetBackend};
use super::offload::{Cutter, Offload, Segmentation, WIRE, ethernet};
use super::{RX, TX, checksum, feature};
use crate::fault::Rarely;
use crate::limit::Limiter;
use crate::{Chain, Event, Fault, Poller, Progress, QueueSet, Queues, VirtQueue, Worker};

/// Bytes of the header before each frame (§5.1.6).
const HEADER: usize = 12;
/// Errors of a network in one turn after which the next is left to an event.
const MOST_ERRORS: u32 = 8;
/// Most buffers that one frame is spread over.
const MOST_BUFFERS: usize = 64;

/// What went through a network card. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct NetCounters {
    inner: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    dropped: AtomicU64,
}

impl NetCounters {
    /// Frames the guest sent.
    pub fn sent(&self) -> u64 {
        self.inner.sent.load(Ordering::Relaxed)
    }

    /// Frames the guest received.
    pub fn received(&self) -> u64 {
        self.inner.received.load(Ordering::Relaxed)
    }

    /// Frames of either way that were malformed, or found no room.
    pub fn dropped(&self) -> u64 {
        self.inner.dropped.load(Ordering::Relaxed)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// How fast frames may go either way.
pub(super) struct Limits {
    pub sent: Limiter,
    pub received: Limiter,
}

/// Events of the limits' timers; smaller numbers are the network's.
const SENT_LIMIT: u32 = u32::MAX;
const RECEIVED_LIMIT: u32 = u32::MAX - 1;

pub(super) struct NetWorker {
    backend: Arc<Mutex<Box<dyn NetBackend>>>,
    features: u64,
    /// Bytes of the longest packet, if the driver was told.
    mtu: Option<u16>,
    counters: NetCounters,
    chain: Chain,
    /// The frame on its way out.
    outgoing: Box<[u8]>,
    /// A header's place and the frame on its way in.
    incoming: Box<[u8]>,
    /// What waits for the driver's buffers.
    held: Held,
    /// A header's place and a segment of `incoming`.
    segment: Box<[u8]>,
    errors: Rarely,
    limits: Limits,
}

/// What waits for the driver's buffers.
#[derive(Clone, Copy)]
enum Held {
    Nothing,
    /// A frame in `incoming`, of this length with its header.
    Frame(usize),
    /// A frame in `incoming` of this length without its header, of which a segment is in `segment`,
    /// of this length with its header.
    Segments(usize, Cutter, usize),
}

/// What became of a frame.
enum Delivery {
    Done,
    Dropped,
    NoBuffers,
}

impl NetWorker {
    pub(super) fn new(
        backend: Arc<Mutex<Box<dyn NetBackend>>>,
        features: u64,
        mtu: Option<u16>,
        counters: NetCounters,
        limits: Limits,
    ) -> Self {
        Self {
            backend,
            features,
            mtu,
            counters,
            chain: Chain::new(),
            outgoing: vec![0; MAX_FRAME].into(),
            incoming: vec![0; HEADER + MAX_FRAME].into(),
            held: Held::Nothing,
            segment: vec![0; HEADER + MAX_FRAME].into(),
            errors: Rarely::default(),
            limits,
        }
    }

    fn transmit(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        let backend = self.backend.clone();
        let mut backend = backend.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        let progress = self.transmit_batch(queue, &mut **backend, &mut done);
        self.counters.inner.sent.fetch_add(done, Ordering::Relaxed);
        backend.flush();
        progress
    }

    /// Adds to `done` what was sent.
    fn transmit_batch(
        &mut self,
        queue: &mut VirtQueue,
        backend: &mut dyn NetBackend,
        done: &mut u64,
    ) -> Result<Progress, Fault> {
        let carries = backend.carries_offloads();
        for _ in 0..queue.size() {
            if !self.limits.sent.ready() {
                return Ok(Progress::Waiting);
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let sent = match self.take_frame(queue, carries)? {
                Some((len, offload)) => {
                    backend.send(self.outgoing.get(..len).unwrap_or_default(), &offload)
                }
                None => Err(io::ErrorKind::InvalidData.into()),
            };
            match sent {
                Ok(()) => *done += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    queue.undo_pop();
                    return Ok(Progress::Waiting);
                }
                Err(error) => {
                    count(&self.counters.inner.dropped);
                    self.errors.log(|n| log::warn!("network: frame {n} not sent: {error}"));
                }
            }
            self.limits.sent.spend(|| self.chain.bytes().saturating_sub(HEADER as u64));
            queue.complete(self.chain.head(), 0)?;
        }
        Ok(Progress::More)
    }

    /// Copies the frame in the chain to `outgoing`; none if it is none. What is left to do on it is
    /// done if the network does not carry it.
    fn take_frame(
        &mut self,
        queue: &VirtQueue,
        carries: bool,
    ) -> Result<Option<(usize, Offload)>, Fault> {
        let mut reader = self.chain.reader(queue.memory());
        let header: [u8; HEADER] = reader.read_array()?;
        let offload = header.first_chunk::<WIRE>().and_then(Offload::parse);
        let len = reader.remaining();
        let Some(offload) = offload.filter(|offload| self.may_leave(offload)) else {
            return Ok(None);
        };
        if len < MIN_FRAME as u64 || len > MAX_FRAME as u64 {
            return Ok(None);
        }
        let len = reader.read(&mut self.outgoing)?;
        let frame = self.outgoing.get_mut(..len).unwrap_or_default();
        if offload.segmentation != Segmentation::None {
            // Only networks that carry it let it be negotiated.
            return Ok(Cutter::new(frame, &offload).map(|_| (len, offload)));
        }
        match offload.checksum {
            Some(_) if carries => Ok(offload.fits(len).then_some((len, offload))),
            Some((start, offset)) => {
                let finished = checksum::finish(frame, start, offset);
                Ok(finished.then_some((len, Offload::default())))
            }
            None => Ok(Some((len, Offload::default()))),
        }
    }

    /// True if the driver may leave `offload` to us. It may leave a checksum even without having
    /// said so: that harms nobody.
    fn may_leave(&self, offload: &Offload) -> bool {
        match offload.segmentation {
            Segmentation::None => true,
            Segmentation::Tcp4 => self.features & feature::HOST_TSO4 != 0,
            Segmentation::Tcp6 => self.features & feature::HOST_TSO6 != 0,
        }
    }

    fn receive(&mut self, queue: &mut VirtQueue) -> Result<Progress, Fault> {
        let backend = self.backend.clone();
        let mut backend = backend.lock().unwrap_or_else(PoisonError::into_inner);
        let mut errors = 0;
        for _ in 0..queue.size() {
            if !self.limits.received.ready() {
                return Ok(Progress::Waiting);
            }
            if let Held::Nothing = self.held {
                let into = self.incoming.get_mut(HEADER..).unwrap_or_default();
                match backend.receive(into) {
                    Ok((len, offload)) => self.hold(len, offload),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Progress::Waiting);
                    }
                    Err(error) => {
                        self.errors.log(|n| log::warn!("network: not received {n}: {error}"));
                        // Frames behind it make no event any more, but a network that is gone would
                        // answer so for ever.
                        errors += 1;
                        if errors == MOST_ERRORS {
                            return Ok(Progress::Waiting);
                        }
                    }
                }
            }
            let frame = match self.held {
                Held::Nothing => continue,
                Held::Frame(len) => self.incoming.get_mut(..len),
                Held::Segments(_, _, len) => self.segment.get_mut(..len),
            };
            let mergeable = self.features & feature::MRG_RXBUF != 0;
            let frame = frame.unwrap_or_default();
            let bytes = frame.len().saturating_sub(HEADER) as u64;
            match deliver(queue, &mut self.chain, frame, mergeable)? {
                Delivery::Done => count(&self.counters.inner.received),
                Delivery::Dropped => count(&self.counters.inner.dropped),
                Delivery::NoBuffers => return Ok(Progress::Drained),
            }
            // Each segment is a frame to the driver, and paid for as one.
            self.limits.received.spend(|| bytes);
            self.held = match self.held {
                Held::Segments(len, cutter, _) => self.cut(len, cutter),
                _ => Held::Nothing,
            };
        }
        Ok(Progress::More)
    }

    /// Prepares the frame of `len` bytes in `incoming` for the driver: what it does not take over
    /// is done.
    fn hold(&mut self, len: usize, mut offload: Offload) {
        self.held = Held::Nothing;
        let Some(frame) = self.incoming.get_mut(HEADER..HEADER + len) else {
            return count(&self.counters.inner.dropped);
        };
        let cuts = offload.segmentation != Segmentation::None;
        let cutter = if cuts { Cutter::new(frame, &offload) } else { None };
        let possible = len >= MIN_FRAME && offload.fits(len) && (!cuts || cutter.is_some());
        // A driver that was told of an MTU may have no room for more (§5.1.4.1), but for what it cuts or
        // joins itself.
        let longest = match cutter {
            Some(_) if takes(self.features, offload.segmentation) => 0,
            Some(cutter) => usize::from(cutter.headers()) + usize::from(offload.segment),
            None => len,
        };
        let too_long = self
            .mtu
            .is_some_and(|mtu| longest.min(len) > ethernet(frame).unwrap_or(0) + usize::from(mtu));
        if !possible || too_long {
            return count(&self.counters.inner.dropped);
        }
        if let (true, Some((start, offset))) = (!cuts, offload.checksum)
            && self.features & feature::GUEST_CSUM == 0
        {
            checksum::finish(frame, start, offset);
            offload = Offload::default();
        }
        let headers = cutter.map_or(0, |cutter| cutter.headers());
        self.held = match cutter {
            Some(cutter) if !takes(self.features, offload.segmentation) => self.cut(len, cutter),
            _ => {
                put_header(&mut self.incoming, &offload.to_bytes(headers));
                Held::Frame(HEADER + len)
            }
        };
    }

    /// Cuts the next segment off the frame of `len` bytes in `incoming`.
    fn cut(&mut self, len: usize, mut cutter: Cutter) -> Held {
        let frame = self.incoming.get(HEADER..HEADER + len).unwrap_or_default();
        put_header(&mut self.segment, &[0; WIRE]);
        let into = self.segment.get_mut(HEADER..).unwrap_or_default();
        match cutter.next(frame, into) {
            Some(segment) => Held::Segments(len, cutter, HEADER + segment),
            None => Held::Nothing,
        }
    }
}

/// True if a driver with these features takes frames that are to be cut this way.
fn takes(features: u64, segmentation: Segmentation) -> bool {
    match segmentation {
        Segmentation::None => true,
        Segmentation::Tcp4 => features & feature::GUEST_TSO4 != 0,
        Segmentation::Tcp6 => features & feature::GUEST_TSO6 != 0,
    }
}

/// Puts a header before a frame, for one buffer.
fn put_header(frame: &mut [u8], header: &[u8; WIRE]) {
    let one_buffer = header.iter().chain(&[1, 0]);
    frame.iter_mut().zip(one_buffer).for_each(|(to, from)| *to = *from);
}

/// Puts a frame with its header into the driver's buffers: one, or as many as it takes if it agreed
/// to that (§5.1.6.4). A frame that fits no buffer, or not all that the queue holds, is dropped.
fn deliver(
    queue: &mut VirtQueue,
    chain: &mut Chain,
    frame: &mut [u8],
    mergeable: bool,
) -> Result<Delivery, Fault> {
    let most = if mergeable { MOST_BUFFERS.min(queue.size().into()) } else { 1 };
    let (mut room, mut buffers) = (0, 0);
    // First find how many buffers it takes: the header at the front says so.
    while room < frame.len() as u64 && buffers < most {
        if !queue.pop(chain)? {
            (0..buffers).for_each(|_| queue.undo_pop());
            return Ok(Delivery::NoBuffers);
        }
        let mut writer = chain.writer(queue.memory());
        room += writer.remaining();
        buffers += 1;
        if buffers == 1 && room >= frame.len() as u64 {
            writer.write_all(frame)?;
            let written = writer.written();
            queue.complete(chain.head(), written)?;
            return Ok(Delivery::Done);
        }
    }
    (0..buffers).for_each(|_| queue.undo_pop());
    if room < frame.len() as u64 {
        return Ok(Delivery::Dropped);
    }
    if let Some(count) = frame.get_mut(WIRE..HEADER) {
        count.copy_from_slice(&(buffers as u16).to_le_bytes());
    }
    let mut rest: &[u8] = frame;
    for _ in 0..buffers {
        // The driver may have changed its chains since they were looked at.
        if !queue.pop(chain)? {
            return Err(Fault::Request("a receive buffer taken back"));
        }
        let mut writer = chain.writer(queue.memory());
        let now = writer.remaining().min(rest.len() as u64) as usize;
        let (part, later) = rest.split_at(now);
        writer.write_all(part)?;
        rest = later;
        let written = writer.written();
        queue.complete(chain.head(), written)?;
    }
    if !rest.is_empty() {
        return Err(Fault::Request("receive buffers that shrank"));
    }
    Ok(Delivery::Done)
}

impl Worker for NetWorker {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        self.limits.sent.register(poller, SENT_LIMIT)?;
        self.limits.received.register(poller, RECEIVED_LIMIT)?;
        self.backend.lock().unwrap_or_else(PoisonError::into_inner).register(poller)
    }

    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        let Some(queue) = queues.get(index) else { return Ok(Progress::Waiting) };
        if index == TX { self.transmit(queue) } else { self.receive(queue) }
    }

    fn event(&mut self, _: &mut Queues, event: Event) -> Result<QueueSet, Fault> {
        match event.token {
            SENT_LIMIT => return Ok(QueueSet::one(TX)),
            RECEIVED_LIMIT => return Ok(QueueSet::one(RX)),
            _ => self.backend.lock().unwrap_or_else(PoisonError::into_inner).event(event),
        }
        let mut runnable = QueueSet::EMPTY;
        if event.readable {
            runnable = runnable.and(RX);
        }
        if event.writable {
            runnable = runnable.and(TX);
        }
        Ok(runnable)
    }
}
