//! SSE and its kin, executed by the host's own vector unit.
//!
//! Each instruction becomes an operation whose code loads the guest's registers into host registers,
//! executes the same instruction by inline assembly, and stores the result. Nothing here is emulated
//! in software that the host can do; what the host cannot do is not listed ([`host_features`]).
//! Moves, which need no arithmetic, are plain Rust.

mod avx;
mod control;
mod exact;
mod host;
mod immediate;
mod lane;
mod moves;
mod strings;
mod table;
#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, OpKind};
use vmkit_hypervisor::{Feature, FeatureSet};

pub(crate) use control::{MXCSR_MASK, MXCSR_RESET};

use crate::code::{ColdChoice, Ends, Next, Op, OpRef};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Mode, RDI};
use crate::exec::branch::undefined;
use crate::exec::operand::{register_number, segment_number};

/// What this module can execute on this host.
pub(crate) fn host_features() -> FeatureSet {
    use Feature as F;
    let mut features = FeatureSet::of(&[F::Fpu, F::Mmx, F::Fxsr, F::Sse, F::Sse2]);
    // Some AVX instructions are executed by AVX2 ones.
    let avx2 = is_x86_feature_detected!("avx2");
    let host = [
        (F::Sse3, is_x86_feature_detected!("sse3")),
        (F::Ssse3, is_x86_feature_detected!("ssse3")),
        (F::Sse4_1, is_x86_feature_detected!("sse4.1")),
        (F::Sse4_2, is_x86_feature_detected!("sse4.2")),
        (F::Aes, is_x86_feature_detected!("aes")),
        (F::Pclmulqdq, is_x86_feature_detected!("pclmulqdq")),
        (F::Sha, is_x86_feature_detected!("sha")),
        (F::Avx, avx2),
        (F::Avx2, avx2),
        (F::Fma, avx2 && is_x86_feature_detected!("fma")),
        (F::F16c, avx2 && is_x86_feature_detected!("f16c")),
    ];
    for (feature, has) in host {
        if has {
            features = features.with(feature);
        }
    }
    features
}

/// Chooses the operation of a common vector instruction, or of an x87 or MMX one.
pub(crate) fn select(op: &mut Op, insn: &Instruction, mode: Mode) -> Option<Ends> {
    if avx::is_vector(insn) {
        return avx::select(op, insn, mode);
    }
    let code = insn.code();
    let pair = if let Some(pair) = host::pick_crc32(code) {
        pair
    } else {
        let pair = moves::pick(code)
            .or_else(|| table::pick(code))
            .or_else(|| table::pick_shift(code))
            .or_else(|| host::pick(code))
            .or_else(|| immediate::pick(code))
            .or_else(|| strings::pick(code, false));
        let pair = pair?;
        if mode.contains(Mode::SSE_UD) {
            op.run = undefined;
            return Some(Ends::Yes);
        }
        if mode.contains(Mode::SSE_NM) {
            op.run = device_not_available;
            return Some(Ends::Yes);
        }
        pair
    };
    place_operands(op, insn);
    let memory =
        insn.op_count() > 0 && (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    if memory && code == Code::Insertps_xmm_xmmm32_imm8 {
        // The element comes from memory; the selection of one does not apply.
        op.imm &= 0x3F;
    }
    op.run = if memory { pair.memory } else { pair.register };
    Some(Ends::No)
}

/// Fills in the registers, the immediate, and the address that MASKMOV implies.
pub(crate) fn place_operands(op: &mut Op, insn: &Instruction) {
    for n in 0..insn.op_count() {
        match insn.op_kind(n) {
            OpKind::Register => {
                let number = register_number(insn.op_register(n));
                match n {
                    0 => op.dst = number,
                    1 => op.src = number,
                    _ => {}
                }
            }
            OpKind::Immediate8 => op.imm = i32::from(insn.immediate8()),
            kind @ (OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI) => {
                op.base = RDI as u8;
                op.seg = segment_number(insn.memory_segment()) as u8;
                op.flags = match kind {
                    OpKind::MemorySegDI => 0,
                    OpKind::MemorySegEDI => 1,
                    _ => 2,
                };
            }
            _ => {}
        }
    }
    if insn.op_count() > 2
        && insn.op_kind(0) != OpKind::Register
        && insn.op_kind(0) != OpKind::Memory
    {
        // MASKMOV: the implied address is operand 0, then come the data and the mask.
        op.dst = register_number(insn.op1_register());
        op.src = register_number(insn.op2_register());
    }
}

/// #NM.
pub(crate) fn device_not_available(cpu: &mut Cpu, op: OpRef) -> Next {
    let _ = cpu.raise(trap::NM);
    cpu.trap_exit(op)
}

/// Chooses the code of a rare vector instruction.
pub(crate) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    Some(match insn.code() {
        Code::Ldmxcsr_m32 => (ldmxcsr, Ends::No),
        Code::Stmxcsr_m32 => (stmxcsr, Ends::No),
        _ => return avx::cold(insn),
    })
}

impl Cpu {
    /// #UD or #NM if the mode does not let SSE instructions run.
    pub fn sse_allowed(&mut self) -> Result<(), Trap> {
        if self.mode.contains(Mode::SSE_UD) {
            return Err(self.ud());
        }
        if self.mode.contains(Mode::SSE_NM) {
            return Err(self.raise(trap::NM));
        }
        Ok(())
    }
}

fn ldmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.sse_allowed()?;
    let value = cpu.read_operand(insn, 0)?;
    cpu.set_mxcsr(value as u32)
}

fn stmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    cpu.sse_allowed()?;
    let value = cpu.current_mxcsr();
    cpu.write_operand(insn, 0, u64::from(value))
}
