//! The `kvm_run` page of a vCPU, which the kernel and this process share.
//!
//! Read and written through raw pointers only: a kick may store to `immediate_exit` at any time, so
//! no reference to the whole structure may exist.

#![allow(unsafe_code, reason = "the page is memory shared with the kernel, and holds unions")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{KVM_EXIT_IO_OUT, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run};
use kvm_ioctls::VcpuFd;

use crate::KickSignal;
use crate::kick::KickTarget;

/// A borrowed view of the page; valid as long as the `VcpuFd` it came from, which owns the mapping.
pub(super) struct RunPage {
    page: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the page is plain memory, tied to no thread; the vCPU that owns it is used by one thread
// at a time (`&mut`), and what another thread may touch (`immediate_exit`) is an atomic.
unsafe impl Send for RunPage {}

/// A port exit: `count` elements, one at least, of `size` bytes at `data`.
pub(super) struct PortExit {
    pub(super) write: bool,
    pub(super) port: u16,
    pub(super) size: usize,
    pub(super) count: usize,
    data: NonNull<u8>,
}

impl PortExit {
    /// Element number `index`, in place.
    #[inline]
    pub(super) fn element(&mut self, index: usize) -> &mut [u8] {
        debug_assert!(index < self.count);
        // SAFETY: `port_exit` checked that `size * count` bytes from `data` are inside the mapping;
        // the kernel does not touch them until the next KVM_RUN, and `&mut self` is the only way to
        // them here.
        unsafe {
            std::slice::from_raw_parts_mut(self.data.add(index * self.size).as_ptr(), self.size)
        }
    }
}

/// An MMIO exit.
pub(super) struct MmioExit {
    pub(super) write: bool,
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) data: [u8; 8],
}

/// What KVM says about an internal error.
pub(super) struct InternalError {
    pub(super) suberror: u32,
    /// The instruction's bytes, if KVM gave them.
    pub(super) bytes: Option<([u8; 15], u8)>,
    /// The first word of its data, for messages.
    pub(super) data: u64,
}

impl RunPage {
    /// The page of `fd`, whose mapping is `len` bytes long.
    pub(super) fn of(fd: &mut VcpuFd, len: usize) -> Self {
        Self { page: NonNull::from(fd.get_kvm_run()), len }
    }

    /// What kicks of this page's vCPU work on. To be closed before the vCPU's `VcpuFd` is dropped.
    pub(super) fn kick_target(&self, signal: KickSignal) -> Arc<KickTarget> {
        // SAFETY: the address is valid until the `VcpuFd` unmaps the page, and the vCPU, which is the
        // only caller and owns both, closes the target first.
        unsafe { KickTarget::new(self.immediate_exit(), signal) }
    }

    /// Where a kick stores.
    fn immediate_exit(&self) -> NonNull<AtomicU8> {
        // SAFETY: the field is inside the mapping, so its address is in bounds and not null; AtomicU8
        // has the layout of u8.
        unsafe { NonNull::new_unchecked((&raw mut (*self.page.as_ptr()).immediate_exit).cast()) }
    }

    /// Has the next KVM_RUN complete a pending access and return, or lets it run.
    pub(super) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the mapping lives as long as `self`, and all accesses to this byte are atomic.
        unsafe { self.immediate_exit().as_ref() }.store(u8::from(on), Ordering::SeqCst);
    }

    /// Lets the next KVM_RUN run; true if it would not have.
    pub(super) fn take_immediate_exit(&self) -> bool {
        // SAFETY: as above.
        unsafe { self.immediate_exit().as_ref() }.swap(0, Ordering::SeqCst) != 0
    }

    /// Why KVM_RUN returned.
    #[inline]
    pub(super) fn exit_reason(&self) -> u32 {
        // SAFETY: inside the mapping; the kernel wrote it before KVM_RUN returned.
        unsafe { (&raw const (*self.page.as_ptr()).exit_reason).read() }
    }

    /// Has KVM return as soon as the guest would take an external interrupt, or not.
    pub(super) fn request_interrupt_window(&self, on: bool) {
        // SAFETY: the field is inside the mapping, and the kernel reads it during KVM_RUN only.
        unsafe { (&raw mut (*self.page.as_ptr()).request_interrupt_window).write(u8::from(on)) }
    }

    /// Sets the CR8 that a vCPU without a local APIC enters the guest with.
    pub(super) fn set_cr8(&self, value: u64) {
        // SAFETY: the field is inside the mapping, and the kernel uses it during KVM_RUN only.
        unsafe { (&raw mut (*self.page.as_ptr()).cr8).write(value) }
    }

    /// True if the guest would have taken an external interrupt when KVM_RUN returned.
    pub(super) fn takes_interrupt(&self) -> bool {
        // SAFETY: inside the mapping; the kernel wrote it before KVM_RUN returned.
        unsafe { (&raw const (*self.page.as_ptr()).ready_for_interrupt_injection).read() != 0 }
    }

    /// The vector whose service a local APIC has ended.
    pub(super) fn eoi_vector(&self) -> u8 {
        // SAFETY: as in `port_exit`.
        unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.eoi).read() }.vector
    }

    /// The port exit, if the kernel's description of it is inside the mapping.
    #[inline]
    pub(super) fn port_exit(&self) -> Option<PortExit> {
        // SAFETY: inside the mapping; called when `exit_reason` says that this is the union's live
        // member, and any bit pattern is valid for it.
        let io = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.io).read() };
        let (size, count) = (usize::from(io.size), io.count as usize);
        let start = usize::try_from(io.data_offset).ok()?;
        let end = size.checked_mul(count)?.checked_add(start)?;
        if size == 0 || size > 8 || count == 0 || end > self.len {
            return None;
        }
        Some(PortExit {
            write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
            port: io.port,
            size,
            count,
            // SAFETY: `start` is inside the mapping, as checked above.
            data: unsafe { self.page.cast::<u8>().add(start) },
        })
    }

    /// The MMIO exit.
    #[inline]
    pub(super) fn mmio_exit(&self) -> MmioExit {
        // SAFETY: as in `port_exit`.
        let mmio = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.mmio).read() };
        MmioExit {
            write: mmio.is_write != 0,
            address: mmio.phys_addr,
            len: (mmio.len as usize).min(8),
            data: mmio.data,
        }
    }

    /// The answer to an MMIO read.
    #[inline]
    pub(super) fn answer_mmio(&self, data: [u8; 8]) {
        // SAFETY: as in `port_exit`; writing a byte array to a field that is one.
        unsafe { (&raw mut (*self.page.as_ptr()).__bindgen_anon_1.mmio.data).write(data) }
    }

    /// The internal error.
    pub(super) fn internal_error(&self) -> InternalError {
        // SAFETY: as in `port_exit`; both members describe this exit and start with the same fields.
        let (error, failure) = unsafe {
            let union = &raw const (*self.page.as_ptr()).__bindgen_anon_1;
            ((&raw const (*union).internal).read(), (&raw const (*union).emulation_failure).read())
        };
        // `flags` is the first of `ndata` words, the bytes are the two after it.
        let given = failure.ndata >= 3
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        // SAFETY: the union has one member, of plain bytes.
        let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        InternalError {
            suberror: error.suberror,
            bytes: given.then_some((insn.insn_bytes, insn.insn_size.min(15))),
            data: error.data[0],
        }
    }

    /// The hardware's reason of a failed entry.
    pub(super) fn entry_failure(&self) -> u64 {
        // SAFETY: as in `port_exit`.
        let fail = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.fail_entry).read() };
        fail.hardware_entry_failure_reason
    }
}
