//! Interrupts to a halted vCPU, one by one, from another thread.

#![allow(clippy::unwrap_used, reason = "benchmarks fail by panicking")]

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// The time of `n` interrupts, from `pulse` on another thread to the end of `run`, which returns at the
/// handler's port write.
pub(crate) fn rounds(n: u64, mut run: impl FnMut(), pulse: impl Fn() + Send) -> Duration {
    let (to_pulser, go) = channel::<()>();
    let mut total = Duration::ZERO;
    std::thread::scope(|scope| {
        let (told, from_pulser) = channel();
        scope.spawn(move || {
            while go.recv().is_ok() {
                // Long enough for the vCPU to halt.
                std::thread::sleep(Duration::from_micros(200));
                let at = Instant::now();
                pulse();
                if told.send(at).is_err() {
                    return;
                }
            }
        });
        for _ in 0..n {
            to_pulser.send(()).unwrap();
            run();
            let now = Instant::now();
            total += now.saturating_duration_since(from_pulser.recv().unwrap());
        }
        drop(to_pulser);
    });
    total
}
