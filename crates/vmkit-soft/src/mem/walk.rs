//! Page walks (Intel SDM vol. 3A chapter 5): linear address to guest-physical address, with
//! permissions, accessed and dirty bits, and page faults.

#![allow(unsafe_code, reason = "page tables are read and marked in guest memory, atomically")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmkit_hypervisor::x86::{Cr0, Cr4, Efer};

use super::tlb::{META_GLOBAL, META_LARGE};
use super::{MODE_SUPERVISOR, MODE_USER};
use crate::cpu::Cpu;
use crate::cpu::trap::{self, Trap, TrapKind};

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Translation {
    /// Guest-physical address.
    pub pa: u64,
    /// `META_GLOBAL` and `META_LARGE` as they apply.
    pub meta: u64,
}

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 2;
const FAULT_USER: u32 = 4;
const FAULT_RESERVED: u32 = 8;
const FAULT_FETCH: u32 = 16;

/// Walks of one translation whose entries another vCPU changes each time: after that many it faults.
const MAX_WALKS: u32 = 64;

/// The entries a walk went through, to be marked accessed once it is known to succeed.
struct Path {
    entries: [(u64, u64); 4],
    len: usize,
    /// Entries of four bytes (32-bit paging).
    narrow: bool,
}

impl Cpu {
    fn fault(&mut self, linear: u64, access: Access, mode: u64, code: u32) -> Trap {
        let fetch_known = self.cr4().contains(Cr4::SMEP)
            || self.cr4().contains(Cr4::PAE) && self.efer().contains(Efer::NXE);
        let error = code
            | if access == Access::Write { FAULT_WRITE } else { 0 }
            | if mode == MODE_USER { FAULT_USER } else { 0 }
            | if access == Access::Fetch && fetch_known { FAULT_FETCH } else { 0 };
        self.control.cr2 = linear;
        self.raise_with(trap::PF, error)
    }

    /// Translates `linear` for `access` in `mode`, raising #PF where the tables forbid it.
    pub fn translate(
        &mut self,
        linear: u64,
        access: Access,
        mode: u64,
    ) -> Result<Translation, Trap> {
        if !self.cr0().contains(Cr0::PG) {
            return Ok(Translation { pa: linear & 0xFFFF_FFFF, meta: 0 });
        }
        for _ in 0..MAX_WALKS {
            if let Some(translation) = self.walk(linear, access, mode)? {
                return Ok(translation);
            }
        }
        // A guest that does this to itself may have a page fault for it, and may not hold this thread.
        Err(self.fault(linear, access, mode, FAULT_PRESENT))
    }

    /// Walks once; none if an entry changed before it could be marked.
    fn walk(
        &mut self,
        linear: u64,
        access: Access,
        mode: u64,
    ) -> Result<Option<Translation>, Trap> {
        if self.efer().contains(Efer::LMA) {
            if !canonical(linear) {
                self.trap = TrapKind::NonCanonical;
                return Err(Trap);
            }
            let top = self.control.cr3 & self.physical_mask & !0xFFF;
            return self.walk_wide(linear, access, mode, top, 4);
        }
        if self.cr4().contains(Cr4::PAE) {
            let pdpte = self.pdptes[(linear >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return Err(self.fault(linear, access, mode, 0));
            }
            return self.walk_wide(linear, access, mode, pdpte & self.physical_mask & !0xFFF, 2);
        }
        self.walk_narrow(linear, access, mode)
    }

    /// Eight-byte entries: `levels` of them, from the table at `table`.
    fn walk_wide(
        &mut self,
        linear: u64,
        access: Access,
        mode: u64,
        mut table: u64,
        levels: u32,
    ) -> Result<Option<Translation>, Trap> {
        let mut path = Path { entries: [(0, 0); 4], len: 0, narrow: false };
        let (mut rights, mut no_execute) = (RW | US, false);
        // The reserved bits of every entry: address bits past the width, and NX while it is off.
        let reserved = !self.physical_mask & 0x000F_FFFF_FFFF_F000
            | if self.efer().contains(Efer::NXE) { 0 } else { NX };
        // Without long mode, bits 62:52 are reserved too (PAE paging).
        let reserved = if levels == 2 { reserved | 0x7FF0_0000_0000_0000 } else { reserved };
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let at = table + (linear >> shift & 0x1FF) * 8;
            let entry = self.table_entry(at);
            if entry & P == 0 {
                return Err(self.fault(linear, access, mode, 0));
            }
            let large = level > 0 && entry & PS != 0;
            let bad_size = large && (level == 3 || level == 2 && !self.gbpages);
            let low_bits = if large { ((1 << shift) - 1) & 0x000F_FFFF_FFFF_E000 } else { 0 };
            if entry & (reserved | low_bits) != 0 || bad_size {
                return Err(self.fault(linear, access, mode, FAULT_PRESENT | FAULT_RESERVED));
            }
            rights &= entry;
            no_execute |= entry & NX != 0;
            path.entries[path.len] = (at, entry);
            path.len += 1;
            if level == 0 || large {
                let inside = (1 << shift) - 1;
                let pa = entry & self.physical_mask & !0xFFF & !inside | linear & inside;
                self.check(linear, access, mode, rights, no_execute)?;
                return Ok(self.finish(&path, access, pa, entry, large));
            }
            table = entry & self.physical_mask & !0xFFF;
        }
        // The loop always returns at level 0.
        Err(self.fault(linear, access, mode, 0))
    }

    /// Four-byte entries: 32-bit paging.
    fn walk_narrow(
        &mut self,
        linear: u64,
        access: Access,
        mode: u64,
    ) -> Result<Option<Translation>, Trap> {
        let mut path = Path { entries: [(0, 0); 4], len: 0, narrow: true };
        let directory = self.control.cr3 & 0xFFFF_F000;
        let at = directory + (linear >> 22 & 0x3FF) * 4;
        let pde = self.table_entry_narrow(at);
        if pde & P == 0 {
            return Err(self.fault(linear, access, mode, 0));
        }
        path.entries[0] = (at, pde);
        path.len = 1;
        if pde & PS != 0 && self.cr4().contains(Cr4::PSE) {
            // PSE-36: bits 20:13 are address bits 39:32, bit 21 is reserved.
            if pde & 1 << 21 != 0 {
                return Err(self.fault(linear, access, mode, FAULT_PRESENT | FAULT_RESERVED));
            }
            self.check(linear, access, mode, pde & (RW | US), false)?;
            let high = (pde >> 13 & 0xFF) << 32;
            let pa = (high | pde & 0xFFC0_0000 | linear & 0x3F_FFFF) & self.physical_mask;
            return Ok(self.finish(&path, access, pa, pde, true));
        }
        let at = (pde & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4;
        let pte = self.table_entry_narrow(at);
        if pte & P == 0 {
            return Err(self.fault(linear, access, mode, 0));
        }
        path.entries[1] = (at, pte);
        path.len = 2;
        self.check(linear, access, mode, pde & pte & (RW | US), false)?;
        Ok(self.finish(&path, access, pte & 0xFFFF_F000 | linear & 0xFFF, pte, false))
    }

    fn check(
        &mut self,
        linear: u64,
        access: Access,
        mode: u64,
        rights: u64,
        no_execute: bool,
    ) -> Result<(), Trap> {
        let user_page = rights & US != 0;
        let write_ok = rights & RW != 0;
        let allowed = if mode == MODE_USER {
            user_page
                && (access != Access::Write || write_ok)
                && !(access == Access::Fetch && no_execute)
        } else {
            match access {
                Access::Fetch => !(no_execute || user_page && self.cr4().contains(Cr4::SMEP)),
                _ if user_page && mode == MODE_SUPERVISOR && self.cr4().contains(Cr4::SMAP) => {
                    false
                }
                Access::Read => true,
                Access::Write => write_ok || !self.cr0().contains(Cr0::WP),
            }
        };
        if allowed { Ok(()) } else { Err(self.fault(linear, access, mode, FAULT_PRESENT)) }
    }

    /// Marks the path accessed (and the last entry dirty) and makes the translation; none if an entry is
    /// not what the walk found any more.
    fn finish(
        &mut self,
        path: &Path,
        access: Access,
        pa: u64,
        last: u64,
        large: bool,
    ) -> Option<Translation> {
        for (i, &(at, entry)) in path.entries[..path.len].iter().enumerate() {
            let mut want = A;
            if i + 1 == path.len && access == Access::Write {
                want |= D;
            }
            if entry & want != want && !self.mark_entry(at, entry, want, path.narrow) {
                return None;
            }
        }
        let global = last & G != 0 && self.cr4().contains(Cr4::PGE);
        let meta = if global { META_GLOBAL } else { 0 } | if large { META_LARGE } else { 0 };
        Some(Translation { pa, meta })
    }

    fn table_entry(&self, at: u64) -> u64 {
        let Some(slot) = self.map.find(at) else { return u64::MAX };
        // SAFETY: `at` is 8-byte aligned and inside the slot, whose length is a multiple of 4096.
        let cell = unsafe { AtomicU64::from_ptr(slot.host(at).cast()) };
        cell.load(Ordering::Relaxed)
    }

    fn table_entry_narrow(&self, at: u64) -> u64 {
        let Some(slot) = self.map.find(at) else { return 0xFFFF_FFFF };
        // SAFETY: `at` is 4-byte aligned and inside the slot, whose length is a multiple of 4096.
        let cell = unsafe { AtomicU32::from_ptr(slot.host(at).cast()) };
        u64::from(cell.load(Ordering::Relaxed))
    }

    /// Sets `bits` in an entry that is still `entry`; false if it is not.
    fn mark_entry(&mut self, at: u64, entry: u64, bits: u64, narrow: bool) -> bool {
        let map = self.map.clone();
        let Some(slot) = map.find(at).filter(|slot| slot.writable) else { return true };
        let new = entry | bits;
        let (success, failure) = (Ordering::SeqCst, Ordering::Relaxed);
        let marked = if narrow {
            // SAFETY: as in `table_entry_narrow`.
            unsafe { AtomicU32::from_ptr(slot.host(at).cast()) }
                .compare_exchange(entry as u32, new as u32, success, failure)
                .is_ok()
        } else {
            // SAFETY: as in `table_entry`.
            unsafe { AtomicU64::from_ptr(slot.host(at).cast()) }
                .compare_exchange(entry, new, success, failure)
                .is_ok()
        };
        slot.mark_dirty(at);
        if marked && slot.tracker.watched_lines(slot.page(at)) != 0 {
            self.wrote_code(at, if narrow { 4 } else { 8 });
        }
        marked
    }

    /// Loads the four page-directory-pointer entries that PAE paging keeps inside the processor
    /// (Intel SDM vol. 3A §5.4.1); false if one has a reserved bit set.
    pub fn load_pdptes(&mut self) -> bool {
        let base = self.control.cr3 & 0xFFFF_FFE0;
        let mut entries = [0; 4];
        for (i, entry) in entries.iter_mut().enumerate() {
            *entry = self.table_entry(base + i as u64 * 8);
            let reserved = !self.physical_mask & !0xFFF | 0x1E6;
            if *entry & P != 0 && *entry & reserved != 0 {
                return false;
            }
        }
        self.pdptes = entries;
        true
    }
}

/// True if bits 63:47 of `linear` are all alike.
#[inline(always)]
pub(crate) fn canonical(linear: u64) -> bool {
    (linear as i64) << 16 >> 16 == linear as i64
}

#[cfg(test)]
mod tests {
    use vmkit_device::memory::{Bytes, GuestAddress};

    use super::*;
    use crate::cpu::{RAX, RCX};
    use crate::testing::Bench;

    #[test]
    fn an_entry_that_is_another_by_now_is_not_marked() {
        let mut bench = Bench::long();
        let at = GuestAddress(0x5000);
        for narrow in [false, true] {
            bench.ram.write_obj(0_u64, at).unwrap();
            assert!(!bench.cpu.mark_entry(at.0, 0x7007, A | D, narrow));
            assert_eq!(bench.ram.read_obj::<u64>(at).unwrap(), 0);
            bench.ram.write_obj(0x7007_u64, at).unwrap();
            assert!(bench.cpu.mark_entry(at.0, 0x7007, A | D, narrow));
            assert_eq!(bench.ram.read_obj::<u64>(at).unwrap(), 0x7067);
        }
    }

    #[test]
    fn a_mark_in_what_is_code_too_is_a_store_to_it() {
        let mut bench = Bench::long();
        bench.ram.write_obj(0x9007_u64, GuestAddress(0x2008)).unwrap();
        bench.ram.write_obj(0xA007_u64, GuestAddress(0x9000)).unwrap();
        // add eax, ecx; sub al, 0; add [rax], al; add [rax], al; hlt
        let entry = 0x2C_C103_u64;
        bench.ram.write_obj(0xF4_u64, GuestAddress(0xA008)).unwrap();
        bench.load(0xA000, &entry.to_le_bytes());
        (bench.cpu.regs[RAX], bench.cpu.regs[RCX]) = (0x9_0000, 0x100);
        bench.go();
        assert_eq!(bench.cpu.regs[RAX], 0x9_0100);
        // Accessed, it begins with and eax, ecx.
        bench.cpu.load::<u8>(0x4000_0000).unwrap();
        assert_eq!(bench.ram.read_obj::<u8>(GuestAddress(0xA000)).unwrap(), 0x23);
        bench.cpu.halted = false;
        bench.cpu.rip = 0xA000;
        bench.cpu.regs[RCX] = 0xF_FF00;
        bench.go();
        assert_eq!(bench.cpu.regs[RAX], 0x9_0100);
    }
}
