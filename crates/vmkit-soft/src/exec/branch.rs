//! Near branches, and the ways a block ends.

use std::ptr::null;

use super::address::Address;
use super::pick::{by_condition, tri};
use crate::code::{ELSEWHERE, Handler, Next, OpRef};
use crate::cpu::trap::{self, TrapKind};
use crate::cpu::{CS, Cpu, Int, Mode, RCX, REG_BLOCK, W16, W32, W64, Width};
use crate::mem::canonical;

impl Cpu {
    /// The running block's RIP plus `offset`, cut to the code size.
    #[inline(always)]
    pub fn rip_at(&self, offset: u64) -> u64 {
        let rip = self.regs[usize::from(REG_BLOCK)].wrapping_add(offset);
        if self.mode.contains(Mode::LONG64) { rip } else { rip & 0xFFFF_FFFF }
    }

    /// Ends the block: its instructions are done. Goes to what link `which` leads to, or to a look-up.
    #[inline(always)]
    fn follow(&mut self, which: usize) -> Next {
        let generation = self.generation;
        let block = self.running();
        let (link, count) = (block.links[which & 1], block.instructions);
        self.instructions += u64::from(count);
        if link.generation == generation {
            return self.go_on(link.block);
        }
        if link.generation == ELSEWHERE {
            let block = self.code.jump(self.rip, self.context, self.translations);
            return self.go_on(block);
        }
        self.link_from = Some((self.block, which));
        null()
    }

    /// Ends the block with the branch that is taken, whose target before it was cut to the code size is
    /// `whole`. One that wraps leads elsewhere from another address of the same page, so it is no link.
    #[inline(always)]
    fn follow_cut(&mut self, whole: u64) -> Next {
        if self.rip == whole { self.follow(1) } else { self.follow_rip() }
    }

    /// Ends the block with a jump to wherever `rip` is.
    #[inline(always)]
    fn follow_rip(&mut self) -> Next {
        self.instructions += u64::from(self.running().instructions);
        let block = self.code.jump(self.rip, self.context, self.translations);
        self.go_on(block)
    }

    /// Leaves the block at `op`, which did not complete: `cpu.rip` is its address, and `cpu.trap` says
    /// what happened.
    #[cold]
    #[inline(never)]
    pub fn trap_exit(&mut self, op: OpRef) -> Next {
        self.rip = self.rip_at(u64::from(op.off));
        self.instructions += self.running().position(op);
        if self.trap == TrapKind::NonCanonical {
            let stack = op.flags & crate::code::FLAG_STACK != 0;
            let _ = self.raise_with(if stack { trap::SS } else { trap::GP }, 0);
        }
        null()
    }

    /// Leaves the block before `op`, with nothing the matter.
    #[inline(never)]
    pub fn leave_before(&mut self, op: OpRef) -> Next {
        self.rip = self.rip_at(u64::from(op.off));
        self.instructions += self.running().position(op);
        null()
    }

    /// Checks a branch target in 64-bit mode and in legacy modes' segment.
    #[inline(always)]
    fn target_ok(&mut self, target: u64) -> Result<(), trap::Trap> {
        let ok = if self.mode.contains(Mode::LONG64) {
            canonical(target)
        } else {
            target <= u64::from(self.segs[CS].limit)
        };
        if ok { Ok(()) } else { Err(self.gp0()) }
    }
}

/// The block goes on in the next one: the pseudo-operation after its last instruction.
pub(crate) fn fall_through(cpu: &mut Cpu, op: OpRef) -> Next {
    cpu.rip = cpu.rip_at(u64::from(op.off));
    cpu.follow(0)
}

/// The code segment ends somewhere: sees that it is not before the block's last byte, which is `imm` past
/// its first. The pseudo-operation before the first instruction.
pub(crate) fn within_limit(cpu: &mut Cpu, op: OpRef) -> Next {
    let last = cpu.regs[usize::from(REG_BLOCK)].wrapping_add(op.imm as u64);
    if last > u64::from(cpu.segs[CS].limit) { past_limit(cpu, op) } else { op.next(cpu) }
}

/// The block goes past the end of the code segment: its first instruction runs alone, if that does not.
#[cold]
#[inline(never)]
fn past_limit(cpu: &mut Cpu, op: OpRef) -> Next {
    if cpu.running().instructions <= 1 {
        let _ = cpu.gp0();
        return cpu.trap_exit(op);
    }
    cpu.rip = cpu.rip_at(0);
    // To find the instruction's own block may empty the cache.
    cpu.block = null();
    // What cannot be fetched is in `cpu.trap`.
    let _ = cpu.run_single();
    null()
}

/// Stands in for the operations after one that dropped its own block.
pub(crate) fn cut_off(cpu: &mut Cpu, op: OpRef) -> Next {
    cpu.leave_before(op)
}

/// #UD.
pub(crate) fn undefined(cpu: &mut Cpu, op: OpRef) -> Next {
    let _ = cpu.ud();
    cpu.trap_exit(op)
}

/// More than fifteen bytes: #GP(0).
pub(crate) fn too_long(cpu: &mut Cpu, op: OpRef) -> Next {
    let _ = cpu.gp0();
    cpu.trap_exit(op)
}

/// The CPU model lists the instruction and this processor lacks it: the run ends.
pub(crate) fn lacking(cpu: &mut Cpu, op: OpRef) -> Next {
    let _ = cpu.unimplemented();
    cpu.trap_exit(op)
}

/// The masks a branch target is cut with, by operand size.
fn cut(target: u64, bytes: u16) -> u64 {
    match bytes {
        2 => target & 0xFFFF,
        4 => target & 0xFFFF_FFFF,
        _ => target,
    }
}

/// JMP rel in 64-bit mode; `disp` is the target relative to the block.
pub(super) fn jmp64(cpu: &mut Cpu, op: OpRef) -> Next {
    cpu.rip = cpu.regs[usize::from(REG_BLOCK)].wrapping_add(op.disp as u64);
    cpu.follow(1)
}

/// JMP rel in other modes; `extra` is the operand size.
pub(super) fn jmp_cut(cpu: &mut Cpu, op: OpRef) -> Next {
    let whole = cpu.regs[usize::from(REG_BLOCK)].wrapping_add(op.disp as u64);
    let target = cut(whole, op.extra);
    tri!(cpu, op, cpu.target_ok(target));
    cpu.rip = target;
    cpu.follow_cut(whole)
}

/// Jcc in 64-bit mode; `disp` is the target relative to the block.
#[inline(always)]
pub(super) fn jcc64<const CC: u8>(cpu: &mut Cpu, op: OpRef) -> Next {
    let base = cpu.regs[usize::from(REG_BLOCK)];
    if cpu.flags.condition::<CC>() {
        cpu.rip = base.wrapping_add(op.disp as u64);
        cpu.follow(1)
    } else {
        cpu.rip = base.wrapping_add(op.end());
        cpu.follow(0)
    }
}

#[inline(always)]
fn branch_cut(cpu: &mut Cpu, op: OpRef, taken: bool) -> Next {
    if taken {
        return if cpu.mode.contains(Mode::LONG64) { jmp64(cpu, op) } else { jmp_cut(cpu, op) };
    }
    cpu.rip = cpu.rip_at(op.end());
    cpu.follow(0)
}

fn jcc_cut<const CC: u8>(cpu: &mut Cpu, op: OpRef) -> Next {
    let taken = cpu.flags.condition::<CC>();
    branch_cut(cpu, op, taken)
}

pub(super) fn pick_jcc(cc: u8, long: bool) -> Handler {
    if long { by_condition!(cc, jcc64) } else { by_condition!(cc, jcc_cut) }
}

/// JCXZ, JECXZ, JRCXZ: the counter's width is the address size, in `flags`.
pub(super) fn jcxz(cpu: &mut Cpu, op: OpRef) -> Next {
    let taken = counter(cpu, op) == 0;
    branch_cut(cpu, op, taken)
}

fn counter(cpu: &Cpu, op: OpRef) -> u64 {
    match op.flags & 3 {
        0 => W16::get(cpu, RCX as u8),
        1 => W32::get(cpu, RCX as u8),
        _ => W64::get(cpu, RCX as u8),
    }
}

/// LOOP, LOOPE (`imm` 1), LOOPNE (`imm` 0; plain LOOP has 2).
pub(super) fn loop_(cpu: &mut Cpu, op: OpRef) -> Next {
    let count = counter(cpu, op).wrapping_sub(1);
    let zf = cpu.flags.zf();
    let (left, mask) = match op.flags & 3 {
        0 => (count & 0xFFFF, 0xFFFF),
        1 => (count & 0xFFFF_FFFF, 0xFFFF_FFFF),
        _ => (count, u64::MAX),
    };
    let taken = left != 0
        && match op.imm {
            0 => !zf,
            1 => zf,
            _ => true,
        };
    if taken && !cpu.mode.contains(Mode::LONG64) {
        let target = cut(cpu.regs[usize::from(REG_BLOCK)].wrapping_add(op.disp as u64), op.extra);
        tri!(cpu, op, cpu.target_ok(target));
    }
    match mask {
        0xFFFF => W16::set(cpu, RCX as u8, left),
        0xFFFF_FFFF => W32::set(cpu, RCX as u8, left),
        _ => W64::set(cpu, RCX as u8, left),
    }
    branch_cut(cpu, op, taken)
}

/// CALL rel in 64-bit mode.
pub(super) fn call64(cpu: &mut Cpu, op: OpRef) -> Next {
    let base = cpu.regs[usize::from(REG_BLOCK)];
    tri!(cpu, op, cpu.push64(base.wrapping_add(op.end())));
    cpu.rip = base.wrapping_add(op.disp as u64);
    cpu.follow(1)
}

/// CALL rel in other modes.
pub(super) fn call_cut(cpu: &mut Cpu, op: OpRef) -> Next {
    let whole = cpu.regs[usize::from(REG_BLOCK)].wrapping_add(op.disp as u64);
    let target = cut(whole, op.extra);
    tri!(cpu, op, cpu.target_ok(target));
    let back = cpu.rip_at(op.end());
    tri!(cpu, op, cpu.push_sized(back, u64::from(op.extra)));
    cpu.rip = target;
    cpu.follow_cut(whole)
}

/// RET in 64-bit mode; `imm` more bytes are released.
pub(super) fn ret64(cpu: &mut Cpu, op: OpRef) -> Next {
    let sp = cpu.regs[crate::cpu::RSP];
    let target = tri!(cpu, op, cpu.load::<u64>(sp));
    tri!(cpu, op, cpu.target_ok(target));
    cpu.regs[crate::cpu::RSP] = sp.wrapping_add(8 + u64::from(op.imm as u32));
    cpu.rip = target;
    cpu.follow_rip()
}

/// RET in other modes and sizes.
pub(super) fn ret_cut(cpu: &mut Cpu, op: OpRef) -> Next {
    let bytes = u64::from(op.extra);
    let target = tri!(cpu, op, cpu.peek_sized(bytes));
    tri!(cpu, op, cpu.target_ok(target));
    cpu.add_sp(bytes + u64::from(op.imm as u32));
    cpu.rip = target;
    cpu.follow_rip()
}

/// JMP r64.
pub(super) fn jmp_reg64(cpu: &mut Cpu, op: OpRef) -> Next {
    let target = cpu.regs[usize::from(op.dst & 31)];
    tri!(cpu, op, cpu.target_ok(target));
    cpu.rip = target;
    cpu.follow_rip()
}

/// JMP m64.
pub(super) fn jmp_mem64<A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, 8, false));
    let target = tri!(cpu, op, cpu.load::<u64>(linear));
    tri!(cpu, op, cpu.target_ok(target));
    cpu.rip = target;
    cpu.follow_rip()
}

/// CALL r64.
pub(super) fn call_reg64(cpu: &mut Cpu, op: OpRef) -> Next {
    let target = cpu.regs[usize::from(op.dst & 31)];
    call_to(cpu, op, target)
}

/// CALL m64.
pub(super) fn call_mem64<A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, 8, false));
    let target = tri!(cpu, op, cpu.load::<u64>(linear));
    call_to(cpu, op, target)
}

#[inline(always)]
fn call_to(cpu: &mut Cpu, op: OpRef, target: u64) -> Next {
    tri!(cpu, op, cpu.target_ok(target));
    let pushed = cpu.push64(cpu.rip_at(op.end()));
    tri!(cpu, op, cpu.on_stack(pushed));
    cpu.rip = target;
    cpu.follow_rip()
}

/// Indirect near JMP and CALL (`imm` 1) of 16 and 32 bits, register (`src` 0xFF is memory).
pub(super) fn indirect_cut(cpu: &mut Cpu, op: OpRef) -> Next {
    let bytes = u64::from(op.extra);
    let target = if op.src == 0xFF {
        let linear = tri!(cpu, op, cpu.ea(&op, bytes, false));
        tri!(cpu, op, cpu.load_sized(linear, bytes))
    } else if bytes == 2 {
        W16::get(cpu, op.dst)
    } else {
        W32::get(cpu, op.dst)
    };
    tri!(cpu, op, cpu.target_ok(target));
    if op.imm == 1 {
        let back = cpu.rip_at(op.end());
        tri!(cpu, op, cpu.push_sized(back, bytes));
    }
    cpu.rip = target;
    cpu.follow_rip()
}

/// What a push of `W` in 64-bit mode stores.
pub(super) fn push_reg64(cpu: &mut Cpu, op: OpRef) -> Next {
    let v = cpu.regs[usize::from(op.dst & 31)];
    tri!(cpu, op, cpu.push64(v));
    op.next(cpu)
}

pub(super) fn push_imm64(cpu: &mut Cpu, op: OpRef) -> Next {
    tri!(cpu, op, cpu.push64(op.imm as i64 as u64));
    op.next(cpu)
}

pub(super) fn pop_reg64(cpu: &mut Cpu, op: OpRef) -> Next {
    let sp = cpu.regs[crate::cpu::RSP];
    let v = tri!(cpu, op, cpu.load::<u64>(sp));
    cpu.regs[crate::cpu::RSP] = sp.wrapping_add(8);
    cpu.regs[usize::from(op.dst & 31)] = v;
    op.next(cpu)
}

pub(super) fn push_mem64<A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, 8, false));
    let v = tri!(cpu, op, cpu.load::<u64>(linear)).widen();
    let pushed = cpu.push64(v);
    tri!(cpu, op, cpu.on_stack(pushed));
    op.next(cpu)
}

/// LEAVE in 64-bit mode.
pub(super) fn leave64(cpu: &mut Cpu, op: OpRef) -> Next {
    let frame = cpu.regs[crate::cpu::RBP];
    let v = tri!(cpu, op, cpu.load::<u64>(frame));
    cpu.regs[crate::cpu::RSP] = frame.wrapping_add(8);
    cpu.regs[crate::cpu::RBP] = v;
    op.next(cpu)
}
