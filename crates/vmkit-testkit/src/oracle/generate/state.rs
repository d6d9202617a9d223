//! A random state: registers, flags, extended state.

use super::super::case::{Case, Fpu};
use super::super::forms::Form;
use super::super::layout::{DATA, DATA_LEN};
use super::super::rng::Rng;
use super::values::{self, Lanes};

/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8D5;
/// DF.
const DIRECTION: u64 = 0x400;
/// AC: unaligned data accesses fault.
const ALIGNMENT: u64 = 0x4_0000;
/// IF and the bit that is always one.
const FIXED: u64 = 0x202;

/// Fills everything but the instruction and its place.
pub(super) fn fill(case: &mut Case, rng: &mut Rng, form: Option<&Form>) {
    case.memory.clear();
    for register in &mut case.gpr {
        *register = values::general(rng);
    }
    // RSP, RBP, RSI, RDI: where implicit operands lie.
    for i in 4..8 {
        if rng.chance(90) {
            let at = DATA + 256 + rng.below(DATA_LEN - 512);
            case.gpr[i] = if rng.chance(80) { at & !15 } else { at };
        }
    }
    if rng.chance(50) {
        case.gpr[1] = case.gpr[1] & !0xFF | rng.below(70);
    }
    case.rflags = FIXED | rng.u64() & ARITHMETIC;
    if rng.chance(30) {
        case.rflags |= DIRECTION;
    }
    if rng.chance(3) {
        case.rflags |= ALIGNMENT;
    }
    case.fs_base = base(rng);
    case.gs_base = base(rng);
    extended(&mut case.fpu, rng, form);
}

fn base(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => 0,
        1 => rng.below(0x1_0000),
        2 => DATA + rng.below(DATA_LEN),
        // Canonical, in either half.
        _ => ((rng.u64() << 16) as i64 >> 17) as u64,
    }
}

/// What the registers should hold for `form` to have something to chew on.
fn lanes_for(form: Option<&Form>) -> Lanes {
    let Some(form) = form else { return Lanes::Integer };
    let name = form.info.instruction_string();
    let mnemonic = name.split(' ').next().unwrap_or_default();
    let mnemonic = mnemonic.trim_end_matches("_GE").trim_end_matches('P');
    match () {
        () if mnemonic.contains("CMPEST") || mnemonic.contains("CMPIST") => Lanes::Text,
        () if mnemonic.contains("PS2") || mnemonic.contains("SS2") => Lanes::Single,
        () if mnemonic.contains("PD2") || mnemonic.contains("SD2") => Lanes::Double,
        () if mnemonic.ends_with("PS") || mnemonic.ends_with("SS") => Lanes::Single,
        () if mnemonic.ends_with("PD") || mnemonic.ends_with("SD") => Lanes::Double,
        () => Lanes::Integer,
    }
}

/// MXCSR with every defined bit free, most of them at rest.
pub(super) fn mxcsr(rng: &mut Rng) -> u32 {
    let masks = if rng.chance(82) { 0x1F80 } else { rng.u64() as u32 & 0x1F80 };
    let rounding = if rng.chance(60) { 0 } else { rng.u64() as u32 & 0x6000 };
    let flags = if rng.chance(75) { 0 } else { rng.u64() as u32 & 0x3F };
    let zero = if rng.chance(75) { 0 } else { rng.u64() as u32 & 0x8040 };
    masks | rounding | flags | zero
}

/// Control, status and abridged tag words of the x87 unit.
fn x87_words(rng: &mut Rng) -> (u16, u16, u8) {
    let masks = if rng.chance(75) { 0x3F } else { rng.u64() as u16 & 0x3F };
    let precision = if rng.chance(65) { 0x300 } else { rng.pick(&[0, 0x200, 0x200, 0, 0x100]) };
    let rounding = if rng.chance(55) { 0 } else { rng.u64() as u16 & 0xC00 };
    let fcw = 0x40 | masks | precision | rounding;
    let mut fsw = rng.u64() as u16 & 0x7F00;
    if rng.chance(15) {
        fsw |= rng.u64() as u16 & 0x7F;
    }
    // ES and B follow the unmasked flags (Intel SDM vol. 1 §8.1.3.3).
    if fsw & !fcw & 0x3F != 0 {
        fsw |= 0x8080;
    }
    let tags = match rng.below(10) {
        0 => 0,
        1 | 2 => rng.u8(),
        _ => 0xFF,
    };
    (fcw, fsw, tags)
}

fn extended(fpu: &mut Fpu, rng: &mut Rng, form: Option<&Form>) {
    fpu.0 = Fpu::default().0;
    let (fcw, fsw, tags) = x87_words(rng);
    fpu.put(0, &fcw.to_le_bytes());
    fpu.put(2, &fsw.to_le_bytes());
    fpu.put(4, &[tags]);
    fpu.put(24, &mxcsr(rng).to_le_bytes());
    for i in 0..8 {
        let value = values::extended(rng);
        fpu.put(Fpu::ST + 16 * i, &value);
    }
    let kind = lanes_for(form);
    for start in [Fpu::XMM, Fpu::YMM_HIGH] {
        for i in 0..16 {
            let kind = match rng.below(12) {
                0 => Lanes::Integer,
                1 if kind == Lanes::Single => Lanes::Double,
                _ => kind,
            };
            values::lanes(rng, kind, &mut fpu.0[start + 16 * i..][..16]);
        }
    }
    if kind == Lanes::Integer && rng.chance(50) {
        // MMX operands: integers in the mantissas.
        for i in 0..8 {
            values::lanes(rng, kind, &mut fpu.0[Fpu::ST + 16 * i..][..8]);
        }
    }
}

/// A whole legacy image for FXRSTOR and XRSTOR, nearly always a valid one.
pub(super) fn image(rng: &mut Rng, components: u8) -> Fpu {
    let mut fpu = Fpu::default();
    extended(&mut fpu, rng, None);
    if rng.chance(5) {
        let reserved = fpu.mxcsr() | 1 << rng.pick(&[16, 18, 20, 31]);
        fpu.put(24, &reserved.to_le_bytes());
    }
    fpu.0[512] = if rng.chance(90) { rng.u8() & components } else { components };
    if rng.chance(5) {
        // A reserved part of the header, or XCOMP_BV.
        let at = 512 + rng.range(1, 63) as usize;
        fpu.0[at] = 1 << rng.below(8);
    }
    fpu
}
