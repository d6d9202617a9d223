//! Two-operand arithmetic and logic: ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST; and the one-operand
//! INC, DEC, NEG, NOT.

use super::address::Address;
use super::branch;
use super::pick::{by_condition, by_width, by_width_and_address, tri};
use crate::code::{Handler, Next, OpRef};
use crate::cpu::flags::Flags;
use crate::cpu::{Cpu, Int, W8, W16, W32, W64, Width};

/// A two-operand operation.
trait Binary: 'static {
    /// It writes its first operand.
    const WRITES: bool = true;
    fn run<W: Width>(flags: &mut Flags, a: u64, b: u64) -> u64;
}

#[inline(always)]
fn sum<W: Width>(flags: &mut Flags, a: u64, b: u64, carry: u64) -> u64 {
    let r = a.wrapping_add(b).wrapping_add(carry) & W::MASK;
    W::carries(flags, r, a & b | (a | b) & !r);
    r
}

#[inline(always)]
fn difference<W: Width>(flags: &mut Flags, a: u64, b: u64, borrow: u64) -> u64 {
    let r = a.wrapping_sub(b).wrapping_sub(borrow) & W::MASK;
    W::carries(flags, r, !a & b | (!a | b) & r);
    r
}

#[inline(always)]
fn logic<W: Width>(flags: &mut Flags, r: u64) -> u64 {
    flags.set_logic(W::sext(r));
    r
}

macro_rules! binary {
    ($($name:ident $writes:literal |$flags:ident, $a:ident, $b:ident| $e:expr;)*) => {$(
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<W: Width>($flags: &mut Flags, $a: u64, $b: u64) -> u64 { $e }
        }
    )*};
}

binary! {
    Add true |f, a, b| sum::<W>(f, a, b, 0);
    Or true |f, a, b| logic::<W>(f, a | b);
    Adc true |f, a, b| { let carry = u64::from(f.cf()); sum::<W>(f, a, b, carry) };
    Sbb true |f, a, b| { let borrow = u64::from(f.cf()); difference::<W>(f, a, b, borrow) };
    And true |f, a, b| logic::<W>(f, a & b);
    Sub true |f, a, b| difference::<W>(f, a, b, 0);
    Xor true |f, a, b| logic::<W>(f, a ^ b);
    Cmp false |f, a, b| difference::<W>(f, a, b, 0);
    Test false |f, a, b| logic::<W>(f, a & b);
}

fn reg_reg<B: Binary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (a, b) = (W::get(cpu, op.dst), W::get(cpu, op.src));
    let r = B::run::<W>(&mut cpu.flags, a, b);
    if B::WRITES {
        W::set(cpu, op.dst, r);
    }
    op.next(cpu)
}

fn reg_imm<B: Binary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (a, b) = (W::get(cpu, op.dst), op.imm as i64 as u64 & W::MASK);
    let r = B::run::<W>(&mut cpu.flags, a, b);
    if B::WRITES {
        W::set(cpu, op.dst, r);
    }
    op.next(cpu)
}

fn reg_mem<B: Binary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, false));
    let b = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let a = W::get(cpu, op.dst);
    let r = B::run::<W>(&mut cpu.flags, a, b);
    if B::WRITES {
        W::set(cpu, op.dst, r);
    }
    op.next(cpu)
}

#[inline(always)]
fn mem_with<B: Binary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef, b: u64) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, B::WRITES));
    if !B::WRITES {
        let a = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
        B::run::<W>(&mut cpu.flags, a, b);
        return op.next(cpu);
    }
    let place = tri!(cpu, op, cpu.place::<W::Int>(linear));
    let a = tri!(cpu, op, cpu.read_place::<W::Int>(place, linear)).widen();
    let r = B::run::<W>(&mut cpu.flags, a, b);
    tri!(cpu, op, cpu.write_place(place, linear, W::Int::truncate(r)));
    op.next(cpu)
}

fn mem_reg<B: Binary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = W::get(cpu, op.src);
    mem_with::<B, W, A>(cpu, op, b)
}

fn mem_imm<B: Binary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = op.imm as i64 as u64 & W::MASK;
    mem_with::<B, W, A>(cpu, op, b)
}

#[inline(always)]
fn locked_with<B: Binary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef, b: u64) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, true));
    let carry = cpu.flags.cf();
    let update = move |a| B::run::<W>(&mut Flags::carrying(carry), a, b);
    let old = tri!(cpu, op, cpu.update_locked::<W>(linear, update));
    // The flags are those of the attempt that succeeded.
    B::run::<W>(&mut cpu.flags, old, b);
    op.next(cpu)
}

fn locked_reg<B: Binary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = W::get(cpu, op.src);
    locked_with::<B, W, A>(cpu, op, b)
}

fn locked_imm<B: Binary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = op.imm as i64 as u64 & W::MASK;
    locked_with::<B, W, A>(cpu, op, b)
}

/// Where the operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    RegReg,
    RegImm,
    RegMem,
    MemReg,
    MemImm,
    LockedReg,
    LockedImm,
}

fn pick<B: Binary>(form: Form, bytes: usize, flat: bool) -> Handler {
    match form {
        Form::RegReg => by_width!(bytes, reg_reg, B),
        Form::RegImm => by_width!(bytes, reg_imm, B),
        Form::RegMem => by_width_and_address!(bytes, flat, reg_mem, B),
        Form::MemReg => by_width_and_address!(bytes, flat, mem_reg, B),
        Form::MemImm => by_width_and_address!(bytes, flat, mem_imm, B),
        Form::LockedReg => by_width_and_address!(bytes, flat, locked_reg, B),
        Form::LockedImm => by_width_and_address!(bytes, flat, locked_imm, B),
    }
}

/// The operation of a two-operand instruction.
pub(super) fn binary(
    mnemonic: iced_x86::Mnemonic,
    form: Form,
    bytes: usize,
    flat: bool,
) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    Some(match mnemonic {
        M::Add => pick::<Add>(form, bytes, flat),
        M::Or => pick::<Or>(form, bytes, flat),
        M::Adc => pick::<Adc>(form, bytes, flat),
        M::Sbb => pick::<Sbb>(form, bytes, flat),
        M::And => pick::<And>(form, bytes, flat),
        M::Sub => pick::<Sub>(form, bytes, flat),
        M::Xor => pick::<Xor>(form, bytes, flat),
        M::Cmp => pick::<Cmp>(form, bytes, flat),
        M::Test => pick::<Test>(form, bytes, flat),
        _ => return None,
    })
}

/// A comparison and the conditional jump after it, as one operation in 64-bit mode: the pair is what
/// most blocks end in. The jump keeps its own operation behind this one.
fn fused_reg_reg<const CC: u8, B: Binary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (a, b) = (W::get(cpu, op.dst), W::get(cpu, op.src));
    B::run::<W>(&mut cpu.flags, a, b);
    branch::jcc64::<CC>(cpu, op.following())
}

fn fused_reg_imm<const CC: u8, B: Binary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let (a, b) = (W::get(cpu, op.dst), op.imm as i64 as u64 & W::MASK);
    B::run::<W>(&mut cpu.flags, a, b);
    branch::jcc64::<CC>(cpu, op.following())
}

fn fused_reg_mem<const CC: u8, B: Binary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = cpu.ea64(&op);
    let b = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let a = W::get(cpu, op.dst);
    B::run::<W>(&mut cpu.flags, a, b);
    branch::jcc64::<CC>(cpu, op.following())
}

fn fused_mem_reg<const CC: u8, B: Binary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = cpu.ea64(&op);
    let a = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let b = W::get(cpu, op.src);
    B::run::<W>(&mut cpu.flags, a, b);
    branch::jcc64::<CC>(cpu, op.following())
}

fn fused_mem_imm<const CC: u8, B: Binary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = cpu.ea64(&op);
    let a = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    let b = op.imm as i64 as u64 & W::MASK;
    B::run::<W>(&mut cpu.flags, a, b);
    branch::jcc64::<CC>(cpu, op.following())
}

fn pick_fused<B: Binary>(cc: u8, form: Form, bytes: usize) -> Option<Handler> {
    macro_rules! widths {
        ($f:ident) => {
            match bytes {
                1 => by_condition!(cc, $f, B, W8),
                2 => by_condition!(cc, $f, B, W16),
                4 => by_condition!(cc, $f, B, W32),
                _ => by_condition!(cc, $f, B, W64),
            }
        };
    }
    Some(match form {
        Form::RegReg => widths!(fused_reg_reg),
        Form::RegImm => widths!(fused_reg_imm),
        Form::RegMem => widths!(fused_reg_mem),
        Form::MemReg => widths!(fused_mem_reg),
        Form::MemImm => widths!(fused_mem_imm),
        Form::LockedReg | Form::LockedImm => return None,
    })
}

/// What a comparison must be for [`fuse`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Comparison {
    test: bool,
    form: Form,
    bytes: usize,
}

impl Comparison {
    /// `insn` as a comparison that can be fused, if it is one: CMP or TEST whose memory operand, if
    /// any, has a 64-bit address.
    pub fn of(insn: &iced_x86::Instruction, flat: bool) -> Option<Self> {
        use iced_x86::{Mnemonic, OpKind};
        let test = match insn.mnemonic() {
            Mnemonic::Cmp => false,
            Mnemonic::Test => true,
            _ => return None,
        };
        let form = match (insn.op0_kind(), insn.op1_kind()) {
            (OpKind::Register, OpKind::Register) => Form::RegReg,
            (OpKind::Register, OpKind::Memory) if flat => Form::RegMem,
            (OpKind::Memory, OpKind::Register) if flat => Form::MemReg,
            (OpKind::Memory, _) if flat => Form::MemImm,
            (OpKind::Register, OpKind::Memory) | (OpKind::Memory, _) => return None,
            _ => Form::RegImm,
        };
        Some(Self { test, form, bytes: super::operand_bytes(insn, 0) })
    }

    /// The operation of this comparison fused with a jump on condition `cc`.
    pub fn fuse(self, cc: u8) -> Option<Handler> {
        if self.test {
            pick_fused::<Test>(cc, self.form, self.bytes)
        } else {
            pick_fused::<Cmp>(cc, self.form, self.bytes)
        }
    }
}

/// A one-operand operation.
trait Unary: 'static {
    fn run<W: Width>(flags: &mut Flags, a: u64) -> u64;
}

struct Inc;
struct Dec;
struct Neg;
struct Not;

impl Unary for Inc {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64) -> u64 {
        let r = a.wrapping_add(1) & W::MASK;
        W::carries_but_cf(flags, r, a & 1 | (a | 1) & !r);
        r
    }
}

impl Unary for Dec {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64) -> u64 {
        let r = a.wrapping_sub(1) & W::MASK;
        W::carries_but_cf(flags, r, !a & 1 | (!a | 1) & r);
        r
    }
}

impl Unary for Neg {
    #[inline(always)]
    fn run<W: Width>(flags: &mut Flags, a: u64) -> u64 {
        difference::<W>(flags, 0, a, 0)
    }
}

impl Unary for Not {
    #[inline(always)]
    fn run<W: Width>(_: &mut Flags, a: u64) -> u64 {
        !a & W::MASK
    }
}

fn unary_reg<U: Unary, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let a = W::get(cpu, op.dst);
    let r = U::run::<W>(&mut cpu.flags, a);
    W::set(cpu, op.dst, r);
    op.next(cpu)
}

fn unary_mem<U: Unary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, true));
    let place = tri!(cpu, op, cpu.place::<W::Int>(linear));
    let a = tri!(cpu, op, cpu.read_place::<W::Int>(place, linear)).widen();
    let r = U::run::<W>(&mut cpu.flags, a);
    tri!(cpu, op, cpu.write_place(place, linear, W::Int::truncate(r)));
    op.next(cpu)
}

fn unary_locked<U: Unary, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, true));
    let update = |a| U::run::<W>(&mut Flags::carrying(false), a);
    let old = tri!(cpu, op, cpu.update_locked::<W>(linear, update));
    U::run::<W>(&mut cpu.flags, old);
    op.next(cpu)
}

fn pick_unary<U: Unary>(memory: bool, locked: bool, bytes: usize, flat: bool) -> Handler {
    match (memory, locked) {
        (false, _) => by_width!(bytes, unary_reg, U),
        (true, false) => by_width_and_address!(bytes, flat, unary_mem, U),
        (true, true) => by_width_and_address!(bytes, flat, unary_locked, U),
    }
}

/// The operation of a one-operand instruction.
pub(super) fn unary(
    mnemonic: iced_x86::Mnemonic,
    memory: bool,
    locked: bool,
    bytes: usize,
    flat: bool,
) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    Some(match mnemonic {
        M::Inc => pick_unary::<Inc>(memory, locked, bytes, flat),
        M::Dec => pick_unary::<Dec>(memory, locked, bytes, flat),
        M::Neg => pick_unary::<Neg>(memory, locked, bytes, flat),
        M::Not => pick_unary::<Not>(memory, locked, bytes, flat),
        _ => return None,
    })
}
