//! Operands of cold instructions: read and written by their full decoding.
//!
//! A cold instruction reads all it needs, computes, then writes; whatever may fault comes before the
//! first register or flag changes.

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, HIGH_BYTE, Int, Mode, REG_BLOCK, SEG_NONE, SS, W8, W16, W32, W64, Width};

/// The number and high-byte mark of a general register.
pub(crate) fn register_number(register: Register) -> u8 {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    if high {
        return (register as u8 - Register::AH as u8) | HIGH_BYTE;
    }
    // The number of SPL, R8L and kin counts AH to DH too; that of the full register does not.
    register.full_register().number() as u8
}

/// The index into `cpu.segs` of a segment register.
pub(crate) fn segment_number(register: Register) -> usize {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => SEG_NONE,
    }
}

impl Cpu {
    /// Reads a general register of any width, zero-extended.
    pub fn gpr(&self, register: Register) -> u64 {
        let number = register_number(register);
        match register.size() {
            1 => W8::get(self, number),
            2 => W16::get(self, number),
            4 => W32::get(self, number),
            _ => W64::get(self, number),
        }
    }

    /// Writes a general register of any width, as the architecture does: 32 bits clear the upper half.
    pub fn set_gpr(&mut self, register: Register, value: u64) {
        let number = register_number(register);
        match register.size() {
            1 => W8::set(self, number, value),
            2 => W16::set(self, number, value),
            4 => W32::set(self, number, value),
            _ => W64::set(self, number, value),
        }
    }

    /// The offset of the memory operand within its segment, cut to the address size.
    pub fn offset_of(&self, insn: &Instruction) -> u64 {
        let base = insn.memory_base();
        if matches!(base, Register::RIP | Register::EIP) {
            // Blocks are decoded as if they began at 0, so this is relative to the block.
            let address =
                self.regs[usize::from(REG_BLOCK)].wrapping_add(insn.memory_displacement64());
            return if base == Register::EIP { address & 0xFFFF_FFFF } else { address };
        }
        let mut address = insn.memory_displacement64();
        let mut size = displacement_size(insn);
        if base != Register::None {
            address = address.wrapping_add(self.gpr(base));
            size = base.size() as u32;
        }
        let index = insn.memory_index();
        if index != Register::None && index.is_gpr() {
            let scale = u64::from(insn.memory_index_scale());
            address = address.wrapping_add(self.gpr(index).wrapping_mul(scale));
            size = index.size() as u32;
        }
        match size {
            2 => address & 0xFFFF,
            4 => address & 0xFFFF_FFFF,
            _ => address,
        }
    }

    /// The linear address of the memory operand, `bytes` long, after segment checks.
    pub fn address_of(&mut self, insn: &Instruction, bytes: u64, write: bool) -> Result<u64, Trap> {
        let offset = self.offset_of(insn);
        self.linear(segment_number(insn.memory_segment()), offset, bytes, write)
    }

    /// The linear address of `offset` in segment `seg`, after the checks of the mode: none in 64-bit
    /// mode (where translation finds non-canonical addresses), limit and rights otherwise
    /// (Intel SDM vol. 3A §6.3, §6.5).
    pub fn linear(
        &mut self,
        seg: usize,
        offset: u64,
        bytes: u64,
        write: bool,
    ) -> Result<u64, Trap> {
        if self.mode.contains(Mode::LONG64) {
            return Ok(offset.wrapping_add(self.seg_base[seg & 7]));
        }
        let Some(segment) = self.segs.get(seg) else { return Ok(offset & 0xFFFF_FFFF) };
        let attributes = segment.attributes;
        let last = offset.wrapping_add(bytes - 1);
        let fits = if !attributes.is_code() && attributes.kind() & 4 != 0 {
            // Expand-down: valid above the limit.
            let top = if attributes.big() { 0xFFFF_FFFF } else { 0xFFFF };
            offset > u64::from(segment.limit) && last <= top && last >= offset
        } else {
            last <= u64::from(segment.limit) && last >= offset
        };
        let base = segment.base;
        let rights = !self.mode.contains(Mode::PROTECTED)
            || !attributes.unusable()
                && if write {
                    !attributes.is_code() && attributes.kind() & 2 != 0
                } else {
                    !attributes.is_code() || attributes.kind() & 2 != 0
                };
        if fits && rights {
            return Ok(base.wrapping_add(offset) & 0xFFFF_FFFF);
        }
        Err(self.raise_with(if seg == SS { trap::SS } else { trap::GP }, 0))
    }

    /// Reads operand `n` (register, memory of up to 8 bytes, or immediate), zero-extended from its
    /// width; immediates are sign-extended to the operand size.
    pub fn read_operand(&mut self, insn: &Instruction, n: u32) -> Result<u64, Trap> {
        match insn.op_kind(n) {
            OpKind::Register => {
                let register = insn.op_register(n);
                Ok(if register.is_segment_register() {
                    self.segs.get(segment_number(register)).map_or(0, |s| u64::from(s.selector))
                } else {
                    self.gpr(register)
                })
            }
            OpKind::Memory => {
                let bytes = insn.memory_size().size().clamp(1, 8) as u64;
                let linear = self.address_of(insn, bytes, false)?;
                self.load_sized(linear, bytes)
            }
            _ => Ok(insn.immediate(n)),
        }
    }

    /// Writes operand `n` (register or memory of up to 8 bytes).
    pub fn write_operand(&mut self, insn: &Instruction, n: u32, value: u64) -> Result<(), Trap> {
        if insn.op_kind(n) == OpKind::Register {
            self.set_gpr(insn.op_register(n), value);
            return Ok(());
        }
        let bytes = insn.memory_size().size().clamp(1, 8) as u64;
        let linear = self.address_of(insn, bytes, true)?;
        self.store_sized(linear, bytes, value)
    }

    /// Loads 1, 2, 4 or 8 bytes, zero-extended.
    pub fn load_sized(&mut self, linear: u64, bytes: u64) -> Result<u64, Trap> {
        Ok(match bytes {
            1 => self.load::<u8>(linear)?.widen(),
            2 => self.load::<u16>(linear)?.widen(),
            4 => self.load::<u32>(linear)?.widen(),
            _ => self.load::<u64>(linear)?,
        })
    }

    /// Stores 1, 2, 4 or 8 bytes.
    pub fn store_sized(&mut self, linear: u64, bytes: u64, value: u64) -> Result<(), Trap> {
        match bytes {
            1 => self.store(linear, value as u8),
            2 => self.store(linear, value as u16),
            4 => self.store(linear, value as u32),
            _ => self.store(linear, value),
        }
    }
}

/// Address size of an operand without registers, in bytes.
fn displacement_size(insn: &Instruction) -> u32 {
    match insn.memory_displ_size() {
        n @ (2 | 4 | 8) => n,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_registers_have_the_numbers_of_their_encoding() {
        assert_eq!(register_number(Register::BL), 3);
        assert_eq!(register_number(Register::BH), 3 | HIGH_BYTE);
        assert_eq!(register_number(Register::SPL), 4);
        assert_eq!(register_number(Register::DIL), 7);
        assert_eq!(register_number(Register::R15L), 15);
        assert_eq!(register_number(Register::R9D), 9);
    }
}
