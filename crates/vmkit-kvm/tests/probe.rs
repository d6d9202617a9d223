//! The probe on whatever KVM this machine has.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::time::{Duration, Instant};

use vmkit_kvm::{KvmHypervisor, ProbeFailure, can_run_simple_guests, probe};

#[test]
fn the_probe_answers_quickly_and_with_a_reason() {
    let start = Instant::now();
    let outcome = probe();
    let took = start.elapsed();
    eprintln!(
        "probe after {took:?}: {}",
        outcome.as_ref().map_or_else(ToString::to_string, |()| "usable".into())
    );
    assert!(took < Duration::from_secs(30));
    if let Err(ProbeFailure::Failed { source, .. }) = outcome {
        assert!(source.to_string().contains("instruction at"), "{source}");
    }
}

#[test]
fn a_kvm_that_runs_kernels_runs_simple_guests() {
    let Ok(kvm) = KvmHypervisor::open() else {
        eprintln!("no KVM here: nothing to test");
        return;
    };
    let simple = can_run_simple_guests();
    eprintln!("simple guests: {simple:?}");
    if kvm.probe().is_ok() {
        simple.unwrap();
    }
}
