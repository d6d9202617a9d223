//! Kicks: sticky, never lost, from any thread.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]
#![allow(unsafe_code, reason = "signals have no safe wrapper")]

mod common;

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, Recorder, kvm};
use vmkit_hypervisor::{InterruptControllers, IoFlow, MapAccess, VcpuIo, VmExit};
use vmkit_kvm::KickSignal;

guest_program!(spin: "2: jmp 2b");
guest_program!(ports: "2: out 0x10, al", "jmp 2b");
guest_program!(sleep: "2: hlt", "jmp 2b");
guest_program!(stop: "2: out 0xF4, al", "jmp 2b");

#[test]
fn a_kick_before_the_run_ends_it_once() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, stop());
    let mut io = Recorder::default();
    let kick = vcpu.kick();
    kick.kick();
    kick.kick();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Kicked);
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
}

#[test]
fn a_kick_ends_a_spinning_guest_and_a_sleeping_one() {
    let Some(kvm) = kvm() else { return };
    for program in [spin(), sleep()] {
        let (_machine, mut vcpu) = Machine::with_program(kvm, program);
        let kick = vcpu.kick();
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            kick.kick();
        });
        assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Kicked);
        kicker.join().unwrap();
    }
}

/// The embedder puts back a signal mask of its own after a run.
#[test]
fn a_kick_ends_a_run_on_a_thread_that_blocks_signals() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, spin());
    let kick = vcpu.kick();
    kick.kick();
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Kicked);
    let signal = KickSignal::default().number();
    block(signal);
    // Another signal ends a run that the kick's does not reach, so that this fails and does not hang.
    let rescue = KickSignal::realtime(7).unwrap().number();
    handle(rescue);
    // SAFETY: no preconditions.
    let runner = unsafe { libc::pthread_self() };
    let ended = AtomicBool::new(false);
    let rescued = thread::scope(|scope| {
        let kicker = scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            kick.kick();
            let kicked = Instant::now();
            while !ended.load(Ordering::SeqCst) {
                if kicked.elapsed() > Duration::from_secs(20) {
                    // SAFETY: the runner waits for this thread, so it exists.
                    unsafe { libc::pthread_kill(runner, rescue) };
                    return true;
                }
                thread::sleep(Duration::from_millis(5));
            }
            false
        });
        assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Kicked);
        ended.store(true, Ordering::SeqCst);
        kicker.join().unwrap()
    });
    assert!(!rescued, "the kick did not end the run");
}

fn block(signal: i32) {
    // SAFETY: sigemptyset initialises the set it is given, the two calls after it read it.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut()), 0);
    }
}

fn handle(signal: i32) {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: an all-zero sigaction is valid, and the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
    }
}

/// The kick is given from inside a callback, and the callback stops the run for its own reason.
#[test]
fn a_kick_during_a_stopped_run_ends_the_next() {
    struct KickAndStop(vmkit_hypervisor::Kick);
    impl VcpuIo for KickAndStop {
        fn pio_read(&mut self, _: u16, _: &mut [u8]) -> IoFlow {
            IoFlow::Continue
        }
        fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
            self.0.kick();
            IoFlow::Stop
        }
        fn mmio_read(&mut self, _: u64, _: &mut [u8]) -> IoFlow {
            IoFlow::Continue
        }
        fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
            IoFlow::Continue
        }
    }
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, stop());
    let mut io = KickAndStop(vcpu.kick());
    for _ in 0..100 {
        assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
        assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Kicked);
    }
}

/// One thread kicks and waits for the run to end, again and again, at moments that drift over the
/// whole cycle: any window in which a kick is lost shows as a hang, which the watchdog reports.
fn no_kick_is_lost(program: &[u8], rounds: u64) {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, program);
    let ended = Arc::new(AtomicU64::new(0));
    let gave_up = Arc::new(AtomicBool::new(false));
    let kicker = thread::spawn({
        let (kick, ended, gave_up) = (vcpu.kick(), ended.clone(), gave_up.clone());
        move || {
            for round in 0..rounds {
                for _ in 0..round % 97 * 8 {
                    std::hint::spin_loop();
                }
                kick.kick();
                let start = Instant::now();
                while ended.load(Ordering::Acquire) <= round {
                    if start.elapsed() > Duration::from_secs(20) {
                        gave_up.store(true, Ordering::Release);
                        kick.kick();
                        return;
                    }
                    thread::yield_now();
                }
            }
        }
    });
    let mut io = Recorder::default();
    while ended.load(Ordering::Acquire) < rounds && !gave_up.load(Ordering::Acquire) {
        io.log.clear();
        assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Kicked);
        ended.fetch_add(1, Ordering::AcqRel);
    }
    kicker.join().unwrap();
    assert!(!gave_up.load(Ordering::Acquire), "a kick was lost in round {ended:?}");
}

#[test]
fn no_kick_is_lost_while_the_guest_spins() {
    no_kick_is_lost(spin(), 2_000);
}

#[test]
fn no_kick_is_lost_between_exits() {
    no_kick_is_lost(ports(), 2_000);
}

#[test]
fn no_kick_is_lost_while_the_guest_sleeps() {
    no_kick_is_lost(sleep(), 2_000);
}

#[test]
fn a_vcpu_runs_on_whichever_thread_calls() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, spin());
    for _ in 0..20 {
        let kick = vcpu.kick();
        let runner = thread::spawn(move || {
            let exit = vcpu.run(&mut Recorder::default()).unwrap();
            (vcpu, exit)
        });
        kick.kick();
        let (back, exit) = runner.join().unwrap();
        vcpu = back;
        assert_eq!(exit, VmExit::Kicked);
    }
}

#[test]
fn a_kick_works_on_a_waiting_secondary_vcpu_and_after_the_vcpu_is_gone() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(kvm, 2, InterruptControllers::Full, MapAccess::WRITE);
    let mut waiting = machine.partition.create_vcpu(1, &machine.model).unwrap();
    let kick = waiting.kick();
    let kicker = thread::spawn({
        let kick = kick.clone();
        move || {
            thread::sleep(Duration::from_millis(30));
            kick.kick();
        }
    });
    assert_eq!(waiting.run(&mut Recorder::default()).unwrap(), VmExit::Kicked);
    kicker.join().unwrap();
    drop(waiting);
    kick.kick();
}
