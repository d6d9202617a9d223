//! The MC146818 as a state machine over two given times (Motorola MC146818A data sheet): nothing
//! here asks a clock, waits, or pulls a wire.
//!
//! The chip counts nothing. Its time is the host's wall time plus what the guest set, and its
//! flags say what would have happened since they were last brought up to date.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::calendar::{DAY, DateTime, FIRST, LAST, from_bcd, to_bcd};

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0A;
const B: u8 = 0x0B;
const C: u8 = 0x0C;
const D: u8 = 0x0D;
/// A byte of the PC's: the century.
const CENTURY: u8 = 0x32;
/// Registers and memory.
pub(super) const SIZE: usize = 128;

const A_UPDATING: u8 = 1 << 7;
const A_RATE: u8 = 0x0F;
/// Both upper divider bits: the divider is held in reset.
const A_DIVIDER_RESET: u8 = 0x60;
/// A 32.768 kHz crystal, 1024 Hz.
const A_POWER_ON: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const B_UPDATE: u8 = 1 << 4;
const B_ALARM: u8 = 1 << 5;
const B_PERIODIC: u8 = 1 << 6;
const B_SET: u8 = 1 << 7;
/// The interrupt enables in B, and at the same places the flags in C.
const EVENTS: u8 = B_UPDATE | B_ALARM | B_PERIODIC;
const C_INTERRUPT: u8 = 1 << 7;
/// Valid RAM and time: the battery is good.
const D_VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;
/// Alarm bytes from here on match every value.
const ALARM_ANY: u8 = 0xC0;

const SECOND: i128 = 1_000_000_000;
/// How long before an update UIP is set.
const UPDATING: i128 = 244_000;
/// The first update after the divider's reset comes half a second later.
const AFTER_RESET: i128 = SECOND / 2;

/// The two times of an access.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    /// The machine's clock.
    pub running: Duration,
    /// The host's wall clock.
    pub wall: Duration,
}

/// The chip.
#[derive(Clone, Debug)]
pub(super) struct Chip {
    index: u8,
    /// Time registers in here count only while B_SET holds the time.
    bytes: [u8; SIZE],
    flags: u8,
    /// The guest's time less the host's, in nanoseconds.
    offset: i128,
    /// Up to where update and alarm flags are right: a second of the guest's time.
    seen_second: i64,
    /// Up to where the periodic flag is right: a time of the machine's clock.
    seen_running: Duration,
}

/// What is saved, format version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RtcState {
    index: u8,
    bytes: Vec<u8>,
    flags: u8,
    offset: i128,
    seen_second: i64,
}

/// The host's wall time in nanoseconds, which a broken host clock may not carry beyond year 9999.
fn nanoseconds(wall: Duration) -> i128 {
    i128::try_from(wall.as_nanos()).unwrap_or(i128::MAX).min(i128::from(LAST) * SECOND)
}

impl Chip {
    /// A chip that shows the host's time in `memory`, whose bytes below 14 are ignored.
    pub(super) fn new(memory: &[u8; SIZE], now: Now) -> Self {
        let mut bytes = *memory;
        for (byte, value) in bytes.iter_mut().zip([0; D as usize + 1]) {
            *byte = value;
        }
        bytes[A as usize] = A_POWER_ON;
        bytes[B as usize] = B_24_HOURS;
        let mut chip = Self {
            index: 0,
            bytes,
            flags: 0,
            offset: 0,
            seen_second: 0,
            seen_running: now.running,
        };
        chip.seen_second = chip.second(now);
        chip
    }

    /// What the reset pin does: interrupts off, flags clear. Time and memory live on a battery.
    pub(super) fn reset(&mut self) {
        self.index = 0;
        self.flags = 0;
        self.bytes[B as usize] &= !EVENTS;
    }

    fn byte(&self, register: u8) -> u8 {
        self.bytes[usize::from(register) % SIZE]
    }

    fn control(&self, bit: u8) -> bool {
        self.byte(B) & bit != 0
    }

    /// The guest's time in nanoseconds since the epoch.
    fn time(&self, now: Now) -> i128 {
        let (first, last) = (i128::from(FIRST) * SECOND, (i128::from(LAST) + 1) * SECOND - 1);
        (nanoseconds(now.wall) + self.offset).clamp(first, last)
    }

    fn second(&self, now: Now) -> i64 {
        self.time(now).div_euclid(SECOND) as i64
    }

    /// Writes the index port: bit 7 masks NMIs, which nothing here makes.
    pub(super) fn select(&mut self, value: u8) {
        self.index = value;
    }

    pub(super) fn selected(&self) -> u8 {
        self.index
    }

    /// Reads the selected register.
    pub(super) fn read(&mut self, now: Now) -> u8 {
        self.advance(now);
        match self.index % SIZE as u8 {
            register @ (SECONDS | MINUTES | HOURS | WEEKDAY | DAY_OF_MONTH | MONTH | YEAR
            | CENTURY)
                if !self.control(B_SET) =>
            {
                self.field(register, DateTime::from_unix(self.second(now)))
            }
            A => {
                let left = SECOND - self.time(now).rem_euclid(SECOND);
                let updating = left <= UPDATING && !self.control(B_SET);
                self.byte(A) | if updating { A_UPDATING } else { 0 }
            }
            C => {
                let flags = self.flags | if self.interrupt() { C_INTERRUPT } else { 0 };
                self.flags = 0;
                flags
            }
            D => D_VALID,
            register => self.byte(register),
        }
    }

    /// Writes the selected register.
    pub(super) fn write(&mut self, value: u8, now: Now) {
        self.advance(now);
        let register = self.index % SIZE as u8;
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY_OF_MONTH | MONTH | YEAR | CENTURY => {
                let running = !self.control(B_SET);
                if running {
                    self.hold(now);
                }
                self.bytes[usize::from(register)] = value;
                if running {
                    self.release(now);
                }
            }
            A => self.bytes[usize::from(A)] = value & !A_UPDATING,
            B => self.write_control(value, now),
            C | D => {}
            _ => self.bytes[usize::from(register)] = value,
        }
    }

    fn write_control(&mut self, value: u8, now: Now) {
        let held = self.control(B_SET);
        let hold = value & B_SET != 0;
        if hold && !held {
            self.hold(now);
        }
        // Holding the time forbids the update interrupt.
        self.bytes[usize::from(B)] = if hold { value & !B_UPDATE } else { value };
        if held && !hold {
            self.release(now);
        }
    }

    /// Puts the time into the registers.
    fn hold(&mut self, now: Now) {
        let date = DateTime::from_unix(self.second(now));
        for register in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY_OF_MONTH, MONTH, YEAR, CENTURY] {
            self.bytes[usize::from(register)] = self.field(register, date);
        }
    }

    /// Takes the time from the registers. Seconds go on where they are, or half a second before
    /// their end if the divider is held in reset, as drivers that set the time exactly have it.
    fn release(&mut self, now: Now) {
        let value = |register| self.decode(self.byte(register));
        let century = match self.control(B_BINARY) {
            true => self.byte(CENTURY),
            false => from_bcd(self.byte(CENTURY)),
        };
        let date = DateTime {
            year: u16::from(century.min(99)) * 100 + u16::from(value(YEAR).min(99)),
            month: value(MONTH),
            day: value(DAY_OF_MONTH),
            hour: self.decode_hour(self.byte(HOURS)),
            minute: value(MINUTES),
            second: value(SECONDS),
        };
        let phase = match self.byte(A) & A_DIVIDER_RESET {
            A_DIVIDER_RESET => AFTER_RESET,
            _ => self.time(now).rem_euclid(SECOND),
        };
        let set = i128::from(date.to_unix()) * SECOND + phase;
        self.offset = set - nanoseconds(now.wall);
        self.seen_second = self.second(now);
    }

    fn field(&self, register: u8, date: DateTime) -> u8 {
        match register {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode(date.weekday()),
            DAY_OF_MONTH => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode((date.year % 100) as u8),
            _ => self.encode((date.year / 100) as u8),
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.control(B_BINARY) { value } else { to_bcd(value) }
    }

    fn decode(&self, byte: u8) -> u8 {
        if self.control(B_BINARY) { byte } else { from_bcd(byte) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.control(B_24_HOURS) {
            return self.encode(hour);
        }
        let twelfth = self.encode((hour + 11) % 12 + 1);
        if hour >= 12 { twelfth | HOUR_PM } else { twelfth }
    }

    fn decode_hour(&self, byte: u8) -> u8 {
        if self.control(B_24_HOURS) {
            return self.decode(byte);
        }
        let hour = self.decode(byte & !HOUR_PM) % 12;
        if byte & HOUR_PM != 0 { hour + 12 } else { hour }
    }

    /// Brings the flags up to date.
    pub(super) fn advance(&mut self, now: Now) {
        if self.periods(now.running) > self.periods(self.seen_running) {
            self.flags |= B_PERIODIC;
        }
        self.seen_running = now.running;
        if self.control(B_SET) {
            return;
        }
        let second = self.second(now);
        if second > self.seen_second {
            self.flags |= B_UPDATE;
            if self.next_alarm(self.seen_second).is_some_and(|alarm| alarm <= second) {
                self.flags |= B_ALARM;
            }
        }
        self.seen_second = second;
    }

    /// The level of the interrupt output.
    pub(super) fn interrupt(&self) -> bool {
        self.flags & self.byte(B) & EVENTS != 0
    }

    /// True if the interrupt output can change without an access.
    pub(super) fn is_armed(&self) -> bool {
        self.byte(B) & EVENTS != 0
    }

    /// How long until the interrupt output goes high, if it will and is not.
    pub(super) fn next_interrupt(&self, now: Now) -> Option<Duration> {
        if self.interrupt() {
            return None;
        }
        let mut next = None::<Duration>;
        let mut earlier = |wait: Duration| next = Some(next.map_or(wait, |n| n.min(wait)));
        if let Some(rate) = self.periodic_rate().filter(|_| self.control(B_PERIODIC)) {
            let period = Duration::from_secs(1) / rate;
            let into = now.running.as_nanos() % period.as_nanos().max(1);
            earlier(period.saturating_sub(Duration::from_nanos(into as u64)));
        }
        if !self.control(B_SET) {
            let update = self.control(B_UPDATE).then(|| self.seen_second.saturating_add(1));
            let alarm =
                if self.control(B_ALARM) { self.next_alarm(self.seen_second) } else { None };
            for second in update.into_iter().chain(alarm) {
                let wait = i128::from(second) * SECOND - self.time(now);
                earlier(Duration::from_nanos(wait.clamp(0, i128::from(u64::MAX)) as u64));
            }
        }
        next
    }

    /// Periodic interrupts per second.
    fn periodic_rate(&self) -> Option<u32> {
        match self.byte(A) & A_RATE {
            0 => None,
            // With this crystal the two fastest rates are those of 8 and 9.
            rate @ 1..=2 => Some(512 >> rate),
            rate => Some(65_536 >> rate),
        }
    }

    /// Periods that passed up to `time`.
    fn periods(&self, time: Duration) -> u64 {
        let rate = u64::from(self.periodic_rate().unwrap_or(0));
        let part = u64::from(time.subsec_nanos()) * rate / 1_000_000_000;
        time.as_secs().wrapping_mul(rate).wrapping_add(part)
    }

    /// The first second after `after` that the alarm registers match.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let wanted = |byte: u8, value: u8| (byte < ALARM_ANY).then_some(i64::from(value));
        let [s, m, h] = [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM].map(|r| self.byte(r));
        let second = wanted(s, self.decode(s));
        let minute = wanted(m, self.decode(m));
        let hour = wanted(h, self.decode_hour(h));
        if hour > Some(23) || minute > Some(59) || second > Some(59) {
            return None;
        }
        let differs = |wanted: Option<i64>, is: i64| wanted.is_some_and(|wanted| wanted != is);
        let mut at = after.saturating_add(1);
        // At most to the end of this hour, 23 hours, 59 minutes and 59 seconds on, each in steps of
        // its own.
        for _ in 0..2 * (24 + 60 + 60) {
            let of_day = at.rem_euclid(DAY);
            let step = if differs(hour, of_day / 3600) {
                3600 - of_day % 3600
            } else if differs(minute, of_day / 60 % 60) {
                60 - of_day % 60
            } else if differs(second, of_day % 60) {
                1
            } else {
                return Some(at);
            };
            at = at.saturating_add(step);
        }
        None
    }

    pub(super) fn save(&self) -> RtcState {
        RtcState {
            index: self.index,
            bytes: self.bytes.to_vec(),
            flags: self.flags,
            offset: self.offset,
            seen_second: self.seen_second,
        }
    }

    /// A chip in the saved state, or what is wrong with it.
    pub(super) fn load(state: RtcState, now: Now) -> Result<Self, &'static str> {
        let bytes: [u8; SIZE] =
            state.bytes.try_into().map_err(|_| "its memory is not 128 bytes long")?;
        if state.flags & !EVENTS != 0
            || bytes[usize::from(A)] & A_UPDATING != 0
            || (bytes[usize::from(B)] & (B_SET | B_UPDATE)) == B_SET | B_UPDATE
        {
            return Err("a register has a value it cannot have");
        }
        if !(FIRST..=LAST).contains(&state.seen_second)
            || state.offset.unsigned_abs() > 2 * (LAST as u128) * SECOND as u128
        {
            return Err("its time is outside of the years 0 to 9999");
        }
        Ok(Self {
            index: state.index,
            bytes,
            flags: state.flags,
            offset: state.offset,
            seen_second: state.seen_second,
            seen_running: now.running,
        })
    }
}

#[cfg(test)]
mod tests;
