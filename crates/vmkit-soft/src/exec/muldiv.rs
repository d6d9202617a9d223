//! Multiplication and division.

use super::address::Address;
use super::pick::{by_width, by_width_and_address, tri};
use crate::code::{Handler, Next, OpRef};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{Cpu, Int, RAX, RDX, W16, W32, W64, Width};

/// Signed product of `W`-wide operands: the low part, and whether the high part says more. After it
/// SF, ZF and PF follow the low part as on current processors; AF is zero (all four are undefined).
#[inline(always)]
fn signed_product<W: Width>(cpu: &mut Cpu, a: u64, b: u64) -> u64 {
    let (a, b) = (W::sext(a), W::sext(b));
    let (r, over) = if W::BITS == 64 {
        a.overflowing_mul(b)
    } else {
        let r = a.wrapping_mul(b);
        (r, W::sext(r as u64) != r)
    };
    cpu.flags.set_result_cf_of(W::sext(r as u64), over, over);
    r as u64 & W::MASK
}

fn imul_reg<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (a, b) = (W::get(cpu, op.dst), W::get(cpu, op.src));
    let r = signed_product::<W>(cpu, a, b);
    W::set(cpu, op.dst, r);
    op.next(cpu)
}

fn imul_mem<W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, false));
    let b = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let a = W::get(cpu, op.dst);
    let r = signed_product::<W>(cpu, a, b);
    W::set(cpu, op.dst, r);
    op.next(cpu)
}

fn imul_reg_imm<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (a, b) = (W::get(cpu, op.src), op.imm as i64 as u64);
    let r = signed_product::<W>(cpu, a, b);
    W::set(cpu, op.dst, r);
    op.next(cpu)
}

fn imul_mem_imm<W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, false));
    let a = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let r = signed_product::<W>(cpu, a, op.imm as i64 as u64);
    W::set(cpu, op.dst, r);
    op.next(cpu)
}

/// The operation of IMUL with two or three operands.
pub(super) fn imul(memory: bool, immediate: bool, bytes: usize, flat: bool) -> Handler {
    match (memory, immediate) {
        (false, false) => by_width!(bytes, imul_reg),
        (false, true) => by_width!(bytes, imul_reg_imm),
        (true, false) => by_width_and_address!(bytes, flat, imul_mem),
        (true, true) => by_width_and_address!(bytes, flat, imul_mem_imm),
    }
}

/// An operation on the accumulator pair and one operand.
trait Wide: 'static {
    fn run<W: Width>(cpu: &mut Cpu, b: u64) -> Result<(), Trap>;
}

struct Mul;
struct Imul;
struct Div;
struct Idiv;

/// Writes a double-width value to AX or to the accumulator pair.
#[inline(always)]
fn set_pair<W: Width>(cpu: &mut Cpu, low: u64, high: u64) {
    if W::BITS == 8 {
        W16::set(cpu, RAX as u8, high << 8 | low & 0xFF);
    } else {
        W::set(cpu, RAX as u8, low & W::MASK);
        W::set(cpu, RDX as u8, high & W::MASK);
    }
}

/// The double-width value of AX or of the accumulator pair.
#[inline(always)]
fn pair<W: Width>(cpu: &Cpu) -> u128 {
    if W::BITS == 8 {
        u128::from(W16::get(cpu, RAX as u8))
    } else {
        u128::from(W::get(cpu, RDX as u8)) << W::BITS | u128::from(W::get(cpu, RAX as u8))
    }
}

impl Wide for Mul {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, b: u64) -> Result<(), Trap> {
        let r = u128::from(W::get(cpu, RAX as u8)) * u128::from(b);
        let (low, high) = (r as u64 & W::MASK, (r >> W::BITS) as u64 & W::MASK);
        set_pair::<W>(cpu, low, high);
        cpu.flags.set_result_cf_of(W::sext(low), high != 0, high != 0);
        Ok(())
    }
}

impl Wide for Imul {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, b: u64) -> Result<(), Trap> {
        let r = i128::from(W::sext(W::get(cpu, RAX as u8))) * i128::from(W::sext(b));
        let (low, high) = (r as u64 & W::MASK, (r >> W::BITS) as u64 & W::MASK);
        set_pair::<W>(cpu, low, high);
        let over = i128::from(W::sext(low)) != r;
        cpu.flags.set_result_cf_of(W::sext(low), over, over);
        Ok(())
    }
}

impl Wide for Div {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, b: u64) -> Result<(), Trap> {
        if b == 0 {
            return Err(cpu.raise(trap::DE));
        }
        let a = pair::<W>(cpu);
        // Most dividends fit one register: a narrow division is several times faster.
        let (q, r) = if let Ok(a) = u64::try_from(a) {
            (u128::from(a / b), a % b)
        } else {
            (a / u128::from(b), (a % u128::from(b)) as u64)
        };
        if q > u128::from(W::MASK) {
            return Err(cpu.raise(trap::DE));
        }
        set_pair::<W>(cpu, q as u64, r);
        Ok(())
    }
}

impl Wide for Idiv {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, b: u64) -> Result<(), Trap> {
        let b = W::sext(b);
        let a = match W::BITS {
            8 => i128::from(W16::sext(W16::get(cpu, RAX as u8))),
            16 => i128::from(W32::sext(pair::<W>(cpu) as u64)),
            32 => i128::from(pair::<W>(cpu) as u64 as i64),
            _ => pair::<W>(cpu) as i128,
        };
        let (q, r) = if let Ok(a) = i64::try_from(a)
            && b != 0
            && b != -1
        {
            (i128::from(a / b), a % b)
        } else {
            let (Some(q), Some(r)) = (a.checked_div(i128::from(b)), a.checked_rem(i128::from(b)))
            else {
                return Err(cpu.raise(trap::DE));
            };
            (q, r as i64)
        };
        if i128::from(W::sext(q as u64)) != q {
            return Err(cpu.raise(trap::DE));
        }
        set_pair::<W>(cpu, q as u64 & W::MASK, r as u64 & W::MASK);
        Ok(())
    }
}

fn wide_reg<O: Wide, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = W::get(cpu, op.dst);
    tri!(cpu, op, O::run::<W>(cpu, b));
    op.next(cpu)
}

fn wide_mem<O: Wide, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, false));
    let b = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    tri!(cpu, op, O::run::<W>(cpu, b));
    op.next(cpu)
}

/// The operation of MUL, IMUL with one operand, DIV and IDIV.
pub(super) fn wide(
    mnemonic: iced_x86::Mnemonic,
    memory: bool,
    bytes: usize,
    flat: bool,
) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    macro_rules! go {
        ($o:ty) => {
            if memory {
                by_width_and_address!(bytes, flat, wide_mem, $o)
            } else {
                by_width!(bytes, wide_reg, $o)
            }
        };
    }
    Some(match mnemonic {
        M::Mul => go!(Mul),
        M::Imul => go!(Imul),
        M::Div => go!(Div),
        M::Idiv => go!(Idiv),
        _ => return None,
    })
}

/// MULX (BMI2) and the decimal adjustments are cold; see `misc`.
pub(super) fn mulx(cpu: &mut Cpu, insn: &iced_x86::Instruction) -> Result<(), Trap> {
    let b = cpu.read_operand(insn, 2)?;
    let bytes = insn.op0_register().size();
    let (low, high) = if bytes == 8 {
        let r = u128::from(W64::get(cpu, RDX as u8)) * u128::from(b);
        (r as u64, (r >> 64) as u64)
    } else {
        let r = W32::get(cpu, RDX as u8) * b;
        (r & 0xFFFF_FFFF, r >> 32)
    };
    // If both destinations are the same register, it gets the high half.
    cpu.set_gpr(insn.op1_register(), low);
    cpu.set_gpr(insn.op0_register(), high);
    Ok(())
}
