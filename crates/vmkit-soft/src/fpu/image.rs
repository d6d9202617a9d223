//! The x87 state as the FXSAVE image holds it (Intel SDM vol. 1 §10.5.1).

use crate::cpu::Cpu;
use crate::sse::{MXCSR_MASK, MXCSR_RESET};

/// FCW after FNINIT.
pub(crate) const FCW_RESET: u16 = 0x37F;

/// x87 registers and environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fpu {
    pub fcw: u16,
    pub fsw: u16,
    /// Abridged tag word, by physical register: a set bit says "not empty".
    pub ftw: u8,
    /// The low 11 bits of the last instruction's opcode.
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    /// ST(0) to ST(7), 80 bits each, in stack order.
    pub st: [u128; 8],
}

impl Default for Fpu {
    fn default() -> Self {
        Self { fcw: FCW_RESET, fsw: 0, ftw: 0, fop: 0, fip: 0, fdp: 0, st: [0; 8] }
    }
}

impl Fpu {
    /// The state after FNINIT, with empty registers zero.
    pub fn new() -> Self {
        Self::default()
    }
}

/// The bits of an image slot that are the register.
pub(super) const ST_MASK: u128 = (1 << 80) - 1;

impl Cpu {
    /// The x87, MMX and SSE state in the 64-bit FXSAVE layout.
    pub fn fxsave_image(&self) -> [u8; 512] {
        let mut image = [0_u8; 512];
        self.put_x87(&mut image);
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(24, &self.mxcsr.to_le_bytes());
        put(28, &MXCSR_MASK.to_le_bytes());
        for (i, vector) in self.vectors.iter().enumerate() {
            put(160 + 16 * i, &vector.0[0].to_le_bytes());
            put(168 + 16 * i, &vector.0[1].to_le_bytes());
        }
        image
    }

    /// Writes the x87 part of an image in the 64-bit layout.
    pub(super) fn put_x87(&self, image: &mut [u8; 512]) {
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.fpu.fcw.to_le_bytes());
        put(2, &self.fpu.fsw.to_le_bytes());
        put(4, &[self.fpu.ftw, 0]);
        put(6, &self.fpu.fop.to_le_bytes());
        put(8, &self.fpu.fip.to_le_bytes());
        put(16, &self.fpu.fdp.to_le_bytes());
        for (i, st) in self.fpu.st.iter().enumerate() {
            put(32 + 16 * i, &st.to_le_bytes());
        }
    }

    /// Loads the x87 part of an image in the 64-bit layout.
    pub fn load_x87_image(&mut self, image: &[u8; 512]) {
        let fpu = &mut self.fpu;
        fpu.fcw = word(image, 0) as u16;
        fpu.fsw = word(image, 2) as u16;
        fpu.ftw = image[4];
        fpu.fop = word(image, 6) as u16 & 0x7FF;
        fpu.fip = word(image, 8);
        fpu.fdp = word(image, 16);
        for (i, st) in fpu.st.iter_mut().enumerate() {
            let (low, high) = (word(image, 32 + 16 * i), word(image, 40 + 16 * i));
            *st = (u128::from(high) << 64 | u128::from(low)) & ST_MASK;
        }
        fpu.sanitize();
    }

    /// Loads the first `count` XMM registers of an image.
    pub fn load_sse_image(&mut self, image: &[u8; 512], count: usize) {
        for (i, vector) in self.vectors.iter_mut().enumerate().take(count) {
            vector.0[0] = word(image, 160 + 16 * i);
            vector.0[1] = word(image, 168 + 16 * i);
        }
    }

    /// The XMM registers and MXCSR as after reset.
    pub fn reset_sse(&mut self) {
        for vector in &mut self.vectors {
            vector.0 = [0; 4];
        }
        self.mxcsr = MXCSR_RESET;
    }
}

impl Fpu {
    /// The top of the stack: the physical number of ST(0).
    fn top(&self) -> usize {
        usize::from(self.fsw >> 11 & 7)
    }

    /// The registers by physical number rather than from the top.
    pub(super) fn in_physical_order(&self) -> [u128; 8] {
        let mut physical = self.st;
        physical.rotate_right(self.top());
        physical
    }

    /// Sets the registers, given by physical number.
    pub(super) fn set_physical(&mut self, mut physical: [u128; 8]) {
        physical.rotate_left(self.top());
        self.st = physical;
    }

    /// The tag word with two bits a register, by physical number: valid, zero, special, empty.
    pub(super) fn full_tags(&self) -> u16 {
        let physical = self.in_physical_order();
        (0..8).fold(0, |tags, i| {
            let value = physical[i];
            let (exponent, mantissa) = ((value >> 64) as u16 & 0x7FFF, value as u64);
            let tag = if self.ftw >> i & 1 == 0 {
                3
            } else if exponent == 0 && mantissa == 0 {
                1
            } else if exponent == 0 || exponent == 0x7FFF || mantissa >> 63 == 0 {
                2
            } else {
                0
            };
            tags | tag << (2 * i)
        })
    }

    /// Sets the abridged tags from a full tag word.
    pub(super) fn set_full_tags(&mut self, tags: u16) {
        self.ftw = (0..8).fold(0, |ftw, i| ftw | u8::from(tags >> (2 * i) & 3 != 3) << i);
    }

    /// Gives bits that do not exist their fixed values, and makes ES and B follow the flags.
    pub fn sanitize(&mut self) {
        self.fcw = self.fcw & 0x1F3F | 0x40;
        let pending = self.fsw & !self.fcw & 0x3F != 0;
        self.fsw = self.fsw & 0x7F7F | if pending { 0x8080 } else { 0 };
    }
}

/// Eight little-endian bytes at `at`; what lies past the end is zero.
fn word(image: &[u8; 512], at: usize) -> u64 {
    image.iter().skip(at).take(8).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
