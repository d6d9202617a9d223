//! SIGINT, SIGTERM, SIGHUP and SIGQUIT stop the machine; a second one ends the program at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use vmkit::VmHandle;

use crate::{Failure, terminal};

/// Which signal came, if one did.
#[derive(Clone, Debug, Default)]
pub struct Caught(Arc<AtomicI32>);

impl Caught {
    /// The program's exit status after a signal.
    pub fn status(&self) -> Option<u8> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            signal => Some(128_u8.wrapping_add(signal as u8)),
        }
    }
}

/// Stops `vm` when a signal comes. A thread of its own waits for them until the program ends.
///
/// # Errors
/// If the host refuses a handler or the thread.
pub fn stop_on_signal(vm: VmHandle) -> Result<Caught, Failure> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT]).map_err(Failure::host("signals"))?;
    let caught = Caught::default();
    let seen = caught.clone();
    let body = move || {
        for signal in signals.forever() {
            if seen.0.swap(signal, Ordering::AcqRel) != 0 {
                terminal::restore();
                std::process::exit(128 + signal);
            }
            vm.stop();
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        // Little, and less than a huge page.
        .stack_size(256 << 10)
        .spawn(body)
        .map_err(Failure::host("signal thread"))?;
    Ok(caught)
}
