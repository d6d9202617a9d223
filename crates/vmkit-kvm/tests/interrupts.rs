//! Interrupts into the guest, and doorbells out of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod common;

use std::thread;
use std::time::Duration;

use common::{Access, DATA, MMIO, Machine, Recorder, kvm, run_until_halted, true_kvm};
use vmkit_hypervisor::{
    Doorbell, EventFd, InterruptControllers, MapAccess, Msi, StateSet, VcpuState, VmExit,
};

guest_program!(ring:
    "mov edi, 0x10000000",
    "mov eax, 7",
    "mov [rdi], eax",
    "mov [rdi + 4], eax",
    "mov [rdi + 8], ax",
    "out 0x10, al",
    "out 0x11, al",
    "out 0xF4, al",
);

#[test]
fn doorbells_ring_without_an_exit() {
    let Some(kvm) = kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, ring());
    let Some(doorbells) = machine.partition.doorbells() else {
        eprintln!("SKIPPED: this KVM has no ioeventfd");
        return;
    };
    let bells = [
        Doorbell::Mmio { address: MMIO, width: 4, value: Some(7) },
        // Another value than the guest writes.
        Doorbell::Mmio { address: MMIO + 4, width: 4, value: Some(8) },
        Doorbell::Mmio { address: MMIO + 8, width: 0, value: None },
        Doorbell::Pio { port: 0x10, width: 1, value: None },
        // Another width than the guest writes.
        Doorbell::Pio { port: 0x11, width: 2, value: None },
    ];
    let fds: Vec<_> = bells.iter().map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
    for (bell, fd) in bells.iter().zip(&fds) {
        doorbells.add(*bell, fd).unwrap();
    }
    let mut io = Recorder::default();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    let rung: Vec<_> = fds.iter().map(|fd| fd.read().unwrap_or(0)).collect();
    assert_eq!(rung, [1, 0, 1, 1, 0]);
    let seven = 7_u32.to_le_bytes();
    assert_eq!(io.log, [Access::Write(MMIO + 4, seven.into()), Access::Out(0x11, vec![7])]);

    // Taken away, they are exits again.
    for (bell, fd) in bells.iter().zip(&fds) {
        doorbells.remove(*bell, fd).unwrap();
    }
    assert!(doorbells.remove(bells[0], &fds[0]).is_err());
    machine.start(vcpu.as_mut(), ring());
    io.log.clear();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    assert_eq!(io.log.len(), 5);
}

#[test]
fn an_impossible_doorbell_is_refused() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
    let Some(doorbells) = machine.partition.doorbells() else { return };
    let fd = EventFd::new(0).unwrap();
    for (width, value) in [(3, None), (16, None), (0, Some(1))] {
        let bell = Doorbell::Mmio { address: MMIO, width, value };
        assert!(doorbells.add(bell, &fd).is_err(), "{bell:?}");
    }
}

/// Requests of the local APIC as its saved registers show them: 32 vectors to a register.
fn requested(vcpu: &mut dyn vmkit_hypervisor::Vcpu, vector: usize) -> bool {
    let mut state = VcpuState::default();
    vcpu.get(StateSet::LAPIC, &mut state).unwrap();
    let register = state.lapic.unwrap().registers.get(0x200 + vector / 32 * 16);
    register >> (vector % 32) & 1 != 0
}

/// Switches the local APIC on.
fn enable_apic(vcpu: &mut dyn vmkit_hypervisor::Vcpu) {
    let mut state = VcpuState::default();
    vcpu.get(StateSet::LAPIC, &mut state).unwrap();
    state.lapic.as_mut().unwrap().registers.set(0xF0, 0x1FF);
    vcpu.set(StateSet::LAPIC, &state).unwrap();
}

#[test]
fn an_msi_reaches_the_vcpu_it_names() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 2, InterruptControllers::Full, MapAccess::WRITE);
    let mut vcpus: Vec<_> =
        (0..2).map(|i| machine.partition.create_vcpu(i, &machine.model).unwrap()).collect();
    vcpus.iter_mut().for_each(|vcpu| enable_apic(vcpu.as_mut()));
    let sink = machine.partition.interrupts();
    sink.signal_msi(Msi { address: 0xFEE0_1000, data: 0x61 });
    sink.signal_msi(Msi { address: 0xFED0_0000, data: 0x62 });
    assert!(!requested(vcpus[0].as_mut(), 0x61));
    assert!(requested(vcpus[1].as_mut(), 0x61));
    assert!(!requested(vcpus[0].as_mut(), 0x62));
}

#[test]
fn a_wire_and_an_irqfd_reach_the_ioapic() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
    let mut vcpu = machine.partition.create_vcpu(0, &machine.model).unwrap();
    enable_apic(vcpu.as_mut());
    let mut state = machine.partition.save().unwrap();
    // Edge-triggered, unmasked, to APIC 0.
    state.ioapic.entries[5] = 0x51;
    state.ioapic.entries[6] = 0x52;
    // Level-triggered.
    state.ioapic.entries[20] = 0x53 | 1 << 15;
    machine.partition.load(&state).unwrap();
    let sink = machine.partition.interrupts();
    sink.set_level(5, true);
    sink.set_level(20, true);
    sink.set_level(99, true);
    assert!(requested(vcpu.as_mut(), 0x51));
    assert!(requested(vcpu.as_mut(), 0x53));
    let saved = machine.partition.save().unwrap();
    assert_eq!(saved.ioapic.levels >> 20 & 1, 1);
    assert_eq!(saved.ioapic.entries[20] >> 14 & 1, 1, "remote IRR");
    sink.set_level(20, false);
    assert_eq!(machine.partition.save().unwrap().ioapic.levels >> 20 & 1, 0);

    let fd = EventFd::new(0).unwrap();
    sink.attach_irqfd(&fd, 6).unwrap();
    assert!(sink.attach_irqfd(&fd, 24).is_err());
    assert!(!requested(vcpu.as_mut(), 0x52));
    fd.write(1).unwrap();
    // The kernel delivers from a work queue.
    let delivered = (0..6000).any(|_| {
        thread::sleep(Duration::from_millis(5));
        requested(vcpu.as_mut(), 0x52)
    });
    assert!(delivered);
}

#[test]
fn an_eventfd_sends_the_message_last_programmed_until_its_route_is_dropped() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::Full, MapAccess::WRITE);
    let mut vcpu = machine.partition.create_vcpu(0, &machine.model).unwrap();
    enable_apic(vcpu.as_mut());
    let sink = machine.partition.interrupts();
    let fds: Vec<_> = (0..3).map(|_| EventFd::new(0).unwrap()).collect();
    let mut routes: Vec<_> = fds.iter().map(|fd| sink.route_msi(fd).unwrap()).collect();
    let message = |vector| Some(Msi { address: 0xFEE0_0000, data: vector });
    routes[0].program(message(0x70)).unwrap();
    routes[1].program(message(0x71)).unwrap();
    routes[1].program(message(0x72)).unwrap();
    routes[2].program(message(0x73)).unwrap();
    routes[2].program(None).unwrap();
    fds.iter().for_each(|fd| fd.write(1).unwrap());
    let mut arrived = |vector| {
        (0..6000).any(|_| {
            thread::sleep(Duration::from_millis(5));
            requested(vcpu.as_mut(), vector)
        })
    };
    assert!(arrived(0x70) && arrived(0x72));
    // A freed GSI is given again, with nothing of its former message.
    drop(routes.pop());
    drop(routes.remove(0));
    let again = sink.route_msi(&fds[0]).unwrap();
    again.program(message(0x74)).unwrap();
    fds[0].write(1).unwrap();
    fds[2].write(1).unwrap();
    assert!(arrived(0x74));
    for never in [0x71, 0x73] {
        assert!(!requested(vcpu.as_mut(), never), "{never:#x}");
    }
}

#[test]
fn a_partition_without_controllers_takes_no_interrupts() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, InterruptControllers::None, MapAccess::WRITE);
    let sink = machine.partition.interrupts();
    sink.set_level(4, true);
    sink.signal_msi(Msi { address: 0xFEE0_0000, data: 0x61 });
    assert!(sink.attach_irqfd(&EventFd::new(0).unwrap(), 4).is_err());
    let mut vcpu = machine.partition.create_vcpu(0, &machine.model).unwrap();
    let mut state = VcpuState::default();
    vcpu.get(StateSet::LAPIC | StateSet::MP, &mut state).unwrap();
    assert!(state.lapic.is_none());
}

guest_program!(wait_for_interrupt:
    "sti",
    "hlt",
    "cli",
    "mov eax, [0x90000]",
    "out 0xF4, al",
);
guest_program!(handler:
    "inc dword ptr [0x90000]",
    // EOI.
    "push rax",
    "mov eax, 0xFEE000B0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
);

/// The page tables map the first GiB only; the APIC's page is the last of the fourth.
fn map_apic_page(machine: &Machine) {
    machine.write(0x2000 + 3 * 8, &0x5023_u64.to_le_bytes());
    machine.write(0x5000 + 0x1F7 * 8, &(0xFEE0_0000_u64 | 0xFB).to_le_bytes());
}

#[test]
fn an_interrupt_wakes_a_halted_guest_and_runs_its_handler() {
    let Some(kvm) = true_kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, wait_for_interrupt());
    map_apic_page(&machine);
    machine.write(common::CODE + 0x1000, handler());
    machine.gate(0x61, common::CODE + 0x1000);
    enable_apic(vcpu.as_mut());
    let sink = machine.partition.interrupts();
    let sender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        sink.signal_msi(Msi { address: 0xFEE0_0000, data: 0x61 });
    });
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    sender.join().unwrap();
    assert_eq!(machine.read_u64(DATA), 1);
    assert!(!requested(vcpu.as_mut(), 0x61));
}

guest_program!(start_second:
    "mov edi, 0xFEE00000",
    "mov dword ptr [rdi + 0x310], 0x01000000",
    "mov dword ptr [rdi + 0x300], 0x00004500",
    "mov dword ptr [rdi + 0x310], 0x01000000",
    "mov dword ptr [rdi + 0x300], 0x00004608",
    "2: pause",
    "cmp dword ptr [0x90000], 0",
    "je 2b",
    "out 0xF4, al",
);

#[test]
fn init_and_sipi_start_a_second_vcpu() {
    let Some(kvm) = true_kvm() else { return };
    let machine = Machine::new(kvm, 2, InterruptControllers::Full, MapAccess::WRITE);
    map_apic_page(&machine);
    let mut boot = machine.vcpu(0, start_second());
    enable_apic(boot.as_mut());
    // Vector 8: real mode at 0x8000. mov ax, 0x9000; mov ds, ax; mov byte [0], 1; hlt
    let code = [0xB8, 0, 0x90, 0x8E, 0xD8, 0xC6, 0x06, 0, 0, 1, 0xF4];
    machine.write(0x8000, &code);
    let mut second = machine.partition.create_vcpu(1, &machine.model).unwrap();
    let kick = second.kick();
    let runner = thread::spawn(move || {
        let exit = second.run(&mut Recorder::default()).unwrap();
        (second, exit)
    });
    let (boots_kick, started) = (boot.kick(), std::sync::mpsc::channel::<()>());
    let watchdog = thread::spawn(move || {
        if started.1.recv_timeout(Duration::from_secs(20)).is_err() {
            boots_kick.kick();
        }
    });
    let boots_exit = boot.run(&mut Recorder::default()).unwrap();
    started.0.send(()).unwrap_or_default();
    watchdog.join().unwrap();
    thread::sleep(Duration::from_millis(50));
    kick.kick();
    let (mut second, exit) = runner.join().unwrap();
    assert_eq!(exit, VmExit::Kicked);
    if boots_exit != VmExit::Stopped {
        let mut states = [VcpuState::default(), VcpuState::default()];
        boot.get(StateSet::all(), &mut states[0]).unwrap();
        second.get(StateSet::all(), &mut states[1]).unwrap();
        panic!("the second vCPU did not start: {states:#x?}");
    }
    run_until_halted(second.as_mut());
    let mut state = VcpuState::default();
    second.get(StateSet::SEGMENTS, &mut state).unwrap();
    assert_eq!(state.segments.cs.selector, 0x800);
}

guest_program!(nmi_target: "2: hlt", "jmp 2b");
guest_program!(nmi_handler: "inc dword ptr [0x90000]", "out 0xF4, al", "iretq");

#[test]
fn an_nmi_that_was_set_pending_is_taken() {
    let Some(kvm) = true_kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, nmi_target());
    machine.write(common::CODE + 0x1000, nmi_handler());
    machine.gate(2, common::CODE + 0x1000);
    let mut state = VcpuState::default();
    state.events.nmi_pending = true;
    vcpu.set(StateSet::EVENTS, &state).unwrap();
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    assert_eq!(machine.read_u64(DATA), 1);
    vcpu.get(StateSet::EVENTS, &mut state).unwrap();
    assert!(state.events.nmi_masked && !state.events.nmi_pending);
}

guest_program!(page_fault: "mov rax, [0x40000000]", "out 0xF4, al");
guest_program!(fault_handler:
    "pop rbx",
    "mov rcx, cr2",
    "out 0xF4, al",
);

#[test]
fn a_page_fault_has_its_error_code_and_address() {
    let Some(kvm) = true_kvm() else { return };
    let (machine, mut vcpu) = Machine::with_program(kvm, page_fault());
    machine.write(common::CODE + 0x1000, fault_handler());
    machine.gate(14, common::CODE + 0x1000);
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    let mut state = VcpuState::default();
    vcpu.get(StateSet::GENERAL, &mut state).unwrap();
    assert_eq!((state.general.rbx(), state.general.rcx()), (0, 0x4000_0000));
}
