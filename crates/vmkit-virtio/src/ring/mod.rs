//! The rings of a split virtqueue (virtio 1.2 §2.7), where the driver put them in guest memory.
//!
//! Their places are looked up once, when the queue becomes active: memory does not move, and neither
//! may rings until a reset. What is read is read once, and checked before it is used. (virtio-queue, which
//! checks the queue's setup, looks each access up anew; its walk is what the tests here compare with.)

#[cfg(test)]
mod tests;

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueState, QueueT};
use vmkit_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestRam, GuestSlice, MmapRegion, VolatileMemory,
    WriteTracker, may_write,
};

use crate::{Chain, Segment};

/// Bytes of a descriptor (§2.7.5).
const DESCRIPTOR: usize = 16;
/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Place of `idx` and of the first entry in both rings (§2.7.6, §2.7.8).
const INDEX: usize = 2;
const ENTRIES: usize = 4;
/// Bytes of an entry of the used ring.
const USED: usize = 8;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` and `VIRTQ_USED_F_NO_NOTIFY`.
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Buffers a chain in an indirect table may have whatever its queue's size. §2.7.5.3.1 allows no more than
/// the queue has entries, but Linux may make a smaller queue than it was offered and keep to the number of
/// buffers that went with that; QEMU takes as many.
const MOST_INDIRECT: u16 = 1024;

/// What is wrong with a chain of descriptors.
pub(crate) type Malformed = &'static str;

/// Why no chain could be taken.
pub(crate) enum Refused {
    /// The ring makes no sense.
    Ring(Error),
    /// The chain that begins at this descriptor does not.
    Chain(u16, Malformed),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Ring(error)
    }
}

/// A contiguous piece of guest memory.
struct Area {
    mapping: Arc<MmapRegion<WriteTracker>>,
    start: usize,
    len: usize,
}

impl Area {
    fn find(memory: &GuestRam, at: u64, len: usize) -> Option<Self> {
        let (region, start) = memory.to_region_addr(GuestAddress(at))?;
        let area = Self { mapping: region.get_mmap(), start: start.0 as usize, len };
        area.slice().is_ok().then_some(area)
    }

    fn to_write(memory: &GuestRam, at: u64, len: usize) -> Option<Self> {
        may_write(memory, GuestAddress(at), len).then(|| Self::find(memory, at, len)).flatten()
    }

    #[inline]
    fn slice(&self) -> Result<GuestSlice<'_>, Error> {
        self.mapping.get_slice(self.start, self.len).map_err(Error::VolatileMemoryError)
    }
}

#[inline]
fn load(slice: &GuestSlice<'_>, at: usize, order: Ordering) -> Result<u16, Error> {
    slice.load(at, order).map(u16::from_le).map_err(Error::VolatileMemoryError)
}

#[inline]
fn store(slice: &GuestSlice<'_>, at: usize, value: u16, order: Ordering) -> Result<(), Error> {
    slice.store(value.to_le(), at, order).map_err(Error::VolatileMemoryError)
}

/// One descriptor.
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Entry `index` of a table, which has it.
    #[inline]
    fn read(table: &GuestSlice<'_>, index: u16) -> Result<Self, Error> {
        let at = usize::from(index) * DESCRIPTOR;
        // Indirect tables may lie at any address.
        let half = |at| {
            let half = table.get_ref::<u64>(at).map_err(Error::VolatileMemoryError)?;
            Ok::<u64, Error>(u64::from_le(half.load()))
        };
        let (addr, rest) = (half(at)?, half(at + 8)?);
        Ok(Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 })
    }
}

/// The three parts of a queue, and how far the device is in them.
pub(crate) struct Ring {
    size: u16,
    event_index: bool,
    descriptors: Area,
    available: Area,
    used: Area,
    /// Next entry of the available ring to take.
    next_available: Wrapping<u16>,
    /// The driver's index of that ring, as it was last seen.
    seen: Wrapping<u16>,
    /// Next entry of the used ring to fill.
    next_used: Wrapping<u16>,
    /// Where that was when the driver's wish for interrupts was last looked at.
    asked: Wrapping<u16>,
}

impl Ring {
    /// Checks a queue's setup and finds it in `memory`.
    pub(crate) fn new(state: QueueState, memory: &GuestRam) -> Result<Self, Error> {
        let queue = Queue::try_from(state)?;
        let size = usize::from(queue.size());
        let found = |area: Option<Area>| area.ok_or(Error::FindMemoryRegion);
        let find = |at, len| found(Area::find(memory, at, len));
        let (next_available, next_used) =
            (Wrapping(queue.next_avail()), Wrapping(queue.next_used()));
        Ok(Self {
            size: queue.size(),
            event_index: queue.event_idx_enabled(),
            descriptors: find(queue.desc_table(), DESCRIPTOR * size)?,
            // Each with the other side's event index behind it.
            available: find(queue.avail_ring(), ENTRIES + 2 * size + 2)?,
            used: found(Area::to_write(memory, queue.used_ring(), ENTRIES + USED * size + 2))?,
            next_available,
            seen: next_available,
            next_used,
            asked: next_used,
        })
    }

    #[inline]
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Next entry of the available ring, next entry of the used ring.
    pub(crate) fn positions(&self) -> (u16, u16) {
        (self.next_available.0, self.next_used.0)
    }

    /// Takes the next available chain into `chain`; false if there is none. Tables of indirect
    /// descriptors are in `memory`.
    #[inline]
    pub(crate) fn pop(&mut self, chain: &mut Chain, memory: &GuestRam) -> Result<bool, Refused> {
        let available = self.available.slice()?;
        if self.seen == self.next_available {
            // What the driver wrote before it moved the index is seen from here on (§2.7.13).
            let index = Wrapping(load(&available, INDEX, Ordering::Acquire)?);
            if (index - self.next_available).0 > self.size {
                return Err(Error::InvalidAvailRingIndex.into());
            }
            self.seen = index;
            if index == self.next_available {
                return Ok(false);
            }
        }
        let entry = usize::from(self.next_available.0 & (self.size - 1));
        let head = load(&available, ENTRIES + 2 * entry, Ordering::Relaxed)?;
        self.next_available += 1;
        chain.head = head;
        self.walk(head, chain, memory)?.map_err(|what| Refused::Chain(head, what))?;
        Ok(true)
    }

    #[inline]
    fn walk(
        &self,
        head: u16,
        chain: &mut Chain,
        memory: &GuestRam,
    ) -> Result<Result<(), Malformed>, Error> {
        chain.segments.clear();
        chain.readable = 0;
        let mut table = self.descriptors.slice()?;
        let (mut entries, mut index) = (self.size, head);
        let (mut indirect, mut bytes) = (false, 0_u32);
        loop {
            if index >= entries {
                return Ok(Err("has an index beyond its table"));
            }
            let descriptor = Descriptor::read(&table, index)?;
            if descriptor.flags & INDIRECT != 0 {
                // §2.7.5.3.1: neither may an indirect table hold another, nor a chain go on behind one.
                let len = descriptor.len as usize;
                let count = u16::try_from(len / DESCRIPTOR).unwrap_or(0);
                let whole = count > 0 && len.is_multiple_of(DESCRIPTOR);
                if indirect || descriptor.flags & NEXT != 0 || !whole {
                    return Ok(Err("has a malformed indirect table"));
                }
                let at = GuestAddress(descriptor.addr);
                let Ok(found) = GuestMemoryBackend::get_slice(memory, at, len) else {
                    return Ok(Err("has an indirect table outside of memory"));
                };
                (table, entries, index, indirect) = (found, count, 0, true);
                continue;
            }
            // A chain cannot be longer without a loop in it.
            let most = if indirect { self.size.max(MOST_INDIRECT) } else { self.size };
            if chain.segments.len() >= usize::from(most) {
                return Ok(Err("is longer than it may be"));
            }
            if descriptor.flags & WRITE == 0 {
                if chain.readable < chain.segments.len() {
                    return Ok(Err("has a readable buffer after a writable one"));
                }
                chain.readable += 1;
            }
            let Some(sum) = bytes.checked_add(descriptor.len) else {
                return Ok(Err("has buffers of more than 4 GiB"));
            };
            bytes = sum;
            chain.segments.push(Segment { addr: descriptor.addr, len: descriptor.len });
            if descriptor.flags & NEXT == 0 {
                return Ok(Ok(()));
            }
            index = descriptor.next;
        }
    }

    /// True if a chain is available.
    pub(crate) fn has_available(&self) -> Result<bool, Error> {
        let index = load(&self.available.slice()?, INDEX, Ordering::Acquire)?;
        Ok(Wrapping(index) != self.next_available)
    }

    /// Puts the chain taken last back.
    pub(crate) fn undo_pop(&mut self) {
        self.next_available -= 1;
    }

    /// Gives the chain `head` back with `written` bytes written into it.
    #[inline]
    pub(crate) fn complete(&mut self, head: u16, written: u32) -> Result<(), Error> {
        let used = self.used.slice()?;
        let entry = ENTRIES + USED * usize::from(self.next_used.0 & (self.size - 1));
        for (at, value) in [(entry, u32::from(head)), (entry + 4, written)] {
            used.store(value.to_le(), at, Ordering::Relaxed).map_err(Error::VolatileMemoryError)?;
        }
        self.next_used += 1;
        // The entry, and what the device wrote into the buffers, is seen before the index (§2.7.8.2).
        store(&used, INDEX, self.next_used.0, Ordering::Release)
    }

    /// True if the driver wants an interrupt for what was completed since the last call (§2.7.7.2).
    #[inline]
    pub(crate) fn wants_interrupt(&mut self) -> Result<bool, Error> {
        // The driver may set its wish and then look at the used ring: one of both must see the other.
        fence(Ordering::SeqCst);
        let available = self.available.slice()?;
        if !self.event_index {
            return Ok(load(&available, 0, Ordering::Relaxed)? & NO_INTERRUPT == 0);
        }
        let before = std::mem::replace(&mut self.asked, self.next_used);
        let event = load(&available, ENTRIES + 2 * usize::from(self.size), Ordering::Relaxed)?;
        // The entry behind which the driver wants one is among the new ones.
        Ok(self.next_used - Wrapping(event) - Wrapping(1) < self.next_used - before)
    }

    /// Asks the driver for notifications; true if buffers came in between. Chains that were put back
    /// count as seen: they did not do, and it takes more to go on.
    pub(crate) fn enable_notification(&mut self) -> Result<bool, Error> {
        let used = self.used.slice()?;
        if self.event_index {
            let at = ENTRIES + USED * usize::from(self.size);
            store(&used, at, self.seen.0, Ordering::Relaxed)?;
        } else {
            store(&used, 0, 0, Ordering::Relaxed)?;
        }
        // As above, with the sides exchanged.
        fence(Ordering::SeqCst);
        let index = load(&self.available.slice()?, INDEX, Ordering::Acquire)?;
        Ok(Wrapping(index) != self.seen)
    }

    /// Tells the driver to spare its notifications. With event indices it does so by itself, until it
    /// comes to the one it was asked for.
    pub(crate) fn disable_notification(&mut self) -> Result<(), Error> {
        if self.event_index {
            return Ok(());
        }
        store(&self.used.slice()?, 0, NO_NOTIFY, Ordering::Relaxed)
    }
}
