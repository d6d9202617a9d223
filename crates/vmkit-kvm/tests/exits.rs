//! Data exits: what the guest does is what the callbacks see, and the other way round.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod common;

use common::{Access, DATA, MMIO, Machine, Recorder, kvm};
use vmkit_hypervisor::{
    HypervisorError, InterruptControllers, MapAccess, StateSet, VcpuState, VmExit,
};

/// Runs `program` to its end; the accesses, and the state after.
fn run(program: &[u8]) -> Option<(Vec<Access>, VcpuState, Machine)> {
    let (machine, mut vcpu) = Machine::with_program(kvm()?, program);
    let mut io = Recorder::default();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    let mut state = VcpuState::default();
    vcpu.get(StateSet::all(), &mut state).unwrap();
    Some((io.log, state, machine))
}

guest_program!(port_widths:
    "mov eax, 0x44332211",
    "out 0x10, al",
    "out 0x11, ax",
    "out 0x12, eax",
    "mov dx, 0xCF8",
    "out dx, eax",
    "xor eax, eax",
    "in al, 0x30",
    "mov ebx, eax",
    "in ax, 0x31",
    "mov ecx, eax",
    "in eax, 0x32",
    "mov esi, eax",
    "out 0xF4, al",
    "hlt",
);

#[test]
fn ports_are_accessed_with_the_width_of_the_instruction() {
    let Some((log, state, _)) = run(port_widths()) else { return };
    let b = [0x11, 0x22, 0x33, 0x44];
    assert_eq!(
        log,
        [
            Access::Out(0x10, b[..1].into()),
            Access::Out(0x11, b[..2].into()),
            Access::Out(0x12, b.into()),
            Access::Out(0xCF8, b.into()),
            Access::In(0x30, 1),
            Access::In(0x31, 2),
            Access::In(0x32, 4),
        ]
    );
    assert_eq!(state.general.rbx(), 1);
    assert_eq!(state.general.rcx(), 0x0302);
    assert_eq!(state.general.rsi(), 0x0706_0504);
}

guest_program!(mmio_widths:
    "mov rax, 0x8877665544332211",
    "mov edi, 0x10000000",
    "mov [rdi], al",
    "mov [rdi + 2], ax",
    "mov [rdi + 4], eax",
    "mov [rdi + 8], rax",
    "movzx ebx, byte ptr [rdi + 0x11]",
    "movzx ecx, word ptr [rdi + 0x12]",
    "mov esi, [rdi + 0x14]",
    "mov rbp, [rdi + 0x18]",
    "out 0xF4, al",
);

#[test]
fn mmio_is_accessed_with_the_width_of_the_instruction() {
    let Some((log, state, _)) = run(mmio_widths()) else { return };
    let b = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
    assert_eq!(
        log,
        [
            Access::Write(MMIO, b[..1].into()),
            Access::Write(MMIO + 2, b[..2].into()),
            Access::Write(MMIO + 4, b[..4].into()),
            Access::Write(MMIO + 8, b.into()),
            Access::Read(MMIO + 0x11, 1),
            Access::Read(MMIO + 0x12, 2),
            Access::Read(MMIO + 0x14, 4),
            Access::Read(MMIO + 0x18, 8),
        ]
    );
    assert_eq!((state.general.rbx(), state.general.rcx()), (1, 0x0302));
    assert_eq!(state.general.rsi(), 0x0706_0504);
    assert_eq!(state.general.rbp(), 0x0F0E_0D0C_0B0A_0908);
}

guest_program!(page_crossing:
    "mov edi, 0x10000FFD",
    "mov rax, 0x8877665544332211",
    "mov [rdi], rax",
    "mov rbx, [rdi]",
    "out 0xF4, al",
);

#[test]
fn mmio_across_a_page_boundary_arrives_in_powers_of_two() {
    let Some((log, state, _)) = run(page_crossing()) else { return };
    let mut written = Vec::new();
    let mut read = Vec::new();
    for access in &log {
        match access {
            Access::Write(at, bytes) => {
                assert!(bytes.len().is_power_of_two(), "{log:?}");
                written.extend((*at..).zip(bytes.iter().copied()));
            }
            Access::Read(at, len) => {
                assert!(len.is_power_of_two(), "{log:?}");
                read.extend(*at..*at + *len as u64);
            }
            other => panic!("{other:?}"),
        }
    }
    let want: Vec<_> =
        (MMIO + 0xFFD..).zip([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]).collect();
    assert_eq!(written, want);
    assert_eq!(read, (MMIO + 0xFFD..MMIO + 0x1005).collect::<Vec<_>>());
    assert_eq!(state.general.rbx(), 0x0807_0605_0403_0201);
}

guest_program!(string_out:
    "mov esi, 0x90000",
    "mov ecx, 3",
    "mov edx, 0x3F8",
    "cld",
    "rep outsb",
    "mov ecx, 2",
    "rep outsw",
    "out 0xF4, al",
);

#[test]
fn string_output_arrives_element_by_element() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, string_out());
    machine.write(DATA, b"abcdefg");
    let mut io = Recorder::default();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    let out = |bytes: &[u8]| Access::Out(0x3F8, bytes.into());
    assert_eq!(io.log, [out(b"a"), out(b"b"), out(b"c"), out(b"de"), out(b"fg")]);
}

guest_program!(string_in:
    "mov edi, 0x90000",
    "mov ecx, 5",
    "mov edx, 0x3F8",
    "cld",
    "rep insb",
    "mov ecx, 2",
    "rep insd",
    "out 0xF4, al",
);

#[test]
fn string_input_is_asked_for_element_by_element() {
    let Some((log, state, machine)) = run(string_in()) else { return };
    assert_eq!(log[..5], vec![Access::In(0x3F8, 1); 5]);
    assert_eq!(log[5..], vec![Access::In(0x3F8, 4); 2]);
    assert_eq!(machine.read::<14>(DATA), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0]);
    assert_eq!((state.general.rdi(), state.general.rcx()), (DATA + 13, 0));
}

#[test]
fn a_stop_inside_string_input_leaves_no_element_behind() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, string_in());
    let mut io = Recorder { stop_always: true, ..Recorder::default() };
    let mut state = VcpuState::default();
    loop {
        assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
        vcpu.get(StateSet::GENERAL, &mut state).unwrap();
        // Whatever was answered has arrived in memory, and the registers say so.
        let done = state.general.rdi() - DATA;
        assert_eq!(u64::from(io.next), done, "{:?}", io.log);
        for at in 0..done {
            assert_eq!(u64::from(machine.read::<1>(DATA + at)[0]), at + 1);
        }
        if done == 13 {
            break;
        }
    }
}

guest_program!(stops:
    "mov eax, 0x5A",
    "out 0x10, al",
    "in al, 0x11",
    "mov edi, 0x10000000",
    "mov [rdi], eax",
    "mov ebx, [rdi]",
    "add dword ptr [rdi + 4], 3",
    "nop",
    "out 0xF4, al",
);

#[test]
fn a_stopped_access_is_complete() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, stops());
    let mut io = Recorder { stop_always: true, ..Recorder::default() };
    let mut state = VcpuState::default();
    let mut ends = Vec::new();
    for _ in 0..6 {
        assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
        vcpu.get(StateSet::GENERAL, &mut state).unwrap();
        ends.push((state.general.rip - common::CODE, state.general.rax(), state.general.rbx()));
    }
    // Each run ends behind the instruction that made the access, with its result in place.
    assert_eq!(
        ends,
        [
            (7, 0x5A, 0),
            (9, 1, 0),
            (16, 1, 0),
            (18, 1, 0x0504_0302),
            (22, 1, 0x0504_0302),
            (25, 1, 0x0504_0302),
        ]
    );
    assert_eq!(io.log[4], Access::Read(MMIO + 4, 4));
    assert_eq!(io.log[5], Access::Write(MMIO + 4, vec![9, 7, 8, 9]));
}

guest_program!(write_to_rom:
    "mov eax, [0x200000]",
    "mov dword ptr [0x200004], 0x12345678",
    "mov ebx, [0x200004]",
    "out 0xF4, al",
);

#[test]
fn a_write_to_read_only_memory_is_an_mmio_write() {
    use vmkit_hypervisor::guest_memory::{
        Backing, Bytes, GuestAddress, MemoryRegionAddress, region_at,
    };
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, write_to_rom());
    let rom = region_at(GuestAddress(0x20_0000), 0x1000, Backing::Memfd).unwrap();
    rom.write_slice(&[1, 0, 0, 0, 2, 0, 0, 0], MemoryRegionAddress(0)).unwrap();
    machine
        .partition
        .map(GuestAddress(0x20_0000), std::sync::Arc::new(rom), MapAccess::empty())
        .unwrap();
    let mut io = Recorder::default();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    assert_eq!(io.log, [Access::Write(0x20_0004, 0x1234_5678_u32.to_le_bytes().into())]);
    let mut state = VcpuState::default();
    vcpu.get(StateSet::GENERAL, &mut state).unwrap();
    assert_eq!((state.general.rax(), state.general.rbx()), (1, 2));
}

guest_program!(triple_fault:
    "push 0",
    "push 0",
    "lidt [rsp]",
    "ud2",
);

#[test]
fn a_triple_fault_is_a_shutdown() {
    // An emulating KVM may fail to deliver the first fault instead.
    let Some(kvm) = common::true_kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, triple_fault());
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Shutdown);
}

guest_program!(jump_to_nothing:
    "mov eax, 0x20000000",
    "jmp rax",
);

#[test]
fn code_outside_memory_is_a_failure_that_names_the_address() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, jump_to_nothing());
    let mut io = Recorder::default();
    match vcpu.run(&mut io) {
        Err(HypervisorError::Failed { at, .. }) => assert_eq!(at.address, 0x2000_0000),
        other => panic!("{other:?}"),
    }
}

guest_program!(halt: "hlt");

#[test]
fn without_a_local_apic_a_halt_is_for_good() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::None, MapAccess::WRITE);
    let mut vcpu = machine.vcpu(0, halt());
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::HaltedForGood);
}
