//! The 8254 timer of a PC and port 0x61 (Intel 8254 data sheet; Intel ICH data sheet, "Timer
//! Registers" and "NMI Status and Control").
//!
//! Counter 0 makes IRQ 0; [`Pit::advance`] says when. Counter 2 has a gate and an output at port
//! 0x61, which is how operating systems calibrate by it. Counts follow the clock exactly: reading
//! one is arithmetic, whatever time has passed.
//!
//! One thing differs from the data sheet: a count written to a running counter in mode 3 waits for
//! the end of the whole cycle, as in mode 2, not of the half.

mod counter;

use crate::error::IrqchipError;
use crate::state::PitState;
use crate::time::{ns_until, ticks_in};
use counter::Counter;

/// Frequency of the counters' input clock in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Rising edges of output 0 that are made up for when the machine was late; more are lost.
const MAX_BACKLOG: u32 = 250;

const PORT61_GATE: u8 = 1 << 0;
const PORT61_WRITABLE: u8 = 0x0f;
const PORT61_REFRESH: u8 = 1 << 4;
const PORT61_OUT: u8 = 1 << 5;

/// Input clocks between memory refreshes: 15 µs.
const REFRESH_CLOCKS: i64 = 18;

/// The 8254 and port 0x61.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pit {
    counters: [Counter; 3],
    port61: u8,
    /// The clock up to which output 0 has been watched.
    seen: i64,
    /// Edges of output 0 that are still to be delivered.
    backlog: u32,
    /// Edges that were late wait until this clock.
    not_before: i64,
    /// When [`advance`](Self::advance) has something to do, in nanoseconds.
    wake: u64,
}

impl Pit {
    /// Its ports: three counters, the control word, and system control port B.
    pub const PORTS: [u16; 5] = [0x40, 0x41, 0x42, 0x43, 0x61];

    /// A timer in which nothing counts yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            port61: 0,
            seen: 0,
            backlog: 0,
            not_before: 0,
            wake: u64::MAX,
        }
    }

    /// Back to [`new`](Self::new).
    pub fn reset(&mut self) {
        *self = Self::new();
    }

    /// When [`advance`](Self::advance) is to be called.
    #[inline]
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        (self.wake != u64::MAX).then_some(self.wake)
    }

    /// Catches up with the clock. `true`: IRQ 0 is due; pulse it (high, then low), once.
    ///
    /// If several edges have passed since the last call, they are delivered one per call, at least
    /// half a period apart, so that the guest can take each: ticks are not lost when the host was
    /// late (up to 250 of them). It takes constant time whatever has passed.
    #[inline]
    #[must_use]
    pub fn advance(&mut self, now: u64) -> bool {
        now >= self.wake && self.deliver(clock(now))
    }

    fn deliver(&mut self, t: i64) -> bool {
        self.watch(t);
        let due = self.backlog > 0 && t >= self.not_before;
        if due {
            self.backlog -= 1;
            let half = self.counters[0].next_edge(t).map_or(0, |next| self.period_after(next) / 2);
            self.not_before = if self.backlog > 0 { t + half.max(1) } else { t };
        }
        self.update_wake();
        due
    }

    /// Input clocks from the edge at `edge` to the one after it.
    fn period_after(&self, edge: i64) -> i64 {
        self.counters[0].next_edge(edge).map_or(0, |next| next - edge)
    }

    /// Counts output 0's edges up to clock `t`.
    fn watch(&mut self, t: i64) {
        let edges = self.counters[0].edges_settling(self.seen, t);
        self.owe(edges);
        self.seen = self.seen.max(t);
    }

    fn owe(&mut self, edges: i64) {
        let sum = i64::from(self.backlog).saturating_add(edges.max(0));
        self.backlog = sum.min(MAX_BACKLOG.into()) as u32;
    }

    fn update_wake(&mut self) {
        let next = match self.backlog {
            0 => self.counters[0].next_edge(self.seen),
            _ => Some(self.not_before.max(self.seen)),
        };
        self.wake = next.map_or(u64::MAX, |t| {
            let ns = ns_until(t.max(0).unsigned_abs().into(), PIT_HZ);
            u64::try_from(ns).unwrap_or(u64::MAX)
        });
    }

    /// Reads a port. Ports that are not its own, and the control word, read as all ones.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        let t = clock(now);
        self.settle(t);
        match port {
            0x40..=0x42 => self.counters[usize::from(port & 3)].read(t),
            0x61 => {
                let refresh = if t / REFRESH_CLOCKS % 2 != 0 { PORT61_REFRESH } else { 0 };
                let out = if self.counters[2].out(t) { PORT61_OUT } else { 0 };
                self.port61 | refresh | out
            }
            _ => 0xff,
        }
    }

    /// Writes a port. [`next_deadline`](Self::next_deadline) may have changed then.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        let t = clock(now);
        self.settle(t);
        match port {
            0x40 => self.watched(t, |counter| counter.write(value, t)),
            0x41 | 0x42 => self.counters[usize::from(port & 3)].write(value, t),
            0x43 => self.write_control(value, t),
            0x61 => {
                self.port61 = value & PORT61_WRITABLE;
                self.counters[2].set_gate(value & PORT61_GATE != 0, t);
            }
            _ => {}
        }
        self.update_wake();
    }

    /// The speaker, if one is attached: counter 2's output, let through by port 0x61 bit 1.
    #[must_use]
    pub fn speaker(&mut self, now: u64) -> bool {
        let t = clock(now);
        self.settle(t);
        self.port61 & 1 << 1 != 0 && self.counters[2].out(t)
    }

    /// Saves the state as of `now`.
    #[must_use]
    pub fn save(&mut self, now: u64) -> PitState {
        let t = clock(now);
        self.settle(t);
        PitState {
            channels: [0, 1, 2].map(|index: usize| self.counters[index].save(t)),
            port61: self.port61,
            backlog: self.backlog,
        }
    }

    /// Takes over a saved state at `now`: counts go on from where they were.
    ///
    /// # Errors
    /// [`IrqchipError::InvalidState`]; then nothing has changed.
    pub fn load(&mut self, state: &PitState, now: u64) -> Result<(), IrqchipError> {
        let t = clock(now);
        let invalid = |field, value| IrqchipError::InvalidState { machine: "pit", field, value };
        let [a, b, c] = &state.channels;
        let counters =
            [Counter::from_state(a, t)?, Counter::from_state(b, t)?, Counter::from_state(c, t)?];
        if !counters[0].gate() || !counters[1].gate() {
            return Err(invalid("gate", 0));
        }
        let gate = state.port61 & PORT61_GATE != 0;
        if state.port61 & !PORT61_WRITABLE != 0 || gate != counters[2].gate() {
            return Err(invalid("port61", state.port61.into()));
        }
        if state.backlog > MAX_BACKLOG {
            return Err(invalid("backlog", state.backlog.into()));
        }
        let port61 = state.port61;
        *self = Self { counters, port61, seen: t, backlog: state.backlog, not_before: t, wake: 0 };
        self.update_wake();
        Ok(())
    }

    fn settle(&mut self, t: i64) {
        self.watch(t);
        for counter in &mut self.counters {
            counter.settle(t);
        }
    }

    fn write_control(&mut self, value: u8, t: i64) {
        let select = usize::from(value >> 6);
        let Some(counter) = self.counters.get_mut(select) else {
            // The read-back command: bits 5 and 4 are active low.
            for (index, counter) in self.counters.iter_mut().enumerate() {
                if value & 2 << index != 0 {
                    if value & 1 << 5 == 0 {
                        counter.latch_count(t);
                    }
                    if value & 1 << 4 == 0 {
                        counter.latch_status(t);
                    }
                }
            }
            return;
        };
        if value & 0x30 == 0 {
            counter.latch_count(t);
        } else if select == 0 {
            // What the old programming owes is forgotten.
            self.backlog = 0;
            self.not_before = t;
            self.watched(t, |counter| counter.control(value));
        } else {
            counter.control(value);
        }
    }

    /// Does something to counter 0 that may make its output rise at once.
    fn watched(&mut self, t: i64, act: impl FnOnce(&mut Counter)) {
        let counter = &mut self.counters[0];
        let before = counter.out(t);
        act(counter);
        let rises = !before && counter.out(t);
        self.owe(rises.into());
    }
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Default for PitState {
    /// The state of [`Pit::new`].
    fn default() -> Self {
        Pit::new().save(0)
    }
}

/// The input clock at `now`: below 2^55.
fn clock(now: u64) -> i64 {
    ticks_in(now, PIT_HZ) as i64
}
