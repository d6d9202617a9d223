//! Starting, pausing, stopping and dropping machines, on every backend of this host.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::time::Duration;

use vmkit::memory::{Bytes, GuestAddress, GuestRam};
use vmkit::{DirtyLog, End, StateSet};
use vmkit_tests::guests::{self, COUNTER, counting, long_mode, spin};
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
