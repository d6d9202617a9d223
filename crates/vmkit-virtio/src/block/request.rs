//! What a block request means (virtio 1.2 §5.2.6).

use std::io;
use std::sync::Arc;

use vmkit_memory::{GuestBuffers, GuestRam};

use super::{Disk, LIMIT, MOST_RANGES, MOST_SECTORS, MOST_ZEROES, SECTOR, SERIAL_LEN, feature};
use crate::fault::Rarely;
use crate::limit::Limiter;
use crate::queue::TURN_BYTES;
use crate::{Chain, Event, Fault, Poller, Progress, QueueSet, Queues, Reader, Worker, Writer};

/// Request types.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// What the status byte says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// So many requests may be done before the driver learns of the first, if it made that many available:
/// to ask whether it wants an interrupt costs as much as a small part of a request.
const SIGNAL_EVERY: u16 = 4;
/// Flag of a write-zeroes range: its place may be freed.
const UNMAP: u32 = 1;
/// Bytes of a discard or write-zeroes range.
const RANGE_LEN: u64 = 16;
/// Most bytes of one request, so that no request keeps the worker for long.
pub(super) const MOST_BYTES: u64 = 256 << 20;
/// Bytes whose reading or writing takes about as long as to make a disk's writes durable.
const FLUSH_BYTES: u64 = 4 << 20;

/// What requests took.
#[derive(Default)]
pub(super) struct Work {
    /// How much of a turn, in bytes.
    pub taken: u64,
    /// Bytes of the last request that were zeroed, of which none was in its buffers.
    pub zeroed: u64,
}

/// A request, taken apart.
pub(super) struct Request<'a> {
    kind: u32,
    sector: u64,
    /// What follows the header.
    pub(super) from: Reader<'a>,
    /// The buffers but for the status.
    pub(super) data: Writer<'a>,
    status: Writer<'a>,
}

/// What a request comes to for a disk in a file.
#[derive(Clone, Copy)]
pub(super) enum Action {
    /// To read into its buffers.
    Read { offset: u64 },
    /// To write from its buffers.
    Write { offset: u64 },
    /// To make durable what was written.
    Flush,
    /// None of these, or nothing that may be done: for [`RequestTarget::perform`].
    Other,
}

/// Serves one queue, request by request.
pub(super) struct BlockWorker {
    queue: u16,
    chain: Chain,
    target: RequestTarget,
    limiter: Limiter,
}

impl BlockWorker {
    pub(super) fn new(queue: u16, target: RequestTarget, limiter: Limiter) -> Self {
        Self { queue, chain: Chain::new(), target, limiter }
    }
}

impl Worker for BlockWorker {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        self.limiter.register(poller, LIMIT)
    }

    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        let Some(queue) = queues.get(index) else { return Ok(Progress::Drained) };
        let mut work = Work::default();
        for n in 1..=queue.size() {
            if work.taken >= TURN_BYTES {
                break;
            }
            if !self.limiter.ready() {
                return Ok(Progress::Waiting);
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            self.limiter.spend(|| self.chain.bytes());
            let request = self.target.parse(&self.chain, queue.memory())?;
            let written = self.target.perform(request, &mut work)?;
            self.limiter.spend_more(work.zeroed);
            queue.complete(self.chain.head(), written)?;
            if n.is_multiple_of(SIGNAL_EVERY) {
                queue.signal()?;
            }
        }
        Ok(Progress::More)
    }

    fn event(&mut self, _: &mut Queues, _: Event) -> Result<QueueSet, Fault> {
        Ok(QueueSet::one(self.queue))
    }

    fn quiesce(&mut self, _: &mut Queues) -> Result<(), Fault> {
        self.target.settle();
        Ok(())
    }
}

/// The disk, as a driver may use it.
pub(super) struct RequestTarget {
    name: String,
    disk: Arc<dyn Disk>,
    /// Bytes of all whole sectors.
    bytes: u64,
    features: u64,
    read_only: bool,
    serial: [u8; SERIAL_LEN],
    errors: Rarely,
}

impl RequestTarget {
    pub(super) fn new(
        name: String,
        disk: Arc<dyn Disk>,
        features: u64,
        read_only: bool,
        serial: [u8; SERIAL_LEN],
    ) -> Self {
        let bytes = disk.bytes() / SECTOR * SECTOR;
        Self { name, disk, bytes, features, read_only, serial, errors: Rarely::default() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// True if a write must be durable when it is done: a driver that cannot flush relies on that
    /// (§5.2.6.2).
    pub(super) fn writes_are_durable(&self) -> bool {
        self.features & feature::FLUSH == 0
    }

    /// Takes a request apart.
    pub(super) fn parse<'a>(
        &self,
        chain: &'a Chain,
        memory: &'a GuestRam,
    ) -> Result<Request<'a>, Fault> {
        let mut from = chain.reader(memory);
        let mut status = chain.writer(memory);
        let header: [u8; 16] = from.read_array()?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(sector);
        // The last byte is the status, what is before is the data's.
        let room = status.remaining().checked_sub(1).ok_or(Fault::Short { missing: 1 })?;
        let data = status.split(room);
        Ok(Request { kind, sector, from, data, status })
    }

    /// What `request` comes to, if it may be done.
    pub(super) fn action(&self, request: &Request<'_>) -> Action {
        let place = |len: u64| self.place(request.sector, len).filter(|_| len <= MOST_BYTES);
        match request.kind {
            kind::IN => place(request.data.remaining()).map(|offset| Action::Read { offset }),
            kind::OUT if self.read_only => None,
            kind::OUT => place(request.from.remaining()).map(|offset| Action::Write { offset }),
            kind::FLUSH => Some(Action::Flush),
            _ => None,
        }
        .unwrap_or(Action::Other)
    }

    /// Serves a request; returns how many bytes were written to guest memory. Adds to `work` what it
    /// took.
    pub(super) fn perform(&self, request: Request<'_>, work: &mut Work) -> Result<u32, Fault> {
        work.zeroed = 0;
        let action = self.action(&request);
        let Request { kind, mut from, mut data, mut status, .. } = request;
        let outcome = match (action, kind) {
            (Action::Read { offset }, _) => {
                work.taken += data.remaining();
                self.read(offset, &mut data)?
            }
            (Action::Write { offset }, _) => {
                let flushes = self.writes_are_durable();
                work.taken += from.remaining() + if flushes { FLUSH_BYTES } else { 0 };
                self.write(offset, &mut from)?
            }
            (Action::Flush, _) => {
                work.taken += FLUSH_BYTES;
                self.done(self.disk.flush())
            }
            (Action::Other, kind::IN | kind::OUT) => Status::IoError,
            (Action::Other, kind::GET_ID) => {
                let count = data.remaining().min(self.serial.len() as u64) as usize;
                data.write_all(self.serial.get(..count).unwrap_or_default())?;
                Status::Ok
            }
            (Action::Other, kind::DISCARD) => self.ranges(feature::DISCARD, &mut from, work)?,
            (Action::Other, kind::WRITE_ZEROES) => {
                self.ranges(feature::WRITE_ZEROES, &mut from, work)?
            }
            (Action::Other, _) => Status::Unsupported,
        };
        status.write_all(&[outcome as u8])?;
        Ok(data.written().saturating_add(1))
    }

    pub(super) fn done(&self, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.errors.log(|n| log::warn!("{}: I/O error {n}: {error}", self.name));
                Status::IoError
            }
        }
    }

    /// Has the disk leave nothing in memory. It is no request that could fail.
    fn settle(&self) {
        if let Err(error) = self.disk.settle() {
            log::error!("{}: its image is not whole while it rests: {error}", self.name);
        }
    }

    /// Where `len` bytes from `sector` on begin, if they are whole sectors inside of the disk.
    fn place(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.bytes).then_some(offset)
    }

    fn read(&self, mut offset: u64, data: &mut Writer<'_>) -> Result<Status, Fault> {
        let mut buffers = GuestBuffers::new();
        while data.remaining() > 0 {
            data.buffers(&mut buffers)?;
            let count = buffers.bytes() as u64;
            let status = self.done(self.disk.read(offset, &mut buffers));
            if status != Status::Ok || count == 0 {
                return Ok(status);
            }
            offset += count;
            buffers.clear();
        }
        Ok(Status::Ok)
    }

    fn write(&self, mut offset: u64, data: &mut Reader<'_>) -> Result<Status, Fault> {
        let mut buffers = GuestBuffers::new();
        while data.remaining() > 0 {
            data.buffers(&mut buffers)?;
            let count = buffers.bytes() as u64;
            let status = self.done(self.disk.write(offset, &mut buffers));
            if status != Status::Ok || count == 0 {
                return Ok(status);
            }
            offset += count;
            buffers.clear();
        }
        if self.writes_are_durable() {
            return Ok(self.done(self.disk.flush()));
        }
        Ok(Status::Ok)
    }

    /// Discards or zeroes the ranges in `data`, if that `feature` was negotiated. All are checked
    /// before the first is done.
    fn ranges(&self, wanted: u64, data: &mut Reader<'_>, work: &mut Work) -> Result<Status, Fault> {
        if self.features & wanted == 0 {
            return Ok(Status::Unsupported);
        }
        let len = data.remaining();
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > MOST_RANGES.into() {
            return Ok(Status::IoError);
        }
        let mut ranges = [(0, 0, false); MOST_RANGES as usize];
        let ranges = ranges.get_mut(..(len / RANGE_LEN) as usize).unwrap_or_default();
        for range in ranges.iter_mut() {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..]: [u8; 16] =
                data.read_array()?;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let (known, most) = if wanted == feature::WRITE_ZEROES {
                (UNMAP, MOST_ZEROES)
            } else {
                (0, MOST_SECTORS)
            };
            if flags & !known != 0 {
                return Ok(Status::Unsupported);
            }
            let len = u64::from(count) * SECTOR;
            match self.place(sector, len) {
                Some(offset) if count <= most => *range = (offset, len, flags != 0),
                _ => return Ok(Status::IoError),
            }
        }
        for &mut (offset, len, unmap) in ranges {
            work.taken += len;
            work.zeroed += if wanted == feature::WRITE_ZEROES { len } else { 0 };
            let result = match wanted {
                _ if len == 0 => Ok(()),
                feature::DISCARD => self.disk.discard(offset, len),
                _ => self.disk.write_zeroes(offset, len, unmap),
            };
            let status = self.done(result);
            if status != Status::Ok {
                return Ok(status);
            }
        }
        if wanted == feature::WRITE_ZEROES && self.writes_are_durable() {
            work.taken += FLUSH_BYTES;
            return Ok(self.done(self.disk.flush()));
        }
        Ok(Status::Ok)
    }
}
