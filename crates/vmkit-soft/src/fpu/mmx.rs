//! MMX: everything with an MM register operand.
//!
//! The eight registers are the mantissas of the x87 registers by their physical numbers. Any of these
//! instructions but EMMS makes all of them valid and the top of the stack 0
//! (Intel SDM vol. 1 §9.6.2).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::host::{self, Map};
use super::is_mm;
use crate::code::{ColdChoice, ColdFn, Ends};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Mode, RDI};

/// How an instruction with an MM operand runs.
pub(super) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    use Mnemonic as M;
    let run: ColdFn = match insn.mnemonic() {
        M::Movd | M::Movq | M::Movntq => moves,
        M::Movq2dq => movq2dq,
        M::Movdq2q => movdq2q,
        M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi => to_integers,
        M::Cvtpi2ps | M::Cvtpi2pd => from_integers,
        M::Pmovmskb => pmovmskb,
        M::Pextrw => pextrw,
        M::Pinsrw => pinsrw,
        M::Pshufw => pshufw,
        M::Palignr => palignr,
        M::Maskmovq => maskmovq,
        _ if insn.op_count() == 2 => two_operands,
        _ => return None,
    };
    Some((run, Ends::No))
}

impl Cpu {
    /// The checks before an MMX instruction.
    fn mmx_ready(&mut self) -> Result<(), Trap> {
        if self.mode.contains(Mode::MMX_UD) {
            return Err(self.ud());
        }
        if self.mode.contains(Mode::SSE_NM) {
            return Err(self.raise(trap::NM));
        }
        self.x87_pending()
    }

    /// The registers become MMX registers.
    fn mmx_begin(&mut self) {
        let physical = self.fpu.in_physical_order();
        self.fpu.fsw &= !0x3800;
        self.fpu.ftw = 0xFF;
        self.fpu.st = physical;
    }

    /// An MM register, whether the unit is in MMX use or not.
    fn mm(&self, register: Register) -> u64 {
        self.fpu.in_physical_order()[register.number() & 7] as u64
    }

    fn set_mm(&mut self, register: Register, value: u64) {
        self.mmx_begin();
        self.fpu.st[register.number() & 7] = u128::from(value) | 0xFFFF << 64;
    }

    /// Reads operand `n`: an MM register, or up to eight bytes of memory.
    fn mm_operand(&mut self, insn: &Instruction, n: u32) -> Result<u64, Trap> {
        if is_mm(insn.op_register(n)) && insn.op_kind(n) == OpKind::Register {
            return Ok(self.mm(insn.op_register(n)));
        }
        self.read_operand(insn, n)
    }
}

/// EMMS: all registers empty, the top of the stack 0.
pub(super) fn emms(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    cpu.mmx_begin();
    cpu.fpu.ftw = 0;
    Ok(())
}

/// MOVD and MOVQ between MM registers, general registers and memory.
fn moves(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let value = cpu.mm_operand(insn, 1)?;
    if insn.op0_kind() == OpKind::Register && is_mm(insn.op0_register()) {
        cpu.set_mm(insn.op0_register(), value);
        return Ok(());
    }
    cpu.write_operand(insn, 0, value)?;
    cpu.mmx_begin();
    Ok(())
}

fn movq2dq(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    sse_ready(cpu)?;
    let value = cpu.mm(insn.op1_register());
    let vector = &mut cpu.vectors[insn.op0_register().number() & 15];
    (vector.0[0], vector.0[1]) = (value, 0);
    cpu.mmx_begin();
    Ok(())
}

fn movdq2q(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    sse_ready(cpu)?;
    let value = cpu.vectors[insn.op1_register().number() & 15].0[0];
    cpu.set_mm(insn.op0_register(), value);
    Ok(())
}

/// The checks before an instruction that uses XMM registers too.
fn sse_ready(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.mode.contains(Mode::SSE_UD) {
        return Err(cpu.ud());
    }
    cpu.mmx_ready()
}

/// The guest's MXCSR with every exception masked and no flag set.
fn quiet(cpu: &mut Cpu) -> u32 {
    cpu.current_mxcsr() & !0x3F | 0x1F80
}

/// Records raised flags; #XM (or #UD) if one is unmasked.
fn raised(cpu: &mut Cpu, flags: u32) -> Result<(), Trap> {
    let unmasked = !(cpu.mxcsr >> 7) & 0x3F;
    if flags & unmasked == 0 {
        cpu.mxcsr |= flags;
        return Ok(());
    }
    // An unmasked exception of the operands (IE, DE, ZE) comes before those of the result
    // (Intel SDM vol. 1 §11.5.3).
    cpu.mxcsr |= if flags & unmasked & 7 != 0 { flags & 7 } else { flags };
    let supported = cpu.cr4().contains(vmkit_hypervisor::x86::Cr4::OSXMMEXCPT);
    Err(cpu.raise(if supported { trap::XM } else { trap::UD }))
}

/// CVTPS2PI and kin.
fn to_integers(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    sse_ready(cpu)?;
    let double = matches!(insn.mnemonic(), Mnemonic::Cvtpd2pi | Mnemonic::Cvttpd2pi);
    let source = if insn.op1_kind() == OpKind::Register {
        let vector = cpu.vectors[insn.op1_register().number() & 15].0;
        [vector[0], vector[1]]
    } else if double {
        let linear = cpu.address_of(insn, 16, false)?;
        if linear & 15 != 0 {
            return Err(cpu.gp0());
        }
        let value = cpu.load::<u128>(linear)?;
        [value as u64, (value >> 64) as u64]
    } else {
        [cpu.read_operand(insn, 1)?, 0]
    };
    let mxcsr = quiet(cpu);
    let (value, flags) = match insn.mnemonic() {
        Mnemonic::Cvtps2pi => host::cvtps2pi(source, mxcsr),
        Mnemonic::Cvttps2pi => host::cvttps2pi(source, mxcsr),
        Mnemonic::Cvtpd2pi => host::cvtpd2pi(source, mxcsr),
        _ => host::cvttpd2pi(source, mxcsr),
    };
    cpu.mmx_begin();
    raised(cpu, flags)?;
    cpu.set_mm(insn.op0_register(), value);
    Ok(())
}

/// CVTPI2PS and CVTPI2PD.
fn from_integers(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    // With a memory operand, these leave the x87 unit alone, and what waits there.
    if insn.op1_kind() == OpKind::Register {
        sse_ready(cpu)?;
    } else {
        cpu.sse_allowed()?;
    }
    let source = cpu.mm_operand(insn, 1)?;
    let to = insn.op0_register().number() & 15;
    let before = [cpu.vectors[to].0[0], cpu.vectors[to].0[1]];
    let mxcsr = quiet(cpu);
    let (value, flags) = if insn.mnemonic() == Mnemonic::Cvtpi2ps {
        host::cvtpi2ps(source, before, mxcsr)
    } else {
        host::cvtpi2pd(source, before, mxcsr)
    };
    if insn.op1_kind() == OpKind::Register {
        cpu.mmx_begin();
    }
    raised(cpu, flags)?;
    cpu.vectors[to].0[..2].copy_from_slice(&value);
    Ok(())
}

fn pmovmskb(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let bytes = cpu.mm(insn.op1_register()).to_le_bytes();
    let mask = bytes.iter().enumerate().fold(0, |m, (i, b)| m | u64::from(b >> 7) << i);
    cpu.mmx_begin();
    cpu.set_gpr(insn.op0_register(), mask);
    Ok(())
}

fn pextrw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let word = cpu.mm(insn.op1_register()) >> (16 * (insn.immediate(2) & 3)) & 0xFFFF;
    cpu.mmx_begin();
    cpu.set_gpr(insn.op0_register(), word);
    Ok(())
}

fn pinsrw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let word = cpu.read_operand(insn, 1)? & 0xFFFF;
    let shift = 16 * (insn.immediate(2) & 3);
    let value = cpu.mm(insn.op0_register()) & !(0xFFFF << shift) | word << shift;
    cpu.set_mm(insn.op0_register(), value);
    Ok(())
}

fn pshufw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let source = cpu.mm_operand(insn, 1)?;
    let order = insn.immediate(2);
    let value = (0..4).fold(0, |value, i| {
        let word = source >> (16 * (order >> (2 * i) & 3)) & 0xFFFF;
        value | word << (16 * i)
    });
    cpu.set_mm(insn.op0_register(), value);
    Ok(())
}

fn palignr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let low = cpu.mm_operand(insn, 1)?;
    let both = u128::from(cpu.mm(insn.op0_register())) << 64 | u128::from(low);
    let shift = (insn.immediate(2) & 0xFF) * 8;
    let value = if shift < 128 { (both >> shift) as u64 } else { 0 };
    cpu.set_mm(insn.op0_register(), value);
    Ok(())
}

/// MASKMOVQ: the bytes whose mask has its top bit set go to DS:[rDI].
fn maskmovq(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let (data, mask) = (cpu.mm(insn.op1_register()), cpu.mm(insn.op2_register()));
    let width = match insn.op0_kind() {
        OpKind::MemorySegDI => 0xFFFF,
        OpKind::MemorySegEDI => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    let segment = crate::exec::operand::segment_number(insn.memory_segment());
    let linear = cpu.linear(segment, cpu.regs[RDI] & width, 8, true)?;
    cpu.mmx_begin();
    cpu.store_masked(linear, &data.to_le_bytes(), &mask.to_le_bytes())
}

/// Packed arithmetic, comparisons, packs, shifts: on the host's unit.
fn two_operands(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.mmx_ready()?;
    let info = insn.op_code();
    let map = match info.table() {
        iced_x86::OpCodeTableKind::T0F => Map::Two,
        iced_x86::OpCodeTableKind::T0F38 => Map::Three38,
        _ => return Err(cpu.unimplemented()),
    };
    let a = cpu.mm(insn.op0_register());
    let mut opcode = info.op_code() as u8;
    let b = match insn.op1_kind() {
        OpKind::Register | OpKind::Memory => cpu.mm_operand(insn, 1)?,
        _ => {
            // A shift by an immediate: the form with a register shifts by the same number.
            let (group, which) = (opcode & 3, info.group_index());
            opcode = match which {
                2 => 0xD0 | group,
                4 => 0xE0 | group,
                _ => 0xF0 | group,
            };
            insn.immediate(1) & 0xFF
        }
    };
    let value = host::mmx(map, opcode, a, b);
    cpu.set_mm(insn.op0_register(), value);
    Ok(())
}
