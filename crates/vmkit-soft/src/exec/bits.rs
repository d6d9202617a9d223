//! Bit instructions: BT and kin, bit scans and counts, BMI1, BMI2, ADX.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::Address;
use super::pick::{by_width, by_width_and_address, tri};
use crate::code::{ColdChoice, ColdFn, Ends, Handler, Next, OpRef};
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, Int, W16, W32, W64, Width};

/// What BT, BTS, BTR and BTC do to the bit.
#[inline(always)]
fn change<const WHAT: u8>(a: u64, bit: u64) -> u64 {
    match WHAT {
        0 => a,
        1 => a | bit,
        2 => a & !bit,
        _ => a ^ bit,
    }
}

fn bit_reg_imm<const WHAT: u8, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let n = op.imm as u32 & (W::BITS - 1);
    let a = W::get(cpu, op.dst);
    cpu.flags.set_cf(a >> n & 1 != 0);
    if WHAT != 0 {
        W::set(cpu, op.dst, change::<WHAT>(a, 1 << n));
    }
    op.next(cpu)
}

fn bit_reg_reg<const WHAT: u8, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let n = W::get(cpu, op.src) as u32 & (W::BITS - 1);
    let a = W::get(cpu, op.dst);
    cpu.flags.set_cf(a >> n & 1 != 0);
    if WHAT != 0 {
        W::set(cpu, op.dst, change::<WHAT>(a, 1 << n));
    }
    op.next(cpu)
}

/// The operation of BT (0), BTS (1), BTR (2), BTC (3) on a register.
pub(super) fn bit_in_register(what: u8, immediate: bool, bytes: usize) -> Handler {
    macro_rules! go {
        ($f:ident) => {
            match (what, bytes) {
                (0, 2) => $f::<0, W16> as Handler,
                (0, 4) => $f::<0, W32>,
                (0, _) => $f::<0, W64>,
                (1, 2) => $f::<1, W16>,
                (1, 4) => $f::<1, W32>,
                (1, _) => $f::<1, W64>,
                (2, 2) => $f::<2, W16>,
                (2, 4) => $f::<2, W32>,
                (2, _) => $f::<2, W64>,
                (_, 2) => $f::<3, W16>,
                (_, 4) => $f::<3, W32>,
                _ => $f::<3, W64>,
            }
        };
    }
    if immediate { go!(bit_reg_imm) } else { go!(bit_reg_reg) }
}

/// BT and kin on memory: a register gives a signed bit offset from the operand's address.
fn bit_in_memory(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bytes = insn.memory_size().size() as u64;
    let bits = bytes * 8;
    let what = match insn.mnemonic() {
        Mnemonic::Bt => 0,
        Mnemonic::Bts => 1,
        Mnemonic::Btr => 2,
        _ => 3,
    };
    let mut offset = cpu.offset_of(insn);
    let n = if insn.op1_kind() == OpKind::Register {
        let raw = cpu.gpr(insn.op1_register());
        let index = match bytes {
            2 => i64::from(raw as i16),
            4 => i64::from(raw as i32),
            _ => raw as i64,
        };
        let words = index >> bits.trailing_zeros();
        offset = offset.wrapping_add((words * bytes as i64) as u64);
        raw & (bits - 1)
    } else {
        insn.immediate(1) & (bits - 1)
    };
    // The moved address wraps like any other of its size.
    let size = address_bytes(insn, cpu);
    let offset = match size {
        2 => offset & 0xFFFF,
        4 => offset & 0xFFFF_FFFF,
        _ => offset,
    };
    let seg = super::operand::segment_number(insn.memory_segment());
    let linear = cpu.linear(seg, offset, bytes, what != 0)?;
    let bit = 1_u64 << n;
    let apply = |a: u64| match what {
        1 => a | bit,
        2 => a & !bit,
        _ => a ^ bit,
    };
    let old = if what == 0 {
        cpu.load_sized(linear, bytes)?
    } else if insn.has_lock_prefix() {
        match bytes {
            2 => cpu.update_locked::<W16>(linear, apply)?,
            4 => cpu.update_locked::<W32>(linear, apply)?,
            _ => cpu.update_locked::<W64>(linear, apply)?,
        }
    } else {
        cpu.probe_store(linear, bytes as usize)?;
        let old = cpu.load_sized(linear, bytes)?;
        cpu.store_sized(linear, bytes, apply(old))?;
        old
    };
    cpu.flags.set_cf(old & bit != 0);
    Ok(())
}

/// Address size of a memory operand in bytes.
fn address_bytes(insn: &Instruction, cpu: &Cpu) -> usize {
    use iced_x86::Register;
    match (insn.memory_base(), insn.memory_index()) {
        (Register::None, Register::None) => match insn.memory_displ_size() {
            n @ (2 | 4 | 8) => n as usize,
            _ if cpu.long64() => 8,
            _ => 4,
        },
        (Register::RIP, _) => 8,
        (Register::EIP, _) => 4,
        (Register::None, index) => index.size(),
        (base, _) => base.size(),
    }
}

/// A count or scan of one operand into a register.
trait Scan: 'static {
    /// The result, if the destination is written.
    fn run<W: Width>(cpu: &mut Cpu, a: u64) -> Option<u64>;
}

struct Bsf;
struct Bsr;
struct Tzcnt;
struct Lzcnt;
struct Popcnt;

impl Scan for Bsf {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, a: u64) -> Option<u64> {
        // ZF says whether the source was zero; the other flags are undefined.
        let r = (a != 0).then(|| u64::from(a.trailing_zeros()));
        cpu.flags.set_result_cf_of(i64::from(a != 0), false, false);
        r
    }
}

impl Scan for Bsr {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, a: u64) -> Option<u64> {
        let r = (a != 0).then(|| u64::from(63 - a.leading_zeros()));
        cpu.flags.set_result_cf_of(i64::from(a != 0), false, false);
        r
    }
}

impl Scan for Tzcnt {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, a: u64) -> Option<u64> {
        let r = u64::from(a.trailing_zeros().min(W::BITS));
        cpu.flags.set_result_cf_of(r as i64, a == 0, false);
        Some(r)
    }
}

impl Scan for Lzcnt {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, a: u64) -> Option<u64> {
        let r = u64::from(a.leading_zeros() - (64 - W::BITS));
        cpu.flags.set_result_cf_of(r as i64, a == 0, false);
        Some(r)
    }
}

impl Scan for Popcnt {
    #[inline(always)]
    fn run<W: Width>(cpu: &mut Cpu, a: u64) -> Option<u64> {
        let zf = if a == 0 { crate::cpu::flags::ZF } else { 0 };
        cpu.flags.set_arithmetic(zf);
        Some(u64::from(a.count_ones()))
    }
}

fn scan_reg<S: Scan, W: Width>(cpu: &mut Cpu, op: OpRef) -> Next {
    let a = W::get(cpu, op.src);
    if let Some(r) = S::run::<W>(cpu, a) {
        W::set(cpu, op.dst, r);
    }
    op.next(cpu)
}

fn scan_mem<S: Scan, W: Width, A: Address>(cpu: &mut Cpu, op: OpRef) -> Next {
    let linear = tri!(cpu, op, A::linear(cpu, &op, W::BYTES, false));
    let a = tri!(cpu, op, cpu.load::<W::Int>(linear)).widen();
    if let Some(r) = S::run::<W>(cpu, a) {
        W::set(cpu, op.dst, r);
    }
    op.next(cpu)
}

/// The operation of a scan or count.
pub(super) fn scan(mnemonic: Mnemonic, memory: bool, bytes: usize, flat: bool) -> Option<Handler> {
    macro_rules! go {
        ($s:ty) => {
            if memory {
                by_width_and_address!(bytes, flat, scan_mem, $s)
            } else {
                by_width!(bytes, scan_reg, $s)
            }
        };
    }
    Some(match mnemonic {
        Mnemonic::Bsf => go!(Bsf),
        Mnemonic::Bsr => go!(Bsr),
        Mnemonic::Tzcnt => go!(Tzcnt),
        Mnemonic::Lzcnt => go!(Lzcnt),
        Mnemonic::Popcnt => go!(Popcnt),
        _ => return None,
    })
}

/// Sets flags as BMI1's logical instructions do.
fn logic_flags(cpu: &mut Cpu, bits: u32, r: u64, cf: bool) {
    let signed = ((r << (64 - bits)) as i64) >> (64 - bits);
    cpu.flags.set_result_cf_of(signed, cf, false);
}

/// The BMI1 and BMI2 instructions with a destination and one or two sources.
fn bmi(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let bits = insn.op0_register().size() as u32 * 8;
    let mask = u64::MAX >> (64 - bits);
    let a = cpu.read_operand(insn, 1)?;
    let b = if insn.op_count() > 2 { cpu.read_operand(insn, 2)? } else { 0 };
    let count = (b & u64::from(bits - 1)) as u32;
    let signed = ((a << (64 - bits)) as i64) >> (64 - bits);
    let r = match insn.mnemonic() {
        Mnemonic::Andn => {
            let r = !a & b & mask;
            logic_flags(cpu, bits, r, false);
            r
        }
        Mnemonic::Bextr => {
            let (start, len) = ((b & 0xFF) as u32, (b >> 8 & 0xFF) as u32);
            let shifted = if start < 64 { a >> start } else { 0 };
            let r = if len < 64 { shifted & ((1 << len) - 1) } else { shifted } & mask;
            logic_flags(cpu, bits, r, false);
            r
        }
        Mnemonic::Blsi => {
            let r = a & a.wrapping_neg() & mask;
            logic_flags(cpu, bits, r, a != 0);
            r
        }
        Mnemonic::Blsmsk => {
            let r = (a ^ a.wrapping_sub(1)) & mask;
            logic_flags(cpu, bits, r, a == 0);
            r
        }
        Mnemonic::Blsr => {
            let r = a & a.wrapping_sub(1) & mask;
            logic_flags(cpu, bits, r, a == 0);
            r
        }
        Mnemonic::Bzhi => {
            let n = (b & 0xFF) as u32;
            let r = if n < bits { a & ((1 << n) - 1) } else { a };
            logic_flags(cpu, bits, r, n >= bits);
            r
        }
        Mnemonic::Pdep => deposit(a, b),
        Mnemonic::Pext => extract(a, b),
        Mnemonic::Rorx => {
            if bits == 64 {
                a.rotate_right(count)
            } else {
                u64::from((a as u32).rotate_right(count))
            }
        }
        Mnemonic::Sarx => (signed >> count) as u64 & mask,
        Mnemonic::Shlx => a << count & mask,
        _ => a >> count,
    };
    cpu.set_gpr(insn.op0_register(), r);
    Ok(())
}

/// PDEP: the low bits of `source` go to the set bits of `mask`.
fn deposit(source: u64, mut mask: u64) -> u64 {
    let (mut r, mut n) = (0, 0);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if source >> n & 1 != 0 {
            r |= lowest;
        }
        mask ^= lowest;
        n += 1;
    }
    r
}

/// PEXT: the bits of `source` at the set bits of `mask` go to the low bits.
fn extract(source: u64, mut mask: u64) -> u64 {
    let (mut r, mut n) = (0, 0);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        r |= u64::from(source & lowest != 0) << n;
        mask ^= lowest;
        n += 1;
    }
    r
}

/// ADCX (CF) and ADOX (OF): the other flags stay.
fn add_with(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let b = cpu.read_operand(insn, 1)?;
    let a = cpu.gpr(insn.op0_register());
    let bits = insn.op0_register().size() as u32 * 8;
    let (cf, of) = (cpu.flags.cf(), cpu.flags.of());
    let carry = if insn.mnemonic() == Mnemonic::Adcx { cf } else { of };
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let out = wide >> bits != 0;
    if insn.mnemonic() == Mnemonic::Adcx {
        cpu.flags.set_cf_of(out, of);
    } else {
        cpu.flags.set_cf_of(cf, out);
    }
    cpu.set_gpr(insn.op0_register(), wide as u64);
    Ok(())
}

/// MOVBE: a load or store with its bytes reversed.
fn movbe(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Trap> {
    let value = cpu.read_operand(insn, 1)?;
    let bytes = insn.memory_size().size() as u32;
    cpu.write_operand(insn, 0, value.swap_bytes() >> (64 - 8 * bytes))
}

/// The bit instructions that have no operation of their own.
pub(super) fn cold(insn: &Instruction) -> Option<ColdChoice> {
    let run: ColdFn = match insn.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => bit_in_memory,
        Mnemonic::Andn
        | Mnemonic::Bextr
        | Mnemonic::Blsi
        | Mnemonic::Blsmsk
        | Mnemonic::Blsr
        | Mnemonic::Bzhi
        | Mnemonic::Pdep
        | Mnemonic::Pext
        | Mnemonic::Rorx
        | Mnemonic::Sarx
        | Mnemonic::Shlx
        | Mnemonic::Shrx => bmi,
        Mnemonic::Adcx | Mnemonic::Adox => add_with,
        Mnemonic::Movbe => movbe,
        Mnemonic::Mulx => super::muldiv::mulx,
        _ => return None,
    };
    Some((run, Ends::No))
}
