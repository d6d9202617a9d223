//! Guest programs of a few instructions: static ELF files, written with an assembler.

#![allow(clippy::expect_used, clippy::missing_panics_doc, reason = "programs are constants")]

use std::fmt::Write;

use iced_x86::code_asm::{CodeAssembler, eax};

/// Where programs are loaded, file headers and all.
const BASE: u64 = 0x40_0000;
/// Bytes of the ELF header and its one program header.
const HEADERS: u64 = 64 + 56;

/// What writing code says.
pub type Written = Result<(), iced_x86::IcedError>;

/// System calls (Linux, `arch/x86/entry/syscalls/syscall_64.tbl`).
#[allow(missing_docs, reason = "their names are the kernel's")]
pub mod call {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const CLOSE: u32 = 3;
    pub const SOCKET: u32 = 41;
    pub const CONNECT: u32 = 42;
    pub const ACCEPT: u32 = 43;
    pub const BIND: u32 = 49;
    pub const LISTEN: u32 = 50;
    pub const EXIT: u32 = 60;
}

/// The program that `write` writes.
pub fn assemble(write: impl FnOnce(&mut CodeAssembler) -> Written) -> Vec<u8> {
    let mut code = CodeAssembler::new(64).expect("a valid bitness");
    write(&mut code).expect("valid code");
    let code = code.assemble(BASE + HEADERS).expect("valid code");
    [elf_header(HEADERS + code.len() as u64), code].concat()
}

/// Makes system call `number`.
///
/// # Errors
/// What the assembler says.
pub fn system_call(code: &mut CodeAssembler, number: u32) -> Written {
    code.mov(eax, number)?;
    code.syscall()
}

/// Lines for the guest's shell that make `program` the file `path`.
pub fn install(path: &str, program: &[u8]) -> String {
    let mut hex = String::new();
    program.iter().for_each(|byte| write!(hex, "{byte:02x}").expect("a string takes all"));
    format!("echo {hex} | xxd -r -p >{path}\nchmod 755 {path}\n")
}

/// The headers of a program of `len` bytes whose code follows them (System V ABI, ELF-64).
fn elf_header(len: u64) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| header.extend(bytes);
    // Executable, x86-64, version; entry, program headers, no sections, flags.
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    [BASE + HEADERS, 64, 0].iter().for_each(|field| put(&field.to_le_bytes()));
    put(&[0; 4]);
    // Sizes and counts: this header, one program header, no section headers.
    [64_u16, 56, 1, 64, 0, 0].iter().for_each(|field| put(&field.to_le_bytes()));
    // All of the file, readable and executable.
    put(&[1, 0, 0, 0, 5, 0, 0, 0]);
    [0, BASE, BASE, len, len, 0x1000].iter().for_each(|field: &u64| put(&field.to_le_bytes()));
    header
}
