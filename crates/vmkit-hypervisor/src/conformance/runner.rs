//! Runs the cases on a backend, one line each, and sums up.
//!
//! It is the `main` of a test target without harness, because only at run time is it known what this
//! host's backend can do: a case that cannot run is counted as ignored, and its reason is printed.

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{Case, cases};
use crate::Hypervisor;

/// The name of a case that is not to run, and why.
pub type Exception<'a> = (&'a str, &'a str);

static ALLOCATIONS: OnceLock<fn() -> u64> = OnceLock::new();

/// Tells the suite how many allocations the calling thread has made so far; for test binaries with a
/// counting allocator. The first call counts.
pub fn count_allocations_by(counter: fn() -> u64) {
    let _ = ALLOCATIONS.set(counter);
}

/// This thread's allocations so far, if anybody counts.
pub(super) fn allocations() -> Option<u64> {
    ALLOCATIONS.get().map(|counter| counter())
}

/// Which cases to run.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Run those whose name contains one of these; all if there are none.
    pub filters: Vec<String>,
    /// Do not run those whose name contains one of these.
    pub skip: Vec<String>,
    /// A filter is the whole name.
    pub exact: bool,
    /// Run also the exceptions; what the backend cannot have stays ignored.
    pub include_ignored: bool,
    /// Only name the cases.
    pub list: bool,
}

impl Selection {
    /// Reads a test binary's arguments (those of Rust's own harness that make sense here; others
    /// are ignored).
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Self {
        let mut selection = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--exact" => selection.exact = true,
                "--ignored" | "--include-ignored" => selection.include_ignored = true,
                "--list" => selection.list = true,
                "--skip" => selection.skip.extend(args.next()),
                "--test-threads" | "--format" | "--color" | "--logfile" | "--report-time" => {
                    args.next();
                }
                flag if flag.starts_with('-') => {}
                filter => selection.filters.push(filter.into()),
            }
        }
        selection
    }

    fn selects(&self, case: &Case) -> bool {
        let matches = |filter: &String| -> bool {
            if self.exact { case.name == filter } else { case.name.contains(filter.as_str()) }
        };
        (self.filters.is_empty() || self.filters.iter().any(matches))
            && !self.skip.iter().any(matches)
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Names of cases that passed.
    pub passed: Vec<&'static str>,
    /// Cases that failed, and how.
    pub failed: Vec<(&'static str, String)>,
    /// Cases that did not run, and why.
    pub ignored: Vec<(&'static str, String)>,
}

impl Summary {
    /// True if nothing failed.
    pub fn is_ok(&self) -> bool {
        self.failed.is_empty()
    }
}

/// Runs the selected cases on `hypervisor`, but for `exceptions`, and writes a line for each to
/// `out`.
///
/// # Errors
/// What writing said, or that one of `exceptions` is for no case.
pub fn run_all(
    hypervisor: &dyn Hypervisor,
    exceptions: &[Exception<'_>],
    selection: &Selection,
    out: &mut dyn Write,
) -> io::Result<Summary> {
    let backend = hypervisor.capabilities().name;
    for (name, _) in exceptions {
        if !cases().iter().any(|case| case.name == *name) {
            return Err(io::Error::other(format!("an exception for {name}, which is no case")));
        }
    }
    let selected: Vec<_> = cases().into_iter().filter(|case| selection.selects(case)).collect();
    writeln!(out, "\nrunning {} conformance cases on {backend}", selected.len())?;
    let start = Instant::now();
    let mut summary = Summary::default();
    for case in selected {
        write!(out, "test {} ... ", case.name)?;
        out.flush()?;
        let excepted = exception_for(&case, exceptions).filter(|_| !selection.include_ignored);
        if let Some(reason) = unmet_need(&case, hypervisor).or(excepted) {
            writeln!(out, "ignored, {reason}")?;
            summary.ignored.push((case.name, reason));
            continue;
        }
        let (result, took) = run(&case, hypervisor);
        match result {
            Ok(()) => {
                writeln!(out, "ok ({took:.0?})")?;
                summary.passed.push(case.name);
            }
            Err(message) => {
                writeln!(out, "FAILED\n    {message}\n    see {}", case.cites)?;
                summary.failed.push((case.name, message));
            }
        }
    }
    let result = if summary.is_ok() { "ok" } else { "FAILED" };
    writeln!(
        out,
        "\ntest result: {result}. {} passed; {} failed; {} ignored; on {backend} in {:.1?}\n",
        summary.passed.len(),
        summary.failed.len(),
        summary.ignored.len(),
        start.elapsed(),
    )?;
    Ok(summary)
}

/// A test target's `main`: runs what the arguments select on `hypervisor`, prints, and tells by its
/// exit code whether all is well.
pub fn main(hypervisor: &dyn Hypervisor, exceptions: &[Exception<'_>]) -> ExitCode {
    let selection = Selection::from_args(std::env::args().skip(1));
    let mut out = io::stdout().lock();
    let outcome = if selection.list {
        list(&selection, &mut out).map(|()| true)
    } else {
        run_all(hypervisor, exceptions, &selection, &mut out).map(|summary| summary.is_ok())
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // If this cannot be written either, the exit code still tells.
            let _ = writeln!(io::stderr(), "the conformance suite: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A test target's `main` where the backend is not usable: all cases are ignored.
pub fn main_without_backend(name: &str, reason: &str) -> ExitCode {
    let selection = Selection::from_args(std::env::args().skip(1));
    let mut out = io::stdout().lock();
    let outcome = if selection.list {
        list(&selection, &mut out)
    } else {
        let count = cases().iter().filter(|case| selection.selects(case)).count();
        writeln!(
            out,
            "\n{name} is not usable here: {reason}\n\ntest result: ok. 0 passed; 0 failed; {count} ignored\n"
        )
    };
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn list(selection: &Selection, out: &mut dyn Write) -> io::Result<()> {
    for case in cases().iter().filter(|case| selection.selects(case)) {
        writeln!(out, "{}: test", case.name)?;
    }
    Ok(())
}

fn unmet_need(case: &Case, hypervisor: &dyn Hypervisor) -> Option<String> {
    let capabilities = hypervisor.capabilities();
    let need = case.needs.iter().find(|need| !need.is_met(capabilities))?;
    Some(format!("needs {need}"))
}

fn exception_for(case: &Case, exceptions: &[Exception<'_>]) -> Option<String> {
    let (_, reason) = exceptions.iter().find(|(name, _)| *name == case.name)?;
    Some((*reason).to_owned())
}

fn run(case: &Case, hypervisor: &dyn Hypervisor) -> (Result<(), String>, Duration) {
    let start = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| (case.run)(hypervisor)));
    let result = match result {
        Ok(result) => result.map_err(|failure| failure.to_string()),
        Err(payload) => Err(format!("panicked: {}", panic_text(payload.as_ref()))),
    };
    (result, start.elapsed())
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Selection {
        Selection::from_args(args.iter().map(|arg| (*arg).to_owned()))
    }

    #[test]
    fn the_arguments_of_rusts_harness_are_understood() {
        let case = Case { name: "io::ports", cites: "", needs: &[], run: |_| Ok(()) };
        assert!(parse(&[]).selects(&case));
        assert!(parse(&["--test-threads", "1", "--nocapture", "port"]).selects(&case));
        assert!(!parse(&["--exact", "port"]).selects(&case));
        assert!(parse(&["--exact", "io::ports"]).selects(&case));
        assert!(!parse(&["memory"]).selects(&case));
        assert!(!parse(&["--skip", "io::"]).selects(&case));
        assert!(parse(&["--list"]).list);
    }
}
