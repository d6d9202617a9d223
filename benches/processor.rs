//! The software processor's speed: guest instructions per second of small programs.
//!
//! `cargo bench -p vmkit-benches --bench processor`. Throughput is in guest instructions
//! ("elements"), so that `Melem/s` reads as MIPS.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vmkit::boot::Flat;
use vmkit::{Backend, DebugExit, End, Vm};
use vmkit_benches::programs::{BASE, EXIT_PORT, PROGRAMS, Program};

/// Runs `repetitions` of `program`; the time it took and the instructions it executed.
fn run(program: &Program, repetitions: u64) -> (Duration, u64) {
    let code = program.assemble(repetitions).unwrap();
    let vm = Vm::builder()
        .memory(16 << 20)
        .backend(Backend::Software)
        .bare()
        .boot(Flat::at(BASE, code))
        .device(DebugExit::at(EXIT_PORT))
        .build()
        .unwrap();
    let start = Instant::now();
    let running = vm.start().unwrap();
    assert_eq!(running.wait().unwrap(), End::ExitCode(1), "{}", program.name);
    (start.elapsed(), running.instructions().unwrap())
}

fn processor(c: &mut Criterion) {
    let mut group = c.benchmark_group("processor");
    group.sample_size(10).measurement_time(Duration::from_secs(3));
    for program in PROGRAMS {
        const REPETITIONS: u64 = 1000;
        let (_, instructions) = run(program, REPETITIONS);
        group.throughput(Throughput::Elements(instructions / REPETITIONS));
        group.bench_function(program.name, |b| b.iter_custom(|n| run(program, n).0));
    }
    group.finish();
}

criterion_group!(benches, processor);
criterion_main!(benches);
