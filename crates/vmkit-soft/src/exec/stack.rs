//! The stack: pushes and pops of any size, and the rare instructions built on them.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::code::{ColdChoice, Ends};
use crate::cpu::trap::{self, Trap, TrapKind};
use crate::cpu::{Cpu, RBP, RSP, SS};

impl Cpu {
    /// Pushes eight bytes in 64-bit mode.
    #[inline(always)]
    pub fn push64(&mut self, value: u64) -> Result<(), Trap> {
        let sp = self.regs[RSP].wrapping_sub(8);
        self.store(sp, value)?;
        self.regs[RSP] = sp;
        Ok(())
    }

    /// RSP plus `by`, in the stack's width.
    pub fn sp_plus(&self, by: u64) -> u64 {
        self.regs[RSP].wrapping_add(by) & self.stack_mask()
    }

    /// Moves the stack pointer, leaving bits above the stack's width.
    pub fn add_sp(&mut self, by: u64) {
        let sp = self.sp_plus(by);
        self.set_sp(sp);
    }

    /// Sets the stack pointer, leaving bits above the stack's width.
    pub fn set_sp(&mut self, sp: u64) {
        let mask = self.stack_mask();
        self.regs[RSP] =
            if mask == 0xFFFF { self.regs[RSP] & !mask | sp & mask } else { sp & mask };
    }

    /// Pushes 2, 4 or 8 bytes in any mode.
    pub fn push_sized(&mut self, value: u64, bytes: u64) -> Result<(), Trap> {
        let sp = self.sp_plus(bytes.wrapping_neg());
        let linear = self.linear(SS, sp, bytes, true)?;
        let stored = self.store_sized(linear, bytes, value);
        self.on_stack(stored)?;
        self.set_sp(sp);
        Ok(())
    }

    /// A non-canonical address on the stack is #SS(0).
    pub(super) fn on_stack<T>(&mut self, access: Result<T, Trap>) -> Result<T, Trap> {
        if access.is_err() && self.trap == TrapKind::NonCanonical {
            return Err(self.raise_with(trap::SS, 0));
        }
        access
    }

    /// Reads the top of the stack without popping it.
    pub fn peek_sized(&mut self, bytes: u64) -> Result<u64, Trap> {
        self.peek_at(0, bytes)
    }

    /// Reads the stack `above` bytes above its top.
    pub fn peek_at(&mut self, above: u64, bytes: u64) -> Result<u64, Trap> {
        let sp = self.sp_plus(above);
        let linear = self.linear(SS, sp, bytes, false)?;
        let loaded = self.load_sized(linear, bytes);
        self.on_stack(loaded)
    }

    /// Checks that a push of `bytes` that ends at `sp` would not fault.
    fn probe_push(&mut self, sp: u64, bytes: u64) -> Result<(), Trap> {
        let linear = self.linear(SS, sp, bytes, true)?;
        let probed = self.probe_store(linear, bytes as usize);
        self.on_stack(probed)
    }
}

fn push(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = cpu.read_operand(insn, 0)?;
    cpu.push_sized(value, push_bytes(insn))
}

/// The bytes a push or pop moves.
fn push_bytes(insn: &Instruction) -> u64 {
    u64::from(insn.stack_pointer_increment().unsigned_abs())
}

fn pop(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes = push_bytes(insn);
    let value = cpu.peek_sized(bytes)?;
    if insn.op_kind(0) == OpKind::Register {
        cpu.add_sp(bytes);
        return cpu.write_operand(insn, 0, value);
    }
    // The address of POP [rSP + n] is computed after the stack pointer moved.
    let before = cpu.regs[RSP];
    cpu.add_sp(bytes);
    let done = cpu.write_operand(insn, 0, value);
    if done.is_err() {
        cpu.regs[RSP] = before;
    }
    done
}

/// PUSHA: all eight, or none.
fn pusha(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes: u64 = if insn.mnemonic() == Mnemonic::Pushad { 4 } else { 2 };
    for slot in 0..8_u64 {
        let sp = cpu.sp_plus((bytes * (8 - slot)).wrapping_neg());
        cpu.probe_push(sp, bytes)?;
    }
    let old = cpu.regs[RSP];
    for register in 0..8 {
        let value = if register == RSP { old } else { cpu.regs[register] };
        cpu.push_sized(value, bytes)?;
    }
    Ok(())
}

fn popa(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes: u64 = if insn.mnemonic() == Mnemonic::Popad { 4 } else { 2 };
    let mut values = [0; 8];
    for (slot, value) in values.iter_mut().enumerate() {
        *value = cpu.peek_at(slot as u64 * bytes, bytes)?;
    }
    for (slot, value) in values.into_iter().enumerate() {
        let register = 7 - slot;
        if register != RSP {
            let keep = if bytes == 2 { cpu.regs[register] & !0xFFFF } else { 0 };
            cpu.regs[register] = keep | value;
        }
    }
    cpu.add_sp(8 * bytes);
    Ok(())
}

/// ENTER (Intel SDM vol. 2A, ENTER).
fn enter(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes: u64 = match insn.mnemonic() {
        Mnemonic::Enter if insn.code() == iced_x86::Code::Enterw_imm16_imm8 => 2,
        _ if cpu.long64() => 8,
        _ => 4,
    };
    let size = insn.immediate(0) & 0xFFFF;
    let level = insn.immediate(1) & 31;
    let mask = cpu.stack_mask();
    let frame_pointer = cpu.regs[RBP];
    // Everything is checked before anything is stored; then pointers are copied one by one, because
    // the old frame and the new one may overlap.
    let frame = cpu.sp_plus(bytes.wrapping_neg());
    let pushes = if level == 0 { 1 } else { 1 + level };
    let pointer = |cpu: &mut Cpu, i: u64| {
        let at = frame_pointer.wrapping_sub(i * bytes) & mask;
        let linear = cpu.linear(SS, at, bytes, false)?;
        let value = cpu.load_sized(linear, bytes);
        cpu.on_stack(value)
    };
    cpu.probe_push(frame, bytes)?;
    for i in 1..level {
        pointer(cpu, i)?;
    }
    for i in 1..=pushes {
        let sp = cpu.sp_plus((i * bytes).wrapping_neg());
        cpu.probe_push(sp, bytes)?;
    }
    let last = cpu.sp_plus((pushes * bytes).wrapping_add(size).wrapping_neg());
    cpu.probe_push(last, bytes)?;
    cpu.push_sized(frame_pointer, bytes)?;
    for i in 1..level {
        let value = pointer(cpu, i)?;
        cpu.push_sized(value, bytes)?;
    }
    if level > 0 {
        cpu.push_sized(frame, bytes)?;
    }
    cpu.regs[RBP] = match bytes {
        2 => cpu.regs[RBP] & !0xFFFF | frame & 0xFFFF,
        4 => frame & 0xFFFF_FFFF,
        _ => frame,
    };
    cpu.set_sp(last);
    Ok(())
}

fn leave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes = match insn.mnemonic() {
        Mnemonic::Leave if insn.code() == iced_x86::Code::Leavew => 2,
        _ if cpu.long64() => 8,
        _ => 4,
    };
    let sp = cpu.regs[RBP] & cpu.stack_mask();
    let linear = cpu.linear(SS, sp, bytes, false)?;
    let value = cpu.load_sized(linear, bytes)?;
    cpu.set_sp(sp.wrapping_add(bytes));
    cpu.regs[RBP] = match bytes {
        2 => cpu.regs[RBP] & !0xFFFF | value,
        _ => value,
    };
    Ok(())
}

/// The stack instructions that have no operation of their own.
pub(super) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    let segment = insn.op0_register().is_segment_register();
    let run: crate::code::ColdFn = match insn.mnemonic() {
        Mnemonic::Push if !segment => push,
        Mnemonic::Pop if !segment => pop,
        Mnemonic::Pusha | Mnemonic::Pushad => pusha,
        Mnemonic::Popa | Mnemonic::Popad => popa,
        Mnemonic::Enter => enter,
        Mnemonic::Leave => leave,
        _ => return None,
    };
    Some((run, Ends::No))
}
