//! The integer instruction set.
//!
//! [`select`] gives the common instructions an operation of their own, specialised by width, place
//! of the operands and addressing; [`cold`] runs the rest from their full decoding.

mod address;
mod alu;
mod bits;
pub(crate) mod branch;
mod misc;
mod moves;
mod muldiv;
pub(crate) mod operand;
pub(crate) mod pick;
mod shift;
mod stack;
mod string;

pub(crate) use alu::Comparison;
use alu::Form;
use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};
use operand::register_number;

use crate::code::{ColdChoice, Ends, FLAG_ADDRESS, FLAG_STACK, Op};
use crate::cpu::{Mode, W8, W16, W32, W64};

fn is_immediate(kind: OpKind) -> bool {
    !matches!(
        kind,
        OpKind::Register
            | OpKind::Memory
            | OpKind::NearBranch16
            | OpKind::NearBranch32
            | OpKind::NearBranch64
            | OpKind::FarBranch16
            | OpKind::FarBranch32
            | OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}

/// Makes `op` exchange two registers.
pub(crate) fn exchange(op: &mut Op, a: u8, b: u8, bytes: usize) {
    (op.dst, op.src) = (a, b);
    op.run = moves::pick_xchg(bytes, false, true);
}

/// Bytes of operand `n`.
fn operand_bytes(insn: &Instruction, n: u32) -> usize {
    match insn.op_kind(n) {
        OpKind::Register => insn.op_register(n).size(),
        _ => insn.memory_size().size(),
    }
}

/// Chooses the operation of an integer instruction that has one of its own.
pub(crate) fn select(op: &mut Op, insn: &Instruction, mode: Mode) -> Option<Ends> {
    let general = |r: Register| r.is_gpr();
    let flat = mode.contains(Mode::LONG64) && op.flags & FLAG_ADDRESS == 2;
    let (kind0, kind1) = (insn.op0_kind(), insn.op1_kind());
    if insn.flow_control() != FlowControl::Next
        && let Some(ends) = select_branch(op, insn, mode, flat)
    {
        return Some(ends);
    }
    let reg = |n: u32| register_number(insn.op_register(n));
    let mem0 = insn.op_count() > 0 && kind0 == OpKind::Memory;
    let mem1 = insn.op_count() > 1 && kind1 == OpKind::Memory;
    let mnemonic = insn.mnemonic();
    // Anything whose register operand is not general (control, segment, vector) is others' business.
    let foreign = (0..insn.op_count())
        .any(|n| insn.op_kind(n) == OpKind::Register && !general(insn.op_register(n)));
    if foreign {
        return None;
    }
    let run = match mnemonic {
        Mnemonic::Nop => Some(misc::nop_op as crate::code::Handler),
        Mnemonic::Add
        | Mnemonic::Or
        | Mnemonic::Adc
        | Mnemonic::Sbb
        | Mnemonic::And
        | Mnemonic::Sub
        | Mnemonic::Xor
        | Mnemonic::Cmp
        | Mnemonic::Test => {
            let bytes = operand_bytes(insn, 0);
            let locked = insn.has_lock_prefix();
            let form = if is_immediate(kind1) {
                op.imm = insn.immediate(1) as i32;
                match (mem0, locked) {
                    (false, _) => Form::RegImm,
                    (true, false) => Form::MemImm,
                    (true, true) => Form::LockedImm,
                }
            } else if mem1 {
                Form::RegMem
            } else {
                op.src = reg(1);
                match (mem0, locked) {
                    (false, _) => Form::RegReg,
                    (true, false) => Form::MemReg,
                    (true, true) => Form::LockedReg,
                }
            };
            if !mem0 {
                op.dst = reg(0);
            }
            alu::binary(mnemonic, form, bytes, flat)
        }
        Mnemonic::Inc | Mnemonic::Dec | Mnemonic::Neg | Mnemonic::Not => {
            if !mem0 {
                op.dst = reg(0);
            }
            alu::unary(mnemonic, mem0, insn.has_lock_prefix(), operand_bytes(insn, 0), flat)
        }
        Mnemonic::Mov => select_mov(op, insn, flat),
        Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => {
            op.dst = reg(0);
            if !mem1 {
                op.src = reg(1);
            }
            let signed = mnemonic != Mnemonic::Movzx;
            Some(moves::extend(signed, operand_bytes(insn, 1), operand_bytes(insn, 0), mem1, flat))
        }
        Mnemonic::Lea => {
            op.dst = reg(0);
            Some(moves::pick_lea(operand_bytes(insn, 0), op.flags))
        }
        Mnemonic::Xchg => {
            // Either operand may be the memory one.
            if mem0 || mem1 {
                op.src = reg(u32::from(mem0));
            } else {
                (op.dst, op.src) = (reg(0), reg(1));
            }
            Some(moves::pick_xchg(operand_bytes(insn, 0), mem0 || mem1, flat))
        }
        Mnemonic::Bswap => {
            op.dst = reg(0);
            match operand_bytes(insn, 0) {
                4 => Some(moves::bswap32 as crate::code::Handler),
                8 => Some(moves::bswap64 as crate::code::Handler),
                // BSWAP of 16 bits is undefined; processors clear the register's low half.
                _ => {
                    op.disp = 0;
                    Some(moves::pick_mov_imm(2) as crate::code::Handler)
                }
            }
        }
        Mnemonic::Cbw => Some(moves::extend_accumulator::<W8, W16> as crate::code::Handler),
        Mnemonic::Cwde => Some(moves::extend_accumulator::<W16, W32> as crate::code::Handler),
        Mnemonic::Cdqe => Some(moves::extend_accumulator::<W32, W64> as crate::code::Handler),
        Mnemonic::Cwd => Some(moves::spread_sign::<W16> as crate::code::Handler),
        Mnemonic::Cdq => Some(moves::spread_sign::<W32> as crate::code::Handler),
        Mnemonic::Cqo => Some(moves::spread_sign::<W64> as crate::code::Handler),
        Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr => {
            let by_cl = !is_immediate(kind1);
            if !by_cl {
                op.imm = insn.immediate(1) as u8 as i32;
            }
            if !mem0 {
                op.dst = reg(0);
            }
            shift::shift(mnemonic, mem0, by_cl, operand_bytes(insn, 0), flat)
        }
        Mnemonic::Imul if insn.op_count() >= 2 => {
            op.dst = reg(0);
            let immediate = insn.op_count() == 3;
            if immediate {
                op.imm = insn.immediate(2) as i32;
            }
            if !mem1 {
                op.src = reg(1);
            }
            Some(muldiv::imul(mem1, immediate, operand_bytes(insn, 0), flat))
        }
        Mnemonic::Mul | Mnemonic::Imul | Mnemonic::Div | Mnemonic::Idiv => {
            if !mem0 {
                op.dst = reg(0);
            }
            muldiv::wide(mnemonic, mem0, operand_bytes(insn, 0), flat)
        }
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc if !mem0 => {
            let what = match mnemonic {
                Mnemonic::Bt => 0,
                Mnemonic::Bts => 1,
                Mnemonic::Btr => 2,
                _ => 3,
            };
            op.dst = reg(0);
            let immediate = is_immediate(kind1);
            if immediate {
                op.imm = insn.immediate(1) as i32;
            } else {
                op.src = reg(1);
            }
            Some(bits::bit_in_register(what, immediate, operand_bytes(insn, 0)))
        }
        Mnemonic::Bsf | Mnemonic::Bsr | Mnemonic::Tzcnt | Mnemonic::Lzcnt | Mnemonic::Popcnt => {
            op.dst = reg(0);
            if !mem1 {
                op.src = reg(1);
            }
            bits::scan(mnemonic, mem1, operand_bytes(insn, 0), flat)
        }
        Mnemonic::Push | Mnemonic::Pop | Mnemonic::Leave if mode.contains(Mode::LONG64) => {
            select_stack(op, insn, flat)
        }
        _ => select_conditional(op, insn, mem0, mem1, flat),
    };
    if let Some(run) = run {
        op.run = run;
        return Some(Ends::No);
    }
    string::select(op, insn)
}

fn select_mov(op: &mut Op, insn: &Instruction, flat: bool) -> Option<crate::code::Handler> {
    let bytes = operand_bytes(insn, 0);
    let memory = |kind| kind == OpKind::Memory;
    if is_immediate(insn.op1_kind()) {
        if memory(insn.op0_kind()) {
            op.imm = insn.immediate(1) as i32;
            return Some(moves::pick_store_imm(bytes, flat));
        }
        op.dst = register_number(insn.op0_register());
        op.disp = insn.immediate(1) as i64;
        return Some(moves::pick_mov_imm(bytes));
    }
    if memory(insn.op0_kind()) {
        op.src = register_number(insn.op1_register());
        return Some(moves::pick_store(bytes, flat));
    }
    op.dst = register_number(insn.op0_register());
    if memory(insn.op1_kind()) {
        return Some(moves::pick_load(bytes, flat));
    }
    op.src = register_number(insn.op1_register());
    Some(moves::pick_mov_reg(bytes))
}

fn select_conditional(
    op: &mut Op,
    insn: &Instruction,
    mem0: bool,
    mem1: bool,
    flat: bool,
) -> Option<crate::code::Handler> {
    let condition = insn.condition_code();
    if condition == iced_x86::ConditionCode::None {
        return None;
    }
    let cc = condition_number(condition);
    let name = insn.mnemonic();
    if is_cmov(name) {
        op.dst = register_number(insn.op0_register());
        if !mem1 {
            op.src = register_number(insn.op1_register());
        }
        return Some(moves::pick_cmov(cc, operand_bytes(insn, 0), mem1, flat));
    }
    if is_set(name) {
        if !mem0 {
            op.dst = register_number(insn.op0_register());
        }
        return Some(moves::pick_set(cc, mem0, flat));
    }
    None
}

/// The condition of `insn`, if it is a conditional jump other than by counter.
pub(crate) fn jump_condition(insn: &Instruction) -> Option<u8> {
    insn.is_jcc_short_or_near().then(|| condition_number(insn.condition_code()))
}

/// The 4-bit code of a condition.
fn condition_number(condition: iced_x86::ConditionCode) -> u8 {
    use iced_x86::ConditionCode as C;
    match condition {
        C::None | C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    }
}

fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}

fn is_set(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}

/// PUSH, POP and LEAVE of eight bytes in 64-bit mode.
fn select_stack(op: &mut Op, insn: &Instruction, flat: bool) -> Option<crate::code::Handler> {
    if insn.stack_pointer_increment().unsigned_abs() != 8 && insn.mnemonic() != Mnemonic::Leave {
        return None;
    }
    if insn.op0_kind() != OpKind::Memory {
        op.flags |= FLAG_STACK;
    }
    match (insn.mnemonic(), insn.op0_kind()) {
        (Mnemonic::Leave, _) if insn.code() == iced_x86::Code::Leaveq => Some(branch::leave64),
        (Mnemonic::Push, OpKind::Register) => {
            op.dst = register_number(insn.op0_register());
            Some(branch::push_reg64)
        }
        (Mnemonic::Push, OpKind::Memory) => Some(if flat {
            branch::push_mem64::<address::Flat>
        } else {
            branch::push_mem64::<address::General>
        }),
        (Mnemonic::Push, _) => {
            op.imm = insn.immediate(0) as i32;
            Some(branch::push_imm64)
        }
        (Mnemonic::Pop, OpKind::Register) => {
            op.dst = register_number(insn.op0_register());
            Some(branch::pop_reg64)
        }
        _ => None,
    }
}

/// Near branches.
fn select_branch(op: &mut Op, insn: &Instruction, mode: Mode, flat: bool) -> Option<Ends> {
    let long = mode.contains(Mode::LONG64);
    let relative = matches!(
        insn.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    ) && insn.op_count() > 0;
    let run: crate::code::Handler = match insn.flow_control() {
        FlowControl::UnconditionalBranch if relative => {
            relative_target(op, insn);
            if long { branch::jmp64 } else { branch::jmp_cut }
        }
        FlowControl::Call if relative => {
            relative_target(op, insn);
            op.flags |= FLAG_STACK;
            if long { branch::call64 } else { branch::call_cut }
        }
        FlowControl::ConditionalBranch if relative => {
            relative_target(op, insn);
            return select_conditional_branch(op, insn, long);
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            return select_indirect(op, insn, long, flat);
        }
        FlowControl::Return if matches!(insn.mnemonic(), Mnemonic::Ret) => {
            op.imm = if insn.op_count() > 0 { insn.immediate(0) as i32 & 0xFFFF } else { 0 };
            op.flags |= FLAG_STACK;
            let bytes = match insn.code() {
                iced_x86::Code::Retnw | iced_x86::Code::Retnw_imm16 => 2,
                iced_x86::Code::Retnd | iced_x86::Code::Retnd_imm16 => 4,
                iced_x86::Code::Retnq | iced_x86::Code::Retnq_imm16 => 8,
                _ => return None,
            };
            op.extra = bytes;
            if long && bytes == 8 { branch::ret64 } else { branch::ret_cut }
        }
        _ => return None,
    };
    op.run = run;
    Some(Ends::Yes)
}

/// The target of a relative branch, relative to the block, and its operand size.
fn relative_target(op: &mut Op, insn: &Instruction) {
    match insn.op0_kind() {
        OpKind::NearBranch16 => (op.disp, op.extra) = (i64::from(insn.near_branch16()), 2),
        OpKind::NearBranch32 => (op.disp, op.extra) = (i64::from(insn.near_branch32() as i32), 4),
        _ => (op.disp, op.extra) = (insn.near_branch64() as i64, 8),
    }
}

fn select_conditional_branch(op: &mut Op, insn: &Instruction, long: bool) -> Option<Ends> {
    use iced_x86::Code as C;
    let name = insn.mnemonic();
    // The counter's width is the address size.
    op.flags = match insn.code() {
        C::Jcxz_rel8_16 | C::Jcxz_rel8_32 => 0,
        C::Jecxz_rel8_16 | C::Jecxz_rel8_32 | C::Jecxz_rel8_64 => 1,
        C::Loop_rel8_16_CX | C::Loop_rel8_32_CX => 0,
        C::Loope_rel8_16_CX | C::Loope_rel8_32_CX => 0,
        C::Loopne_rel8_16_CX | C::Loopne_rel8_32_CX => 0,
        C::Loop_rel8_16_ECX | C::Loop_rel8_32_ECX | C::Loop_rel8_64_ECX => 1,
        C::Loope_rel8_16_ECX | C::Loope_rel8_32_ECX | C::Loope_rel8_64_ECX => 1,
        C::Loopne_rel8_16_ECX | C::Loopne_rel8_32_ECX | C::Loopne_rel8_64_ECX => 1,
        _ => 2,
    };
    op.run = match name {
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => branch::jcxz,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            op.imm = match name {
                Mnemonic::Loopne => 0,
                Mnemonic::Loope => 1,
                _ => 2,
            };
            branch::loop_
        }
        _ if insn.is_jcc_short_or_near() => {
            branch::pick_jcc(condition_number(insn.condition_code()), long)
        }
        _ => return None,
    };
    Some(Ends::Yes)
}

fn select_indirect(op: &mut Op, insn: &Instruction, long: bool, flat: bool) -> Option<Ends> {
    let call = insn.flow_control() == FlowControl::IndirectCall;
    let memory = insn.op0_kind() == OpKind::Memory;
    if insn.is_jmp_far_indirect() || insn.is_call_far_indirect() {
        return None;
    }
    let bytes = operand_bytes(insn, 0);
    if !memory {
        op.dst = register_number(insn.op0_register());
    }
    op.run = if long && bytes == 8 {
        match (call, memory, flat) {
            (false, false, _) => branch::jmp_reg64 as crate::code::Handler,
            (true, false, _) => branch::call_reg64,
            (false, true, true) => branch::jmp_mem64::<address::Flat>,
            (false, true, false) => branch::jmp_mem64::<address::General>,
            (true, true, true) => branch::call_mem64::<address::Flat>,
            (true, true, false) => branch::call_mem64::<address::General>,
        }
    } else {
        op.extra = bytes as u16;
        op.imm = i32::from(call);
        if memory {
            op.src = 0xFF;
        }
        branch::indirect_cut
    };
    Some(Ends::Yes)
}

/// Chooses how a rarer integer instruction runs.
pub(crate) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    misc::cold(insn)
        .or_else(|| bits::cold(insn))
        .or_else(|| shift::cold(insn))
        .or_else(|| stack::cold(insn))
}
