//! The conformance suite on KVM, with the interrupt controllers in the kernel.

use std::process::ExitCode;

#[path = "common/conformance.rs"]
mod conformance;

fn main() -> ExitCode {
    conformance::run("kvm", |kvm| kvm)
}
