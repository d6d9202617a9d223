//! Port I/O: IN, OUT, INS, OUTS, and who may (Intel SDM vol. 1 chapter 19).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::descriptor::{BUSY, TSS};
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, ES, Mode, RCX, RDI, RSI, W16, W32, W64, Width, flags};
use crate::exec::operand::segment_number;
use crate::mem::MODE_SUPERVISOR;

impl Cpu {
    /// Raises #GP(0) unless the program may access `bytes` ports from `port`.
    fn check_ports(&mut self, port: u16, bytes: u64) -> Result<(), Trap> {
        if !(self.mode.contains(Mode::V86) || self.protected() && self.cpl > self.iopl()) {
            return Ok(());
        }
        let tr = self.tr;
        let limit = u64::from(tr.limit);
        let known = tr.attributes.kind() | BUSY == TSS | BUSY && !tr.attributes.unusable();
        if !known || limit < 103 {
            return Err(self.gp0());
        }
        let map =
            self.load_as::<u16>(self.wrap_linear(tr.base.wrapping_add(102)), MODE_SUPERVISOR)?;
        // Two bytes are always read, so the last byte of the map must have one after it.
        let at = u64::from(map) + u64::from(port / 8);
        if at + 1 > limit {
            return Err(self.gp0());
        }
        let bits =
            self.load_as::<u16>(self.wrap_linear(tr.base.wrapping_add(at)), MODE_SUPERVISOR)?;
        let mask = (1 << bytes) - 1;
        if bits >> (port % 8) & mask != 0 { Err(self.gp0()) } else { Ok(()) }
    }

    fn port_in(&mut self, port: u16, bytes: u64) -> u64 {
        // A port that nothing answers reads as ones.
        let mut data = [0xFF; 4];
        let n = bytes.min(4) as usize;
        self.pio_read(port, &mut data[..n]);
        let value = u64::from(u32::from_le_bytes(data));
        value & (u64::MAX >> (64 - 8 * n))
    }

    fn port_out(&mut self, port: u16, bytes: u64, value: u64) {
        let data = (value as u32).to_le_bytes();
        self.pio_write(port, &data[..bytes.min(4) as usize]);
    }
}

fn port_operand(cpu: &Cpu, insn: &Instruction, n: u32) -> u16 {
    match insn.op_kind(n) {
        OpKind::Register => cpu.gpr(Register::DX) as u16,
        _ => u16::from(insn.immediate8()),
    }
}

/// IN.
pub(super) fn input(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let register = insn.op0_register();
    let bytes = register.size() as u64;
    let port = port_operand(cpu, insn, 1);
    cpu.check_ports(port, bytes)?;
    cpu.port_access(port, bytes);
    let value = cpu.port_in(port, bytes);
    cpu.set_gpr(register, value);
    Ok(())
}

/// OUT.
pub(super) fn output(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let register = insn.op1_register();
    let bytes = register.size() as u64;
    let port = port_operand(cpu, insn, 0);
    cpu.check_ports(port, bytes)?;
    cpu.port_access(port, bytes);
    cpu.port_out(port, bytes, cpu.gpr(register));
    Ok(())
}

/// A string instruction's registers, by address size.
struct Strings {
    size: u32,
    index: usize,
}

impl Strings {
    fn get(&self, cpu: &Cpu, register: usize) -> u64 {
        match self.size {
            2 => W16::get(cpu, register as u8),
            4 => W32::get(cpu, register as u8),
            _ => W64::get(cpu, register as u8),
        }
    }

    fn set(&self, cpu: &mut Cpu, register: usize, value: u64) {
        match self.size {
            2 => W16::set(cpu, register as u8, value),
            4 => W32::set(cpu, register as u8, value),
            _ => W64::set(cpu, register as u8, value),
        }
    }
}

/// INS, OUTS: element by element, each as exact as a single one. Leaves between elements, with RIP at
/// the instruction, when something wants the run loop.
pub(super) fn string(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let input = matches!(insn.mnemonic(), Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd);
    let bytes = match insn.mnemonic() {
        Mnemonic::Insb | Mnemonic::Outsb => 1,
        Mnemonic::Insw | Mnemonic::Outsw => 2,
        _ => 4,
    };
    let memory = insn.op_kind(if input { 0 } else { 1 });
    let size = match memory {
        OpKind::MemoryESDI | OpKind::MemorySegSI => 2,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => 4,
        _ => 8,
    };
    let strings = Strings { size, index: if input { RDI } else { RSI } };
    let seg = if input { ES } else { segment_number(insn.memory_segment()) };
    let port = cpu.gpr(Register::DX) as u16;
    let repeats = insn.has_rep_prefix() || insn.has_repne_prefix();
    cpu.check_ports(port, bytes)?;
    if !repeats {
        return element(cpu, &strings, seg, port, bytes);
    }
    let mut left = strings.get(cpu, RCX);
    while left != 0 {
        // An element that faults leaves the registers at itself.
        element(cpu, &strings, seg, port, bytes)?;
        left -= 1;
        strings.set(cpu, RCX, left);
        if left != 0 && (cpu.must_step() || cpu.stop || cpu.attention()) {
            cpu.rip = cpu.rip_at(insn.ip());
            if cpu.must_step() {
                // A code breakpoint here has been reported already.
                cpu.flags.rest |= flags::RF;
            }
            return Ok(());
        }
    }
    Ok(())
}

fn element(
    cpu: &mut Cpu,
    strings: &Strings,
    seg: usize,
    port: u16,
    bytes: u64,
) -> Result<(), Trap> {
    let index = strings.get(cpu, strings.index);
    let input = strings.index == RDI;
    let linear = cpu.linear(seg, index, bytes, input)?;
    if input {
        // The port must not be read if the store would fault.
        cpu.probe_store(linear, bytes as usize)?;
        cpu.port_access(port, bytes);
        let value = cpu.port_in(port, bytes);
        cpu.store_sized(linear, bytes, value)?;
    } else {
        let value = cpu.load_sized(linear, bytes)?;
        cpu.port_access(port, bytes);
        cpu.port_out(port, bytes, value);
    }
    let step = if cpu.flags.rest & flags::DF != 0 { bytes.wrapping_neg() } else { bytes };
    strings.set(cpu, strings.index, index.wrapping_add(step));
    Ok(())
}
