//! What an outcome need not agree in.

/// Masks of undefined bits and tolerances, all closed at first.
#[derive(Clone, Debug, Default)]
pub(super) struct Latitude {
    /// RFLAGS.
    pub flags: u64,
    /// General registers.
    pub gpr: [u64; 16],
    /// The exception's error code.
    pub error: u64,
    /// CR2.
    pub cr2: u64,
    /// Any of #NP, #SS, #GP, #PF and #AC will do if one is expected.
    pub any_fault: bool,
    /// FS and GS bases.
    pub bases: u64,
    /// The x87 status word.
    pub fsw: u16,
    /// MXCSR.
    pub mxcsr: u32,
    /// Bytes of the data pages: linear address and length.
    pub bytes: Vec<(u64, u64)>,
    /// All of the data pages.
    pub memory: bool,
    /// ST registers may differ by so many units in the last place.
    pub st_ulps: u64,
    /// XMM register whose single-precision lanes may differ by 3 in 2^12.
    pub approximate: Option<usize>,
}

impl Latitude {
    pub(super) fn ignores_byte(&self, address: u64) -> bool {
        self.bytes.iter().any(|&(at, len)| address.wrapping_sub(at) < len)
    }

    pub(super) fn st_agrees(&self, _register: usize, expected: &[u8], got: &[u8]) -> bool {
        expected == got || (self.st_ulps != 0 && ulps(expected, got) <= self.st_ulps)
    }

    pub(super) fn xmm_agrees(&self, register: usize, expected: &[u8], got: &[u8]) -> bool {
        expected == got || (self.approximate == Some(register) && near(expected, got))
    }
}

/// Distance of two double-extended numbers of the same sign in units of the last place.
fn ulps(a: &[u8], b: &[u8]) -> u64 {
    let parts = |n: &[u8]| {
        let mantissa = n.iter().take(8).rev().fold(0_u64, |m, &byte| m << 8 | u64::from(byte));
        let exponent = u16::from(n[8]) | u16::from(n[9]) << 8;
        (exponent >> 15, exponent & 0x7FFF, mantissa)
    };
    let ((sign_a, exp_a, man_a), (sign_b, exp_b, man_b)) = (parts(a), parts(b));
    if sign_a != sign_b {
        return u64::MAX;
    }
    // Numbers in order of magnitude are integers in order.
    let order = |exp: u16, man: u64| i128::from(exp) << 63 | i128::from(man & !(1 << 63));
    let distance = (order(exp_a, man_a) - order(exp_b, man_b)).unsigned_abs();
    u64::try_from(distance).unwrap_or(u64::MAX)
}

/// True if all single-precision lanes agree within 3 in 2^12, twice what each may be off the true
/// value.
fn near(expected: &[u8], got: &[u8]) -> bool {
    let lane = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    expected.chunks_exact(4).zip(got.chunks_exact(4)).all(|(e, g)| {
        let (e_bits, g_bits) = (e, g);
        let (e, g) = (lane(e), lane(g));
        let finite = e.is_finite() && g.is_finite() && e != 0.0;
        e_bits == g_bits || (finite && ((e - g) / e).abs() <= 3.0 / 4096.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_ulp_apart_across_a_power_of_two() {
        let one = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xFF, 0x3F];
        let below = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFE, 0x3F];
        let negative = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xFF, 0xBF];
        assert_eq!(ulps(&one, &below), 1);
        assert_eq!(ulps(&one, &negative), u64::MAX);
    }

    #[test]
    fn approximations_agree_within_twice_their_error() {
        let lanes = |value: f32| value.to_le_bytes().repeat(4);
        assert!(near(&lanes(1.0), &lanes(1.0005)));
        assert!(!near(&lanes(1.0), &lanes(1.001)));
        assert!(!near(&lanes(f32::INFINITY), &lanes(1.0)));
    }
}
