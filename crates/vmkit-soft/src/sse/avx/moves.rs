//! VEX-encoded moves, and instructions that leave no vector: a destination register is written whole.

use iced_x86::{Code, Instruction, Mnemonic};

use super::super::lane::{Pair, Xmm, to_u128};
use super::super::{host, moves, strings};
use crate::code::{Handler, Next, Op, OpRef};
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, Mode, Vector, W64, Width};
use crate::exec::pick::tri;
use crate::mem::Access;

impl Cpu {
    /// Loads 32 bytes.
    #[inline(always)]
    pub fn load_ymm(&mut self, linear: u64) -> Result<Vector, Trap> {
        if linear & 0xFFF > 0x1000 - 32 {
            return self.load_ymm_across(linear);
        }
        let (low, high) = (self.load_xmm(linear)?, self.load_xmm(linear.wrapping_add(16))?);
        let (low, high) = (to_u128(low), to_u128(high));
        Ok(Vector([low as u64, (low >> 64) as u64, high as u64, (high >> 64) as u64]))
    }

    #[cold]
    #[inline(never)]
    fn load_ymm_across(&mut self, linear: u64) -> Result<Vector, Trap> {
        self.check_operand(linear, 32, 16, Access::Read)?;
        let mut bytes = [0; 32];
        self.load_bytes(linear, &mut bytes, self.tlb_mode)?;
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        }
        Ok(Vector(words))
    }

    /// Stores 32 bytes: all of them or none.
    #[inline(always)]
    pub fn store_ymm(&mut self, linear: u64, value: Vector) -> Result<(), Trap> {
        let [a, b, c, d] = value.0;
        if linear & 0xFFF > 0x1000 - 32 {
            return self.store_ymm_across(linear, value);
        }
        self.store(linear, u128::from(b) << 64 | u128::from(a))?;
        self.store(linear.wrapping_add(16), u128::from(d) << 64 | u128::from(c))
    }

    #[cold]
    #[inline(never)]
    fn store_ymm_across(&mut self, linear: u64, value: Vector) -> Result<(), Trap> {
        self.check_operand(linear, 32, 16, Access::Write)?;
        let mut bytes = [0; 32];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(value.0) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        self.store_bytes(linear, &bytes, self.tlb_mode)
    }
}

/// A register, its low `BYTES` bytes.
fn register<const BYTES: u64>(cpu: &mut Cpu, op: OpRef) -> Next {
    let Vector([a, b, c, d]) = cpu.vectors[usize::from(op.src & 15)];
    cpu.vectors[usize::from(op.dst & 15)] =
        Vector(if BYTES == 32 { [a, b, c, d] } else { [a, b, 0, 0] });
    op.next(cpu)
}

/// The linear address of a `BYTES`-long operand, which must be aligned if `ALIGNED`.
#[inline(always)]
fn address<const BYTES: u64, const ALIGNED: bool>(
    cpu: &mut Cpu,
    op: &Op,
    write: bool,
) -> Result<u64, Trap> {
    let linear = cpu.vector_address(op, BYTES, write)?;
    if ALIGNED && linear & (BYTES - 1) != 0 { Err(cpu.gp0()) } else { Ok(linear) }
}

// What needs a frame is out of line, so that operations end in a jump to the next one.

fn load<const BYTES: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: OpRef) -> Next {
    tri!(cpu, op, load_one::<BYTES, ALIGNED>(cpu, op));
    op.next(cpu)
}

#[inline(never)]
fn load_one<const BYTES: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let linear = address::<BYTES, ALIGNED>(cpu, &op, false)?;
    cpu.vectors[usize::from(op.dst & 15)] =
        if BYTES == 32 { cpu.load_ymm(linear)? } else { low_half(cpu.load_xmm(linear)?) };
    Ok(())
}

fn store<const BYTES: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: OpRef) -> Next {
    tri!(cpu, op, store_one::<BYTES, ALIGNED>(cpu, op));
    op.next(cpu)
}

#[inline(never)]
fn store_one<const BYTES: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let linear = address::<BYTES, ALIGNED>(cpu, &op, true)?;
    if BYTES == 32 {
        cpu.store_ymm(linear, cpu.vectors[usize::from(op.src & 15)])
    } else {
        cpu.store_xmm(linear, cpu.xmm(op.src))
    }
}

/// A value with zero above it.
#[inline(always)]
pub(super) fn low_half(value: Xmm) -> Vector {
    let value = to_u128(value);
    Vector([value as u64, (value >> 64) as u64, 0, 0])
}

/// VMOVQ between XMM registers, in the form whose destination comes last in the encoding.
fn low_quad(cpu: &mut Cpu, op: OpRef) -> Next {
    let low = cpu.vectors[usize::from(op.src & 15)].0[0];
    cpu.vectors[usize::from(op.dst & 15)] = Vector([low, 0, 0, 0]);
    op.next(cpu)
}

/// VZEROUPPER: of the registers that exist in the mode.
fn zero_upper(cpu: &mut Cpu, op: OpRef) -> Next {
    let count = if cpu.mode.contains(Mode::LONG64) { 16 } else { 8 };
    for vector in cpu.vectors.iter_mut().take(count) {
        (vector.0[2], vector.0[3]) = (0, 0);
    }
    op.next(cpu)
}

/// VZEROALL.
fn zero_all(cpu: &mut Cpu, op: OpRef) -> Next {
    let count = if cpu.mode.contains(Mode::LONG64) { 16 } else { 8 };
    for vector in cpu.vectors.iter_mut().take(count) {
        *vector = Vector::default();
    }
    op.next(cpu)
}

/// VMOVMSKPS, VMOVMSKPD and VPMOVMSKB of YMM registers: the sign bits of `BITS`-wide elements.
fn sign_mask<const BITS: u32>(cpu: &mut Cpu, op: OpRef) -> Next {
    let per_word = 64 / BITS;
    let words = cpu.vectors[usize::from(op.src & 15)].0;
    let mask = (0..4 * per_word).fold(0, |mask, i| {
        let word = words[(i / per_word) as usize & 3];
        mask | (word >> (i % per_word * BITS + BITS - 1) & 1) << i
    });
    W64::set(cpu, op.dst, mask);
    op.next(cpu)
}

/// VPTEST and VTESTPx: ZF if the chosen bits in common are none, CF if the source has no others.
fn test<const WIDE: bool, const BITS: u64>(cpu: &mut Cpu, op: &Op, b: Vector) {
    let a = cpu.vectors[usize::from(op.dst & 15)].0;
    let words = if WIDE { 4 } else { 2 };
    let (mut both, mut only) = (0, 0);
    for (a, b) in a.iter().zip(b.0).take(words) {
        both |= a & b & BITS;
        only |= !a & b & BITS;
    }
    cpu.flags.set_arithmetic(u64::from(both == 0) << 6 | u64::from(only == 0));
}

fn test_register<const WIDE: bool, const BITS: u64>(cpu: &mut Cpu, op: OpRef) -> Next {
    test::<WIDE, BITS>(cpu, &op, cpu.vectors[usize::from(op.src & 15)]);
    op.next(cpu)
}

fn test_memory<const WIDE: bool, const BITS: u64>(cpu: &mut Cpu, op: OpRef) -> Next {
    tri!(cpu, op, test_one::<WIDE, BITS>(cpu, op));
    op.next(cpu)
}

#[inline(never)]
fn test_one<const WIDE: bool, const BITS: u64>(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let linear = cpu.vector_address(&op, if WIDE { 32 } else { 16 }, false)?;
    let b = if WIDE { cpu.load_ymm(linear)? } else { low_half(cpu.load_xmm(linear)?) };
    test::<WIDE, BITS>(cpu, &op, b);
    Ok(())
}

/// Sign bits of two singles, of a double, and all bits.
const SINGLE_SIGNS: u64 = 0x8000_0000_8000_0000;
const DOUBLE_SIGN: u64 = 1 << 63;
const ALL: u64 = u64::MAX;

/// The code of a move or of an instruction that leaves no vector.
pub(super) fn pick(insn: &Instruction, memory: bool) -> Option<Handler> {
    use Mnemonic as M;
    let wide = insn.op0_register().is_ymm() || insn.op1_register().is_ymm();
    let to_memory = insn.op0_kind() == iced_x86::OpKind::Memory;
    let pick = |pair: Pair| if memory { pair.memory } else { pair.register };
    macro_rules! full {
        ($aligned:literal) => {
            match (memory, to_memory, wide) {
                (false, _, true) => register::<32> as Handler,
                (false, _, false) => register::<16>,
                (true, false, true) => load::<32, $aligned>,
                (true, false, false) => load::<16, $aligned>,
                (true, true, true) => store::<32, $aligned>,
                (true, true, false) => store::<16, $aligned>,
            }
        };
    }
    macro_rules! tests {
        ($bits:ident) => {
            match (memory, wide) {
                (false, false) => test_register::<false, $bits> as Handler,
                (false, true) => test_register::<true, $bits>,
                (true, false) => test_memory::<false, $bits>,
                (true, true) => test_memory::<true, $bits>,
            }
        };
    }
    Some(match insn.mnemonic() {
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vlddqu => full!(false),
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => full!(true),
        M::Vzeroupper => zero_upper,
        M::Vzeroall => zero_all,
        M::Vptest => tests!(ALL),
        M::Vtestps => tests!(SINGLE_SIGNS),
        M::Vtestpd => tests!(DOUBLE_SIGN),
        M::Vmovmskps if wide => sign_mask::<32>,
        M::Vmovmskpd if wide => sign_mask::<64>,
        M::Vpmovmskb if wide => sign_mask::<8>,
        M::Vmovq if insn.code() == Code::VEX_Vmovq_xmmm64_xmm && !memory => low_quad,
        _ => {
            let legacy = legacy(insn.code())?;
            let pair = moves::pick(legacy)
                .or_else(|| host::pick(legacy))
                .or_else(|| strings::pick(legacy, true))?;
            pick(pair)
        }
    })
}

/// The legacy instruction that does the same, for those that write no vector register. The exception is
/// VPCMPxSTRM, which clears what lies above the mask it leaves in XMM0.
fn legacy(code: Code) -> Option<Code> {
    use Code as C;
    Some(match code {
        C::VEX_Vmovss_m32_xmm => C::Movss_xmmm32_xmm,
        C::VEX_Vmovsd_m64_xmm => C::Movsd_xmmm64_xmm,
        C::VEX_Vmovlps_m64_xmm => C::Movlps_m64_xmm,
        C::VEX_Vmovlpd_m64_xmm => C::Movlpd_m64_xmm,
        C::VEX_Vmovhps_m64_xmm => C::Movhps_m64_xmm,
        C::VEX_Vmovhpd_m64_xmm => C::Movhpd_m64_xmm,
        C::VEX_Vmovd_rm32_xmm => C::Movd_rm32_xmm,
        C::VEX_Vmovq_rm64_xmm => C::Movq_rm64_xmm,
        C::VEX_Vmovq_xmmm64_xmm => C::Movq_xmmm64_xmm,
        C::VEX_Vmovmskps_r32_xmm | C::VEX_Vmovmskps_r64_xmm => C::Movmskps_r32_xmm,
        C::VEX_Vmovmskpd_r32_xmm | C::VEX_Vmovmskpd_r64_xmm => C::Movmskpd_r32_xmm,
        C::VEX_Vpmovmskb_r32_xmm | C::VEX_Vpmovmskb_r64_xmm => C::Pmovmskb_r32_xmm,
        C::VEX_Vpextrw_r32_xmm_imm8 | C::VEX_Vpextrw_r64_xmm_imm8 => C::Pextrw_r32_xmm_imm8,
        C::VEX_Vpextrb_r32m8_xmm_imm8 | C::VEX_Vpextrb_r64m8_xmm_imm8 => C::Pextrb_r32m8_xmm_imm8,
        C::VEX_Vpextrw_r32m16_xmm_imm8 | C::VEX_Vpextrw_r64m16_xmm_imm8 => {
            C::Pextrw_r32m16_xmm_imm8
        }
        C::VEX_Vpextrd_rm32_xmm_imm8 => C::Pextrd_rm32_xmm_imm8,
        C::VEX_Vpextrq_rm64_xmm_imm8 => C::Pextrq_rm64_xmm_imm8,
        C::VEX_Vextractps_rm32_xmm_imm8 | C::VEX_Vextractps_r64m32_xmm_imm8 => {
            C::Extractps_rm32_xmm_imm8
        }
        C::VEX_Vmaskmovdqu_rDI_xmm_xmm => C::Maskmovdqu_rDI_xmm_xmm,
        C::VEX_Vcvtss2si_r32_xmmm32 => C::Cvtss2si_r32_xmmm32,
        C::VEX_Vcvtss2si_r64_xmmm32 => C::Cvtss2si_r64_xmmm32,
        C::VEX_Vcvttss2si_r32_xmmm32 => C::Cvttss2si_r32_xmmm32,
        C::VEX_Vcvttss2si_r64_xmmm32 => C::Cvttss2si_r64_xmmm32,
        C::VEX_Vcvtsd2si_r32_xmmm64 => C::Cvtsd2si_r32_xmmm64,
        C::VEX_Vcvtsd2si_r64_xmmm64 => C::Cvtsd2si_r64_xmmm64,
        C::VEX_Vcvttsd2si_r32_xmmm64 => C::Cvttsd2si_r32_xmmm64,
        C::VEX_Vcvttsd2si_r64_xmmm64 => C::Cvttsd2si_r64_xmmm64,
        C::VEX_Vcomiss_xmm_xmmm32 => C::Comiss_xmm_xmmm32,
        C::VEX_Vcomisd_xmm_xmmm64 => C::Comisd_xmm_xmmm64,
        C::VEX_Vucomiss_xmm_xmmm32 => C::Ucomiss_xmm_xmmm32,
        C::VEX_Vucomisd_xmm_xmmm64 => C::Ucomisd_xmm_xmmm64,
        C::VEX_Vpcmpestri_xmm_xmmm128_imm8 => C::Pcmpestri_xmm_xmmm128_imm8,
        C::VEX_Vpcmpestri64_xmm_xmmm128_imm8 => C::Pcmpestri64_xmm_xmmm128_imm8,
        C::VEX_Vpcmpistri_xmm_xmmm128_imm8 => C::Pcmpistri_xmm_xmmm128_imm8,
        C::VEX_Vpcmpestrm_xmm_xmmm128_imm8 => C::Pcmpestrm_xmm_xmmm128_imm8,
        C::VEX_Vpcmpestrm64_xmm_xmmm128_imm8 => C::Pcmpestrm64_xmm_xmmm128_imm8,
        C::VEX_Vpcmpistrm_xmm_xmmm128_imm8 => C::Pcmpistrm_xmm_xmmm128_imm8,
        _ => return None,
    })
}
