//! Descriptor-table and task registers, and the instructions that look at descriptors without
//! loading them.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use vmkit_hypervisor::x86::{Cr4, DescriptorTable};

use super::descriptor::{
    BUSY, CALL_GATE, CALL_GATE16, Descriptor, LDT, TASK_GATE, TSS, TSS16, null_segment,
};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, flags};
use crate::mem::canonical;

impl Cpu {
    /// Raises #GP(0) if CR4.UMIP keeps user code from looking.
    pub(super) fn check_umip(&mut self) -> Result<(), Trap> {
        if self.cpl > 0 && self.cr4().contains(Cr4::UMIP) { Err(self.gp0()) } else { Ok(()) }
    }

    fn set_zf(&mut self, set: bool) {
        let others = self.flags.arithmetic() & !flags::ZF;
        self.flags.set_arithmetic(others | if set { flags::ZF } else { 0 });
    }
}

/// LGDT, LIDT.
pub(super) fn load_table(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    let bytes = if cpu.long64() { 8 } else { 4 };
    let at = cpu.address_of(insn, bytes + 2, false)?;
    let limit = cpu.load::<u16>(at)?;
    let mut base = cpu.load_sized(cpu.wrap_linear(at.wrapping_add(2)), bytes)?;
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xFF_FFFF;
    }
    if !canonical(base) {
        return Err(cpu.gp0());
    }
    let table = DescriptorTable { base, limit };
    match insn.mnemonic() {
        Mnemonic::Lgdt => cpu.gdt = table,
        _ => cpu.idt = table,
    }
    Ok(())
}

/// SGDT, SIDT.
pub(super) fn store_table(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.check_umip()?;
    let table = if insn.mnemonic() == Mnemonic::Sgdt { cpu.gdt } else { cpu.idt };
    let bytes = if cpu.long64() { 8 } else { 4 };
    let at = cpu.address_of(insn, bytes + 2, true)?;
    cpu.probe_store(at, bytes as usize + 2)?;
    cpu.store(at, table.limit)?;
    cpu.store_sized(cpu.wrap_linear(at.wrapping_add(2)), bytes, table.base)
}

/// SLDT, STR.
pub(super) fn store_selector(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_protected()?;
    cpu.check_umip()?;
    let table = if insn.mnemonic() == Mnemonic::Sldt { cpu.ldt } else { cpu.tr };
    cpu.write_operand(insn, 0, u64::from(table.selector))
}

/// LLDT.
pub(super) fn lldt(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_protected()?;
    cpu.need_cpl0()?;
    let selector = cpu.read_operand(insn, 0)? as u16;
    cpu.load_ldt(selector, trap::GP, 0)
}

impl Cpu {
    /// Loads LDTR; what is wrong with `selector` raises `vector`.
    pub(super) fn load_ldt(&mut self, selector: u16, vector: u8, ext: u32) -> Result<(), Trap> {
        if selector & 0xFFFC == 0 {
            self.ldt = null_segment(selector, 0);
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(self.selector_fault(vector, selector, ext));
        }
        let mut descriptor = self.descriptor(selector, vector, ext)?;
        if descriptor.system_kind() != Some(LDT) {
            return Err(self.selector_fault(vector, selector, ext));
        }
        if !descriptor.present() {
            // A task switch reports every fault of the LDT selector as #TS.
            let vector = if vector == trap::TS { trap::TS } else { trap::NP };
            return Err(self.selector_fault(vector, selector, ext));
        }
        self.complete_system(&mut descriptor, vector, ext)?;
        let segment = descriptor.segment();
        if !canonical(segment.base) {
            return Err(self.selector_fault(vector, selector, ext));
        }
        self.ldt = segment;
        Ok(())
    }
}

/// LTR.
pub(super) fn ltr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_protected()?;
    cpu.need_cpl0()?;
    let selector = cpu.read_operand(insn, 0)? as u16;
    if selector & 0xFFFC == 0 {
        return Err(cpu.gp0());
    }
    if selector & 4 != 0 {
        return Err(cpu.selector_fault(trap::GP, selector, 0));
    }
    let mut descriptor = cpu.descriptor(selector, trap::GP, 0)?;
    let kind = descriptor.system_kind();
    if kind != Some(TSS) && (kind != Some(TSS16) || cpu.long_mode()) {
        return Err(cpu.selector_fault(trap::GP, selector, 0));
    }
    if !descriptor.present() {
        return Err(cpu.selector_fault(trap::NP, selector, 0));
    }
    cpu.complete_system(&mut descriptor, trap::GP, 0)?;
    let mut segment = descriptor.segment();
    if !canonical(segment.base) {
        return Err(cpu.selector_fault(trap::GP, selector, 0));
    }
    cpu.mark_busy(descriptor.at, true)?;
    segment.attributes.0 |= u32::from(BUSY);
    cpu.tr = segment;
    Ok(())
}

/// The descriptor of operand `n`'s selector, if LAR, LSL, VERR or VERW may see it.
fn visible(cpu: &mut Cpu, insn: &Instruction, n: u32) -> Result<Option<Descriptor>, Trap> {
    cpu.need_protected()?;
    let selector = cpu.read_operand(insn, n)? as u16;
    if selector & 0xFFFC == 0 || cpu.descriptor_place(selector, 8).is_none() {
        return Ok(None);
    }
    let descriptor = cpu.descriptor(selector, trap::GP, 0)?;
    let conforming = descriptor.is_code() && descriptor.conforming();
    let private = cpu.cpl.max(descriptor.rpl()) > descriptor.dpl();
    Ok((conforming || !private).then_some(descriptor))
}

/// A TSS, busy or not, of a kind that the mode knows.
fn is_tss(cpu: &Cpu, kind: u8) -> bool {
    kind | BUSY == TSS | BUSY || kind | BUSY == TSS16 | BUSY && !cpu.long_mode()
}

/// LAR.
pub(super) fn lar(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let descriptor = visible(cpu, insn, 1)?.filter(|d| match d.system_kind() {
        None => true,
        Some(LDT | CALL_GATE) => true,
        Some(CALL_GATE16 | TASK_GATE) => !cpu.long_mode(),
        Some(kind) => is_tss(cpu, kind),
    });
    if let Some(descriptor) = descriptor {
        let register = insn.op0_register();
        let mask = if register.size() == 2 { 0xFF00 } else { 0xFF_FF00 };
        cpu.set_gpr(register, descriptor.raw >> 32 & mask);
    }
    cpu.set_zf(descriptor.is_some());
    Ok(())
}

/// LSL.
pub(super) fn lsl(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let descriptor = visible(cpu, insn, 1)?.filter(|d| match d.system_kind() {
        None | Some(LDT) => true,
        Some(kind) => is_tss(cpu, kind),
    });
    if let Some(descriptor) = descriptor {
        cpu.set_gpr(insn.op0_register(), u64::from(descriptor.segment().limit));
    }
    cpu.set_zf(descriptor.is_some());
    Ok(())
}

/// VERR, VERW.
pub(super) fn verify(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let reads = insn.mnemonic() == Mnemonic::Verr;
    let descriptor = visible(cpu, insn, 0)?
        .filter(|d| if reads { d.is_readable() } else { d.is_writable_data() });
    cpu.set_zf(descriptor.is_some());
    Ok(())
}

/// ARPL.
pub(super) fn arpl(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.need_protected()?;
    let target = cpu.read_operand(insn, 0)?;
    let rpl = cpu.read_operand(insn, 1)? & 3;
    let lower = target & 3 < rpl;
    if lower {
        cpu.write_operand(insn, 0, target & !3 | rpl)?;
    } else if insn.op0_kind() == OpKind::Memory {
        // The destination is written either way.
        cpu.write_operand(insn, 0, target)?;
    }
    cpu.set_zf(lower);
    Ok(())
}
