//! Data movement: MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, SETcc, BSWAP, sign extensions.

use super::address::Address;
use super::pick::{by_condition, by_width, by_width_and_address, tri};
use crate::code::{FLAG_ADDRESS, Handler, Next, OpRef};
use crate::cpu::{Cpu, Int, RAX, RDX, W8, W16, W32, W64, Width};

pub(super) fn mov_reg_reg<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = W::get(cpu, op.src);
    W::set(cpu, op.dst, v);
    op.next(cpu)
}

/// The immediate is in `disp`, so that it may have 64 bits.
pub(super) fn mov_reg_imm<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    W::set(cpu, op.dst, op.disp as u64);
    op.next(cpu)
}

pub(super) fn mov_load<W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, false));
    let v = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    W::set(cpu, op.dst, v);
    op.next(cpu)
}

pub(super) fn mov_store<W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, true));
    let v = W::Int::truncate(W::get(cpu, op.src));
    tri!(cpu, op, cpu.store(linear, v));
    op.next(cpu)
}

pub(super) fn mov_store_imm<W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, true));
    tri!(cpu, op, cpu.store(linear, W::Int::truncate(op.imm as i64 as u64)));
    op.next(cpu)
}

/// MOVZX and MOVSX from `S` to `D`.
fn extend_reg<const SIGNED: bool, S: Width, D: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = S::get(cpu, op.src);
    D::set(cpu, op.dst, if SIGNED { S::sext(v) as u64 & D::MASK } else { v });
    op.next(cpu)
}

fn extend_load<const SIGNED: bool, S: Width, D: Width, A: Address>(
    cpu: &mut Cpu,
    op: OpRef,
) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, S::BYTES, false));
    let v = tri!(cpu, op, cpu.load::<S::Int>(linear)).widen();
    D::set(cpu, op.dst, if SIGNED { S::sext(v) as u64 & D::MASK } else { v });
    op.next(cpu)
}

/// The operation of MOVZX, MOVSX and MOVSXD.
pub(super) fn extend(signed: bool, from: usize, to: usize, memory: bool, flat: bool) -> Handler {
    use super::address::{Flat, General};
    macro_rules! go {
        ($s:ty, $d:ty) => {
            match (signed, memory, flat) {
                (true, false, _) => extend_reg::<true, $s, $d> as Handler,
                (false, false, _) => extend_reg::<false, $s, $d>,
                (true, true, true) => extend_load::<true, $s, $d, Flat>,
                (false, true, true) => extend_load::<false, $s, $d, Flat>,
                (true, true, false) => extend_load::<true, $s, $d, General>,
                (false, true, false) => extend_load::<false, $s, $d, General>,
            }
        };
    }
    match (from, to) {
        (1, 2) => go!(W8, W16),
        (1, 4) => go!(W8, W32),
        (1, _) => go!(W8, W64),
        (2, 2) => go!(W16, W16),
        (2, 4) => go!(W16, W32),
        (2, _) => go!(W16, W64),
        (_, 2) => go!(W32, W16),
        (_, 4) => go!(W32, W32),
        _ => go!(W32, W64),
    }
}

/// LEA with 64-bit addresses: the segment plays no part.
pub(super) fn lea<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = cpu.offset(&op) & W::MASK;
    W::set(cpu, op.dst, v);
    op.next(cpu)
}

/// LEA with a shorter address size.
pub(super) fn lea_cut<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = cpu.offset_cut(&op) & W::MASK;
    W::set(cpu, op.dst, v);
    op.next(cpu)
}

/// The operation of LEA.
pub(super) fn pick_lea(bytes: usize, flags: u8) -> Handler {
    if flags & FLAG_ADDRESS == 2 { by_width!(bytes, lea) } else { by_width!(bytes, lea_cut) }
}

pub(super) fn xchg_reg_reg<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (a, b) = (W::get(cpu, op.dst), W::get(cpu, op.src));
    W::set(cpu, op.dst, b);
    W::set(cpu, op.src, a);
    op.next(cpu)
}

/// XCHG with memory is locked whether it says so or not (Intel SDM vol. 3A §9.1.2.1).
pub(super) fn xchg_mem<W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, true));
    let new = W::get(cpu, op.src);
    let old = tri!(cpu, op, cpu.update_locked::<W>(linear, move |_| new));
    W::set(cpu, op.src, old);
    op.next(cpu)
}

/// A 32-bit CMOV clears the upper half even if it does not move.
fn cmov_reg<const CC: u8, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let r = if cpu.flags.condition::<CC>() { op.src } else { op.dst };
    let v = W::get(cpu, r);
    W::set(cpu, op.dst, v);
    op.next(cpu)
}

/// CMOV reads its memory operand in any case.
fn cmov_mem<const CC: u8, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, false));
    let from = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let v = if cpu.flags.condition::<CC>() { from } else { W::get(cpu, op.dst) };
    W::set(cpu, op.dst, v);
    op.next(cpu)
}

/// The operation of CMOVcc.
pub(super) fn pick_cmov(cc: u8, bytes: usize, memory: bool, flat: bool) -> Handler {
    use super::address::{Flat, General};
    match (bytes, memory, flat) {
        (2, false, _) => by_condition!(cc, cmov_reg, W16),
        (4, false, _) => by_condition!(cc, cmov_reg, W32),
        (_, false, _) => by_condition!(cc, cmov_reg, W64),
        (2, true, true) => by_condition!(cc, cmov_mem, W16, Flat),
        (4, true, true) => by_condition!(cc, cmov_mem, W32, Flat),
        (_, true, true) => by_condition!(cc, cmov_mem, W64, Flat),
        (2, true, false) => by_condition!(cc, cmov_mem, W16, General),
        (4, true, false) => by_condition!(cc, cmov_mem, W32, General),
        (_, true, false) => by_condition!(cc, cmov_mem, W64, General),
    }
}

fn set_reg<const CC: u8>(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = u64::from(cpu.flags.condition::<CC>());
    W8::set(cpu, op.dst, v);
    op.next(cpu)
}

fn set_mem<const CC: u8, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, 1, true));
    let v = u8::from(cpu.flags.condition::<CC>());
    tri!(cpu, op, cpu.store(linear, v));
    op.next(cpu)
}

/// The operation of SETcc.
pub(super) fn pick_set(cc: u8, memory: bool, flat: bool) -> Handler {
    use super::address::{Flat, General};
    match (memory, flat) {
        (false, _) => by_condition!(cc, set_reg),
        (true, true) => by_condition!(cc, set_mem, Flat),
        (true, false) => by_condition!(cc, set_mem, General),
    }
}

pub(super) fn bswap32(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = W32::get(cpu, op.dst) as u32;
    W32::set(cpu, op.dst, u64::from(v.swap_bytes()));
    op.next(cpu)
}

pub(super) fn bswap64(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = W64::get(cpu, op.dst);
    W64::set(cpu, op.dst, v.swap_bytes());
    op.next(cpu)
}

/// CBW, CWDE, CDQE: the accumulator from half of `W` to `W`.
pub(super) fn extend_accumulator<H: Width, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = H::sext(H::get(cpu, RAX as u8)) as u64 & W::MASK;
    W::set(cpu, RAX as u8, v);
    op.next(cpu)
}

/// CWD, CDQ, CQO: the accumulator's sign into the data register.
pub(super) fn spread_sign<W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let sign = (W::sext(W::get(cpu, RAX as u8)) >> 63) as u64 & W::MASK;
    W::set(cpu, RDX as u8, sign);
    op.next(cpu)
}

/// The operations of MOV by where the operands are.
pub(super) fn pick_load(bytes: usize, flat: bool) -> Handler {
    by_width_and_address!(bytes, flat, mov_load)
}

pub(super) fn pick_store(bytes: usize, flat: bool) -> Handler {
    by_width_and_address!(bytes, flat, mov_store)
}

pub(super) fn pick_store_imm(bytes: usize, flat: bool) -> Handler {
    by_width_and_address!(bytes, flat, mov_store_imm)
}

pub(super) fn pick_mov_reg(bytes: usize) -> Handler {
    by_width!(bytes, mov_reg_reg)
}

pub(super) fn pick_mov_imm(bytes: usize) -> Handler {
    by_width!(bytes, mov_reg_imm)
}

pub(super) fn pick_xchg(bytes: usize, memory: bool, flat: bool) -> Handler {
    if memory {
        by_width_and_address!(bytes, flat, xchg_mem)
    } else {
        by_width!(bytes, xchg_reg_reg)
    }
}
