//! Memory slots. Each owns the region it shows, so that no guest can reach memory that has gone.

#![allow(unsafe_code, reason = "KVM is given host addresses")]

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVMIO, kvm_clear_dirty_log, kvm_dirty_log,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmkit_hypervisor::guest_memory::{
    DirtyBitmap, GuestAddress, GuestMemoryRegion, MemoryRegion, PAGE_SIZE,
};
use vmkit_hypervisor::{HypervisorError, MapAccess, MapId, Result};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use crate::error::{host, last_os};
use crate::kick::KickTarget;
use crate::ring::{self, Ring, Written};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xC0, kvm_clear_dirty_log);

/// KVM clears at most this many pages of a log at once, in multiples of 64.
const CLEAR_AT_ONCE: u64 = 1 << 30;

struct Slot {
    id: MapId,
    /// KVM's number. Used again once the slot is gone, which an ID is not.
    number: u32,
    start: u64,
    region: Arc<MemoryRegion>,
    access: MapAccess,
    /// Pages written, one bit each, if the slot tracks: where the kernel's bitmap goes, or where what
    /// the rings told is kept.
    log: Vec<u64>,
}

impl Slot {
    fn len(&self) -> u64 {
        self.region.len()
    }
}

#[derive(Default)]
struct Table {
    /// Go before the slots: they keep KVM's side of the vCPUs alive.
    rings: Vec<Ring>,
    slots: Vec<Slot>,
    next_id: u32,
    /// KVM wrote over a ring's entries once.
    overrun: bool,
}

/// The memory slots of a partition.
pub(crate) struct Memory {
    table: Mutex<Table>,
    limit: usize,
    dirty_log: DirtyLogKind,
}

/// How KVM tells of written pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DirtyLogKind {
    /// A bitmap, which reading clears.
    Bitmap,
    /// A bitmap whose bits stay until they are cleared by hand: KVM then write-protects only what was
    /// dirty.
    ManualBitmap,
    /// A ring of each vCPU.
    Rings,
}

impl Memory {
    /// No slots, at most `limit` of them.
    pub(crate) fn new(limit: usize, dirty_log: DirtyLogKind) -> Self {
        Self { table: Mutex::default(), limit, dirty_log }
    }

    /// True if vCPUs have dirty rings.
    #[inline]
    pub(crate) fn has_rings(&self) -> bool {
        self.dirty_log == DirtyLogKind::Rings
    }

    /// A vCPU was made: its ring, if it has one, counts from now on.
    pub(crate) fn add_ring(&self, fd: &VcpuFd, vcpu: &Arc<KickTarget>) -> Result<()> {
        if self.has_rings() {
            let ring = Ring::of(fd, vcpu.clone())?;
            self.lock().rings.push(ring);
        }
        Ok(())
    }

    /// Takes what is in the rings, so that vCPUs can go on whose rings are full.
    pub(crate) fn empty_rings(&self, vm: &VmFd) -> Result<()> {
        self.lock().empty_rings(vm)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn map(
        &self,
        vm: &VmFd,
        at: GuestAddress,
        region: Arc<MemoryRegion>,
        access: MapAccess,
    ) -> Result<MapId> {
        let (start, len) = (at.0, region.len());
        let refuse = |reason| Err(HypervisorError::Mapping { start, len, reason });
        let host_address = region.as_ptr() as u64;
        if len == 0 || !(start | len | host_address).is_multiple_of(PAGE_SIZE) {
            return refuse("empty or not page-aligned");
        }
        let Some(end) = start.checked_add(len) else { return refuse("it wraps") };
        let mut table = self.lock();
        if table.slots.iter().any(|slot| slot.start < end && start < slot.start + slot.len()) {
            return refuse("it overlaps another mapping");
        }
        if table.slots.len() >= self.limit {
            return refuse("KVM has no memory slot left");
        }
        // KVM's slot number: the lowest one free, so that it stays below KVM's limit.
        let mut number = 0;
        while table.slots.iter().any(|slot| slot.number == number) {
            number += 1;
        }
        let mut flags = 0;
        if !access.contains(MapAccess::WRITE) {
            flags |= KVM_MEM_READONLY;
        }
        let mut log = Vec::new();
        if access.contains(MapAccess::TRACK_DIRTY) {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
            log = vec![0; len.div_ceil(PAGE_SIZE * 64) as usize];
        }
        set(vm, number, flags, start, len, host_address)
            .map_err(host("show memory to the guest"))?;
        let id = MapId(table.next_id);
        table.next_id = table.next_id.wrapping_add(1);
        table.slots.push(Slot { id, number, start, region, access, log });
        Ok(id)
    }

    pub(crate) fn unmap(&self, vm: &VmFd, id: MapId) -> Result<()> {
        let mut table = self.lock();
        let Some(index) = table.slots.iter().position(|slot| slot.id == id) else {
            return Err(unknown());
        };
        let slot = &table.slots[index];
        // KVM returns when no vCPU can reach the slot any more.
        set(vm, slot.number, 0, slot.start, 0, slot.region.as_ptr() as u64)
            .map_err(host("take memory from the guest"))?;
        table.slots.swap_remove(index);
        // What the rings say of its number must not be taken for its successor's.
        if let Err(error) = table.empty_rings(vm) {
            log::error!("after memory was taken away: {error}");
        }
        Ok(())
    }

    /// KVM may count a page as written when the guest first reads it, because it maps it writable
    /// then; from the first call on it counts writes only.
    pub(crate) fn take_dirty(&self, vm: &VmFd, id: MapId, into: &mut DirtyBitmap) -> Result<()> {
        let mut table = self.lock();
        let Some(slot) = table.slots.iter_mut().find(|slot| slot.id == id) else {
            return Err(unknown());
        };
        let (start, len) = (slot.start, slot.len());
        if !slot.access.contains(MapAccess::TRACK_DIRTY) {
            return Err(HypervisorError::Mapping {
                start,
                len,
                reason: "it does not track writes",
            });
        }
        if self.dirty_log == DirtyLogKind::Rings {
            let index = table.slots.iter().position(|slot| slot.id == id);
            table.rings.iter().for_each(Ring::flush);
            table.empty_rings(vm)?;
            if let Some(slot) = index.and_then(|index| table.slots.get_mut(index)) {
                into.merge(&slot.log);
                slot.log.fill(0);
            }
            return Ok(());
        }
        let mut request = kvm_dirty_log { slot: slot.number, ..kvm_dirty_log::default() };
        request.__bindgen_anon_1.dirty_bitmap = slot.log.as_mut_ptr().cast();
        // SAFETY: `log` has one bit for each page of the slot, rounded up to 64, which is what the
        // kernel writes; it cannot move, the lock is held.
        if unsafe { ioctl_with_mut_ref(vm, KVM_GET_DIRTY_LOG(), &mut request) } != 0 {
            return Err(last_os("read the dirty log"));
        }
        if self.dirty_log == DirtyLogKind::ManualBitmap {
            clear(vm, slot.number, len, &mut slot.log)?;
        }
        into.merge(&slot.log);
        Ok(())
    }

    /// Reads the byte at guest-physical `address`; false if nothing is mapped there.
    pub(crate) fn read_byte(&self, address: u64, into: &mut u8) -> bool {
        use vmkit_hypervisor::guest_memory::{Bytes, MemoryRegionAddress};
        let table = self.lock();
        let found = table.slots.iter().find_map(|slot| {
            let offset = address.checked_sub(slot.start)?;
            (offset < slot.len()).then_some((slot, offset))
        });
        found.is_some_and(|(slot, offset)| {
            slot.region.read_obj(MemoryRegionAddress(offset)).map(|byte| *into = byte).is_ok()
        })
    }
}

impl Table {
    /// Notes the pages that the rings tell of, and gives KVM the entries back. Rings may be filled at
    /// the same time, but no more is taken than they hold: an entry is free only after the reset.
    fn empty_rings(&mut self, vm: &VmFd) -> Result<()> {
        let mut taken = false;
        for ring in &mut self.rings {
            let mut count = 0;
            while let Some(Written { slot, page }) = ring.take() {
                taken = true;
                count += 1;
                let found = self.slots.iter_mut().find(|known| known.number == slot);
                let word = found.and_then(|slot| slot.log.get_mut((page / 64) as usize));
                if let Some(word) = word {
                    *word |= 1 << (page % 64);
                }
            }
            // KVM stops a vCPU before its ring is full. One that runs guests in its instruction emulator
            // was seen not to, and to write over entries.
            self.overrun |= count >= ring::ENTRIES;
        }
        if taken {
            ring::reset(vm)?;
        }
        // From then on no log of this VM is whole.
        if self.overrun {
            let source = std::io::Error::other("KVM overran it: written pages are not known");
            return Err(HypervisorError::Host { what: "read a dirty ring", source });
        }
        Ok(())
    }
}

fn unknown() -> HypervisorError {
    HypervisorError::Mapping { start: 0, len: 0, reason: "there is no such mapping" }
}

fn set(
    vm: &VmFd,
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
) -> std::result::Result<(), vmm_sys_util::errno::Error> {
    let region =
        kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
    // SAFETY: the address and length are those of a `MemoryRegion`'s mapping, which never moves and
    // which the slot keeps alive for as long as KVM knows of it.
    unsafe { vm.set_user_memory_region(region) }
}

/// Forgets the pages in `log`, which covers `len` bytes of slot `slot`.
fn clear(vm: &VmFd, slot: u32, len: u64, log: &mut [u64]) -> Result<()> {
    let pages = len / PAGE_SIZE;
    let mut first = 0;
    while first < pages {
        let count = (pages - first).min(CLEAR_AT_ONCE);
        let mut request = kvm_clear_dirty_log {
            slot,
            num_pages: count as u32,
            first_page: first,
            ..kvm_clear_dirty_log::default()
        };
        request.__bindgen_anon_1.dirty_bitmap = log[(first / 64) as usize..].as_mut_ptr().cast();
        // SAFETY: the kernel reads one bit for each of `count` pages, rounded up to 64, from the word
        // of page `first` on; `log` covers them.
        if unsafe { ioctl_with_ref(&vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG(), &request) } < 0 {
            return Err(last_os("clear the dirty log"));
        }
        first += count;
    }
    Ok(())
}
