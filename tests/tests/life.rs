//! Starting, pausing, stopping and dropping machines, on every backend of this host.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::io::{PipeReader, Read};
use std::time::Duration;

use vmkit::memory::{Bytes, GuestAddress, GuestRam};
use vmkit::{BackendKind, DirtyLog, End, OutputProbe, RunningVm, Serial, SerialOutput, StateSet};
use vmkit_tests::guests::{
    self, COUNTER, KVMCLOCK, counting, counting_by_kvmclock, long_mode, spin,
};
use vmkit_tests::{PATIENCE, backends, bare, end_of};

fn counter(memory: &GuestRam) -> u64 {
    memory.read_obj(GuestAddress(COUNTER)).unwrap()
}

/// Waits until the guest counts past `past`.
fn await_counting(memory: &GuestRam, past: u64) -> u64 {
    let began = std::time::Instant::now();
    loop {
        let now = counter(memory);
        if now > past {
            return now;
        }
        assert!(began.elapsed() < PATIENCE, "the guest does not count past {past}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_host_stops_a_guest_that_spins() {
    for backend in backends() {
        let vm = bare(backend, long_mode(spin)).build().unwrap().start().unwrap();
        assert!(vm.wait_timeout(Duration::from_millis(20)).unwrap().is_none(), "{backend}");
        assert_eq!(vm.stop().unwrap(), End::Stopped, "{backend}");
        assert_eq!(vm.wait().unwrap(), End::Stopped, "{backend}: a later wait says the same");
    }
}

#[test]
fn a_handle_stops_a_blocking_run_from_another_thread() {
    for backend in backends() {
        let vm = bare(backend, long_mode(spin)).build().unwrap();
        let handle = vm.handle();
        let stopper = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            handle.stop();
        });
        assert_eq!(vm.run().unwrap(), End::Stopped, "{backend}");
        stopper.join().unwrap();
    }
}

#[test]
fn nothing_moves_during_a_pause_and_all_goes_on_after_it() {
    for backend in backends() {
        let vm = bare(backend, long_mode(counting)).build().unwrap().start().unwrap();
        let memory = vm.memory();
        let mut before = await_counting(&memory, 0);
        for _ in 0..5 {
            let paused = vm.pause();
            let at = counter(paused.memory());
            assert!(at >= before, "{backend}");
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(counter(&memory), at, "{backend}: the guest runs during a pause");
            paused.resume().unwrap();
            before = await_counting(&memory, at);
        }
        vm.stop().unwrap();
    }
}

/// A guest that writes for ever to a pipe, started; what it has written; and the pipe.
fn printing(backend: BackendKind) -> (RunningVm, OutputProbe, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let serial = Serial::com1().output(SerialOutput::writer(writer));
    let probe = serial.probe();
    let vm = bare(backend, long_mode(guests::print)).device(serial).build().unwrap();
    (vm.start().unwrap(), probe, reader)
}

/// Waits until the guest does not get any further, which is when the pipe is full. A machine that is
/// loaded enough to deceive this makes the tests easier and no less right.
fn await_full(probe: &OutputProbe) {
    let began = std::time::Instant::now();
    let mut before = 0;
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let written = probe.written();
        if written > 0 && written == before {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "the pipe does not get full");
        before = written;
    }
}

/// Calls `act`, which must end.
fn ends<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(act()));
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{what} does not end"))
}

#[test]
fn output_that_nobody_reads_holds_up_neither_a_pause_nor_the_end() {
    for backend in backends() {
        let (vm, probe, mut reader) = printing(backend);
        await_full(&probe);
        let vm = ends("a pause", move || {
            vm.pause().resume().unwrap();
            vm
        });
        let handle = vm.handle();
        let vm = ends("a wait", move || {
            std::thread::spawn(move || handle.stop());
            assert_eq!(vm.wait().unwrap(), End::Stopped, "{backend}");
            vm
        });
        assert_eq!(probe.lost(), 0, "{backend}");
        ends("a drop", move || drop(vm));
        // What came arrives in order, after the pause as before it.
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() as u64 >= probe.written(), "{backend}");
        assert!(bytes.iter().zip(0_usize..).all(|(&b, at)| b == at as u8), "{backend}");

        let (vm, probe, _reader) = printing(backend);
        await_full(&probe);
        ends("a drop", move || drop(vm));
    }
}

#[test]
fn a_pause_costs_no_output() {
    for backend in backends() {
        let (vm, probe, mut reader) = printing(backend);
        await_full(&probe);
        let vm = ends("a pause", move || {
            vm.pause().resume().unwrap();
            vm
        });
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let before = probe.written();
        let began = std::time::Instant::now();
        while probe.written() <= before + (100 << 10) {
            assert!(began.elapsed() < PATIENCE, "{backend}: the guest does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(vm);
        let bytes = reader.join().unwrap();
        assert_eq!((bytes.len() as u64, probe.lost()), (probe.written(), 0), "{backend}");
        assert!(bytes.iter().zip(0_usize..).all(|(&b, at)| b == at as u8), "{backend}");
    }
}

/// KVM's clocks run on in a pause: Linux's watchdogs would blame the guest for the time.
#[test]
fn a_guest_on_kvm_is_told_that_it_was_paused() {
    const FLAGS: u64 = KVMCLOCK + 29;
    const STOPPED: u8 = 2;
    if !backends().contains(&BackendKind::Kvm) {
        return;
    }
    let guest = long_mode(counting_by_kvmclock);
    let vm = bare(BackendKind::Kvm, guest).build().unwrap().start().unwrap();
    let memory = vm.memory();
    let flags = || memory.read_obj::<u8>(GuestAddress(FLAGS)).unwrap();
    await_counting(&memory, 0);
    assert_eq!(flags() & STOPPED, 0);
    vm.pause().resume().unwrap();
    let began = std::time::Instant::now();
    while flags() & STOPPED == 0 {
        assert!(began.elapsed() < PATIENCE, "the guest is not told");
        std::thread::sleep(Duration::from_millis(1));
    }
    vm.stop().unwrap();
}

#[test]
fn a_dropped_guard_resumes_and_pauses_overlap() {
    for backend in backends() {
        let vm = bare(backend, long_mode(counting)).build().unwrap().start().unwrap();
        let memory = vm.memory();
        await_counting(&memory, 0);
        let (first, second) = (vm.pause(), vm.pause());
        drop(first);
        let at = counter(&memory);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(counter(&memory), at, "{backend}: the second pause holds");
        drop(second);
        await_counting(&memory, at);
    }
}

#[test]
fn a_paused_machine_shows_and_takes_state() {
    for backend in backends() {
        let guest = long_mode(|code| {
            use iced_x86::code_asm::{al, qword_ptr, rax, rcx};
            code.mov(rcx, 0x1234_5678_9ABC_u64).unwrap();
            code.mov(qword_ptr(COUNTER), 1).unwrap();
            let mut again = code.create_label();
            code.set_label(&mut again).unwrap();
            code.test(rax, rax).unwrap();
            code.je(again).unwrap();
            code.out(0xF4, al).unwrap();
        });
        let vm = bare(backend, guest).build().unwrap().start().unwrap();
        await_counting(&vm.memory(), 0);
        let paused = vm.pause();
        let mut state = paused.vcpu_state(0).unwrap();
        assert_eq!(state.general.rcx(), 0x1234_5678_9ABC, "{backend}");
        assert!(paused.vcpu_state(1).is_err());
        state.general.set_rax(9);
        paused.set_vcpu_state(0, StateSet::GENERAL, &state).unwrap();
        paused.partition_state().unwrap();
        assert_eq!(paused.device_sections().len(), 1);
        paused.resume().unwrap();
        assert_eq!(end_of(&vm), End::ExitCode(19), "{backend}");
        let state = vm.pause().vcpu_state(0).unwrap();
        assert_eq!(state.general.rax(), 9, "{backend}: the state after the end");
    }
}

#[test]
fn the_dirty_log_of_either_kind_names_the_pages_that_were_written() {
    for backend in backends() {
        for kind in [DirtyLog::Bitmap, DirtyLog::Ring] {
            let vm = bare(backend, long_mode(counting)).dirty_log(kind).build().unwrap();
            let vm = vm.start().unwrap();
            await_counting(&vm.memory(), 0);
            let written = || {
                let paused = vm.pause();
                let at = counter(paused.memory());
                let dirty = paused.take_dirty().unwrap();
                assert!(paused.take_dirty().unwrap().iter().all(|(_, pages)| pages.count() == 0));
                let [(GuestAddress(0), pages)] = dirty.as_slice() else {
                    panic!("{backend}: not the one region there is: {dirty:?}");
                };
                (at, pages.pages().collect::<Vec<_>>())
            };
            // The loader's pages among them.
            let (at, first) = written();
            assert!(first.len() > 1 && first.contains(&(COUNTER >> 12)), "{backend}, {kind:?}");
            await_counting(&vm.memory(), at);
            assert_eq!(written().1, [COUNTER >> 12], "{backend}, {kind:?}");
            vm.stop().unwrap();
        }
        let vm = bare(backend, long_mode(counting)).build().unwrap().start().unwrap();
        assert!(vm.pause().take_dirty().unwrap().is_empty(), "{backend}");
    }
}

#[test]
fn two_machines_run_at_once() {
    for backend in backends() {
        let a = bare(backend, long_mode(counting)).build().unwrap().start().unwrap();
        let b = bare(backend, long_mode(counting)).build().unwrap().start().unwrap();
        let (at_a, at_b) = (await_counting(&a.memory(), 0), await_counting(&b.memory(), 0));
        await_counting(&a.memory(), at_a);
        await_counting(&b.memory(), at_b);
        assert_eq!(a.stop().unwrap(), End::Stopped);
        await_counting(&b.memory(), counter(&b.memory()));
        assert_eq!(b.stop().unwrap(), End::Stopped);
    }
}

#[test]
fn the_timeline_is_in_order_and_kicks_bring_figures_up_to_date() {
    for backend in backends() {
        let vm = bare(backend, long_mode(guests::counting)).build().unwrap().start().unwrap();
        await_counting(&vm.memory(), 0);
        let exits = vm.vcpu_stats()[0].exits;
        let began = std::time::Instant::now();
        while vm.vcpu_stats()[0].exits == exits {
            assert!(began.elapsed() < PATIENCE);
            vm.kick();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(vm.instructions().is_some(), vm.capabilities().counts_instructions);
        assert_ne!(vm.instructions(), Some(0));
        vm.stop().unwrap();
        let times = vm.timeline();
        let order = [
            Some(times.build_began),
            Some(times.load_began),
            Some(times.loaded),
            Some(times.built),
            times.first_instruction,
            times.ended,
        ];
        assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{backend}: {times:?}");
    }
}
