//! The local APIC's registers, and its modes: xAPIC, x2APIC, off.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::case::{cases, ensure, ensure_eq};
use super::cpu::End;
use super::guest::{APIC, Guest};
use super::interrupts::{apic_on, apic_write};
use super::recorder::Recorder;
use super::{Failure, Need, asm::asm};
use crate::{Feature, Hypervisor, StateSet};

cases! { "apic":
    registers_after_reset "Intel SDM vol. 3A §11.4.7.1";
    software_disable_masks_the_vectors "Intel SDM vol. 3A §11.4.7.2";
    processor_priority "Intel SDM vol. 3A §11.8.3.1";
    off_and_on_again_is_as_after_reset "Intel SDM vol. 3A §11.4.3";
    apic_base_reserved_bits "Intel SDM vol. 3A §11.4.4";
    x2apic_registers "Intel SDM vol. 3A §11.12.1" [Need::Feature(Feature::X2apic)];
    x2apic_interrupts "Intel SDM vol. 3A §11.12.1, 11.12.11" [Need::Feature(Feature::X2apic)];
    x2apic_reserved_registers "Intel SDM vol. 3A §11.12.1.2" [Need::Feature(Feature::X2apic)];
    x2apic_eoi_takes_zero_only "Intel SDM vol. 3A §11.12.1.2" [Need::Feature(Feature::X2apic)];
    x2apic_transitions "Intel SDM vol. 3A §11.12.5" [Need::Feature(Feature::X2apic)];
    x2apic_state "the contract: LapicState" [Need::Feature(Feature::X2apic)];
    xapic_has_no_msrs "Intel SDM vol. 3A §11.12.1.2" [Need::Feature(Feature::X2apic)];
}

const BASE_MSR: u32 = 0x1B;
const ENABLED: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
const BOOT: u64 = 1 << 8;

fn run(
    hypervisor: &dyn Hypervisor,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Guest, Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        write(a)?;
        asm! { a; stop; };
        Ok(())
    })?;
    guest.cpu.finish(&mut Recorder::new())?;
    Ok(guest)
}

/// EBX, ECX, EDX, ESI, EDI.
fn seen(guest: &mut Guest) -> Result<[u64; 5], Failure> {
    let general = guest.cpu.get(StateSet::GENERAL)?.general;
    let [_, ecx_, edx_, ebx_, _, _, esi_, edi_, ..] = general.gpr;
    Ok([ebx_, ecx_, edx_, esi_, edi_])
}

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    asm! { a;
        mov ecx, index;
        mov eax, value as u32;
        mov edx, (value >> 32) as u32;
        wrmsr;
    };
    Ok(())
}

fn registers_after_reset(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = run(hypervisor, |a| {
        asm! { a;
            mov r15d, APIC as u32;
            mov ebx, dword_ptr(r15 + 0x20);
            mov ecx, dword_ptr(r15 + 0x30);
            mov edx, dword_ptr(r15 + 0xE0);
            mov esi, dword_ptr(r15 + 0xF0);
            mov edi, dword_ptr(r15 + 0x320);
        };
        Ok(())
    })?;
    let [id, version, format, spurious, timer] = seen(&mut guest)?;
    ensure_eq!(id, 0, "ID");
    ensure!((0x10..=0x15).contains(&(version & 0xFF)), "version register is {version:#x}");
    ensure!(version >> 16 & 0xFF >= 3, "local vectors: version register is {version:#x}");
    ensure_eq!(format, 0xFFFF_FFFF, "destination format");
    ensure_eq!(spurious, 0xFF, "spurious-interrupt vector");
    ensure_eq!(timer, 0x1_0000, "timer's local vector");
    Ok(())
}

fn software_disable_masks_the_vectors(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = run(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0x320, 0x45)?;
        a.mov(ebx, dword_ptr(r15 + 0x320))?;
        apic_write(a, 0xF0, 0xFF)?;
        a.mov(ecx, dword_ptr(r15 + 0x320))?;
        // While off, a vector cannot be unmasked.
        apic_write(a, 0x320, 0x46)?;
        a.mov(edx, dword_ptr(r15 + 0x320))
    })?;
    let [on, off, written, ..] = seen(&mut guest)?;
    ensure_eq!((on, off, written), (0x45, 0x1_0045, 0x1_0046), "the timer's vector");
    Ok(())
}

fn processor_priority(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        apic_on(a)?;
        apic_write(a, 0x80, 0x30)?;
        a.mov(ebx, dword_ptr(r15 + 0xA0))?;
        asm! { a; label here; sti; };
        apic_write(a, 0x300, 0x4_0061)?;
        asm! { a; here: cmp eax, 0x5555; jne here; cli; };
        asm! { a; mov ecx, dword_ptr(r15 + 0xA0); };
        apic_write(a, 0xB0, 0)?;
        asm! { a; mov edx, dword_ptr(r15 + 0xA0); stop; };
        Ok(())
    })?;
    let mut io = Recorder::new();
    ensure_eq!(guest.cpu.fault(&mut io)?.vector, 0x61, "vector");
    guest.cpu.change(StateSet::GENERAL, |state| state.general.set_rax(0x5555))?;
    guest.cpu.finish(&mut io)?;
    let [idle, serving, served, ..] = seen(&mut guest)?;
    ensure_eq!(idle, 0x30, "with TPR 30h");
    ensure_eq!(serving, 0x60, "while vector 61h is served");
    ensure_eq!(served, 0x30, "after EOI");
    Ok(())
}

fn off_and_on_again_is_as_after_reset(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = run(hypervisor, |a| {
        apic_on(a)?;
        apic_write(a, 0x80, 0x20)?;
        wrmsr(a, BASE_MSR, APIC | BOOT)?;
        asm! { a; rdmsr; mov esi, eax; };
        wrmsr(a, BASE_MSR, APIC | ENABLED | BOOT)?;
        asm! { a;
            rdmsr;
            mov edi, eax;
            mov ebx, dword_ptr(r15 + 0xF0);
        };
        Ok(())
    })?;
    let [spurious, _, _, off, on] = seen(&mut guest)?;
    ensure_eq!(off, APIC | BOOT, "APIC_BASE while off");
    ensure_eq!(on, APIC | ENABLED | BOOT, "APIC_BASE while on");
    ensure_eq!(spurious, 0xFF, "spurious-interrupt vector");
    Ok(())
}

/// Writes each of `values` in turn; the last one is to raise #GP(0), the others are not.
fn last_write_faults(
    hypervisor: &dyn Hypervisor,
    what: &str,
    values: &[(u32, u64)],
) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        for (count, (index, value)) in (1_u32..).zip(values) {
            a.mov(ebx, count)?;
            wrmsr(a, *index, *value)?;
        }
        asm! { a; mov ebx, -1; stop; };
        Ok(())
    })?;
    let end = guest.cpu.go(&mut Recorder::new())?;
    let faulted = matches!(end, End::Fault(fault) if (fault.vector, fault.error) == (13, 0));
    let at = guest.cpu.register(3)?;
    ensure!(faulted && at == values.len() as u64, "{what}: {end:x?} at write {at}");
    Ok(())
}

fn apic_base_reserved_bits(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    for bit in [0, 7, 9, 52, 63] {
        let value = APIC | ENABLED | BOOT | 1 << bit;
        last_write_faults(hypervisor, &format!("bit {bit}"), &[(BASE_MSR, value)])?;
    }
    Ok(())
}

const XAPIC_ON: (u32, u64) = (BASE_MSR, APIC | ENABLED | BOOT);
const X2APIC_ON: (u32, u64) = (BASE_MSR, APIC | ENABLED | X2APIC | BOOT);
const OFF: (u32, u64) = (BASE_MSR, APIC | BOOT);

fn x2apic_on(a: &mut CodeAssembler) -> Result<(), IcedError> {
    wrmsr(a, X2APIC_ON.0, X2APIC_ON.1)?;
    wrmsr(a, 0x80F, 0x1FF)
}

fn read_msr(a: &mut CodeAssembler, index: u32, to: AsmRegister32) -> Result<(), IcedError> {
    asm! { a; mov ecx, index; rdmsr; mov to, eax; };
    Ok(())
}

fn x2apic_registers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = run(hypervisor, |a| {
        x2apic_on(a)?;
        read_msr(a, 0x802, ebx)?;
        read_msr(a, 0x803, esi)?;
        wrmsr(a, 0x808, 0x20)?;
        read_msr(a, 0x808, edi)?;
        read_msr(a, 0x80D, r8d)?;
        asm! { a; mov rdx, cr8; mov r9, rdx; };
        Ok(())
    })?;
    let [id, _, _, version, priority] = seen(&mut guest)?;
    ensure_eq!(id, 0, "ID");
    ensure!(version & 0xFF >= 0x10, "version register is {version:#x}");
    ensure_eq!(priority, 0x20, "TPR");
    // Cluster 0, bit 0.
    ensure_eq!(guest.cpu.register(8)?, 1, "logical destination");
    ensure_eq!(guest.cpu.register(9)?, 2, "CR8");
    Ok(())
}

fn x2apic_interrupts(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        x2apic_on(a)?;
        // By the self-IPI register, then by the 64-bit ICR to ID 0, then logically to cluster 0.
        for (index, value) in [(0x83F, 0x61), (0x830, 0x62), (0x830, 1 << 32 | 0x863)] {
            wrmsr(a, index, value)?;
            asm! { a; sti; nop; cli; };
            wrmsr(a, 0x80B, 0)?;
        }
        asm! { a; mov ecx, 0x813; rdmsr; stop; };
        Ok(())
    })?;
    let mut io = Recorder::new();
    for vector in [0x61, 0x62, 0x63] {
        ensure_eq!(guest.cpu.fault(&mut io)?.vector, vector, "vector");
    }
    ensure_eq!(guest.cpu.finish(&mut io)?, 0, "ISR of vectors 60h to 7Fh after EOI");
    Ok(())
}

fn x2apic_reserved_registers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let bad = [
        ("the ID is read-only", 0x802, 1),
        ("there is no register 80Eh", 0x80E, 0),
        ("TPR has 8 bits", 0x808, 0x100),
        ("the version is read-only", 0x803, 0),
        ("the spurious vector has no bit 40", 0x80F, 1 << 40),
    ];
    for (what, index, value) in bad {
        last_write_faults(hypervisor, what, &[X2APIC_ON, (index, value)])?;
    }
    Ok(())
}

fn x2apic_eoi_takes_zero_only(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    last_write_faults(hypervisor, "EOI of 1", &[X2APIC_ON, (0x80B, 0), (0x80B, 1)])
}

fn x2apic_transitions(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    last_write_faults(hypervisor, "x2APIC to xAPIC", &[X2APIC_ON, XAPIC_ON])?;
    last_write_faults(hypervisor, "off to x2APIC", &[OFF, X2APIC_ON])?;
    let without_enable = (BASE_MSR, APIC | X2APIC | BOOT);
    last_write_faults(hypervisor, "x2APIC without enable", &[without_enable])?;
    // By way of off it can.
    let mut guest = run(hypervisor, |a| {
        for (index, value) in [X2APIC_ON, OFF, XAPIC_ON] {
            wrmsr(a, index, value)?;
        }
        asm! { a; mov r15d, APIC as u32; mov ebx, dword_ptr(r15 + 0xF0); };
        Ok(())
    })?;
    ensure_eq!(seen(&mut guest)?[0], 0xFF, "spurious-interrupt vector");
    Ok(())
}

fn x2apic_state(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = run(hypervisor, |a| {
        x2apic_on(a)?;
        wrmsr(a, 0x808, 0x30)
    })?;
    let state = guest.cpu.get(StateSet::LAPIC | StateSet::CONTROL)?;
    let lapic = state.lapic.clone().ok_or_else(|| Failure::Wrong("there is no APIC".into()))?;
    ensure_eq!(lapic.apic_base, X2APIC_ON.1, "APIC_BASE");
    ensure_eq!(lapic.registers.get(0x80), 0x30, "TPR");
    // On another machine it goes on in x2APIC mode.
    let mut twin = Guest::long(hypervisor)?;
    twin.load(|a| {
        read_msr(a, 0x80F, eax)?;
        asm! { a; stop; };
        Ok(())
    })?;
    twin.cpu.set(StateSet::LAPIC, &state)?;
    ensure_eq!(twin.cpu.finish(&mut Recorder::new())?, 0x1FF, "spurious-interrupt vector");
    Ok(())
}

fn xapic_has_no_msrs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    last_write_faults(hypervisor, "TPR by MSR in xAPIC mode", &[(0x808, 0)])
}
