//! The guest-physical address space: which host mapping holds a page.

#![allow(unsafe_code, reason = "hands out pointers into mappings that it keeps alive")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmkit_memory::{
    DirtyBitmap, GuestMemoryRegion, MemoryRegion, MmapRegion, PAGE_SIZE, WriteTracker,
};

/// One mapping of the partition.
pub(crate) struct Slot {
    pub id: u32,
    pub start: u64,
    /// Last guest-physical address.
    pub last: u64,
    host: *mut u8,
    pub writable: bool,
    pub tracker: WriteTracker,
    dirty: Option<Box<[AtomicU64]>>,
    /// Keeps `host` mapped.
    _region: Arc<MemoryRegion>,
}

// SAFETY: `host` points to a shared mapping that `_region` keeps alive; all accesses through it are
// guest accesses, which tolerate any interleaving.
unsafe impl Send for Slot {}
// SAFETY: as above; nothing in a slot but atomics changes after it is made.
unsafe impl Sync for Slot {}

impl Slot {
    pub fn new(
        id: u32,
        start: u64,
        region: Arc<MemoryRegion>,
        writable: bool,
        track: bool,
    ) -> Self {
        let len = region.len();
        Self {
            id,
            start,
            last: start + (len - 1),
            host: region.as_ptr(),
            writable,
            tracker: MmapRegion::bitmap(&region).clone(),
            dirty: track
                .then(|| (0..len.div_ceil(PAGE_SIZE * 64)).map(|_| AtomicU64::new(0)).collect()),
            _region: region,
        }
    }

    /// The host address of `pa`, which lies in this slot; valid to the end of its page.
    #[inline(always)]
    pub fn host(&self, pa: u64) -> *mut u8 {
        self.host.wrapping_add((pa - self.start) as usize)
    }

    /// The page number of `pa` within the region.
    pub fn page(&self, pa: u64) -> u64 {
        (pa - self.start) / PAGE_SIZE
    }

    /// Records that the page of `pa` is being written.
    pub fn mark_dirty(&self, pa: u64) {
        if let Some(dirty) = &self.dirty {
            let page = self.page(pa);
            if let Some(word) = dirty.get((page / 64) as usize) {
                word.fetch_or(1 << (page % 64), Ordering::Release);
            }
        }
    }

    /// Takes the dirty bits; false if this slot does not track.
    pub fn take_dirty(&self, into: &mut DirtyBitmap) -> bool {
        let Some(dirty) = &self.dirty else { return false };
        let words: Vec<u64> = dirty.iter().map(|w| w.swap(0, Ordering::AcqRel)).collect();
        into.merge(&words);
        true
    }
}

/// All mappings, ascending; immutable and swapped whole.
#[derive(Clone, Default)]
pub(crate) struct MemoryMap {
    slots: Vec<Arc<Slot>>,
}

impl MemoryMap {
    /// The slot that holds `pa`.
    #[inline]
    pub fn find(&self, pa: u64) -> Option<&Slot> {
        // Two or three slots: low RAM first, which is nearly always the one.
        self.slots.iter().map(|slot| &**slot).find(|slot| slot.start <= pa && pa <= slot.last)
    }

    /// The slots of the region at a host address.
    pub fn at_host(&self, host: usize) -> impl Iterator<Item = &Slot> {
        self.slots.iter().map(|slot| &**slot).filter(move |slot| slot.host as usize == host)
    }

    pub fn by_id(&self, id: u32) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|slot| slot.id == id)
    }

    /// This map with `slot` in it, unless it overlaps another.
    pub fn with(&self, slot: Slot) -> Option<Self> {
        if self.slots.iter().any(|s| s.start <= slot.last && slot.start <= s.last) {
            return None;
        }
        let mut slots = self.slots.clone();
        let place = slots.partition_point(|s| s.start < slot.start);
        slots.insert(place, Arc::new(slot));
        Some(Self { slots })
    }

    /// This map without mapping `id`.
    pub fn without(&self, id: u32) -> Option<Self> {
        let place = self.slots.iter().position(|slot| slot.id == id)?;
        let mut slots = self.slots.clone();
        slots.remove(place);
        Some(Self { slots })
    }
}
