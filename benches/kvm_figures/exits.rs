//! The cost of an exit: of a vCPU alone with callbacks that count, and of a whole machine with a device
//! on its bus, each beside the bare loop.

use std::sync::mpsc::channel;
use std::time::Duration;

use vmkit::boot::{CpuMode, Flat};
use vmkit::{Backend, Vm};
use vmkit_benches::bare::Bare;
use vmkit_benches::guests;
use vmkit_benches::machine::Machine;

use crate::counter::Counter;
use crate::median;

/// Measurements of each, and exits in one.
const ROUNDS: usize = 15;
const EXITS: u64 = 2000;

pub fn print() {
    // A monitor's process has threads, and then each call into the kernel looks its descriptor up with
    // more care: for all three alike.
    let (stay, parked) = channel::<()>();
    let parked = std::thread::spawn(move || parked.recv());
    let kvm = vmkit_kvm::KvmHypervisor::open().unwrap();
    println!(
        "{:<14}{:>10}{:>10}{:>8}{:>12}{:>8}",
        "exit", "bare ns", "vCPU ns", "ratio", "machine ns", "ratio"
    );
    for (name, guest) in guests::EXITS {
        let mut bare = Bare::new(guest);
        let mut vcpu = Machine::new(&kvm, guest);
        let (mut floor, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            floor.push(bare.exits(EXITS));
            ours.push(vcpu.exits(EXITS));
        }
        row(name, median(floor), median(ours), Some(median(machine(guest))));
    }
    let mut bare = Bare::with_doorbell();
    let mut vcpu = Machine::with_doorbell(&kvm).unwrap();
    let (mut floor, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        floor.push(bare.doorbells(EXITS));
        ours.push(vcpu.doorbells(EXITS));
    }
    row("doorbell", median(floor), median(ours), None);
    drop(stay);
    let _ = parked.join().unwrap();
}

fn row(name: &str, bare: Duration, vcpu: Duration, machine: Option<Duration>) {
    let each = |time: Duration| time.as_secs_f64() * 1e9 / EXITS as f64;
    let ratio = |time: Duration| time.as_secs_f64() / bare.as_secs_f64();
    print!("{name:<14}{:>10.0}{:>10.0}{:>8.3}", each(bare), each(vcpu), ratio(vcpu));
    match machine {
        Some(machine) => println!("{:>12.0}{:>8.3}", each(machine), ratio(machine)),
        None => println!(),
    }
}

/// The times of exits of a whole machine, answered by a device.
fn machine(guest: &[u8]) -> Vec<Duration> {
    let (to, noted) = channel();
    let vm = Vm::builder()
        .memory(guests::RAM)
        .backend(Backend::Kvm)
        .bare()
        .boot(Flat::at(guests::START, guest.to_vec()).mode(CpuMode::Real16))
        .device(Counter { every: EXITS, times: ROUNDS as u64 + 1, page: true, to })
        .build()
        .unwrap();
    vm.run().unwrap();
    let noted: Vec<_> = noted.into_iter().collect();
    noted.windows(2).map(|pair| pair[1] - pair[0]).collect()
}
