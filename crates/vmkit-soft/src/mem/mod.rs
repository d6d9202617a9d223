//! Memory as the processor sees it: loads and stores at linear addresses.
//!
//! The fast paths are one comparison in the [`Tlb`]; everything else (page walks, crossing pages,
//! MMIO, pages that hold code, data breakpoints) is behind them, out of line.

#![allow(unsafe_code, reason = "guest memory is reached through host addresses")]

mod map;
mod tlb;
mod walk;

use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use std::sync::{MutexGuard, OnceLock};

pub(crate) use map::{MemoryMap, Slot};
use tlb::Found;
pub(crate) use tlb::{Table, Tlb};
use vmkit_memory::WriteTracker;
pub(crate) use walk::{Access, Translation, canonical};

use crate::cpu::trap::{self, Trap, TrapKind};
use crate::cpu::{Cpu, Int, Mode, Width};
use crate::partition::PartitionInner;

/// Supervisor access; SMAP applies if it is on.
pub(crate) const MODE_SUPERVISOR: u64 = 0;
/// Supervisor access with EFLAGS.AC set: SMAP does not apply.
pub(crate) const MODE_SUPERVISOR_AC: u64 = 1;
/// User access.
pub(crate) const MODE_USER: u64 = 2;
/// User access with alignment checks. Nothing is cached under it, so every access takes the slow path,
/// which checks and goes on as [`MODE_USER`].
pub(crate) const MODE_USER_ALIGNED: u64 = 3;

/// What `host` holds.
///
/// # Safety
/// `host` came from a read hit of the TLB for `T::BYTES` bytes, since which no mapping was taken away.
#[inline(always)]
unsafe fn read_host<T: Int>(host: u64) -> T {
    // SAFETY: the caller got `host` from the TLB for at least `T::BYTES` bytes of a mapping that the
    // processor's memory map keeps alive.
    unsafe { (host as *const T).read_unaligned() }
}

/// Stores at `host`.
///
/// # Safety
/// `host` came from a write hit of the TLB for `T::BYTES` bytes, since which no mapping was taken away.
#[inline(always)]
unsafe fn write_host<T: Int>(host: u64, value: T) {
    // SAFETY: as for `read_host`, from the write table.
    unsafe { (host as *mut T).write_unaligned(value) }
}

impl Cpu {
    /// Loads from `linear` with the privilege of the current code.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, linear: u64) -> Result<T, Trap> {
        if let Some(host) = self.tlb.read(linear, T::BYTES, self.tlb_mode) {
            // SAFETY: a read hit for `T::BYTES` bytes.
            return Ok(unsafe { read_host(host) });
        }
        self.load_slow(linear, self.tlb_mode)
    }

    /// Stores to `linear` with the privilege of the current code.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, linear: u64, value: T) -> Result<(), Trap> {
        if let Some(host) = self.tlb.write(linear, T::BYTES, self.tlb_mode) {
            // SAFETY: a write hit for `T::BYTES` bytes.
            unsafe { write_host(host, value) };
            return Ok(());
        }
        self.store_slow(linear, value, self.tlb_mode)
    }

    /// Loads with an explicit mode: descriptor tables and task segments are read as supervisor.
    pub fn load_as<T: Int>(&mut self, linear: u64, mode: u64) -> Result<T, Trap> {
        if let Some(host) = self.tlb.read(linear, T::BYTES, mode) {
            // SAFETY: a read hit for `T::BYTES` bytes.
            return Ok(unsafe { read_host(host) });
        }
        self.load_slow(linear, mode)
    }

    /// Stores with an explicit mode.
    pub fn store_as<T: Int>(&mut self, linear: u64, value: T, mode: u64) -> Result<(), Trap> {
        if let Some(host) = self.tlb.write(linear, T::BYTES, mode) {
            // SAFETY: a write hit for `T::BYTES` bytes.
            unsafe { write_host(host, value) };
            return Ok(());
        }
        self.store_slow(linear, value, mode)
    }

    /// Claims `linear` for a read-modify-write: the host address, or 0 if the slow path must do it.
    /// Faults are raised here, so that nothing is half done.
    #[inline(always)]
    pub fn place<T: Int>(&mut self, linear: u64) -> Result<u64, Trap> {
        match self.tlb.write(linear, T::BYTES, self.tlb_mode) {
            Some(host) => Ok(host),
            None => self.place_slow(linear, T::BYTES),
        }
    }

    /// Reads what [`place`](Self::place) claimed.
    #[inline(always)]
    pub fn read_place<T: Int>(&mut self, place: u64, linear: u64) -> Result<T, Trap> {
        if place != 0 {
            // SAFETY: `place` is a write hit for `T::BYTES` bytes, and what is writable is readable.
            return Ok(unsafe { read_host(place) });
        }
        self.load_slow(linear, self.tlb_mode)
    }

    /// Writes what [`place`](Self::place) claimed.
    #[inline(always)]
    pub fn write_place<T: Int>(&mut self, place: u64, linear: u64, value: T) -> Result<(), Trap> {
        if place != 0 {
            // SAFETY: `place` is a write hit for `T::BYTES` bytes.
            unsafe { write_host(place, value) };
            return Ok(());
        }
        self.store_slow(linear, value, self.tlb_mode)
    }

    /// Replaces what `linear` holds by `f` of it, as one atomic access (LOCK); returns what was
    /// there.
    #[inline(always)]
    pub fn update_locked<W: Width>(
        &mut self,
        linear: u64,
        f: impl Fn(u64) -> u64,
    ) -> Result<u64, Trap> {
        let bytes = W::BYTES as usize;
        if let Some(host) = self.tlb.write(linear, bytes, self.tlb_mode)
            && host & (W::BYTES - 1) == 0
        {
            // SAFETY: an aligned write hit for the operand's width.
            return Ok(unsafe { W::atomic_update(host as *mut W::Int, f) });
        }
        self.update_locked_slow::<W>(linear, f)
    }

    #[cold]
    #[inline(never)]
    fn update_locked_slow<W: Width>(
        &mut self,
        linear: u64,
        f: impl Fn(u64) -> u64,
    ) -> Result<u64, Trap> {
        let bytes = W::BYTES as usize;
        let update = |host: *mut u8| {
            // SAFETY: `locked` hands out the address of as many bytes that the guest may write; Rust's
            // atomics are for aligned ones only.
            unsafe {
                if host as usize & (bytes - 1) == 0 {
                    W::atomic_update(host.cast(), &f)
                } else {
                    update_misaligned::<W>(host, &f)
                }
            }
        };
        if let Some(old) = self.locked(linear, bytes, update)? {
            return Ok(old);
        }
        let partition = self.partition.clone();
        let _split = self.split_lock(&partition, linear, bytes)?;
        let old = self.load_slow::<W::Int>(linear, self.tlb_mode)?;
        let old = crate::cpu::Int::widen(old);
        let new = f(old) & W::MASK;
        self.store_slow(linear, W::Int::truncate(new), self.tlb_mode)?;
        Ok(old)
    }

    /// Does a locked access of `bytes` at `linear` by a host instruction: `f` gets the host address. None,
    /// with nothing done, if the operand is not in RAM that may be written, or crosses lines of the host's
    /// cache where that could go wrong ([`split_locks_are_fine`]), or crosses pages. Only host instructions exclude those of other vCPUs, so this serves pages that hold code, and all
    /// pages while data breakpoints are armed.
    pub fn locked<R>(
        &mut self,
        linear: u64,
        bytes: usize,
        f: impl FnOnce(*mut u8) -> R,
    ) -> Result<Option<R>, Trap> {
        let mode = self.check_aligned(linear, bytes, Access::Write, self.tlb_mode)?;
        let crosses = |size: u64| (linear & (size - 1)) + bytes as u64 > size;
        if crosses(0x1000) || crosses(64) && !split_locks_are_fine() {
            return Ok(None);
        }
        let (host, pa) = match self.tlb.find_slow(Table::Write, linear, bytes, mode) {
            Found::Fast(host) => return Ok(Some(f(host as *mut u8))),
            Found::Code(host, pa) => (host as *mut u8, pa),
            Found::Miss => {
                let pa = self.translate_and_fill(linear, Access::Write, mode)?;
                match self.map.find(pa).filter(|slot| slot.writable) {
                    Some(slot) => (slot.host(pa), pa),
                    None => return Ok(None),
                }
            }
        };
        let result = f(host);
        self.wrote_beside_code(pa, bytes, linear);
        if self.watches_data() {
            self.data_access(linear, bytes, true);
        }
        Ok(Some(result))
    }

    /// What a locked access by a load and a store is to hold meanwhile, after raising its faults: only one
    /// of those goes on at a time in the whole machine. Nothing for what is not RAM: the way to a device
    /// leads through the embedder, who may wait there for another vCPU.
    pub fn split_lock<'a>(
        &mut self,
        partition: &'a PartitionInner,
        linear: u64,
        bytes: usize,
    ) -> Result<Option<MutexGuard<'a, ()>>, Trap> {
        let mode = self.check_aligned(linear, bytes, Access::Write, self.tlb_mode)?;
        let (first, second) = self.translate_span(linear, bytes, Access::Write, mode)?;
        let ram = |pa| self.map.find(pa).is_some_and(|slot| slot.writable);
        let all = ram(first) && second.is_none_or(ram);
        Ok(all.then(|| partition.split_lock()))
    }

    /// The mode to translate with; raises #AC where alignment is checked and `linear` lacks it, after
    /// the page faults that go before it (Intel SDM vol. 3A table 7-2).
    fn check_aligned(
        &mut self,
        linear: u64,
        bytes: usize,
        access: Access,
        mode: u64,
    ) -> Result<u64, Trap> {
        if mode != MODE_USER_ALIGNED {
            return Ok(mode);
        }
        self.translate_span(linear, bytes, access, MODE_USER)?;
        if matches!(bytes, 2 | 4 | 8 | 16) && linear & (bytes as u64 - 1) != 0 {
            return Err(self.raise_with(trap::AC, 0));
        }
        Ok(MODE_USER)
    }

    /// Raises #AC for an operand of `bytes` that lacks the alignment `to`, if that is checked now. For
    /// operands that are moved as bytes.
    pub fn check_operand(
        &mut self,
        linear: u64,
        bytes: usize,
        to: u64,
        access: Access,
    ) -> Result<(), Trap> {
        if self.tlb_mode != MODE_USER_ALIGNED || linear & (to - 1) == 0 {
            return Ok(());
        }
        self.translate_span(linear, bytes, access, MODE_USER)?;
        Err(self.raise_with(trap::AC, 0))
    }

    #[cold]
    #[inline(never)]
    fn place_slow(&mut self, linear: u64, bytes: usize) -> Result<u64, Trap> {
        let mode = self.check_aligned(linear, bytes, Access::Write, self.tlb_mode)?;
        match self.tlb.find_slow(Table::Write, linear, bytes, mode) {
            Found::Fast(host) => return Ok(host),
            Found::Code(..) => return Ok(0),
            Found::Miss => {}
        }
        self.translate_span(linear, bytes, Access::Write, mode)?;
        match self.tlb.find_slow(Table::Write, linear, bytes, mode) {
            Found::Fast(host) => Ok(host),
            _ => Ok(0),
        }
    }

    /// Translates every page of a span, filling the TLB where it can, before anything is touched.
    /// Returns the guest-physical addresses of the first byte and, if it crosses, of the second page.
    fn translate_span(
        &mut self,
        linear: u64,
        bytes: usize,
        access: Access,
        mode: u64,
    ) -> Result<(u64, Option<u64>), Trap> {
        let last = self.wrap_linear(linear.wrapping_add(bytes as u64 - 1));
        if self.mode.contains(Mode::LMA) && !canonical(last) {
            self.trap = TrapKind::NonCanonical;
            return Err(Trap);
        }
        let first = self.translate_and_fill(linear, access, mode)?;
        if (linear ^ last) & !0xFFF == 0 {
            return Ok((first, None));
        }
        let second = self.translate_and_fill(last & !0xFFF, access, mode)?;
        Ok((first, Some(second)))
    }

    fn translate_and_fill(&mut self, linear: u64, access: Access, mode: u64) -> Result<u64, Trap> {
        let Translation { pa, meta } = self.translate(linear, access, mode)?;
        let map = self.map.clone();
        let Some(slot) = map.find(pa) else { return Ok(pa) };
        let table = if access == Access::Write { Table::Write } else { Table::Read };
        let mut code = false;
        if access == Access::Write {
            if !slot.writable {
                return Ok(pa);
            }
            slot.mark_dirty(pa);
            code = slot.tracker.watched_lines(slot.page(pa)) != 0;
        }
        if !self.watches_data() {
            let page = pa & !0xFFF;
            let host = slot.host(pa) as u64;
            self.tlb.fill(table, linear, mode, host, page | meta, code);
        }
        Ok(pa)
    }

    /// The loads that miss.
    #[inline(always)]
    fn load_slow<T: Int>(&mut self, linear: u64, mode: u64) -> Result<T, Trap> {
        self.load_missed(linear, T::BYTES, mode)?;
        // SAFETY: `loaded` has 16 bytes and every bit pattern is a `T`.
        Ok(unsafe { (&raw const self.loaded).cast::<T>().read_unaligned() })
    }

    /// Loads up to 16 bytes into [`Cpu::loaded`]: a result by way of memory of the caller's would keep
    /// the caller's frame alive, and with it the chain of calls from being jumps.
    #[cold]
    #[inline(never)]
    fn load_missed(&mut self, linear: u64, bytes: usize, mode: u64) -> Result<(), Trap> {
        let mode = self.check_aligned(linear, bytes, Access::Read, mode)?;
        let mut buffer = [0_u8; 16];
        if let Found::Fast(host) = self.tlb.find_slow(Table::Read, linear, bytes, mode) {
            // SAFETY: a read hit for `bytes` bytes, which lie in one page.
            unsafe { copy_in(host as *const u8, &mut buffer[..bytes]) };
        } else {
            self.load_bytes(linear, &mut buffer[..bytes], mode)?;
        }
        self.loaded = u128::from_ne_bytes(buffer);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Int>(&mut self, linear: u64, value: T, mode: u64) -> Result<(), Trap> {
        let mode = self.check_aligned(linear, T::BYTES, Access::Write, mode)?;
        match self.tlb.find_slow(Table::Write, linear, T::BYTES, mode) {
            Found::Fast(host) => {
                // SAFETY: a write hit for `T::BYTES` bytes.
                unsafe { write_host(host, value) };
                return Ok(());
            }
            Found::Code(host, pa) => {
                // SAFETY: as above; the entry is slow only because the page holds code.
                unsafe { write_host(host, value) };
                self.wrote_beside_code(pa, T::BYTES, linear);
                return Ok(());
            }
            Found::Miss => {}
        }
        let mut bytes = [0_u8; 16];
        // SAFETY: `bytes` has room for any `T`.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
        self.store_bytes(linear, &bytes[..T::BYTES], mode)
    }

    /// Loads up to a page of bytes, crossing pages if need be; faults before anything is read.
    pub fn load_bytes(&mut self, linear: u64, bytes: &mut [u8], mode: u64) -> Result<(), Trap> {
        let mode = unchecked(mode);
        let (first, second) = self.translate_span(linear, bytes.len(), Access::Read, mode)?;
        let cut = match second {
            Some(_) => bytes.len().min(0x1000 - (linear & 0xFFF) as usize),
            None => bytes.len(),
        };
        let (low, high) = bytes.split_at_mut(cut);
        self.read_physical(first, low);
        if let Some(second) = second {
            self.read_physical(second, high);
        }
        if self.watches_data() {
            self.data_access(linear, bytes.len(), false);
        }
        Ok(())
    }

    /// Stores up to a page of bytes, crossing pages if need be; faults before anything is written.
    pub fn store_bytes(&mut self, linear: u64, bytes: &[u8], mode: u64) -> Result<(), Trap> {
        let mode = unchecked(mode);
        let (first, second) = self.translate_span(linear, bytes.len(), Access::Write, mode)?;
        let cut = match second {
            Some(_) => bytes.len().min(0x1000 - (linear & 0xFFF) as usize),
            None => bytes.len(),
        };
        let (low, high) = bytes.split_at(cut);
        self.write_physical(first, low);
        if let Some(second) = second {
            self.write_physical(second, high);
        }
        if self.watches_data() {
            self.data_access(linear, bytes.len(), true);
        }
        Ok(())
    }

    /// Checks that a load of `bytes` at `linear` would not fault, alignment apart.
    pub fn probe_load(&mut self, linear: u64, bytes: usize) -> Result<(), Trap> {
        let mode = unchecked(self.tlb_mode);
        self.translate_span(linear, bytes, Access::Read, mode).map(drop)
    }

    /// Checks that a store of `bytes` at `linear` would not fault.
    pub fn probe_store(&mut self, linear: u64, bytes: usize) -> Result<(), Trap> {
        let mode = self.check_aligned(linear, bytes, Access::Write, self.tlb_mode)?;
        self.translate_span(linear, bytes, Access::Write, mode).map(drop)
    }

    /// The host address of a run of bytes inside one page, for block operations: none if the page is
    /// not plain RAM for this access (device, code, watched), after raising its faults.
    pub fn span(&mut self, table: Table, linear: u64) -> Result<Option<NonNull<u8>>, Trap> {
        let mode = unchecked(self.tlb_mode);
        let access = if table == Table::Write { Access::Write } else { Access::Read };
        if matches!(self.tlb.find_slow(table, linear, 1, mode), Found::Miss) {
            self.translate_and_fill(linear, access, mode)?;
        }
        Ok(match self.tlb.find_slow(table, linear, 1, mode) {
            // Alignment is checked element by element.
            Found::Fast(_) if self.tlb_mode == MODE_USER_ALIGNED => None,
            Found::Fast(host) => NonNull::new(host as *mut u8),
            _ => None,
        })
    }

    /// Reads guest-physical bytes inside one page: RAM or device.
    pub fn read_physical(&mut self, pa: u64, bytes: &mut [u8]) {
        match self.map.find(pa) {
            // SAFETY: the bytes lie in one page, which lies in the slot; `bytes` is not guest memory.
            Some(slot) => unsafe {
                copy_in(slot.host(pa), bytes);
            },
            None => self.mmio_read(pa, bytes),
        }
    }

    /// Writes guest-physical bytes inside one page: RAM, ROM (the write goes to the device side) or
    /// device.
    pub fn write_physical(&mut self, pa: u64, bytes: &[u8]) {
        let map = self.map.clone();
        match map.find(pa).filter(|slot| slot.writable) {
            Some(slot) => {
                // SAFETY: the bytes lie in one page, which lies in the slot; `bytes` is not guest memory.
                unsafe { copy_out(slot.host(pa), bytes) };
                slot.mark_dirty(pa);
                // The store before the look at the watch: who decodes sets the watch and then reads.
                fence(Ordering::SeqCst);
                if slot.tracker.watched_lines(slot.page(pa)) != 0 {
                    self.wrote_code(pa, bytes.len());
                }
            }
            None => self.mmio_write(pa, bytes),
        }
    }

    /// A store went to a page that holds code: drops the code it overwrote, if any; else, if the page
    /// holds no more code, lets further stores be fast.
    fn wrote_beside_code(&mut self, pa: u64, bytes: usize, linear: u64) {
        fence(Ordering::SeqCst);
        let Some(slot) = self.map.find(pa) else { return };
        let lines = slot.tracker.watched_lines(slot.page(pa));
        if lines == 0 {
            self.tlb.page_holds_no_code(linear, self.tlb_mode);
        } else if lines & WriteTracker::lines_of(pa, pa + bytes as u64 - 1) != 0 {
            self.wrote_code(pa, bytes);
        }
    }
}

/// True if locked accesses of the host may cross cache lines: they are atomic, but a host that detects
/// them slows its program down or ends it (Intel SDM vol. 3A §9.1.2.3; Linux, `split_lock_detect`).
fn split_locks_are_fine() -> bool {
    static FINE: OnceLock<bool> = OnceLock::new();
    *FINE.get_or_init(|| {
        let highest = core::arch::x86_64::__cpuid(0).eax;
        // IA32_CORE_CAPABILITIES, which tells of #AC for split locks, and bus lock detection.
        highest < 7 || {
            let leaf = core::arch::x86_64::__cpuid_count(7, 0);
            leaf.edx >> 30 & 1 == 0 && leaf.ecx >> 24 & 1 == 0
        }
    })
}

/// Replaces what `p` holds by `f` of it as [`Width::atomic_update`] does, at any address: the host's
/// locked instructions need no alignment.
///
/// # Safety
/// `p` is valid for reads and writes of `W::BYTES` bytes, and only accessed atomically or by guest accesses
/// meanwhile.
unsafe fn update_misaligned<W: Width>(p: *mut u8, f: impl Fn(u64) -> u64) -> u64 {
    // SAFETY: the caller vouches for `p`. A torn read is one that the comparison refuses.
    let mut old = unsafe { read_host::<W::Int>(p as u64) }.widen();
    loop {
        let new = f(old);
        let mut now = old;
        // SAFETY: as above; the instruction reads and writes `W::BYTES` bytes.
        unsafe {
            match W::BYTES {
                2 => core::arch::asm!("lock cmpxchg word ptr [{p}], {new:x}", p = in(reg) p,
                    new = in(reg) new, inout("rax") now, options(nostack)),
                4 => core::arch::asm!("lock cmpxchg dword ptr [{p}], {new:e}", p = in(reg) p,
                    new = in(reg) new, inout("rax") now, options(nostack)),
                8 => core::arch::asm!("lock cmpxchg qword ptr [{p}], {new}", p = in(reg) p,
                    new = in(reg) new, inout("rax") now, options(nostack)),
                // Bytes are always aligned.
                _ => return W::atomic_update(p.cast(), f),
            }
        }
        now &= W::MASK;
        if now == old {
            return old;
        }
        old = now;
    }
}

/// The mode to translate with where alignment does not matter.
fn unchecked(mode: u64) -> u64 {
    if mode == MODE_USER_ALIGNED { MODE_USER } else { mode }
}

/// Copies from guest memory in the largest pieces that keep an aligned access whole.
///
/// # Safety
/// `from` is valid for `bytes.len()` reads.
unsafe fn copy_in(from: *const u8, bytes: &mut [u8]) {
    // SAFETY: the caller vouches for `from`; sizes match each arm.
    unsafe {
        match bytes.len() {
            1 => bytes.copy_from_slice(&from.read().to_ne_bytes()),
            2 => bytes.copy_from_slice(&from.cast::<u16>().read_unaligned().to_ne_bytes()),
            4 => bytes.copy_from_slice(&from.cast::<u32>().read_unaligned().to_ne_bytes()),
            8 => bytes.copy_from_slice(&from.cast::<u64>().read_unaligned().to_ne_bytes()),
            n => std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), n),
        }
    }
}

/// Copies to guest memory in the largest pieces that keep an aligned access whole.
///
/// # Safety
/// `to` is valid for `bytes.len()` writes.
unsafe fn copy_out(to: *mut u8, bytes: &[u8]) {
    // SAFETY: the caller vouches for `to`; sizes match each arm.
    unsafe {
        match *bytes {
            [a] => to.write(a),
            [a, b] => {
                to.cast::<[u8; 2]>().cast::<u16>().write_unaligned(u16::from_ne_bytes([a, b]))
            }
            [a, b, c, d] => {
                to.cast::<u32>().write_unaligned(u32::from_ne_bytes([a, b, c, d]));
            }
            [a, b, c, d, e, f, g, h] => {
                to.cast::<u64>().write_unaligned(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmkit_device::memory::{Bytes, GuestAddress};

    use super::*;
    use crate::cpu::{W16, W32, W64};
    use crate::testing::Bench;

    fn add<W: Width>(bench: &mut Bench, at: u64) {
        let before = [0xFF; 16];
        bench.ram.write_slice(&before, GuestAddress(at)).unwrap();
        let old = bench.cpu.update_locked::<W>(at, |old| old.wrapping_add(2)).unwrap();
        assert_eq!(old, W::MASK, "at {at:#x}");
        let mut after = [0; 16];
        bench.ram.read_slice(&mut after, GuestAddress(at)).unwrap();
        let mut want = before;
        want[..W::BYTES as usize].fill(0);
        want[0] = 1;
        assert_eq!(after, want, "at {at:#x}");
    }

    #[test]
    fn a_locked_access_inside_a_page_is_the_hosts() {
        let mut bench = Bench::long();
        for (at, whole) in [(0x5001, true), (0x503D, split_locks_are_fine()), (0x5FFD, false)] {
            let host = bench.cpu.locked(at, 4, |_| ()).unwrap();
            assert_eq!(host.is_some(), whole, "at {at:#x}");
            add::<W16>(&mut bench, at);
            add::<W32>(&mut bench, at);
            add::<W64>(&mut bench, at);
        }
    }
}
