//! Says on which backends this workspace's tests run on this host, and why not on the others: a test
//! that cannot run is passed over in silence by Rust's own harness, so this one has none.

#![allow(clippy::print_stdout, reason = "the report of a test without harness")]

use std::process::ExitCode;

use vmkit::{BackendReport, Readiness};

/// What of the tests runs on a backend.
fn coverage(report: &BackendReport) -> &'static str {
    match report.readiness {
        Readiness::Usable => "all tests run on it",
        Readiness::SimpleGuests { .. } => {
            "the conformance suite and whole-machine tests run on it, but for what it lacks; \
             tests/kvm-testbed/suite runs the rest on a true KVM"
        }
        _ => "no tests run on it; tests/kvm-testbed/suite runs them on a true KVM",
    }
}

fn main() -> ExitCode {
    // What Rust's harness is asked for by tools that list tests.
    if std::env::args().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    let reports = vmkit::preflight();
    println!("\nbackends on this host");
    for report in &reports {
        println!("  {report}\n    {}", coverage(report));
    }
    println!();
    let usable = reports.iter().any(|report| report.is_usable());
    if usable { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
