//! How much a device may do per second of guest time. Knows amounts and time, not what is done.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmkit_device::Clock;
use vmm_sys_util::timerfd::TimerFd;

use crate::{Interest, Poller};

/// What a rest saves up, unless the embedder says otherwise.
const BURST: Duration = Duration::from_millis(100);
/// The shortest wait that is worth a timer.
const SHORTEST: Duration = Duration::from_micros(100);

/// How much a device may do: bytes and operations per second of guest time, over any length of time
/// but for a burst after a rest. What is beyond waits.
///
/// ```
/// use std::time::Duration;
/// use vmkit_virtio::{Block, RateLimit};
///
/// let limit = RateLimit::new().bytes(50 << 20).operations(1000).burst(Duration::from_secs(1));
/// let disk = Block::memory(vec![0; 1 << 20])?.limit(limit);
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    bytes: Option<u64>,
    operations: Option<u64>,
    burst: Duration,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}

impl RateLimit {
    /// No limit.
    pub fn new() -> Self {
        Self { bytes: None, operations: None, burst: BURST }
    }

    /// At most this many bytes per second; 0 is taken for 1.
    #[must_use]
    pub fn bytes(self, per_second: u64) -> Self {
        Self { bytes: Some(per_second.max(1)), ..self }
    }

    /// At most this many operations per second: requests, or frames. 0 is taken for 1.
    #[must_use]
    pub fn operations(self, per_second: u64) -> Self {
        Self { operations: Some(per_second.max(1)), ..self }
    }

    /// After a rest as much may be done at once as is else in this time; 100 ms if not said.
    #[must_use]
    pub fn burst(self, time: Duration) -> Self {
        Self { burst: time, ..self }
    }

    fn is_none(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }
}

/// What was done under a limit. It outlives resets, so that a driver gains nothing by one; queues of
/// a device share it.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: RateLimit,
    /// When what was done is paid for, in bytes and in operations: the next may be done then.
    paid: Mutex<(Duration, Duration)>,
}

impl Budget {
    pub(crate) fn new(limit: RateLimit) -> Arc<Self> {
        Arc::new(Self { limit, paid: Mutex::default() })
    }

    /// How long to wait for the next operation.
    fn wait(&self, now: Duration) -> Duration {
        let (bytes, operations) = *self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.max(operations).saturating_sub(now)
    }

    /// An operation on `bytes` was done.
    fn spend(&self, now: Duration, bytes: u64) {
        self.add(now, bytes, 1);
    }

    fn add(&self, now: Duration, bytes: u64, operations: u64) {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.saturating_sub(self.limit.burst);
        let after = |paid: Duration, amount: u64, rate: Option<u64>| match rate {
            Some(rate) => {
                let nanos = u128::from(amount) * 1_000_000_000 / u128::from(rate);
                let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
                paid.max(earliest).saturating_add(time)
            }
            None => Duration::ZERO,
        };
        paid.0 = after(paid.0, bytes, self.limit.bytes);
        paid.1 = after(paid.1, operations, self.limit.operations);
    }
}

/// A worker's end of a budget: it asks before each operation, and is woken when it may go on.
pub(crate) struct Limiter {
    inner: Option<Inner>,
}

struct Inner {
    budget: Arc<Budget>,
    clock: Arc<dyn Clock>,
    timer: TimerFd,
}

impl Limiter {
    pub(crate) fn new(budget: &Arc<Budget>, clock: &Arc<dyn Clock>) -> io::Result<Self> {
        let inner = if budget.limit.is_none() {
            None
        } else {
            let timer = TimerFd::new().map_err(io::Error::from)?;
            Some(Inner { budget: budget.clone(), clock: clock.clone(), timer })
        };
        Ok(Self { inner })
    }

    pub(crate) fn register(&self, poller: &Poller, token: u32) -> io::Result<()> {
        match &self.inner {
            Some(inner) => poller.add(&inner.timer, token, Interest::READ),
            None => Ok(()),
        }
    }

    /// True if another operation may be done now. If not, the registered token brings an event when
    /// it may.
    #[inline]
    pub(crate) fn ready(&mut self) -> bool {
        let Some(inner) = &mut self.inner else { return true };
        let wait = inner.budget.wait(inner.clock.now());
        if wait.is_zero() {
            return true;
        }
        match inner.timer.reset(wait.max(SHORTEST), None) {
            Ok(()) => false,
            Err(error) => {
                // Better too fast than never again.
                log::error!("a rate limit has no timer: {error}");
                true
            }
        }
    }

    /// An operation on `bytes` was done.
    #[inline]
    pub(crate) fn spend(&mut self, bytes: impl FnOnce() -> u64) {
        if let Some(inner) = &mut self.inner {
            inner.budget.spend(inner.clock.now(), bytes());
        }
    }

    /// The operation was on `bytes` more.
    #[inline]
    pub(crate) fn spend_more(&mut self, bytes: u64) {
        if let (Some(inner), true) = (&mut self.inner, bytes > 0) {
            inner.budget.add(inner.clock.now(), bytes, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn over_any_length_of_time_no_more_than_the_rate_and_a_burst_is_done() {
        let limit = RateLimit::new().bytes(1_000_000).operations(2000).burst(10 * MS);
        for (size, rate) in [(100_u64, 2000), (5000, 200)] {
            let budget = Budget::new(limit);
            let mut done = 0;
            let mut now = Duration::from_secs(5);
            let end = now + Duration::from_secs(1);
            while now < end {
                let wait = budget.wait(now);
                if wait.is_zero() {
                    budget.spend(now, size);
                    done += 1;
                }
                now += wait;
            }
            let burst = rate / 100;
            assert!((rate..=rate + burst + 1).contains(&done), "{done} of {size} bytes");
        }
    }

    #[test]
    fn one_operation_of_any_size_may_be_done_and_is_paid_for_afterwards() {
        let budget = Budget::new(RateLimit::new().bytes(1000).burst(Duration::ZERO));
        budget.spend(5 * MS, 4000);
        assert_eq!(budget.wait(5 * MS), Duration::from_secs(4));
        budget.spend(5 * MS, u64::MAX);
        budget.spend(5 * MS, u64::MAX);
        assert!(budget.wait(Duration::from_secs(1 << 30)) > Duration::ZERO);
        let free = Budget::new(RateLimit::new());
        free.spend(MS, u64::MAX);
        assert_eq!(free.wait(MS), Duration::ZERO);
    }
}
