//! The conformance suite on the software backend.

use std::process::ExitCode;

use vmkit_hypervisor::conformance::runner::{self, Exception};
use vmkit_soft::SoftHypervisor;
use vmkit_testkit::alloc::{self, Counting};

/// What this backend does wrong.
const KNOWN_FAILURES: &[Exception<'_>] = &[];

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    runner::count_allocations_by(|| alloc::count().allocations);
    runner::main(&SoftHypervisor::new(), KNOWN_FAILURES)
}
