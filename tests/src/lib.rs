//! What the whole-machine tests share: the backends to run on, and small guests.

#![allow(missing_debug_implementations, reason = "no library for others")]

pub mod guests;
pub mod linux;
pub mod program;
pub mod transfer;
pub mod vsock_echo;

use std::time::Duration;

use vmkit::{Backend, BackendKind, DebugExit, End, Readiness, RunningVm, VmBuilder};

/// Long enough for a loaded machine; only a test that fails waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The backends that run small guests on this host; of these, the ones that `VMKIT_TEST_BACKENDS`
/// names, if it is set. Those that are left out are named on standard error.
pub fn backends() -> Vec<BackendKind> {
    let mut usable = Vec::new();
    for report in vmkit::preflight() {
        match report.readiness {
            Readiness::Unusable { reason } => {
                eprintln!("not run on {}: {reason}", report.backend);
            }
            _ if is_wanted(report.backend) => usable.push(report.backend),
            _ => eprintln!("not run on {}: not wanted", report.backend),
        }
    }
    usable
}

/// True unless `VMKIT_TEST_BACKENDS` names others.
pub(crate) fn is_wanted(kind: BackendKind) -> bool {
    let wanted = std::env::var("VMKIT_TEST_BACKENDS").ok();
    wanted.is_none_or(|names| names.split(',').any(|name| name == kind.to_string()))
}

/// A bare machine of 2 MiB on `backend` that runs `guest` and has a debug-exit port.
pub fn bare(backend: BackendKind, guest: vmkit::boot::Flat) -> VmBuilder {
    vmkit::Vm::builder()
        .memory(2 << 20)
        .backend(Backend::from(backend))
        .bare()
        .boot(guest)
        .device(DebugExit::default())
}

/// Waits for the end of `vm`, which must come.
///
/// # Panics
/// If it does not come, or is a failure.
pub fn end_of(vm: &RunningVm) -> End {
    #[allow(clippy::expect_used, reason = "a test helper")]
    vm.wait_timeout(PATIENCE).expect("the backend failed").expect("the guest does not end")
}
