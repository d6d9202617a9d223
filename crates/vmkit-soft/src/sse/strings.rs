//! PCMPESTRI, PCMPESTRM, PCMPISTRI and PCMPISTRM (Intel SDM vol. 1 §12.3.1).

#![allow(unsafe_code, reason = "executes the guest's instruction on the host")]

use std::arch::asm;

use iced_x86::Code;

use super::immediate::stubs;
use super::lane::{Operand, Pair, Register, U128, Xmm};
use crate::code::{Next, OpRef};
use crate::cpu::{Cpu, RAX, RCX, RDX, W64, Width};
use crate::exec::pick::tri;

/// What a string comparison leaves: the index in ECX, the mask in XMM0, and the flags.
struct Outcome {
    index: u64,
    mask: Xmm,
    flags: u64,
}

trait Strings: 'static {
    /// The result is a mask; else an index.
    const MASK: bool;
    fn stubs() -> usize;
}

macro_rules! strings {
    ($($name:ident $mask:literal $bytes:literal;)*) => {$(
        struct $name;
        impl $name {
            // SAFETY: never called as a function; each stub is entered by an `asm!` that names what it changes.
            #[unsafe(naked)]
            extern "C" fn code() {
                stubs!($bytes)
            }
        }
        impl Strings for $name {
            const MASK: bool = $mask;
            fn stubs() -> usize {
                Self::code as *const () as usize
            }
        }
    )*};
}

strings! {
    ExplicitMask true "0x66, 0x0F, 0x3A, 0x60, 0xC1";
    ExplicitMask64 true "0x66, 0x48, 0x0F, 0x3A, 0x60, 0xC1";
    ExplicitIndex false "0x66, 0x0F, 0x3A, 0x61, 0xC1";
    ExplicitIndex64 false "0x66, 0x48, 0x0F, 0x3A, 0x61, 0xC1";
    ImplicitMask true "0x66, 0x0F, 0x3A, 0x62, 0xC1";
    ImplicitIndex false "0x66, 0x0F, 0x3A, 0x63, 0xC1";
}

fn run<O: Strings>(a: Xmm, b: Xmm, imm: u8, lengths: (u64, u64)) -> Outcome {
    let stub = O::stubs() + 8 * usize::from(imm);
    let (mask, index, flags);
    // SAFETY: the stub executes an instruction that reads XMM0, XMM1, RAX and RDX and writes ECX, XMM0
    // and flags only, and returns; it is selected only where the model lists it, which holds no more
    // than the host has.
    unsafe {
        asm!(
            "call {stub}",
            "pushfq",
            "pop {flags}",
            stub = in(reg) stub,
            flags = lateout(reg) flags,
            inout("xmm0") a => mask,
            in("xmm1") b,
            in("rax") lengths.0,
            in("rdx") lengths.1,
            inout("rcx") 0_u64 => index,
        );
    }
    Outcome { index, mask, flags }
}

fn compare<O: Strings, S: Operand, const VEX: bool>(cpu: &mut Cpu, op: OpRef) -> Next {
    let b = tri!(cpu, op, S::get(cpu, &op));
    let lengths = (cpu.regs[RAX], cpu.regs[RDX]);
    let outcome = run::<O>(cpu.xmm(op.dst), b, op.imm as u8, lengths);
    if O::MASK {
        cpu.set_xmm(0, outcome.mask);
        if VEX {
            (cpu.vectors[0].0[2], cpu.vectors[0].0[3]) = (0, 0);
        }
    } else {
        W64::set(cpu, RCX as u8, outcome.index);
    }
    cpu.flags.set_arithmetic(outcome.flags);
    op.next(cpu)
}

/// The code of a string comparison, in legacy or VEX encoding.
pub(super) fn pick(code: Code, vex: bool) -> Option<Pair> {
    macro_rules! pair {
        ($o:ident) => {
            if vex {
                Pair { register: compare::<$o, Register, true>, memory: compare::<$o, U128, true> }
            } else {
                Pair {
                    register: compare::<$o, Register, false>,
                    memory: compare::<$o, U128, false>,
                }
            }
        };
    }
    Some(match code {
        Code::Pcmpestrm_xmm_xmmm128_imm8 => pair!(ExplicitMask),
        Code::Pcmpestrm64_xmm_xmmm128_imm8 => pair!(ExplicitMask64),
        Code::Pcmpestri_xmm_xmmm128_imm8 => pair!(ExplicitIndex),
        Code::Pcmpestri64_xmm_xmmm128_imm8 => pair!(ExplicitIndex64),
        Code::Pcmpistrm_xmm_xmmm128_imm8 => pair!(ImplicitMask),
        Code::Pcmpistri_xmm_xmmm128_imm8 => pair!(ImplicitIndex),
        _ => return None,
    })
}
