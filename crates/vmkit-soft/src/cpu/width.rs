//! Operand widths: 8, 16, 32 and 64 bits, as types that specialise operations.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::Cpu;
use super::flags::Flags;

/// An unsigned integer that memory holds.
pub(crate) trait Int: Copy + Eq + Send + 'static {
    /// Bytes it takes.
    const BYTES: usize;
    /// Zero-extended.
    fn widen(self) -> u64;
    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;
}

macro_rules! int {
    ($($t:ty)*) => {$(
        impl Int for $t {
            const BYTES: usize = size_of::<$t>();
            #[inline(always)]
            fn widen(self) -> u64 { self as u64 }
            #[inline(always)]
            fn truncate(value: u64) -> Self { value as $t }
        }
    )*};
}
int!(u8 u16 u32 u64 u128);

/// The number of an 8-bit register: 0 to 15 for the low bytes, these plus [`HIGH_BYTE`] for AH, CH,
/// DH and BH.
pub(crate) const HIGH_BYTE: u8 = 0x80;

/// An operand width. Values travel as zero-extended `u64`.
pub(crate) trait Width: 'static {
    type Int: Int;
    const BITS: u32;
    const BYTES: u64 = Self::BITS as u64 / 8;
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);

    /// Reads register `r`.
    fn get(cpu: &Cpu, r: u8) -> u64;
    /// Writes register `r`: 32 bits clear the upper half, 16 and 8 leave the rest.
    fn set(cpu: &mut Cpu, r: u8, value: u64);
    /// Sign-extends from this width.
    #[inline(always)]
    fn sext(value: u64) -> i64 {
        ((value << (64 - Self::BITS)) as i64) >> (64 - Self::BITS)
    }
    /// Sets flags from carries.
    fn carries(flags: &mut Flags, result: u64, carries: u64);
    fn carries_but_cf(flags: &mut Flags, result: u64, carries: u64);
    /// Replaces what `p` holds by `f` of it, atomically; returns what was there.
    ///
    /// # Safety
    /// `p` is valid for reads and writes, aligned, and only accessed atomically or by volatile-like
    /// guest accesses meanwhile.
    #[allow(unsafe_code, reason = "declares the contract; each implementation is one atomic loop")]
    unsafe fn atomic_update(p: *mut Self::Int, f: impl Fn(u64) -> u64) -> u64;
}

pub(crate) struct W8;
pub(crate) struct W16;
pub(crate) struct W32;
pub(crate) struct W64;

macro_rules! width {
    ($w:ident $int:ty, $atomic:ident, $bits:literal, |$cpu:ident, $r:ident| $get:expr, |$cpu2:ident, $r2:ident, $v:ident| $set:expr) => {
        impl Width for $w {
            type Int = $int;
            const BITS: u32 = $bits;
            #[inline(always)]
            fn get($cpu: &Cpu, $r: u8) -> u64 {
                $get
            }
            #[inline(always)]
            fn set($cpu2: &mut Cpu, $r2: u8, $v: u64) {
                $set
            }
            #[inline(always)]
            fn carries(flags: &mut Flags, result: u64, carries: u64) {
                flags.set_carries::<$bits>(Self::sext(result), carries);
            }
            #[inline(always)]
            fn carries_but_cf(flags: &mut Flags, result: u64, carries: u64) {
                flags.set_carries_but_cf::<$bits>(Self::sext(result), carries);
            }
            #[allow(unsafe_code, reason = "guest memory is shared with other vCPUs")]
            #[inline(always)]
            // SAFETY: the trait says what the caller vouches for.
            unsafe fn atomic_update(p: *mut Self::Int, f: impl Fn(u64) -> u64) -> u64 {
                // SAFETY: the caller vouches for `p` as `from_ptr` wants it.
                let cell = unsafe { $atomic::from_ptr(p) };
                let mut old = cell.load(Ordering::Relaxed);
                loop {
                    let new = f(u64::from(old)) as $int;
                    match cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed) {
                        Ok(_) => return u64::from(old),
                        Err(now) => old = now,
                    }
                }
            }
        }
    };
}

width!(W8 u8, AtomicU8, 8,
|cpu, r| cpu.regs[usize::from(r & 31)] >> (r >> 4 & 8) & 0xFF,
|cpu, r, v| {
    let shift = r >> 4 & 8;
    let reg = &mut cpu.regs[usize::from(r & 31)];
    *reg = *reg & !(0xFF << shift) | (v & 0xFF) << shift;
});
width!(W16 u16, AtomicU16, 16,
|cpu, r| cpu.regs[usize::from(r & 31)] & 0xFFFF,
|cpu, r, v| {
    let reg = &mut cpu.regs[usize::from(r & 31)];
    *reg = *reg & !0xFFFF | v & 0xFFFF;
});
width!(W32 u32, AtomicU32, 32,
    |cpu, r| cpu.regs[usize::from(r & 31)] & 0xFFFF_FFFF,
    |cpu, r, v| cpu.regs[usize::from(r & 31)] = v & 0xFFFF_FFFF);
width!(W64 u64, AtomicU64, 64,
    |cpu, r| cpu.regs[usize::from(r & 31)],
    |cpu, r, v| cpu.regs[usize::from(r & 31)] = v);
