//! The dirty ring of a vCPU: a list of pages that it wrote, which the kernel appends to and this
//! process takes from (Linux, Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING).
//!
//! An entry is the kernel's until its flags say `DIRTY`, this process's until they say `TAKEN`, and
//! the kernel's again from KVM_RESET_DIRTY_RINGS on.

#![allow(unsafe_code, reason = "the ring is memory shared with the kernel")]

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO,
    kvm_dirty_gfn,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmkit_hypervisor::Result;
use vmkit_hypervisor::guest_memory::PAGE_SIZE;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::error::last_os;
use crate::kick::KickTarget;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xC7);

/// Entries of a ring. KVM keeps some 600 of them back, for what the processor logs itself.
pub(crate) const ENTRIES: usize = 4096;
/// Bytes of a ring.
pub(crate) const BYTES: usize = ENTRIES * size_of::<kvm_dirty_gfn>();
/// Flag of an entry that the kernel has filled in.
const DIRTY: u32 = 1;
/// Flag of an entry that this process has taken.
const TAKEN: u32 = 2;

/// The capability by which this KVM has dirty rings, if it has them.
pub(crate) fn capability(kvm: &Kvm) -> Option<u32> {
    let offered =
        |cap: &u32| kvm.check_extension_raw(u64::from(*cap)).unsigned_abs() as usize >= BYTES;
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].into_iter().find(offered)
}

/// Has KVM use the entries again that were taken, and watch their pages again.
pub(crate) fn reset(vm: &VmFd) -> Result<()> {
    // SAFETY: the request takes no argument.
    if unsafe { ioctl(&vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS()) } < 0 {
        return Err(last_os("reset the dirty rings"));
    }
    Ok(())
}

/// A page that was written: the number of its memory slot, and its own within it.
pub(crate) struct Written {
    pub(crate) slot: u32,
    pub(crate) page: u64,
}

/// The ring of one vCPU. Its mapping keeps KVM's side of the vCPU alive.
pub(crate) struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    next: usize,
    vcpu: Arc<KickTarget>,
}

// SAFETY: the mapping is plain memory, tied to no thread, and is reached through `&mut` only.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of `fd`, of a VM that has rings of [`BYTES`].
    pub(crate) fn of(fd: &VcpuFd, vcpu: Arc<KickTarget>) -> Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        // SAFETY: a new mapping at an address of the kernel's choice harms nothing that exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(address.cast()) {
            Some(entries) if address != libc::MAP_FAILED => Ok(Self { entries, next: 0, vcpu }),
            _ => Err(last_os("map a dirty ring")),
        }
    }

    /// Has the vCPU leave the guest, if it is inside: the processor may hold pages that it has logged
    /// and KVM has not seen.
    pub(crate) fn flush(&self) {
        self.vcpu.wait_outside();
    }

    /// Takes an entry, if there is one.
    pub(crate) fn take(&mut self) -> Option<Written> {
        // SAFETY: `next` is below ENTRIES, as many as the mapping holds.
        let entry = unsafe { self.entries.add(self.next) }.as_ptr();
        // SAFETY: the kernel and this process access the flags atomically while they share the entry;
        // AtomicU32 has the layout of u32, and the mapping outlives the reference.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        if flags.load(Ordering::Acquire) & (DIRTY | TAKEN) != DIRTY {
            return None;
        }
        // SAFETY: the entry is this process's, so the kernel does not write to it.
        let (slot, page) = unsafe { ((&raw const (*entry).slot).read(), (*entry).offset) };
        flags.store(TAKEN, Ordering::Release);
        self.next = (self.next + 1) % ENTRIES;
        Some(Written { slot, page })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this address and length, and no reference to it is left.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), BYTES) };
    }
}
