//! Guests of a few instructions, in real mode and long mode.

#![allow(clippy::expect_used, clippy::missing_panics_doc, reason = "the guests are constants")]

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, ax, dword_ptr, dx, eax, ecx, edx, qword_ptr, rax, rdi,
};
use vmkit::boot::{CpuMode, Flat};

/// Where the guests are loaded.
pub const BASE: u64 = 0x8000;
/// Where [`counting`] counts.
pub const COUNTER: u64 = 0x10_0000;

/// The code that `write` assembles, to be entered in long mode.
pub fn long_mode(write: impl FnOnce(&mut CodeAssembler)) -> Flat {
    assemble(64, CpuMode::Long64, write)
}

/// The code that `write` assembles, to be entered in real mode.
pub fn real_mode(write: impl FnOnce(&mut CodeAssembler)) -> Flat {
    assemble(16, CpuMode::Real16, write)
}

fn assemble(bits: u32, mode: CpuMode, write: impl FnOnce(&mut CodeAssembler)) -> Flat {
    let mut code = CodeAssembler::new(bits).expect("a valid bitness");
    write(&mut code);
    Flat::at(BASE, code.assemble(BASE).expect("valid code")).mode(mode)
}

fn label_here(code: &mut CodeAssembler) -> CodeLabel {
    let mut label = code.create_label();
    code.set_label(&mut label).expect("a fresh label");
    label
}

/// Writes `value` of 8 bits to `port`.
pub fn out8(code: &mut CodeAssembler, port: u16, value: u8) {
    code.mov(dx, u32::from(port)).expect("valid");
    code.mov(al, u32::from(value)).expect("valid");
    code.out(dx, al).expect("valid");
}

/// Writes `value` of 16 bits to `port`.
pub fn out16(code: &mut CodeAssembler, port: u16, value: u16) {
    code.mov(dx, u32::from(port)).expect("valid");
    code.mov(ax, u32::from(value)).expect("valid");
    code.out(dx, ax).expect("valid");
}

/// CLI, then HLT for ever.
pub fn halt(code: &mut CodeAssembler) {
    code.cli().expect("valid");
    let again = label_here(code);
    code.hlt().expect("valid");
    code.jmp(again).expect("valid");
}

/// A loop without end.
pub fn spin(code: &mut CodeAssembler) {
    let again = label_here(code);
    code.jmp(again).expect("valid");
}

/// A UD2 without an interrupt table.
pub fn triple_fault(code: &mut CodeAssembler) {
    // A table of no bytes: ten zeros on the stack.
    code.xor(eax, eax).expect("valid");
    code.push(rax).expect("valid");
    code.push(rax).expect("valid");
    code.mov(rdi, iced_x86::code_asm::rsp).expect("valid");
    code.lidt(iced_x86::code_asm::tbyte_ptr(rdi)).expect("valid");
    code.ud2().expect("valid");
}

/// Counts in memory at [`COUNTER`] for ever.
pub fn counting(code: &mut CodeAssembler) {
    code.mov(rdi, COUNTER).expect("valid");
    let again = label_here(code);
    code.inc(qword_ptr(rdi)).expect("valid");
    code.jmp(again).expect("valid");
}

/// Where [`counting_by_kvmclock`] has KVM write the time.
pub const KVMCLOCK: u64 = 0x10_0040;

/// Turns kvmclock on, for [`KVMCLOCK`], and counts as [`counting`] does.
pub fn counting_by_kvmclock(code: &mut CodeAssembler) {
    // MSR_KVM_SYSTEM_TIME_NEW, and its bit that says so.
    code.mov(ecx, 0x4B56_4D01).expect("valid");
    code.mov(eax, KVMCLOCK as i32 | 1).expect("valid");
    code.xor(edx, edx).expect("valid");
    code.wrmsr().expect("valid");
    counting(code);
}

/// Writes `text` to the first serial port.
pub fn say(code: &mut CodeAssembler, text: &str) {
    for byte in text.bytes() {
        out8(code, 0x3F8, byte);
    }
}

/// Writes 0, 1, 2 and so on to the first serial port, 255 before 0, for ever.
pub fn print(code: &mut CodeAssembler) {
    code.mov(dx, 0x3F8_u32).expect("valid");
    code.xor(eax, eax).expect("valid");
    let again = label_here(code);
    code.out(dx, al).expect("valid");
    code.inc(al).expect("valid");
    code.jmp(again).expect("valid");
}

/// Reads `port` (32 bits) and writes what came to `0x10_0000`.
pub fn read_port_to_memory(code: &mut CodeAssembler, port: u16) {
    code.mov(edx, u32::from(port)).expect("valid");
    code.in_(eax, dx).expect("valid");
    code.mov(rdi, COUNTER).expect("valid");
    code.mov(dword_ptr(rdi), eax).expect("valid");
}
