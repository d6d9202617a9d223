//! A stack that a control transfer works on: checked accesses through a copy of the stack pointer,
//! which becomes the processor's once nothing can fail any more.

use vmkit_hypervisor::x86::{Cr0, Segment};

use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, RSP, SS, flags};
use crate::mem::{MODE_SUPERVISOR, MODE_SUPERVISOR_AC, MODE_USER};

/// A stack, and how far a transfer has got on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    segment: Segment,
    pub sp: u64,
    mask: u64,
    access: u64,
    /// Error code of the #SS that an access outside it raises.
    error: u32,
}

impl Stack {
    /// The stack in use.
    pub fn current(cpu: &Cpu, error: u32) -> Self {
        Self {
            segment: cpu.segs[SS],
            sp: cpu.regs[RSP],
            mask: cpu.stack_mask(),
            access: cpu.tlb_mode,
            error,
        }
    }

    /// A stack in `segment` for privilege level `cpl`.
    pub fn new(cpu: &Cpu, segment: Segment, sp: u64, cpl: u8, error: u32) -> Self {
        let mask = if segment.attributes.big() { 0xFFFF_FFFF } else { 0xFFFF };
        Self { segment, sp, mask, access: access_of(cpu, cpl), error }
    }

    /// A stack of 64-bit code at privilege level `cpl`.
    pub fn flat(cpu: &Cpu, sp: u64, cpl: u8, error: u32) -> Self {
        Self { segment: Segment::default(), sp, mask: u64::MAX, access: access_of(cpu, cpl), error }
    }

    fn linear(&self, cpu: &mut Cpu, offset: u64, bytes: u64) -> Result<u64, Trap> {
        if self.mask == u64::MAX {
            return Ok(offset);
        }
        let attributes = self.segment.attributes;
        let limit = u64::from(self.segment.limit);
        let last = offset + (bytes - 1);
        // Expand-down data grows from the limit to the top.
        let down = cpu.cr0().contains(Cr0::PE) && attributes.kind() & 0xC == 4;
        let fits = if down { offset > limit && last <= self.mask } else { last <= limit };
        if fits {
            Ok(cpu.wrap_linear(self.segment.base.wrapping_add(offset)) & 0xFFFF_FFFF)
        } else {
            Err(cpu.raise_with(trap::SS, self.error))
        }
    }

    fn moved(&self, by: u64) -> u64 {
        self.sp & !self.mask | self.sp.wrapping_add(by) & self.mask
    }

    /// Pushes the low `bytes` (2, 4 or 8) of `value`.
    pub fn push(&mut self, cpu: &mut Cpu, bytes: u64, value: u64) -> Result<(), Trap> {
        let sp = self.moved(bytes.wrapping_neg());
        let linear = self.linear(cpu, sp & self.mask, bytes)?;
        let stored = match bytes {
            2 => cpu.store_as(linear, value as u16, self.access),
            4 => cpu.store_as(linear, value as u32, self.access),
            _ => cpu.store_as(linear, value, self.access),
        };
        cpu.non_canonical_is(trap::SS, self.error, stored)?;
        self.sp = sp;
        Ok(())
    }

    /// Reads `bytes` (2, 4 or 8) at `offset` from the top, zero-extended.
    pub fn peek(&self, cpu: &mut Cpu, offset: u64, bytes: u64) -> Result<u64, Trap> {
        let sp = self.moved(offset);
        let linear = self.linear(cpu, sp & self.mask, bytes)?;
        let loaded = match bytes {
            2 => cpu.load_as::<u16>(linear, self.access).map(u64::from),
            4 => cpu.load_as::<u32>(linear, self.access).map(u64::from),
            _ => cpu.load_as::<u64>(linear, self.access),
        };
        cpu.non_canonical_is(trap::SS, self.error, loaded)
    }

    /// Pops `bytes` (2, 4 or 8), zero-extended.
    pub fn pop(&mut self, cpu: &mut Cpu, bytes: u64) -> Result<u64, Trap> {
        let value = self.peek(cpu, 0, bytes)?;
        self.skip(bytes);
        Ok(value)
    }

    /// Moves the stack pointer up.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.moved(bytes);
    }

    /// Makes the stack pointer the processor's.
    pub fn commit(&self, cpu: &mut Cpu) {
        cpu.regs[RSP] = match self.mask {
            0xFFFF => cpu.regs[RSP] & !0xFFFF | self.sp & 0xFFFF,
            mask => self.sp & mask,
        };
    }
}

fn access_of(cpu: &Cpu, cpl: u8) -> u64 {
    if cpl == 3 {
        MODE_USER
    } else if cpu.flags.rest & flags::AC != 0 {
        MODE_SUPERVISOR_AC
    } else {
        MODE_SUPERVISOR
    }
}
