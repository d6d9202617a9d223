//! What floating-point arithmetic raises when overflow or underflow is unmasked.
//!
//! Then both are judged, and inexactness with them, by the result rounded as if exponents had no
//! bounds (Intel SDM vol. 1 §4.9.1.4 and §4.9.1.5), while an instruction that runs with its exceptions
//! masked tells of the result it delivers. So the flags are computed here, from exact sums, products and
//! quotients; values are not. Dot products are taken apart, because they stop at the first step that
//! meets an unmasked exception.

use iced_x86::{Code, MandatoryPrefix, OpCodeTableKind};

use super::control::{BEFORE, FLAGS, under};
use super::lane::{Float, Xmm, from_u128, to_u128};
use super::table::{Haddpd_xmm_xmmm128, Haddps_xmm_xmmm128};
use super::table::{Mulpd_xmm_xmmm128, Mulps_xmm_xmmm128};

/// Overflow, underflow, precision: flags, and masks seven bits above.
const OE: u32 = 8;
const UE: u32 = 0x10;
const PE: u32 = 0x20;
const DAZ: u32 = 0x40;
const FTZ: u32 = 0x8000;

/// What an instruction works on. Where its destination is also a source, that is `a`.
#[derive(Clone, Copy, Default)]
pub(super) struct Operands {
    pub a: [u64; 4],
    /// The last source.
    pub b: [u64; 4],
    pub c: [u64; 4],
    pub imm: u8,
    /// The operands are 32 bytes; else 16.
    pub wide: bool,
}

impl Operands {
    /// 16-byte operands.
    pub fn narrow(a: Xmm, b: Xmm, imm: u8) -> Self {
        Self { a: image(a), b: image(b), imm, ..Self::default() }
    }
}

/// The flags that an instruction sets which raised `raised` with all exceptions masked: those it meets
/// before anything is computed, if one is unmasked; else all.
pub(super) fn settle(code: Code, operands: &Operands, raised: u32, mxcsr: u32) -> u32 {
    let unmasked = !(mxcsr >> 7) & FLAGS;
    let info = code.op_code();
    if info.table() == OpCodeTableKind::T0F3A && matches!(info.op_code(), 0x40 | 0x41) {
        return dot_product(info.op_code() == 0x41, operands, mxcsr);
    }
    if raised & unmasked & BEFORE != 0 {
        return raised & BEFORE;
    }
    if unmasked & (OE | UE) == 0 {
        return raised;
    }
    match steps(code, operands) {
        Some(steps) => steps.iter().fold(raised & BEFORE, |all, step| all | step.raised(mxcsr)),
        None => raised,
    }
}

/// A format's precision in bits and its least and greatest exponents.
#[derive(Clone, Copy)]
struct Format {
    bits: u32,
    least: i32,
    greatest: i32,
}

const HALF: Format = Format { bits: 11, least: -14, greatest: 15 };
const SINGLE: Format = Format { bits: 24, least: -126, greatest: 127 };
const DOUBLE: Format = Format { bits: 53, least: -1022, greatest: 1023 };

/// A finite number: `mantissa * 2^exponent`, and with `more` something below its last bit.
#[derive(Clone, Copy)]
struct Number {
    negative: bool,
    mantissa: u128,
    exponent: i32,
    more: bool,
}

/// One element's arithmetic.
#[derive(Clone, Copy)]
enum Arithmetic {
    /// `a + b`.
    Add,
    Multiply,
    Divide,
    /// `a * b + c`.
    MultiplyAdd,
    /// `a`, in another format.
    Narrow,
}

/// One element of an instruction.
#[derive(Clone, Copy)]
struct Step {
    arithmetic: Arithmetic,
    from: Format,
    to: Format,
    /// The elements.
    values: [u64; 3],
    /// Which of them are negated.
    negate: [bool; 3],
    /// The rounding mode, if it is not MXCSR's.
    rounding: Option<u32>,
}

impl Step {
    fn new(arithmetic: Arithmetic, format: Format, values: [u64; 3]) -> Self {
        Self { arithmetic, from: format, to: format, values, negate: [false; 3], rounding: None }
    }

    /// Operand `n`; none if it is not finite.
    fn operand(&self, n: usize, mxcsr: u32) -> Option<Number> {
        let bits = self.values[n];
        let fraction_bits = self.from.bits - 1;
        let fraction = bits & ((1 << fraction_bits) - 1);
        let all = (self.from.greatest * 2 + 1) as u64;
        let biased = bits >> fraction_bits & all;
        let sign_bit = if self.from.bits == DOUBLE.bits { 63 } else { 31 };
        let mantissa = match biased {
            0 if mxcsr & DAZ != 0 => 0,
            0 => fraction,
            _ if biased == all => return None,
            _ => fraction | 1 << fraction_bits,
        };
        Some(Number {
            negative: (bits >> sign_bit & 1 != 0) ^ self.negate[n],
            mantissa: mantissa.into(),
            exponent: biased.max(1) as i32 - self.from.greatest - fraction_bits as i32,
            more: false,
        })
    }

    /// The exact result; none if it is not a finite number.
    fn result(&self, mxcsr: u32) -> Option<Number> {
        let a = self.operand(0, mxcsr)?;
        match self.arithmetic {
            Arithmetic::Narrow => Some(a),
            Arithmetic::Add => Some(a.plus(self.operand(1, mxcsr)?)),
            Arithmetic::Multiply => Some(a.times(self.operand(1, mxcsr)?)),
            Arithmetic::MultiplyAdd => {
                Some(a.times(self.operand(1, mxcsr)?).plus(self.operand(2, mxcsr)?))
            }
            Arithmetic::Divide => a.over(self.operand(1, mxcsr)?),
        }
    }

    /// Overflow, underflow and precision as the element raises them.
    fn raised(&self, mxcsr: u32) -> u32 {
        let Some(number) = self.result(mxcsr) else { return 0 };
        let rounding = self.rounding.unwrap_or(mxcsr >> 13 & 3);
        let Some(rounded) = number.round(self.to, rounding) else { return 0 };
        let masked = |flag: u32| mxcsr & flag << 7 != 0;
        if rounded.exponent > self.to.greatest {
            return OE | if masked(OE) || rounded.inexact { PE } else { 0 };
        }
        if rounded.exponent < self.to.least {
            // Halves are never flushed to zero.
            let flushed = mxcsr & FTZ != 0 && self.to.bits != HALF.bits;
            return match (masked(UE), rounded.inexact) {
                (false, inexact) => UE | if inexact { PE } else { 0 },
                (true, _) if flushed || number.reaches_below(self.to) => UE | PE,
                (true, _) => 0,
            };
        }
        if rounded.inexact { PE } else { 0 }
    }
}

/// A number rounded as if exponents had no bounds: the exponent of its first bit.
struct Rounded {
    exponent: i32,
    inexact: bool,
}

impl Number {
    /// Moved so that its first bit is bit 125; the value is the same.
    fn left(self) -> Self {
        if self.mantissa == 0 {
            return Self { exponent: i32::MIN / 2, ..self };
        }
        let places = self.mantissa.leading_zeros() as i32 - 2;
        let mantissa = if places < 0 { self.mantissa >> -places } else { self.mantissa << places };
        Self { mantissa, exponent: self.exponent - places, ..self }
    }

    fn times(self, other: Self) -> Self {
        Self {
            negative: self.negative ^ other.negative,
            mantissa: self.mantissa * other.mantissa,
            exponent: self.exponent + other.exponent,
            more: false,
        }
    }

    /// The quotient; none by zero. Both have at most 53 bits.
    fn over(self, other: Self) -> Option<Self> {
        let dividend = self.left();
        let quotient = dividend.mantissa.checked_div(other.mantissa)?;
        Some(Self {
            negative: self.negative ^ other.negative,
            mantissa: quotient,
            exponent: dividend.exponent - other.exponent,
            more: quotient * other.mantissa != dividend.mantissa,
        })
    }

    /// The sum of two exact numbers of at most 106 bits.
    fn plus(self, other: Self) -> Self {
        let (mut large, mut small) = (self.left(), other.left());
        if (large.exponent, large.mantissa) < (small.exponent, small.mantissa) {
            std::mem::swap(&mut large, &mut small);
        }
        let places = large.exponent.saturating_sub(small.exponent) as u32;
        let kept = small.mantissa.checked_shr(places).unwrap_or(0);
        let lost = small.mantissa.checked_sub(kept.checked_shl(places).unwrap_or(0)) != Some(0);
        let mantissa = if large.negative == small.negative {
            large.mantissa + kept
        } else {
            large.mantissa - kept - u128::from(lost)
        };
        Self { mantissa, more: lost, ..large }
    }

    /// Rounds to the precision of `format`; none for zero.
    fn round(self, format: Format, rounding: u32) -> Option<Rounded> {
        if self.mantissa == 0 {
            return None;
        }
        let length = 128 - self.mantissa.leading_zeros();
        let mut exponent = self.exponent + length as i32 - 1;
        let Some(drop) = length.checked_sub(format.bits).filter(|&drop| drop > 0) else {
            return Some(Rounded { exponent, inexact: self.more });
        };
        let (kept, rest) = (self.mantissa >> drop, self.mantissa & ((1 << drop) - 1));
        let inexact = rest != 0 || self.more;
        let half = 1 << (drop - 1);
        let away = match rounding {
            0 => rest > half || rest == half && (self.more || kept & 1 != 0),
            1 => inexact && self.negative,
            2 => inexact && !self.negative,
            _ => false,
        };
        if away && (kept + 1).is_power_of_two() {
            exponent += 1;
        }
        Some(Rounded { exponent, inexact })
    }

    /// True if it has bits below the last place of denormal numbers.
    fn reaches_below(self, format: Format) -> bool {
        let last = format.least - (format.bits as i32 - 1);
        let places = i64::from(last) - i64::from(self.exponent);
        self.more || places > i64::from(self.mantissa.trailing_zeros())
    }
}

/// Element `n` of a register image, as wide as `format` is stored.
fn element(register: &[u64; 4], format: Format, n: usize) -> u64 {
    if format.bits == DOUBLE.bits {
        register[n & 3]
    } else {
        register[n >> 1 & 3] >> ((n & 1) * 32) & 0xFFFF_FFFF
    }
}

/// The steps of an instruction that can overflow or underflow; none for others.
fn steps(code: Code, operands: &Operands) -> Option<Vec<Step>> {
    let info = code.op_code();
    let Operands { a, b, c, imm, wide } = operands;
    let (opcode, prefix) = (info.op_code(), info.mandatory_prefix());
    let pick = |double| if double { DOUBLE } else { SINGLE };
    let count = |format: Format| {
        let in_one = if format.bits == DOUBLE.bits { 2 } else { 4 };
        if *wide { in_one * 2 } else { in_one }
    };
    match (info.table(), opcode) {
        (OpCodeTableKind::T0F, 0x58 | 0x59 | 0x5A | 0x5C | 0x5E) => {
            let double = matches!(prefix, MandatoryPrefix::P66 | MandatoryPrefix::PF2);
            let scalar = matches!(prefix, MandatoryPrefix::PF2 | MandatoryPrefix::PF3);
            let format = pick(double);
            if opcode == 0x5A && !double {
                return None;
            }
            let step = |n| {
                let values = [element(a, format, n), element(b, format, n), 0];
                match opcode {
                    0x58 => Step::new(Arithmetic::Add, format, values),
                    0x59 => Step::new(Arithmetic::Multiply, format, values),
                    0x5E => Step::new(Arithmetic::Divide, format, values),
                    0x5C => Step {
                        negate: [false, true, false],
                        ..Step::new(Arithmetic::Add, format, values)
                    },
                    _ => Step {
                        to: SINGLE,
                        ..Step::new(Arithmetic::Narrow, format, [values[1], 0, 0])
                    },
                }
            };
            Some((0..if scalar { 1 } else { count(format) }).map(step).collect())
        }
        // HADDPx, HSUBPx: neighbours in each source.
        (OpCodeTableKind::T0F, 0x7C | 0x7D) => {
            let format = pick(prefix == MandatoryPrefix::P66);
            let step = |register: &[u64; 4], n| Step {
                negate: [false, opcode == 0x7D, false],
                ..Step::new(
                    Arithmetic::Add,
                    format,
                    [element(register, format, n), element(register, format, n + 1), 0],
                )
            };
            let pairs = (0..count(format)).step_by(2);
            Some(pairs.flat_map(|n| [step(a, n), step(b, n)]).collect())
        }
        // ADDSUBPx: even elements are subtracted.
        (OpCodeTableKind::T0F, 0xD0) => {
            let format = pick(prefix == MandatoryPrefix::P66);
            let step = |n| Step {
                negate: [false, n & 1 == 0, false],
                ..Step::new(
                    Arithmetic::Add,
                    format,
                    [element(a, format, n), element(b, format, n), 0],
                )
            };
            Some((0..count(format)).map(step).collect())
        }
        (OpCodeTableKind::T0F3A, 0x1D) => {
            let step = |n| Step {
                to: HALF,
                rounding: (imm & 4 == 0).then_some(u32::from(imm & 3)),
                ..Step::new(Arithmetic::Narrow, SINGLE, [element(b, SINGLE, n), 0, 0])
            };
            Some((0..count(SINGLE)).map(step).collect())
        }
        (OpCodeTableKind::T0F38, 0x96..=0x9F | 0xA6..=0xAF | 0xB6..=0xBF) => {
            let format = pick(info.w() != 0);
            // 132, 213 and 231 name the operands that are multiplied, then the one added.
            let [x, y, z] = match opcode >> 4 {
                9 => [a, b, c],
                0xA => [c, a, b],
                _ => [c, b, a],
            };
            let kind = opcode & 15;
            let scalar = kind >= 8 && kind & 1 != 0;
            let step = |n| {
                let subtract = match kind {
                    6 => n & 1 == 0,
                    7 => n & 1 != 0,
                    _ => matches!(kind, 0xA | 0xB | 0xE | 0xF),
                };
                Step {
                    negate: [kind >= 0xC, false, subtract],
                    ..Step::new(
                        Arithmetic::MultiplyAdd,
                        format,
                        [element(x, format, n), element(y, format, n), element(z, format, n)],
                    )
                }
            };
            Some((0..if scalar { 1 } else { count(format) }).map(step).collect())
        }
        _ => None,
    }
}

/// DPPS and DPPD: products, then sums, each step only if the one before raised nothing unmasked. The
/// halves of wide operands go side by side.
fn dot_product(double: bool, operands: &Operands, mxcsr: u32) -> u32 {
    let unmasked = !(mxcsr >> 7) & FLAGS;
    let (multiply, add) = if double {
        (Code::Mulpd_xmm_xmmm128, Code::Haddpd_xmm_xmmm128)
    } else {
        (Code::Mulps_xmm_xmmm128, Code::Haddps_xmm_xmmm128)
    };
    // Elements that the immediate leaves out are zero times zero.
    let chosen = (0..4).fold(0_u128, |mask, n| {
        let (bits, one) = if double { (64, u128::from(u64::MAX)) } else { (32, 0xFFFF_FFFF) };
        let chosen = operands.imm >> (4 + n) & 1 != 0 && n * bits < 128;
        mask | if chosen { one << (n * bits) } else { 0 }
    });
    let halves = if operands.wide { 2 } else { 1 };
    let mut values: Vec<(u128, u128)> = (0..halves)
        .map(|half| {
            let whole = |register: &[u64; 4]| {
                u128::from(register[2 * half + 1]) << 64 | u128::from(register[2 * half])
            };
            (whole(&operands.a) & chosen, whole(&operands.b) & chosen)
        })
        .collect();
    let mut all = 0;
    for code in [multiply, add, add].into_iter().take(if double { 2 } else { 3 }) {
        let (mut met, mut set) = (0, 0);
        for (a, b) in &mut values {
            let (x, y) = (from_u128(*a), from_u128(*b));
            let (result, raised) = under(mxcsr, |frame| match (code == multiply, double) {
                (true, true) => Mulpd_xmm_xmmm128::run_under(x, y, frame),
                (true, false) => Mulps_xmm_xmmm128::run_under(x, y, frame),
                (false, true) => Haddpd_xmm_xmmm128::run_under(x, y, frame),
                (false, false) => Haddps_xmm_xmmm128::run_under(x, y, frame),
            });
            met |= raised & BEFORE;
            set |= settle(code, &Operands::narrow(x, y, 0), raised, mxcsr);
            (*a, *b) = (to_u128(result), to_u128(result));
        }
        // What one half meets beforehand keeps the other from being computed too.
        all |= if met & unmasked != 0 { met } else { set };
        if all & unmasked != 0 {
            break;
        }
    }
    all
}

/// The register image of 128 bits.
fn image(value: Xmm) -> [u64; 4] {
    let bits = to_u128(value);
    [bits as u64, (bits >> 64) as u64, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::super::immediate::Dpps_xmm_xmmm128_imm8;
    use super::super::lane::FloatImmediate;
    use super::super::table::*;
    use super::super::tests::Random;
    use super::*;

    const MASKED: u32 = 0x1F80;
    const UNDERFLOW_UNMASKED: u32 = MASKED & !(UE << 7);

    fn settled<O: Float>(a: u64, b: u64, mxcsr: u32) -> u32 {
        let (a, b) = (from_u128(a.into()), from_u128(b.into()));
        let (_, raised) = under(mxcsr, |frame| O::run_under(a, b, frame));
        settle(O::CODE, &Operands::narrow(a, b, 0), raised, mxcsr)
    }

    /// What the steps of `O` come to with all exceptions masked, which the host can tell.
    fn agrees<O: Float>(random: &mut Random) {
        for _ in 0..20_000 {
            let mut bits = || u128::from(random.bits()) << 64 | u128::from(random.bits());
            let (a, b) = (from_u128(bits()), from_u128(bits()));
            let mxcsr = MASKED | random.next() as u32 & (FTZ | DAZ | 0x6000);
            let (_, raised) = under(mxcsr, |frame| O::run_under(a, b, frame));
            let operands = Operands::narrow(a, b, 0);
            let steps = steps(O::CODE, &operands).unwrap();
            let computed = steps.iter().fold(0, |all, step| all | step.raised(mxcsr));
            assert_eq!(computed, raised & !BEFORE, "{:?} {a:X?} {b:X?} {mxcsr:#X}", O::CODE);
        }
    }

    #[test]
    fn computed_flags_are_the_hosts_where_all_is_masked() {
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        agrees::<Addps_xmm_xmmm128>(&mut random);
        agrees::<Addpd_xmm_xmmm128>(&mut random);
        agrees::<Subss_xmm_xmmm32>(&mut random);
        agrees::<Subsd_xmm_xmmm64>(&mut random);
        agrees::<Mulps_xmm_xmmm128>(&mut random);
        agrees::<Mulpd_xmm_xmmm128>(&mut random);
        agrees::<Divps_xmm_xmmm128>(&mut random);
        agrees::<Divpd_xmm_xmmm128>(&mut random);
        agrees::<Haddpd_xmm_xmmm128>(&mut random);
        agrees::<Hsubps_xmm_xmmm128>(&mut random);
        agrees::<Addsubps_xmm_xmmm128>(&mut random);
        agrees::<Addsubpd_xmm_xmmm128>(&mut random);
        agrees::<Cvtpd2ps_xmm_xmmm128>(&mut random);
        agrees::<Cvtsd2ss_xmm_xmmm64>(&mut random);
    }

    #[test]
    fn exact_underflow_is_raised_only_if_it_is_unmasked() {
        let (smallest, half) = (f64::MIN_POSITIVE.to_bits(), 0.5_f64.to_bits());
        assert_eq!(settled::<Mulsd_xmm_xmmm64>(smallest, half, MASKED), 0);
        assert_eq!(settled::<Mulsd_xmm_xmmm64>(smallest, half, UNDERFLOW_UNMASKED), UE);
    }

    #[test]
    fn unmasked_underflow_is_inexact_by_the_precision_alone() {
        // 2^-1000 * 2^-1000 has one bit, though no double is that small.
        let tiny = f64::from_bits(23 << 52);
        let third = (1.0 / 3.0_f64).to_bits();
        let tiny = tiny.to_bits();
        assert_eq!(settled::<Mulsd_xmm_xmmm64>(tiny, tiny, MASKED), UE | PE);
        assert_eq!(settled::<Mulsd_xmm_xmmm64>(tiny, tiny, UNDERFLOW_UNMASKED), UE);
        let square = third & !(0x7FF << 52) | 1 << 52;
        assert_eq!(settled::<Mulsd_xmm_xmmm64>(square, third, UNDERFLOW_UNMASKED), UE | PE);
    }

    #[test]
    fn exact_overflow_is_inexact_only_if_it_is_masked() {
        let (greatest_power, two) = (0x7FE_u64 << 52, 2.0_f64.to_bits());
        assert_eq!(settled::<Mulsd_xmm_xmmm64>(greatest_power, two, MASKED), OE | PE);
        let unmasked = MASKED & !(OE << 7);
        assert_eq!(settled::<Mulsd_xmm_xmmm64>(greatest_power, two, unmasked), OE);
    }

    #[test]
    fn a_dot_product_stops_at_the_first_step_that_faults() {
        // A product that underflows; the sum of it and zero would meet a denormal operand.
        let a = from_u128(u128::from(f32::MIN_POSITIVE.to_bits()));
        let b = from_u128(u128::from(0.5_f32.to_bits()));
        let code = Dpps_xmm_xmmm128_imm8::CODE;
        let operands = Operands::narrow(a, b, 0x11);
        assert_eq!(settle(code, &operands, 0, UNDERFLOW_UNMASKED), UE);
        let (_, raised) =
            under(MASKED, |frame| Dpps_xmm_xmmm128_imm8::run_under(a, b, 0x11, frame));
        assert_eq!(settle(code, &operands, raised, MASKED), raised);
        assert_eq!(raised, 2, "denormal operand");
    }

    #[test]
    fn an_operand_that_faults_in_one_half_keeps_the_other_from_being_computed() {
        // Infinity times zero above, an inexact product below.
        let (third, infinity) = ((1.0 / 3.0_f32).to_bits(), f32::INFINITY.to_bits());
        let operands = Operands {
            a: [third.into(), 0, infinity.into(), 0],
            b: [third.into(), 0, 0, 0],
            imm: 0x11,
            wide: true,
            ..Operands::default()
        };
        let code = Code::VEX_Vdpps_ymm_ymm_ymmm256_imm8;
        assert_eq!(settle(code, &operands, 0, MASKED), 1 | PE);
        assert_eq!(settle(code, &operands, 0, MASKED & !0x80), 1);
    }
}
