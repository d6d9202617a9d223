//! Ends cases that do not end by themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vmkit_hypervisor::Kick;

/// How often the watchdog looks.
const TICK: Duration = Duration::from_millis(50);
/// A case seen running at this many looks in a row is kicked.
const PATIENCE: u32 = 5;

#[derive(Default)]
struct Shared {
    /// Odd while a case runs; changes with every case.
    turn: AtomicU64,
    done: AtomicBool,
}

/// A thread that kicks a vCPU out of a case that takes too long.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches the vCPU that `kick` reaches.
    pub(super) fn new(kick: Kick) -> Self {
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let (mut last, mut looks) = (0, 0);
            while !seen.done.load(Ordering::Acquire) {
                std::thread::park_timeout(TICK);
                let turn = seen.turn.load(Ordering::Acquire);
                looks = if turn == last && turn % 2 == 1 { looks + 1 } else { 0 };
                last = turn;
                if looks >= PATIENCE {
                    kick.kick();
                    looks = 0;
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Runs `f` under watch.
    pub(super) fn during<T>(&self, f: impl FnOnce() -> T) -> T {
        self.shared.turn.fetch_add(1, Ordering::AcqRel);
        let value = f();
        self.shared.turn.fetch_add(1, Ordering::AcqRel);
        value
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The thread only loads and kicks; if it panicked there is nothing left to clean up.
            let _ = thread.join();
        }
    }
}
