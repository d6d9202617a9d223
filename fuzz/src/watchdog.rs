//! Ends runs of guests that loop or sleep.

use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use vmkit_hypervisor::Kick;

/// How often the current run is kicked.
const PERIOD: Duration = Duration::from_millis(3);

static CURRENT: Mutex<Option<Kick>> = Mutex::new(None);
static STARTED: Once = Once::new();

/// Does `run` while `kick` is given every few milliseconds.
pub fn watched<T>(kick: Kick, run: impl FnOnce() -> T) -> T {
    STARTED.call_once(|| {
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(PERIOD);
                if let Some(kick) = &*CURRENT.lock().unwrap_or_else(PoisonError::into_inner) {
                    kick.kick();
                }
            }
        });
    });
    *CURRENT.lock().unwrap_or_else(PoisonError::into_inner) = Some(kick);
    let end = run();
    *CURRENT.lock().unwrap_or_else(PoisonError::into_inner) = None;
    end
}
