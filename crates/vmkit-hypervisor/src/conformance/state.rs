//! A vCPU's state: what is set is what is got, part by part, and it is what the guest sees.

use iced_x86::code_asm::*;

use super::case::{cases, ensure, ensure_eq};
use super::guest::{APIC, CODE, DATA, Guest, MMIO, best_model};
use super::recorder::{Access, Recorder};
use super::{Failure, Need, asm::asm};
use crate::x86::{
    ControlRegisters, Cr4, DebugRegisters, Events, Exception, GeneralRegisters, Interrupt, MpState,
    Msr, Pending, Segment, SegmentAttributes, Segments, XsaveArea,
};
use crate::{CpuidContext, Feature, Hypervisor, HypervisorError, StateSet, VcpuState};

cases! { "state":
    after_reset "Intel SDM vol. 3A §10.1.1";
    local_vectors_after_reset "Intel SDM vol. 3A §11.4.7.1, MP specification 1.4 §3.6.2.2";
    other_vcpus_wait_for_sipi "Intel SDM vol. 3A §9.4";
    general_registers "the contract: what is set is what is got";
    segments "the contract: what is set is what is got";
    control_registers "the contract: what is set is what is got";
    cr8_without_interrupt_controllers "Intel SDM vol. 3A §11.8.6";
    debug_registers "the contract: what is set is what is got";
    xsave_area "Intel SDM vol. 1 §13.4";
    xsave_area_is_what_the_guest_sees "Intel SDM vol. 1 §13.4, vol. 2A, FXSAVE"
        [Need::Feature(Feature::Fxsr)];
    msrs "the contract: what is set is what is got";
    msrs_are_those_of_the_model "the contract: a state loads on any backend";
    lapic "Intel SDM vol. 3A §11.4";
    mp_state "the contract: MpState";
    a_halted_vcpu_does_not_run "the contract: MpState";
    tsc "the contract: VcpuState::tsc";
    a_pending_exception_is_delivered "the contract: Events::pending";
    a_pending_interrupt_is_delivered "the contract: Events::pending";
    nmi_state "the contract: Events";
    interrupt_shadow "Intel SDM vol. 2B, STI";
    parts_that_are_not_named_stay "the contract: get and set";
    impossible_states_are_refused "the contract: HypervisorError::State";
    a_running_program_moves_to_another_partition "the contract: state is plain neutral data";
    apic_ids_are_vcpu_indexes "the contract: create_vcpu" [Need::Vcpus(2)];
}

fn after_reset(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::new(hypervisor, super::guest::Mode::Real, 2)?;
    let partition = &guest.partition;
    // vCPU 1 has not been started by the fixture; but for its MP state it is as vCPU 0 after reset.
    let mut vcpu = partition.create_vcpu(1, &guest.model)?;
    let mut state = VcpuState::default();
    vcpu.get(StateSet::all(), &mut state)?;
    let signature = guest.model.cpuid(1, 0, &CpuidContext::default()).eax;
    let mut general = GeneralRegisters::default();
    general.set_rdx(signature.into());
    ensure_eq!(state.general, general, "general registers");
    // AMD's processors start with a 16-bit TSS, and with segments nobody accessed.
    if state.segments.tr.attributes.kind() == 3 {
        state.segments.tr.attributes = Segments::default().tr.attributes;
    }
    let s = &mut state.segments;
    for segment in [&mut s.cs, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs, &mut s.ss] {
        segment.attributes.0 |= 1;
    }
    let (got, want) = (state.segments, Segments::default());
    ensure_eq!((got.cs, got.ss, got.ds), (want.cs, want.ss, want.ds), "CS, SS and DS");
    ensure_eq!((got.tr, got.ldt), (want.tr, want.ldt), "TR and LDTR");
    ensure_eq!(got, want, "segments");
    ensure_eq!(state.control, ControlRegisters::default(), "control registers");
    ensure_eq!(state.debug, DebugRegisters::default(), "debug registers");
    ensure_eq!(state.events, Events::default(), "events");
    same_xsave(&state.xsave, &XsaveArea::default())?;
    let lapic = state.lapic.ok_or_else(|| Failure::Wrong("there is no local APIC".into()))?;
    ensure_eq!(lapic.apic_base, APIC | 0x800, "APIC base of an application processor");
    ensure_eq!(lapic.registers.get(0xF0), 0xFF, "spurious-interrupt register");
    Ok(())
}

/// But for LINT0 of the boot processor, which is open for the 8259 pair as a PC's firmware leaves it.
fn local_vectors_after_reset(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::new(hypervisor, super::guest::Mode::Real, 2)?;
    let others = guest.add_cpu(1)?;
    for (index, mut cpu) in (0..).zip([guest.cpu, others]) {
        let lapic = cpu.get(StateSet::LAPIC)?.lapic;
        let lapic = lapic.ok_or_else(|| Failure::Wrong("there is no local APIC".into()))?;
        for lvt in [0x320, 0x350, 0x360, 0x370] {
            let want = if lvt == 0x350 && index == 0 { 0x700 } else { 0x1_0000 };
            ensure_eq!(lapic.registers.get(lvt), want, "register {lvt:#x} of vCPU {index}");
        }
    }
    Ok(())
}

fn other_vcpus_wait_for_sipi(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::new(hypervisor, super::guest::Mode::Long, 2)?;
    ensure_eq!(guest.cpu.get(StateSet::MP)?.mp, MpState::Runnable, "vCPU 0");
    ensure_eq!(guest.add_cpu(1)?.get(StateSet::MP)?.mp, MpState::WaitForSipi, "vCPU 1");
    let lapic = guest.cpu.get(StateSet::LAPIC)?.lapic;
    let base = lapic.map(|lapic| lapic.apic_base);
    ensure_eq!(base, Some(APIC | 0x900), "APIC base of the boot processor");
    Ok(())
}

fn general_registers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let mut state = VcpuState::default();
    for (value, register) in (1_u64..).zip(&mut state.general.gpr) {
        *register = (value * 0x0101_0101_0101_0101) ^ 0x8000_0000_0000_0000;
    }
    state.general.rip = 0xFFFF_8000_0012_3456;
    // ID, IOPL 3, OF, DF, IF, SF, AF, CF.
    state.general.rflags = 0x20_3E93;
    guest.cpu.set(StateSet::GENERAL, &state)?;
    ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general, state.general, "general registers");
    Ok(())
}

fn segments(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let mut state = guest.cpu.get(StateSet::SEGMENTS)?;
    let s = &mut state.segments;
    s.fs.base = 0xFFFF_8000_1234_5678;
    s.gs.base = 0x7FFF_FFFF_F000;
    s.es = Segment { selector: 0x4B, base: 0x1234, limit: 0x8_9FFF, ..s.es };
    s.es.attributes = SegmentAttributes(0x40F3);
    s.ldt = Segment {
        selector: 0x50,
        base: 0xFFFF_9000_0000_0000,
        limit: 0x77,
        attributes: SegmentAttributes(0x82),
    };
    s.gdt.limit = 0x7F;
    s.idt.base = 0xFFFF_FFFF_FF57_A000;
    guest.cpu.set(StateSet::SEGMENTS, &state)?;
    let (got, want) = (guest.cpu.get(StateSet::SEGMENTS)?.segments, state.segments);
    ensure_eq!((got.cs, got.ss, got.es), (want.cs, want.ss, want.es), "CS, SS and ES");
    ensure_eq!((got.fs, got.gs), (want.fs, want.gs), "FS and GS");
    ensure_eq!((got.tr, got.ldt), (want.tr, want.ldt), "TR and LDTR");
    ensure_eq!(got, want, "segments");
    Ok(())
}

fn control_registers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let mut state = guest.cpu.get(StateSet::CONTROL)?;
    let control = &mut state.control;
    control.cr2 = 0xFFFF_8000_DEAD_BEEF;
    control.cr8 = 9;
    control.cr4 |= (Cr4::DE | Cr4::PGE | Cr4::TSD).bits();
    if guest.model.has(Feature::Xsave) {
        control.cr4 |= Cr4::OSXSAVE.bits();
        control.xcr0 = guest.model.xcr0_mask();
    }
    guest.cpu.set(StateSet::CONTROL, &state)?;
    ensure_eq!(guest.cpu.get(StateSet::CONTROL)?.control, state.control, "control registers");
    Ok(())
}

/// It is a register then, and nothing else.
fn cr8_without_interrupt_controllers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::bare(hypervisor)?;
    let mut io = Recorder::new();
    guest.load(|a| {
        asm! { a; mov r8, cr8; mov eax, 9; mov cr8, rax; mov eax, 3; mov cr8, rax; mov r9, cr8; stop; };
        Ok(())
    })?;
    guest.cpu.change(StateSet::CONTROL, |state| state.control.cr8 = 5)?;
    guest.cpu.finish(&mut io)?;
    ensure_eq!(guest.cpu.register(8)?, 5, "CR8 as set");
    ensure_eq!(guest.cpu.register(9)?, 3, "CR8 as the guest lowered it");
    ensure_eq!(guest.cpu.get(StateSet::CONTROL)?.control.cr8, 3, "CR8 of the state");
    Ok(())
}

fn debug_registers(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let mut state = VcpuState::default();
    state.debug.dr = [0xFFFF_8000_0000_1000, 0x2004, 0x3000, 0x0000_7FFF_FFFF_F000];
    state.debug.dr6 = 0xFFFF_0FF0 | 0x6002;
    state.debug.dr7 = 0x400 | 0xF_0302;
    guest.cpu.set(StateSet::DEBUG, &state)?;
    ensure_eq!(guest.cpu.get(StateSet::DEBUG)?.debug, state.debug, "debug registers");
    Ok(())
}

/// An area in which every component of the model holds something.
fn full_xsave(guest: &Guest) -> XsaveArea {
    let mut area = XsaveArea::default();
    let components = guest.model.xcr0_mask() | 3;
    let size = (guest.model.xsave_bytes() as usize).max(576);
    area.0.resize(size, 0);
    let mut set = |at: usize, bytes: &[u8]| {
        for (to, from) in area.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    // FCW, FSW with TOP 5, the tags of ST0 and ST2; ST0 = 1, ST2 = -2; MXCSR. FOP and the pointers
    // stay zero: AMD's processors restore them only with an exception (AMD APM vol. 2 §11.4.4).
    set(0, &[0x7B, 0x02, 0x00, 0x28, 0xA0, 0]);
    set(24, &[0x80, 0x3F, 0, 0]);
    set(32, &[0, 0, 0, 0, 0, 0, 0, 0x80, 0xFF, 0x3F]);
    set(64, &[0, 0, 0, 0, 0, 0, 0, 0x80, 0x00, 0xC0]);
    for register in 0..16 {
        let byte = 0x10 + register as u8;
        set(160 + register * 16, &[byte; 16]);
        if components & 4 != 0 {
            set(576 + register * 16, &[byte ^ 0x80; 16]);
        }
    }
    set(512, &components.to_le_bytes());
    area
}

/// The components are the same. Bytes 28 to 31 are the processor's MXCSR mask, 464 to 511 are
/// software's, and a component in its initial state may count as in use or not.
fn same_xsave(got: &XsaveArea, want: &XsaveArea) -> Result<(), Failure> {
    for (at, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
        if !(28..32).contains(&at) && !(464..520).contains(&at) {
            ensure_eq!(got, want, "byte {at} of the XSAVE area");
        }
    }
    Ok(())
}

fn xsave_area(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    if guest.model.has(Feature::Xsave) {
        let xcr0 = guest.model.xcr0_mask();
        guest.cpu.change(StateSet::CONTROL, |state| {
            state.control.cr4 |= Cr4::OSXSAVE.bits();
            state.control.xcr0 = xcr0;
        })?;
    }
    let state = VcpuState { xsave: full_xsave(&guest), ..VcpuState::default() };
    guest.cpu.set(StateSet::XSAVE, &state)?;
    let got = guest.cpu.get(StateSet::XSAVE)?.xsave;
    ensure_eq!(got.0.len(), state.xsave.0.len(), "length");
    ensure_eq!(got.0.get(512..520), state.xsave.0.get(512..520), "XSTATE_BV");
    same_xsave(&got, &state.xsave)
}

fn xsave_area_is_what_the_guest_sees(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let state = VcpuState { xsave: full_xsave(&guest), ..VcpuState::default() };
    guest.load(|a| {
        asm! { a; mov esi, DATA as u32; fxsave64 ptr(rsi); stop; };
        Ok(())
    })?;
    guest.cpu.set(StateSet::XSAVE, &state)?;
    guest.cpu.finish(&mut Recorder::new())?;
    let stored = guest.read::<416>(DATA)?;
    for (at, (got, want)) in stored.iter().zip(&state.xsave.0).enumerate() {
        if !(28..32).contains(&at) {
            ensure_eq!(got, want, "byte {at}");
        }
    }
    Ok(())
}

/// MSRs of the state that take any canonical address or small number.
const PLAIN_MSRS: &[(u32, u64)] = &[
    (0x174, 0x08),
    (0x175, 0xFFFF_8000_0000_1000),
    (0x176, 0xFFFF_8000_0000_2000),
    (0x17A, 4),
    (0x277, 0x0007_0106_0007_0405),
    (0xC000_0081, 0x0018_0008_0000_0000),
    (0xC000_0082, 0xFFFF_8000_0000_3000),
    (0xC000_0083, 0xFFFF_8000_0000_4000),
    (0xC000_0084, 0x4_7700),
    (0xC000_0102, 0xFFFF_8000_0000_5000),
    (0xC000_0103, 0x1234),
];

fn msrs(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let mut state = guest.cpu.get(StateSet::MSRS)?;
    ensure!(state.msrs.is_sorted_by_key(|msr| msr.index), "they ascend");
    for (index, value) in PLAIN_MSRS {
        for msr in state.msrs.iter_mut().filter(|msr| msr.index == *index) {
            msr.value = *value;
        }
    }
    guest.cpu.set(StateSet::MSRS, &state)?;
    ensure_eq!(guest.cpu.get(StateSet::MSRS)?.msrs, state.msrs, "MSRs");
    Ok(())
}

fn msrs_are_those_of_the_model(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    use Feature::{LongMode, Mca, Mtrr, Pat, Rdtscp, Sep, SpecCtrl, TscAdjust, Xsaves};
    // First index, count, and the feature that brings them.
    let known: &[(u32, u32, Option<Feature>)] = &[
        (0x3B, 1, Some(TscAdjust)),
        (0x48, 1, Some(SpecCtrl)),
        (0x174, 3, Some(Sep)),
        (0x17A, 1, Some(Mca)),
        (0x1A0, 1, None),
        (0x1D9, 1, None),
        (0x200, 16, Some(Mtrr)),
        (0x250, 1, Some(Mtrr)),
        (0x258, 2, Some(Mtrr)),
        (0x268, 8, Some(Mtrr)),
        (0x277, 1, Some(Pat)),
        (0x2FF, 1, Some(Mtrr)),
        (0xDA0, 1, Some(Xsaves)),
        (0xC000_0081, 4, Some(LongMode)),
        (0xC000_0102, 1, Some(LongMode)),
        (0xC000_0103, 1, Some(Rdtscp)),
    ];
    let mut guest = Guest::long(hypervisor)?;
    let model = &guest.model;
    let listed = |feature: &Option<Feature>| feature.is_none_or(|feature| model.has(feature));
    let want: Vec<u32> = known
        .iter()
        .filter(|(.., feature)| listed(feature))
        .flat_map(|(first, count, _)| *first..first + count)
        .collect();
    let got: Vec<u32> = guest.cpu.get(StateSet::MSRS)?.msrs.iter().map(|msr| msr.index).collect();
    ensure_eq!(got, want, "MSRs of the state");
    Ok(())
}

fn lapic(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let mut state = guest.cpu.get(StateSet::LAPIC)?;
    let Some(lapic) = &mut state.lapic else {
        return Err(Failure::Wrong("there is no local APIC".into()));
    };
    // TPR, logical destination, spurious vector and enable, an interrupt in service and another
    // requested, timer vector, divisor.
    let registers = [
        (0x80, 0x20),
        (0xD0, 0x0400_0000),
        (0xF0, 0x1FF),
        (0x110, 1 << 5),
        (0x220, 1 << 3),
        (0x320, 0x1_0045),
        (0x3E0, 0xB),
    ];
    for (offset, value) in registers {
        lapic.registers.set(offset, value);
    }
    guest.cpu.set(StateSet::LAPIC, &state)?;
    let got = guest.cpu.get(StateSet::LAPIC)?.lapic;
    let got = got.ok_or_else(|| Failure::Wrong("there is no local APIC".into()))?;
    for (offset, value) in registers {
        ensure_eq!(got.registers.get(offset), value, "register {offset:#x}");
    }
    ensure_eq!(guest.cpu.get(StateSet::CONTROL)?.control.cr8, 2, "CR8 is TPR's class");
    Ok(())
}

fn mp_state(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    for mp in [MpState::Halted, MpState::Runnable] {
        guest.cpu.set(StateSet::MP, &VcpuState { mp, ..VcpuState::default() })?;
        ensure_eq!(guest.cpu.get(StateSet::MP)?.mp, mp, "state");
    }
    Ok(())
}

fn a_halted_vcpu_does_not_run(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; stop; };
        Ok(())
    })?;
    let halted = VcpuState { mp: MpState::Halted, ..VcpuState::default() };
    guest.cpu.set(StateSet::MP, &halted)?;
    // Interrupts are on, so that this is no halt for good.
    guest.cpu.change(StateSet::GENERAL, |state| state.general.rflags |= 0x200)?;
    let kick = guest.cpu.kick();
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        kick.kick();
    });
    let exit = guest.cpu.run(&mut Recorder::new())?;
    kicker.join().map_err(|_| Failure::Wrong("the kicking thread panicked".into()))?;
    ensure_eq!(exit, crate::VmExit::Kicked, "exit");
    ensure_eq!(guest.cpu.get(StateSet::GENERAL)?.general.rip, CODE, "RIP");
    Ok(())
}

fn tsc(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let start = 1_u64 << 50;
    guest.cpu.set(StateSet::TSC, &VcpuState { tsc: start, ..VcpuState::default() })?;
    guest.load(|a| {
        asm! { a; rdtsc; mov ebx, edx; stop; };
        Ok(())
    })?;
    let low = guest.cpu.finish(&mut Recorder::new())?;
    let seen = guest.cpu.register(3)? << 32 | low;
    let after = guest.cpu.get(StateSet::TSC)?.tsc;
    ensure!(seen >= start && seen - start < 1 << 40, "RDTSC read {seen:#x} after {start:#x}");
    ensure!(after >= seen && after - seen < 1 << 40, "the state says {after:#x} after {seen:#x}");
    Ok(())
}

fn deliver(hypervisor: &dyn Hypervisor, pending: Pending) -> Result<(u64, u64), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; stop; };
        Ok(())
    })?;
    let events = Events { pending, ..Events::default() };
    guest.cpu.set(StateSet::EVENTS, &VcpuState { events, ..VcpuState::default() })?;
    ensure_eq!(guest.cpu.get(StateSet::EVENTS)?.events, events, "events");
    let fault = guest.cpu.fault(&mut Recorder::new())?;
    ensure_eq!(fault.rip, CODE, "saved RIP");
    let left = guest.cpu.get(StateSet::EVENTS)?.events;
    ensure_eq!(left, Events::default(), "events after delivery");
    Ok((fault.vector, fault.error))
}

fn a_pending_exception_is_delivered(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let general_protection = Exception { vector: 13, error_code: Some(0x1234) };
    let got = deliver(hypervisor, Pending::Exception(general_protection))?;
    ensure_eq!(got, (13, 0x1234), "vector and error code");
    let invalid_opcode = Exception { vector: 6, error_code: None };
    ensure_eq!(deliver(hypervisor, Pending::Exception(invalid_opcode))?, (6, 0), "vector");
    Ok(())
}

fn a_pending_interrupt_is_delivered(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let interrupt = Interrupt { vector: 0x61, software: false };
    ensure_eq!(deliver(hypervisor, Pending::Interrupt(interrupt))?, (0x61, 0), "vector");
    Ok(())
}

fn nmi_state(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a; mov eax, 1; stop; };
        Ok(())
    })?;
    let events = Events { nmi_pending: true, nmi_masked: true, ..Events::default() };
    guest.cpu.set(StateSet::EVENTS, &VcpuState { events, ..VcpuState::default() })?;
    ensure_eq!(guest.cpu.get(StateSet::EVENTS)?.events, events, "events");
    ensure_eq!(guest.cpu.finish(&mut Recorder::new())?, 1, "a masked NMI waits");
    guest.load(|a| {
        asm! { a; stop; };
        Ok(())
    })?;
    let events = Events { nmi_pending: true, ..Events::default() };
    guest.cpu.set(StateSet::EVENTS, &VcpuState { events, ..VcpuState::default() })?;
    ensure_eq!(guest.cpu.fault(&mut Recorder::new())?.vector, 2, "vector");
    let events = guest.cpu.get(StateSet::EVENTS)?.events;
    ensure_eq!((events.nmi_pending, events.nmi_masked), (false, true), "in the handler");
    Ok(())
}

fn interrupt_shadow(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let events = Events { interrupt_shadow: true, ..Events::default() };
    guest.cpu.set(StateSet::EVENTS, &VcpuState { events, ..VcpuState::default() })?;
    ensure_eq!(guest.cpu.get(StateSet::EVENTS)?.events, events, "events");
    Ok(())
}

fn parts_that_are_not_named_stay(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let before = guest.cpu.get(StateSet::GENERAL | StateSet::SEGMENTS | StateSet::CONTROL)?;
    let mut other = VcpuState::default();
    other.debug.dr[0] = 0x1234;
    guest.cpu.set(StateSet::DEBUG, &other)?;
    let after = guest.cpu.get(StateSet::GENERAL | StateSet::SEGMENTS | StateSet::CONTROL)?;
    ensure_eq!(after, before, "state after setting debug registers");
    let debug = guest.cpu.get(StateSet::DEBUG)?;
    ensure_eq!(debug.general, GeneralRegisters::default(), "general registers of another part");
    Ok(())
}

fn impossible_states_are_refused(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    let good = guest.cpu.get(StateSet::all())?;
    type Spoil = fn(&mut VcpuState);
    let spoils: &[(&str, StateSet, Spoil)] = &[
        ("CR8 of 16", StateSet::CONTROL, |s| s.control.cr8 = 16),
        ("XCR0 without x87", StateSet::CONTROL, |s| s.control.xcr0 = 0),
        ("an XCR0 component nobody has", StateSet::CONTROL, |s| s.control.xcr0 |= 1 << 40),
        ("an EFER bit nobody has", StateSet::CONTROL, |s| s.control.efer |= 1 << 40),
        ("DR7 above bit 31", StateSet::DEBUG, |s| s.debug.dr7 |= 1 << 32),
        ("a short XSAVE area", StateSet::XSAVE, |s| s.xsave.0.truncate(100)),
        ("a compacted XSAVE area", StateSet::XSAVE, |s| {
            for byte in s.xsave.0.iter_mut().skip(527).take(1) {
                *byte = 0x80;
            }
        }),
        ("an XSAVE component nobody has", StateSet::XSAVE, |s| {
            for byte in s.xsave.0.iter_mut().skip(519).take(1) {
                *byte = 0x20;
            }
        }),
        ("exception 40", StateSet::EVENTS, |s| {
            s.events.pending = Pending::Exception(Exception { vector: 40, error_code: None });
        }),
        ("no local APIC", StateSet::LAPIC, |s| s.lapic = None),
        ("an MSR nobody has", StateSet::MSRS, |s| {
            s.msrs.push(Msr { index: 0xDEAD_0000, value: 1 });
        }),
    ];
    for (what, part, spoil) in spoils {
        let mut state = good.clone();
        spoil(&mut state);
        match guest.cpu.set(*part, &state) {
            Err(Failure::Backend(HypervisorError::State { .. })) => {}
            Err(other) => return Err(Failure::Wrong(format!("{what}: {other}"))),
            Ok(()) => return Err(Failure::Wrong(format!("{what} was taken"))),
        }
    }
    Ok(())
}

fn a_running_program_moves_to_another_partition(
    hypervisor: &dyn Hypervisor,
) -> Result<(), Failure> {
    let mut guest = Guest::long(hypervisor)?;
    guest.load(|a| {
        asm! { a;
            mov rbx, 0x1111_2222_3333_4444_u64;
            mov edi, MMIO as u32;
            mov dword_ptr(DATA), 0x55;
            mov dr0, rbx;
            push rbx;
            mov eax, dword_ptr(rdi);
            pop rcx;
            mov rdx, dr0;
            add ecx, eax;
            add ecx, dword_ptr(DATA);
            mov eax, ecx;
            stop;
        };
        Ok(())
    })?;
    let mut io = Recorder::answering([5]);
    io.stop_always = true;
    guest.cpu.run(&mut io)?;
    ensure_eq!(io.log, [Access::Read(MMIO, 4)], "accesses");
    let state = guest.cpu.get(StateSet::all())?;
    let chips = guest.partition.save()?;

    let mut twin = guest.twin(hypervisor, &state, &chips)?;
    drop(guest);
    let end = twin.cpu.finish(&mut Recorder::new())?;
    ensure_eq!(end, 0x3333_4444 + 5 + 0x55, "the program's result");
    ensure_eq!(twin.cpu.register(2)?, 0x1111_2222_3333_4444, "DR0");
    Ok(())
}

fn apic_ids_are_vcpu_indexes(hypervisor: &dyn Hypervisor) -> Result<(), Failure> {
    let guest = Guest::new(hypervisor, super::guest::Mode::Long, 2)?;
    let mut other = guest.add_cpu(1)?;
    let lapic = other.get(StateSet::LAPIC)?.lapic;
    ensure_eq!(lapic.map(|lapic| lapic.registers.get(0x20)), Some(1 << 24), "APIC ID register");
    let model = best_model(hypervisor);
    for index in [0, 1, 2] {
        let again = guest.partition.create_vcpu(index, &model);
        let refused = matches!(again, Err(HypervisorError::VcpuIndex(at)) if at == index);
        ensure!(refused, "vCPU {index} could be made, though the index is taken or too large");
    }
    Ok(())
}
