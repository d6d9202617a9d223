//! The run loop: from one exit to the next, without allocating.

#![allow(unsafe_code, reason = "KVM_RUN is called directly, without a copy of the exit")]

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_NOTIFY,
    KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_BUS_LOCK, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use vmkit_hypervisor::{FailedInstruction, HypervisorError, IoFlow, Result, VcpuIo, VmExit};

use super::KvmVcpu;
use super::page::PortExit;
use crate::split::Split;

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: libc::c_ulong = 0xAE80;

/// What to do after an exit.
pub(super) enum Next {
    /// Enter the guest again.
    Go,
    /// A callback wants to stop: complete the access and return.
    Stop,
    /// Return this.
    Exit(VmExit),
}

impl KvmVcpu {
    pub(super) fn run_guest(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit> {
        let _running = self.kick.enter()?;
        let _in_guest = self.partition.split.as_ref().map(Split::enter);
        self.kick.notice_nudges();
        self.begin_with_intr();
        if self.partition.split.is_none() && !self.partition.memory.has_rings() {
            self.until_exit::<true>(io)
        } else {
            self.until_exit::<false>(io)
        }
    }

    /// Enters the guest until something ends the run. `PLAIN`: there are neither controllers nor dirty
    /// rings to look after here, so that no exit pays for asking.
    fn until_exit<const PLAIN: bool>(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit> {
        // The vCPU is between two instructions, and what KVM last said of it is true.
        let mut settled = false;
        loop {
            if !PLAIN {
                self.offer_interrupt(settled)?;
                settled = false;
            }
            match self.enter_kernel::<PLAIN>() {
                0 => match self.dispatch::<PLAIN>(io)? {
                    Next::Go => settled = self.page.exit_reason() == KVM_EXIT_IRQ_WINDOW_OPEN,
                    Next::Stop => return self.complete_access(io),
                    Next::Exit(exit) => return Ok(exit),
                },
                libc::EINTR => {
                    // In this order: a kick sets its flag before it stores to `immediate_exit`.
                    self.page.set_immediate_exit(false);
                    self.kick.notice_nudges();
                    if self.kick.take() {
                        return if PLAIN { Ok(VmExit::Kicked) } else { self.finish_eois(io) };
                    }
                    settled = true;
                }
                // A vCPU that waited for INIT or SIPI woke up.
                libc::EAGAIN => {}
                errno => return Err(self.refused(errno)),
            }
        }
    }

    /// KVM_RUN; the error number, or 0.
    #[inline(always)]
    pub(super) fn enter_kernel<const PLAIN: bool>(&self) -> i32 {
        let rings = !PLAIN && self.partition.memory.has_rings();
        if rings {
            self.kick.pass();
        }
        // SAFETY: the descriptor is this vCPU's; KVM_RUN takes no argument and writes to the mapping
        // that `fd` owns, to which no reference exists.
        let outcome = if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) } == 0 {
            0
        } else {
            std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
        };
        if rings {
            self.kick.pass();
        }
        outcome
    }

    // Inlined, as what it calls for data exits: an exit costs as little as the bare ioctl loop's.
    #[inline(always)]
    pub(super) fn dispatch<const PLAIN: bool>(&mut self, io: &mut dyn VcpuIo) -> Result<Next> {
        match self.page.exit_reason() {
            KVM_EXIT_IO => self.port_access::<PLAIN>(io),
            KVM_EXIT_MMIO => Ok(self.mmio_access::<PLAIN>(io)),
            reason => self.control_exit(reason),
        }
    }

    #[cold]
    fn impossible_access(&mut self) -> HypervisorError {
        self.failed("KVM described an impossible port access".into(), None)
    }

    #[cold]
    fn control_exit(&mut self, reason: u32) -> Result<Next> {
        match reason {
            KVM_EXIT_SHUTDOWN => Ok(Next::Exit(VmExit::Shutdown)),
            // Reported only where the local APIC is not in the kernel: nothing can wake it.
            KVM_EXIT_HLT => Ok(Next::Exit(VmExit::HaltedForGood)),
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_NOTIFY | KVM_EXIT_X86_BUS_LOCK => {
                Ok(Next::Go)
            }
            // Without a local APIC: the guest lowered CR8, and no interrupt waits for that.
            KVM_EXIT_SET_TPR => Ok(Next::Go),
            KVM_EXIT_IOAPIC_EOI => {
                if let Some(split) = &self.partition.split {
                    split.end_of_interrupt(self.page.eoi_vector());
                }
                Ok(Next::Go)
            }
            KVM_EXIT_DIRTY_RING_FULL => {
                self.partition.memory.empty_rings(&self.partition.vm)?;
                Ok(Next::Go)
            }
            KVM_EXIT_INTERNAL_ERROR => Err(self.internal_error()),
            KVM_EXIT_FAIL_ENTRY => {
                let hardware = self.page.entry_failure();
                Err(self.failed(format!("the processor refused entry, reason {hardware:#x}"), None))
            }
            KVM_EXIT_DEBUG => Err(self.failed("unexpected debug exit".into(), None)),
            other => Err(self.failed(format!("unknown exit reason {other}"), None)),
        }
    }

    /// Hands the elements of a port access over. All of them: KVM completes all of them, too.
    #[inline(always)]
    fn port_access<const PLAIN: bool>(&mut self, io: &mut dyn VcpuIo) -> Result<Next> {
        let Some(mut exit) = self.page.port_exit() else { return Err(self.impossible_access()) };
        // Nearly always the only one.
        let mut flow = self.port_element::<PLAIN>(&mut exit, 0, io);
        for index in 1..exit.count {
            if self.port_element::<PLAIN>(&mut exit, index, io) == IoFlow::Stop {
                flow = IoFlow::Stop;
            }
        }
        Ok(if flow == IoFlow::Stop { Next::Stop } else { Next::Go })
    }

    #[inline(always)]
    fn port_element<const PLAIN: bool>(
        &self,
        exit: &mut PortExit,
        index: usize,
        io: &mut dyn VcpuIo,
    ) -> IoFlow {
        let (port, write) = (exit.port, exit.write);
        let data = exit.element(index);
        if !PLAIN
            && let Some(split) = &self.partition.split
            && split.port_access(port, write, data)
        {
            return IoFlow::Continue;
        }
        if write { io.pio_write(port, data) } else { io.pio_read(port, data) }
    }

    #[inline(always)]
    fn mmio_access<const PLAIN: bool>(&mut self, io: &mut dyn VcpuIo) -> Next {
        let mut exit = self.page.mmio_exit();
        let mut flow = Next::Go;
        let mut done = 0;
        while done < exit.len {
            let address = exit.address.wrapping_add(done as u64);
            let piece = piece(address, exit.len - done, done == 0);
            let Some(data) = exit.data.get_mut(done..done + piece) else { break };
            done += piece;
            if !PLAIN
                && let Some(split) = &self.partition.split
                && split.mmio_access(address, exit.write, data)
            {
                continue;
            }
            let answer =
                if exit.write { io.mmio_write(address, data) } else { io.mmio_read(address, data) };
            if answer == IoFlow::Stop {
                flow = Next::Stop;
            }
        }
        if !exit.write {
            self.page.answer_mmio(exit.data);
        }
        flow
    }

    /// Lets KVM finish the instruction whose access a callback just answered, without running the
    /// next one. The instruction may have more accesses; they are answered too.
    pub(super) fn complete_access(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit> {
        let outcome = loop {
            self.page.set_immediate_exit(true);
            match self.enter_kernel::<false>() {
                0 => match self.dispatch::<false>(io) {
                    Ok(Next::Go | Next::Stop) => {}
                    Ok(Next::Exit(exit)) => break Ok(exit),
                    Err(error) => break Err(error),
                },
                libc::EINTR | libc::EAGAIN => break Ok(VmExit::Stopped),
                errno => break Err(self.refused(errno)),
            }
        };
        self.page.set_immediate_exit(false);
        if self.kick.is_pending() {
            // A kick stored its 1 before the 0 above; it is for the next run.
            self.page.set_immediate_exit(true);
        }
        outcome
    }

    fn internal_error(&mut self) -> HypervisorError {
        let error = self.page.internal_error();
        let reason = match error.suberror {
            KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction".to_owned(),
            KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met exceptions while delivering one".to_owned(),
            KVM_INTERNAL_ERROR_DELIVERY_EV => {
                "an exit came while KVM delivered an event".to_owned()
            }
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                format!("KVM met an unexpected hardware exit {:#x}", error.data)
            }
            other => format!("KVM internal error {other}"),
        };
        self.failed(reason, error.bytes)
    }

    /// KVM_RUN itself failed.
    pub(super) fn refused(&mut self, errno: i32) -> HypervisorError {
        let source = std::io::Error::from_raw_os_error(errno);
        let reason = if self.page.exit_reason() == KVM_EXIT_MEMORY_FAULT {
            format!("a mapping of guest memory has no host memory behind it ({source})")
        } else {
            format!("KVM_RUN: {source}")
        };
        let at = self.place(None);
        HypervisorError::Failed { reason, at, source: Some(source) }
    }

    /// A failure at the guest's current instruction, whose bytes are `known` or read from memory.
    fn failed(&mut self, reason: String, known: Option<([u8; 15], u8)>) -> HypervisorError {
        HypervisorError::Failed { reason, at: self.place(known), source: None }
    }

    fn place(&mut self, known: Option<([u8; 15], u8)>) -> FailedInstruction {
        let mut at = FailedInstruction { address: 0, bytes: [0; 15], len: 0 };
        if let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) {
            at.address = sregs.cs.base.wrapping_add(regs.rip);
        }
        (at.bytes, at.len) = known.unwrap_or_else(|| self.bytes_at(at.address));
        at
    }

    /// The bytes at a linear address, as far as they are in mapped memory.
    fn bytes_at(&self, linear: u64) -> ([u8; 15], u8) {
        let mut bytes = [0; 15];
        let mut len = 0;
        for (offset, byte) in (0..).zip(&mut bytes) {
            let Ok(found) = self.fd.translate_gva(linear.wrapping_add(offset)) else { break };
            let physical = found.physical_address;
            if found.valid == 0 || !self.partition.memory.read_byte(physical, byte) {
                break;
            }
            len += 1;
        }
        (bytes, len)
    }
}

/// How much of `left` bytes at `address` goes into one callback: 1, 2, 4 or 8 bytes. A whole access
/// of such a size is one piece wherever it lies; what KVM cut at a page boundary goes in aligned
/// pieces.
fn piece(address: u64, left: usize, whole: bool) -> usize {
    if whole && left.is_power_of_two() {
        return left;
    }
    let aligned = 1 << address.trailing_zeros().min(3);
    let fits = 1 << left.max(1).ilog2().min(3);
    usize::min(aligned, fits)
}

#[cfg(test)]
mod tests {
    use super::piece;

    fn pieces(address: u64, len: usize) -> Vec<usize> {
        let mut all = Vec::new();
        let mut done = 0;
        while done < len {
            all.push(piece(address + done as u64, len - done, done == 0));
            done += all.last().unwrap();
        }
        all
    }

    #[test]
    fn odd_sizes_are_cut_into_aligned_powers_of_two() {
        assert_eq!(pieces(0x1000, 8), [8]);
        assert_eq!(pieces(0x1001, 8), [8]);
        assert_eq!(pieces(0xFFD, 3), [1, 2]);
        assert_eq!(pieces(0x1000, 5), [4, 1]);
        assert_eq!(pieces(0xFF9, 7), [1, 2, 4]);
        assert_eq!(pieces(0x1000, 6), [4, 2]);
    }
}
