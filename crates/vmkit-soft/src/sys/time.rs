//! The time-stamp counter: the VM clock at the guest's frequency, and an offset.

use vmkit_irqchip::TscClock;

use crate::cpu::Cpu;

impl Cpu {
    /// The time-stamp counter as a function of the VM clock. IA32_TSC_ADJUST is in the offset.
    pub fn tsc_clock(&self) -> TscClock {
        TscClock { hz: u64::from(self.partition.tsc_khz()) * 1000, offset: self.tsc_offset }
    }

    /// The time-stamp counter now.
    pub fn tsc(&self) -> u64 {
        self.tsc_clock().tsc_at(self.partition.clock_ns())
    }

    /// Moves the counter by `by`, modulo 2^64; a deadline that the local APIC waits for moves along.
    pub(super) fn move_tsc(&mut self, by: u64) {
        self.tsc_offset = self.tsc_offset.wrapping_add(by);
        let clock = self.tsc_clock();
        self.shared.apic().set_tsc(clock, self.partition.clock_ns());
        self.shared.notify();
    }
}
