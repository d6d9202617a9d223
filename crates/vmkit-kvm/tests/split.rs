//! What is particular to split controllers: the board's thread, and states that move between the
//! controllers in the kernel and those of this process.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use common::{CODE, DATA, Machine, Recorder, kvm, run_until_halted, true_kvm};
use vmkit_hypervisor::guest_memory::{Bytes, MemoryRegionAddress};
use vmkit_hypervisor::x86::{MpState, Pending};
use vmkit_hypervisor::{
    EventFd, HypervisorError, InterruptControllers, MapAccess, StateSet, Vcpu, VcpuState, VmExit,
};

use InterruptControllers::{Full, Split};

/// The tests look at this process's threads, so they take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The boards' threads: how often each has gone to sleep.
fn board_threads() -> Vec<u64> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let statuses =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let boards = statuses.filter(|status| status.starts_with("Name:\tvmkit-board"));
    boards
        .map(|status| {
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        })
        .collect()
}

/// Waits until there are so many: a thread names itself, and goes from the list, a little late.
fn board_threads_become(count: usize) -> bool {
    (0..6000).any(|_| {
        thread::sleep(Duration::from_millis(5));
        board_threads().len() == count
    })
}

guest_program!(nothing: "out 0xF4, al");
// Counter 0, mode 2, 1,193 input clocks: 1 ms.
guest_program!(start_the_pit:
    "mov al, 0x34", "out 0x43, al", "mov al, 0xA9", "out 0x40, al", "mov al, 4", "out 0x40, al",
    "out 0xF4, al",
    "2: pause", "cmp dword ptr [0x90000], 0", "je 2b",
    "out 0xF4, al",
);

#[test]
fn the_thread_is_there_only_for_the_pit_and_sleeps_while_no_vcpu_runs() {
    let _turn = turn();
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, Split, MapAccess::WRITE);
    let mut vcpu = machine.vcpu(0, nothing());
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    assert!(board_threads().is_empty());

    machine.start(vcpu.as_mut(), start_the_pit());
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    assert!(board_threads_become(1));
    // Whatever it was doing ends; from then on nothing wakes it.
    let mut before = board_threads();
    let sleeps = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(200));
        std::mem::replace(&mut before, board_threads()) == before
    });
    assert!(sleeps, "it wakes up and up");

    // While the vCPU runs it wakes up for each tick, and not without end.
    let ram = machine.ram.clone();
    let ender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        ram.write_obj(1_u32, MemoryRegionAddress(DATA)).unwrap();
    });
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    ender.join().unwrap();
    let woken = board_threads()[0] - before[0];
    // A busy host makes it fewer and the run longer.
    assert!((2..20_000).contains(&woken), "{woken} times");

    drop(vcpu);
    drop(machine);
    assert!(board_threads_become(0));
}

/// Switches the local APIC on, with LINT0 open to the 8259 pair.
fn virtual_wire(vcpu: &mut dyn Vcpu) {
    let mut state = VcpuState::default();
    vcpu.get(StateSet::LAPIC, &mut state).unwrap();
    let registers = &mut state.lapic.as_mut().unwrap().registers;
    registers.set(0xF0, 0x1FF);
    registers.set(0x350, 0x700);
    vcpu.set(StateSet::LAPIC, &state).unwrap();
}

// ICW1 to ICW4 of the first 8259, vectors from 0x30, all but input 5 masked.
guest_program!(pic_then_halt:
    "mov al, 0x11", "out 0x20, al", "mov al, 0x30", "out 0x21, al",
    "mov al, 4", "out 0x21, al", "mov al, 1", "out 0x21, al", "mov al, 0xDF", "out 0x21, al",
    "out 0xF4, al",
    "sti",
    "hlt",
    "cli",
    "out 0xF4, al",
);
guest_program!(count_and_eoi:
    "inc dword ptr [0x90000]", "mov al, 0x20", "out 0x20, al", "iretq",
);

/// A machine that has set up its 8259 and is about to halt with interrupts on.
fn about_to_halt(controllers: InterruptControllers) -> Option<(Machine, Box<dyn Vcpu>)> {
    let machine = Machine::new(kvm()?, 1, controllers, MapAccess::WRITE);
    let mut vcpu = machine.vcpu(0, pic_then_halt());
    virtual_wire(vcpu.as_mut());
    machine.write(CODE + 0x1000, count_and_eoi());
    machine.gate(0x35, CODE + 0x1000);
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    Some((machine, vcpu))
}

fn copy_ram(from: &Machine, to: &Machine) {
    let mut ram = vec![0; common::RAM as usize];
    from.ram.read_slice(&mut ram, MemoryRegionAddress(0)).unwrap();
    to.ram.write_slice(&ram, MemoryRegionAddress(0)).unwrap();
}

#[test]
fn an_interrupt_of_the_pic_moves_between_kernel_and_split_while_the_guest_sleeps() {
    let _turn = turn();
    let Some(kvm) = true_kvm() else { return };
    for (from, to) in [(Full, Split), (Split, Full), (Split, Split)] {
        let Some((machine, mut vcpu)) = about_to_halt(from) else { return };
        run_until_halted(vcpu.as_mut());
        machine.partition.interrupts().set_level(5, true);
        let mut state = VcpuState::default();
        vcpu.get(StateSet::all(), &mut state).unwrap();
        assert_eq!(state.mp, MpState::Halted);
        let board = machine.partition.save().unwrap();
        assert_eq!(board.pic.primary.irr & 0x20, 0x20);

        let twin = Machine::new(kvm, 1, to, MapAccess::WRITE);
        copy_ram(&machine, &twin);
        let mut cpu = twin.partition.create_vcpu(0, &twin.model).unwrap();
        twin.partition.load(&board).unwrap();
        cpu.set(StateSet::all(), &state).unwrap();
        let watchdog = watchdog(cpu.as_ref());
        assert_eq!(cpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped, "{from:?} {to:?}");
        drop(watchdog);
        assert_eq!(twin.read_u64(DATA), 1);
    }
}

/// Kicks `vcpu` if it does not come to its end before the sender is dropped.
fn watchdog(vcpu: &dyn Vcpu) -> Sender<()> {
    let (sender, receiver) = mpsc::channel();
    let kick = vcpu.kick();
    thread::spawn(move || {
        let timeout = receiver.recv_timeout(Duration::from_secs(20));
        if timeout == Err(mpsc::RecvTimeoutError::Timeout) {
            kick.kick();
        }
    });
    sender
}

#[test]
fn an_acknowledged_interrupt_is_in_the_state_if_the_run_ends_before_the_guest_takes_it() {
    let _turn = turn();
    for round in 0..30_u32 {
        let Some((machine, mut vcpu)) = about_to_halt(Split) else { return };
        let ender = {
            let (kick, sink) = (vcpu.kick(), machine.partition.interrupts());
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(10));
                // The run loop sees the wire; the kick ends the entry that would deliver, or comes
                // a little earlier or later.
                sink.set_level(5, true);
                (0..round * 200).for_each(|_| std::hint::spin_loop());
                kick.kick();
            })
        };
        let exit = vcpu.run(&mut Recorder::default()).unwrap();
        ender.join().unwrap();
        let mut state = VcpuState::default();
        vcpu.get(StateSet::all(), &mut state).unwrap();
        let pic = machine.partition.save().unwrap().pic.primary;
        let (asked, serving) = (pic.irr & 0x20 != 0, pic.isr & 0x20 != 0);
        let injected = matches!(state.events.pending, Pending::Interrupt(i) if i.vector == 0x35);
        let in_handler = (CODE + 0x1000..CODE + 0x1010).contains(&state.general.rip);
        let taken = machine.read_u64(DATA) == 1;
        // One of these holds it, whatever came first.
        assert!(
            asked || serving && (injected || in_handler) || taken,
            "lost in round {round}: {exit:?}, {:?}, {pic:?}",
            state.events
        );
    }
}

#[test]
fn an_irqfd_pulses_a_level_triggered_pin_too() {
    let _turn = turn();
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, Split, MapAccess::WRITE);
    let mut vcpu = machine.partition.create_vcpu(0, &machine.model).unwrap();
    virtual_wire(vcpu.as_mut());
    let mut board = machine.partition.save().unwrap();
    board.ioapic.entries[20] = 0x53 | 1 << 15;
    machine.partition.load(&board).unwrap();
    let (sink, fd) = (machine.partition.interrupts(), EventFd::new(0).unwrap());
    sink.attach_irqfd(&fd, 20).unwrap();
    assert!(sink.attach_irqfd(&fd, 24).is_err());
    fd.write(1).unwrap();
    let in_service = (0..6000).any(|_| {
        thread::sleep(Duration::from_millis(5));
        machine.partition.save().unwrap().ioapic.entries[20] >> 14 & 1 != 0
    });
    assert!(in_service);
    let mut state = VcpuState::default();
    vcpu.get(StateSet::LAPIC, &mut state).unwrap();
    // Vector 0x53 is bit 19 of the third register of requests.
    assert_eq!(state.lapic.unwrap().registers.get(0x220) >> 19 & 1, 1);
}

// Switches the pin's handler on, waits for the host, and then a while for what may come.
guest_program!(wait_with_interrupts:
    "out 0xF4, al", "sti", "mov ecx, 200000", "2: dec ecx", "jnz 2b", "cli", "out 0xF4, al",
);
guest_program!(count_and_lapic_eoi:
    "inc dword ptr [0x90000]", "mov eax, 0xFEE000B0", "mov dword ptr [rax], 0", "iretq",
);

/// Maps the local APIC's page, uncached: the last 2 MiB but 18 of the fourth GiB.
fn map_lapic(machine: &Machine) {
    machine.write(0x2000 + 3 * 8, &0xA023_u64.to_le_bytes());
    machine.write(0xA000 + 0x1F7 * 8, &(0xFEE0_0000_u64 | 0xFB).to_le_bytes());
}

#[test]
fn an_irqfd_written_to_right_before_a_save_interrupts_once_after_the_load() {
    let _turn = turn();
    let Some(kvm) = kvm() else { return };
    for round in 0..12 {
        let machine = Machine::new(kvm, 1, Split, MapAccess::WRITE);
        let mut vcpu = machine.vcpu(0, wait_with_interrupts());
        virtual_wire(vcpu.as_mut());
        map_lapic(&machine);
        machine.write(CODE + 0x1000, count_and_lapic_eoi());
        machine.gate(0x53, CODE + 0x1000);
        let mut board = machine.partition.save().unwrap();
        // Edge and level.
        board.ioapic.entries[20] = 0x53 | (round % 2) << 15;
        machine.partition.load(&board).unwrap();
        let fd = EventFd::new(0).unwrap();
        machine.partition.interrupts().attach_irqfd(&fd, 20).unwrap();
        assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);

        fd.write(1).unwrap();
        // In either order.
        let mut state = VcpuState::default();
        let board = if round % 3 == 0 {
            let board = machine.partition.save().unwrap();
            vcpu.get(StateSet::all(), &mut state).unwrap();
            board
        } else {
            vcpu.get(StateSet::all(), &mut state).unwrap();
            machine.partition.save().unwrap()
        };
        let requested = state.lapic.as_ref().unwrap().registers.get(0x220) >> 19 & 1;
        assert_eq!(requested, 1, "round {round}");

        let twin = Machine::new(kvm, 1, Split, MapAccess::WRITE);
        copy_ram(&machine, &twin);
        let mut cpu = twin.partition.create_vcpu(0, &twin.model).unwrap();
        twin.partition.load(&board).unwrap();
        cpu.set(StateSet::all(), &state).unwrap();
        let watchdog = watchdog(cpu.as_ref());
        assert_eq!(cpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped, "round {round}");
        drop(watchdog);
        assert_eq!(twin.read_u64(DATA), 1, "round {round}");
    }
}

#[test]
fn a_state_that_the_chips_cannot_be_in_is_refused_and_changes_nothing() {
    let _turn = turn();
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 1, Split, MapAccess::WRITE);
    let before = machine.partition.save().unwrap();
    let mut bad = before.clone();
    bad.pic.primary.imr = 0x55;
    bad.ioapic.levels = 1 << 24;
    assert!(matches!(machine.partition.load(&bad), Err(HypervisorError::State { .. })));
    assert_eq!(machine.partition.save().unwrap().pic, before.pic);
}

/// A program that the host starts must not inherit a machine.
#[test]
fn every_descriptor_of_a_machine_is_closed_on_exec() {
    let Some(kvm) = kvm() else { return };
    let _turn = turn();
    let descriptors = || -> Vec<i32> {
        let entries = fs::read_dir("/proc/self/fd").unwrap();
        entries.filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok()).collect()
    };
    let inherited = descriptors();
    let machine = Machine::new(kvm, 1, Split, MapAccess::WRITE);
    let _vcpu = machine.partition.create_vcpu(0, &machine.model).unwrap();
    let own = descriptors().into_iter().filter(|fd| !inherited.contains(fd));
    let open: Vec<_> = own.filter_map(|fd| Some((fd, is_closed_on_exec(fd)?))).collect();
    assert!(open.len() > 3, "{open:?}");
    for (fd, closed_on_exec) in open {
        let target = fs::read_link(format!("/proc/self/fd/{fd}"));
        assert!(closed_on_exec, "{target:?}");
    }
}

#[allow(unsafe_code, reason = "fcntl has no safe wrapper")]
fn is_closed_on_exec(fd: i32) -> Option<bool> {
    // SAFETY: no preconditions; a descriptor that is closed by now is an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    (flags >= 0).then_some(flags & libc::FD_CLOEXEC != 0)
}
