//! Where things lie, alike on the host and in the guest.
//!
//! Everything is below 2 GiB, so that an absolute or RIP-relative displacement reaches it. What is
//! not listed here is unmapped on both sides: each region has a guard page before and after it.

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// First byte of the data pages: readable, writable, not executable.
pub const DATA: u64 = 0x1000_1000;
/// Bytes of the data pages.
pub const DATA_LEN: u64 = 2 * PAGE;
/// A page of data that may only be read.
pub const READ_ONLY: u64 = 0x1000_4000;
/// First byte of the code pages: readable, executable, not writable. Where no instruction under test
/// lies they hold INT3.
pub const CODE: u64 = 0x2000_1000;
/// Bytes of the code pages.
pub const CODE_LEN: u64 = 2 * PAGE;

/// Bytes of the lines in which memory is described.
pub const LINE: usize = 64;
/// Lines of the data pages.
pub const LINES: usize = DATA_LEN as usize / LINE;

/// User code and stack selectors: those of 64-bit Linux, whose GDT the guest's mirrors.
pub const USER_CS: u16 = 0x33;
/// User stack selector.
pub const USER_SS: u16 = 0x2B;
/// User 32-bit code selector.
pub const USER_CS32: u16 = 0x23;

/// What the data pages hold before a case puts its own lines there.
pub fn background() -> &'static [u8; DATA_LEN as usize] {
    static BACKGROUND: [u8; DATA_LEN as usize] = filled(0x5EED);
    &BACKGROUND
}

/// What the read-only page holds.
pub fn read_only() -> &'static [u8; PAGE as usize] {
    static READ_ONLY: [u8; PAGE as usize] = filled(0xF00D);
    &READ_ONLY
}

/// Bytes of a linear congruential generator (Knuth's MMIX constants).
const fn filled<const N: usize>(seed: u64) -> [u8; N] {
    let mut bytes = [0; N];
    let mut state = seed;
    let mut i = 0;
    while i < N {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes[i] = (state >> 33) as u8;
        i += 1;
    }
    bytes
}
