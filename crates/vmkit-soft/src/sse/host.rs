//! Instructions whose result is not a vector: conversions to and from general registers, comparisons
//! that set flags, masks, CRC32.

#![allow(unsafe_code, reason = "executes the guest's instruction on the host")]

use std::arch::asm;
use std::arch::x86_64::_mm_movemask_epi8;

use iced_x86::Code;

use super::control::{Frame, asm_under};
use super::lane::{Compare, M32, M64, M128, Operand, Pair, Register, Xmm, compare};
use crate::code::{Next, Op, OpRef};
use crate::cpu::{Cpu, Int, Trap, W8, W16, W32, W64, Width};
use crate::exec::pick::tri;

/// The top bit of each byte.
#[inline(always)]
pub(super) fn byte_mask(value: Xmm) -> u32 {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_movemask_epi8(value) as u32 }
}

/// From an integer in a general register or memory to the low element.
trait FromInteger: 'static {
    fn run(a: Xmm, b: u64) -> Xmm;
    fn run_under(a: Xmm, b: u64, frame: &mut Frame) -> Xmm;
}

/// From the low element to an integer.
trait ToInteger: 'static {
    fn run(b: Xmm) -> u64;
    fn run_under(b: Xmm, frame: &mut Frame) -> u64;
}

macro_rules! from_integer {
    ($($name:ident $mnemonic:literal;)*) => {$(
        struct $name;
        impl FromInteger for $name {
            #[inline(always)]
            fn run(mut a: Xmm, b: u64) -> Xmm {
                // SAFETY: reads and writes the registers only; sticky flags of MXCSR may change.
                unsafe {
                    asm!(
                        $mnemonic,
                        a = inout(xmm_reg) a,
                        b = in(reg) b,
                        options(nomem, nostack)
                    );
                }
                a
            }
            fn run_under(mut a: Xmm, b: u64, frame: &mut Frame) -> Xmm {
                // SAFETY: as above; MXCSR is as before in the end, and the frame outlives the block.
                unsafe {
                    asm_under!(
                        frame,
                        $mnemonic,
                        a = inout(xmm_reg) a,
                        b = in(reg) b,
                        options(nostack)
                    );
                }
                a
            }
        }
    )*};
}

from_integer! {
    FromInt32ToSingle "cvtsi2ss {a}, {b:e}";
    FromInt64ToSingle "cvtsi2ss {a}, {b:r}";
    FromInt32ToDouble "cvtsi2sd {a}, {b:e}";
    FromInt64ToDouble "cvtsi2sd {a}, {b:r}";
}

macro_rules! to_integer {
    ($($name:ident $mnemonic:literal;)*) => {$(
        struct $name;
        impl ToInteger for $name {
            #[inline(always)]
            fn run(b: Xmm) -> u64 {
                let r: u64;
                // SAFETY: reads and writes the registers only; sticky flags of MXCSR may change.
                unsafe {
                    asm!(
                        $mnemonic,
                        r = out(reg) r,
                        b = in(xmm_reg) b,
                        options(nomem, nostack)
                    );
                }
                r
            }
            fn run_under(b: Xmm, frame: &mut Frame) -> u64 {
                let r: u64;
                // SAFETY: as above; MXCSR is as before in the end, and the frame outlives the block.
                unsafe {
                    asm_under!(
                        frame,
                        $mnemonic,
                        r = out(reg) r,
                        b = in(xmm_reg) b,
                        options(nostack)
                    );
                }
                r
            }
        }
    )*};
}

to_integer! {
    SingleToInt32 "cvtss2si {r:e}, {b}";
    SingleToInt64 "cvtss2si {r:r}, {b}";
    SingleToInt32Truncated "cvttss2si {r:e}, {b}";
    SingleToInt64Truncated "cvttss2si {r:r}, {b}";
    DoubleToInt32 "cvtsd2si {r:e}, {b}";
    DoubleToInt64 "cvtsd2si {r:r}, {b}";
    DoubleToInt32Truncated "cvttsd2si {r:e}, {b}";
    DoubleToInt64Truncated "cvttsd2si {r:r}, {b}";
}

macro_rules! compares {
    ($($name:ident $mnemonic:literal;)*) => {$(
        struct $name;
        impl Compare for $name {
            #[inline(always)]
            fn run(a: Xmm, b: Xmm) -> u64 {
                let (c, p, z): (u8, u8, u8);
                // SAFETY: reads and writes the registers only; sticky flags of MXCSR may change.
                unsafe {
                    asm!(
                        concat!($mnemonic, " {a}, {b}"),
                        "setc {c}",
                        "setp {p}",
                        "setz {z}",
                        a = in(xmm_reg) a,
                        b = in(xmm_reg) b,
                        c = out(reg_byte) c,
                        p = out(reg_byte) p,
                        z = out(reg_byte) z,
                        options(nomem, nostack)
                    );
                }
                u64::from(c) | u64::from(p) << 2 | u64::from(z) << 6
            }
            fn run_under(a: Xmm, b: Xmm, frame: &mut Frame) -> u64 {
                let (c, p, z): (u8, u8, u8);
                // SAFETY: as above; MXCSR is as before in the end, and the frame outlives the block.
                unsafe {
                    asm_under!(
                        frame,
                        concat!($mnemonic, " {a}, {b}\n setc {c}\n setp {p}\n setz {z}"),
                        a = in(xmm_reg) a,
                        b = in(xmm_reg) b,
                        c = out(reg_byte) c,
                        p = out(reg_byte) p,
                        z = out(reg_byte) z,
                        options(nostack)
                    );
                }
                u64::from(c) | u64::from(p) << 2 | u64::from(z) << 6
            }
        }
    )*};
}

compares! {
    CompareSingle "comiss";
    CompareDouble "comisd";
    CompareSingleQuiet "ucomiss";
    CompareDoubleQuiet "ucomisd";
}

fn from_integer<O: FromInteger, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = W::get(cpu, op.src);
    tri!(cpu, op, convert_from::<O>(cpu, &op, b));
    op.next(cpu)
}

fn from_memory<O: FromInteger, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, W::BYTES, false));
    let b = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    tri!(cpu, op, convert_from::<O>(cpu, &op, b));
    op.next(cpu)
}

#[inline(always)]
fn convert_from<O: FromInteger>(cpu: &mut Cpu, op: &Op, b: u64) -> Result<(), Trap> {
    if !cpu.default_mxcsr() {
        return convert_from_judged::<O>(cpu, op, b);
    }
    let r = O::run(cpu.xmm(op.dst), b);
    cpu.set_xmm(op.dst, r);
    Ok(())
}

#[cold]
#[inline(never)]
fn convert_from_judged<O: FromInteger>(cpu: &mut Cpu, op: &Op, b: u64) -> Result<(), Trap> {
    let a = cpu.xmm(op.dst);
    let r = cpu.judge(|frame| O::run_under(a, b, frame))?;
    cpu.set_xmm(op.dst, r);
    Ok(())
}

fn to_integer<O: ToInteger, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    if !cpu.default_mxcsr() {
        tri!(cpu, op, to_integer_judged::<O, S>(cpu, op));
        return op.next(cpu);
    }
    let b = tri!(cpu, op, S::get(cpu, &op));
    let r = O::run(b);
    W64::set(cpu, op.dst, r);
    op.next(cpu)
}

#[cold]
#[inline(never)]
fn to_integer_judged<O: ToInteger, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let b = S::get(cpu, &op)?;
    let r = cpu.judge(|frame| O::run_under(b, frame))?;
    W64::set(cpu, op.dst, r);
    Ok(())
}

/// PTEST: ZF if the bits in common are none, CF if the source has no others.
fn test<S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = super::lane::to_u128(tri!(cpu, op, S::get(cpu, &op)));
    let a = super::lane::to_u128(cpu.xmm(op.dst));
    cpu.flags.set_arithmetic(u64::from(a & b == 0) << 6 | u64::from(!a & b == 0));
    op.next(cpu)
}

/// CRC32 over a `W`-wide source.
fn crc32<W: Width>(crc: u64, value: u64) -> u64 {
    let mut crc = crc & 0xFFFF_FFFF;
    // SAFETY: CRC32 is selected only where the model lists SSE4.2, which holds no more than the host
    // has; the instruction reads and writes the registers only.
    unsafe {
        match W::BITS {
            8 => asm!("crc32 {c:e}, {v}", c = inout(reg) crc, v = in(reg_byte) value as u8,
                options(pure, nomem, nostack, preserves_flags)),
            16 => asm!("crc32 {c:e}, {v:x}", c = inout(reg) crc, v = in(reg) value,
                options(pure, nomem, nostack, preserves_flags)),
            32 => asm!("crc32 {c:e}, {v:e}", c = inout(reg) crc, v = in(reg) value,
                options(pure, nomem, nostack, preserves_flags)),
            _ => asm!("crc32 {c:r}, {v:r}", c = inout(reg) crc, v = in(reg) value,
                options(pure, nomem, nostack, preserves_flags)),
        }
    }
    crc & 0xFFFF_FFFF
}

fn crc_register<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let crc = crc32::<W>(W64::get(cpu, op.dst), W::get(cpu, op.src));
    W64::set(cpu, op.dst, crc);
    op.next(cpu)
}

fn crc_memory<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, cpu.vector_address(&op, W::BYTES, false));
    let value = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let crc = crc32::<W>(W64::get(cpu, op.dst), value);
    W64::set(cpu, op.dst, crc);
    op.next(cpu)
}

/// The code of CRC32, which is not subject to the rules of vector instructions.
pub(super) fn pick_crc32(code: Code) -> Option<Pair> {
    macro_rules! pair {
        ($w:ty) => {
            Pair { register: crc_register::<$w>, memory: crc_memory::<$w> }
        };
    }
    Some(match code {
        Code::Crc32_r32_rm8 | Code::Crc32_r64_rm8 => pair!(W8),
        Code::Crc32_r32_rm16 => pair!(W16),
        Code::Crc32_r32_rm32 => pair!(W32),
        Code::Crc32_r64_rm64 => pair!(W64),
        _ => return None,
    })
}

/// The code of an instruction of this module.
pub(super) fn pick(code: Code) -> Option<Pair> {
    macro_rules! from {
        ($o:ident $w:ident) => {
            Pair { register: from_integer::<$o, $w>, memory: from_memory::<$o, $w> }
        };
    }
    macro_rules! to {
        ($o:ident $s:ident) => {
            Pair { register: to_integer::<$o, Register>, memory: to_integer::<$o, $s> }
        };
    }
    macro_rules! against {
        ($o:ident $s:ident) => {
            Pair { register: compare::<$o, Register>, memory: compare::<$o, $s> }
        };
    }
    Some(match code {
        Code::Cvtsi2ss_xmm_rm32 => from!(FromInt32ToSingle W32),
        Code::Cvtsi2ss_xmm_rm64 => from!(FromInt64ToSingle W64),
        Code::Cvtsi2sd_xmm_rm32 => from!(FromInt32ToDouble W32),
        Code::Cvtsi2sd_xmm_rm64 => from!(FromInt64ToDouble W64),
        Code::Cvtss2si_r32_xmmm32 => to!(SingleToInt32 M32),
        Code::Cvtss2si_r64_xmmm32 => to!(SingleToInt64 M32),
        Code::Cvttss2si_r32_xmmm32 => to!(SingleToInt32Truncated M32),
        Code::Cvttss2si_r64_xmmm32 => to!(SingleToInt64Truncated M32),
        Code::Cvtsd2si_r32_xmmm64 => to!(DoubleToInt32 M64),
        Code::Cvtsd2si_r64_xmmm64 => to!(DoubleToInt64 M64),
        Code::Cvttsd2si_r32_xmmm64 => to!(DoubleToInt32Truncated M64),
        Code::Cvttsd2si_r64_xmmm64 => to!(DoubleToInt64Truncated M64),
        Code::Comiss_xmm_xmmm32 => against!(CompareSingle M32),
        Code::Comisd_xmm_xmmm64 => against!(CompareDouble M64),
        Code::Ucomiss_xmm_xmmm32 => against!(CompareSingleQuiet M32),
        Code::Ucomisd_xmm_xmmm64 => against!(CompareDoubleQuiet M64),
        Code::Ptest_xmm_xmmm128 => Pair { register: test::<Register>, memory: test::<M128> },
        _ => return None,
    })
}
