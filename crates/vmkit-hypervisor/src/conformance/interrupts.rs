//! Interrupts at the processor: MSIs, NMIs, priorities, shadows, HLT.

use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmkit_device::Msi;

use super::case::{cases, ensure, ensure_eq};
use super::cpu::End;
use super::guest::{APIC, CODE, CODE2, Guest};
use super::recorder::{Access, Recorder};
use super::{Failure, asm::asm};
use crate::x86::MpState;
use crate::{Hypervisor, StateSet, VmExit};

cases! { "interrupts":
    msi_fixed "Intel SDM vol. 3A §11.11";
    msi_logical "Intel SDM vol. 3A §11.6.2.2, 11.11";
    msi_to_nobody "Intel SDM vol. 3A §11.11";
    an_interrupt_waits_for_if "Intel SDM vol. 3A §6.8.1";
    sti_nop_cli_lets_interrupts_in "Intel SDM vol. 2B, STI";
    popf_lets_interrupts_in "Intel SDM vol. 2B, POPF";
    sti_shadow "Intel SDM vol. 2B, STI";
    sti_hlt_does_not_lose_an_interrupt "Intel SDM vol. 2B, STI";
    the_higher_priority_goes_first "Intel SDM vol. 3A §11.8.3";
    a_higher_priority_interrupts_a_handler "Intel SDM vol. 3A §11.8.3.1";
    tpr_holds_interrupts_back "Intel SDM vol. 3A §11.8.3.1";
    cr8_is_the_task_priority "Intel SDM vol. 3A §11.8.6";
    nmi "Intel SDM vol. 3A §6.7";
    nmis_do_not_nest "Intel SDM vol. 3A §6.7.1";
    hlt_wakes_by_an_interrupt "Intel SDM vol. 2A, HLT";
    hlt_wakes_by_an_nmi_with_interrupts_off "Intel SDM vol. 2A, HLT";
    self_ipi "Intel SDM vol. 3A §11.6.1";
    interrupts_do_not_come_twice "Intel SDM vol. 3A §11.8.4";
}

const RBX: usize = 3;

/// Points R15 at the local APIC and enables it, with spurious vector 0xFF.
pub(super) fn apic_on(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a; mov r15d, APIC as u32; mov dword_ptr(r15 + 0xF0), 0x1FF; };
    Ok(())
}

/// Writes a local APIC register, after [`apic_on`].
pub(super) fn apic_write(a: &mut CodeAssembler, offset: i32, value: i32) -> Result<(), IcedError> {
    a.mov(dword_ptr(r15 + offset), value)
}

pub(super) fn eoi(a: &mut CodeAssembler) -> Result<(), IcedError> {
    apic_write(a, 0xB0, 0)
}

/// Time for an interrupt to come: only after STI and its kin is it known to an instruction when that
/// must be.
pub(super) fn window(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a; label again; push rcx; mov ecx, 10_000; again: dec ecx; jnz again; pop rcx; };
    Ok(())
}

/// Ends the run in the middle of a program: an access to this port.
const PAUSE: u16 = 0x80;

pub(super) fn pause(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(i32::from(PAUSE), al)
}

/// A machine that has run up to its first [`pause`]; further pauses end runs, too.
pub(super) fn paused(
    hypervisor: &dyn Hypervisor,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(Guest, Recorder), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(write)?;
    let mut io = Recorder::new();
    io.stop_always = true;
    to_pause(&mut guest, &mut io)?;
    Ok((guest, io))
}

pub(super) fn to_pause(guest: &mut Guest, io: &mut Recorder) -> Result<(), Failure> {
    let end = guest.cpu.go(io)?;
    let last = io.log.last().copied();
    let paused = matches!(last, Some(Access::Out(PAUSE, ..)));
    ensure!(end == End::Exit(VmExit::Stopped) && paused, "expected a pause, got {end:x?}");
    Ok(())
}

/// The next run ends in the handler of `vector`.
pub(super) fn delivered(guest: &mut Guest, io: &mut Recorder, vector: u64) -> Result<(), Failure> {
    ensure_eq!(guest.cpu.fault(io)?.vector, vector, "vector");
    Ok(())
}

fn msi(vector: u32) -> Msi {
    Msi { address: APIC, data: vector }
}

fn msi_fixed(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    guest.interrupts.signal_msi(msi(0x51));
    delivered(&mut guest, &mut io, 0x51)?;
    // In service, and no longer requested.
    let lapic = guest.cpu.get(StateSet::LAPIC)?.lapic;
    let registers = lapic.map(|l| (l.registers.get(0x120), l.registers.get(0x220)));
    ensure_eq!(registers, Some((1 << 17, 0)), "ISR and IRR of vectors 0x40 to 0x5F");
    Ok(())
}

fn msi_logical(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0xE0, -1)?;
        apic_write(a, 0xD0, 0x0400_0000)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        asm! { a; label here; here: jmp here; };
        Ok(())
    })?;
    // Logical ID 8 is nobody, 4 is ours; the second by lowest priority.
    guest.interrupts.signal_msi(Msi { address: APIC | 0x8004, data: 0x52 });
    to_pause(&mut guest, &mut io)?;
    guest.interrupts.signal_msi(Msi { address: APIC | 0x400C, data: 0x153 });
    delivered(&mut guest, &mut io, 0x53)
}

fn msi_to_nobody(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)
    })?;
    guest.interrupts.signal_msi(Msi { address: APIC | 5 << 12, data: 0x52 });
    // Not even an address of local APICs.
    guest.interrupts.signal_msi(Msi { address: 0xFED0_0000, data: 0x53 });
    to_pause(&mut guest, &mut io)
}

fn an_interrupt_waits_for_if(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        a.nop()?;
        pause(a)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    guest.interrupts.signal_msi(msi(0x51));
    to_pause(&mut guest, &mut io)?;
    delivered(&mut guest, &mut io, 0x51)
}

fn sti_nop_cli_lets_interrupts_in(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        asm! { a; sti; nop; cli; };
        pause(a)
    })?;
    guest.interrupts.signal_msi(msi(0x51));
    delivered(&mut guest, &mut io, 0x51)
}

fn popf_lets_interrupts_in(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        asm! { a; push 0x202; popfq; nop; cli; };
        pause(a)
    })?;
    guest.interrupts.signal_msi(msi(0x51));
    delivered(&mut guest, &mut io, 0x51)
}

fn sti_shadow(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        asm! { a; xor ebx, ebx; };
        pause(a)?;
        asm! { a; sti; inc ebx; inc ebx; inc ebx; };
        pause(a)
    })?;
    guest.interrupts.signal_msi(msi(0x51));
    delivered(&mut guest, &mut io, 0x51)?;
    ensure_eq!(guest.cpu.register(RBX)?, 1, "instructions after STI");
    Ok(())
}

fn sti_hlt_does_not_lose_an_interrupt(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        asm! { a; sti; hlt; };
        pause(a)
    })?;
    let rip = guest.cpu.get(StateSet::GENERAL)?.general.rip;
    guest.interrupts.signal_msi(msi(0x51));
    let fault = guest.cpu.fault(&mut io)?;
    ensure_eq!((fault.vector, fault.rip), (0x51, rip + 2), "vector and RIP after HLT");
    to_pause(&mut guest, &mut io)
}

fn the_higher_priority_goes_first(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        eoi(a)?;
        window(a)?;
        pause(a)?;
        eoi(a)?;
        window(a)?;
        pause(a)
    })?;
    for vector in [0x41, 0x61, 0x51] {
        guest.interrupts.signal_msi(msi(vector));
    }
    for vector in [0x61, 0x51, 0x41] {
        delivered(&mut guest, &mut io, vector)?;
        // The next one waits for the end of this one.
        to_pause(&mut guest, &mut io)?;
    }
    Ok(())
}

fn a_higher_priority_interrupts_a_handler(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        // Still in service of the first, as far as the APIC knows.
        pause(a)?;
        window(a)?;
        pause(a)?;
        window(a)?;
        pause(a)
    })?;
    guest.interrupts.signal_msi(msi(0x51));
    delivered(&mut guest, &mut io, 0x51)?;
    to_pause(&mut guest, &mut io)?;
    // The same class has to wait, a higher one has not.
    guest.interrupts.signal_msi(msi(0x5F));
    to_pause(&mut guest, &mut io)?;
    guest.interrupts.signal_msi(msi(0x61));
    delivered(&mut guest, &mut io, 0x61)?;
    to_pause(&mut guest, &mut io)
}

fn tpr_holds_interrupts_back(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0x80, 0x50)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        apic_write(a, 0x80, 0x40)?;
        window(a)?;
        pause(a)
    })?;
    guest.interrupts.signal_msi(msi(0x51));
    to_pause(&mut guest, &mut io)?;
    delivered(&mut guest, &mut io, 0x51)
}

fn cr8_is_the_task_priority(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        asm! { a; mov eax, 5; mov cr8, rax; mov ebx, dword_ptr(r15 + 0x80); };
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        asm! { a; mov eax, 4; mov cr8, rax; };
        window(a)?;
        pause(a)
    })?;
    ensure_eq!(guest.cpu.register(RBX)?, 0x50, "TPR");
    ensure_eq!(guest.cpu.get(StateSet::CONTROL)?.control.cr8, 5, "CR8");
    guest.interrupts.signal_msi(msi(0x51));
    to_pause(&mut guest, &mut io)?;
    delivered(&mut guest, &mut io, 0x51)
}

const NMI: Msi = Msi { address: APIC, data: 0x400 };

fn nmi(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        a.cli()?;
        pause(a)?;
        a.nop()?;
        pause(a)
    })?;
    guest.interrupts.signal_msi(NMI);
    delivered(&mut guest, &mut io, 2)?;
    to_pause(&mut guest, &mut io)
}

fn nmis_do_not_nest(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    // The handler pauses twice before it returns.
    guest.load_at(CODE2, |a| {
        pause(a)?;
        window(a)?;
        pause(a)?;
        asm! { a; inc ebx; iretq; };
        Ok(())
    })?;
    guest.gate(2, CODE2)?;
    guest.load(|a| {
        apic_on(a)?;
        asm! { a; xor ebx, ebx; };
        pause(a)?;
        window(a)?;
        pause(a)
    })?;
    let mut io = Recorder::new();
    io.stop_always = true;
    let inside = |guest: &mut Guest| -> Result<bool, Failure> {
        Ok(guest.cpu.get(StateSet::GENERAL)?.general.rip >= CODE2)
    };
    to_pause(&mut guest, &mut io)?;
    guest.interrupts.signal_msi(NMI);
    to_pause(&mut guest, &mut io)?;
    ensure!(inside(&mut guest)?, "the first NMI was not delivered");
    guest.interrupts.signal_msi(NMI);
    to_pause(&mut guest, &mut io)?;
    ensure_eq!(guest.cpu.register(RBX)?, 0, "handlers that returned");
    let events = guest.cpu.get(StateSet::EVENTS)?.events;
    ensure_eq!((events.nmi_pending, events.nmi_masked), (true, true), "events");
    to_pause(&mut guest, &mut io)?;
    ensure!(inside(&mut guest)?, "the second NMI was not delivered after IRET");
    ensure_eq!(guest.cpu.register(RBX)?, 1, "handlers that returned");
    to_pause(&mut guest, &mut io)?;
    to_pause(&mut guest, &mut io)?;
    ensure_eq!(guest.cpu.register(RBX)?, 2, "handlers that returned in the end");
    Ok(())
}

fn hlt_wakes_by_an_interrupt(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        asm! { a; label again; again: sti; hlt; };
        pause(a)?;
        eoi(a)?;
        asm! { a; jmp again; };
        Ok(())
    })?;
    for round in 0..5 {
        let interrupts = guest.interrupts.clone();
        let sender = thread::spawn(move || {
            thread::sleep(Duration::from_millis(5 * round));
            interrupts.signal_msi(msi(0x51));
        });
        delivered(&mut guest, &mut io, 0x51)?;
        sender.join().map_err(|_| Failure::Wrong("the sending thread panicked".into()))?;
        ensure_eq!(guest.cpu.get(StateSet::MP)?.mp, MpState::Runnable, "MP state");
        to_pause(&mut guest, &mut io)?;
    }
    Ok(())
}

fn hlt_wakes_by_an_nmi_with_interrupts_off(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        a.cli()?;
        pause(a)?;
        a.hlt()?;
        pause(a)
    })?;
    guest.interrupts.signal_msi(NMI);
    delivered(&mut guest, &mut io, 2)?;
    // One is enough: it was waiting before HLT, or woke it; in the first case HLT is still to come.
    let rip = guest.cpu.get(StateSet::GENERAL)?.general.rip;
    ensure!(rip < CODE, "the handler's RIP is {rip:#x}");
    guest.interrupts.signal_msi(NMI);
    let end = guest.cpu.go(&mut io)?;
    ensure!(
        matches!(end, End::Fault(fault) if fault.vector == 2) || end == End::Exit(VmExit::Stopped),
        "expected an NMI or the program's next pause, got {end:x?}"
    );
    Ok(())
}

fn self_ipi(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        apic_on(a)?;
        // Shorthand self, then physical destination 0.
        apic_write(a, 0x300, 0x4_0061)?;
        asm! { a; sti; nop; cli; };
        eoi(a)?;
        apic_write(a, 0x310, 0)?;
        apic_write(a, 0x300, 0x62)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    let mut io = Recorder::new();
    delivered(&mut guest, &mut io, 0x61)?;
    delivered(&mut guest, &mut io, 0x62)
}

fn interrupts_do_not_come_twice(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        eoi(a)?;
        window(a)?;
        pause(a)
    })?;
    // Requests for a vector that is requested already are one.
    for _ in 0..3 {
        guest.interrupts.signal_msi(msi(0x51));
    }
    delivered(&mut guest, &mut io, 0x51)?;
    to_pause(&mut guest, &mut io)
}
