//! String instructions. Repeated ones move page-sized runs as host memory operations where both sides
//! are plain memory, and look at kicks and interrupts between runs; what has been done is in RCX, RSI
//! and RDI, so that an interruption restarts the instruction where it stopped
//! (Intel SDM vol. 1 §7.3.9.1).

#![allow(unsafe_code, reason = "block moves work on host addresses inside one guest page each")]

use iced_x86::{Instruction, Mnemonic};

use super::operand::segment_number;
use crate::code::{Ends, Handler, Next, OpRef};
use crate::cpu::flags::{DF, RF};
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, DS, ES, Int, Mode, RAX, RCX, RDI, RSI, W8, W16, W32, W64, Width};
use crate::mem::Table;

/// Most elements done one by one before kicks and interrupts are looked at.
const SLICE: u64 = 256;

/// What a string instruction works with.
struct Frame {
    /// Mask of RSI, RDI and RCX: the address size.
    mask: u64,
    /// Segment of the source.
    source: usize,
}

impl Frame {
    fn of(op: &OpRef) -> Self {
        let mask = match op.flags & 3 {
            0 => 0xFFFF,
            1 => 0xFFFF_FFFF,
            _ => u64::MAX,
        };
        Self { mask, source: usize::from(op.seg) }
    }
}

impl Cpu {
    /// Advances an index register, in the width of the address size.
    fn step(&mut self, register: usize, by: u64, mask: u64) {
        let value = self.regs[register].wrapping_add(by) & mask;
        self.set_index(register, value, mask);
    }

    fn set_index(&mut self, register: usize, value: u64, mask: u64) {
        self.regs[register] =
            if mask == 0xFFFF { self.regs[register] & !mask | value } else { value };
    }
}

fn stride<W: Width>(cpu: &Cpu) -> u64 {
    if cpu.flags.rest & DF != 0 { W::BYTES.wrapping_neg() } else { W::BYTES }
}

/// A string instruction: one element of it, and how a repetition goes.
trait Text: 'static {
    /// Does one element; true if a repetition may go on (SCAS and CMPS look at ZF).
    fn one<W: Width, const REP: u8>(cpu: &mut Cpu, frame: &Frame) -> Result<bool, Trap>;
    /// Does up to `count` elements at once; how many it did.
    fn many<W: Width>(cpu: &mut Cpu, frame: &Frame, count: u64) -> Result<u64, Trap> {
        let _ = (cpu, frame, count);
        Ok(0)
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Scas;
struct Cmps;

/// Elements of `W` from `linear` to the end of its page, going up.
fn room<W: Width>(linear: u64) -> u64 {
    (0x1000 - (linear & 0xFFF)) / W::BYTES
}

/// 64-bit mode with 64-bit addresses, going up: what the block paths handle.
fn plain(cpu: &Cpu, frame: &Frame) -> bool {
    cpu.mode.contains(Mode::LONG64) && frame.mask == u64::MAX && cpu.flags.rest & DF == 0
}

impl Text for Movs {
    fn one<W: Width, const REP: u8>(cpu: &mut Cpu, frame: &Frame) -> Result<bool, Trap> {
        let from = cpu.linear(frame.source, cpu.regs[RSI] & frame.mask, W::BYTES, false)?;
        let v = cpu.load::<W::Int>(from)?;
        let to = cpu.linear(ES, cpu.regs[RDI] & frame.mask, W::BYTES, true)?;
        cpu.store(to, v)?;
        let by = stride::<W>(cpu);
        cpu.step(RSI, by, frame.mask);
        cpu.step(RDI, by, frame.mask);
        Ok(true)
    }

    fn many<W: Width>(cpu: &mut Cpu, frame: &Frame, count: u64) -> Result<u64, Trap> {
        if !plain(cpu, frame) {
            return Ok(0);
        }
        let from = cpu.regs[RSI].wrapping_add(cpu.seg_base[frame.source & 7]);
        let to = cpu.regs[RDI];
        let n = count.min(room::<W>(from)).min(room::<W>(to));
        if n == 0 {
            return Ok(0);
        }
        let bytes = n * W::BYTES;
        let (Some(source), Some(target)) =
            (cpu.span(Table::Read, from)?, cpu.span(Table::Write, to)?)
        else {
            return Ok(0);
        };
        let (source, target) = (source.as_ptr(), target.as_ptr());
        let ahead = (target as u64).wrapping_sub(source as u64);
        if ahead < bytes && ahead != 0 {
            // An overlap that copies a pattern forward: element by element is what it means.
            return Ok(0);
        }
        // SAFETY: both spans are inside one page of a mapping the memory map keeps alive; `copy`
        // allows the overlap that is left (a target below its source).
        unsafe { std::ptr::copy(source, target, bytes as usize) };
        cpu.regs[RSI] = cpu.regs[RSI].wrapping_add(bytes);
        cpu.regs[RDI] = to.wrapping_add(bytes);
        Ok(n)
    }
}

impl Text for Stos {
    fn one<W: Width, const REP: u8>(cpu: &mut Cpu, frame: &Frame) -> Result<bool, Trap> {
        let to = cpu.linear(ES, cpu.regs[RDI] & frame.mask, W::BYTES, true)?;
        let v = W::get(cpu, RAX as u8);
        cpu.store(to, W::Int::truncate(v))?;
        let by = stride::<W>(cpu);
        cpu.step(RDI, by, frame.mask);
        Ok(true)
    }

    fn many<W: Width>(cpu: &mut Cpu, frame: &Frame, count: u64) -> Result<u64, Trap> {
        if !plain(cpu, frame) {
            return Ok(0);
        }
        let to = cpu.regs[RDI];
        let n = count.min(room::<W>(to));
        if n == 0 {
            return Ok(0);
        }
        let Some(target) = cpu.span(Table::Write, to)? else { return Ok(0) };
        let v = W::get(cpu, RAX as u8);
        let byte = v as u8;
        if v == u64::from(byte).wrapping_mul(0x0101_0101_0101_0101) & W::MASK {
            // SAFETY: the span is inside one page of a mapping the memory map keeps alive.
            unsafe { std::ptr::write_bytes(target.as_ptr(), byte, (n * W::BYTES) as usize) };
        } else {
            let target = target.as_ptr().cast::<W::Int>();
            for i in 0..n as usize {
                // SAFETY: as above; element `i` lies inside the span.
                unsafe { target.add(i).write_unaligned(W::Int::truncate(v)) };
            }
        }
        cpu.regs[RDI] = to.wrapping_add(n * W::BYTES);
        Ok(n)
    }
}

impl Text for Lods {
    fn one<W: Width, const REP: u8>(cpu: &mut Cpu, frame: &Frame) -> Result<bool, Trap> {
        let from = cpu.linear(frame.source, cpu.regs[RSI] & frame.mask, W::BYTES, false)?;
        let v = cpu.load::<W::Int>(from)?.widen();
        W::set(cpu, RAX as u8, v);
        let by = stride::<W>(cpu);
        cpu.step(RSI, by, frame.mask);
        Ok(true)
    }
}

fn compare<W: Width>(cpu: &mut Cpu, a: u64, b: u64) {
    let r = a.wrapping_sub(b) & W::MASK;
    W::carries(&mut cpu.flags, r, !a & b | (!a | b) & r);
}

/// Whether the repetition goes on: REPE while equal, REPNE while not.
fn goes_on<const REP: u8>(cpu: &Cpu) -> bool {
    match REP {
        1 => cpu.flags.zf(),
        2 => !cpu.flags.zf(),
        _ => true,
    }
}

impl Text for Scas {
    fn one<W: Width, const REP: u8>(cpu: &mut Cpu, frame: &Frame) -> Result<bool, Trap> {
        let at = cpu.linear(ES, cpu.regs[RDI] & frame.mask, W::BYTES, false)?;
        let b = cpu.load::<W::Int>(at)?.widen();
        let a = W::get(cpu, RAX as u8);
        compare::<W>(cpu, a, b);
        let by = stride::<W>(cpu);
        cpu.step(RDI, by, frame.mask);
        Ok(goes_on::<REP>(cpu))
    }
}

impl Text for Cmps {
    fn one<W: Width, const REP: u8>(cpu: &mut Cpu, frame: &Frame) -> Result<bool, Trap> {
        let first = cpu.linear(frame.source, cpu.regs[RSI] & frame.mask, W::BYTES, false)?;
        let a = cpu.load::<W::Int>(first)?.widen();
        let second = cpu.linear(ES, cpu.regs[RDI] & frame.mask, W::BYTES, false)?;
        let b = cpu.load::<W::Int>(second)?.widen();
        compare::<W>(cpu, a, b);
        let by = stride::<W>(cpu);
        cpu.step(RSI, by, frame.mask);
        cpu.step(RDI, by, frame.mask);
        Ok(goes_on::<REP>(cpu))
    }
}

fn single<T: Text, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let frame = Frame::of(&op);
    match T::one::<W, 0>(cpu, &frame) {
        Ok(_) => op.next(cpu),
        Err(Trap) => cpu.trap_exit(op),
    }
}

/// REP: `REP` is 1 for REP and REPE, 2 for REPNE.
fn repeated<T: Text, W: Width, const REP: u8>(cpu: &mut Cpu, op: OpRef) -> Next {
    let frame = Frame::of(&op);
    // A single step is one element (Intel SDM vol. 3B §18.3.1.4).
    let stepping = cpu.must_step();
    loop {
        let mut left = cpu.regs[RCX] & frame.mask;
        if left == 0 {
            return op.next(cpu);
        }
        let many = if stepping { Ok(0) } else { T::many::<W>(cpu, &frame, left) };
        let done = match many {
            Ok(done) => done,
            Err(Trap) => return cpu.trap_exit(op),
        };
        if done > 0 {
            left -= done;
            cpu.set_index(RCX, left, frame.mask);
        } else {
            for _ in 0..SLICE.min(left) {
                let more = match T::one::<W, REP>(cpu, &frame) {
                    Ok(more) => more,
                    Err(Trap) => return cpu.trap_exit(op),
                };
                left -= 1;
                cpu.set_index(RCX, left, frame.mask);
                if !more {
                    return op.next(cpu);
                }
                if cpu.stop || stepping {
                    break;
                }
            }
        }
        if left != 0 && stepping {
            // A code breakpoint here has been reported already.
            cpu.flags.rest |= RF;
            return cpu.leave_before(op);
        }
        if left != 0 && (cpu.attention() || cpu.stop) {
            return cpu.leave_before(op);
        }
    }
}

fn pick<T: Text>(rep: u8, bytes: usize) -> Handler {
    macro_rules! go {
        ($w:ty) => {
            match rep {
                0 => single::<T, $w> as Handler,
                1 => repeated::<T, $w, 1>,
                _ => repeated::<T, $w, 2>,
            }
        };
    }
    match bytes {
        1 => go!(W8),
        2 => go!(W16),
        4 => go!(W32),
        _ => go!(W64),
    }
}

/// Fills in the operation of a string instruction; none for others.
pub(super) fn select(op: &mut crate::code::Op, insn: &Instruction) -> Option<Ends> {
    use iced_x86::{OpKind, Register};
    let rep = if insn.has_repne_prefix() {
        2
    } else if insn.has_rep_prefix() {
        1
    } else {
        0
    };
    let run = match insn.mnemonic() {
        Mnemonic::Movsb => pick::<Movs>(rep, 1),
        Mnemonic::Movsw => pick::<Movs>(rep, 2),
        Mnemonic::Movsd if insn.is_string_instruction() => pick::<Movs>(rep, 4),
        Mnemonic::Movsq => pick::<Movs>(rep, 8),
        Mnemonic::Stosb => pick::<Stos>(rep, 1),
        Mnemonic::Stosw => pick::<Stos>(rep, 2),
        Mnemonic::Stosd => pick::<Stos>(rep, 4),
        Mnemonic::Stosq => pick::<Stos>(rep, 8),
        Mnemonic::Lodsb => pick::<Lods>(rep, 1),
        Mnemonic::Lodsw => pick::<Lods>(rep, 2),
        Mnemonic::Lodsd => pick::<Lods>(rep, 4),
        Mnemonic::Lodsq => pick::<Lods>(rep, 8),
        Mnemonic::Scasb => pick::<Scas>(rep, 1),
        Mnemonic::Scasw => pick::<Scas>(rep, 2),
        Mnemonic::Scasd => pick::<Scas>(rep, 4),
        Mnemonic::Scasq => pick::<Scas>(rep, 8),
        Mnemonic::Cmpsb => pick::<Cmps>(rep, 1),
        Mnemonic::Cmpsw => pick::<Cmps>(rep, 2),
        Mnemonic::Cmpsd if insn.is_string_instruction() => pick::<Cmps>(rep, 4),
        Mnemonic::Cmpsq => pick::<Cmps>(rep, 8),
        _ => return None,
    };
    op.run = run;
    let mut address = 64;
    for n in 0..insn.op_count() {
        match insn.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => address = 16,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => address = 32,
            _ => {}
        }
    }
    op.flags = match address {
        16 => 0,
        32 => 1,
        _ => 2,
    };
    // In 64-bit mode only FS and GS have a base; elsewhere DS is the default.
    let seg = match insn.segment_prefix() {
        Register::None => DS,
        other => segment_number(other),
    };
    op.seg = seg as u8;
    Some(Ends::No)
}
