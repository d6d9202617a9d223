//! x87, MMX and the state they share with FXSAVE.
//!
//! Arithmetic is done by the host's own x87 and MMX units (`host`): the guest's state is loaded into
//! them for one instruction and taken out again, so that results, flags and stack faults are what
//! silicon gives. Everything that moves state as a whole (FLDENV, FNSAVE, FXSAVE…) is done here.

mod control;
mod environment;
mod host;
mod image;
mod mmx;
mod x87;

use iced_x86::{Instruction, Mnemonic, Register};

use crate::code::{ColdChoice, ColdFn, Ends};
pub(crate) use image::Fpu;

/// How an instruction of these groups runs; none for others.
pub(crate) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    use Mnemonic as M;
    let run: ColdFn = match insn.mnemonic() {
        M::Wait => control::wait,
        M::Fninit => control::fninit,
        M::Fnclex => control::fnclex,
        M::Fldcw => control::fldcw,
        M::Fnstcw => control::fnstcw,
        M::Fnstsw => control::fnstsw,
        // Left over from the 8087 and 287: nothing happens.
        M::Fneni | M::Fndisi | M::Fnsetpm | M::Frstpm => control::nothing,
        M::Fnstenv => environment::fnstenv,
        M::Fldenv => environment::fldenv,
        M::Fnsave => environment::fnsave,
        M::Frstor => environment::frstor,
        M::Fxsave | M::Fxsave64 => environment::fxsave,
        M::Fxrstor | M::Fxrstor64 => environment::fxrstor,
        M::Emms => mmx::emms,
        // With a memory operand these two have no MM register, and belong here all the same.
        M::Cvtpi2ps | M::Cvtpi2pd => return mmx::cold(insn),
        _ if has_mm_operand(insn) => return mmx::cold(insn),
        _ if is_x87(insn) => x87::run,
        _ => return None,
    };
    Some((run, Ends::No))
}

fn has_mm_operand(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| is_mm(insn.op_register(n)))
}

fn is_mm(register: Register) -> bool {
    register.is_mm()
}

/// True for instructions that compute in the x87 unit: opcodes D8 to DF.
fn is_x87(insn: &Instruction) -> bool {
    x87::opcode(insn).is_some()
}
