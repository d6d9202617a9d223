//! x87 state as a whole: FNSTENV, FLDENV, FNSAVE, FRSTOR (Intel SDM vol. 1 §8.1.10), FXSAVE and
//! FXRSTOR (vol. 1 §10.5).

use iced_x86::{Instruction, Mnemonic};

use super::Fpu;
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Mode};
use crate::mem::{Access, canonical};
use crate::sse::MXCSR_MASK;

/// The environment's layout.
#[derive(Clone, Copy)]
struct Layout {
    /// Fields of four bytes, else two.
    wide: bool,
    /// Pointers as in protected mode, else as linear addresses.
    protected: bool,
}

impl Layout {
    fn of(cpu: &Cpu, insn: &Instruction) -> Self {
        let bytes = insn.memory_size().size();
        Self {
            wide: bytes == 28 || bytes == 108,
            protected: cpu.mode.intersects(Mode::PROTECTED | Mode::LMA),
        }
    }

    fn bytes(self) -> usize {
        if self.wide { 28 } else { 14 }
    }

    fn put(self, out: &mut [u8], field: usize, value: u32) {
        if self.wide {
            // The unused upper halves of 16-bit fields read as ones.
            out[field * 4..field * 4 + 4].copy_from_slice(&value.to_le_bytes());
        } else {
            out[field * 2..field * 2 + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
    }

    fn get(self, from: &[u8], field: usize) -> u32 {
        let size = if self.wide { 4 } else { 2 };
        let bytes = from.iter().skip(field * size).take(size);
        bytes.rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
    }

    fn store(self, fpu: &Fpu, out: &mut [u8]) {
        let high = if self.wide { 0xFFFF_0000 } else { 0 };
        self.put(out, 0, u32::from(fpu.fcw) | high);
        self.put(out, 1, u32::from(fpu.fsw) | high);
        self.put(out, 2, u32::from(fpu.full_tags()) | high);
        let (fip, fdp) = (fpu.fip as u32, fpu.fdp as u32);
        if self.protected {
            self.put(out, 3, fip);
            self.put(out, 4, 0);
            self.put(out, 5, fdp);
            self.put(out, 6, high);
        } else {
            self.put(out, 3, fip & 0xFFFF | high);
            self.put(out, 4, (fip >> 16) << 12);
            self.put(out, 5, fdp & 0xFFFF | high);
            self.put(out, 6, (fdp >> 16) << 12);
        }
    }

    fn load(self, fpu: &mut Fpu, from: &[u8]) {
        // Registers are named from the top: a new top renames them.
        let physical = fpu.in_physical_order();
        fpu.fcw = self.get(from, 0) as u16;
        fpu.fsw = self.get(from, 1) as u16;
        fpu.set_full_tags(self.get(from, 2) as u16);
        if self.protected {
            fpu.fip = self.get(from, 3).into();
            fpu.fdp = self.get(from, 5).into();
        } else {
            fpu.fip = u64::from(self.get(from, 3) & 0xFFFF | self.get(from, 4) >> 12 << 16);
            fpu.fdp = u64::from(self.get(from, 5) & 0xFFFF | self.get(from, 6) >> 12 << 16);
        }
        fpu.fop = 0;
        fpu.set_physical(physical);
        fpu.sanitize();
    }
}

pub(super) fn fnstenv(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(false)?;
    let layout = Layout::of(cpu, insn);
    let mut bytes = [0; 28];
    layout.store(&cpu.fpu, &mut bytes);
    store(cpu, insn, &bytes[..layout.bytes()])?;
    // All exceptions are masked afterwards.
    cpu.fpu.fcw |= 0x3F;
    cpu.fpu.sanitize();
    Ok(())
}

pub(super) fn fldenv(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(true)?;
    let layout = Layout::of(cpu, insn);
    let mut bytes = [0; 28];
    load(cpu, insn, &mut bytes[..layout.bytes()])?;
    layout.load(&mut cpu.fpu, &bytes);
    Ok(())
}

pub(super) fn fnsave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(false)?;
    let layout = Layout::of(cpu, insn);
    let mut bytes = [0; 108];
    let env = layout.bytes();
    layout.store(&cpu.fpu, &mut bytes[..env]);
    for (i, st) in cpu.fpu.st.iter().enumerate() {
        bytes[env + 10 * i..env + 10 * i + 10].copy_from_slice(&st.to_le_bytes()[..10]);
    }
    store(cpu, insn, &bytes[..env + 80])?;
    cpu.fpu = Fpu { st: cpu.fpu.in_physical_order(), ..Fpu::new() };
    Ok(())
}

pub(super) fn frstor(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.x87_ready(true)?;
    let layout = Layout::of(cpu, insn);
    let env = layout.bytes();
    let mut bytes = [0; 108];
    load(cpu, insn, &mut bytes[..env + 80])?;
    layout.load(&mut cpu.fpu, &bytes[..env]);
    for (i, st) in cpu.fpu.st.iter_mut().enumerate() {
        let ten = bytes.iter().skip(env + 10 * i).take(10);
        *st = ten.rev().fold(0, |value, &byte| value << 8 | u128::from(byte));
    }
    Ok(())
}

/// The checks before FXSAVE and FXRSTOR.
fn ready(cpu: &mut Cpu, insn: &Instruction, write: bool) -> Result<u64, Trap> {
    if cpu.mode.contains(Mode::MMX_UD) {
        return Err(cpu.ud());
    }
    if cpu.mode.contains(Mode::NO_X87) {
        return Err(cpu.raise(trap::NM));
    }
    let linear = cpu.address_of(insn, 512, write)?;
    // A non-canonical address is found before a misaligned one.
    if linear & 15 != 0 && (!cpu.long64() || canonical(linear)) {
        return Err(cpu.gp0());
    }
    Ok(linear)
}

/// Bytes of the image that FXSAVE writes and FXRSTOR reads: XMM8 to XMM15 exist in 64-bit mode only,
/// and what is behind them is left alone.
fn image_bytes(cpu: &Cpu) -> usize {
    if cpu.long64() { 416 } else { 288 }
}

pub(super) fn fxsave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let linear = ready(cpu, insn, true)?;
    cpu.fp_leave();
    let mut image = cpu.fxsave_image();
    if insn.mnemonic() == Mnemonic::Fxsave {
        // Selectors, which are always zero, take the upper halves of the pointers.
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    let (bytes, mode) = (image_bytes(cpu), cpu.tlb_mode);
    cpu.probe_store(linear, 512)?;
    cpu.store_bytes(linear, &image[..bytes], mode)
}

pub(super) fn fxrstor(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let linear = ready(cpu, insn, false)?;
    let mut image = [0; 512];
    let (bytes, mode) = (image_bytes(cpu), cpu.tlb_mode);
    cpu.load_bytes(linear, &mut image, mode)?;
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp0());
    }
    if insn.mnemonic() == Mnemonic::Fxrstor {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    cpu.fp_leave();
    cpu.load_x87_image(&image);
    cpu.load_sse_image(&image, (bytes - 160) / 16);
    cpu.set_mxcsr(mxcsr)
}

fn store(cpu: &mut Cpu, insn: &Instruction, bytes: &[u8]) -> Result<(), Trap> {
    let linear = cpu.address_of(insn, bytes.len() as u64, true)?;
    let field = if Layout::of(cpu, insn).wide { 4 } else { 2 };
    cpu.check_operand(linear, bytes.len(), field, Access::Write)?;
    let mode = cpu.tlb_mode;
    cpu.store_bytes(linear, bytes, mode)
}

fn load(cpu: &mut Cpu, insn: &Instruction, bytes: &mut [u8]) -> Result<(), Trap> {
    let linear = cpu.address_of(insn, bytes.len() as u64, false)?;
    let field = if Layout::of(cpu, insn).wide { 4 } else { 2 };
    cpu.check_operand(linear, bytes.len(), field, Access::Read)?;
    let mode = cpu.tlb_mode;
    cpu.load_bytes(linear, bytes, mode)
}
