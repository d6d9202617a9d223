//! From nothing to a guest's first exit: through `Vm::builder()`, and by the ioctls that are needed for it.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use vmkit::boot::{CpuMode, Flat};
use vmkit::{Backend, Chipset, Vm};
use vmkit_benches::bare::Bare;
use vmkit_benches::guests;
use vmkit_memory::{Backing, Bytes, GuestAddress, RamLayout};

use crate::counter::Counter;
use crate::{median, ms};

const ROUNDS: usize = 9;
/// Guest memory in bytes.
const MEMORY: u64 = 256 << 20;

pub fn print() {
    let mut parts = [Vec::new(), Vec::new(), Vec::new()];
    let (mut floor, mut bare_chipset, mut pc) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        floor.push(bare());
        bare_chipset.push(ours(Chipset::Bare, None));
        pc.push(ours(Chipset::Pc, Some(&mut parts)));
    }
    let floor = median(floor);
    let row = |name: &str, time: Duration| {
        println!("{name:<34}{:>8.2} ms{:>8.3}", ms(time), time.as_secs_f64() / floor.as_secs_f64());
    };
    println!("{:<34}{:>11}{:>8}", "to the first exit", "", "ratio");
    row("bare ioctls", floor);
    row("Vm::builder(), bare chipset", median(bare_chipset));
    row("Vm::builder(), PC chipset", median(pc));
    let parts = parts.map(median).map(ms);
    println!(
        "of the last: {:.2} ms build, {:.2} ms to the run, {:.2} ms in it",
        parts[0], parts[1], parts[2]
    );
}

fn bare() -> Duration {
    let start = Instant::now();
    let ram = vmkit_memory::allocate(&RamLayout::pc(MEMORY).unwrap(), Backing::Memfd).unwrap();
    ram.write_slice(guests::PORT_WRITE, GuestAddress(guests::START)).unwrap();
    let mut bare = Bare::with_memory(ram, MEMORY);
    bare.exits(1);
    start.elapsed()
}

fn ours(chipset: Chipset, parts: Option<&mut [Vec<Duration>; 3]>) -> Duration {
    let (to, noted) = channel();
    let start = Instant::now();
    let vm = Vm::builder()
        .memory(MEMORY)
        .backend(Backend::Kvm)
        .chipset(chipset)
        .boot(Flat::at(guests::START, guests::PORT_WRITE.to_vec()).mode(CpuMode::Real16))
        .device(Counter { every: 1, times: 1, page: false, to })
        .build()
        .unwrap();
    let vm = vm.start().unwrap();
    let exit = noted.recv().unwrap();
    vm.wait().unwrap();
    if let Some([build, run, inside]) = parts {
        let timeline = vm.timeline();
        let first = timeline.first_instruction.unwrap();
        build.push(timeline.built - start);
        run.push(first - timeline.built);
        inside.push(exit - first);
    }
    exit - start
}
