//! The bus: which device answers a port or an address.
//!
//! The table is immutable and swapped whole; each vCPU holds a [`BusView`] with its own reference to
//! the table and compares one generation number per access.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use thiserror::Error;

use crate::{Device, IoFlow, IoSpace};

/// A range of ports or guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusRange {
    /// Ports or memory.
    pub space: IoSpace,
    /// First port or address.
    pub start: u64,
    /// Length, in ports or bytes; not zero.
    pub len: u64,
}

impl BusRange {
    /// The last port or address, if the range is not empty, does not wrap, and fits its space.
    fn last(&self) -> Option<u64> {
        let last = self.start.checked_add(self.len.checked_sub(1)?)?;
        (self.space == IoSpace::Mmio || last <= 0xFFFF).then_some(last)
    }
}

/// Why a range could not be put on the bus.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusError {
    /// The range is empty, wraps, or leaves its space.
    #[error("{device}: the range {start:#x} + {len:#x} is empty or leaves its address space")]
    Range {
        /// The device.
        device: String,
        /// First port or address.
        start: u64,
        /// Length.
        len: u64,
    },
    /// Another device answers part of the range.
    #[error("{device}: the range {start:#x} + {len:#x} overlaps {other}")]
    Overlap {
        /// The device.
        device: String,
        /// First port or address.
        start: u64,
        /// Length.
        len: u64,
        /// The device that was there first.
        other: String,
    },
}

#[derive(Clone)]
struct Entry {
    start: u64,
    /// How far behind the first port or address the last one is.
    reach: u64,
    region: usize,
    device: Arc<dyn Device>,
}

impl Entry {
    /// How far behind the entry's start `at` is, if `len` ports or bytes from there on, one at least, are
    /// all this entry's.
    #[inline]
    fn offset(&self, at: u64, len: usize) -> Option<u64> {
        // An address before the start wraps, and leaves nothing behind it.
        let offset = at.wrapping_sub(self.start);
        let behind = self.reach.checked_sub(offset)?;
        ((len as u64).wrapping_sub(1) <= behind).then_some(offset)
    }
}

#[derive(Clone, Default)]
struct Table {
    spaces: [Vec<Entry>; 2],
}

fn slot(space: IoSpace) -> usize {
    match space {
        IoSpace::Pio => 0,
        IoSpace::Mmio => 1,
    }
}

/// All devices of a machine by port and address.
#[derive(Default)]
pub struct Bus {
    table: ArcSwap<Table>,
    generation: AtomicU64,
    changes: Mutex<()>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = self.table.load();
        let names = |entries: &[Entry]| -> Vec<_> {
            entries.iter().map(|e| (e.start, e.device.name().to_owned())).collect()
        };
        f.debug_struct("Bus")
            .field("ports", &names(&table.spaces[0]))
            .field("mmio", &names(&table.spaces[1]))
            .finish_non_exhaustive()
    }
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets region `region` of `device` answer `range`.
    ///
    /// # Errors
    /// [`BusError`] if the range is impossible or taken; the bus is then as it was.
    pub fn insert(
        &self,
        range: BusRange,
        device: Arc<dyn Device>,
        region: usize,
    ) -> Result<(), BusError> {
        let _one_at_a_time = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let name = || device.name().to_owned();
        let Some(last) = range.last() else {
            return Err(BusError::Range { device: name(), start: range.start, len: range.len });
        };
        let mut table = Table::clone(&self.table.load());
        let entries = &mut table.spaces[slot(range.space)];
        if let Some(other) =
            entries.iter().find(|e| e.start <= last && range.start <= e.start + e.reach)
        {
            return Err(BusError::Overlap {
                device: name(),
                start: range.start,
                len: range.len,
                other: other.device.name().to_owned(),
            });
        }
        let index = entries.partition_point(|e| e.start < range.start);
        entries
            .insert(index, Entry { start: range.start, reach: last - range.start, region, device });
        self.publish(table);
        Ok(())
    }

    /// Takes away the range that starts at `start`; false if there is none.
    pub fn remove(&self, space: IoSpace, start: u64) -> bool {
        let _one_at_a_time = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = Table::clone(&self.table.load());
        let entries = &mut table.spaces[slot(space)];
        let Ok(index) = entries.binary_search_by_key(&start, |e| e.start) else {
            return false;
        };
        entries.remove(index);
        self.publish(table);
        true
    }

    fn publish(&self, table: Table) {
        self.table.store(Arc::new(table));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// A view for one vCPU.
    pub fn view(self: &Arc<Self>) -> BusView {
        let generation = self.generation.load(Ordering::Acquire);
        let table = self.table.load();
        let space = |entries: &Vec<Entry>| Space {
            entries: entries.iter().cloned().map(Some).collect(),
            latest: None,
            home: 0,
        };
        let spaces = [space(&table.spaces[0]), space(&table.spaces[1])];
        BusView { generation, spaces, bus: self.clone(), unclaimed: Arc::default() }
    }
}

/// One vCPU's view of the bus. What it has of the table is its own, so that an access touches no count
/// that vCPUs share.
pub struct BusView {
    bus: Arc<Bus>,
    generation: u64,
    spaces: [Space; 2],
    unclaimed: Arc<AtomicU64>,
}

impl std::fmt::Debug for BusView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BusView")
            .field("generation", &self.generation)
            .field("unclaimed", &self.unclaimed())
            .finish_non_exhaustive()
    }
}

/// The entries of a space, by their starts.
struct Space {
    /// All; the latest is out of its place.
    entries: Vec<Option<Entry>>,
    /// The one that answered last: accesses come in runs.
    latest: Option<Entry>,
    /// Its place.
    home: usize,
}

impl BusView {
    /// Counts what no device answers in `counter`, for others to see.
    #[must_use]
    pub fn counting_in(mut self, counter: Arc<AtomicU64>) -> Self {
        self.unclaimed = counter;
        self
    }

    /// The entry that answered last and the offset in it, if it answers this, too.
    #[inline]
    fn same(&self, space: IoSpace, at: u64, len: usize) -> Option<(&Entry, u64)> {
        if self.bus.generation.load(Ordering::Acquire) != self.generation {
            return None;
        }
        let entry = self.spaces[slot(space)].latest.as_ref()?;
        Some((entry, entry.offset(at, len)?))
    }

    /// The entry that answers and the offset in it, now the latest of its space.
    fn find(&mut self, space: IoSpace, at: u64, len: usize) -> Option<(&Entry, u64)> {
        let generation = self.bus.generation.load(Ordering::Acquire);
        if generation != self.generation {
            *self = Self { unclaimed: self.unclaimed.clone(), ..self.bus.view() };
        }
        let Space { entries, latest, home } = &mut self.spaces[slot(space)];
        if let Some(before) = latest.take()
            && let Some(place) = entries.get_mut(*home)
        {
            *place = Some(before);
        }
        let starts_behind = |entry: &Option<Entry>| entry.as_ref().is_some_and(|e| e.start <= at);
        let found = entries.partition_point(starts_behind).checked_sub(1);
        if let Some(index) = found
            && let Some(place) = entries.get_mut(index)
            && let Some(offset) = place.as_ref().and_then(|entry| entry.offset(at, len))
        {
            (*latest, *home) = (place.take(), index);
            return Some((latest.as_ref()?, offset));
        }
        self.unclaimed.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// Reads `data.len()` (1 to 8) bytes. What no device answers reads as ones.
    #[inline]
    pub fn read(&mut self, space: IoSpace, at: u64, data: &mut [u8]) {
        match self.same(space, at, data.len()) {
            Some((entry, offset)) => entry.device.read(entry.region, offset, data),
            None => self.read_another(space, at, data),
        }
    }

    #[inline(never)]
    fn read_another(&mut self, space: IoSpace, at: u64, data: &mut [u8]) {
        match self.find(space, at, data.len()) {
            Some((entry, offset)) => entry.device.read(entry.region, offset, data),
            None => data.fill(0xFF),
        }
    }

    /// Writes `data` (1 to 8 bytes). What no device answers is dropped.
    #[inline]
    pub fn write(&mut self, space: IoSpace, at: u64, data: &[u8]) -> IoFlow {
        match self.same(space, at, data.len()) {
            Some((entry, offset)) => entry.device.write(entry.region, offset, data),
            None => self.write_another(space, at, data),
        }
    }

    #[inline(never)]
    fn write_another(&mut self, space: IoSpace, at: u64, data: &[u8]) -> IoFlow {
        match self.find(space, at, data.len()) {
            Some((entry, offset)) => entry.device.write(entry.region, offset, data),
            None => IoFlow::Continue,
        }
    }

    /// Accesses that no device answered.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Announcement, DeviceError, Saved, Section};

    struct Echo(&'static str);
    impl Device for Echo {
        fn name(&self) -> &str {
            self.0
        }
        fn announce(&self) -> Vec<Announcement> {
            Vec::new()
        }
        fn read(&self, region: usize, offset: u64, data: &mut [u8]) {
            data.fill((region as u64 * 16 + offset) as u8);
        }
        fn write(&self, _: usize, offset: u64, _: &[u8]) -> IoFlow {
            if offset == 0 { IoFlow::Stop } else { IoFlow::Continue }
        }
        fn start(&self) -> Result<(), DeviceError> {
            Ok(())
        }
        fn pause(&self) {}
        fn reset(&self) {}
        fn save(&self) -> Saved {
            Saved::Stateless
        }
        fn load(&self, _: &[Section]) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    fn pio(start: u64, len: u64) -> BusRange {
        BusRange { space: IoSpace::Pio, start, len }
    }

    #[test]
    fn an_access_reaches_the_device_whose_range_holds_all_of_it() {
        let bus = Arc::new(Bus::new());
        bus.insert(pio(0x3F8, 8), Arc::new(Echo("serial0")), 2).unwrap();
        let mut view = bus.view();
        let mut byte = [0];
        view.read(IoSpace::Pio, 0x3FF, &mut byte);
        assert_eq!(byte, [0x27]);
        let mut word = [0; 2];
        view.read(IoSpace::Pio, 0x3FF, &mut word);
        assert_eq!(word, [0xFF; 2]);
        view.read(IoSpace::Mmio, 0x3F8, &mut byte);
        assert_eq!((byte, view.unclaimed()), ([0xFF], 2));
        assert_eq!(view.write(IoSpace::Pio, 0x3F8, &[0]), IoFlow::Stop);
    }

    #[test]
    fn devices_in_turn_each_get_their_own() {
        let bus = Arc::new(Bus::new());
        for (at, region) in [(0x60, 1), (0x70, 2), (0x20, 3)] {
            bus.insert(pio(at, 2), Arc::new(Echo("device")), region).unwrap();
        }
        let mut view = bus.view();
        for at in [0x60, 0x20, 0x70, 0x21, 0x5F, 0x61, 0x62, 0x71, 0x1F, 0x20, 0x20] {
            let mut byte = [0];
            view.read(IoSpace::Pio, at, &mut byte);
            let want = match at {
                0x60 | 0x61 => 0x10 + at - 0x60,
                0x70 | 0x71 => 0x20 + at - 0x70,
                0x20 | 0x21 => 0x30 + at - 0x20,
                _ => 0xFF,
            };
            assert_eq!(u64::from(byte[0]), want, "{at:#x}");
        }
        assert_eq!(view.unclaimed(), 3);
    }

    #[test]
    fn a_view_follows_changes() {
        let bus = Arc::new(Bus::new());
        let mut view = bus.view();
        bus.insert(pio(0x60, 1), Arc::new(Echo("i8042")), 0).unwrap();
        assert_eq!(view.write(IoSpace::Pio, 0x60, &[1]), IoFlow::Stop);
        assert!(bus.remove(IoSpace::Pio, 0x60));
        assert_eq!(view.write(IoSpace::Pio, 0x60, &[1]), IoFlow::Continue);
    }

    #[test]
    fn impossible_and_taken_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(pio(0x70, 2), Arc::new(Echo("rtc")), 0).unwrap();
        for bad in [pio(0x71, 1), pio(0x60, 0x20), pio(0xFFFF, 2), pio(0x10, 0)] {
            assert!(bus.insert(bad, Arc::new(Echo("x")), 0).is_err(), "{bad:?}");
        }
        let wraps = BusRange { space: IoSpace::Mmio, start: u64::MAX, len: 2 };
        assert!(bus.insert(wraps, Arc::new(Echo("x")), 0).is_err());
    }
}
