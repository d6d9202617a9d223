//! Exact conversion between nanoseconds of the VM clock and ticks of a guest-visible clock.
//!
//! Ticks round down and deadlines round up, so that a timer asked at its own deadline has expired.

const NS_PER_SECOND: u128 = 1_000_000_000;

/// Whole ticks of a clock of `hz` in `ns`.
pub(crate) fn ticks_in(ns: u64, hz: u64) -> u128 {
    u128::from(ns) * u128::from(hz) / NS_PER_SECOND
}

/// The first nanosecond by which `ticks` ticks of a clock of `hz` have passed.
pub(crate) fn ns_until(ticks: u128, hz: u64) -> u128 {
    ticks.saturating_mul(NS_PER_SECOND).div_ceil(u128::from(hz.max(1)))
}

/// `base` nanoseconds and `ns` more; the end of time if that is too much.
pub(crate) fn later(base: u64, ns: u128) -> u64 {
    u64::try_from(ns).map_or(u64::MAX, |ns| base.saturating_add(ns))
}

/// The guest's time stamp counter as a function of the VM clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscClock {
    /// Ticks per second, not 0.
    pub hz: u64,
    /// The counter's value when the VM clock is 0.
    pub offset: u64,
}

impl TscClock {
    /// The counter at `now`.
    #[must_use]
    pub fn tsc_at(self, now: u64) -> u64 {
        self.offset.wrapping_add(ticks_in(now, self.hz) as u64)
    }

    /// When the counter reaches `tsc`: `now` if it has, the end of time (`u64::MAX`) if that is
    /// too far to say.
    #[must_use]
    pub fn when(self, tsc: u64, now: u64) -> u64 {
        match tsc.checked_sub(self.tsc_at(now)) {
            None | Some(0) => now,
            Some(missing) => {
                later(0, ns_until(ticks_in(now, self.hz) + u128::from(missing), self.hz))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_deadline_is_the_first_instant_that_reaches_it(
            hz in 1..=10_000_000_000_u64,
            offset in any::<u64>(),
            now in 0..=u64::MAX / 4,
            ahead in 1..=1_u64 << 40,
        ) {
            let clock = TscClock { hz, offset };
            let tsc = clock.tsc_at(now);
            prop_assume!(tsc.checked_add(ahead).is_some());
            let at = clock.when(tsc + ahead, now);
            if at < u64::MAX {
                prop_assert!(at > now);
                prop_assert!(clock.tsc_at(at) >= tsc + ahead);
                prop_assert!(clock.tsc_at(at - 1) < tsc + ahead);
            }
            prop_assert_eq!(clock.when(tsc, now), now);
        }
    }
}
