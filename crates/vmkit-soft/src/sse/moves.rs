//! Moves between vector registers, general registers and memory: plain data, no arithmetic.

use iced_x86::Code;

use super::lane::{
    M32, M64, M128, Operand, Pair, Register, U128, Xmm, from_low, from_u128, to_u128,
};
use crate::code::{Next, Op, OpRef};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Int, W64, Width};
use crate::exec::pick::tri;
use crate::mem::MODE_USER_ALIGNED;

/// The whole register from a register or memory; shorter sources clear what lies above them.
fn load<S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    let value = tri!(cpu, op, S::get(cpu, &op));
    cpu.set_xmm(op.dst, value);
    op.next(cpu)
}

fn store(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, 16, true));
    tri!(cpu, op, cpu.store_xmm(linear, cpu.xmm(op.src)));
    op.next(cpu)
}

fn store_aligned(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.aligned_address(&op, true));
    tri!(cpu, op, cpu.store_xmm(linear, cpu.xmm(op.src)));
    op.next(cpu)
}

/// Stores the low element.
fn store_low<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, T::BYTES as u64, true));
    let value = T::truncate(cpu.vectors[usize::from(op.src & 15)].0[0]);
    tri!(cpu, op, cpu.store(linear, value));
    op.next(cpu)
}

/// MOVSS and MOVSD between registers: the low element, the rest stays.
fn merge_low<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let mask = u64::MAX >> (64 - 8 * T::BYTES);
    let value = cpu.vectors[usize::from(op.src & 15)].0[0];
    let low = &mut cpu.vectors[usize::from(op.dst & 15)].0[0];
    *low = *low & !mask | value & mask;
    op.next(cpu)
}

/// MOVQ between XMM registers.
fn low_quad(cpu: &mut Cpu, op: OpRef) -> Next {
    let low = cpu.vectors[usize::from(op.src & 15)].0[0];
    cpu.set_xmm(op.dst, from_low(low));
    op.next(cpu)
}

/// MOVD and MOVQ from a general register.
fn from_general<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let value = W::get(cpu, op.src);
    cpu.set_xmm(op.dst, from_low(value));
    op.next(cpu)
}

/// MOVD and MOVQ to a general register.
fn to_general<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let value = T::truncate(cpu.vectors[usize::from(op.src & 15)].0[0]).widen();
    W64::set(cpu, op.dst, value);
    op.next(cpu)
}

/// MOVLPS and MOVHPS (`HALF` 1) and their PD forms, from memory.
fn load_half<const HALF: usize>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, 8, false));
    let value = tri!(cpu, op, cpu.load::<u64>(linear));
    cpu.vectors[usize::from(op.dst & 15)].0[HALF] = value;
    op.next(cpu)
}

fn store_half<const HALF: usize>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, 8, true));
    let value = cpu.vectors[usize::from(op.src & 15)].0[HALF];
    tri!(cpu, op, cpu.store(linear, value));
    op.next(cpu)
}

/// The word of the register image and the shift in it of element `imm`, `T` wide.
#[inline(always)]
fn element<T: Int>(imm: i32) -> (usize, u32) {
    let bit = (imm as usize * T::BYTES * 8) & 127;
    (bit >> 6, (bit & 63) as u32)
}

/// PEXTRx and EXTRACTPS to a general register.
fn extract<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (word, shift) = element::<T>(op.imm);
    let value = T::truncate(cpu.vectors[usize::from(op.src & 15)].0[word] >> shift).widen();
    W64::set(cpu, op.dst, value);
    op.next(cpu)
}

fn extract_store<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, T::BYTES as u64, true));
    let (word, shift) = element::<T>(op.imm);
    let value = T::truncate(cpu.vectors[usize::from(op.src & 15)].0[word] >> shift);
    tri!(cpu, op, cpu.store(linear, value));
    op.next(cpu)
}

fn put_element<T: Int>(cpu: &mut Cpu, op: &Op, value: T) {
    let (word, shift) = element::<T>(op.imm);
    let mask = u64::MAX >> (64 - 8 * T::BYTES) << shift;
    let word = &mut cpu.vectors[usize::from(op.dst & 15)].0[word];
    *word = *word & !mask | value.widen() << shift;
}

/// PINSRx from a general register.
fn insert<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let value = T::truncate(W64::get(cpu, op.src));
    put_element(cpu, &op, value);
    op.next(cpu)
}

fn insert_load<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, T::BYTES as u64, false));
    let value = tri!(cpu, op, cpu.load::<T>(linear));
    put_element(cpu, &op, value);
    op.next(cpu)
}

/// Collects the sign bits of `T`-wide elements.
fn signs<T: Int>(value: Xmm) -> u64 {
    let bits = to_u128(value);
    let width = 8 * T::BYTES;
    (0..128 / width).fold(0, |mask, i| mask | ((bits >> (i * width + width - 1)) as u64 & 1) << i)
}

/// MOVMSKPS and MOVMSKPD.
fn sign_mask<T: Int>(cpu: &mut Cpu, op: OpRef) -> Next {
    let mask = signs::<T>(cpu.xmm(op.src));
    W64::set(cpu, op.dst, mask);
    op.next(cpu)
}

/// PMOVMSKB.
fn byte_mask(cpu: &mut Cpu, op: OpRef) -> Next {
    let mask = super::host::byte_mask(cpu.xmm(op.src));
    W64::set(cpu, op.dst, u64::from(mask));
    op.next(cpu)
}

/// PSLLDQ.
fn shift_left(cpu: &mut Cpu, op: OpRef) -> Next {
    let count = (op.imm as u32 & 0xFF) * 8;
    let value = to_u128(cpu.xmm(op.dst)).checked_shl(count).unwrap_or(0);
    cpu.set_xmm(op.dst, from_u128(value));
    op.next(cpu)
}

/// PSRLDQ.
fn shift_right(cpu: &mut Cpu, op: OpRef) -> Next {
    let count = (op.imm as u32 & 0xFF) * 8;
    let value = to_u128(cpu.xmm(op.dst)).checked_shr(count).unwrap_or(0);
    cpu.set_xmm(op.dst, from_u128(value));
    op.next(cpu)
}

/// MASKMOVDQU: stores the bytes whose mask bytes have their top bit set.
fn masked_store(cpu: &mut Cpu, op: OpRef) -> Next {
    tri!(cpu, op, masked_store_one(cpu, op));
    op.next(cpu)
}

#[inline(never)]
fn masked_store_one(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let (value, mask) = (to_u128(cpu.xmm(op.dst)), to_u128(cpu.xmm(op.src)));
    let linear = cpu.vector_address(&op, 16, true)?;
    cpu.store_masked(linear, &value.to_le_bytes(), &mask.to_le_bytes())
}

impl Cpu {
    /// Stores at `linear` those of `bytes` whose mask byte has its top bit set; the others are not
    /// touched. Whether bytes that are not stored can fault is up to the processor (Intel SDM vol. 2B,
    /// MASKMOVDQU); here, as on the processors this was compared with, they do: the operand is checked
    /// as words of eight bytes, their alignment first.
    pub fn store_masked(&mut self, linear: u64, bytes: &[u8], mask: &[u8]) -> Result<(), Trap> {
        if self.tlb_mode == MODE_USER_ALIGNED && linear & 7 != 0 {
            return Err(self.raise_with(trap::AC, 0));
        }
        for word in (0..bytes.len() as u64).step_by(8) {
            self.probe_store(self.wrap_linear(linear.wrapping_add(word)), 8)?;
        }
        for (i, (&byte, &select)) in (0_u64..).zip(bytes.iter().zip(mask)) {
            if select & 0x80 != 0 {
                self.store(self.wrap_linear(linear.wrapping_add(i)), byte)?;
            }
        }
        Ok(())
    }
}

/// The code of a move.
pub(super) fn pick(code: Code) -> Option<Pair> {
    use crate::exec::branch::undefined;
    use Code as C;
    let register_only = |register| Pair { register, memory: undefined };
    let memory_only = |memory| Pair { register: undefined, memory };
    Some(match code {
        C::Movups_xmm_xmmm128
        | C::Movupd_xmm_xmmm128
        | C::Movdqu_xmm_xmmm128
        | C::Lddqu_xmm_m128 => Pair { register: load::<Register>, memory: load::<U128> },
        C::Movaps_xmm_xmmm128
        | C::Movapd_xmm_xmmm128
        | C::Movdqa_xmm_xmmm128
        | C::Movntdqa_xmm_m128 => Pair { register: load::<Register>, memory: load::<M128> },
        C::Movups_xmmm128_xmm | C::Movupd_xmmm128_xmm | C::Movdqu_xmmm128_xmm => {
            Pair { register: load::<Register>, memory: store }
        }
        C::Movaps_xmmm128_xmm
        | C::Movapd_xmmm128_xmm
        | C::Movdqa_xmmm128_xmm
        | C::Movntps_m128_xmm
        | C::Movntpd_m128_xmm
        | C::Movntdq_m128_xmm => Pair { register: load::<Register>, memory: store_aligned },
        C::Movss_xmm_xmmm32 => Pair { register: merge_low::<u32>, memory: load::<M32> },
        C::Movss_xmmm32_xmm => Pair { register: merge_low::<u32>, memory: store_low::<u32> },
        C::Movsd_xmm_xmmm64 => Pair { register: merge_low::<u64>, memory: load::<M64> },
        C::Movsd_xmmm64_xmm => Pair { register: merge_low::<u64>, memory: store_low::<u64> },
        C::Movq_xmm_xmmm64 => Pair { register: low_quad, memory: load::<M64> },
        C::Movq_xmmm64_xmm => Pair { register: low_quad, memory: store_low::<u64> },
        C::Movd_xmm_rm32 => Pair { register: from_general::<crate::cpu::W32>, memory: load::<M32> },
        C::Movq_xmm_rm64 => Pair { register: from_general::<W64>, memory: load::<M64> },
        C::Movd_rm32_xmm => Pair { register: to_general::<u32>, memory: store_low::<u32> },
        C::Movq_rm64_xmm => Pair { register: to_general::<u64>, memory: store_low::<u64> },
        C::Movlps_xmm_m64 | C::Movlpd_xmm_m64 => memory_only(load_half::<0>),
        C::Movhps_xmm_m64 | C::Movhpd_xmm_m64 => memory_only(load_half::<1>),
        C::Movlps_m64_xmm | C::Movlpd_m64_xmm => memory_only(store_half::<0>),
        C::Movhps_m64_xmm | C::Movhpd_m64_xmm => memory_only(store_half::<1>),
        C::Movmskps_r32_xmm | C::Movmskps_r64_xmm => register_only(sign_mask::<u32>),
        C::Movmskpd_r32_xmm | C::Movmskpd_r64_xmm => register_only(sign_mask::<u64>),
        C::Pmovmskb_r32_xmm | C::Pmovmskb_r64_xmm => register_only(byte_mask),
        C::Pextrw_r32_xmm_imm8 | C::Pextrw_r64_xmm_imm8 => register_only(extract::<u16>),
        C::Pextrb_r32m8_xmm_imm8 | C::Pextrb_r64m8_xmm_imm8 => {
            Pair { register: extract::<u8>, memory: extract_store::<u8> }
        }
        C::Pextrw_r32m16_xmm_imm8 | C::Pextrw_r64m16_xmm_imm8 => {
            Pair { register: extract::<u16>, memory: extract_store::<u16> }
        }
        C::Pextrd_rm32_xmm_imm8 | C::Extractps_rm32_xmm_imm8 | C::Extractps_r64m32_xmm_imm8 => {
            Pair { register: extract::<u32>, memory: extract_store::<u32> }
        }
        C::Pextrq_rm64_xmm_imm8 => Pair { register: extract::<u64>, memory: extract_store::<u64> },
        C::Pinsrb_xmm_r32m8_imm8 | C::Pinsrb_xmm_r64m8_imm8 => {
            Pair { register: insert::<u8>, memory: insert_load::<u8> }
        }
        C::Pinsrw_xmm_r32m16_imm8 | C::Pinsrw_xmm_r64m16_imm8 => {
            Pair { register: insert::<u16>, memory: insert_load::<u16> }
        }
        C::Pinsrd_xmm_rm32_imm8 => Pair { register: insert::<u32>, memory: insert_load::<u32> },
        C::Pinsrq_xmm_rm64_imm8 => Pair { register: insert::<u64>, memory: insert_load::<u64> },
        C::Pslldq_xmm_imm8 => register_only(shift_left),
        C::Psrldq_xmm_imm8 => register_only(shift_right),
        C::Maskmovdqu_rDI_xmm_xmm => Pair { register: masked_store, memory: masked_store },
        _ => return None,
    })
}
