//! What goes into one execution and what comes out.
//!
//! Both types are plain data without pointers: they cross a process boundary in shared memory.

use super::layout::{self, DATA, DATA_LEN, LINE, LINES};

/// Extended state in XSAVE's standard format with x87, SSE and AVX (Intel SDM vol. 1 §13.4).
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Fpu(pub [u8; 832]);

impl Default for Fpu {
    /// The initial state, with all three components marked as present.
    fn default() -> Self {
        let mut bytes = [0; 832];
        bytes[..2].copy_from_slice(&0x37F_u16.to_le_bytes());
        bytes[24..28].copy_from_slice(&0x1F80_u32.to_le_bytes());
        bytes[512] = 7;
        Self(bytes)
    }
}

impl Fpu {
    /// Byte offset of XMM register 0; the others follow every 16 bytes.
    pub const XMM: usize = 160;
    /// Byte offset of ST(0); the others follow every 16 bytes.
    pub const ST: usize = 32;
    /// Byte offset of the high half of YMM register 0.
    pub const YMM_HIGH: usize = 576;

    /// The control word.
    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes([self.0[0], self.0[1]])
    }
    /// The status word.
    pub fn fsw(&self) -> u16 {
        u16::from_le_bytes([self.0[2], self.0[3]])
    }
    /// The abridged tag word: a bit per register that is not empty.
    pub fn ftw(&self) -> u8 {
        self.0[4]
    }
    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.0[24], self.0[25], self.0[26], self.0[27]])
    }
    /// The ten bytes of ST(`i`).
    pub fn st(&self, i: usize) -> &[u8] {
        &self.0[Self::ST + 16 * i..][..10]
    }
    /// XMM register `i`.
    pub fn xmm(&self, i: usize) -> &[u8] {
        &self.0[Self::XMM + 16 * i..][..16]
    }
    /// The high half of YMM register `i`.
    pub fn ymm_high(&self, i: usize) -> &[u8] {
        &self.0[Self::YMM_HIGH + 16 * i..][..16]
    }
    /// Overwrites bytes from `at`.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// The lines of the data pages that differ from [`layout::background`].
#[repr(C)]
pub struct MemoryDiff {
    touched: [u64; LINES / 64],
    lines: [[u8; LINE]; LINES],
}

impl Default for MemoryDiff {
    fn default() -> Self {
        Self { touched: [0; LINES / 64], lines: [[0; LINE]; LINES] }
    }
}

impl Clone for MemoryDiff {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        copy.copy_from(self);
        copy
    }
}

impl MemoryDiff {
    /// Forgets all lines.
    pub fn clear(&mut self) {
        self.touched = [0; LINES / 64];
    }

    /// Becomes a copy of `other`, whose untouched lines are not looked at.
    pub fn copy_from(&mut self, other: &Self) {
        self.touched = other.touched;
        for (i, line) in other.iter() {
            self.lines[i] = *line;
        }
    }

    /// The touched lines, ascending, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &[u8; LINE])> {
        self.touched.iter().enumerate().flat_map(move |(word, &bits)| {
            let mut bits = bits;
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros();
                if bit == 64 {
                    return None;
                }
                bits &= bits - 1;
                let i = word * 64 + bit as usize;
                Some((i, &self.lines[i]))
            })
        })
    }

    /// Line `i`, from the background if it was not touched.
    pub fn line(&self, i: usize) -> &[u8] {
        if self.is_touched(i) { &self.lines[i] } else { &layout::background()[i * LINE..][..LINE] }
    }

    /// True if line `i` was touched.
    pub fn is_touched(&self, i: usize) -> bool {
        self.touched[i / 64] >> (i % 64) & 1 != 0
    }

    /// Makes line `i` the background's again.
    pub fn forget(&mut self, i: usize) {
        self.touched[i / 64] &= !(1 << (i % 64));
    }

    /// Sets line `i`.
    pub fn set_line(&mut self, i: usize, line: &[u8]) {
        self.touched[i / 64] |= 1 << (i % 64);
        self.lines[i].copy_from_slice(line);
    }

    /// Writes `bytes` at linear address `address`; what falls outside the data pages is dropped.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        for (i, &byte) in bytes.iter().enumerate() {
            let Some(at) = Self::offset(address.wrapping_add(i as u64)) else { continue };
            let line = at / LINE;
            if !self.is_touched(line) {
                self.touched[line / 64] |= 1 << (line % 64);
                self.lines[line].copy_from_slice(&layout::background()[line * LINE..][..LINE]);
            }
            self.lines[line][at % LINE] = byte;
        }
    }

    /// Reads the byte at linear address `address`; `None` outside the data pages.
    pub fn byte(&self, address: u64) -> Option<u8> {
        let at = Self::offset(address)?;
        Some(self.line(at / LINE)[at % LINE])
    }

    /// Reads `len` (at most 8) bytes as a little-endian number, bytes outside the data pages as 0.
    pub fn read(&self, address: u64, len: usize) -> u64 {
        (0..len.min(8)).rev().fold(0, |value, i| {
            value << 8 | u64::from(self.byte(address.wrapping_add(i as u64)).unwrap_or(0))
        })
    }

    /// Becomes what makes `pages` out of the background.
    pub fn capture(&mut self, pages: &[u8; DATA_LEN as usize]) {
        self.clear();
        for (i, (now, before)) in
            pages.chunks_exact(LINE).zip(layout::background().chunks_exact(LINE)).enumerate()
        {
            if now != before {
                self.set_line(i, now);
            }
        }
    }

    fn offset(address: u64) -> Option<usize> {
        let at = address.wrapping_sub(DATA);
        (at < DATA_LEN).then_some(at as usize)
    }
}

impl PartialEq for MemoryDiff {
    fn eq(&self, other: &Self) -> bool {
        (0..LINES)
            .all(|i| !(self.is_touched(i) || other.is_touched(i)) || self.line(i) == other.line(i))
    }
}

/// One instruction and the state it starts from.
#[derive(Clone)]
#[repr(C)]
pub struct Case {
    /// Extended state.
    pub fpu: Fpu,
    /// General registers in the order of their encoding.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// Linear address of the instruction, in the code pages.
    pub at: u64,
    /// Its bytes.
    pub code: [u8; 16],
    /// How many of `code` count; what falls outside the code pages is dropped.
    pub len: u32,
    /// The data pages.
    pub memory: MemoryDiff,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            fpu: Fpu::default(),
            gpr: [0; 16],
            rflags: 0x202,
            fs_base: 0,
            gs_base: 0,
            at: layout::CODE + layout::PAGE - 64,
            code: [0; 16],
            len: 0,
            memory: MemoryDiff::default(),
        }
    }
}

impl Case {
    /// The instruction's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.code[..self.len as usize]
    }

    /// Sets the instruction's bytes; more than 15 are cut off.
    pub fn set_bytes(&mut self, bytes: &[u8]) {
        let len = bytes.len().min(15);
        self.code[..len].copy_from_slice(&bytes[..len]);
        self.len = len as u32;
    }

    /// Becomes a copy of `other`.
    pub fn copy_from(&mut self, other: &Self) {
        self.fpu.0 = other.fpu.0;
        self.gpr = other.gpr;
        self.rflags = other.rflags;
        self.fs_base = other.fs_base;
        self.gs_base = other.gs_base;
        self.at = other.at;
        self.code = other.code;
        self.len = other.len;
        self.memory.copy_from(&other.memory);
    }
}

/// How an execution ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Ending {
    /// It was not run.
    #[default]
    NotRun,
    /// By an exception, usually the INT3 behind the instruction.
    Exception,
    /// It did not end and was stopped.
    Hung,
    /// The process that ran it died.
    Died,
    /// The backend gave up on it.
    Refused,
}

/// The visible parts of the segment registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Selectors {
    /// Code.
    pub cs: u16,
    /// Stack.
    pub ss: u16,
    /// Data.
    pub ds: u16,
    /// Extra.
    pub es: u16,
    /// FS.
    pub fs: u16,
    /// GS.
    pub gs: u16,
}

/// The state an execution ended in.
#[derive(Clone, Default)]
#[repr(C)]
pub struct Outcome {
    /// Extended state.
    pub fpu: Fpu,
    /// General registers.
    pub gpr: [u64; 16],
    /// RIP as the exception's frame holds it.
    pub rip: u64,
    /// RFLAGS as the exception's frame holds them.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// Segment registers.
    pub selectors: Selectors,
    /// How it ended.
    pub ending: Ending,
    /// The exception's vector.
    pub vector: u32,
    /// Its error code, 0 for those without.
    pub error: u64,
    /// The faulting address of a page fault.
    pub cr2: u64,
    /// The data pages.
    pub memory: MemoryDiff,
}

impl Outcome {
    /// True if it ended by exception `vector`.
    pub fn raised(&self, vector: u32) -> bool {
        self.ending == Ending::Exception && self.vector == vector
    }

    /// Becomes a copy of `other`.
    pub fn copy_from(&mut self, other: &Self) {
        self.fpu.0 = other.fpu.0;
        self.gpr = other.gpr;
        self.rip = other.rip;
        self.rflags = other.rflags;
        self.fs_base = other.fs_base;
        self.gs_base = other.gs_base;
        self.selectors = other.selectors;
        self.ending = other.ending;
        self.vector = other.vector;
        self.error = other.error;
        self.cr2 = other.cr2;
        self.memory.copy_from(&other.memory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_holds_what_was_written_and_shows_the_background_elsewhere() {
        let mut diff = MemoryDiff::default();
        diff.write(DATA + 62, &[1, 2, 3]);
        assert_eq!(diff.iter().map(|(i, _)| i).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(diff.read(DATA + 62, 3), 0x03_02_01);
        assert_eq!(diff.byte(DATA + 65), Some(layout::background()[65]));
        assert_eq!(diff.byte(DATA - 1), None);
        diff.write(DATA + DATA_LEN - 1, &[9, 9]);
        assert_eq!(diff.iter().count(), 3);
    }

    #[test]
    fn capture_finds_the_changed_lines_only() {
        let mut pages = *layout::background();
        pages[200] ^= 1;
        let mut diff = MemoryDiff::default();
        diff.capture(&pages);
        assert_eq!(diff.iter().map(|(i, _)| i).collect::<Vec<_>>(), [3]);
    }
}
