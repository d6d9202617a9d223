//! The VM clock: guest time, which stands still while the machine is paused.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Guest time. All device timers of this process follow one clock; the guest's TSC and local APICs do
/// where they are of this process too, and not where the host's kernel keeps them.
pub trait Clock: Send + Sync {
    /// Time since the machine first started, without the time it was paused.
    fn now(&self) -> Duration;
    /// The guest's wall clock: time since the Unix epoch, UTC.
    fn wall(&self) -> Duration;
}

/// The host's monotonic clock, with pause.
#[derive(Debug)]
pub struct MonotonicClock {
    state: Mutex<State>,
    base: Instant,
    /// Nanoseconds to subtract from the host's time since `base`, or `PAUSED`.
    behind: AtomicU64,
}

#[derive(Debug)]
struct State {
    paused_at: Option<Duration>,
}

const PAUSED: u64 = u64::MAX;

impl Default for MonotonicClock {
    fn default() -> Self {
        Self::new()
    }
}

impl MonotonicClock {
    /// A running clock at zero.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State { paused_at: None }),
            base: Instant::now(),
            behind: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The time, also while a pause begins or ends.
    fn now_locked(&self) -> Duration {
        let state = self.lock();
        // Who saw a pause that has ended meanwhile is as far behind as everybody else.
        state.paused_at.unwrap_or_else(|| {
            let behind = Duration::from_nanos(self.behind.load(Ordering::Acquire));
            self.base.elapsed().saturating_sub(behind)
        })
    }

    /// Stops guest time. A second call changes nothing.
    pub fn pause(&self) {
        let mut state = self.lock();
        if state.paused_at.is_none() {
            let behind = Duration::from_nanos(self.behind.load(Ordering::Acquire));
            state.paused_at = Some(self.base.elapsed().saturating_sub(behind));
            self.behind.store(PAUSED, Ordering::Release);
        }
    }

    /// Lets guest time run on from where it stopped.
    pub fn resume(&self) {
        let mut state = self.lock();
        if let Some(at) = state.paused_at.take() {
            let behind = self.base.elapsed().saturating_sub(at);
            self.behind.store(behind.as_nanos() as u64, Ordering::Release);
        }
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        let behind = self.behind.load(Ordering::Acquire);
        if behind != PAUSED {
            return self.base.elapsed().saturating_sub(Duration::from_nanos(behind));
        }
        self.now_locked()
    }

    fn wall(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// A clock that moves only when told: for tests, and for deterministic machines.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: AtomicU64,
    epoch: u64,
}

impl ManualClock {
    /// A clock at zero whose wall time starts at `epoch` since the Unix epoch.
    pub fn at_epoch(epoch: Duration) -> Self {
        Self { now: AtomicU64::new(0), epoch: epoch.as_nanos() as u64 }
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.now.fetch_add(by.as_nanos() as u64, Ordering::AcqRel);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.now.load(Ordering::Acquire))
    }

    fn wall(&self) -> Duration {
        Duration::from_nanos(self.epoch) + self.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stands_still_while_paused() {
        let clock = MonotonicClock::new();
        clock.pause();
        let at = clock.now();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(clock.now(), at);
        let resumed = Instant::now();
        clock.resume();
        let later = clock.now();
        assert!(later - at <= resumed.elapsed());
    }

    #[test]
    fn who_asks_while_a_pause_ends_is_not_told_a_time_without_the_pauses() {
        let clock = MonotonicClock::new();
        // As after pauses of centuries.
        clock.behind.store(PAUSED - 1, Ordering::Release);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!((clock.now(), clock.now_locked()), (Duration::ZERO, Duration::ZERO));
        clock.pause();
        assert_eq!(clock.now(), Duration::ZERO);
    }
}
