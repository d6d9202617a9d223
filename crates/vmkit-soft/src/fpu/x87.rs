//! x87 arithmetic, loads and stores: on the host's unit.

use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind, OpKind};

use super::host::{Image, x87_on_memory, x87_register};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Mode};
use crate::mem::Access;

/// Opcode byte and ModRM byte (register form) or its reg field (memory form), if `insn` is one of the
/// instructions D8 to DF.
pub(super) fn opcode(insn: &Instruction) -> Option<(u8, u8)> {
    let info = insn.op_code();
    let code = info.op_code();
    let memory = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory
        || insn.op_count() > 1 && insn.op1_kind() == OpKind::Memory;
    if memory {
        let reg = u8::try_from(info.group_index()).ok()?;
        return (0xD8..=0xDF).contains(&code).then_some((code as u8, reg));
    }
    if !(0xD8C0..=0xDFFF).contains(&code) {
        return None;
    }
    let index = (0..insn.op_count())
        .find(|&n| info.op_kind(n) == OpCodeOperandKind::sti_opcode)
        .map_or(0, |n| insn.op_register(n).number());
    Some(((code >> 8) as u8, (code as u8).wrapping_add(index as u8)))
}

impl Cpu {
    /// The checks before an x87 instruction: #NM, and unless it is one that does not wait, #MF for an
    /// exception that an earlier one left pending. With CR0.NE clear a PC would signal it through
    /// IRQ 13; this processor raises #MF then too.
    pub(super) fn x87_ready(&mut self, waits: bool) -> Result<(), Trap> {
        if self.mode.contains(Mode::NO_X87) {
            return Err(self.raise(trap::NM));
        }
        if waits { self.x87_pending() } else { Ok(()) }
    }

    /// #MF if an unmasked exception is pending.
    pub(super) fn x87_pending(&mut self) -> Result<(), Trap> {
        if self.fpu.fsw & !self.fpu.fcw & 0x3F != 0 {
            return Err(self.raise(trap::MF));
        }
        Ok(())
    }
}

/// True for an instruction that writes its memory operand.
fn stores(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp)
}

/// Any x87 instruction but those that move control words or the whole state.
pub(super) fn run(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(true)?;
    let Some((opcode, form)) = opcode(insn) else { return Err(cpu.unimplemented()) };
    // FXRSTOR in the stub replaces MXCSR: what the guest raised there is taken out first.
    cpu.fp_leave();
    if form >= 0xC0 {
        let mut image = cpu.x87_image();
        let flags = x87_register(&mut image, opcode, form, cpu.flags.arithmetic() | 2);
        if insn.rflags_modified() != 0 {
            cpu.flags.set_arithmetic(flags);
        }
        cpu.load_x87_image(&image.0);
        cpu.note_x87(insn, None);
        return Ok(());
    }
    let bytes = insn.memory_size().size().min(16);
    let store = stores(insn.mnemonic());
    let linear = cpu.address_of(insn, bytes as u64, store)?;
    let access = if store { Access::Write } else { Access::Read };
    // 80-bit operands want the alignment of 64-bit ones (Intel SDM vol. 3A table 7-7).
    cpu.check_operand(linear, bytes, if bytes == 10 { 8 } else { bytes as u64 }, access)?;
    if store {
        cpu.probe_store(linear, bytes)?;
    }
    let mut operand = [0; 16];
    let mode = cpu.tlb_mode;
    // A store that an unmasked exception suppresses leaves memory alone: what is stored then is what
    // was there.
    cpu.load_bytes(linear, &mut operand[..bytes], mode)?;
    let mut image = cpu.x87_image();
    x87_on_memory(&mut image, opcode, form, &mut operand);
    if store {
        cpu.store_bytes(linear, &operand[..bytes], mode)?;
    }
    cpu.load_x87_image(&image.0);
    cpu.note_x87(insn, Some(linear));
    Ok(())
}

impl Cpu {
    /// The x87 state as an image for the host's unit.
    pub(super) fn x87_image(&self) -> Image {
        let mut image = Image([0; 512]);
        self.put_x87(&mut image.0);
        image.0[24..28].copy_from_slice(&crate::sse::MXCSR_RESET.to_le_bytes());
        image
    }

    /// Records the last instruction and operand, as FNSTENV tells them. The opcode is not recorded:
    /// FOP reads as zero.
    pub(super) fn note_x87(&mut self, insn: &Instruction, operand: Option<u64>) {
        self.fpu.fip = self.rip_at(insn.ip());
        self.fpu.fop = 0;
        if let Some(linear) = operand {
            self.fpu.fdp = linear;
        }
    }
}
