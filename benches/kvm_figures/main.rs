//! What KVM costs through vmkit beside bare ioctls: both in one run, medians, as a table.
//!
//! A program for the KVM testbed, where time is counted in instructions and figures repeat:
//! `tests/kvm-testbed/figures` runs it there. On any host with KVM:
//!
//! ```sh
//! cargo bench -p vmkit-benches --bench kvm_figures -- exits
//! cargo bench -p vmkit-benches --bench kvm_figures -- build
//! cargo bench -p vmkit-benches --bench kvm_figures -- starts 11 PROGRAM ARG...
//! cargo bench -p vmkit-benches --bench kvm_figures -- boot 3 256 LINE PROGRAM ARG...
//! cargo bench -p vmkit-benches --bench kvm_figures -- extract BZIMAGE VMLINUX
//! ```

#![allow(missing_docs, reason = "a benchmark")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a benchmark")]

mod build;
mod counter;
mod exits;
mod process;

use std::time::Duration;

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    args.retain(|arg| arg != "--bench");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        // What `cargo test --benches` and a bench run without a choice ask for.
        [] | ["--test"] => println!("choose: exits, build, starts, boot or extract"),
        ["exits"] => exits::print(),
        ["build"] => build::print(),
        ["starts", times, command @ ..] => process::starts(times.parse().unwrap(), command),
        ["boot", times, mib, line, command @ ..] => {
            process::boot(times.parse().unwrap(), mib.parse().unwrap(), line, command);
        }
        ["extract", bzimage, vmlinux] => {
            let kernel = std::fs::read(bzimage).unwrap();
            std::fs::write(vmlinux, vmkit::boot::extract_vmlinux(&kernel).unwrap()).unwrap();
        }
        other => panic!("what is {other:?}?"),
    }
}

/// The median of `times`.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// In milliseconds.
fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
