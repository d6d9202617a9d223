//! AVX, AVX2, FMA and F16C.
//!
//! Instructions that compute are rows of tables: a stub on fixed registers, and where its operands
//! are. One function runs any row. Moves, masked moves and gathers are plain Rust.

#![allow(unsafe_code, reason = "hands register images to the host's instructions by address")]

mod engine;
mod gather;
mod moves;
mod row;
mod table_avx;
mod table_avx2;
mod table_fma;

use std::sync::LazyLock;

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind};

use engine::{Places, execute, execute_under};
use row::{Layout, Memory, Row};

use super::exact::Operands;
use super::place_operands;
use crate::code::{ColdChoice, Ends, Handler, Next, Op, OpRef};
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, Mode, Vector};
use crate::exec::branch::undefined;
use crate::exec::operand::register_number;
use crate::exec::pick::tri;

static TABLES: [&[Row]; 3] = [table_avx::ROWS, table_avx2::ROWS, table_fma::ROWS];

/// Rows by the number of their [`Code`]: table and row, as [`Op::extra`] has them.
static INDEX: LazyLock<Vec<u16>> = LazyLock::new(|| {
    let mut index = vec![NONE; Code::values().len()];
    for (t, table) in TABLES.iter().enumerate() {
        for (r, row) in table.iter().enumerate() {
            if let Some(slot) = index.get_mut(row.code as usize) {
                *slot = (t << 10 | r) as u16;
            }
        }
    }
    index
});
const NONE: u16 = u16::MAX;

/// The row that `extra` names.
#[inline(always)]
fn row(extra: u16) -> Option<&'static Row> {
    TABLES.get(usize::from(extra >> 10)).and_then(|table| table.get(usize::from(extra & 0x3FF)))
}

/// True for an instruction in VEX encoding that works on vectors: for any but those of BMI.
pub(super) fn is_vector(insn: &Instruction) -> bool {
    use Mnemonic as M;
    insn.encoding() == EncodingKind::VEX
        && !matches!(
            insn.mnemonic(),
            M::Andn
                | M::Bextr
                | M::Blsi
                | M::Blsmsk
                | M::Blsr
                | M::Bzhi
                | M::Mulx
                | M::Pdep
                | M::Pext
                | M::Rorx
                | M::Sarx
                | M::Shlx
                | M::Shrx
        )
}

/// Chooses the operation of an instruction for which [`is_vector`] is true.
pub(super) fn select(op: &mut Op, insn: &Instruction, mode: Mode) -> Option<Ends> {
    if let Some(ends) = refuse(op, mode) {
        return Some(ends);
    }
    let code = insn.code();
    let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    place_operands(op, insn);
    if let Some(run) = moves::pick(insn, memory) {
        op.run = run;
        return Some(Ends::No);
    }
    let extra = INDEX.get(code as usize).copied().unwrap_or(NONE);
    let row = row(extra)?;
    op.extra = extra;
    let register = |n| i32::from(register_number(insn.op_register(n)) & 15);
    let last = match row.layout {
        Layout::Move | Layout::MoveGeneral | Layout::Store => 1,
        Layout::Merge | Layout::Blend | Layout::Fma | Layout::MergeGeneral => 2,
    };
    let (a, c) = match row.layout {
        Layout::Move | Layout::MoveGeneral | Layout::Store => (0, 0),
        Layout::Merge | Layout::MergeGeneral => (register(1), 0),
        Layout::Blend => (register(1), register(3)),
        Layout::Fma => (register(0), register(1)),
    };
    if memory && code == Code::VEX_Vinsertps_xmm_xmm_xmmm32_imm8 {
        op.imm &= 0x3F;
    }
    op.imm = op.imm & 0xFF | a << 8 | c << 12;
    let general = matches!(row.layout, Layout::MoveGeneral | Layout::MergeGeneral);
    op.src = if insn.op_kind(last) == OpKind::Register {
        register_number(insn.op_register(last))
    } else {
        0
    };
    op.run = match (row.layout, memory, general) {
        (Layout::Store, true, _) => store,
        (_, true, _) if row.memory == Memory::Nothing => undefined,
        (_, true, _) => by_memory(row.memory),
        (_, false, true) => compute::<General>,
        (_, false, false) => compute_registers,
    };
    Some(Ends::No)
}

/// #UD where VEX instructions are not enabled, #NM where the unit is not available.
fn refuse(op: &mut Op, mode: Mode) -> Option<Ends> {
    if !mode.contains(Mode::AVX) || !mode.contains(Mode::PROTECTED) {
        op.run = undefined;
        return Some(Ends::Yes);
    }
    if mode.contains(Mode::SSE_NM) {
        op.run = super::device_not_available;
        return Some(Ends::Yes);
    }
    None
}

/// A last source that is not a vector register.
trait Source: 'static {
    /// Where it is: in memory, if all 32 bytes from there on can be read; else in `buffer`, with zero
    /// above it.
    fn find(cpu: &mut Cpu, op: &Op, buffer: &mut Vector) -> Result<*const Vector, Trap>;
}

struct General;
struct M256;
struct U128;
struct M64;
struct M32;
struct M16;
struct M8;

impl Source for General {
    #[inline(always)]
    fn find(cpu: &mut Cpu, op: &Op, buffer: &mut Vector) -> Result<*const Vector, Trap> {
        *buffer = Vector([cpu.regs[usize::from(op.src & 15)], 0, 0, 0]);
        Ok(buffer)
    }
}

impl Source for M256 {
    #[inline(always)]
    fn find(cpu: &mut Cpu, op: &Op, buffer: &mut Vector) -> Result<*const Vector, Trap> {
        let linear = cpu.vector_address(op, 32, false)?;
        if let Some(host) = cpu.tlb.read(linear, 32, cpu.tlb_mode) {
            return Ok(host as *const Vector);
        }
        *buffer = cpu.load_ymm(linear)?;
        Ok(buffer)
    }
}

impl Source for U128 {
    #[inline(always)]
    fn find(cpu: &mut Cpu, op: &Op, buffer: &mut Vector) -> Result<*const Vector, Trap> {
        let linear = cpu.vector_address(op, 16, false)?;
        *buffer = cpu.load_xmm(linear).map(moves::low_half)?;
        Ok(buffer)
    }
}

macro_rules! short_source {
    ($($name:ident $int:ty;)*) => {$(
        impl Source for $name {
            #[inline(always)]
            fn find(cpu: &mut Cpu, op: &Op, buffer: &mut Vector) -> Result<*const Vector, Trap> {
                let linear = cpu.vector_address(op, size_of::<$int>() as u64, false)?;
                *buffer = Vector([u64::from(cpu.load::<$int>(linear)?), 0, 0, 0]);
                Ok(buffer)
            }
        }
    )*};
}
short_source! { M64 u64; M32 u32; M16 u16; M8 u8; }

fn by_memory(memory: Memory) -> Handler {
    match memory {
        Memory::Nothing => undefined,
        Memory::M256 => compute::<M256>,
        Memory::U128 => compute::<U128>,
        Memory::M64 => compute::<M64>,
        Memory::M32 => compute::<M32>,
        Memory::M16 => compute::<M16>,
        Memory::M8 => compute::<M8>,
    }
}

impl Cpu {
    /// The places of `op`'s operands, the last one at `b`.
    #[inline(always)]
    fn places(&mut self, op: &Op, b: *const Vector) -> Places {
        let vectors = &mut self.vectors;
        Places {
            a: &raw const vectors[(op.imm >> 8 & 15) as usize],
            b,
            c: &raw const vectors[(op.imm >> 12 & 15) as usize],
            d: &raw mut vectors[usize::from(op.dst & 15)],
        }
    }

    /// Runs a row of floating-point arithmetic under the guest's own control bits. `d` is written only
    /// if no exception is raised.
    #[cold]
    #[inline(never)]
    fn run_judged(&mut self, op: &Op, row: &Row, b: *const Vector) -> Result<Vector, Trap> {
        // SAFETY: the caller vouches for `b` by `Source::find`'s contract.
        let last = unsafe { b.read_unaligned() };
        let mut result = Vector::default();
        let places = Places { d: &raw mut result, ..self.places(op, &raw const last) };
        let imm = op.imm as u8;
        let operands = Operands {
            a: self.vectors[(op.imm >> 8 & 15) as usize].0,
            b: last.0,
            c: self.vectors[(op.imm >> 12 & 15) as usize].0,
            imm,
            wide: row.code.op_code().l() != 0,
        };
        // SAFETY: the places are register images and local.
        self.judge_arithmetic(row.code, &operands, |frame| unsafe {
            execute_under(row.stub, imm, places, frame);
        })?;
        Ok(result)
    }

    #[cold]
    #[inline(never)]
    fn compute_judged(&mut self, op: &Op, row: &Row, b: *const Vector) -> Result<(), Trap> {
        self.vectors[usize::from(op.dst & 15)] = self.run_judged(op, row, b)?;
        Ok(())
    }

    /// Runs a row on its operands, the last one at `b`.
    #[inline(always)]
    fn compute(&mut self, op: &Op, row: &Row, b: *const Vector) -> Result<(), Trap> {
        if row.float && !self.default_mxcsr() {
            return self.compute_judged(op, row, b);
        }
        let places = self.places(op, b);
        // SAFETY: the places are register images and `b`, which is one too or what `Source::find` gave.
        unsafe { execute(row.stub, op.imm as u8, places) };
        Ok(())
    }
}

// What needs a frame is out of line, so that operations end in a jump to the next one.

fn compute_registers(cpu: &mut Cpu, op: OpRef) -> Next {
    let Some(row) = row(op.extra) else { return undefined(cpu, op) };
    let b = &raw const cpu.vectors[usize::from(op.src & 15)];
    tri!(cpu, op, cpu.compute(&op, row, b));
    op.next(cpu)
}

fn compute<S: Source>(cpu: &mut Cpu, op: OpRef) -> Next {
    tri!(cpu, op, compute_one::<S>(cpu, op));
    op.next(cpu)
}

#[inline(never)]
fn compute_one<S: Source>(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let Some(row) = row(op.extra) else { return Err(cpu.ud()) };
    let mut buffer = Vector::default();
    let b = S::find(cpu, &op, &mut buffer)?;
    cpu.compute(&op, row, b)
}

/// A row whose result goes to memory: VEXTRACTF128, VEXTRACTI128, VCVTPS2PH.
fn store(cpu: &mut Cpu, op: OpRef) -> Next {
    tri!(cpu, op, store_one(cpu, op));
    op.next(cpu)
}

#[inline(never)]
fn store_one(cpu: &mut Cpu, op: OpRef) -> Result<(), Trap> {
    let Some(row) = row(op.extra) else { return Err(cpu.ud()) };
    let bytes = if row.memory == Memory::U128 { 16 } else { 8 };
    let linear = cpu.vector_address(&op, bytes, true)?;
    let b = &raw const cpu.vectors[usize::from(op.src & 15)];
    if row.float {
        // A fault of the store leaves MXCSR as it was.
        cpu.probe_store(linear, bytes as usize)?;
    }
    let Vector([low, high, ..]) = if row.float && !cpu.default_mxcsr() {
        cpu.run_judged(&op, row, b)?
    } else {
        let mut result = Vector::default();
        let places = Places { d: &raw mut result, ..cpu.places(&op, b) };
        // SAFETY: the places are register images and `result`.
        unsafe { execute(row.stub, op.imm as u8, places) };
        result
    };
    if bytes == 16 {
        cpu.store(linear, u128::from(high) << 64 | u128::from(low))
    } else {
        cpu.store(linear, low)
    }
}

/// Chooses the code of a masked move, a gather, or a move of MXCSR.
pub(super) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    gather::cold(insn)
}
