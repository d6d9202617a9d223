//! Executing one VEX-encoded instruction on the host's vector unit.
//!
//! Instructions are called as stubs that work on fixed registers: the result goes to YMM0; sources are
//! YMM0 (or XMM0), YMM1 and YMM2, and RAX for a general register. One piece of assembly loads them from
//! and stores to register images, so that no Rust code is compiled for AVX.

#![allow(unsafe_code, reason = "executes the guest's instruction on the host")]

use std::arch::asm;

use super::super::control::Frame;
use crate::cpu::Vector;

/// Code that executes one instruction, or one for each value of an immediate byte, eight bytes apart.
pub(super) type Stub = extern "C" fn();

/// Where an instruction's sources and its result are. Any of them may be the same place.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// The result.
    pub d: *mut Vector,
    /// The first source, or the destination of one that also reads it.
    pub a: *const Vector,
    /// The last source: register or memory; its low part is in RAX too.
    pub b: *const Vector,
    /// A third source.
    pub c: *const Vector,
}

macro_rules! run {
    ($stub:ident, $places:ident, $before:literal, $after:literal, $($frame:tt)*) => {
        asm!(
            "vmovdqu ymm0, [{a}]",
            "vmovdqu ymm1, [{b}]",
            "vmovdqu ymm2, [{c}]",
            "mov rax, [{b}]",
            $before,
            "call {stub}",
            $after,
            "vmovdqu [{d}], ymm0",
            "vzeroupper",
            a = in(reg) $places.a,
            b = in(reg) $places.b,
            c = in(reg) $places.c,
            d = in(reg) $places.d,
            stub = in(reg) $stub,
            $($frame)*
            out("rax") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        )
    };
}

/// Executes the `imm`-th instruction of `stub`.
///
/// # Safety
/// The places are readable, `d` also writable, for 32 bytes each.
#[inline(always)]
pub(super) unsafe fn execute(stub: Stub, imm: u8, places: Places) {
    let stub = stub as usize + 8 * usize::from(imm);
    // SAFETY: the stub executes an instruction that reads and writes the registers named here, flags
    // and sticky flags of MXCSR, and returns; it is selected only where the model lists it, which holds
    // no more than the host has. The caller vouches for the places.
    unsafe { run!(stub, places, "", "",) };
}

/// The same under the control bits in `frame`; the flags raised are left there.
///
/// # Safety
/// As for [`execute`].
pub(super) unsafe fn execute_under(stub: Stub, imm: u8, places: Places, frame: &mut Frame) {
    let stub = stub as usize + 8 * usize::from(imm);
    let frame = std::ptr::from_mut(frame);
    // SAFETY: as above; MXCSR is as before in the end, and the frame outlives the block.
    unsafe {
        run!(
            stub,
            places,
            "ldmxcsr [{frame}]",
            "stmxcsr [{frame} + 4]\n ldmxcsr [{frame} + 8]",
            frame = in(reg) frame,
        );
    }
}
