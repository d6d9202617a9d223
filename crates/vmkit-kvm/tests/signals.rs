//! Machines are made whatever signals the host program's own timers send. A process of its own, for the
//! signal's handler is the process's.

#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unsafe_code, reason = "signals and timers have no safe wrapper")]

mod common;

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use common::kvm;
use libc::{c_int, itimerspec, timespec};
use vmkit_device::MonotonicClock;
use vmkit_hypervisor::{Hypervisor, InterruptControllers, PartitionSpec};

/// Fewer than the attempts that are made, so that the outcome does not depend on the host's speed.
const SIGNALS_PER_MACHINE: i32 = 50;
const MACHINES: usize = 400;
const EVERY_NS: i64 = 50_000;

static LEFT: AtomicI32 = AtomicI32::new(0);
static TIMER: AtomicUsize = AtomicUsize::new(0);

/// Sends the signal to this thread every so often; 0 is never.
fn arm(every_ns: i64) {
    let every = timespec { tv_sec: 0, tv_nsec: every_ns };
    let times = itimerspec { it_interval: every, it_value: every };
    let timer = TIMER.load(Ordering::SeqCst) as libc::timer_t;
    // SAFETY: the timer was made by `make_timer` and stays; `times` is only read.
    unsafe { libc::timer_settime(timer, 0, &times, ptr::null_mut()) };
}

extern "C" fn count(_: c_int) {
    if LEFT.fetch_sub(1, Ordering::SeqCst) <= 1 {
        arm(0);
    }
}

fn make_timer() {
    // SAFETY: all-zero structures are valid; the handler uses atomics and `timer_settime`, which is
    // async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = count as extern "C" fn(c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGALRM, &action, ptr::null_mut()), 0);
        let mut event: libc::sigevent = MaybeUninit::zeroed().assume_init();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer: libc::timer_t = ptr::null_mut();
        assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer), 0);
        TIMER.store(timer as usize, Ordering::SeqCst);
    }
}

#[test]
fn a_machine_is_made_under_a_rain_of_signals() {
    let Some(kvm) = kvm() else { return };
    make_timer();
    let mut failed = Vec::new();
    for machine in 0..MACHINES {
        let mut spec = PartitionSpec::new(1, Arc::new(MonotonicClock::new()));
        spec.interrupt_controllers = InterruptControllers::None;
        LEFT.store(SIGNALS_PER_MACHINE, Ordering::SeqCst);
        arm(EVERY_NS);
        let outcome = kvm.create(&spec);
        arm(0);
        failed.extend(outcome.err().map(|error| (machine, error.to_string())));
    }
    assert!(failed.is_empty(), "{} of {MACHINES}: {:?}", failed.len(), failed.first());
}
