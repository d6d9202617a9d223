//! MXCSR: who holds its sticky flags, and exceptions that the guest has unmasked.
//!
//! While the guest runs with the default control bits, its floating-point instructions execute under
//! the host's own MXCSR, which is the default too, and the sticky flags gather there; they are folded
//! into [`Cpu::mxcsr`] when somebody looks. Under any other control bits each instruction runs with
//! the guest's, all exceptions masked, and what it raised is judged afterwards.

#![allow(unsafe_code, reason = "MXCSR is reached by inline assembly")]

use std::arch::asm;

use iced_x86::Code;
use vmkit_hypervisor::x86::Cr4;

use super::exact::{self, Operands};
use crate::cpu::Cpu;
use crate::cpu::trap::{self, Trap};

/// MXCSR after reset: all exceptions masked, round to nearest.
pub(crate) const MXCSR_RESET: u32 = 0x1F80;
/// The bits of MXCSR that exist.
pub(crate) const MXCSR_MASK: u32 = 0xFFFF;

/// The sticky exception flags.
pub(super) const FLAGS: u32 = 0x3F;
/// The exception masks.
const MASKS: u32 = 0x1F80;
/// Flags of exceptions found before anything is computed: invalid operation, denormal operand, divide
/// by zero.
pub(super) const BEFORE: u32 = 7;

/// What an instruction that runs under the guest's control bits needs: the MXCSR to run under, what
/// it was afterwards, and the host's to go back to. Inline assembly reads and writes it by offset.
#[repr(C)]
pub(crate) struct Frame {
    guest: u32,
    after: u32,
    host: u32,
}

/// Inline assembly under the control bits of the [`Frame`] at `{frame}`.
macro_rules! asm_under {
    ($frame:ident, $code:expr, $($operands:tt)*) => {
        std::arch::asm!(
            "ldmxcsr [{frame}]",
            $code,
            "stmxcsr [{frame} + 4]",
            "ldmxcsr [{frame} + 8]",
            frame = in(reg) std::ptr::from_mut($frame),
            $($operands)*
        )
    };
}
pub(super) use asm_under;

/// Reads the host's MXCSR.
fn host_mxcsr() -> u32 {
    let mut value = 0_u32;
    // SAFETY: stores four bytes to a local variable.
    unsafe {
        asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags));
    }
    value
}

/// Clears the host's sticky flags.
fn clear_host_flags(now: u32) {
    let value = now & !FLAGS;
    // SAFETY: the control bits stay as they are; only sticky flags are cleared.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, readonly)) };
}

/// Runs `run` under the control bits of `mxcsr` with all exceptions masked; its value, and the flags it
/// raised.
pub(super) fn under<T>(mxcsr: u32, run: impl FnOnce(&mut Frame) -> T) -> (T, u32) {
    let mut frame = Frame { guest: mxcsr & !FLAGS | MASKS, after: 0, host: host_mxcsr() };
    let value = run(&mut frame);
    (value, frame.after & FLAGS)
}

impl Cpu {
    /// True if the guest's control bits are the default ones, which are the host's.
    #[inline(always)]
    pub fn default_mxcsr(&self) -> bool {
        self.mxcsr & !FLAGS == MXCSR_RESET
    }

    /// Runs one instruction under the guest's control bits with all exceptions masked, then raises #XM
    /// if it met one that the guest has not masked (Intel SDM vol. 1 §11.5.2). For instructions that
    /// neither overflow nor underflow.
    #[cold]
    #[inline(never)]
    pub fn judge<T>(&mut self, run: impl FnOnce(&mut Frame) -> T) -> Result<T, Trap> {
        let (value, raised) = under(self.mxcsr, run);
        let before = raised & !(self.mxcsr >> 7) & BEFORE != 0;
        self.accept(if before { raised & BEFORE } else { raised })?;
        Ok(value)
    }

    /// As [`judge`](Self::judge), for floating-point arithmetic.
    #[cold]
    #[inline(never)]
    pub(super) fn judge_arithmetic<T>(
        &mut self,
        code: Code,
        operands: &Operands,
        run: impl FnOnce(&mut Frame) -> T,
    ) -> Result<T, Trap> {
        let (value, raised) = under(self.mxcsr, run);
        self.accept(exact::settle(code, operands, raised, self.mxcsr))?;
        Ok(value)
    }

    /// Records flags; raises #XM, or #UD without CR4.OSXMMEXCPT, if one is unmasked.
    fn accept(&mut self, flags: u32) -> Result<(), Trap> {
        let unmasked = flags & !(self.mxcsr >> 7);
        self.mxcsr |= flags;
        if unmasked == 0 {
            return Ok(());
        }
        Err(if self.cr4().contains(Cr4::OSXMMEXCPT) { self.raise(trap::XM) } else { self.ud() })
    }

    /// Takes the floating-point unit for the guest: before guest code runs.
    pub fn fp_enter(&mut self) {
        let now = host_mxcsr();
        if now & FLAGS != 0 {
            clear_host_flags(now);
        }
    }

    /// Gives the floating-point unit back: after guest code ran, and before a callback. What the
    /// guest's instructions raised is in [`Cpu::mxcsr`] then.
    pub fn fp_leave(&mut self) {
        let now = host_mxcsr();
        if now & FLAGS != 0 {
            self.mxcsr |= now & FLAGS;
            clear_host_flags(now);
        }
    }

    /// The guest's MXCSR with all flags raised so far.
    pub fn current_mxcsr(&mut self) -> u32 {
        self.fp_leave();
        self.mxcsr
    }

    /// Sets the guest's MXCSR; #GP(0) if a reserved bit is set.
    pub fn set_mxcsr(&mut self, value: u32) -> Result<(), Trap> {
        if value & !MXCSR_MASK != 0 {
            return Err(self.gp0());
        }
        self.fp_leave();
        self.mxcsr = value;
        Ok(())
    }
}
