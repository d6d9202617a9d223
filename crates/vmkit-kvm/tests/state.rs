//! State in and out.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod common;

use common::{Machine, Recorder, kvm};
use vmkit_hypervisor::x86::{Cr0, Events, Exception, Interrupt, MpState, Msr, Pending, Segment};
use vmkit_hypervisor::{
    CpuModel, Feature, FeatureSet, Hypervisor, HypervisorError, InterruptControllers, MapAccess,
    StateSet, Vcpu, VcpuState, VmExit,
};
use vmkit_kvm::best_available;

guest_program!(stop: "2: out 0xF4, al", "jmp 2b");

fn all(vcpu: &mut dyn Vcpu) -> VcpuState {
    let mut state = VcpuState::default();
    vcpu.get(StateSet::all(), &mut state).unwrap();
    state
}

#[test]
fn a_new_vcpu_is_in_the_state_after_reset() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 2, InterruptControllers::Full, MapAccess::WRITE);
    let mut boot = machine.partition.create_vcpu(0, &machine.model).unwrap();
    let state = all(boot.as_mut());
    let mut reset = VcpuState::default();
    reset.general.set_rdx(0x0008_06F8);
    assert_eq!(state.general, reset.general);
    assert_eq!(state.segments, reset.segments);
    assert_eq!(state.control, reset.control);
    assert_eq!(state.debug, reset.debug);
    assert_eq!(state.events, reset.events);
    assert_eq!(state.mp, MpState::Runnable);
    // FCW and MXCSR.
    assert_eq!(state.xsave.0[..2], [0x7F, 3]);
    assert_eq!(state.xsave.0[24..28], [0x80, 0x1F, 0, 0]);
    let lapic = state.lapic.unwrap();
    assert_eq!(lapic.apic_base, 0xFEE0_0900);

    let mut second = machine.partition.create_vcpu(1, &machine.model).unwrap();
    let state = all(second.as_mut());
    assert_eq!(state.mp, MpState::WaitForSipi);
    assert_eq!(state.lapic.unwrap().registers.get(0x20), 1 << 24);
}

fn busy_state(machine: &Machine, vcpu: &mut dyn Vcpu) -> VcpuState {
    let mut state = all(vcpu);
    for (n, register) in (1..).zip(&mut state.general.gpr) {
        *register = n * 0x0101_0101_0101_0101;
    }
    state.general.rip = common::CODE;
    state.general.rflags = 0x246;
    state.segments.fs.base = 0x1234_5678_9ABC;
    state.segments.gs = Segment { base: 0xFFFF_8000_0000_1000, ..Segment::data(0x2B).with_dpl(3) };
    state.segments.idt.limit = 0x7FF;
    state.control.cr2 = 0xDEAD_B000;
    state.control.cr8 = 3;
    state.control.cr0 |= Cr0::TS.bits();
    state.debug.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    state.debug.dr7 = 0x403;
    state.xsave.0[160..168].copy_from_slice(&0x1122_3344_5566_7788_u64.to_le_bytes());
    state.xsave.0[32..42].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 0x80, 0xFF, 0x3F]);
    state.xsave.0[512] = 3;
    for msr in &mut state.msrs {
        match msr.index {
            0xC000_0081..=0xC000_0083 | 0xC000_0102 => msr.value = 0x7FFF_0000_1000,
            0x174 => msr.value = 0x10,
            0x277 => msr.value = 0x0007_0106_0007_0106,
            _ => {}
        }
    }
    state.events.nmi_masked = true;
    state.tsc = 1 << 40;
    if let Some(lapic) = &mut state.lapic {
        lapic.registers.set(0xF0, 0x1FF);
        // Task priority, and the processor priority that follows from it.
        lapic.registers.set(0x80, 0x30);
        lapic.registers.set(0xA0, 0x30);
        lapic.registers.set(0x320, 0x0001_00EC);
        // Requested, not deliverable: below the task priority.
        lapic.registers.set(0x210, 0x0000_0002);
    }
    assert!(machine.model.has(Feature::LongMode));
    state
}

#[test]
fn what_is_set_is_what_is_read() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, stop());
    let want = busy_state(&machine, vcpu.as_mut());
    vcpu.set(StateSet::all(), &want).unwrap();
    let got = all(vcpu.as_mut());
    assert_eq!(got.general, want.general);
    assert_eq!(got.segments, want.segments);
    assert_eq!(got.control, want.control);
    assert_eq!(got.debug, want.debug);
    assert_eq!(got.xsave.0, want.xsave.0);
    assert_eq!(got.msrs, want.msrs);
    assert_eq!(got.events, want.events);
    assert_eq!(got.lapic, want.lapic);
    assert_eq!(got.mp, want.mp);
    // An emulating KVM lets the host's counter through.
    if common::true_kvm().is_some() {
        assert!((want.tsc..want.tsc + (1 << 36)).contains(&got.tsc), "{:#x}", got.tsc);
    }
}

#[test]
fn a_state_moves_to_another_vm_and_goes_on() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, stop());
    let state = busy_state(&machine, vcpu.as_mut());
    drop(vcpu);
    drop(machine);
    let (_other, mut vcpu) = Machine::with_program(kvm, stop());
    vcpu.set(StateSet::all(), &state).unwrap();
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    let after = all(vcpu.as_mut());
    assert_eq!(after.general.rip, common::CODE + 2);
    assert_eq!(after.general.gpr, state.general.gpr);
}

#[test]
fn only_the_named_parts_are_touched() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, stop());
    let before = all(vcpu.as_mut());
    let mut other = before.clone();
    other.general.set_rax(77);
    other.segments.fs.base = 77 << 12;
    other.control.cr2 = 77;
    vcpu.set(StateSet::GENERAL, &other).unwrap();
    vcpu.set(StateSet::CONTROL, &other).unwrap();
    let after = all(vcpu.as_mut());
    assert_eq!((after.general.rax(), after.control.cr2), (77, 77));
    assert_eq!(after.segments, before.segments);
    let mut partial = VcpuState::default();
    vcpu.get(StateSet::CONTROL, &mut partial).unwrap();
    assert_eq!(partial.general, VcpuState::default().general);
}

#[test]
fn events_in_flight_survive() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, stop());
    for pending in [
        Pending::None,
        Pending::Exception(Exception { vector: 14, error_code: Some(2) }),
        Pending::Exception(Exception { vector: 6, error_code: None }),
        Pending::Interrupt(Interrupt { vector: 0x41, software: false }),
    ] {
        let events =
            Events { pending, nmi_pending: true, nmi_masked: false, interrupt_shadow: true };
        let state = VcpuState { events, ..VcpuState::default() };
        vcpu.set(StateSet::EVENTS, &state).unwrap();
        // Reading system registers and writing them back must not double the interrupt.
        let mut around = all(vcpu.as_mut());
        vcpu.set(StateSet::SEGMENTS | StateSet::CONTROL, &around).unwrap();
        vcpu.get(StateSet::EVENTS, &mut around).unwrap();
        assert_eq!(around.events, events);
        vcpu.set(StateSet::EVENTS, &VcpuState::default()).unwrap();
    }
}

#[test]
fn impossible_states_are_refused_and_change_nothing() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, stop());
    let good = all(vcpu.as_mut());
    let mut refuse = |what, spoil: &dyn Fn(&mut VcpuState)| {
        let mut bad = good.clone();
        bad.general.set_rax(0xBAD);
        spoil(&mut bad);
        match vcpu.set(what, &bad) {
            Err(HypervisorError::State { .. }) => {}
            other => panic!("{what:?}: {other:?}"),
        }
        assert_eq!(all(vcpu.as_mut()).general, good.general, "{what:?}");
    };
    refuse(StateSet::GENERAL | StateSet::XSAVE, &|s| s.xsave.0.truncate(100));
    refuse(StateSet::GENERAL | StateSet::XSAVE, &|s| s.xsave.0[527] = 0x80);
    refuse(StateSet::GENERAL | StateSet::XSAVE, &|s| s.xsave.0[512] = 0xFF);
    refuse(StateSet::GENERAL | StateSet::XSAVE, &|s| s.xsave.0[27] = 0xFF);
    refuse(StateSet::GENERAL | StateSet::CONTROL, &|s| s.control.xcr0 = 0);
    refuse(StateSet::GENERAL | StateSet::CONTROL, &|s| s.control.efer = 1 << 40);
    refuse(StateSet::GENERAL | StateSet::DEBUG, &|s| s.debug.dr7 = 1 << 40);
    refuse(StateSet::GENERAL | StateSet::LAPIC, &|s| s.lapic = None);
    refuse(StateSet::GENERAL | StateSet::LAPIC, &|s| {
        s.lapic.as_mut().unwrap().registers.set(0x20, 9 << 24);
    });
    refuse(StateSet::GENERAL | StateSet::EVENTS, &|s| {
        s.events.pending = Pending::Exception(Exception { vector: 99, error_code: None });
    });
    // KVM itself refuses these; what came before in the same call may have been set.
    for spoil in [
        |s: &mut VcpuState| s.control.cr4 = !0,
        |s: &mut VcpuState| s.msrs.push(Msr { index: 0xDEAD_0000, value: 1 }),
    ] {
        let mut bad = good.clone();
        spoil(&mut bad);
        let error = vcpu.set(StateSet::CONTROL | StateSet::MSRS, &bad).unwrap_err();
        assert!(matches!(error, HypervisorError::State { .. }), "{error}");
    }
}

#[test]
fn a_model_beyond_the_host_names_what_is_missing() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 4, InterruptControllers::Full, MapAccess::WRITE);
    let everything = FeatureSet::of(Feature::ALL);
    let greedy = CpuModel::with_features("greedy", everything);
    let lacking = greedy.missing(&kvm.capabilities().features);
    match machine.partition.create_vcpu(0, &greedy).err() {
        Some(HypervisorError::CpuModel { model, missing }) => {
            assert_eq!(model, "greedy");
            assert_eq!(missing.len(), lacking.len());
            assert!(missing.contains(&lacking[0].to_string()));
        }
        other => assert!(lacking.is_empty(), "{other:?}"),
    }
    machine.partition.create_vcpu(1, &best_available(&greedy, kvm.capabilities())).unwrap();
    machine.partition.create_vcpu(2, &vmkit_kvm::host_model(kvm)).unwrap();
}

#[test]
fn a_vcpu_index_is_given_once_and_within_the_limit() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 2, InterruptControllers::Full, MapAccess::WRITE);
    let first = machine.partition.create_vcpu(0, &machine.model).unwrap();
    drop(first);
    for index in [0, 2, u32::MAX] {
        let error = machine.partition.create_vcpu(index, &machine.model).err().unwrap();
        assert!(matches!(error, HypervisorError::VcpuIndex(i) if i == index), "{error}");
    }
}

// Has kvmclock write to DATA.
guest_program!(clock_on:
    "mov ecx, 0x4B564D01", "mov eax, 0x90001", "xor edx, edx", "wrmsr",
    "2: out 0xF4, al", "jmp 2b",
);

#[test]
fn a_guest_with_kvmclock_is_told_of_a_pause() {
    const FLAGS: u64 = common::DATA + 29;
    const STOPPED: u8 = 2;
    let Some(kvm) = kvm() else { return };
    let offered = kvm_ioctls::Kvm::new().unwrap();
    let offered = offered.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    let leaf = offered.as_slice().iter().find(|entry| entry.function == 0x4000_0001);
    if leaf.is_none_or(|leaf| leaf.eax & 8 == 0) {
        eprintln!("SKIPPED: this KVM has no kvmclock");
        return;
    }
    let (machine, mut vcpu) = Machine::with_program(kvm, clock_on());
    vcpu.after_pause().unwrap();
    let mut flags = || {
        assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
        let [flags] = machine.read(FLAGS);
        vcpu.after_pause().unwrap();
        flags & STOPPED
    };
    assert_eq!(flags(), 0);
    assert_eq!(flags(), STOPPED);
}

guest_program!(identify:
    "mov eax, 0x40000000",
    "cpuid",
    "mov r8d, ebx",
    "mov r9d, ecx",
    "mov eax, 1",
    "cpuid",
    "mov r10d, ecx",
    "mov r11d, edx",
    "mov eax, 0xB",
    "xor ecx, ecx",
    "cpuid",
    "mov r12d, edx",
    "mov r13d, eax",
    "out 0xF4, al",
);

#[test]
fn the_guest_sees_the_models_cpuid() {
    // An emulating KVM may let CPUID through to the host.
    let Some(kvm) = common::true_kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, identify());
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    let r = all(vcpu.as_mut()).general.gpr;
    assert_eq!((r[8], r[9]), (0x4B4D_564B, 0x564B_4D56), "KVMKVMKVM");
    assert_eq!(r[10] >> 19 & 1, u64::from(machine.model.has(Feature::Sse4_1)));
    assert_eq!(r[10] >> 28 & 1, 0, "x86-64-v2 has no AVX");
    assert_eq!(r[11] >> 25 & 3, 3, "SSE and SSE2");
    assert_eq!(r[12], 0, "x2APIC ID");
}

#[test]
fn a_partition_saves_and_loads_its_controllers() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
    let _vcpu = machine.partition.create_vcpu(0, &machine.model).unwrap();
    let mut state = machine.partition.save().unwrap();
    state.pic.primary.vector_base = 0x30;
    state.pic.primary.imr = 0xFE;
    state.pic.secondary.elcr = 0x0E;
    state.ioapic.entries[5] = 0x1_0031;
    state.ioapic.index = 0x1A;
    state.pit.channels[0].mode = 2;
    state.pit.channels[0].count = 11_932;
    state.pit.channels[0].run = vmkit_irqchip::PitRun::Counting(0);
    state.pit.port61 = 1;
    state.clock_ns = 5_000_000_000_000;
    machine.partition.load(&state).unwrap();
    let back = machine.partition.save().unwrap();
    assert_eq!(back.pic, state.pic);
    assert_eq!(back.ioapic, state.ioapic);
    assert_eq!(back.pit.channels[0], state.pit.channels[0]);
    assert_eq!(back.pit.port61, 1);
    let passed = back.clock_ns - state.clock_ns;
    assert!(passed < 10_000_000_000, "{passed}");
    state.ioapic.id = 77;
    assert!(machine.partition.load(&state).is_err());
}
