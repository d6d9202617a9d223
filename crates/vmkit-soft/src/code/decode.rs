//! From bytes to blocks: fetch, decode with iced-x86, select an operation for each instruction.
//!
//! Blocks are decoded as if their first byte were at address 0, because the same guest-physical code
//! can be mapped at several linear addresses: whatever depends on RIP is relative to the block.

use std::ptr::null;
use std::sync::atomic::{Ordering, fence};

use iced_x86::{Decoder, DecoderError, FlowControl, Instruction, Mnemonic, OpKind, Register};
use vmkit_memory::WriteTracker;

use super::op::{Cold, FLAG_ADDRESS, FLAG_STACK, Next, Op, OpRef};
use super::{Block, Branch, Key};
use crate::cpu::trap::{self, Trap};
use crate::cpu::{CS, Cpu, Mode, REG_BLOCK, REG_ZERO, SEG_NONE, SS};
use crate::exec::operand::{register_number, segment_number};
use crate::exec::{self, branch};
use crate::mem::{Access, MODE_SUPERVISOR, MODE_USER};
use crate::shared::Message;
use crate::{fpu, sse, sys};

/// Most instructions of a block.
const MAX_INSTRUCTIONS: usize = 32;
/// Most bytes of an instruction (Intel SDM vol. 2A §2.3.11).
const MAX_LENGTH: usize = 15;
const WINDOW: usize = MAX_INSTRUCTIONS * MAX_LENGTH;
/// How often code that changes under the decoder is decoded in the hope that it has settled.
const TRIES: u32 = 4;

/// Whether an operation ends its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    No,
    Yes,
}

/// How a cold instruction is run.
pub(crate) type ColdChoice = (super::ColdFn, Ends);

impl Cpu {
    /// The block at `cpu.rip`, decoded if need be. With `step`, it holds one instruction.
    pub fn block_here(&mut self, step: bool) -> Result<*const Block, Trap> {
        let mut mode = self.mode;
        mode.set(Mode::STEP, step);
        let linear = self.code_address()?;
        let page = self.fetch_page(linear)?;
        let key = Key { pa: page | linear & 0xFFF, mode };
        let recalled = self.code.recall(self.rip, self.context, key);
        let found = recalled.or_else(|| self.code.find(key));
        let found = found.map(|b| (std::ptr::from_ref(b), b.second_page()));
        if let Some((block, second)) = found {
            let still = match second {
                None => true,
                Some(second) => self.fetch_next_page(linear)? == second,
            };
            if still {
                return Ok(block);
            }
            // The page that follows is another one now.
            self.code.invalidate(page, WriteTracker::lines_of(linear, linear), null());
            self.code_changed();
        }
        if self.code.is_full() {
            self.code.clear();
            self.code_changed();
        }
        self.decode(linear, key, step)
    }

    /// The linear address of the next instruction, after the checks on CS.
    fn code_address(&mut self) -> Result<u64, Trap> {
        if self.mode.contains(Mode::LONG64) {
            return Ok(self.rip);
        }
        let cs = &self.segs[CS];
        if self.rip > u64::from(cs.limit) {
            return Err(self.gp0());
        }
        Ok(cs.base.wrapping_add(self.rip) & 0xFFFF_FFFF)
    }

    /// The page that the instruction at `linear` and RIP goes on in.
    fn fetch_next_page(&mut self, linear: u64) -> Result<u64, Trap> {
        let left = 0x1000 - (linear & 0xFFF);
        if self.mode.contains(Mode::LIMIT) && self.rip + left > u64::from(self.segs[CS].limit) {
            return Err(self.gp0());
        }
        self.fetch_page(self.wrap_linear((linear & !0xFFF).wrapping_add(0x1000)))
    }

    /// The guest-physical page that `linear` is fetched from.
    fn fetch_page(&mut self, linear: u64) -> Result<u64, Trap> {
        let mode = if self.cpl == 3 { MODE_USER } else { MODE_SUPERVISOR };
        if let Some(page) = self.tlb.fetch(linear, mode) {
            return Ok(page);
        }
        let translation = self.translate(linear, Access::Fetch, mode)?;
        let page = translation.pa & !0xFFF;
        self.tlb.fill_fetch(linear, mode, page | translation.meta);
        Ok(page)
    }

    fn decode(&mut self, linear: u64, key: Key, step: bool) -> Result<*const Block, Trap> {
        let in_page = (0x1000 - (key.pa & 0xFFF) as usize).min(WINDOW);
        // A device may answer each fetch with something else, and reports no stores.
        let mut tries = if self.map.find(key.pa).is_some() { TRIES } else { 0 };
        loop {
            let mut window = [0_u8; WINDOW + MAX_LENGTH];
            self.read_physical(key.pa, &mut window[..in_page]);

            let mut builder = Builder::new(if step { 1 } else { MAX_INSTRUCTIONS });
            let mut second_page = None;
            let crosses = builder.run(self, &window[..in_page], key.mode);
            if crosses && builder.ops.is_empty() {
                // The first instruction crosses into the next page: a block of its own.
                let next = self.fetch_next_page(linear)?;
                let mut tail = [0_u8; MAX_LENGTH];
                self.read_physical(next, &mut tail);
                window[in_page..in_page + MAX_LENGTH].copy_from_slice(&tail);
                builder = Builder::new(1);
                builder.run(self, &window[..in_page + MAX_LENGTH], key.mode);
                second_page = Some(next);
            }
            let bytes = builder.bytes;
            if !builder.ended {
                builder.ops.push(Op {
                    run: branch::fall_through,
                    off: bytes as u16,
                    ..Op::blank()
                });
            }
            if key.mode.contains(Mode::LIMIT) {
                let last = bytes.saturating_sub(1) as i32;
                builder.ops.insert(0, Op { run: branch::within_limit, imm: last, ..Op::blank() });
            }
            // Watch the lines, then see that the bytes are still those decoded: a store that came
            // before the watch is seen here, one that comes after is reported. The report ends the watch,
            // and it may have been heard here already: then the lines are not watched.
            let cut = bytes.min(in_page);
            self.watch(key.pa, cut);
            if let Some(next) = second_page {
                self.watch(next, bytes - cut);
            }
            fence(Ordering::SeqCst);
            if tries != 0 {
                let mut again = [0_u8; WINDOW + MAX_LENGTH];
                self.read_physical(key.pa, &mut again[..cut]);
                if let Some(next) = second_page {
                    self.read_physical(next, &mut again[cut..bytes]);
                }
                let watched = self.watches(key.pa, cut)
                    && second_page.is_none_or(|next| self.watches(next, bytes - cut));
                if again[..bytes] != window[..bytes] || !watched {
                    tries -= 1;
                    continue;
                }
            } else if self.map.find(key.pa).is_some() {
                // It would not settle: these operations are for once.
                let lines = WriteTracker::lines_of(key.pa, key.pa);
                let message = Message::Invalidate { page: key.pa & !0xFFF, lines };
                self.shared.post(message);
            }
            return Ok(self.code.insert(
                key,
                &builder.ops,
                builder.instructions,
                bytes as u32,
                builder.branch,
                second_page,
            ));
        }
    }
}

impl Op {
    /// An operation of no instruction.
    pub fn blank() -> Self {
        Self {
            run: branch::fall_through,
            disp: 0,
            imm: 0,
            dst: 0,
            src: 0,
            base: REG_ZERO,
            index: REG_ZERO,
            scale: 0,
            seg: SEG_NONE as u8,
            len: 0,
            flags: 0,
            off: 0,
            extra: 0,
        }
    }

    /// The operation of `insn` with everything but its code, registers and immediate.
    fn of(insn: &Instruction, mode: Mode) -> Self {
        let mut op = Self {
            len: insn.len() as u8,
            off: insn.ip() as u16,
            flags: if mode.contains(Mode::LONG64) { 2 } else { 1 },
            ..Self::blank()
        };
        let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
        if memory {
            op.disp = insn.memory_displacement64() as i64;
            let base = insn.memory_base();
            let index = insn.memory_index();
            let mut size = insn.memory_displ_size() as usize;
            match base {
                Register::None => {}
                Register::RIP | Register::EIP => {
                    op.base = REG_BLOCK;
                    size = if base == Register::RIP { 8 } else { 4 };
                }
                _ => (op.base, size) = (register_number(base), base.size()),
            }
            if index.is_gpr() {
                (op.index, size) = (register_number(index), index.size());
                op.scale = insn.memory_index_scale().trailing_zeros() as u8;
            }
            op.flags = match size {
                2 => 0,
                4 => 1,
                8 => 2,
                _ if mode.contains(Mode::LONG64) => 2,
                _ => 1,
            };
            let seg = segment_number(insn.memory_segment());
            op.seg = seg as u8;
            if is_stack_access(insn, mode, seg) {
                op.flags |= FLAG_STACK;
            }
        }
        op
    }
}

/// Whether a bad address of the memory operand is #SS rather than #GP. In 64-bit mode overrides other
/// than FS and GS count for nothing (Intel SDM vol. 1 §3.7.4).
fn is_stack_access(insn: &Instruction, mode: Mode, seg: usize) -> bool {
    if !mode.contains(Mode::LONG64) {
        return seg == SS;
    }
    let overridden = matches!(insn.segment_prefix(), Register::FS | Register::GS);
    let base = insn.memory_base().full_register();
    !overridden && matches!(base, Register::RSP | Register::RBP)
}

/// A block being decoded.
struct Builder {
    ops: Vec<Op>,
    instructions: u32,
    bytes: usize,
    max: usize,
    ended: bool,
    /// Whether the last instruction branches.
    branch: Branch,
    /// The last instruction, if it is a comparison.
    comparison: Option<exec::Comparison>,
}

impl Builder {
    fn new(max: usize) -> Self {
        Self {
            ops: Vec::with_capacity(max + 1),
            instructions: 0,
            bytes: 0,
            max,
            ended: false,
            branch: Branch::Never,
            comparison: None,
        }
    }

    /// Decodes until the block ends; true if it stopped at an instruction that goes on past `code`.
    fn run(&mut self, cpu: &mut Cpu, code: &[u8], mode: Mode) -> bool {
        let mut decoder = Decoder::with_ip(mode.bitness(), code, 0, cpu.decoder_options);
        let mut insn = Instruction::default();
        while self.ops.len() < self.max && decoder.can_decode() {
            decoder.decode_out(&mut insn);
            if insn.is_invalid() {
                let left = code.len() - self.bytes;
                if decoder.last_error() == DecoderError::NoMoreBytes && left < MAX_LENGTH {
                    return true;
                }
                // A run of prefixes past fifteen bytes is #GP, anything else undefined is #UD.
                let vector = if insn.len() >= MAX_LENGTH { trap::GP } else { trap::UD };
                let run = if vector == trap::GP { branch::too_long } else { branch::undefined };
                self.push(Op { run, len: insn.len() as u8, ..Op::of_end(self.bytes) }, Ends::Yes);
                return false;
            }
            let (op, ends) = match exchange_with_r8(&insn, &code[self.bytes..]) {
                Some(op) if mode.contains(Mode::LONG64) => (op, Ends::No),
                _ => select(cpu, &insn, mode),
            };
            if mode.contains(Mode::LONG64) {
                self.fuse(&insn, &op);
            }
            self.push(op, ends);
            self.branch = branch_of(&insn);
            if ends == Ends::Yes {
                return false;
            }
        }
        false
    }

    /// If `insn` is a conditional jump after a comparison, makes the comparison's operation do both.
    fn fuse(&mut self, insn: &Instruction, op: &Op) {
        if let Some(comparison) = self.comparison.take()
            && let Some(cc) = exec::jump_condition(insn)
            && let Some(both) = comparison.fuse(cc)
            && let Some(last) = self.ops.last_mut()
        {
            last.run = both;
        }
        self.comparison = exec::Comparison::of(insn, op.flags & FLAG_ADDRESS == 2);
    }

    fn push(&mut self, op: Op, ends: Ends) {
        self.bytes = usize::from(op.off) + usize::from(op.len);
        self.ops.push(op);
        self.instructions += 1;
        self.ended = ends == Ends::Yes;
    }
}

fn branch_of(insn: &Instruction) -> Branch {
    match insn.flow_control() {
        FlowControl::Next | FlowControl::Exception => Branch::Never,
        FlowControl::ConditionalBranch => Branch::Perhaps,
        _ => Branch::Always,
    }
}

impl Op {
    fn of_end(offset: usize) -> Self {
        Self { off: offset as u16, ..Self::blank() }
    }
}

/// PAUSE is F3 90; with REX.B it is XCHG of the accumulator with R8, which the decoder does not tell
/// apart (Intel SDM vol. 2B, PAUSE).
fn exchange_with_r8(insn: &Instruction, code: &[u8]) -> Option<Op> {
    if insn.mnemonic() != Mnemonic::Pause {
        return None;
    }
    let prefixes = code.get(..insn.len() - 1)?;
    let rex = *prefixes.last()?;
    if rex & 0xF1 != 0x41 {
        return None;
    }
    let bytes = match (rex & 8 != 0, prefixes.contains(&0x66)) {
        (true, _) => 8,
        (false, true) => 2,
        (false, false) => 4,
    };
    let mut op = Op { len: insn.len() as u8, off: insn.ip() as u16, ..Op::blank() };
    exec::exchange(&mut op, 0, 8, bytes);
    Some(op)
}

/// Chooses the operation of an instruction.
fn select(cpu: &mut Cpu, insn: &Instruction, mode: Mode) -> (Op, Ends) {
    let mut op = Op::of(insn, mode);
    if !cpu.lists(insn) {
        op.run = branch::undefined;
        return (op, Ends::Yes);
    }
    if let Some(ends) = exec::select(&mut op, insn, mode) {
        return (op, ends);
    }
    if let Some(ends) = sse::select(&mut op, insn, mode) {
        return (op, ends);
    }
    let cold = exec::cold(insn)
        .or_else(|| sys::cold(insn))
        .or_else(|| sse::cold(insn))
        .or_else(|| fpu::cold(insn));
    let Some((run, ends)) = cold else {
        op.run = branch::lacking;
        return (op, Ends::Yes);
    };
    op.disp = cpu.code.keep_cold(Cold { instruction: *insn, run });
    op.run = if ends == Ends::Yes { run_cold_last } else { run_cold };
    (op, ends)
}

/// Runs a cold instruction in the middle of a block.
fn run_cold(cpu: &mut Cpu, op: OpRef) -> Next {
    let (insn, run) = op.cold();
    match run(cpu, insn) {
        Ok(()) => op.next(cpu),
        Err(Trap) => cpu.trap_exit(op),
    }
}

/// Runs a cold instruction that ends its block: `cpu.rip` is the next instruction, unless it changes
/// that.
fn run_cold_last(cpu: &mut Cpu, op: OpRef) -> Next {
    let (insn, run) = op.cold();
    cpu.rip = cpu.rip_at(op.end());
    match run(cpu, insn) {
        Ok(()) => {
            cpu.instructions += u64::from(cpu.running().instructions);
            null()
        }
        Err(Trap) => cpu.trap_exit(op),
    }
}
