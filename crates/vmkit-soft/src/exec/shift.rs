//! Shifts and rotates (Intel SDM vol. 2B, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR, SHLD, SHRD).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::Address;
use super::pick::{by_width, by_width_and_address, tri};
use crate::code::{ColdChoice, Ends, Handler, Next, OpRef};
use crate::cpu::flags::Flags;
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, Int, RCX, W8, W16, W32, W64, Width};

/// A shift by `count`, which is masked to the operand's width already and not zero.
trait Shift: 'static {
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64;
}

struct Shl;
struct Shr;
struct Sar;
struct Rol;
struct Ror;
struct Rcl;
struct Rcr;

fn top<W: Width>(v: u64) -> bool {
    v >> (W::BITS - 1) & 1 != 0
}

impl Shift for Shl {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        // 8- and 16-bit operands can be shifted by more than they have: 31 at most, so 64 bits do.
        let wide = if count >= 64 { 0 } else { a << count };
        let cf = if W::BITS == 64 { a >> (64 - count) & 1 } else { wide >> W::BITS & 1 } != 0;
        let r = wide & W::MASK;
        flags.set_result_cf_of(W::sext(r), cf, cf != top::<W>(r));
        r
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let r = a >> count;
        let cf = a >> (count - 1) & 1 != 0;
        flags.set_result_cf_of(W::sext(r), cf, top::<W>(a));
        r
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let wide = W::sext(a);
        let r = (wide >> count) as u64 & W::MASK;
        let cf = wide >> (count - 1) & 1 != 0;
        flags.set_result_cf_of(W::sext(r), cf, false);
        r
    }
}

impl Shift for Rol {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let n = count % W::BITS;
        let r = if n == 0 { a } else { (a << n | a >> (W::BITS - n)) & W::MASK };
        let cf = r & 1 != 0;
        flags.set_cf_of(cf, cf != top::<W>(r));
        r
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let n = count % W::BITS;
        let r = if n == 0 { a } else { (a >> n | a << (W::BITS - n)) & W::MASK };
        let cf = top::<W>(r);
        flags.set_cf_of(cf, cf != (r >> (W::BITS - 2) & 1 != 0));
        r
    }
}

impl Shift for Rcl {
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let n = count % (W::BITS + 1);
        let (mut r, mut cf) = (a, flags.cf());
        if n != 0 {
            let wide = u128::from(a) | u128::from(cf) << W::BITS;
            let bits = W::BITS + 1;
            let rotated = wide << n | wide >> (bits - n);
            r = rotated as u64 & W::MASK;
            cf = rotated >> W::BITS & 1 != 0;
        }
        flags.set_cf_of(cf, cf != top::<W>(r));
        r
    }
}

impl Shift for Rcr {
    fn run<W: Width>(flags: &mut Flags, a: u64, count: u32) -> u64 {
        let n = count % (W::BITS + 1);
        let (mut r, mut cf) = (a, flags.cf());
        if n != 0 {
            let wide = u128::from(a) | u128::from(cf) << W::BITS;
            let bits = W::BITS + 1;
            let rotated = wide >> n | wide << (bits - n);
            r = rotated as u64 & W::MASK;
            cf = rotated >> W::BITS & 1 != 0;
        }
        flags.set_cf_of(cf, top::<W>(r) != (r >> (W::BITS - 2) & 1 != 0));
        r
    }
}

#[inline(always)]
fn mask_count<W: Width>(count: u64) -> u32 {
    (count & if W::BITS == 64 { 63 } else { 31 }) as u32
}

#[inline(always)]
fn in_register<S: Shift, W: Width>(cpu: &mut Cpu, op: OpRef, count: u32) -> Next {
    let a = W::get(cpu, op.dst);
    // A shift by nothing leaves the flags, but a 32-bit one still clears the upper half.
    let r = if count == 0 { a } else { S::run::<W>(&mut cpu.flags, a, count) };
    W::set(cpu, op.dst, r);
    op.next(cpu)
}

fn reg_imm<S: Shift, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    in_register::<S, W>(cpu, op, mask_count::<W>(op.imm as u64))
}

fn reg_cl<S: Shift, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let count = mask_count::<W>(W8::get(cpu, RCX as u8));
    in_register::<S, W>(cpu, op, count)
}

#[inline(always)]
fn in_memory<S: Shift, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef, count: u32) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, true));
    let place = tri!(cpu, op, cpu.place::<W::Int>(linear));
    let a = tri!(cpu, op, cpu.read_place::<W::Int>(place, linear)).widen();
    let r = if count == 0 { a } else { S::run::<W>(&mut cpu.flags, a, count) };
    tri!(cpu, op, cpu.write_place(place, linear, W::Int::truncate(r)));
    op.next(cpu)
}

fn mem_imm<S: Shift, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    in_memory::<S, W, A>(cpu, op, mask_count::<W>(op.imm as u64))
}

fn mem_cl<S: Shift, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let count = mask_count::<W>(W8::get(cpu, RCX as u8));
    in_memory::<S, W, A>(cpu, op, count)
}

fn pick<S: Shift>(memory: bool, by_cl: bool, bytes: usize, flat: bool) -> Handler {
    match (memory, by_cl) {
        (false, false) => by_width!(bytes, reg_imm, S),
        (false, true) => by_width!(bytes, reg_cl, S),
        (true, false) => by_width_and_address!(bytes, flat, mem_imm, S),
        (true, true) => by_width_and_address!(bytes, flat, mem_cl, S),
    }
}

/// The operation of a shift or rotate.
pub(super) fn shift(
    mnemonic: Mnemonic,
    memory: bool,
    by_cl: bool,
    bytes: usize,
    flat: bool,
) -> Option<Handler> {
    Some(match mnemonic {
        Mnemonic::Shl | Mnemonic::Sal => pick::<Shl>(memory, by_cl, bytes, flat),
        Mnemonic::Shr => pick::<Shr>(memory, by_cl, bytes, flat),
        Mnemonic::Sar => pick::<Sar>(memory, by_cl, bytes, flat),
        Mnemonic::Rol => pick::<Rol>(memory, by_cl, bytes, flat),
        Mnemonic::Ror => pick::<Ror>(memory, by_cl, bytes, flat),
        Mnemonic::Rcl => pick::<Rcl>(memory, by_cl, bytes, flat),
        Mnemonic::Rcr => pick::<Rcr>(memory, by_cl, bytes, flat),
        _ => return None,
    })
}

/// SHLD and SHRD. A 16-bit count past 16 gives an undefined result; real processors rotate the
/// concatenation on, and so does this.
fn double<W: Width>(cpu: &mut Cpu, a: u64, b: u64, count: u32, left: bool) -> u64 {
    let bits = W::BITS;
    let (a3, b3) = (u128::from(a), u128::from(b));
    let (r, cf) = if left {
        // a : b : a, so that counts up to twice the width have bits to take.
        let wide = if bits == 16 { a3 << 32 | b3 << 16 | a3 } else { a3 << bits | b3 };
        let size = if bits == 16 { 48 } else { 2 * bits };
        let r = (wide >> (size - bits - count.min(size - bits))) as u64 & W::MASK;
        (r, wide >> (size - count) & 1 != 0)
    } else {
        let wide = if bits == 16 { a3 << 32 | b3 << 16 | a3 } else { b3 << bits | a3 };
        ((wide >> count) as u64 & W::MASK, wide >> (count - 1) & 1 != 0)
    };
    let of = top::<W>(r) != top::<W>(a);
    cpu.flags.set_result_cf_of(W::sext(r), cf, of);
    r
}

fn double_shift(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let left = insn.mnemonic() == Mnemonic::Shld;
    let bytes = insn.op1_register().size();
    let count = if insn.op2_kind() == OpKind::Register {
        cpu.gpr(insn.op2_register())
    } else {
        insn.immediate(2)
    };
    let count = (count & if bytes == 8 { 63 } else { 31 }) as u32;
    let memory = if insn.op0_kind() == OpKind::Memory {
        // A read that will be a write: faults say so.
        let linear = cpu.address_of(insn, bytes as u64, true)?;
        cpu.probe_store(linear, bytes)?;
        Some(linear)
    } else {
        None
    };
    let a = match memory {
        Some(linear) => cpu.load_sized(linear, bytes as u64)?,
        None => cpu.gpr(insn.op0_register()),
    };
    let b = cpu.gpr(insn.op1_register());
    let r = match (count, bytes) {
        (0, _) => a,
        (_, 2) => double::<W16>(cpu, a, b, count, left),
        (_, 4) => double::<W32>(cpu, a, b, count, left),
        _ => double::<W64>(cpu, a, b, count, left),
    };
    match memory {
        Some(linear) => cpu.store_sized(linear, bytes as u64, r),
        None => {
            cpu.set_gpr(insn.op0_register(), r);
            Ok(())
        }
    }
}

/// The shifts that have no operation of their own.
pub(super) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    match insn.mnemonic() {
        Mnemonic::Shld | Mnemonic::Shrd => Some((double_shift, Ends::No)),
        _ => None,
    }
}
