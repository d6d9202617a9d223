//! Says which backends work on this host, and why not the others.
//!
//! `cargo run --example preflight`

use std::process::ExitCode;

fn main() -> ExitCode {
    let reports = vmkit::preflight();
    let text: Vec<String> = reports.iter().map(ToString::to_string).collect();
    eprintln!("{}", text.join("\n"));
    let usable = reports.iter().any(|report| report.is_usable());
    if usable { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
