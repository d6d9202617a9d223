//! x87 control: control and status words, WAIT, initialisation.

use iced_x86::{Instruction, OpKind};

use super::Fpu;
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Mode};

/// WAIT: #NM with CR0.TS and CR0.MP, then #MF for a pending exception.
pub(super) fn wait(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    if cpu.mode.contains(Mode::WAIT_NM) {
        return Err(cpu.raise(trap::NM));
    }
    cpu.x87_pending()
}

pub(super) fn nothing(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(false)
}

/// FNINIT: control words and tags; the registers keep their values.
pub(super) fn fninit(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(false)?;
    cpu.fpu = Fpu { st: cpu.fpu.in_physical_order(), ..Fpu::new() };
    Ok(())
}

pub(super) fn fnclex(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(false)?;
    cpu.fpu.fsw &= 0x7F00;
    Ok(())
}

pub(super) fn fldcw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(true)?;
    cpu.fpu.fcw = cpu.read_operand(insn, 0)? as u16;
    cpu.fpu.sanitize();
    Ok(())
}

pub(super) fn fnstcw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(false)?;
    let fcw = cpu.fpu.fcw.into();
    cpu.write_operand(insn, 0, fcw)
}

pub(super) fn fnstsw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(false)?;
    let fsw = cpu.fpu.fsw.into();
    debug_assert!(matches!(insn.op0_kind(), OpKind::Register | OpKind::Memory));
    cpu.write_operand(insn, 0, fsw)
}
