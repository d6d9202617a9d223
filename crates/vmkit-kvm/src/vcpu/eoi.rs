//! EOIs that KVM has not told of when a kick ends a run.
//!
//! With split controllers the guest's EOI of a level-triggered interrupt becomes an exit. KVM notes it
//! as a request, and makes the exit when it is about to enter the guest again; a signal that comes in
//! between has KVM_RUN return without it. No ioctl shows the request, so a state taken then would hold
//! a pin that waits for an EOI which nobody sends.
//!
//! `immediate_exit` does not help: it ends KVM_RUN before requests are looked at. A pending signal
//! ends it after that and before the guest runs. So one is made pending: blocked in this thread, but
//! for the time inside KVM_RUN (Linux, Documentation/virt/kvm/api.rst, KVM_SET_SIGNAL_MASK).

#![allow(unsafe_code, reason = "signals, and an ioctl that kvm-ioctls does not wrap")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;

use libc::{c_int, sigset_t};
use vmkit_hypervisor::{HypervisorError, Result, VcpuIo, VmExit};

use super::KvmVcpu;
use super::run::Next;
use crate::split::Split;

/// `_IOW(KVMIO, 0x8B, struct kvm_signal_mask)`.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_AE8B;
/// Bytes of the kernel's signal set, which the C library's begins with.
const KERNEL_SET: usize = 8;

/// `struct kvm_signal_mask` and the set that follows it.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; KERNEL_SET],
}

impl KvmVcpu {
    /// A kick ends the run: has KVM tell of EOIs first, if a pin waits for one.
    #[cold]
    pub(super) fn finish_eois(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit> {
        if !self.partition.split.as_ref().is_some_and(Split::awaits_eoi) {
            return Ok(VmExit::Kicked);
        }
        self.page.request_interrupt_window(false);
        let held = HeldSignal::new(self.fd.as_raw_fd(), self.kick.signal().number())
            .map_err(|source| HypervisorError::Host { what: "hold the kick signal", source })?;
        let exit = self.until_signal(io)?;
        drop(held);
        // Kicks up to now are this run's. In this order, as in the run loop.
        self.page.set_immediate_exit(false);
        self.kick.notice_nudges();
        self.kick.take();
        Ok(exit)
    }

    /// Has KVM do what it does before it enters the guest, where a signal is pending.
    fn until_signal(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit> {
        loop {
            match self.enter_kernel::<false>() {
                0 => match self.dispatch::<false>(io)? {
                    Next::Go => {}
                    Next::Stop => return self.complete_access(io),
                    Next::Exit(exit) => return Ok(exit),
                },
                libc::EINTR => {
                    // Another kick or nudge may have ended it too early.
                    if !self.page.take_immediate_exit() {
                        return Ok(VmExit::Kicked);
                    }
                }
                libc::EAGAIN => {}
                errno => return Err(self.refused(errno)),
            }
        }
    }
}

/// A signal that is pending in this thread, and seen by one vCPU's KVM_RUN only. Dropped, it is
/// delivered.
struct HeldSignal {
    vcpu: RawFd,
    /// The thread's mask before.
    mask: sigset_t,
}

impl HeldSignal {
    fn new(vcpu: RawFd, signal: c_int) -> io::Result<Self> {
        let mut set = MaybeUninit::<sigset_t>::zeroed();
        let mut mask = MaybeUninit::<sigset_t>::zeroed();
        // SAFETY: sigemptyset initialises the set it is given; the calls after it read it, and the
        // last fills `mask`.
        let outcome = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), signal);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), mask.as_mut_ptr())
        };
        if outcome != 0 {
            return Err(io::Error::from_raw_os_error(outcome));
        }
        // SAFETY: filled by the successful call above.
        let held = Self { vcpu, mask: unsafe { mask.assume_init() } };
        // From here on, what fails is undone when `held` is dropped.
        let mut inside = SignalMask { len: KERNEL_SET as u32, set: [0; KERNEL_SET] };
        // SAFETY: a signal set is plain bytes, and longer than the kernel's part at its beginning.
        unsafe {
            ptr::copy_nonoverlapping(
                (&raw const held.mask).cast(),
                inside.set.as_mut_ptr(),
                KERNEL_SET,
            );
        }
        // SAFETY: the argument is what the request reads: a length, and a set of that length.
        if unsafe { libc::ioctl(vcpu, KVM_SET_SIGNAL_MASK, &raw const inside) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the calling thread exists; its action for the signal is not the default, which is
        // seen to when a vCPU is made.
        let outcome = unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
        if outcome != 0 {
            return Err(io::Error::from_raw_os_error(outcome));
        }
        Ok(held)
    }
}

impl Drop for HeldSignal {
    fn drop(&mut self) {
        // SAFETY: no argument means that KVM_RUN leaves the thread's mask alone, as before.
        if unsafe { libc::ioctl(self.vcpu, KVM_SET_SIGNAL_MASK, ptr::null::<SignalMask>()) } < 0 {
            log::error!("the kick signal's mask stays: {}", io::Error::last_os_error());
        }
        // SAFETY: the set was filled by the kernel.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, ptr::null_mut()) };
    }
}
