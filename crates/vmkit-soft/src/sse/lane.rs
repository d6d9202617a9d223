//! How a vector operation gets at its operands, and the shapes operations come in.
//!
//! An instruction is a type that implements one of the traits below; the functions turn it into the
//! code of an operation, register or memory source. Tables of the instructions themselves are in the
//! `table` modules.

#![allow(unsafe_code, reason = "moves between register images, guest memory and host registers")]

use std::arch::x86_64::{__m128i, _mm_cvtsi64_si128, _mm_set_epi64x};

use iced_x86::Code;

use super::control::Frame;
use super::exact::Operands;
use crate::code::{FLAG_ADDRESS, Handler, Next, Op, OpRef};
use crate::cpu::{Cpu, Trap};
use crate::exec::pick::tri;

/// A value on its way through a host register.
pub(crate) type Xmm = __m128i;

impl Cpu {
    /// XMM register `r`.
    #[inline(always)]
    pub fn xmm(&self, r: u8) -> Xmm {
        let vector = &raw const self.vectors[usize::from(r & 15)];
        // SAFETY: the low half of a 32-byte-aligned vector register, any bits of which are a value.
        unsafe { vector.cast::<Xmm>().read() }
    }

    /// Writes XMM register `r`; the upper half of its YMM register stays.
    #[inline(always)]
    pub fn set_xmm(&mut self, r: u8, value: Xmm) {
        let vector = &raw mut self.vectors[usize::from(r & 15)];
        // SAFETY: as in `xmm`, exclusively borrowed.
        unsafe { vector.cast::<Xmm>().write(value) };
    }

    /// The linear address of `op`'s memory operand, `bytes` long, in any mode.
    #[inline(always)]
    pub fn vector_address(&mut self, op: &Op, bytes: u64, write: bool) -> Result<u64, Trap> {
        if op.flags & FLAG_ADDRESS == 2 { Ok(self.ea64(op)) } else { self.ea(op, bytes, write) }
    }

    /// The linear address of a 16-byte operand that must be aligned: #GP(0) if it is not.
    #[inline(always)]
    pub fn aligned_address(&mut self, op: &Op, write: bool) -> Result<u64, Trap> {
        let linear = self.vector_address(op, 16, write)?;
        if linear & 15 != 0 { Err(self.gp0()) } else { Ok(linear) }
    }

    /// Loads 16 bytes.
    #[inline(always)]
    pub fn load_xmm(&mut self, linear: u64) -> Result<Xmm, Trap> {
        match self.tlb.read(linear, 16, self.tlb_mode) {
            // SAFETY: a read hit for 16 bytes.
            Some(host) => Ok(unsafe { (host as *const Xmm).read_unaligned() }),
            None => self.load_xmm_slow(linear),
        }
    }

    #[cold]
    #[inline(never)]
    fn load_xmm_slow(&mut self, linear: u64) -> Result<Xmm, Trap> {
        self.load::<u128>(linear).map(from_u128)
    }

    /// Stores 16 bytes.
    #[inline(always)]
    pub fn store_xmm(&mut self, linear: u64, value: Xmm) -> Result<(), Trap> {
        match self.tlb.write(linear, 16, self.tlb_mode) {
            Some(host) => {
                // SAFETY: a write hit for 16 bytes.
                unsafe { (host as *mut Xmm).write_unaligned(value) };
                Ok(())
            }
            None => self.store_xmm_slow(linear, value),
        }
    }

    #[cold]
    #[inline(never)]
    fn store_xmm_slow(&mut self, linear: u64, value: Xmm) -> Result<(), Trap> {
        self.store(linear, to_u128(value))
    }
}

/// A value with these 128 bits.
#[inline(always)]
pub(crate) fn from_u128(bits: u128) -> Xmm {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_set_epi64x((bits >> 64) as i64, bits as i64) }
}

/// The bits of a value.
#[inline(always)]
pub(crate) fn to_u128(value: Xmm) -> u128 {
    // SAFETY: the types have the same size, and any bits are a number.
    unsafe { std::mem::transmute::<Xmm, u128>(value) }
}

/// A value with `low` in its low half and zero above.
#[inline(always)]
pub(crate) fn from_low(low: u64) -> Xmm {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_cvtsi64_si128(low as i64) }
}

/// What a memory source is: how much is loaded, into the low part of the value.
pub(super) trait Source: 'static {
    fn load(cpu: &mut Cpu, op: &Op) -> Result<Xmm, Trap>;
}

/// 16 bytes, aligned.
pub(super) struct M128;
/// 16 bytes at any address.
pub(super) struct U128;
/// 8 bytes.
pub(super) struct M64;
/// 4 bytes.
pub(super) struct M32;
/// 2 bytes.
pub(super) struct M16;

impl Source for M128 {
    #[inline(always)]
    fn load(cpu: &mut Cpu, op: &Op) -> Result<Xmm, Trap> {
        let linear = cpu.aligned_address(op, false)?;
        cpu.load_xmm(linear)
    }
}

impl Source for U128 {
    #[inline(always)]
    fn load(cpu: &mut Cpu, op: &Op) -> Result<Xmm, Trap> {
        let linear = cpu.vector_address(op, 16, false)?;
        cpu.load_xmm(linear)
    }
}

macro_rules! short_source {
    ($($name:ident $int:ty;)*) => {$(
        impl Source for $name {
            #[inline(always)]
            fn load(cpu: &mut Cpu, op: &Op) -> Result<Xmm, Trap> {
                let linear = cpu.vector_address(op, size_of::<$int>() as u64, false)?;
                Ok(from_low(u64::from(cpu.load::<$int>(linear)?)))
            }
        }
    )*};
}
short_source! { M64 u64; M32 u32; M16 u16; }

/// Destination and source to destination. Instructions with one source ignore the first argument, or
/// pass its upper part through.
pub(super) trait Binary: 'static {
    fn run(a: Xmm, b: Xmm) -> Xmm;
}

/// The same in floating point: it raises flags and obeys MXCSR.
pub(super) trait Float: Binary {
    const CODE: Code;
    /// Executes under the control bits in `frame`, and leaves the flags raised there.
    fn run_under(a: Xmm, b: Xmm, frame: &mut Frame) -> Xmm;
}

/// As [`Binary`], with XMM0 as an implied third source.
pub(super) trait Masked: 'static {
    fn run(a: Xmm, b: Xmm, mask: Xmm) -> Xmm;
}

/// As [`Binary`], with an immediate byte.
pub(super) trait Immediate: 'static {
    fn run(a: Xmm, b: Xmm, imm: u8) -> Xmm;
}

/// As [`Float`], with an immediate byte.
pub(super) trait FloatImmediate: Immediate {
    const CODE: Code;
    fn run_under(a: Xmm, b: Xmm, imm: u8, frame: &mut Frame) -> Xmm;
}

/// Sets CF (bit 0), PF (bit 2) and ZF (bit 6) of the returned flags, and no others.
pub(super) trait Compare: 'static {
    fn run(a: Xmm, b: Xmm) -> u64;
    fn run_under(a: Xmm, b: Xmm, frame: &mut Frame) -> u64;
}

/// The code for a register and for a memory source.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    pub register: Handler,
    pub memory: Handler,
}

/// Where the second operand comes from: a register or memory.
pub(super) trait Operand: 'static {
    fn get(cpu: &mut Cpu, op: &Op) -> Result<Xmm, Trap>;
}

/// The register [`Op::src`].
pub(super) struct Register;

impl Operand for Register {
    #[inline(always)]
    fn get(cpu: &mut Cpu, op: &Op) -> Result<Xmm, Trap> {
        Ok(cpu.xmm(op.src))
    }
}

impl<S: Source> Operand for S {
    #[inline(always)]
    fn get(cpu: &mut Cpu, op: &Op) -> Result<Xmm, Trap> {
        S::load(cpu, op)
    }
}

pub(super) fn binary<O: Binary, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = tri!(cpu, op, S::get(cpu, &op));
    let r = O::run(cpu.xmm(op.dst), b);
    cpu.set_xmm(op.dst, r);
    op.next(cpu)
}

// The ways under a guest's own control bits are out of line and return nothing by memory, so that the
// common ways end in a jump to the next operation.

pub(super) fn float<O: Float, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    if !cpu.default_mxcsr() {
        tri!(cpu, op, float_judged::<O, S>(cpu, op));
        return op.next(cpu);
    }
    let b = tri!(cpu, op, S::get(cpu, &op));
    let r = O::run(cpu.xmm(op.dst), b);
    cpu.set_xmm(op.dst, r);
    op.next(cpu)
}

#[cold]
#[inline(never)]
fn float_judged<O: Float, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let b = S::get(cpu, &op)?;
    let a = cpu.xmm(op.dst);
    let operands = Operands::narrow(a, b, 0);
    let r = cpu.judge_arithmetic(O::CODE, &operands, |frame| O::run_under(a, b, frame))?;
    cpu.set_xmm(op.dst, r);
    Ok(())
}

pub(super) fn masked<O: Masked, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = tri!(cpu, op, S::get(cpu, &op));
    let r = O::run(cpu.xmm(op.dst), b, cpu.xmm(0));
    cpu.set_xmm(op.dst, r);
    op.next(cpu)
}

pub(super) fn immediate<O: Immediate, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = tri!(cpu, op, S::get(cpu, &op));
    let r = O::run(cpu.xmm(op.dst), b, op.imm as u8);
    cpu.set_xmm(op.dst, r);
    op.next(cpu)
}

pub(super) fn float_immediate<O: FloatImmediate, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    if !cpu.default_mxcsr() {
        tri!(cpu, op, float_immediate_judged::<O, S>(cpu, op));
        return op.next(cpu);
    }
    let b = tri!(cpu, op, S::get(cpu, &op));
    let r = O::run(cpu.xmm(op.dst), b, op.imm as u8);
    cpu.set_xmm(op.dst, r);
    op.next(cpu)
}

#[cold]
#[inline(never)]
fn float_immediate_judged<O: FloatImmediate, S: Operand>(
    cpu: &mut Cpu,
    op: OpRef,
) -> Result<(), Trap> {
    let b = S::get(cpu, &op)?;
    let (a, imm) = (cpu.xmm(op.dst), op.imm as u8);
    let operands = Operands::narrow(a, b, imm);
    let r = cpu.judge_arithmetic(O::CODE, &operands, |frame| O::run_under(a, b, imm, frame))?;
    cpu.set_xmm(op.dst, r);
    Ok(())
}

/// COMISx and UCOMISx: OF, SF and AF are cleared.
pub(super) fn compare<O: Compare, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Next {
    if !cpu.default_mxcsr() {
        tri!(cpu, op, compare_judged::<O, S>(cpu, op));
        return op.next(cpu);
    }
    let b = tri!(cpu, op, S::get(cpu, &op));
    let flags = O::run(cpu.xmm(op.dst), b);
    cpu.flags.set_arithmetic(flags);
    op.next(cpu)
}

#[cold]
#[inline(never)]
fn compare_judged<O: Compare, S: Operand>(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let b = S::get(cpu, &op)?;
    let a = cpu.xmm(op.dst);
    let flags = cpu.judge(|frame| O::run_under(a, b, frame))?;
    cpu.flags.set_arithmetic(flags);
    Ok(())
}
