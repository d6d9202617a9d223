//! One counter of the 8254, as a function of the input clock: nothing is counted, everything is
//! computed from the clock at which counting began.

use crate::error::IrqchipError;
use crate::state::{PitChannelState, PitRun};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Idle,
    /// In the clock after `start - 1` the count was loaded.
    Counting {
        start: i64,
    },
    Held {
        elapsed: i64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Counter {
    mode: u8,
    bcd: bool,
    access: u8,
    gate: bool,
    count: u32,
    next_count: Option<u32>,
    run: Run,
    write_low: Option<u8>,
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

/// No machine runs for this many input clocks (1,900 years).
const MAX_ELAPSED: i64 = 1 << 56;

impl Counter {
    /// A counter that waits for its first count.
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: 3,
            gate,
            count: 0x1_0000,
            next_count: None,
            run: Run::Idle,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// Modes 2 and 3 repeat.
    fn repeats(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// What the counting element wraps at.
    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// Input clocks of a cycle. A count of 1 is illegal in the repeating modes and taken for 2.
    fn cycle(&self) -> i64 {
        i64::from(self.count.max(if self.repeats() { 2 } else { 1 }))
    }

    fn elapsed(&self, t: i64) -> Option<i64> {
        match self.run {
            Run::Idle => None,
            Run::Counting { start } => Some(t - start),
            Run::Held { elapsed } => Some(elapsed),
        }
    }

    /// Puts a count that waited for the end of the cycle into use, if that has come.
    pub(super) fn settle(&mut self, t: i64) {
        if let (true, Some(next), Run::Counting { start }) =
            (self.repeats(), self.next_count, self.run)
        {
            let end = start + self.cycle();
            if t >= end {
                self.run = Run::Counting { start: end };
                self.count = next;
                self.next_count = None;
            }
        }
    }

    /// The OUT pin.
    pub(super) fn out(&self, t: i64) -> bool {
        let Some(elapsed) = self.elapsed(t) else {
            return self.mode != 0;
        };
        let count = self.cycle();
        match (self.mode, self.run) {
            (2 | 3, Run::Held { .. }) => true,
            (0, _) => elapsed >= count,
            _ if elapsed < 0 => true,
            (1, _) => elapsed >= count,
            (2, _) => elapsed % count != count - 1,
            (3, _) => elapsed % count < (count + 1) / 2,
            _ => elapsed != count,
        }
    }

    /// Rising edges of OUT after clock `from`, up to and with clock `to`, of the count in use.
    pub(super) fn edges(&self, from: i64, to: i64) -> i64 {
        let Run::Counting { start } = self.run else {
            return 0;
        };
        let (from, to) = ((from - start).max(0), to - start);
        if to < 0 {
            return 0;
        }
        if self.repeats() {
            return to / self.cycle() - from / self.cycle();
        }
        let edge = self.only_edge();
        i64::from(from < edge && edge <= to)
    }

    /// [`edges`](Self::edges), over a change of count at the end of the cycle.
    pub(super) fn edges_settling(&mut self, from: i64, to: i64) -> i64 {
        match (self.repeats(), self.next_count, self.run) {
            (true, Some(_), Run::Counting { start }) if to >= start + self.cycle() => {
                let end = start + self.cycle();
                let first = self.edges(from, end);
                self.settle(to);
                first + self.edges(from.max(end), to)
            }
            _ => self.edges(from, to),
        }
    }

    /// The first rising edge of OUT after clock `t`.
    pub(super) fn next_edge(&self, t: i64) -> Option<i64> {
        let Run::Counting { start } = self.run else {
            return None;
        };
        if self.repeats() {
            let done = (t - start).max(0) / self.cycle();
            return Some(start + (done + 1) * self.cycle());
        }
        Some(start + self.only_edge()).filter(|&edge| edge > t)
    }

    /// When OUT rises in the modes that do not repeat: modes 4 and 5 strobe low for a clock.
    fn only_edge(&self) -> i64 {
        self.cycle() + i64::from(self.mode >= 4)
    }

    /// The control word for this counter; not a latch command.
    pub(super) fn control(&mut self, value: u8) {
        let mode = value >> 1 & 7;
        *self = Self {
            mode: if mode > 5 { mode & 3 } else { mode },
            bcd: value & 1 != 0,
            access: value >> 4 & 3,
            count: self.count,
            ..Self::new(self.gate)
        };
    }

    pub(super) fn write(&mut self, value: u8, t: i64) {
        let low = match (self.access, self.write_low.take()) {
            (1, _) => return self.set_count(value.into(), t),
            (2, _) => 0,
            (_, Some(low)) => low,
            (_, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count and takes OUT low.
                    self.run = Run::Idle;
                }
                return;
            }
        };
        self.set_count(u16::from_le_bytes([low, value]), t);
    }

    fn set_count(&mut self, raw: u16, t: i64) {
        let count = match if self.bcd { from_bcd(raw) } else { raw.into() } {
            0 => self.modulus(),
            count => count,
        };
        match (self.mode, self.run) {
            (0 | 4, _) => {
                self.count = count;
                self.next_count = None;
                self.run = if self.gate {
                    Run::Counting { start: t + 1 }
                } else {
                    Run::Held { elapsed: 0 }
                };
            }
            (2 | 3, Run::Idle) if self.gate => {
                self.count = count;
                self.next_count = None;
                self.run = Run::Counting { start: t + 1 };
            }
            (2 | 3, Run::Counting { start }) => {
                // The cycle that is under way ends with the old count.
                let cycles = (t - start).max(0) / self.cycle();
                self.run = Run::Counting { start: start + cycles * self.cycle() };
                self.next_count = Some(count);
            }
            _ => self.next_count = Some(count),
        }
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    pub(super) fn set_gate(&mut self, high: bool, t: i64) {
        if high == self.gate {
            return;
        }
        self.gate = high;
        self.run = match (self.mode, self.run) {
            (0 | 4, Run::Held { elapsed }) if high => Run::Counting { start: t - elapsed.max(0) },
            // A trigger: it needs a count, of now or of before.
            (1 | 2 | 3 | 5, run) if high && (run != Run::Idle || self.next_count.is_some()) => {
                self.count = self.next_count.take().unwrap_or(self.count);
                Run::Counting { start: t + 1 }
            }
            (0 | 2 | 3 | 4, Run::Counting { start }) if !high => Run::Held { elapsed: t - start },
            (_, run) => run,
        };
    }

    pub(super) fn latch_count(&mut self, t: i64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(t));
        }
    }

    pub(super) fn latch_status(&mut self, t: i64) {
        if self.latched_status.is_none() {
            let null = self.next_count.is_some() || self.elapsed(t).is_none_or(|e| e < 0);
            self.latched_status = Some(
                u8::from(self.out(t)) << 7
                    | u8::from(null) << 6
                    | self.access << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    pub(super) fn read(&mut self, t: i64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(t)).to_le_bytes();
        let give_high = match self.access {
            1 => false,
            2 => true,
            _ => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if self.access != 3 || give_high {
            self.latched_count = None;
        }
        if give_high { high } else { low }
    }

    /// What the counting element holds.
    fn value(&self, t: i64) -> u16 {
        let elapsed = self.elapsed(t).unwrap_or(0).max(0);
        let (count, cycle) = (i64::from(self.count), self.cycle());
        let value = match self.mode {
            2 => cycle - elapsed % cycle,
            3 => {
                // It counts down by two, twice per cycle, from an even number.
                let (phase, high) = (elapsed % cycle, (cycle + 1) / 2);
                (cycle & !1) - 2 * if phase < high { phase } else { phase - high }
            }
            _ => count - elapsed,
        };
        let value = value.rem_euclid(self.modulus().into()) as u16;
        if self.bcd { to_bcd(value) } else { value }
    }

    pub(super) fn save(&self, t: i64) -> PitChannelState {
        PitChannelState {
            mode: self.mode,
            bcd: self.bcd,
            access: self.access,
            gate: self.gate,
            count: self.count,
            next_count: self.next_count,
            run: match self.run {
                Run::Idle => PitRun::Idle,
                Run::Counting { start } => PitRun::Counting(t - start),
                Run::Held { elapsed } => PitRun::Held(elapsed),
            },
            write_low: self.write_low,
            read_high: self.read_high,
            latched_count: self.latched_count,
            latched_status: self.latched_status,
        }
    }

    pub(super) fn from_state(state: &PitChannelState, t: i64) -> Result<Self, IrqchipError> {
        let require = |field, value: i64, range: std::ops::RangeInclusive<i64>| {
            let value_bits = value as u64;
            let error = IrqchipError::InvalidState { machine: "pit", field, value: value_bits };
            if range.contains(&value) { Ok(()) } else { Err(error) }
        };
        require("mode", state.mode.into(), 0..=5)?;
        require("access", state.access.into(), 1..=3)?;
        for count in [Some(state.count), state.next_count].into_iter().flatten() {
            require("count", count.into(), 1..=0x1_0000)?;
        }
        let run = match state.run {
            PitRun::Idle => Run::Idle,
            PitRun::Counting(elapsed) => {
                require("elapsed", elapsed, -1..=MAX_ELAPSED)?;
                Run::Counting { start: t - elapsed }
            }
            PitRun::Held(elapsed) => {
                require("elapsed", elapsed, -1..=MAX_ELAPSED)?;
                Run::Held { elapsed }
            }
        };
        Ok(Self {
            mode: state.mode,
            bcd: state.bcd,
            access: state.access,
            gate: state.gate,
            count: state.count,
            next_count: state.next_count,
            run,
            write_low: state.write_low,
            read_high: state.read_high,
            latched_count: state.latched_count,
            latched_status: state.latched_status,
        })
    }
}

/// Digits above 9 count as their value, within four digits.
fn from_bcd(raw: u16) -> u32 {
    (0..4).rev().fold(0, |value, digit| value * 10 + u32::from(raw >> (digit * 4) & 0xf)) % 10_000
}

fn to_bcd(value: u16) -> u16 {
    let digit = |unit: u16| value / unit % 10;
    digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
}
