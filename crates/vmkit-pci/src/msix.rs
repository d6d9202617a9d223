//! MSI-X (PCI 3.0 §6.8.2): a table of messages, a mask for each and one for all, and which masked
//! ones wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmkit_device::{InterruptSink, Msi};

use crate::config::{BARS, Capability, MSIX};

/// Bytes of a table entry.
const ENTRY: u64 = 16;
/// Most vectors.
const MOST: u16 = 2048;
/// Vector control: masked (§6.8.2.9).
const MASKED: u32 = 1;
/// Message control: all are masked, and enabled (§6.8.2.3).
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;

/// Where a function's MSI-X table and pending bits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// The BAR.
    pub bar: u8,
    /// Where in it the table begins, a multiple of 8.
    pub table: u32,
    /// Where in it the pending bits begin, a multiple of 8.
    pub pending: u32,
}

impl MsixPlace {
    fn table_len(&self) -> u64 {
        u64::from(self.vectors) * ENTRY
    }

    fn pending_len(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }

    /// The capability; an error if the place is impossible.
    pub(crate) fn capability(&self, bars: &[Option<u32>; BARS]) -> Result<Capability, String> {
        let bar = bars.get(usize::from(self.bar)).copied().flatten().unwrap_or(0);
        let (table, pending) = (u64::from(self.table), u64::from(self.pending));
        let (table_end, pending_end) = (table + self.table_len(), pending + self.pending_len());
        let possible = (1..=MOST).contains(&self.vectors)
            && self.table.is_multiple_of(8)
            && self.pending.is_multiple_of(8)
            && table_end.max(pending_end) <= bar.into()
            && (table_end <= pending || pending_end <= table);
        if !possible {
            return Err(format!("MSI-X at {self:?}"));
        }
        let mut bytes = (self.vectors - 1).to_le_bytes().to_vec();
        bytes.extend((self.table | u32::from(self.bar)).to_le_bytes());
        bytes.extend((self.pending | u32::from(self.bar)).to_le_bytes());
        let writable = (FUNCTION_MASK | ENABLE).to_le_bytes().to_vec();
        Ok(Capability { id: MSIX, bytes, writable, window: false })
    }
}

/// One vector, also as it is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Entry {
    /// As after power-on (§6.8.2.9).
    const POWER_ON: Self = Self { address: 0, data: 0, masked: true, pending: false };
}

/// A function's vectors.
pub struct Msix {
    sink: Arc<dyn InterruptSink>,
    place: MsixPlace,
    enabled: AtomicBool,
    masked: AtomicBool,
    entries: Box<[Mutex<Entry>]>,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix")
            .field("place", &self.place)
            .field("enabled", &self.enabled)
            .field("masked", &self.masked)
            .finish_non_exhaustive()
    }
}

impl Msix {
    pub(crate) fn new(place: MsixPlace, sink: Arc<dyn InterruptSink>) -> Self {
        let entries = (0..place.vectors).map(|_| Mutex::new(Entry::POWER_ON)).collect();
        Self {
            sink,
            place,
            enabled: AtomicBool::new(false),
            masked: AtomicBool::new(false),
            entries,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.place.vectors
    }

    /// True if the driver uses MSI-X; the interrupt pin is to be left alone then.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    fn entry(&self, vector: u16) -> Option<MutexGuard<'_, Entry>> {
        let entry = self.entries.get(usize::from(vector))?;
        Some(entry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends the message of `vector`, or remembers it while it is masked. A vector that does not
    /// exist sends nothing.
    pub fn fire(&self, vector: u16) {
        if !self.enabled() {
            return;
        }
        if let Some(mut entry) = self.entry(vector) {
            entry.pending = true;
            self.settle(&mut entry);
        }
    }

    /// Sends what is pending if nothing masks it.
    fn settle(&self, entry: &mut Entry) {
        let free = self.enabled() && !self.masked.load(Ordering::Acquire) && !entry.masked;
        if free && std::mem::take(&mut entry.pending) {
            self.sink.signal_msi(Msi { address: entry.address, data: entry.data });
        }
    }

    /// Takes over message control from the capability.
    pub(crate) fn set_control(&self, control: u16) {
        self.masked.store(control & FUNCTION_MASK != 0, Ordering::Release);
        self.enabled.store(control & ENABLE != 0, Ordering::Release);
        for vector in 0..self.vectors() {
            if let Some(mut entry) = self.entry(vector) {
                self.settle(&mut entry);
            }
        }
    }

    /// True if an access to the BAR is for the table or the pending bits.
    pub(crate) fn owns(&self, bar: usize, offset: u64) -> bool {
        let table = u64::from(self.place.table);
        let pending = u64::from(self.place.pending);
        bar == usize::from(self.place.bar)
            && ((table..table + self.place.table_len()).contains(&offset)
                || (pending..pending + self.place.pending_len()).contains(&offset))
    }

    /// Reads the table or the pending bits, byte by byte, at `offset` of the BAR.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (n, byte) in (0..).zip(data.iter_mut()) {
            let at = offset.saturating_add(n);
            *byte = if at >= u64::from(self.place.pending)
                && at < u64::from(self.place.pending) + self.place.pending_len()
            {
                self.pending_byte(at - u64::from(self.place.pending))
            } else {
                self.table_byte(at.wrapping_sub(self.place.table.into()))
            };
        }
    }

    fn pending_byte(&self, at: u64) -> u8 {
        let bit = |n: u64| {
            let vector = u16::try_from(at * 8 + n).unwrap_or(u16::MAX);
            u8::from(self.entry(vector).is_some_and(|entry| entry.pending)) << n
        };
        (0..8).map(bit).sum()
    }

    fn table_byte(&self, at: u64) -> u8 {
        let Some(entry) = u16::try_from(at / ENTRY).ok().and_then(|v| self.entry(v)) else {
            return 0;
        };
        let control = if entry.masked { MASKED } else { 0 };
        let bytes = entry.address.to_le_bytes().into_iter();
        let mut bytes = bytes.chain(entry.data.to_le_bytes()).chain(control.to_le_bytes());
        bytes.nth((at % ENTRY) as usize).unwrap_or(0)
    }

    /// Writes the table; only whole, aligned words of 4 or 8 bytes do anything (§6.8.2).
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let Some(at) = offset.checked_sub(self.place.table.into()) else { return };
        if at >= self.place.table_len() || !matches!(data.len(), 4 | 8) || !at.is_multiple_of(4) {
            return;
        }
        for (n, word) in (0..).zip(data.chunks_exact(4)) {
            if let Ok(word) = word.try_into() {
                self.write_word(at + 4 * n, u32::from_le_bytes(word));
            }
        }
    }

    fn write_word(&self, at: u64, value: u32) {
        let Some(mut entry) = u16::try_from(at / ENTRY).ok().and_then(|v| self.entry(v)) else {
            return;
        };
        match at % ENTRY {
            0 => entry.address = entry.address >> 32 << 32 | u64::from(value & !3),
            4 => entry.address = entry.address & 0xFFFF_FFFF | u64::from(value) << 32,
            8 => entry.data = value,
            _ => {
                entry.masked = value & MASKED != 0;
                self.settle(&mut entry);
            }
        }
    }

    pub(crate) fn reset(&self) {
        self.enabled.store(false, Ordering::Release);
        self.masked.store(false, Ordering::Release);
        for vector in 0..self.vectors() {
            if let Some(mut entry) = self.entry(vector) {
                *entry = Entry::POWER_ON;
            }
        }
    }

    pub(crate) fn save(&self) -> Vec<Entry> {
        (0..self.vectors()).filter_map(|v| self.entry(v).map(|entry| *entry)).collect()
    }

    /// Takes on saved entries, as many as there are vectors. Nothing is sent: what was pending
    /// still is, because something masks it.
    pub(crate) fn load(&self, entries: &[Entry], control: u16) {
        for (vector, saved) in (0..).zip(entries) {
            if let Some(mut entry) = self.entry(vector) {
                *entry = *saved;
            }
        }
        self.masked.store(control & FUNCTION_MASK != 0, Ordering::Release);
        self.enabled.store(control & ENABLE != 0, Ordering::Release);
    }
}
