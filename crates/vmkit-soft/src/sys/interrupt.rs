//! INT n, INT3, INTO, INT1 and BOUND: events that a program asks for.

use iced_x86::{Instruction, Mnemonic};

use super::exception::{Event, Origin};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, flags};

fn deliver(cpu: &mut Cpu, vector: u8, origin: Origin) -> Result<(), Trap> {
    cpu.deliver(Event { vector, error: None, origin })?;
    // TF is clear in the handler: the step ends here.
    cpu.step.over = true;
    Ok(())
}

/// INT n.
pub(super) fn int(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    deliver(cpu, insn.immediate8(), Origin::Int)
}

/// INT3.
pub(super) fn int3(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    deliver(cpu, trap::BP, Origin::IntShort)
}

/// INTO.
pub(super) fn into(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    if cpu.flags.arithmetic() & flags::OF == 0 {
        return Ok(());
    }
    deliver(cpu, trap::OF, Origin::IntShort)
}

/// INT1: #DB without a condition in DR6.
pub(super) fn int1(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    deliver(cpu, trap::DB, Origin::Processor)
}

/// BOUND.
pub(super) fn bound(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    debug_assert_eq!(insn.mnemonic(), Mnemonic::Bound);
    let register = insn.op0_register();
    let bytes = register.size() as u64;
    let at = cpu.address_of(insn, 2 * bytes, false)?;
    let low = cpu.load_sized(at, bytes)?;
    let high = cpu.load_sized(cpu.wrap_linear(at.wrapping_add(bytes)), bytes)?;
    let signed = |value: u64| match bytes {
        2 => i64::from(value as i16),
        _ => i64::from(value as i32),
    };
    let index = signed(cpu.gpr(register));
    if index < signed(low) || index > signed(high) {
        return Err(cpu.raise(trap::BR));
    }
    Ok(())
}
