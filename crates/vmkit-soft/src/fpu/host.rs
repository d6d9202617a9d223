//! The host's x87 and MMX units, one instruction at a time.
//!
//! Tables of stubs, made by the assembler: each loads a state, runs one instruction, and takes the
//! state out again. Nothing is generated at run time. A stub leaves the unit as after FNINIT, so that
//! no exception of the guest's can surface in the host's code.

#![allow(unsafe_code, reason = "runs x87 and MMX instructions that Rust cannot name")]

use core::arch::{asm, naked_asm};

/// An FXSAVE image in the 64-bit layout.
#[repr(C, align(64))]
pub(super) struct Image(pub [u8; 512]);

/// Bytes from one stub to the next.
const STRIDE: usize = 32;

/// Opcodes D8 to DF with each register form, C0 to FF. A stub takes an image in RDI and flags in RSI
/// (for FCMOVcc), and returns the flags after (FCOMI).
// SAFETY: never called as a function; each stub is entered by an `asm!` that names what it changes.
#[unsafe(naked)]
extern "C" fn x87_registers() {
    naked_asm!(
        ".balign 32",
        ".set vmkit_op, 0xd8",
        ".rept 8",
        ".set vmkit_modrm, 0xc0",
        ".rept 64",
        ".balign 32",
        "fxrstor64 [rdi]",
        "push rsi",
        "popfq",
        ".byte vmkit_op, vmkit_modrm",
        "pushfq",
        "pop rax",
        "fxsave64 [rdi]",
        "fninit",
        "ret",
        ".set vmkit_modrm, vmkit_modrm + 1",
        ".endr",
        ".set vmkit_op, vmkit_op + 1",
        ".endr",
        ".balign 32",
    )
}

/// Opcodes D8 to DF with each memory form, /0 to /7. A stub takes an image in RDI and the operand's
/// address in RSI.
// SAFETY: never called as a function; each stub is entered by an `asm!` that names what it changes.
#[unsafe(naked)]
extern "C" fn x87_memory() {
    naked_asm!(
        ".balign 32",
        ".set vmkit_op, 0xd8",
        ".rept 8",
        ".set vmkit_reg, 0",
        ".rept 8",
        ".balign 32",
        "fxrstor64 [rdi]",
        ".byte vmkit_op, vmkit_reg * 8 + 6",
        "fxsave64 [rdi]",
        "fninit",
        "ret",
        ".set vmkit_reg, vmkit_reg + 1",
        ".endr",
        ".set vmkit_op, vmkit_op + 1",
        ".endr",
        ".balign 32",
    )
}

/// Opcodes 0F 00 to 0F FF on MM0 and MM1. A stub takes the addresses of destination and source.
// SAFETY: never called as a function; each stub is entered by an `asm!` that names what it changes.
#[unsafe(naked)]
extern "C" fn mmx_table() {
    naked_asm!(
        ".balign 32",
        ".set vmkit_op, 0",
        ".rept 256",
        ".balign 32",
        "movq mm0, [rdi]",
        "movq mm1, [rsi]",
        ".byte 0x0f, vmkit_op, 0xc1",
        "movq [rdi], mm0",
        "emms",
        "ret",
        ".set vmkit_op, vmkit_op + 1",
        ".endr",
        ".balign 32",
    )
}

/// Opcodes 0F 38 00 to 0F 38 1F on MM0 and MM1, as [`mmx_table`].
// SAFETY: never called as a function; each stub is entered by an `asm!` that names what it changes.
#[unsafe(naked)]
extern "C" fn mmx38_table() {
    naked_asm!(
        ".balign 32",
        ".set vmkit_op, 0",
        ".rept 32",
        ".balign 32",
        "movq mm0, [rdi]",
        "movq mm1, [rsi]",
        ".byte 0x0f, 0x38, vmkit_op, 0xc1",
        "movq [rdi], mm0",
        "emms",
        "ret",
        ".set vmkit_op, vmkit_op + 1",
        ".endr",
        ".balign 32",
    )
}

/// The stub number `index` of a table. Naked functions are aligned to 16 bytes at least, and the table
/// to 32: its first stub is at the next multiple of 32.
fn stub(table: extern "C" fn(), index: usize) -> usize {
    (table as usize).next_multiple_of(STRIDE) + index * STRIDE
}

/// Runs the x87 instruction `opcode`, `modrm` (D8 to DF, C0 to FF) on the state in `image`, with
/// `flags` in the arithmetic flags; the flags after it.
///
/// The image's exceptions must not be pending, or FXRSTOR's successor would fault.
pub(super) fn x87_register(image: &mut Image, opcode: u8, modrm: u8, flags: u64) -> u64 {
    let index = usize::from(opcode & 7) * 64 + usize::from(modrm & 63);
    // SAFETY: the stub is one of the table's; it touches the image, its own stack slots, and registers
    // that the C calling convention lets it change (the x87 and XMM registers; MXCSR's control bits
    // are the image's, which are the default).
    let run: extern "C" fn(*mut Image, u64) -> u64 =
        unsafe { std::mem::transmute(stub(x87_registers, index)) };
    run(image, flags)
}

/// Runs the x87 instruction `opcode` /`reg` on the state in `image` and a memory operand.
pub(super) fn x87_on_memory(image: &mut Image, opcode: u8, reg: u8, operand: &mut [u8; 16]) {
    let index = usize::from(opcode & 7) * 8 + usize::from(reg & 7);
    // SAFETY: as in `x87_register`; the operand of every instruction that is run this way has at most
    // 10 bytes (the environment instructions are not).
    let run: extern "C" fn(*mut Image, *mut [u8; 16]) =
        unsafe { std::mem::transmute(stub(x87_memory, index)) };
    run(image, operand);
}

/// Which opcode map an MMX instruction is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// 0F.
    Two,
    /// 0F 38.
    Three38,
}

/// Runs the MMX instruction with `opcode` in `map` on `a` and `b`; what it leaves in the first.
pub(super) fn mmx(map: Map, opcode: u8, a: u64, b: u64) -> u64 {
    let (mut a, b) = (a, b);
    let at = match map {
        Map::Two => stub(mmx_table, opcode.into()),
        Map::Three38 => stub(mmx38_table, usize::from(opcode & 31)),
    };
    // SAFETY: the stub is one of a table's; it reads and writes the two words and leaves the x87 unit
    // empty. Only opcodes that are MMX instructions on two registers come here.
    let run: extern "C" fn(*mut u64, *const u64) = unsafe { std::mem::transmute(at) };
    run(&mut a, &b);
    a
}

/// Conversions between MM and XMM registers, under `mxcsr` (all exceptions masked); the result and
/// the flags raised.
macro_rules! convert {
    ($(#[$doc:meta])* $name:ident, $text:literal, to mm) => {
        $(#[$doc])*
        pub(super) fn $name(source: [u64; 2], mxcsr: u32) -> (u64, u32) {
            let (mut result, mut raised, mut saved) = (0_u64, mxcsr, 0_u32);
            // SAFETY: memory operands are the locals named; MM0 is emptied, MXCSR is put back.
            unsafe {
                asm!(
                    "stmxcsr [{saved}]",
                    "ldmxcsr [{raised}]",
                    "movdqu {x}, [{source}]",
                    concat!($text, " mm0, {x}"),
                    "movq [{result}], mm0",
                    "stmxcsr [{raised}]",
                    "ldmxcsr [{saved}]",
                    "emms",
                    saved = in(reg) &raw mut saved,
                    raised = in(reg) &raw mut raised,
                    source = in(reg) &raw const source,
                    result = in(reg) &raw mut result,
                    x = out(xmm_reg) _,
                    out("mm0") _, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                );
            }
            (result, raised & 0x3F)
        }
    };
    ($(#[$doc:meta])* $name:ident, $text:literal, to xmm) => {
        $(#[$doc])*
        pub(super) fn $name(source: u64, before: [u64; 2], mxcsr: u32) -> ([u64; 2], u32) {
            let (mut result, mut raised, mut saved) = (before, mxcsr, 0_u32);
            // SAFETY: memory operands are the locals named; MM0 is emptied, MXCSR is put back.
            unsafe {
                asm!(
                    "stmxcsr [{saved}]",
                    "ldmxcsr [{raised}]",
                    "movq mm0, [{source}]",
                    "movdqu {x}, [{result}]",
                    concat!($text, " {x}, mm0"),
                    "movdqu [{result}], {x}",
                    "stmxcsr [{raised}]",
                    "ldmxcsr [{saved}]",
                    "emms",
                    saved = in(reg) &raw mut saved,
                    raised = in(reg) &raw mut raised,
                    source = in(reg) &raw const source,
                    result = in(reg) &raw mut result,
                    x = out(xmm_reg) _,
                    out("mm0") _, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                );
            }
            (result, raised & 0x3F)
        }
    };
}

convert!(
    /// CVTPS2PI.
    cvtps2pi, "cvtps2pi", to mm);
convert!(
    /// CVTTPS2PI.
    cvttps2pi, "cvttps2pi", to mm);
convert!(
    /// CVTPD2PI.
    cvtpd2pi, "cvtpd2pi", to mm);
convert!(
    /// CVTTPD2PI.
    cvttpd2pi, "cvttpd2pi", to mm);
convert!(
    /// CVTPI2PS: the upper half of the destination stays.
    cvtpi2ps, "cvtpi2ps", to xmm);
convert!(
    /// CVTPI2PD.
    cvtpi2pd, "cvtpi2pd", to xmm);
