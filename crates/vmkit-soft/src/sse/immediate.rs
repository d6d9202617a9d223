//! Instructions of two vector operands and an immediate byte.
//!
//! A row is the shape, the instruction's bytes without the immediate, for XMM0 and XMM1, the memory source, and the
//! instruction's name in the decoder.

#![allow(unsafe_code, reason = "executes the guest's instruction on the host")]
#![allow(non_camel_case_types, reason = "types are named as the decoder names instructions")]

use std::arch::asm;

use iced_x86::Code;

use super::control::{Frame, asm_under};
use super::lane::{
    FloatImmediate, Immediate, M32, M64, M128, Pair, Register, U128, Xmm, float_immediate,
    immediate,
};

/// Code that executes one instruction on XMM0 and XMM1 for each value of its immediate byte, eight
/// bytes apart: an immediate is part of the code, so it cannot be passed.
macro_rules! stubs {
    ($bytes:literal) => {
        std::arch::naked_asm!(
            ".set .Lvmkit_imm, 0",
            ".rept 256",
            "2:",
            concat!(".byte ", $bytes, ", .Lvmkit_imm, 0xC3"),
            ".skip 8 - (. - 2b), 0xCC",
            ".set .Lvmkit_imm, .Lvmkit_imm + 1",
            ".endr",
        )
    };
}
pub(super) use stubs;

macro_rules! row {
    (imm $bytes:literal $code:ident) => {
        pub(super) struct $code;
        impl $code {
            // SAFETY: never called as a function; each stub is entered by an `asm!` that names what it changes.
            #[unsafe(naked)]
            extern "C" fn stubs() {
                stubs!($bytes)
            }
        }
        impl Immediate for $code {
            #[inline(always)]
            fn run(mut a: Xmm, b: Xmm, imm: u8) -> Xmm {
                let stub = Self::stubs as *const () as usize + 8 * usize::from(imm);
                // SAFETY: the stub executes an instruction that writes XMM0 only, and returns; the
                // instruction is selected only where the model lists it, which holds no more than the
                // host has.
                unsafe {
                    asm!(
                        "call {stub}",
                        stub = in(reg) stub,
                        inout("xmm0") a,
                        in("xmm1") b,
                        options(pure, nomem, preserves_flags)
                    );
                }
                a
            }
        }
    };
    (fimm $bytes:literal $code:ident) => {
        pub(super) struct $code;
        impl $code {
            // SAFETY: never called as a function; each stub is entered by an `asm!` that names what it changes.
            #[unsafe(naked)]
            extern "C" fn stubs() {
                stubs!($bytes)
            }
        }
        impl Immediate for $code {
            #[inline(always)]
            fn run(mut a: Xmm, b: Xmm, imm: u8) -> Xmm {
                let stub = Self::stubs as *const () as usize + 8 * usize::from(imm);
                // SAFETY: as above; sticky flags of MXCSR may change.
                unsafe {
                    asm!(
                        "call {stub}",
                        stub = in(reg) stub,
                        inout("xmm0") a,
                        in("xmm1") b,
                        options(nomem)
                    );
                }
                a
            }
        }
        impl FloatImmediate for $code {
            const CODE: Code = Code::$code;
            fn run_under(mut a: Xmm, b: Xmm, imm: u8, frame: &mut Frame) -> Xmm {
                let stub = Self::stubs as *const () as usize + 8 * usize::from(imm);
                // SAFETY: as above; MXCSR is as before in the end, and the frame outlives the block.
                unsafe {
                    asm_under!(
                        frame,
                        "call {stub}",
                        stub = in(reg) stub,
                        inout("xmm0") a,
                        in("xmm1") b,
                    );
                }
                a
            }
        }
    };
}

macro_rules! pair {
    (imm $code:ident $source:ident) => {
        Pair { register: immediate::<$code, Register>, memory: immediate::<$code, $source> }
    };
    (fimm $code:ident $source:ident) => {
        Pair {
            register: float_immediate::<$code, Register>,
            memory: float_immediate::<$code, $source>,
        }
    };
}

macro_rules! rows {
    ($($shape:ident $bytes:literal $source:ident $code:ident;)*) => {
        $(row!($shape $bytes $code);)*

        /// The code of an instruction of this table.
        pub(super) fn pick(code: Code) -> Option<Pair> {
            Some(match code {
                $(Code::$code => pair!($shape $code $source),)*
                _ => return None,
            })
        }
    };
}

rows! {
    fimm "0x0F, 0xC2, 0xC1" M128 Cmpps_xmm_xmmm128_imm8;
    fimm "0x66, 0x0F, 0xC2, 0xC1" M128 Cmppd_xmm_xmmm128_imm8;
    fimm "0xF3, 0x0F, 0xC2, 0xC1" M32 Cmpss_xmm_xmmm32_imm8;
    fimm "0xF2, 0x0F, 0xC2, 0xC1" M64 Cmpsd_xmm_xmmm64_imm8;
    fimm "0x66, 0x0F, 0x3A, 0x08, 0xC1" M128 Roundps_xmm_xmmm128_imm8;
    fimm "0x66, 0x0F, 0x3A, 0x09, 0xC1" M128 Roundpd_xmm_xmmm128_imm8;
    fimm "0x66, 0x0F, 0x3A, 0x0A, 0xC1" M32 Roundss_xmm_xmmm32_imm8;
    fimm "0x66, 0x0F, 0x3A, 0x0B, 0xC1" M64 Roundsd_xmm_xmmm64_imm8;
    fimm "0x66, 0x0F, 0x3A, 0x40, 0xC1" M128 Dpps_xmm_xmmm128_imm8;
    fimm "0x66, 0x0F, 0x3A, 0x41, 0xC1" M128 Dppd_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x70, 0xC1" M128 Pshufd_xmm_xmmm128_imm8;
    imm "0xF3, 0x0F, 0x70, 0xC1" M128 Pshufhw_xmm_xmmm128_imm8;
    imm "0xF2, 0x0F, 0x70, 0xC1" M128 Pshuflw_xmm_xmmm128_imm8;
    imm "0x0F, 0xC6, 0xC1" M128 Shufps_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0xC6, 0xC1" M128 Shufpd_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x3A, 0x0C, 0xC1" M128 Blendps_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x3A, 0x0D, 0xC1" M128 Blendpd_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x3A, 0x0E, 0xC1" M128 Pblendw_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x3A, 0x0F, 0xC1" M128 Palignr_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x3A, 0x21, 0xC1" M32 Insertps_xmm_xmmm32_imm8;
    imm "0x66, 0x0F, 0x3A, 0x42, 0xC1" M128 Mpsadbw_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x3A, 0x44, 0xC1" M128 Pclmulqdq_xmm_xmmm128_imm8;
    imm "0x0F, 0x3A, 0xCC, 0xC1" U128 Sha1rnds4_xmm_xmmm128_imm8;
    imm "0x66, 0x0F, 0x3A, 0xDF, 0xC1" M128 Aeskeygenassist_xmm_xmmm128_imm8;
}
