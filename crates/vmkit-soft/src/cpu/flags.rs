//! Lazy arithmetic flags.
//!
//! An arithmetic operation leaves its result, sign-extended to 64 bits, and a word of helper bits;
//! the six arithmetic flags are computed from the two when somebody asks. Helper bits: 63 is the carry
//! out of the top bit (CF), 62 the carry into it (OF is their difference), 3 the carry out of bit 3
//! (AF); bit 0 inverts SF and bits 15:8 are exclusive-ored into the byte PF is taken from, so that
//! any combination of flags can be represented (POPF, SAHF).

/// CF.
pub(crate) const CF: u64 = 1;
/// PF.
pub(crate) const PF: u64 = 1 << 2;
/// AF.
pub(crate) const AF: u64 = 1 << 4;
/// ZF.
pub(crate) const ZF: u64 = 1 << 6;
/// SF.
pub(crate) const SF: u64 = 1 << 7;
/// TF.
pub(crate) const TF: u64 = 1 << 8;
/// IF.
pub(crate) const IF: u64 = 1 << 9;
/// DF.
pub(crate) const DF: u64 = 1 << 10;
/// OF.
pub(crate) const OF: u64 = 1 << 11;
/// IOPL.
pub(crate) const IOPL: u64 = 3 << 12;
/// NT.
pub(crate) const NT: u64 = 1 << 14;
/// RF.
pub(crate) const RF: u64 = 1 << 16;
/// VM.
pub(crate) const VM: u64 = 1 << 17;
/// AC.
pub(crate) const AC: u64 = 1 << 18;
/// VIF.
pub(crate) const VIF: u64 = 1 << 19;
/// VIP.
pub(crate) const VIP: u64 = 1 << 20;
/// ID.
pub(crate) const ID: u64 = 1 << 21;
/// The six arithmetic flags.
pub(crate) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

const TOP: u64 = 3 << 62;
const CARRY3: u64 = 8;
const FLIP_SF: u64 = 1;

/// RFLAGS: arithmetic flags lazily, the rest as they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    result: u64,
    helper: u64,
    /// All bits but the arithmetic flags. Bit 1 is always one.
    pub rest: u64,
}

impl Flags {
    pub fn new(rflags: u64) -> Self {
        let mut flags = Self { result: 0, helper: 0, rest: 2 };
        flags.set_all(rflags);
        flags
    }

    /// Arithmetic flags all clear but CF, for a computation whose flags do not matter.
    #[inline(always)]
    pub fn carrying(cf: bool) -> Self {
        Self { result: 1, helper: u64::from(cf) << 63, rest: 2 }
    }

    /// Sets from a logical operation: CF, OF and AF are zero.
    #[inline(always)]
    pub fn set_logic(&mut self, result: i64) {
        self.result = result as u64;
        self.helper = 0;
    }

    /// Sets from an addition or subtraction of `BITS`-bit operands, given the vector of carries (or
    /// borrows) out of each bit.
    #[inline(always)]
    pub fn set_carries<const BITS: u32>(&mut self, result: i64, carries: u64) {
        self.result = result as u64;
        self.helper = (carries << (64 - BITS)) & TOP | carries & CARRY3;
    }

    /// As [`set_carries`](Self::set_carries), with CF left as it was (INC, DEC).
    #[inline(always)]
    pub fn set_carries_but_cf<const BITS: u32>(&mut self, result: i64, carries: u64) {
        let cf = self.helper & 1 << 63;
        let top = carries << (64 - BITS);
        // OF stays the difference of bits 63 and 62 when bit 63 is replaced by the old CF.
        let of = (top ^ top << 1) & 1 << 63;
        self.result = result as u64;
        self.helper = cf | (cf ^ of) >> 1 | carries & CARRY3;
    }

    /// Sets the result flags (ZF, SF, PF) from `result` and CF and OF as given; AF is zero.
    #[inline(always)]
    pub fn set_result_cf_of(&mut self, result: i64, cf: bool, of: bool) {
        self.result = result as u64;
        self.helper = u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// Sets CF and OF and leaves the others.
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.helper = self.helper & !TOP | u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// Sets CF and leaves the others.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.helper >> 63 != 0
    }

    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.helper ^ self.helper << 1) >> 63 != 0
    }

    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.result >> 63 ^ self.helper & FLIP_SF) != 0
    }

    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.result ^ self.helper >> 8) as u8).count_ones() & 1 == 0
    }

    #[inline(always)]
    pub fn af(&self) -> bool {
        self.helper & CARRY3 != 0
    }

    /// The six arithmetic flags in their RFLAGS places.
    pub fn arithmetic(&self) -> u64 {
        let bit = |set: bool, flag: u64| if set { flag } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Sets the six arithmetic flags from their RFLAGS places; other bits of `flags` are ignored.
    pub fn set_arithmetic(&mut self, flags: u64) {
        let has = |flag: u64| flags & flag != 0;
        self.result = if has(ZF) { 0 } else { 0x100 };
        self.helper = u64::from(has(CF)) << 63
            | u64::from(has(CF) ^ has(OF)) << 62
            | if has(AF) { CARRY3 } else { 0 }
            | u64::from(has(SF))
            | if has(PF) { 0 } else { 0x100 };
    }

    /// RFLAGS.
    pub fn all(&self) -> u64 {
        self.arithmetic() | self.rest
    }

    /// Sets all of RFLAGS; reserved bits take their fixed values.
    pub fn set_all(&mut self, rflags: u64) {
        self.set_arithmetic(rflags);
        self.rest = rflags & 0x3F_7700 | 2;
    }

    /// The condition of Jcc, SETcc and CMOVcc with the 4-bit code `CC`.
    #[inline(always)]
    pub fn condition<const CC: u8>(&self) -> bool {
        let base = match CC >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        base ^ (CC & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_arithmetic_flags_survives() {
        for bits in 0..64_u64 {
            let flags = [CF, PF, AF, ZF, SF, OF]
                .iter()
                .enumerate()
                .filter(|(i, _)| bits >> i & 1 != 0)
                .fold(0, |acc, (_, f)| acc | f);
            assert_eq!(Flags::new(flags).arithmetic(), flags);
            let mut changed = Flags::new(flags);
            changed.set_cf(flags & CF == 0);
            assert_eq!(changed.arithmetic(), flags ^ CF);
        }
    }

    #[test]
    fn inc_keeps_carry_and_finds_overflow() {
        let mut flags = Flags::new(CF);
        let (a, r) = (0x7F_u64, 0x80_u64);
        flags.set_carries_but_cf::<8>(-128, a & !r);
        assert!(flags.cf() && flags.of() && flags.sf() && flags.af());
    }
}
