//! What the tables say about an instruction.

use iced_x86::Code;

use super::engine::Stub;

/// Where an instruction's sources are among its operands, after the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// One source.
    Move,
    /// Two sources.
    Merge,
    /// Two sources and a register that chooses between them.
    Blend,
    /// Two sources and the destination itself.
    Fma,
    /// One source; the destination may be memory.
    Store,
    /// As `Move`, from a general register or memory.
    MoveGeneral,
    /// As `Merge`, the last one a general register or memory.
    MergeGeneral,
}

/// How much of a memory source is loaded, into the low part of a register image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// It has no memory source.
    Nothing,
    M256,
    U128,
    M64,
    M32,
    M16,
    M8,
}

/// An instruction.
pub(super) struct Row {
    pub code: Code,
    pub layout: Layout,
    pub memory: Memory,
    /// It raises flags and obeys MXCSR.
    pub float: bool,
    pub stub: Stub,
}

/// One instruction, or one for each immediate, as a stub.
macro_rules! stub {
    (one $text:literal) => {{
        // SAFETY: never called as a function; it is entered by an `asm!` that names what it changes.
        #[unsafe(naked)]
        extern "C" fn stub() {
            std::arch::naked_asm!($text, "ret")
        }
        stub
    }};
    (imm $bytes:literal) => {{
        // SAFETY: never called as a function; it is entered by an `asm!` that names what it changes.
        #[unsafe(naked)]
        extern "C" fn stub() {
            super::super::immediate::stubs!($bytes)
        }
        stub
    }};
}
pub(super) use stub;

macro_rules! is_float {
    (float) => {
        true
    };
    (int) => {
        false
    };
}
pub(super) use is_float;

/// A table. A row is: one instruction or one for each immediate byte; whether it computes in floating
/// point; its layout and memory source; the instruction as the assembler takes it, or its bytes without
/// the immediate; its name in the decoder.
macro_rules! rows {
    ($($kind:ident $float:ident $layout:ident $memory:ident $text:literal $code:ident;)*) => {
        pub(super) static ROWS: &[Row] = &[$(
            Row {
                code: Code::$code,
                layout: Layout::$layout,
                memory: Memory::$memory,
                float: is_float!($float),
                stub: stub!($kind $text),
            },
        )*];
    };
}
pub(super) use rows;
