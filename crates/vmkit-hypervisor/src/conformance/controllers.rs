//! The controllers before the local APIC: the 8259 pair and the IOAPIC.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmkit_device::memory::{Bytes, MemoryRegionAddress};
use vmkit_device::{EventFd, IrqWire};
use vmkit_irqchip::PicChipState;

use super::case::{cases, ensure, ensure_eq};
use super::guest::{CODE2, DATA, Guest, IOAPIC};
use super::interrupts::{apic_on, apic_write, delivered, eoi, pause, paused, to_pause, window};
use super::kicks::kick_when;
use super::recorder::Recorder;
use super::{Failure, asm::asm};
use crate::{Hypervisor, StateSet, VmExit};

cases! { "controllers":
    ioapic_edge "82093AA §3.2.4";
    ioapic_level_comes_again_until_it_is_low "82093AA §3.2.4";
    ioapic_remote_irr "82093AA §3.2.4";
    ioapic_level_that_was_masked "82093AA §3.2.4";
    ioapic_registers "82093AA §3.2";
    a_shared_wire_is_an_or "the contract: IrqWire";
    pic_through_lint0 "Intel SDM vol. 3A §11.5.1, 8259A";
    pic_with_the_apic_off "Intel SDM vol. 3A §11.4.3";
    pic_priorities_and_eoi "8259A, fully nested mode";
    pic_cascade "8259A, cascade mode";
    pic_masks "8259A, OCW1";
    saved_state_has_what_the_guest_wrote "the contract: Partition::save";
    a_level_in_service_moves_to_another_partition "the contract: Partition::save, load";
    a_level_that_was_not_sent_yet_moves_to_another_partition "the contract: Partition::save, load";
    a_storm_of_levels_moves_between_eoi_and_the_next "the contract: Partition::save, load";
    irqfd_pulses_an_input "the contract: InterruptSink::attach_irqfd";
}

const RBX: usize = 3;

/// Masks the PICs and writes a redirection entry: low and high half. Uses R14 and RAX.
pub(super) fn ioapic_route(a: &mut CodeAssembler, pin: i32, low: i32) -> Result<(), IcedError> {
    asm! { a;
        mov al, 0xFF_u32 as i32;
        out 0x21, al;
        out 0xA1, al;
        mov r14d, IOAPIC as u32;
        mov dword_ptr(r14), 0x11 + pin * 2;
        mov dword_ptr(r14 + 0x10), 0;
        mov dword_ptr(r14), 0x10 + pin * 2;
        mov dword_ptr(r14 + 0x10), low;
    };
    Ok(())
}

/// Initialises both PICs: vectors from 0x30 and 0x38, `masks` of the first and second.
pub(super) fn pic_on(a: &mut CodeAssembler, masks: [i32; 2]) -> Result<(), IcedError> {
    let writes = [
        (0x20, 0x11),
        (0xA0, 0x11),
        (0x21, 0x30),
        (0xA1, 0x38),
        (0x21, 4),
        (0xA1, 2),
        (0x21, 1),
        (0xA1, 1),
        (0x21, masks[0]),
        (0xA1, masks[1]),
    ];
    for (port, value) in writes {
        asm! { a; mov eax, value; out port, al; };
    }
    Ok(())
}

fn ioapic_edge(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 4, 0x54)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        for _ in 0..2 {
            eoi(a)?;
            window(a)?;
            pause(a)?;
        }
        Ok(())
    })?;
    guest.interrupts.set_level(4, true);
    delivered(&mut guest, &mut io, 0x54)?;
    to_pause(&mut guest, &mut io)?;
    // Still high after EOI: no new edge.
    to_pause(&mut guest, &mut io)?;
    guest.interrupts.set_level(4, false);
    guest.interrupts.set_level(4, true);
    delivered(&mut guest, &mut io, 0x54)
}

const LEVEL: i32 = 1 << 15;
const MASKED: i32 = 1 << 16;

fn ioapic_level_comes_again_until_it_is_low(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 9, 0x59 | LEVEL)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        for _ in 0..3 {
            eoi(a)?;
            window(a)?;
            pause(a)?;
        }
        Ok(())
    })?;
    guest.interrupts.set_level(9, true);
    delivered(&mut guest, &mut io, 0x59)?;
    to_pause(&mut guest, &mut io)?;
    for _ in 0..2 {
        delivered(&mut guest, &mut io, 0x59)?;
        to_pause(&mut guest, &mut io)?;
    }
    guest.interrupts.set_level(9, false);
    to_pause(&mut guest, &mut io)
}

/// Reads the low half of pin 9's entry into EBX, after [`ioapic_route`].
fn read_entry(a: &mut CodeAssembler) -> Result<(), IcedError> {
    asm! { a; mov dword_ptr(r14), 0x10 + 9 * 2; mov ebx, dword_ptr(r14 + 0x10); };
    Ok(())
}

fn ioapic_remote_irr(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 9, 0x59 | LEVEL)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        read_entry(a)?;
        pause(a)?;
        eoi(a)?;
        read_entry(a)?;
        pause(a)
    })?;
    guest.interrupts.set_level(9, true);
    delivered(&mut guest, &mut io, 0x59)?;
    to_pause(&mut guest, &mut io)?;
    ensure_eq!(guest.cpu.register(RBX)?, 0xC059, "entry while in service");
    guest.interrupts.set_level(9, false);
    to_pause(&mut guest, &mut io)?;
    ensure_eq!(guest.cpu.register(RBX)?, 0x8059, "entry after EOI");
    Ok(())
}

fn ioapic_level_that_was_masked(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 9, 0x59 | LEVEL | MASKED)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        ioapic_route(a, 9, 0x59 | LEVEL)?;
        window(a)?;
        pause(a)
    })?;
    guest.interrupts.set_level(9, true);
    to_pause(&mut guest, &mut io)?;
    delivered(&mut guest, &mut io, 0x59)
}

fn ioapic_registers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov edi, IOAPIC as u32;
            mov dword_ptr(rdi), 1;
            mov ebx, dword_ptr(rdi + 0x10);
            mov dword_ptr(rdi), 0x10;
            mov ecx, dword_ptr(rdi + 0x10);
            mov dword_ptr(rdi), 0x3E;
            mov edx, dword_ptr(rdi + 0x10);
            mov eax, dword_ptr(rdi);
            stop;
        };
        Ok(())
    })?;
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 0x3E, "index register");
    ensure_eq!(guest.cpu.register(RBX)? >> 16 & 0xFF, 23, "highest entry");
    ensure_eq!(guest.cpu.register(1)?, 0x1_0000, "entry 0 after reset");
    ensure_eq!(guest.cpu.register(2)?, 0x1_0000, "entry 23 after reset");
    Ok(())
}

fn a_shared_wire_is_an_or(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 11, 0x5B | LEVEL)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        for _ in 0..2 {
            pause(a)?;
            eoi(a)?;
            window(a)?;
        }
        pause(a)
    })?;
    let wire = IrqWire::new(guest.interrupts.clone(), 11);
    let (first, second) = (wire.line(), wire.line());
    first.set(true);
    second.set(true);
    delivered(&mut guest, &mut io, 0x5B)?;
    to_pause(&mut guest, &mut io)?;
    first.set(false);
    delivered(&mut guest, &mut io, 0x5B)?;
    to_pause(&mut guest, &mut io)?;
    second.set(false);
    to_pause(&mut guest, &mut io)
}

fn pic_through_lint0(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0x350, 0x700)?;
        pic_on(a, [0xEF, 0xFF])?;
        pause(a)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    guest.interrupts.set_level(4, true);
    delivered(&mut guest, &mut io, 0x34)
}

fn pic_with_the_apic_off(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        asm! { a;
            mov ecx, 0x1B;
            rdmsr;
            and eax, 0xFFFF_F7FF_u32 as i32;
            wrmsr;
        };
        pic_on(a, [0xEF, 0xFF])?;
        pause(a)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    guest.interrupts.set_level(4, true);
    delivered(&mut guest, &mut io, 0x34)
}

/// Raises IRQ 3 and `second` and has them served in order of priority.
fn pic_priorities_and_eoi(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0x350, 0x700)?;
        pic_on(a, [0, 0xFF])?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)?;
        for _ in 0..2 {
            asm! { a; mov eax, 0x20; out 0x20, al; };
            window(a)?;
            pause(a)?;
        }
        Ok(())
    })?;
    guest.interrupts.set_level(6, true);
    guest.interrupts.set_level(3, true);
    delivered(&mut guest, &mut io, 0x33)?;
    // IRQ 6 waits until IRQ 3 is served.
    to_pause(&mut guest, &mut io)?;
    delivered(&mut guest, &mut io, 0x36)?;
    to_pause(&mut guest, &mut io)?;
    // Both lines are still high, but made no new edge.
    to_pause(&mut guest, &mut io)
}

fn pic_cascade(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0x350, 0x700)?;
        pic_on(a, [0xFB, 0xEF])?;
        pause(a)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    guest.interrupts.set_level(12, true);
    delivered(&mut guest, &mut io, 0x3C)
}

fn pic_masks(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0x350, 0x700)?;
        pic_on(a, [0xFF, 0xFF])?;
        pause(a)?;
        asm! { a; sti; in_ al, 0x21; mov ebx, eax; };
        window(a)?;
        pause(a)?;
        asm! { a; mov eax, 0xDF; out 0x21, al; };
        window(a)?;
        pause(a)
    })?;
    guest.interrupts.set_level(5, true);
    to_pause(&mut guest, &mut io)?;
    ensure_eq!(guest.cpu.register(RBX)? & 0xFF, 0xFF, "mask register");
    delivered(&mut guest, &mut io, 0x35)
}

fn irqfd_pulses_an_input(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 5, 0x55)?;
        pause(a)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    let fd = EventFd::new(0)?;
    match guest.interrupts.attach_irqfd(&fd, 5) {
        Ok(()) => {
            fd.write(1)?;
            delivered(&mut guest, &mut io, 0x55)
        }
        // The embedder then pulls the wire itself.
        Err(error) => {
            ensure_eq!(error.kind(), std::io::ErrorKind::Unsupported, "refusal");
            Ok(())
        }
    }
}

fn saved_state_has_what_the_guest_wrote(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let (guest, _) = paused(hypervisor, |a| {
        ioapic_route(a, 9, 0x59 | LEVEL)?;
        pic_on(a, [0xA5, 0x5A])?;
        // Channel 0 of the PIT: mode 3, 0x1234.
        for (port, value) in [(0x43, 0x36), (0x40, 0x34), (0x40, 0x12)] {
            asm! { a; mov al, value; out port, al; };
        }
        pause(a)
    })?;
    guest.interrupts.set_level(6, true);
    let state = guest.partition.save()?;
    let (first, second) = (state.pic.primary, state.pic.secondary);
    ensure_eq!((first.imr, second.imr), (0xA5, 0x5A), "masks of the PICs");
    ensure_eq!((first.vector_base, second.vector_base), (0x30, 0x38), "vectors of the PICs");
    // On a slow host the PIT has counted to its end by now.
    ensure_eq!(first.irr & !1, 1 << 6, "requests of the first PIC");
    ensure_eq!(state.ioapic.entries.get(9).copied(), Some(0x8059), "entry 9 of the IOAPIC");
    let channels = state.pit.channels.map(|channel| (channel.mode, channel.count));
    ensure_eq!(channels.first().copied(), Some((3, 0x1234)), "channel 0 of the PIT");
    // What is loaded is what is saved.
    let twin = Guest::long(hypervisor)?;
    twin.partition.load(&state)?;
    let again = twin.partition.save()?;
    let without_ticks = |mut pic: PicChipState| {
        (pic.irr, pic.lines) = (pic.irr & !1, pic.lines & !1);
        pic
    };
    ensure_eq!(
        without_ticks(again.pic.primary),
        without_ticks(state.pic.primary),
        "first PIC of the twin"
    );
    ensure_eq!(again.pic.secondary, state.pic.secondary, "second PIC of the twin");
    ensure_eq!(again.ioapic.entries, state.ioapic.entries, "IOAPIC of the twin");
    Ok(())
}

fn a_level_in_service_moves_to_another_partition(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let program = |a: &mut CodeAssembler| {
        apic_on(a)?;
        ioapic_route(a, 9, 0x59 | LEVEL)?;
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
    };
    let (mut guest, mut io) = paused(hypervisor, program)?;
    guest.interrupts.set_level(9, true);
    delivered(&mut guest, &mut io, 0x59)?;
    to_pause(&mut guest, &mut io)?;
    let (state, chips) = (guest.cpu.get(StateSet::all())?, guest.partition.save()?);
    let mut twin = guest.twin(hypervisor, &state, &chips)?;
    // Its wire is high still, so that EOI makes it come again; then the device lets go.
    delivered(&mut twin, &mut io, 0x59)?;
    to_pause(&mut twin, &mut io)?;
    twin.interrupts.set_level(9, false);
    to_pause(&mut twin, &mut io)
}

fn a_level_that_was_not_sent_yet_moves_to_another_partition(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let (mut guest, mut io) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 9, 0x59 | LEVEL)?;
        pause(a)?;
        a.sti()?;
        window(a)?;
        pause(a)
    })?;
    let (state, mut chips) = (guest.cpu.get(StateSet::all())?, guest.partition.save()?);
    // As saved between the wire's going high and the message.
    chips.ioapic.levels |= 1 << 9;
    let mut twin = guest.twin(hypervisor, &state, &chips)?;
    // Once more: controllers in the host's kernel send as they are loaded, to a local APIC that is there.
    twin.partition.load(&chips)?;
    delivered(&mut twin, &mut io, 0x59)
}

/// How often the storm moves.
const MOVES: u32 = 24;

/// A level that stays high comes again after each EOI. Wherever a kick ends the run, an interrupt is
/// requested or in service if its pin says so; else its EOI was lost on the way.
fn a_storm_of_levels_moves_between_eoi_and_the_next(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let (mut guest, _) = paused(hypervisor, |a| {
        apic_on(a)?;
        ioapic_route(a, 9, 0x59 | LEVEL)?;
        pause(a)?;
        asm! { a; label here; sti; here: jmp here; };
        Ok(())
    })?;
    guest.load_at(CODE2, |a| {
        asm! { a; inc qword_ptr(DATA); };
        eoi(a)?;
        asm! { a; iretq; };
        Ok(())
    })?;
    guest.gate(0x59, CODE2)?;
    guest.interrupts.set_level(9, true);
    for round in 0..MOVES {
        let before = guest.read_u64(DATA)?;
        let ram = guest.ram.clone();
        let kicker = kick_when(guest.cpu.kick(), move || {
            let count = ram.read_obj::<u64>(MemoryRegionAddress(DATA));
            count.is_ok_and(|count| count > before + 2)
        });
        let exit = guest.cpu.run(&mut Recorder::new())?;
        kicker.join().map_err(|_| Failure::Wrong("a kicking thread panicked".into()))?;
        ensure_eq!(exit, VmExit::Kicked, "exit in round {round}");
        let served = guest.read_u64(DATA)? - before;
        ensure!(served > 0, "no interrupt came in round {round}");

        let (state, chips) = (guest.cpu.get(StateSet::all())?, guest.partition.save()?);
        let waits = chips.ioapic.entries.get(9).is_some_and(|entry| entry >> 14 & 1 != 0);
        // Vector 0x59 is bit 25 of the third register of ISR and IRR.
        let has = |at| state.lapic.as_ref().is_some_and(|l| l.registers.get(at) >> 25 & 1 != 0);
        let (serving, asked) = (has(0x120), has(0x220));
        ensure!(!waits || serving || asked, "the EOI of round {round} was lost");

        guest = guest.twin(hypervisor, &state, &chips)?;
    }
    Ok(())
}
