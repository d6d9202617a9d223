//! Dates of the proleptic Gregorian calendar, UTC, to and from seconds since the Unix epoch.

/// Seconds in a day.
pub(super) const DAY: i64 = 86_400;
/// 0000-01-01 00:00:00, the first second four digits can say.
pub(super) const FIRST: i64 = -62_167_219_200;
/// 9999-12-31 23:59:59, the last.
pub(super) const LAST: i64 = 253_402_300_799;

/// A date and time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    /// 0 to 9999.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(month: u8, year: i64) -> u8 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 0000-01-01 to the first day of `year`.
fn days_before(year: i64) -> i64 {
    let past = year - 1;
    365 * year + past.div_euclid(4) - past.div_euclid(100) + past.div_euclid(400) + 1
}

impl DateTime {
    /// The date at `seconds` since the epoch, which is first brought into the years 0 to 9999.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let since_zero = seconds.clamp(FIRST, LAST) - FIRST;
        let (mut day, second_of_day) = (since_zero / DAY, since_zero % DAY);
        // Never more than a year too early: leap days make the years longer than 365 days.
        let mut year = day / 366;
        while days_before(year + 1) <= day {
            year += (day - days_before(year)) / 366;
            year += i64::from(days_before(year + 1) <= day);
        }
        day -= days_before(year);
        let mut month = 1;
        while day >= i64::from(days_in(month, year)) {
            day -= i64::from(days_in(month, year));
            month += 1;
        }
        Self {
            year: year as u16,
            month,
            day: day as u8 + 1,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }

    /// Seconds since the epoch. What no calendar has (a 31st of April, a 70th minute) is brought
    /// to the nearest it has.
    pub(super) fn to_unix(self) -> i64 {
        let year = i64::from(self.year.min(9999));
        let month = self.month.clamp(1, 12);
        let day = self.day.clamp(1, days_in(month, year));
        let days = days_before(year)
            + (1..month).map(|month| i64::from(days_in(month, year))).sum::<i64>()
            + i64::from(day - 1);
        let clock = i64::from(self.hour.min(23)) * 3600
            + i64::from(self.minute.min(59)) * 60
            + i64::from(self.second.min(59));
        FIRST + days * DAY + clock
    }

    /// The day of the week, 1 (Sunday) to 7.
    pub(super) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        ((self.to_unix().div_euclid(DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

/// Two decimal digits in a byte.
pub(super) fn to_bcd(value: u8) -> u8 {
    ((value / 10 % 10) << 4) | (value % 10)
}

/// The value of two decimal digits; what are no digits counts on past nine.
pub(super) fn from_bcd(bcd: u8) -> u8 {
    (bcd >> 4) * 10 + (bcd & 0x0F)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(year: u16, month: u8, day: u8, hour: u8, minute: u8, second: u8) -> DateTime {
        DateTime { year, month, day, hour, minute, second }
    }

    #[test]
    fn known_dates() {
        for (seconds, date, weekday) in [
            (0, at(1970, 1, 1, 0, 0, 0), 5),
            (951_782_400, at(2000, 2, 29, 0, 0, 0), 3),
            (1_709_251_199, at(2024, 2, 29, 23, 59, 59), 5),
            (4_107_542_400, at(2100, 3, 1, 0, 0, 0), 2),
            (FIRST, at(0, 1, 1, 0, 0, 0), 7),
            (LAST, at(9999, 12, 31, 23, 59, 59), 6),
        ] {
            assert_eq!(DateTime::from_unix(seconds), date);
            assert_eq!((date.to_unix(), date.weekday()), (seconds, weekday), "{date:?}");
        }
    }

    #[test]
    fn impossible_dates_become_the_nearest_possible() {
        assert_eq!(at(2023, 2, 31, 25, 70, 99).to_unix(), at(2023, 2, 28, 23, 59, 59).to_unix());
        assert_eq!(at(60_000, 0, 0, 0, 0, 0).to_unix(), at(9999, 1, 1, 0, 0, 0).to_unix());
    }

    #[test]
    fn bcd_round_trips() {
        for value in 0..100 {
            assert_eq!(from_bcd(to_bcd(value)), value);
        }
        assert_eq!(to_bcd(59), 0x59);
    }

    proptest! {
        #[test]
        fn every_second_round_trips(seconds in FIRST..=LAST) {
            prop_assert_eq!(DateTime::from_unix(seconds).to_unix(), seconds);
        }

        #[test]
        fn no_number_is_no_date(
            seconds: i64,
            fields: (u16, u8, u8, u8, u8, u8),
            bcd: u8,
        ) {
            DateTime::from_unix(seconds);
            let (year, month, day, hour, minute, second) = fields;
            at(year, month, day, hour, minute, second).weekday();
            from_bcd(bcd);
        }
    }
}
