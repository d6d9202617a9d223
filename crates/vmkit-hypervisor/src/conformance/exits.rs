//! What the vCPU's state shows when a run has ended, and how runs end.

use iced_x86::code_asm::*;
use vmkit_device::IoFlow;

use super::case::{cases, ensure, ensure_eq};
use super::cpu::End;
use super::guest::{CODE, DATA, Guest, MMIO, STOP_PORT};
use super::recorder::{Access, Recorder};
use super::runner::allocations;
use super::{Failure, Need, asm::asm};
use crate::x86::DescriptorTable;
use crate::{Hypervisor, StateSet, VcpuIo, VmExit};

cases! { "exits":
    state_is_exact_after_each_stop "the contract: when run returns, no instruction is half done";
    a_stop_inside_a_string_instruction_counts_exactly "the contract: state is exact after a stop";
    a_read_modify_write_is_whole_after_a_stop "the contract: no instruction is half done";
    an_exit_allocates_nothing "the contract: the exit path allocates nothing"
        [Need::AllocationCounter];
    registers_can_be_changed_between_runs "the contract: set, then run";
    a_triple_fault_is_a_shutdown "Intel SDM vol. 3A §6.15, interrupt 8";
    a_vcpu_can_start_anew_after_a_shutdown "the contract: set, then run";
    a_hlt_that_nothing_can_end_is_reported "the contract: HaltedForGood" [Need::DeadHalt];
    instructions_are_counted_exactly "the contract: Vcpu::instructions" [Need::InstructionCount];
}

const RAX: usize = 0;

fn state_is_exact_after_each_stop(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    // Offsets of the instructions after each access, and RAX there.
    guest.load(|a| {
        asm! { a;
            mov edi, MMIO as u32;
            mov eax, 1;
            out 0x80, al;
            inc eax;
            in_ al, 0x81;
            inc eax;
            mov dword_ptr(rdi), eax;
            inc eax;
            mov rax, qword_ptr(rdi);
            inc rax;
            add dword_ptr(rdi), eax;
            inc eax;
            push qword_ptr(rdi);
            pop rax;
            inc rax;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([0x40, 0x1111_2222_3333_4444, 5, 0x77]);
    io.stop_always = true;
    // mov edi, mov eax: 5 bytes each; out: 2. inc eax 2, in 2. inc 2, mov [rdi] 2. inc 2,
    // mov rax 3. inc rax 3, add 2. inc 2, push 2.
    let want = [
        (12, 1),
        (16, 0x40),
        (20, 0x41),
        (25, 0x1111_2222_3333_4444),
        (30, 0x1111_2222_3333_4445),
        (34, 0x3333_4446),
    ];
    for (offset, value) in want {
        let exit = guest.cpu.run(&mut io)?;
        ensure_eq!(exit, VmExit::Stopped, "exit before +{offset}");
        let general = guest.cpu.get(StateSet::GENERAL)?.general;
        ensure_eq!((general.rip - CODE, general.rax()), (offset, value), "RIP and RAX");
    }
    ensure_eq!(guest.cpu.finish(&mut io)?, 0x78, "what POP and INC leave");
    let accesses = [
        Access::Out(0x80, 1, 1),
        Access::In(0x81, 1),
        Access::Write(MMIO, 4, 0x41),
        Access::Read(MMIO, 8),
        Access::Read(MMIO, 4),
        Access::Write(MMIO, 4, 0x3333_444A),
        Access::Read(MMIO, 8),
    ];
    ensure_eq!(io.log, accesses, "accesses");
    Ok(())
}

fn a_stop_inside_a_string_instruction_counts_exactly(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.write(DATA, &(1..=50).collect::<Vec<u8>>())?;
    guest.load(|a| {
        asm! { a;
            mov esi, DATA as u32;
            mov ecx, 50;
            mov edx, 0x3F8;
            cld;
            [rep] outsb;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::new();
    io.stop_always = true;
    loop {
        let end = guest.cpu.go(&mut io)?;
        let general = guest.cpu.get(StateSet::GENERAL)?.general;
        let sent = io.log.len() as u64;
        ensure_eq!((general.rsi(), general.rcx()), (DATA + sent, 50 - sent), "after {sent}");
        match end {
            End::Exit(VmExit::Stopped) => ensure!(sent <= 50, "too many elements"),
            other => {
                ensure!(matches!(other, End::Stop(_)) && sent == 50, "{other:x?} after {sent}");
                return Ok(());
            }
        }
    }
}

fn a_read_modify_write_is_whole_after_a_stop(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov edi, MMIO as u32;
            mov eax, 3;
            [lock] xadd dword_ptr(rdi), eax;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([0x100]);
    io.stop_always = true;
    ensure_eq!(guest.cpu.run(&mut io)?, VmExit::Stopped, "exit");
    let want = [Access::Read(MMIO, 4), Access::Write(MMIO, 4, 0x103)];
    ensure_eq!(io.log, want, "accesses before the run returned");
    ensure_eq!(guest.cpu.register(RAX)?, 0x100, "EAX");
    guest.cpu.finish(&mut io)?;
    ensure_eq!(io.log.len(), 2, "accesses in all");
    Ok(())
}

/// Answers, and stops at the stop port; remembers nothing.
struct Bare;

impl VcpuIo for Bare {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        IoFlow::Continue
    }
    fn pio_write(&mut self, port: u16, _: &[u8]) -> IoFlow {
        if u32::from(port) == STOP_PORT { IoFlow::Stop } else { IoFlow::Continue }
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

fn an_exit_allocates_nothing(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            label again;
            mov edi, MMIO as u32;
            mov edx, 0x3F8;
            cld;
        again:
            out 0x80, al;
            in_ eax, 0x81;
            mov qword_ptr(rdi), rax;
            mov ebx, dword_ptr(rdi + 8);
            add dword_ptr(rdi), ebx;
            mov esi, DATA as u32;
            mov ecx, 4;
            [rep] outsb;
            stop;
            jmp again;
        };
        Ok(())
    })?;
    // The first time around may decode, map and fill caches.
    for _ in 0..100 {
        guest.cpu.run(&mut Bare)?;
    }
    let before = allocations();
    for _ in 0..1000 {
        guest.cpu.run(&mut Bare)?;
    }
    let made = allocations().zip(before).map(|(after, before)| after - before);
    ensure_eq!(made, Some(0), "allocations in 1000 runs of ten exits each");
    Ok(())
}

fn registers_can_be_changed_between_runs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            label again;
        again:
            in_ eax, 0x80;
            out 0x81, eax;
            jmp again;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([1, 2, 3]);
    io.stop_always = true;
    for value in [0x10, 0x20, 0x30] {
        guest.cpu.run(&mut io)?;
        guest.cpu.change(StateSet::GENERAL, |state| state.general.set_rax(value))?;
        guest.cpu.run(&mut io)?;
    }
    ensure_eq!(io.written(0x81), [0x10, 0x20, 0x30], "what the guest wrote");
    Ok(())
}

fn shut_down(hypervisor: &dyn Hypervisor) -> Result<Guest, Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; mov ebx, 0x1234; ud2; };
        Ok(())
    })?;
    guest.cpu.change(StateSet::SEGMENTS, |state| {
        state.segments.idt = DescriptorTable { base: 0, limit: 0 };
    })?;
    let exit = guest.cpu.run(&mut Recorder::new())?;
    ensure_eq!(exit, VmExit::Shutdown, "exit");
    Ok(guest)
}

fn a_triple_fault_is_a_shutdown(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    shut_down(hypervisor).map(drop)
}

/// What the state is after a shutdown, AMD's processors do not say (AMD APM vol. 2 §15.14.3).
fn a_vcpu_can_start_anew_after_a_shutdown(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = shut_down(hypervisor)?;
    guest.cpu.get(StateSet::all())?;
    guest.load(|a| {
        asm! { a; mov eax, 7; stop; };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 7, "the next program's end");
    Ok(())
}

fn a_hlt_that_nothing_can_end_is_reported(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; cli; hlt; stop; };
        Ok(())
    })?;
    let exit = guest.cpu.run(&mut Recorder::new())?;
    ensure_eq!(exit, VmExit::HaltedForGood, "exit");
    ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general.rip, CODE + 2, "RIP is after HLT");
    Ok(())
}

fn instructions_are_counted_exactly(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            label again;
            mov ecx, 1000;
        again:
            dec ecx;
            jnz again;
            stop;
        };
        Ok(())
    })?;
    let before = guest.cpu.instructions();
    guest.cpu.finish(&mut Recorder::new())?;
    let counted = guest.cpu.instructions().zip(before).map(|(after, before)| after - before);
    ensure_eq!(counted, Some(2002), "instructions: mov, 1000 times dec and jnz, out");
    Ok(())
}
