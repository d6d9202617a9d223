//! Debug registers: breakpoints and single-stepping (Intel SDM vol. 3B chapter 18).
//!
//! While anything is armed the run loop executes one instruction at a time and calls
//! [`Cpu::step_before`] and [`Cpu::step_after`] around it.

use iced_x86::{Instruction, Register};
use vmkit_hypervisor::x86::Cr4;

use crate::cpu::trap::{self, Trap};
use crate::cpu::{CS, Cpu, flags};

/// DR6: an access to a debug register while DR7.GD was set.
const BD: u64 = 1 << 13;
/// DR6: a single step.
const BS: u64 = 1 << 14;
/// DR6: a switch to a task whose TSS has T set.
pub(super) const BT: u64 = 1 << 15;
/// DR6 bits that read as one.
const DR6_ONES: u64 = 0xFFFF_0FF0;
/// DR6 bits that can be written.
const DR6_BITS: u64 = BT | BS | BD | 0xF;
/// DR7 bits that can be written.
const DR7_BITS: u64 = 0xFFFF_23FF;
/// DR7 bit 10 reads as one.
const DR7_ONES: u64 = 0x400;
/// DR7: accesses to debug registers are reported.
const GD: u64 = 1 << 13;
/// DR7: the local enable bits.
const LOCAL: u64 = 0x155;

/// DEBUGCTL: TF is about branches.
const BTF: u64 = 1 << 1;

/// The kinds of a breakpoint (DR7.R/W).
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;
const READ_WRITE: u64 = 3;

/// What single-stepping must remember beside the registers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Step {
    /// The instruction before loaded SS: debug exceptions wait for one more instruction
    /// (Intel SDM vol. 3A §7.8.3).
    pub shadow: bool,
    /// The instruction ended the single step: it entered a handler, or went by TF as it is now.
    pub over: bool,
    /// DR6 bits that wait because of `shadow`.
    held: u64,
}

/// DR6 and DR7 as they can be.
pub(super) fn dr6_value(value: u64) -> u64 {
    value & DR6_BITS | DR6_ONES
}

pub(super) fn dr7_value(value: u64) -> u64 {
    value & DR7_BITS | DR7_ONES
}

impl Cpu {
    /// The run loop must execute single instructions: TF is set or a breakpoint is armed.
    #[inline]
    pub fn must_step(&self) -> bool {
        self.flags.rest & flags::TF != 0 || self.debug.dr7 & 0xFF != 0
    }

    /// TF stops at branches that are taken only (Intel SDM vol. 3B §18.4.3).
    pub fn steps_branches(&self) -> bool {
        self.msrs.debugctl & BTF != 0
    }

    fn enabled(&self, n: u64) -> bool {
        self.debug.dr7 >> (2 * n) & 3 != 0
    }

    /// Kind and length in bytes of breakpoint `n`.
    fn shape(&self, n: u64) -> (u64, u64) {
        let field = self.debug.dr7 >> (16 + 4 * n);
        let length = match field >> 2 & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        (field & 3, length)
    }

    /// A breakpoint on data is armed.
    pub fn data_breakpoints_armed(&self) -> bool {
        (0..4).any(|n| self.enabled(n) && matches!(self.shape(n).0, WRITE | READ_WRITE))
    }

    /// The breakpoints whose range meets `len` bytes at `at`, of the kinds that `wanted` takes.
    fn hits(&self, at: u64, len: u64, wanted: impl Fn(u64) -> bool) -> u64 {
        let last = at.wrapping_add(len.max(1) - 1);
        (0..4_u64).filter(|&n| self.enabled(n)).fold(0, |hits, n| {
            let (kind, length) = self.shape(n);
            let first = self.debug.dr[n as usize] & !(length - 1);
            let meets = first <= last && at <= first | (length - 1);
            if wanted(kind) && meets { hits | 1 << n } else { hits }
        })
    }

    /// Notes data breakpoints that an access hits.
    pub fn data_access(&mut self, linear: u64, len: usize, write: bool) {
        let hits =
            self.hits(linear, len as u64, |kind| kind == READ_WRITE || kind == WRITE && write);
        self.data_hits |= hits;
    }

    /// Notes port breakpoints that an access hits.
    pub(super) fn port_access(&mut self, port: u16, bytes: u64) {
        if self.debug.dr7 & 0xFF != 0 && self.cr4().contains(Cr4::DE) {
            let hits = self.hits(u64::from(port), bytes, |kind| kind == PORT);
            self.data_hits |= hits;
        }
    }

    /// Records debug conditions; B0 to B3 are those of this exception only.
    fn record(&mut self, bits: u64) {
        self.debug.dr6 = dr6_value(self.debug.dr6 & !0xF | bits);
    }

    /// Before an instruction, while [`must_step`](Self::must_step): raises #DB for a code breakpoint.
    /// Returns whether TF was set, for [`step_after`](Self::step_after).
    pub fn step_before(&mut self) -> Result<bool, Trap> {
        let shadowed = std::mem::take(&mut self.step.shadow);
        self.step.over = false;
        self.data_hits = 0;
        if self.debug.dr7 & 0xFF != 0 && !shadowed && self.flags.rest & flags::RF == 0 {
            let base = if self.long64() { 0 } else { self.segs[CS].base };
            let linear = self.wrap_linear(base.wrapping_add(self.rip));
            // An instruction breakpoint is on the first byte.
            let hits = self.hits(linear, 1, |kind| kind == EXECUTE);
            if hits != 0 {
                self.record(hits);
                return Err(self.raise(trap::DB));
            }
        }
        // RF holds for one instruction; one that sets it (IRET) does so after this.
        self.flags.rest &= !flags::RF;
        Ok(self.flags.rest & flags::TF != 0)
    }

    /// After an instruction that completed, with what [`step_before`](Self::step_before) returned:
    /// raises #DB for a single step and for data breakpoints that were hit.
    pub fn step_after(&mut self, stepped: bool) -> Result<(), Trap> {
        let single = stepped && !std::mem::take(&mut self.step.over);
        let bits = std::mem::take(&mut self.data_hits)
            | std::mem::take(&mut self.step.held)
            | if single { BS } else { 0 };
        if self.step.shadow {
            self.step.held = bits & !BS;
            return Ok(());
        }
        if bits == 0 {
            return Ok(());
        }
        self.record(bits);
        Err(self.raise(trap::DB))
    }

    /// SYSCALL and SYSRET are stepped if TF is set after them, whatever it was before: a kernel that masks
    /// TF is not stepped into, and a program that is returned to with TF set traps before its next
    /// instruction (Intel SDM vol. 2B, SYSCALL, SYSRET). The instruction has completed: #DB is left in
    /// `cpu.trap`.
    pub(super) fn step_by_new_tf(&mut self) {
        self.step.over = true;
        if self.flags.rest & flags::TF != 0 {
            let others = std::mem::take(&mut self.data_hits) | std::mem::take(&mut self.step.held);
            self.record(others | BS);
            let _ = self.raise(trap::DB);
        }
    }

    /// MOV SS and POP SS: no interrupt and no debug exception before the next instruction is done.
    pub(super) fn shadow_of_ss(&mut self) {
        self.inhibit = true;
        self.step.shadow = true;
    }

    /// The processor clears GD on the way into a #DB handler, and ends the stepping of branches and
    /// their recording.
    pub(super) fn entered_debug_handler(&mut self) {
        self.debug.dr7 &= !GD;
        self.msrs.debugctl = 0;
    }

    /// A task switch turns the local breakpoints off (Intel SDM vol. 3B §18.2.4).
    pub(super) fn clear_local_breakpoints(&mut self) {
        self.debug.dr7 &= !LOCAL;
    }

    /// After a switch to a task with the debug trap flag: raises #DB.
    pub(super) fn raise_task_trap(&mut self) -> Trap {
        self.record(self.debug.dr6 & 0xF | BT);
        self.raise(trap::DB)
    }

    /// Takes note of new breakpoints: accesses must take the slow path to be seen.
    pub(super) fn breakpoints_changed(&mut self) {
        self.tlb.flush(true);
        self.code_changed();
    }

    /// The debug register that MOV names, after the checks that come before its access.
    fn debug_register(&mut self, register: Register) -> Result<usize, Trap> {
        let number = register as usize - Register::DR0 as usize;
        self.need_cpl0()?;
        let number = match number {
            4 | 5 if self.cr4().contains(Cr4::DE) => return Err(self.ud()),
            4 | 5 => number + 2,
            0..=7 => number,
            _ => return Err(self.ud()),
        };
        if self.debug.dr7 & GD != 0 {
            self.record(self.debug.dr6 & 0xF | BD);
            // A fault, and not one that RF would have stopped.
            self.flags.rest |= flags::RF;
            return Err(self.raise(trap::DB));
        }
        Ok(number)
    }
}

/// MOV from a debug register.
pub(super) fn mov_from(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = match cpu.debug_register(insn.op1_register())? {
        6 => cpu.debug.dr6,
        7 => cpu.debug.dr7,
        n => cpu.debug.dr[n & 3],
    };
    cpu.set_gpr(insn.op0_register(), value);
    Ok(())
}

/// MOV to a debug register.
pub(super) fn mov_to(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let number = cpu.debug_register(insn.op0_register())?;
    let value = cpu.gpr(insn.op1_register());
    if number >= 6 && value >> 32 != 0 {
        return Err(cpu.gp0());
    }
    match number {
        6 => cpu.debug.dr6 = dr6_value(value),
        7 => {
            cpu.debug.dr7 = dr7_value(value);
            cpu.flags.rest &= !flags::RF;
            cpu.breakpoints_changed();
        }
        n => {
            cpu.debug.dr[n & 3] = value;
            if cpu.debug.dr7 & 0xFF != 0 {
                cpu.breakpoints_changed();
            }
        }
    }
    Ok(())
}
