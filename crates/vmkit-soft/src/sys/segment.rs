//! Loading segment registers (Intel SDM vol. 3A §3.4.3, §6.5–6.7; MOV, POP and LDS in vol. 2).

use iced_x86::{Instruction, OpKind, Register};
use vmkit_hypervisor::x86::{Segment, SegmentAttributes};

use super::descriptor::null_segment;
use super::stack::Stack;
use crate::cpu::trap::{self, Trap};
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, Mode, SS};
use crate::exec::operand::segment_number;

impl Cpu {
    /// True in protected mode proper: selectors name descriptors.
    pub(super) fn protected(&self) -> bool {
        self.mode.contains(Mode::PROTECTED)
    }

    /// Raises #UD unless in protected mode (LLDT, LAR and kin).
    pub(super) fn need_protected(&mut self) -> Result<(), Trap> {
        if self.protected() { Ok(()) } else { Err(self.ud()) }
    }

    /// Raises #GP(0) unless at privilege level 0.
    pub(super) fn need_cpl0(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp0()) }
    }

    /// Loads a segment register in real or virtual-8086 mode. Real mode keeps limit and rights as
    /// they were left by protected mode.
    pub(super) fn set_real_segment(&mut self, seg: usize, selector: u16) {
        let v86 = self.mode.contains(Mode::V86);
        let old = self.segs[seg];
        let fresh = Segment::real(selector);
        self.segs[seg] = if v86 {
            Segment { attributes: SegmentAttributes(0xF3), ..fresh }
        } else if old.attributes.unusable() {
            fresh
        } else {
            Segment { limit: old.limit, attributes: old.attributes, ..fresh }
        };
        self.seg_base[seg] = self.segs[seg].base;
    }

    /// Loads ES, SS, DS, FS or GS with all checks of the mode. [`update_mode`](Self::update_mode) is
    /// done.
    pub(super) fn load_segment(&mut self, seg: usize, selector: u16) -> Result<(), Trap> {
        if !self.protected() {
            self.set_real_segment(seg, selector);
        } else if seg == SS {
            self.segs[SS] = self.checked_stack_segment(selector)?;
        } else {
            self.segs[seg] = self.checked_data_segment(selector, trap::GP, 0)?;
        }
        self.update_mode();
        Ok(())
    }

    fn checked_stack_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        let cpl = self.cpl;
        // 64-bit code may run on a null SS, except at privilege level 3.
        if selector & 0xFFFC == 0 && self.long64() && cpl < 3 && (selector & 3) as u8 == cpl {
            return Ok(null_segment(selector, cpl));
        }
        self.stack_descriptor(selector, cpl, trap::GP, 0)
    }

    /// Checks a selector for ES, DS, FS or GS and returns what the register is to hold.
    pub(super) fn checked_data_segment(
        &mut self,
        selector: u16,
        vector: u8,
        ext: u32,
    ) -> Result<Segment, Trap> {
        if selector & 0xFFFC == 0 {
            return Ok(null_segment(selector, 0));
        }
        let mut descriptor = self.descriptor(selector, vector, ext)?;
        let checked = !descriptor.is_code() || !descriptor.conforming();
        let private = descriptor.rpl() > descriptor.dpl() || self.cpl > descriptor.dpl();
        if !descriptor.is_readable() || checked && private {
            return Err(self.selector_fault(vector, selector, ext));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(trap::NP, selector, ext));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment())
    }

    /// After a return to an outer privilege level: takes away data segments that its code could not
    /// have loaded (Intel SDM vol. 3A §6.8.6).
    pub(super) fn drop_inner_segments(&mut self) {
        for seg in [ES, DS, FS, GS] {
            let attributes = self.segs[seg].attributes;
            let checked = !attributes.is_code() || attributes.kind() & 4 == 0;
            if !attributes.unusable() && checked && attributes.dpl() < self.cpl {
                self.segs[seg].selector = 0;
                self.segs[seg].attributes.0 |= SegmentAttributes::UNUSABLE.0;
            }
        }
    }

    /// Sets the base of FS or GS.
    pub(super) fn set_segment_base(&mut self, seg: usize, base: u64) {
        self.segs[seg].base = base;
        self.seg_base[seg] = base;
    }
}

/// MOV to a segment register.
pub(super) fn mov_to(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let seg = segment_number(insn.op0_register());
    if seg == CS || seg > GS {
        return Err(cpu.ud());
    }
    let selector = cpu.read_operand(insn, 1)? as u16;
    cpu.load_segment(seg, selector)?;
    if seg == SS {
        cpu.shadow_of_ss();
    }
    Ok(())
}

/// MOV from a segment register.
pub(super) fn mov_from(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = cpu.read_operand(insn, 1)?;
    cpu.write_operand(insn, 0, value)
}

fn stack_bytes(insn: &Instruction) -> u64 {
    u64::from(insn.stack_pointer_increment().unsigned_abs())
}

/// PUSH of a segment register.
pub(super) fn push(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = cpu.read_operand(insn, 0)?;
    let mut stack = Stack::current(cpu, 0);
    stack.push(cpu, stack_bytes(insn), value)?;
    stack.commit(cpu);
    Ok(())
}

/// POP of a segment register.
pub(super) fn pop(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let seg = segment_number(insn.op0_register());
    let mut stack = Stack::current(cpu, 0);
    let bytes = stack_bytes(insn);
    let selector = stack.peek(cpu, 0, bytes)? as u16;
    stack.skip(bytes);
    cpu.load_segment(seg, selector)?;
    stack.commit(cpu);
    if seg == SS {
        cpu.shadow_of_ss();
    }
    Ok(())
}

/// LDS, LES, LSS, LFS, LGS: a far pointer from memory.
pub(super) fn load_far(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    use iced_x86::Mnemonic;
    if insn.op1_kind() != OpKind::Memory {
        return Err(cpu.ud());
    }
    let register = insn.op0_register();
    let seg = match insn.mnemonic() {
        Mnemonic::Lds => DS,
        Mnemonic::Les => ES,
        Mnemonic::Lss => SS,
        Mnemonic::Lfs => FS,
        _ => GS,
    };
    let (selector, offset) = cpu.far_pointer(insn, register.size() as u64)?;
    cpu.load_segment(seg, selector)?;
    cpu.set_gpr(register, offset);
    Ok(())
}

impl Cpu {
    /// Reads a far pointer with an offset of `bytes` from the memory operand.
    pub(super) fn far_pointer(
        &mut self,
        insn: &Instruction,
        bytes: u64,
    ) -> Result<(u16, u64), Trap> {
        let at = self.address_of(insn, bytes + 2, false)?;
        let offset = self.load_sized(at, bytes)?;
        let selector = self.load::<u16>(self.wrap_linear(at.wrapping_add(bytes)))?;
        Ok((selector, offset))
    }
}

/// True if operand 0 or 1 is a segment register: MOV, PUSH and POP of one.
pub(super) fn concerns_segment(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Register && Register::is_segment_register(insn.op_register(n))
}
