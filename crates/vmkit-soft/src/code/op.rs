//! Decoded operations: what one instruction becomes.

#![allow(unsafe_code, reason = "operations live in an arena and name their successor by place")]

use std::ptr::NonNull;

use iced_x86::Instruction;

use crate::code::Block;
use crate::cpu::{Cpu, Trap};

/// What an operation's code returns: the block to go on with, or null to look it up by `cpu.rip`
/// (after seeing to `cpu.trap`).
pub(crate) type Next = *const Block;

/// An operation's code. It does the work, then calls the next operation's ([`OpRef::next`]); the
/// chain is at most a block long, so that it is bounded even where the compiler makes no tail call.
pub(crate) type Handler = fn(&mut Cpu, OpRef) -> Next;

/// The memory operand's segment is SS: a non-canonical address raises #SS.
pub(crate) const FLAG_STACK: u8 = 4;
/// The low bits of [`Op::flags`]: address size 16, 32 or 64.
pub(crate) const FLAG_ADDRESS: u8 = 3;

/// One decoded instruction (32 bytes).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    pub run: Handler,
    /// Displacement of the memory operand; or a 64-bit immediate; or an index into the cold table.
    pub disp: i64,
    /// Immediate, sign-extended.
    pub imm: i32,
    /// Destination register (with [`HIGH_BYTE`](crate::cpu::HIGH_BYTE)).
    pub dst: u8,
    /// Source register.
    pub src: u8,
    /// Base register of the memory operand: 0 to 15, [`REG_BLOCK`](crate::cpu::REG_BLOCK) for
    /// RIP-relative, [`REG_ZERO`](crate::cpu::REG_ZERO) for none.
    pub base: u8,
    /// Index register, or [`REG_ZERO`](crate::cpu::REG_ZERO).
    pub index: u8,
    /// Scale of the index as a shift.
    pub scale: u8,
    /// Segment: an index into `cpu.seg_base`.
    pub seg: u8,
    /// Length of the instruction in bytes; 0 for the pseudo-operation that ends a block.
    pub len: u8,
    /// Address size and [`FLAG_STACK`].
    pub flags: u8,
    /// Offset of the instruction in its block.
    pub off: u16,
    /// Free for the operation.
    pub extra: u16,
}

impl Op {
    /// Offset of the byte after the instruction.
    #[inline(always)]
    pub fn end(&self) -> u64 {
        u64::from(self.off) + u64::from(self.len)
    }
}

/// A reference to an operation in the arena.
#[derive(Clone, Copy)]
pub(crate) struct OpRef(NonNull<Op>);

impl std::ops::Deref for OpRef {
    type Target = Op;

    #[inline(always)]
    fn deref(&self) -> &Op {
        // SAFETY: `new`'s caller vouches that the operation outlives the block's execution; the arena
        // frees nothing while a block runs, and only replaces whole `run` pointers in place.
        unsafe { self.0.as_ref() }
    }
}

impl OpRef {
    /// # Safety
    /// `op` points into the arena of the running processor, at an operation of a finished block.
    #[inline(always)]
    pub unsafe fn new(op: NonNull<Op>) -> Self {
        Self(op)
    }

    /// Goes on with the next operation of the block.
    #[inline(always)]
    pub fn next(self, cpu: &mut Cpu) -> Next {
        // SAFETY: every block ends in an operation that does not call this, so a successor exists.
        let next = Self(unsafe { self.0.add(1) });
        (next.run)(cpu, next)
    }

    /// The next operation of the block, for one that does its work too.
    #[inline(always)]
    pub fn following(self) -> Self {
        // SAFETY: as in `next`.
        Self(unsafe { self.0.add(1) })
    }

    /// Where it lies.
    pub fn as_ptr(self) -> *const Op {
        self.0.as_ptr()
    }
}

/// An instruction without a specialised operation: run from its full decoding.
pub(crate) type ColdFn = fn(&mut Cpu, &Instruction) -> Result<(), Trap>;

/// What a cold operation runs.
#[derive(Clone, Copy)]
pub(crate) struct Cold {
    pub instruction: Instruction,
    pub run: ColdFn,
}

impl OpRef {
    /// What a cold operation runs.
    pub fn cold<'a>(self) -> (&'a Instruction, ColdFn) {
        // SAFETY: for an operation that runs `run_cold` or `run_cold_last`, `disp` is the address of a
        // `Cold` in the arena, which is emptied only between blocks.
        let cold = unsafe { &*(self.disp as *const Cold) };
        (&cold.instruction, cold.run)
    }
}
