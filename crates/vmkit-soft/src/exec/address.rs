//! Addresses of memory operands.

use crate::code::{FLAG_ADDRESS, Op};
use crate::cpu::{Cpu, Trap};

/// How an operation finds its memory operand: as a type, so that the common case has no decision in
/// it.
pub(crate) trait Address: 'static {
    /// The linear address of a `bytes`-long operand.
    fn linear(cpu: &mut Cpu, op: &Op, bytes: u64, write: bool) -> Result<u64, Trap>;
}

/// 64-bit mode, 64-bit addresses: no limits, no wrapping.
pub(crate) struct Flat;
/// Any mode and address size.
pub(crate) struct General;

impl Address for Flat {
    #[inline(always)]
    fn linear(cpu: &mut Cpu, op: &Op, _: u64, _: bool) -> Result<u64, Trap> {
        Ok(cpu.ea64(op))
    }
}

impl Address for General {
    #[inline(never)]
    fn linear(cpu: &mut Cpu, op: &Op, bytes: u64, write: bool) -> Result<u64, Trap> {
        cpu.ea(op, bytes, write)
    }
}

impl Cpu {
    /// Base plus scaled index plus displacement.
    #[inline(always)]
    pub fn offset(&self, op: &Op) -> u64 {
        self.regs[usize::from(op.base & 31)]
            .wrapping_add(self.regs[usize::from(op.index & 31)] << (op.scale & 3))
            .wrapping_add(op.disp as u64)
    }

    /// The linear address of `op`'s memory operand in 64-bit mode with 64-bit addresses.
    #[inline(always)]
    pub fn ea64(&self, op: &Op) -> u64 {
        self.offset(op).wrapping_add(self.seg_base[usize::from(op.seg & 7)])
    }

    /// The offset of `op`'s memory operand, cut to its address size.
    pub fn offset_cut(&self, op: &Op) -> u64 {
        match op.flags & FLAG_ADDRESS {
            0 => self.offset(op) & 0xFFFF,
            1 => self.offset(op) & 0xFFFF_FFFF,
            _ => self.offset(op),
        }
    }

    /// The linear address of `op`'s memory operand in any mode, after segment checks.
    pub fn ea(&mut self, op: &Op, bytes: u64, write: bool) -> Result<u64, Trap> {
        let offset = self.offset_cut(op);
        self.linear(usize::from(op.seg), offset, bytes, write)
    }
}
