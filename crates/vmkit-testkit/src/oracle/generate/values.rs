//! Values worth computing with: edges of integers and floating-point formats, and random ones
//! between.

use super::super::rng::Rng;

/// What the lanes of a vector register hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// Integers and raw bytes.
    Integer,
    /// Single precision.
    Single,
    /// Double precision.
    Double,
    /// Bytes of a small alphabet with a terminating zero here and there: text.
    Text,
}

/// An integer of `bits` bits (8 to 64), often an edge.
pub fn integer(rng: &mut Rng, bits: u32) -> u64 {
    let mask = u64::MAX >> (64 - bits);
    let value = match rng.below(10) {
        0 => 0,
        1 => rng.pick(&[1, 2, 3, 4, 7, 8, 10, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256]),
        2 => u64::MAX,
        3 => 1 << (bits - 1),
        4 => (1 << (bits - 1)) - 1,
        5 => rng.below(256),
        6 => 1 << rng.below(bits.into()),
        7 => rng.u64() >> rng.below(bits.into()),
        _ => rng.u64(),
    };
    let nudged =
        if rng.chance(10) { value.wrapping_add(rng.below(3)).wrapping_sub(1) } else { value };
    if rng.chance(8) { nudged.wrapping_neg() & mask } else { nudged & mask }
}

/// A 64-bit general register's value: an integer of some width, sign-extended now and then.
pub fn general(rng: &mut Rng) -> u64 {
    let bits = rng.pick(&[8, 16, 32, 32, 64, 64, 64]);
    let value = integer(rng, bits);
    let above = if bits < 64 { u64::MAX << bits } else { 0 };
    match rng.below(4) {
        0 => value,
        1 => value | rng.u64() & above,
        2 => ((value << (64 - bits)) as i64 >> (64 - bits)) as u64,
        _ => value | above,
    }
}

/// Bits of a single-precision number.
pub fn single(rng: &mut Rng) -> u32 {
    const EDGES: [u32; 24] = [
        0,
        1,           // smallest denormal
        0x007F_FFFF, // largest denormal
        0x0040_0000,
        0x0080_0000, // smallest normal
        0x0080_0001,
        0x7F7F_FFFF, // largest
        0x7F80_0000, // infinity
        0x7FC0_0000, // default NaN
        0x7FC1_2345,
        0x7F80_0001, // signalling NaN
        0x7FA5_5AA5,
        0x3F80_0000, // 1
        0x3F80_0001,
        0x3F7F_FFFF,
        0x3F00_0000, // 0.5
        0x3FC0_0000, // 1.5
        0x4020_0000, // 2.5
        0x4B00_0000, // 2^23
        0x4EFF_FFFF, // just below 2^31
        0x4F00_0000, // 2^31
        0x5F00_0000, // 2^63
        0x4F80_0000, // 2^32
        0x4B7F_FFFF, // 2^24 - 1
    ];
    let magnitude = match rng.below(10) {
        0..=3 => rng.pick(&EDGES),
        4 | 5 => (rng.range(127 - 6, 127 + 34) as u32) << 23 | rng.u64() as u32 & 0x7F_FFFF,
        6 => (rng.range(127 - 2, 127 + 10) as u32) << 23 | (rng.u64() as u32 & 7) << 20,
        7 => (rng.range(0, 40) as u32) << 23 | rng.u64() as u32 & 0x7F_FFFF,
        8 => (rng.range(200, 255) as u32) << 23 | rng.u64() as u32 & 0x7F_FFFF,
        _ => rng.u64() as u32 & 0x7FFF_FFFF,
    };
    magnitude | (rng.u64() as u32 & 1) << 31
}

/// Bits of a double-precision number.
pub fn double(rng: &mut Rng) -> u64 {
    const EDGES: [u64; 26] = [
        0,
        1,
        0x000F_FFFF_FFFF_FFFF,
        0x0008_0000_0000_0000,
        0x0010_0000_0000_0000,
        0x7FEF_FFFF_FFFF_FFFF,
        0x7FF0_0000_0000_0000,
        0x7FF8_0000_0000_0000,
        0x7FF8_0123_4567_89AB,
        0x7FF0_0000_0000_0001,
        0x7FF4_5AA5_5AA5_5AA5,
        0x3FF0_0000_0000_0000,
        0x3FF0_0000_0000_0001,
        0x3FEF_FFFF_FFFF_FFFF,
        0x3FE0_0000_0000_0000,
        0x3FF8_0000_0000_0000,
        0x4004_0000_0000_0000,
        0x4330_0000_0000_0000, // 2^52
        0x41DF_FFFF_FFC0_0000, // 2^31 - 1
        0x41DF_FFFF_FFE0_0000, // 2^31 - 0.5
        0x41E0_0000_0000_0000, // 2^31
        0x41E0_0000_0010_0000,
        0x43E0_0000_0000_0000, // 2^63
        0x43DF_FFFF_FFFF_FFFF,
        0x47EF_FFFF_E000_0000, // largest single
        0x47EF_FFFF_F000_0000, // rounds to infinity as a single
    ];
    let fraction = 0x000F_FFFF_FFFF_FFFF;
    let magnitude = match rng.below(11) {
        0..=3 => rng.pick(&EDGES),
        4 | 5 => rng.range(1023 - 6, 1023 + 66) << 52 | rng.u64() & fraction,
        6 => rng.range(1023 - 2, 1023 + 10) << 52 | (rng.u64() & 7) << 49,
        7 => rng.range(0, 60) << 52 | rng.u64() & fraction,
        8 => rng.range(1990, 2047) << 52 | rng.u64() & fraction,
        // Around single precision's limits.
        9 => rng.pick(&[873, 874, 896, 897, 1150, 1151]) << 52 | rng.u64() & fraction,
        _ => rng.u64() >> 1,
    };
    magnitude | rng.u64() << 63
}

/// The ten bytes of a double-extended number, encodings that no result can have among them.
pub fn extended(rng: &mut Rng) -> [u8; 10] {
    let one = 1_u64 << 63;
    let (exponent, mantissa) = match rng.below(16) {
        0 => (0, 0),
        1 => (0x3FFF, one),
        2 => (0x7FFF, one),
        3 => (0x7FFF, rng.pick(&[one | 1, one | 1 << 62, one | 3 << 61, one | 0x1234_5678])),
        // Denormals, pseudo-denormals.
        4 => (0, rng.pick(&[1, one - 1, one, one | 1]) ^ rng.below(2) << 5),
        // Unnormals, pseudo-infinity, pseudo-NaN.
        5 => (rng.pick(&[1, 0x3FFF, 0x7FFE, 0x7FFF]), rng.pick(&[0, 1, one - 1, 1 << 62])),
        6 => (rng.pick(&[1, 0x7FFE]), rng.pick(&[one, u64::MAX])),
        // Integers.
        7 | 8 => (rng.range(0x3FFE, 0x3FFF + 66), one | rng.u64() << rng.below(64)),
        // Magnitudes below one and around it.
        9 | 10 => (rng.range(0x3FFF - 5, 0x3FFF), one | rng.u64()),
        // Near the limits of single and double precision.
        11 => (rng.pick(&[0x3F81, 0x3F6A, 0x407E, 0x3C01, 0x3BCD, 0x43FE]), one | rng.u64()),
        12 => {
            (rng.range(0x3FFF, 0x3FFF + 70), one | rng.pick(&[0x7FF, 0x400, 0x3FF, 0xFF_FFFF_FFFF]))
        }
        13 => (rng.below(0x8000), rng.u64()),
        _ => (rng.range(0x3FFF - 40, 0x3FFF + 70), one | rng.u64()),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
    bytes[8..].copy_from_slice(
        &((exponent as u16 & 0x7FFF) | (rng.u64() as u16 & 1) << 15).to_le_bytes(),
    );
    bytes
}

/// Fills `bytes` (a multiple of 8) with lanes of that kind.
pub fn lanes(rng: &mut Rng, kind: Lanes, bytes: &mut [u8]) {
    for lane in bytes.chunks_exact_mut(8) {
        let value = match kind {
            Lanes::Single => u64::from(single(rng)) | u64::from(single(rng)) << 32,
            Lanes::Double => double(rng),
            Lanes::Text => {
                let byte = |rng: &mut Rng| rng.pick(b"\0aabbc~\x7F\x80");
                u64::from_le_bytes(std::array::from_fn(|_| byte(rng)))
            }
            Lanes::Integer => match rng.below(4) {
                0 => integer(rng, 64),
                1 => integer(rng, 32) | integer(rng, 32) << 32,
                2 => (0..4).fold(0, |v, _| v << 16 | integer(rng, 16)),
                _ => (0..8).fold(0, |v, _| v << 8 | integer(rng, 8)),
            },
        };
        lane.copy_from_slice(&value.to_le_bytes());
    }
}

/// A BCD number of 18 digits, not always a valid one.
pub fn bcd(rng: &mut Rng) -> [u8; 10] {
    let limit = if rng.chance(85) { 10 } else { 16 };
    let mut bytes = std::array::from_fn(|_| (rng.below(limit) << 4 | rng.below(limit)) as u8);
    let digits = rng.below(10) as usize;
    bytes[digits..].fill(0);
    bytes[9] = rng.pick(&[0, 0x80, 0x80, 0, 0x7F]);
    bytes
}
