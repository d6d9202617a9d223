//! From the end of a machine to the exit status of a program.

use std::path::PathBuf;
use std::process::ExitCode;

use thiserror::Error;
use vmkit::{End, VmError};

/// The guest asked for a reset.
pub const RESET: u8 = 120;
/// The guest's kernel panicked.
pub const PANICKED: u8 = 121;
/// A triple fault.
pub const TRIPLE_FAULT: u8 = 122;
/// Halted with interrupts off.
pub const HALTED: u8 = 123;
/// The time limit passed.
pub const TIMED_OUT: u8 = 124;
/// Anything that went wrong on this side.
pub const FAILED: u8 = 125;

/// The table of exit statuses, for `--help`.
pub const HELP: &str = "\
Exit status: the guest's own where it gives one, 0 if it powers off; 120 it asked for a reset,
121 its kernel panicked, 122 triple fault, 123 halted with interrupts off, 124 time limit,
125 failure on this side, 128+N ended by signal N.";

/// Why a program gives up. One line each.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Failure {
    /// The machine could not be built or run.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A device could not be had.
    #[error(transparent)]
    Device(#[from] vmkit::device::DeviceError),
    /// The guest could not be loaded.
    #[error(transparent)]
    Boot(#[from] vmkit::boot::BootError),
    /// A host file failed.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// A host operation failed.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    /// A failure on `path`.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// A failure of `what`.
    pub fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}

/// The exit status for a machine that ended like this.
pub fn status(end: &End) -> u8 {
    match *end {
        End::PoweredOff => 0,
        End::ExitCode(code) => u8::try_from(code).unwrap_or(u8::MAX),
        End::Reset => RESET,
        End::GuestPanicked => PANICKED,
        End::TripleFault { .. } => TRIPLE_FAULT,
        End::Halted => HALTED,
        _ => FAILED,
    }
}

/// Says how a machine ended, unless it ended as it should.
pub fn tell(program: &str, end: &End) {
    if !matches!(end, End::PoweredOff | End::ExitCode(_)) {
        eprintln!("{program}: the guest ended: {end}");
    }
}

/// The exit status of `main`: prints a failure as one line.
pub fn report(program: &str, result: Result<u8, Failure>) -> ExitCode {
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("{program}: {failure}");
            ExitCode::from(FAILED)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_power_off_and_exit_code_zero_succeed() {
        assert_eq!(status(&End::PoweredOff), 0);
        assert_eq!(status(&End::ExitCode(7)), 7);
        assert_eq!(status(&End::ExitCode(0x100)), 255);
        for end in [End::Reset, End::GuestPanicked, End::Halted, End::Stopped] {
            assert_ne!(status(&end), 0, "{end}");
        }
    }
}
