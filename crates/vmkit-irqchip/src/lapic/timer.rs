//! The local APIC's timer (Intel SDM vol. 3A §11.5.4): one-shot, periodic, TSC-deadline.
//!
//! It knows when it expires and nothing of vectors or masks.

use crate::time::{TscClock, later, ns_until, ticks_in};

/// LVT timer bits 18:17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Stopped,
    Once {
        at: u64,
    },
    /// Expires at `origin` and then each period after it. All expiries are reckoned from
    /// `origin`, so that rounding to nanoseconds does not add up.
    Cycle {
        origin: u64,
        next: u64,
    },
    Deadline {
        tsc: u64,
        at: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    hz: u64,
    mode: Mode,
    initial: u32,
    divide: u32,
    run: Run,
}

/// Bits of the divide configuration register that exist.
pub(super) const DIVIDE_BITS: u32 = 0b1011;

impl Timer {
    pub(super) fn new(hz: u64) -> Self {
        let hz = hz.clamp(1, 1 << 40);
        Self { hz, mode: Mode::OneShot, initial: 0, divide: 0, run: Run::Stopped }
    }

    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// When it expires next.
    pub(super) fn expiry(&self) -> Option<u64> {
        match self.run {
            Run::Stopped => None,
            Run::Once { at } | Run::Cycle { next: at, .. } | Run::Deadline { at, .. } => {
                (at != u64::MAX).then_some(at)
            }
        }
    }

    /// Catches up to `now`; whether it expired, once or more.
    pub(super) fn advance(&mut self, now: u64) -> bool {
        match self.run {
            Run::Once { at } | Run::Deadline { at, .. } if now >= at => {
                self.run = Run::Stopped;
                true
            }
            Run::Cycle { origin, next } if now >= next => {
                let period = self.period(self.initial).max(1);
                let cycles = ticks_in(now - origin, self.hz) / period + 1;
                let next = later(origin, ns_until(cycles * period, self.hz));
                self.run = Run::Cycle { origin, next };
                true
            }
            _ => false,
        }
    }

    /// The current count register.
    pub(super) fn current(&self, now: u64) -> u32 {
        match (self.run, self.expiry()) {
            (Run::Once { .. } | Run::Cycle { .. }, Some(at)) => {
                let ns = at.saturating_sub(now);
                // Rounded up: the count is above 0 until the timer has expired.
                let unit = 1_000_000_000 * self.divisor();
                let count = (u128::from(ns) * u128::from(self.hz)).div_ceil(unit);
                u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
            }
            (Run::Once { .. } | Run::Cycle { .. }, None) => self.initial,
            _ => 0,
        }
    }

    /// Writes the initial count register, which starts the count.
    pub(super) fn set_initial(&mut self, count: u32, now: u64) {
        if self.mode != Mode::TscDeadline {
            self.initial = count;
            self.start(count, now);
        }
    }

    /// Writes the divide configuration register. A running count goes on from where it is.
    pub(super) fn set_divide(&mut self, divide: u32, now: u64) {
        let count = self.current(now);
        self.divide = divide & DIVIDE_BITS;
        if matches!(self.run, Run::Once { .. } | Run::Cycle { .. }) {
            self.start(count, now);
        }
    }

    /// Changes the mode. To and from TSC-deadline mode disarms the timer.
    pub(super) fn set_mode(&mut self, mode: Mode) {
        if mode == self.mode {
            return;
        }
        self.run = match (self.run, mode) {
            (Run::Once { at }, Mode::Periodic) => Run::Cycle { origin: at, next: at },
            (Run::Cycle { next, .. }, Mode::OneShot) => Run::Once { at: next },
            _ => Run::Stopped,
        };
        if mode == Mode::TscDeadline || self.mode == Mode::TscDeadline {
            self.initial = 0;
        }
        self.mode = mode;
    }

    /// IA32_TSC_DEADLINE: 0 unless armed.
    pub(super) fn deadline(&self) -> u64 {
        match self.run {
            Run::Deadline { tsc, .. } => tsc,
            _ => 0,
        }
    }

    /// Writes IA32_TSC_DEADLINE; 0 disarms. Ignored in the other modes.
    pub(super) fn set_deadline(&mut self, tsc: u64, clock: TscClock, now: u64) {
        if self.mode == Mode::TscDeadline {
            self.run = match tsc {
                0 => Run::Stopped,
                tsc => Run::Deadline { tsc, at: clock.when(tsc, now) },
            };
        }
    }

    /// The longest a count can take from here, in nanoseconds.
    pub(super) fn full_count(&self) -> u128 {
        ns_until(self.period(self.initial), self.hz)
    }

    /// Puts a saved timer in place: one that expires `remaining` nanoseconds after `now`, or by
    /// `count` if that is not known.
    pub(super) fn restore(
        &mut self,
        (initial, count): (u32, u32),
        remaining: Option<u64>,
        now: u64,
    ) {
        self.initial = initial;
        match remaining {
            Some(ns) => self.run_from(now.saturating_add(ns)),
            None => self.start(count, now),
        }
    }

    fn start(&mut self, count: u32, now: u64) {
        match count {
            0 => self.run = Run::Stopped,
            _ => self.run_from(later(now, ns_until(self.period(count), self.hz))),
        }
    }

    fn run_from(&mut self, at: u64) {
        self.run = match self.mode {
            Mode::OneShot => Run::Once { at },
            Mode::Periodic => Run::Cycle { origin: at, next: at },
            Mode::TscDeadline => Run::Stopped,
        };
    }

    /// Input clocks that `count` takes: below 2^40.
    fn period(&self, count: u32) -> u128 {
        u128::from(count) * self.divisor()
    }

    /// 1 to 128, from bits 3, 1 and 0 of the register.
    fn divisor(&self) -> u128 {
        let power = (self.divide & 0b11 | self.divide >> 1 & 0b100) + 1;
        1 << (power & 7)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divisor_is_2_to_128_and_then_1() {
        let mut timer = Timer::new(1_000_000_000);
        let expected = [2, 4, 8, 16, 32, 64, 128, 1];
        for (bits, divisor) in [0, 1, 2, 3, 8, 9, 10, 11].into_iter().zip(expected) {
            timer.set_divide(bits, 0);
            assert_eq!(timer.divisor(), divisor);
        }
    }

    #[test]
    fn a_periodic_timer_does_not_drift() {
        // 3 ticks at 7 Hz: never a whole number of nanoseconds.
        let mut timer = Timer::new(7);
        timer.set_divide(0b1011, 0);
        timer.set_mode(Mode::Periodic);
        timer.set_initial(3, 0);
        let mut now = 0;
        for _ in 0..7 {
            now = timer.expiry().unwrap();
            assert!(timer.advance(now));
        }
        assert!((3_000_000_000..=3_000_000_001).contains(&now), "{now}");
        for _ in 0..70_000 {
            now = timer.expiry().unwrap();
            assert!(!timer.advance(now - 1));
            assert!(timer.advance(now));
        }
        assert!((30_003_000_000_000..=30_003_000_000_001).contains(&now), "{now}");
    }

    #[test]
    fn a_change_of_divisor_keeps_the_count() {
        let mut timer = Timer::new(1_000_000_000);
        timer.set_divide(0b1011, 0);
        timer.set_initial(1000, 0);
        timer.set_divide(0b0000, 400);
        assert_eq!(timer.current(400), 600);
        assert_eq!(timer.expiry(), Some(400 + 1200));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut timer = Timer::new(1);
        timer.set_divide(0b1010, 0);
        timer.set_mode(Mode::Periodic);
        timer.set_initial(u32::MAX, u64::MAX - 1);
        assert_eq!(timer.expiry(), None);
        assert_eq!(timer.current(u64::MAX), u32::MAX);
        let mut timer = Timer::new(u64::MAX);
        timer.set_mode(Mode::Periodic);
        timer.set_initial(1, 0);
        assert!(timer.advance(u64::MAX - 1));
        timer.current(u64::MAX - 1);
    }
}
