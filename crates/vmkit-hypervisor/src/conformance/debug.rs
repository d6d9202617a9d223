//! Debug exceptions: single steps, breakpoints, and the debug registers.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::case::{cases, ensure, ensure_eq};
use super::cpu::End;
use super::guest::{CODE, CODE2, DATA, Guest};
use super::recorder::Recorder;
use super::{Failure, asm::asm};
use crate::x86::Cr4;
use crate::{Hypervisor, StateSet};

cases! { "debug":
    single_step "Intel SDM vol. 3B §18.3.1.4";
    single_step_of_jumps_made_before "Intel SDM vol. 3B §18.3.1.4";
    single_step_of_a_rep_stops_at_each_element "Intel SDM vol. 3B §18.3.1.4";
    popf_that_sets_tf_is_not_stepped "Intel SDM vol. 3B §18.3.1.4";
    int1 "Intel SDM vol. 2A, INT1";
    execution_breakpoint "Intel SDM vol. 3B §18.3.1.1";
    execution_breakpoint_resumes_by_rf "Intel SDM vol. 3B §18.3.1.1";
    write_breakpoint "Intel SDM vol. 3B §18.3.1.2";
    write_breakpoint_ignores_reads_and_neighbours "Intel SDM vol. 3B §18.2.5";
    access_breakpoint "Intel SDM vol. 3B §18.3.1.2";
    general_detect "Intel SDM vol. 3B §18.3.1.3";
    dr4_and_dr5 "Intel SDM vol. 3B §18.2.2";
    fixed_bits "Intel SDM vol. 3B §18.2.3, 18.2.4";
    breakpoints_set_by_the_host_are_the_guests "the contract: StateSet::DEBUG";
}

const DB: u64 = 1;
/// DR6: which breakpoint, and the reason bits.
const B0: u64 = 1;
const BD: u64 = 1 << 13;
const BS: u64 = 1 << 14;
/// DR6's causes; the rest is fixed.
const CAUSES: u64 = B0 | 0xE | BD | BS;

fn machine(
    hypervisor: &dyn Hypervisor,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Guest, Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(write)?;
    Ok(guest)
}

/// The next run ends in #DB with RIP at `rip` and `causes` in DR6, which is cleared afterwards.
fn trapped(guest: &mut Guest, rip: u64, causes: u64) -> Result<(), Failure> {
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    let dr6_value = guest.cpu.get(StateSet::DEBUG)?.debug.dr6;
    let got = (fault.vector, fault.rip, dr6_value & CAUSES);
    ensure_eq!(got, (DB, rip, causes), "vector, RIP and DR6");
    guest.cpu.change(StateSet::DEBUG, |state| state.debug.dr6 = 0xFFFF_0FF0)
}

/// Sets breakpoint 0 to `address`, with `control` as its R/W and LEN bits.
fn breakpoint(guest: &mut Guest, address: u64, control: u64) -> Result<(), Failure> {
    guest.cpu.change(StateSet::DEBUG, |state| {
        state.debug.dr[0] = address;
        state.debug.dr7 = 0x400 | 2 | control << 16;
    })
}

const TF: i32 = 0x100;
const RF: u64 = 0x1_0000;

fn single_step(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // push imm32: 5 bytes, popfq: 1, inc ebx: 2, jmp: 2 past two bytes, nop: 1.
    let mut guest = machine(hypervisor, |a| {
        asm! { a;
            label over;
            push TF | 2;
            popfq;
            inc ebx;
            jmp over;
            nop;
            nop;
        over:
            nop;
            mov eax, 7;
            stop;
        };
        Ok(())
    })?;
    for offset in [8, 12, 13] {
        trapped(&mut guest, CODE + offset, BS)?;
    }
    // Cleared in the saved flags, the next instructions run through.
    let frame = guest.cpu.get(StateSet::GENERAL)?.general.rsp() + 4 * 8;
    let flags = guest.read_u64(frame)?;
    ensure!(flags & TF as u64 != 0, "saved flags are {flags:#x}");
    guest.write_u64(frame, flags & !(TF as u64))?;
    ensure_eq!(guest.cpu.go(&mut Recorder::new())?, End::Stop(7), "the end");
    Ok(())
}

fn single_step_of_jumps_made_before(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // A call, a return and a jump by registers, three times, the last time stepped.
    let mut guest = machine(hypervisor, |a| {
        asm! { a;
            label again, plain;
            mov edi, CODE2 as u32;
            mov esi, (CODE2 + 0x100) as u32;
            xor ecx, ecx;
        again:
            mov edx, 2;
            cmp ecx, 2;
            jb plain;
            mov edx, TF | 2;
        plain:
            push rdx;
            popfq;
            call rdi;
            mov ebx, CODE as u32;
            jmp rsi;
        };
        Ok(())
    })?;
    guest.load_at(CODE2, |a| a.ret())?;
    // `again` is after 5 + 5 + 2 bytes.
    guest.load_at(CODE2 + 0x100, |a| {
        asm! { a; add rbx, 12; inc ecx; jmp rbx; };
        Ok(())
    })?;
    // The call is of 2 bytes after 5 + 3 + 2 + 5 + 1 + 1 more, the move of 5.
    let call = CODE + 29;
    for rip in [CODE2, call + 2, call + 7, CODE2 + 0x100, CODE2 + 0x104, CODE2 + 0x106, CODE + 12] {
        trapped(&mut guest, rip, BS)?;
    }
    Ok(())
}

fn single_step_of_a_rep_stops_at_each_element(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a;
            mov edi, DATA as u32;
            mov ecx, 3;
            cld;
            push TF | 2;
            popfq;
            [rep] stosb;
            nop;
        };
        Ok(())
    })?;
    let start = CODE + 5 + 5 + 1 + 5 + 1;
    for left in [2, 1] {
        trapped(&mut guest, start, BS)?;
        ensure_eq!(guest.cpu.register(1)?, left, "RCX");
    }
    trapped(&mut guest, start + 2, BS)?;
    ensure_eq!(guest.cpu.register(1)?, 0, "RCX");
    Ok(())
}

fn popf_that_sets_tf_is_not_stepped(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // But one that clears it is.
    let mut guest = machine(hypervisor, |a| {
        asm! { a; push 2; push TF | 2; popfq; popfq; mov eax, 1; stop; };
        Ok(())
    })?;
    trapped(&mut guest, CODE + 2 + 5 + 1 + 1, BS)?;
    ensure_eq!(guest.cpu.go(&mut Recorder::new())?, End::Stop(1), "the end");
    Ok(())
}

fn int1(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a; nop; int1; };
        Ok(())
    })?;
    trapped(&mut guest, CODE + 2, 0)
}

fn execution_breakpoint(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a; inc ebx; inc ebx; inc ebx; };
        Ok(())
    })?;
    breakpoint(&mut guest, CODE + 2, 0)?;
    guest.cpu.change(StateSet::GENERAL, |state| state.general.set_rbx(0))?;
    trapped(&mut guest, CODE + 2, B0)?;
    ensure_eq!(guest.cpu.register(3)?, 1, "RBX: a fault comes before the instruction");
    Ok(())
}

fn execution_breakpoint_resumes_by_rf(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a;
            label again;
            xor ebx, ebx;
        again:
            inc ebx;
            cmp ebx, 3;
            jb again;
            mov eax, ebx;
            stop;
        };
        Ok(())
    })?;
    breakpoint(&mut guest, CODE + 2, 0)?;
    // An instruction breakpoint saves RF as 0; a handler that sets it lets the instruction run, once.
    for count in 0..3 {
        trapped(&mut guest, CODE + 2, B0)?;
        ensure_eq!(guest.cpu.register(3)?, count, "RBX");
        let frame = guest.cpu.get(StateSet::GENERAL)?.general.rsp() + 4 * 8;
        let flags = guest.read_u64(frame)?;
        ensure_eq!(flags & RF, 0, "saved RF");
        guest.write_u64(frame, flags | RF)?;
    }
    ensure_eq!(guest.cpu.go(&mut Recorder::new())?, End::Stop(3), "the end");
    Ok(())
}

fn write_breakpoint(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // mov edi: 5 bytes; mov byte [rdi], imm: 3.
    let mut guest = machine(hypervisor, |a| {
        asm! { a; mov edi, DATA as u32; mov byte_ptr(rdi), 5; nop; mov eax, 2; stop; };
        Ok(())
    })?;
    breakpoint(&mut guest, DATA, 1)?;
    trapped(&mut guest, CODE + 8, B0)?;
    ensure_eq!(guest.read::<1>(DATA)?, [5], "memory: a trap comes after the instruction");
    ensure_eq!(guest.cpu.go(&mut Recorder::new())?, End::Stop(2), "the end");
    Ok(())
}

fn write_breakpoint_ignores_reads_and_neighbours(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a;
            mov edi, DATA as u32;
            mov eax, dword_ptr(rdi);
            mov byte_ptr(rdi + 4), 1;
            mov byte_ptr(rdi - 1), 1;
            mov word_ptr(rdi + 3), 1;
        };
        Ok(())
    })?;
    // Four bytes at DATA.
    breakpoint(&mut guest, DATA, 0b1101)?;
    trapped(&mut guest, CODE + 5 + 2 + 4 + 4 + 6, B0)
}

fn access_breakpoint(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a; mov edi, DATA as u32; mov eax, dword_ptr(rdi); mov dword_ptr(rdi + 2), eax; nop; };
        Ok(())
    })?;
    breakpoint(&mut guest, DATA + 2, 0b0111)?;
    trapped(&mut guest, CODE + 7, B0)?;
    trapped(&mut guest, CODE + 10, B0)
}

fn general_detect(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a; nop; mov rax, dr0; mov eax, 1; stop; };
        Ok(())
    })?;
    guest.cpu.change(StateSet::DEBUG, |state| state.debug.dr7 = 0x400 | 1 << 13)?;
    trapped(&mut guest, CODE + 1, BD)?;
    // The handler runs with GD off.
    let control = guest.cpu.get(StateSet::DEBUG)?.debug.dr7;
    ensure_eq!(control, 0x400, "DR7 in the handler");
    ensure_eq!(guest.cpu.go(&mut Recorder::new())?, End::Stop(1), "the end");
    Ok(())
}

fn dr4_and_dr5(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    // mov dr4, rax: an alias of DR6 unless CR4.DE is set.
    let to_dr4 = [0x0F, 0x23, 0xE0];
    let mut guest = machine(hypervisor, |a| {
        asm! { a; mov eax, 0xFFFF_0FF1_u32; };
        a.db(&to_dr4)?;
        asm! { a; mov rax, dr6; stop; };
        Ok(())
    })?;
    let value = guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(value, 0xFFFF_0FF1, "DR6 after a write to DR4");
    guest.load(|a| a.db(&to_dr4))?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.cr4 |= Cr4::DE.bits())?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!(fault.vector, 6, "vector with CR4.DE");
    Ok(())
}

fn fixed_bits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a;
            xor eax, eax;
            mov dr6, rax;
            mov dr7, rax;
            mov rbx, dr6;
            mov rcx, dr7;
            stop;
        };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(guest.cpu.register(3)?, 0xFFFF_0FF0, "DR6 after a write of 0");
    ensure_eq!(guest.cpu.register(1)?, 0x400, "DR7 after a write of 0");
    guest.load_at(CODE2, |a| a.mov(dr7, rax))?;
    guest.load(|a| {
        asm! { a; mov rax, 0x1_0000_0000_u64; jmp CODE2; };
        Ok(())
    })?;
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!((fault.vector, fault.error), (13, 0), "a write above bit 31");
    Ok(())
}

fn breakpoints_set_by_the_host_are_the_guests(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = machine(hypervisor, |a| {
        asm! { a; mov rbx, dr0; mov rcx, dr7; stop; };
        Ok(())
    })?;
    breakpoint(&mut guest, DATA, 1)?;
    guest.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(guest.cpu.register(3)?, DATA, "DR0");
    ensure_eq!(guest.cpu.register(1)?, 0x1_0402, "DR7");
    Ok(())
}
