//! Instructions of two vector operands.
//!
//! A row is the shape, the instruction as the host's assembler takes it, the memory source, and the
//! instruction's name in the decoder. Memory sources of SHA's instructions are taken at any address: the
//! manual asks for alignment, the processors this was compared with do not.

#![allow(unsafe_code, reason = "executes the guest's instruction on the host")]
#![allow(non_camel_case_types, reason = "types are named as the decoder names instructions")]

use std::arch::asm;

use iced_x86::Code;

use super::control::{Frame, asm_under};
use super::lane::{
    Binary, Float, M16, M32, M64, M128, Masked, Pair, Register, U128, Xmm, binary, float, from_low,
    masked,
};
use crate::code::{Handler, Next, OpRef};
use crate::cpu::Cpu;

macro_rules! row {
    (int $mnemonic:literal $code:ident) => {
        pub(super) struct $code;
        impl Binary for $code {
            #[inline(always)]
            fn run(mut a: Xmm, b: Xmm) -> Xmm {
                // SAFETY: the instruction reads and writes the two registers only; it is selected only
                // where the model lists it, which holds no more than the host has.
                unsafe {
                    asm!(
                        concat!($mnemonic, " {a}, {b}"),
                        a = inout(xmm_reg) a,
                        b = in(xmm_reg) b,
                        options(pure, nomem, nostack, preserves_flags)
                    );
                }
                a
            }
        }
    };
    (mask $mnemonic:literal $code:ident) => {
        pub(super) struct $code;
        impl Masked for $code {
            #[inline(always)]
            fn run(mut a: Xmm, b: Xmm, mask: Xmm) -> Xmm {
                // SAFETY: as above, with XMM0 read as well.
                unsafe {
                    asm!(
                        concat!($mnemonic, " {a}, {b}, xmm0"),
                        a = inout(xmm_reg) a,
                        b = in(xmm_reg) b,
                        in("xmm0") mask,
                        options(pure, nomem, nostack, preserves_flags)
                    );
                }
                a
            }
        }
    };
    (float $mnemonic:literal $code:ident) => {
        pub(super) struct $code;
        impl Binary for $code {
            #[inline(always)]
            fn run(mut a: Xmm, b: Xmm) -> Xmm {
                // SAFETY: as above; sticky flags of MXCSR may change.
                unsafe {
                    asm!(
                        concat!($mnemonic, " {a}, {b}"),
                        a = inout(xmm_reg) a,
                        b = in(xmm_reg) b,
                        options(nomem, nostack)
                    );
                }
                a
            }
        }
        impl Float for $code {
            const CODE: Code = Code::$code;
            fn run_under(mut a: Xmm, b: Xmm, frame: &mut Frame) -> Xmm {
                // SAFETY: as above; MXCSR is as before in the end, and the frame outlives the block.
                unsafe {
                    asm_under!(
                        frame,
                        concat!($mnemonic, " {a}, {b}"),
                        a = inout(xmm_reg) a,
                        b = in(xmm_reg) b,
                        options(nostack)
                    );
                }
                a
            }
        }
    };
}

macro_rules! pair {
    (int $code:ident $source:ident) => {
        Pair { register: binary::<$code, Register>, memory: binary::<$code, $source> }
    };
    (float $code:ident $source:ident) => {
        Pair { register: float::<$code, Register>, memory: float::<$code, $source> }
    };
    (mask $code:ident $source:ident) => {
        Pair { register: masked::<$code, Register>, memory: masked::<$code, $source> }
    };
}

macro_rules! rows {
    ($($shape:ident $mnemonic:literal $source:ident $code:ident;)*) => {
        $(row!($shape $mnemonic $code);)*

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
    float "sqrtps" M128 Sqrtps_xmm_xmmm128;
    float "sqrtpd" M128 Sqrtpd_xmm_xmmm128;
    float "sqrtss" M32 Sqrtss_xmm_xmmm32;
    float "sqrtsd" M64 Sqrtsd_xmm_xmmm64;
    float "addps" M128 Addps_xmm_xmmm128;
    float "addpd" M128 Addpd_xmm_xmmm128;
    float "addss" M32 Addss_xmm_xmmm32;
    float "addsd" M64 Addsd_xmm_xmmm64;
    float "mulps" M128 Mulps_xmm_xmmm128;
    float "mulpd" M128 Mulpd_xmm_xmmm128;
    float "mulss" M32 Mulss_xmm_xmmm32;
    float "mulsd" M64 Mulsd_xmm_xmmm64;
    float "cvtps2pd" M64 Cvtps2pd_xmm_xmmm64;
    float "cvtpd2ps" M128 Cvtpd2ps_xmm_xmmm128;
    float "cvtss2sd" M32 Cvtss2sd_xmm_xmmm32;
    float "cvtsd2ss" M64 Cvtsd2ss_xmm_xmmm64;
    float "cvtdq2ps" M128 Cvtdq2ps_xmm_xmmm128;
    float "cvtps2dq" M128 Cvtps2dq_xmm_xmmm128;
    float "cvttps2dq" M128 Cvttps2dq_xmm_xmmm128;
    float "subps" M128 Subps_xmm_xmmm128;
    float "subpd" M128 Subpd_xmm_xmmm128;
    float "subss" M32 Subss_xmm_xmmm32;
    float "subsd" M64 Subsd_xmm_xmmm64;
    float "minps" M128 Minps_xmm_xmmm128;
    float "minpd" M128 Minpd_xmm_xmmm128;
    float "minss" M32 Minss_xmm_xmmm32;
    float "minsd" M64 Minsd_xmm_xmmm64;
    float "divps" M128 Divps_xmm_xmmm128;
    float "divpd" M128 Divpd_xmm_xmmm128;
    float "divss" M32 Divss_xmm_xmmm32;
    float "divsd" M64 Divsd_xmm_xmmm64;
    float "maxps" M128 Maxps_xmm_xmmm128;
    float "maxpd" M128 Maxpd_xmm_xmmm128;
    float "maxss" M32 Maxss_xmm_xmmm32;
    float "maxsd" M64 Maxsd_xmm_xmmm64;
    float "haddpd" M128 Haddpd_xmm_xmmm128;
    float "haddps" M128 Haddps_xmm_xmmm128;
    float "hsubpd" M128 Hsubpd_xmm_xmmm128;
    float "hsubps" M128 Hsubps_xmm_xmmm128;
    float "addsubpd" M128 Addsubpd_xmm_xmmm128;
    float "addsubps" M128 Addsubps_xmm_xmmm128;
    float "cvttpd2dq" M128 Cvttpd2dq_xmm_xmmm128;
    float "cvtpd2dq" M128 Cvtpd2dq_xmm_xmmm128;
    int "movhlps" M128 Movhlps_xmm_xmm;
    int "movsldup" M128 Movsldup_xmm_xmmm128;
    int "movddup" M64 Movddup_xmm_xmmm64;
    int "unpcklps" M128 Unpcklps_xmm_xmmm128;
    int "unpcklpd" M128 Unpcklpd_xmm_xmmm128;
    int "unpckhps" M128 Unpckhps_xmm_xmmm128;
    int "unpckhpd" M128 Unpckhpd_xmm_xmmm128;
    int "movlhps" M128 Movlhps_xmm_xmm;
    int "movshdup" M128 Movshdup_xmm_xmmm128;
    int "rsqrtps" M128 Rsqrtps_xmm_xmmm128;
    int "rsqrtss" M32 Rsqrtss_xmm_xmmm32;
    int "rcpps" M128 Rcpps_xmm_xmmm128;
    int "rcpss" M32 Rcpss_xmm_xmmm32;
    int "andps" M128 Andps_xmm_xmmm128;
    int "andpd" M128 Andpd_xmm_xmmm128;
    int "andnps" M128 Andnps_xmm_xmmm128;
    int "andnpd" M128 Andnpd_xmm_xmmm128;
    int "orps" M128 Orps_xmm_xmmm128;
    int "orpd" M128 Orpd_xmm_xmmm128;
    int "xorps" M128 Xorps_xmm_xmmm128;
    int "xorpd" M128 Xorpd_xmm_xmmm128;
    int "punpcklbw" M128 Punpcklbw_xmm_xmmm128;
    int "punpcklwd" M128 Punpcklwd_xmm_xmmm128;
    int "punpckldq" M128 Punpckldq_xmm_xmmm128;
    int "packsswb" M128 Packsswb_xmm_xmmm128;
    int "pcmpgtb" M128 Pcmpgtb_xmm_xmmm128;
    int "pcmpgtw" M128 Pcmpgtw_xmm_xmmm128;
    int "pcmpgtd" M128 Pcmpgtd_xmm_xmmm128;
    int "packuswb" M128 Packuswb_xmm_xmmm128;
    int "punpckhbw" M128 Punpckhbw_xmm_xmmm128;
    int "punpckhwd" M128 Punpckhwd_xmm_xmmm128;
    int "punpckhdq" M128 Punpckhdq_xmm_xmmm128;
    int "packssdw" M128 Packssdw_xmm_xmmm128;
    int "punpcklqdq" M128 Punpcklqdq_xmm_xmmm128;
    int "punpckhqdq" M128 Punpckhqdq_xmm_xmmm128;
    int "pcmpeqb" M128 Pcmpeqb_xmm_xmmm128;
    int "pcmpeqw" M128 Pcmpeqw_xmm_xmmm128;
    int "pcmpeqd" M128 Pcmpeqd_xmm_xmmm128;
    int "psrlw" M128 Psrlw_xmm_xmmm128;
    int "psrld" M128 Psrld_xmm_xmmm128;
    int "psrlq" M128 Psrlq_xmm_xmmm128;
    int "paddq" M128 Paddq_xmm_xmmm128;
    int "pmullw" M128 Pmullw_xmm_xmmm128;
    int "psubusb" M128 Psubusb_xmm_xmmm128;
    int "psubusw" M128 Psubusw_xmm_xmmm128;
    int "pminub" M128 Pminub_xmm_xmmm128;
    int "pand" M128 Pand_xmm_xmmm128;
    int "paddusb" M128 Paddusb_xmm_xmmm128;
    int "paddusw" M128 Paddusw_xmm_xmmm128;
    int "pmaxub" M128 Pmaxub_xmm_xmmm128;
    int "pandn" M128 Pandn_xmm_xmmm128;
    int "pavgb" M128 Pavgb_xmm_xmmm128;
    int "psraw" M128 Psraw_xmm_xmmm128;
    int "psrad" M128 Psrad_xmm_xmmm128;
    int "pavgw" M128 Pavgw_xmm_xmmm128;
    int "pmulhuw" M128 Pmulhuw_xmm_xmmm128;
    int "pmulhw" M128 Pmulhw_xmm_xmmm128;
    int "cvtdq2pd" M64 Cvtdq2pd_xmm_xmmm64;
    int "psubsb" M128 Psubsb_xmm_xmmm128;
    int "psubsw" M128 Psubsw_xmm_xmmm128;
    int "pminsw" M128 Pminsw_xmm_xmmm128;
    int "por" M128 Por_xmm_xmmm128;
    int "paddsb" M128 Paddsb_xmm_xmmm128;
    int "paddsw" M128 Paddsw_xmm_xmmm128;
    int "pmaxsw" M128 Pmaxsw_xmm_xmmm128;
    int "pxor" M128 Pxor_xmm_xmmm128;
    int "psllw" M128 Psllw_xmm_xmmm128;
    int "pslld" M128 Pslld_xmm_xmmm128;
    int "psllq" M128 Psllq_xmm_xmmm128;
    int "pmuludq" M128 Pmuludq_xmm_xmmm128;
    int "pmaddwd" M128 Pmaddwd_xmm_xmmm128;
    int "psadbw" M128 Psadbw_xmm_xmmm128;
    int "psubb" M128 Psubb_xmm_xmmm128;
    int "psubw" M128 Psubw_xmm_xmmm128;
    int "psubd" M128 Psubd_xmm_xmmm128;
    int "psubq" M128 Psubq_xmm_xmmm128;
    int "paddb" M128 Paddb_xmm_xmmm128;
    int "paddw" M128 Paddw_xmm_xmmm128;
    int "paddd" M128 Paddd_xmm_xmmm128;
    int "pshufb" M128 Pshufb_xmm_xmmm128;
    int "phaddw" M128 Phaddw_xmm_xmmm128;
    int "phaddd" M128 Phaddd_xmm_xmmm128;
    int "phaddsw" M128 Phaddsw_xmm_xmmm128;
    int "pmaddubsw" M128 Pmaddubsw_xmm_xmmm128;
    int "phsubw" M128 Phsubw_xmm_xmmm128;
    int "phsubd" M128 Phsubd_xmm_xmmm128;
    int "phsubsw" M128 Phsubsw_xmm_xmmm128;
    int "psignb" M128 Psignb_xmm_xmmm128;
    int "psignw" M128 Psignw_xmm_xmmm128;
    int "psignd" M128 Psignd_xmm_xmmm128;
    int "pmulhrsw" M128 Pmulhrsw_xmm_xmmm128;
    int "pabsb" M128 Pabsb_xmm_xmmm128;
    int "pabsw" M128 Pabsw_xmm_xmmm128;
    int "pabsd" M128 Pabsd_xmm_xmmm128;
    int "pmovsxbw" M64 Pmovsxbw_xmm_xmmm64;
    int "pmovsxbd" M32 Pmovsxbd_xmm_xmmm32;
    int "pmovsxbq" M16 Pmovsxbq_xmm_xmmm16;
    int "pmovsxwd" M64 Pmovsxwd_xmm_xmmm64;
    int "pmovsxwq" M32 Pmovsxwq_xmm_xmmm32;
    int "pmovsxdq" M64 Pmovsxdq_xmm_xmmm64;
    int "pmuldq" M128 Pmuldq_xmm_xmmm128;
    int "pcmpeqq" M128 Pcmpeqq_xmm_xmmm128;
    int "packusdw" M128 Packusdw_xmm_xmmm128;
    int "pmovzxbw" M64 Pmovzxbw_xmm_xmmm64;
    int "pmovzxbd" M32 Pmovzxbd_xmm_xmmm32;
    int "pmovzxbq" M16 Pmovzxbq_xmm_xmmm16;
    int "pmovzxwd" M64 Pmovzxwd_xmm_xmmm64;
    int "pmovzxwq" M32 Pmovzxwq_xmm_xmmm32;
    int "pmovzxdq" M64 Pmovzxdq_xmm_xmmm64;
    int "pcmpgtq" M128 Pcmpgtq_xmm_xmmm128;
    int "pminsb" M128 Pminsb_xmm_xmmm128;
    int "pminsd" M128 Pminsd_xmm_xmmm128;
    int "pminuw" M128 Pminuw_xmm_xmmm128;
    int "pminud" M128 Pminud_xmm_xmmm128;
    int "pmaxsb" M128 Pmaxsb_xmm_xmmm128;
    int "pmaxsd" M128 Pmaxsd_xmm_xmmm128;
    int "pmaxuw" M128 Pmaxuw_xmm_xmmm128;
    int "pmaxud" M128 Pmaxud_xmm_xmmm128;
    int "pmulld" M128 Pmulld_xmm_xmmm128;
    int "phminposuw" M128 Phminposuw_xmm_xmmm128;
    int "sha1nexte" U128 Sha1nexte_xmm_xmmm128;
    int "sha1msg1" U128 Sha1msg1_xmm_xmmm128;
    int "sha1msg2" U128 Sha1msg2_xmm_xmmm128;
    int "sha256msg1" U128 Sha256msg1_xmm_xmmm128;
    int "sha256msg2" U128 Sha256msg2_xmm_xmmm128;
    int "aesimc" M128 Aesimc_xmm_xmmm128;
    int "aesenc" M128 Aesenc_xmm_xmmm128;
    int "aesenclast" M128 Aesenclast_xmm_xmmm128;
    int "aesdec" M128 Aesdec_xmm_xmmm128;
    int "aesdeclast" M128 Aesdeclast_xmm_xmmm128;
    mask "pblendvb" M128 Pblendvb_xmm_xmmm128;
    mask "blendvps" M128 Blendvps_xmm_xmmm128;
    mask "blendvpd" M128 Blendvpd_xmm_xmmm128;
    mask "sha256rnds2" U128 Sha256rnds2_xmm_xmmm128;
}

/// A shift of elements by an immediate count, as the shift by the count in a register.
fn shift<O: Binary>(cpu: &mut Cpu, op: OpRef) -> Next {
    let r = O::run(cpu.xmm(op.dst), from_low(op.imm as u64 & 0xFF));
    cpu.set_xmm(op.dst, r);
    op.next(cpu)
}

/// The code of a shift by an immediate count.
pub(super) fn pick_shift(code: Code) -> Option<Pair> {
    let register: Handler = match code {
        Code::Psrlw_xmm_imm8 => shift::<Psrlw_xmm_xmmm128>,
        Code::Psrld_xmm_imm8 => shift::<Psrld_xmm_xmmm128>,
        Code::Psrlq_xmm_imm8 => shift::<Psrlq_xmm_xmmm128>,
        Code::Psraw_xmm_imm8 => shift::<Psraw_xmm_xmmm128>,
        Code::Psrad_xmm_imm8 => shift::<Psrad_xmm_xmmm128>,
        Code::Psllw_xmm_imm8 => shift::<Psllw_xmm_xmmm128>,
        Code::Pslld_xmm_imm8 => shift::<Pslld_xmm_xmmm128>,
        Code::Psllq_xmm_imm8 => shift::<Psllq_xmm_xmmm128>,
        _ => return None,
    };
    Some(Pair { register, memory: register })
}
