//! Dirty rings: what a bitmap cannot do wrong. (What both do alike is in the conformance suite, which
//! runs on either.)

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{DATA, Machine, Recorder};
use vmkit_device::MonotonicClock;
use vmkit_hypervisor::guest_memory::{
    Backing, Bytes, DirtyBitmap, GuestAddress, MemoryRegion, MemoryRegionAddress, region_at,
};
use vmkit_hypervisor::{DirtyLog, Hypervisor, MapAccess, MapId, PartitionSpec, Vcpu, VmExit};

/// Where the tracked mapping is, and its pages: more than a ring holds.
const WINDOW: u64 = 0x100_0000;
const PAGES: u64 = 3 * 4096;

/// A machine with rings, if this KVM has them. (A KVM that runs guests in its instruction emulator
/// does not stop them in time.)
fn machine(vcpus: u32) -> Option<Machine> {
    let kvm = common::true_kvm()?;
    if !kvm.capabilities().dirty_ring {
        eprintln!("SKIPPED: this KVM has no dirty rings");
        return None;
    }
    let mut spec = PartitionSpec::new(vcpus, Arc::new(MonotonicClock::new()));
    spec.dirty_log = DirtyLog::Ring;
    Some(Machine::of(kvm, &spec, MapAccess::WRITE))
}

fn window() -> Arc<MemoryRegion> {
    Arc::new(region_at(GuestAddress(WINDOW), PAGES << 12, Backing::Memfd).unwrap())
}

fn track(machine: &Machine) -> MapId {
    let access = MapAccess::WRITE | MapAccess::TRACK_DIRTY;
    machine.partition.map(GuestAddress(WINDOW), window(), access).unwrap()
}

fn dirty(machine: &Machine, id: MapId) -> Vec<u64> {
    let mut bitmap = DirtyBitmap::for_bytes(PAGES << 12);
    machine.partition.take_dirty(id, &mut bitmap).unwrap();
    bitmap.pages().collect()
}

fn run_to_stop(vcpu: &mut dyn Vcpu) {
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
}

// Writes to every page of the window, and stops; over and over.
guest_program!(write_all:
    "3: mov edi, 0x1000000",
    "2: mov byte ptr [rdi], 1",
    "add edi, 0x1000",
    "cmp edi, 0x4000000",
    "jb 2b",
    "out 0xF4, al",
    "jmp 3b",
);

#[test]
fn a_guest_that_writes_more_than_its_ring_holds_loses_no_page() {
    let Some(machine) = machine(1) else { return };
    let id = track(&machine);
    let mut vcpu = machine.vcpu(0, write_all());
    for round in 0..3 {
        run_to_stop(vcpu.as_mut());
        assert_eq!(dirty(&machine, id).len() as u64, PAGES, "round {round}");
        assert!(dirty(&machine, id).is_empty(), "round {round}");
    }
}

#[test]
fn what_a_former_mapping_wrote_is_not_its_successors() {
    let Some(machine) = machine(1) else { return };
    let first = track(&machine);
    let mut vcpu = machine.vcpu(0, write_all());
    run_to_stop(vcpu.as_mut());
    machine.partition.unmap(first).unwrap();
    let second = track(&machine);
    assert!(dirty(&machine, second).is_empty());
    run_to_stop(vcpu.as_mut());
    assert_eq!(dirty(&machine, second).len() as u64, PAGES);
}

// Counts at the window's start until told to stop.
guest_program!(write_on:
    "mov edi, 0x1000000",
    "2: inc dword ptr [rdi]",
    "pause",
    "cmp dword ptr [0x90000], 0",
    "je 2b",
    "out 0xF4, al",
);

#[test]
fn the_log_is_taken_from_a_running_vcpu() {
    let Some(machine) = machine(1) else { return };
    let id = track(&machine);
    let mut vcpu = machine.vcpu(0, write_on());
    let runner = thread::spawn(move || {
        run_to_stop(vcpu.as_mut());
        vcpu
    });
    // Each time it writes on, and is seen to: taking the log has KVM watch the page again.
    for _ in 0..20 {
        let seen = (0..6000).any(|_| {
            thread::sleep(Duration::from_millis(5));
            dirty(&machine, id) == [0]
        });
        assert!(seen);
    }
    machine.ram.write_obj(1_u32, MemoryRegionAddress(DATA)).unwrap();
    runner.join().unwrap();
}

#[test]
fn a_ring_that_kvm_overran_is_an_error() {
    let Some(kvm) = common::kvm() else { return };
    if common::true_kvm().is_some() || !kvm.capabilities().dirty_ring {
        eprintln!("SKIPPED: this KVM overruns no ring");
        return;
    }
    let mut spec = PartitionSpec::new(1, Arc::new(MonotonicClock::new()));
    spec.dirty_log = DirtyLog::Ring;
    let machine = Machine::of(kvm, &spec, MapAccess::WRITE);
    let id = track(&machine);
    let mut vcpu = machine.vcpu(0, write_all());
    // Either it tells of all pages, or it says that it cannot.
    if vcpu.run(&mut Recorder::default()).is_ok() {
        let mut bitmap = DirtyBitmap::for_bytes(PAGES << 12);
        if machine.partition.take_dirty(id, &mut bitmap).is_ok() {
            assert_eq!(bitmap.pages().count() as u64, PAGES);
        }
    }
}
