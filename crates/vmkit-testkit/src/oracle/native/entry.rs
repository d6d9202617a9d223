//! The way into the instruction under test and back, in assembly.
//!
//! [`run`] saves the host's stack pointer, loads every register from [`ENTRY`] (extended state by
//! XRSTOR, FS and GS bases, RFLAGS by POPF, then the general registers) and jumps to the instruction.
//! The instruction, or the INT3 that follows it, raises an exception; the kernel turns it into a
//! signal on the alternate stack and saves all registers in the signal frame. [`on_signal`] puts FS
//! and GS back, and does not return to the kernel: it takes the saved stack pointer and returns from
//! [`run`], which therefore costs one exception and one signal delivery, no system call.
//!
//! Nothing between the two may touch memory of the host but [`ENTRY`]: FS and GS bases, the stack
//! pointer and the direction and alignment flags belong to the case meanwhile.

#![allow(unsafe_code, reason = "the processor's whole register file is replaced here")]

use std::arch::naked_asm;
use std::mem::offset_of;

use super::super::case::{Fpu, Selectors};

/// What [`run`] loads and what [`on_signal`] notes.
#[repr(C, align(64))]
pub(super) struct Entry {
    pub fpu: Fpu,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    /// Where the kernel's signal frame lies.
    pub context: u64,
    pub selectors: Selectors,
    /// 1 from [`run`]'s first instruction to [`on_signal`].
    inside: u64,
    host_rsp: u64,
    host_fs: u64,
    host_gs: u64,
}

/// One per process: workers are single-threaded processes.
pub(super) static mut ENTRY: Entry = Entry {
    fpu: Fpu([0; 832]),
    gpr: [0; 16],
    rip: 0,
    rflags: 0,
    fs_base: 0,
    gs_base: 0,
    context: 0,
    selectors: Selectors { cs: 0, ss: 0, ds: 0, es: 0, fs: 0, gs: 0 },
    inside: 0,
    host_rsp: 0,
    host_fs: 0,
    host_gs: 0,
};

/// Exit status of a worker whose own code raised an exception.
const WORKER_BROKEN: u32 = 70;

/// Runs the case in [`ENTRY`] and returns when its exception has been delivered.
///
/// # Safety
/// [`on_signal`] must be the handler of every synchronous signal, on an alternate stack, with all
/// others blocked; the processor and kernel must have XSAVE and FSGSBASE; `ENTRY.fpu` must be valid
/// for XRSTOR; what the instruction at `ENTRY.rip` does must be bearable.
// SAFETY: saves and gives back what the System V ABI has a function preserve; the rest is the caller's, above.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn run() {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {entry} + {host_rsp}], rsp",
        "rdfsbase rax",
        "mov [rip + {entry} + {host_fs}], rax",
        "rdgsbase rax",
        "mov [rip + {entry} + {host_gs}], rax",
        "mov qword ptr [rip + {entry} + {inside}], 1",
        "mov eax, 7",
        "xor edx, edx",
        "xrstor64 [rip + {entry} + {fpu}]",
        "mov rax, [rip + {entry} + {fs_base}]",
        "wrfsbase rax",
        "mov rax, [rip + {entry} + {gs_base}]",
        "wrgsbase rax",
        "push qword ptr [rip + {entry} + {rflags}]",
        "popfq",
        "mov rax, [rip + {entry} + {gpr} + 8 * 0]",
        "mov rcx, [rip + {entry} + {gpr} + 8 * 1]",
        "mov rdx, [rip + {entry} + {gpr} + 8 * 2]",
        "mov rbx, [rip + {entry} + {gpr} + 8 * 3]",
        "mov rbp, [rip + {entry} + {gpr} + 8 * 5]",
        "mov rsi, [rip + {entry} + {gpr} + 8 * 6]",
        "mov rdi, [rip + {entry} + {gpr} + 8 * 7]",
        "mov r8, [rip + {entry} + {gpr} + 8 * 8]",
        "mov r9, [rip + {entry} + {gpr} + 8 * 9]",
        "mov r10, [rip + {entry} + {gpr} + 8 * 10]",
        "mov r11, [rip + {entry} + {gpr} + 8 * 11]",
        "mov r12, [rip + {entry} + {gpr} + 8 * 12]",
        "mov r13, [rip + {entry} + {gpr} + 8 * 13]",
        "mov r14, [rip + {entry} + {gpr} + 8 * 14]",
        "mov r15, [rip + {entry} + {gpr} + 8 * 15]",
        "mov rsp, [rip + {entry} + {gpr} + 8 * 4]",
        "jmp qword ptr [rip + {entry} + {rip_}]",
        entry = sym ENTRY,
        fpu = const offset_of!(Entry, fpu),
        gpr = const offset_of!(Entry, gpr),
        rip_ = const offset_of!(Entry, rip),
        rflags = const offset_of!(Entry, rflags),
        fs_base = const offset_of!(Entry, fs_base),
        gs_base = const offset_of!(Entry, gs_base),
        inside = const offset_of!(Entry, inside),
        host_rsp = const offset_of!(Entry, host_rsp),
        host_fs = const offset_of!(Entry, host_fs),
        host_gs = const offset_of!(Entry, host_gs),
    )
}

/// The signal handler. The kernel calls it with the frame's address in RDX.
///
/// The kernel has cleared DF and TF and reset the extended state; AC and NT are still the case's, and
/// so are DS, ES, FS and GS with their bases. If no case is inside, the worker itself is broken and
/// leaves by exit_group.
///
/// # Safety
/// For the kernel alone, as a handler on the alternate stack.
// SAFETY: keeps to the kernel's calling convention of handlers, and never returns to compiled code.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn on_signal() {
    naked_asm!(
        "pushfq",
        // AC (bit 18) and NT (bit 14) off.
        "and qword ptr [rsp], -0x44001",
        "popfq",
        "cmp qword ptr [rip + {entry} + {inside}], 1",
        "jne 3f",
        "rdfsbase rax",
        "mov [rip + {entry} + {fs_base}], rax",
        "rdgsbase rax",
        "mov [rip + {entry} + {gs_base}], rax",
        "mov eax, ds",
        "mov [rip + {entry} + {selectors} + {ds}], ax",
        "mov ecx, es",
        "mov [rip + {entry} + {selectors} + {es}], cx",
        "or eax, ecx",
        "mov ecx, fs",
        "mov [rip + {entry} + {selectors} + {fs}], cx",
        "or eax, ecx",
        "mov ecx, gs",
        "mov [rip + {entry} + {selectors} + {gs}], cx",
        "or eax, ecx",
        "jz 2f",
        "xor eax, eax",
        "mov ds, eax",
        "mov es, eax",
        "mov fs, eax",
        "mov gs, eax",
        "2:",
        "mov rax, [rip + {entry} + {host_fs}]",
        "wrfsbase rax",
        "mov rax, [rip + {entry} + {host_gs}]",
        "wrgsbase rax",
        "mov [rip + {entry} + {context}], rdx",
        "mov qword ptr [rip + {entry} + {inside}], 0",
        "mov rsp, [rip + {entry} + {host_rsp}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        "3:",
        "mov eax, {exit_group}",
        "mov edi, {broken}",
        "syscall",
        "ud2",
        entry = sym ENTRY,
        fs_base = const offset_of!(Entry, fs_base),
        gs_base = const offset_of!(Entry, gs_base),
        context = const offset_of!(Entry, context),
        selectors = const offset_of!(Entry, selectors),
        ds = const offset_of!(Selectors, ds),
        es = const offset_of!(Selectors, es),
        fs = const offset_of!(Selectors, fs),
        gs = const offset_of!(Selectors, gs),
        inside = const offset_of!(Entry, inside),
        host_rsp = const offset_of!(Entry, host_rsp),
        host_fs = const offset_of!(Entry, host_fs),
        host_gs = const offset_of!(Entry, host_gs),
        exit_group = const libc::SYS_exit_group,
        broken = const WORKER_BROKEN,
    )
}
