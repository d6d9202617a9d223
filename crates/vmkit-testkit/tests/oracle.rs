//! The oracle itself is reproducible, and the software processor agrees with the host.
//!
//! `ORACLE_CASES` sets how many cases the comparison runs, `ORACLE_SEED` which; the command `oracle` of
//! this crate takes more options and minimises what it finds.

#![allow(clippy::panic, clippy::print_stderr, reason = "a test")]

use vmkit_hypervisor::CpuModel;
use vmkit_testkit::oracle::native::NativeError;
use vmkit_testkit::oracle::{Options, OracleError, Report, Subject, run};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The report, or `None` with a word about it where the host's kernel or processor is too old.
fn report(options: &Options<'_>, subject: Subject<'_>) -> Option<Report> {
    match run(options, subject) {
        Ok(report) => Some(report),
        Err(OracleError::Native(NativeError::Lacks(what))) => {
            eprintln!("ignored: the host lacks {what}, so it cannot serve as an oracle");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_host_agrees_with_itself() {
    let options = Options { seed: 77, cases: 20_000, ..Options::default() };
    let Some(report) = report(&options, Subject::Host) else { return };
    assert!(report.is_clean(), "{report}");
    assert!(report.compared > 18_000, "{report}");
    for vector in [0, 3, 6, 13, 14, 16] {
        assert!(report.vectors.contains_key(&vector), "no case raised vector {vector}: {report}");
    }
}

#[test]
fn what_a_model_does_not_list_is_no_instruction() {
    let soft = vmkit_soft::SoftHypervisor::new();
    let options = Options {
        cases: 20_000,
        features: CpuModel::x86_64_v1().features,
        unlisted: true,
        ..Options::default()
    };
    let Some(report) = report(&options, Subject::Backend(&soft)) else { return };
    assert!(report.is_clean(), "{report}");
    assert!(report.compared > 15_000, "{report}");
}

#[test]
fn the_software_processor_agrees_with_the_host() {
    let soft = vmkit_soft::SoftHypervisor::new();
    let options = Options {
        seed: number("ORACLE_SEED", 1),
        cases: number("ORACLE_CASES", 60_000),
        jobs: 2,
        ..Options::default()
    };
    let Some(report) = report(&options, Subject::Backend(&soft)) else { return };
    eprintln!("{report}");
    assert!(report.is_clean(), "{} mismatches, listed above", report.mismatched());
}
