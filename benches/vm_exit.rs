//! What a VM exit costs: on KVM beside a loop of bare ioctls, and on the software processor.
//!
//! `cargo bench -p vmkit-benches --bench vm_exit`. Times are per exit (or per round trip, for HLT and
//! interrupts). The bare loop does what any monitor must: KVM_RUN, look at the reason, again.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::time::Duration;

use criterion::{
    BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime,
};
use vmkit_benches::bare::Bare;
use vmkit_benches::guests;
use vmkit_benches::machine::Machine;
use vmkit_hypervisor::Hypervisor;

/// A group of one thing, through vmkit and, on KVM, on bare ioctls.
fn group<'a>(c: &'a mut Criterion, backend: &str, what: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(format!("{backend}/{what}"));
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    group
}

const OURS: &str = "vmkit";
const BARE: &str = "bare ioctls";

fn backend(c: &mut Criterion, name: &str, hypervisor: &dyn Hypervisor, bare: bool) {
    for (exit, guest) in guests::EXITS {
        let mut group = group(c, name, exit);
        let mut machine = Machine::new(hypervisor, guest);
        group.bench_function(OURS, |b| b.iter_custom(|n| machine.exits(n)));
        if bare {
            let mut bare = Bare::new(guest);
            group.bench_function(BARE, |b| b.iter_custom(|n| bare.exits(n)));
        }
    }
    state(c, name, hypervisor, bare);
    interrupts(c, name, hypervisor, bare);
    if let Some(mut machine) = Machine::with_doorbell(hypervisor) {
        let mut group = group(c, name, "doorbell");
        group.bench_function(OURS, |b| b.iter_custom(|n| machine.doorbells(n)));
        if bare {
            let mut bare = Bare::with_doorbell();
            group.bench_function(BARE, |b| b.iter_custom(|n| bare.doorbells(n)));
        }
    }
}

fn state(c: &mut Criterion, name: &str, hypervisor: &dyn Hypervisor, bare: bool) {
    let mut machine = Machine::new(hypervisor, guests::PORT_WRITE);
    machine.get();
    let mut ioctls = bare.then(|| Bare::new(guests::PORT_WRITE));
    {
        let mut group = group(c, name, "get state");
        group.bench_function(OURS, |b| b.iter(|| machine.get()));
        if let Some(bare) = &mut ioctls {
            group.bench_function(BARE, |b| b.iter(|| bare.get()));
        }
    }
    {
        let mut group = group(c, name, "set state");
        group.bench_function(OURS, |b| b.iter(|| machine.set()));
        if let Some(bare) = &mut ioctls {
            group.bench_function(BARE, |b| b.iter(|| bare.set()));
        }
    }
    let mut group = group(c, name, "get general registers");
    group.bench_function(OURS, |b| b.iter(|| machine.get_general()));
    if let Some(bare) = &mut ioctls {
        group.bench_function(BARE, |b| b.iter(|| bare.get_general()));
    }
}

fn interrupts(c: &mut Criterion, name: &str, hypervisor: &dyn Hypervisor, bare: bool) {
    {
        let mut group = group(c, name, "wake from HLT to handler");
        let mut machine = Machine::halting(hypervisor);
        group.bench_function(OURS, |b| b.iter_custom(|n| machine.wakes(n)));
        if bare {
            let mut bare = Bare::halting();
            group.bench_function(BARE, |b| b.iter_custom(|n| bare.wakes(n)));
        }
    }
    if let Some(mut machine) = Machine::with_irqfd(hypervisor) {
        let mut group = group(c, name, "irqfd to handler");
        group.bench_function(OURS, |b| b.iter_custom(|n| machine.irqfds(n)));
        if bare {
            let mut bare = Bare::with_irqfd();
            group.bench_function(BARE, |b| b.iter_custom(|n| bare.irqfds(n)));
        }
    }
}

fn kvm(c: &mut Criterion) {
    let kvm = match vmkit_kvm::KvmHypervisor::open() {
        Ok(kvm) => kvm,
        Err(e) => return println!("KVM is left out: {e}"),
    };
    if let Err(e) = kvm.can_run_simple_guests() {
        return println!("KVM is left out: {e}");
    }
    backend(c, "kvm", &kvm, true);
}

fn software(c: &mut Criterion) {
    backend(c, "software", &vmkit_soft::SoftHypervisor::new(), false);
}

criterion_group!(benches, kvm, software);
criterion_main!(benches);
