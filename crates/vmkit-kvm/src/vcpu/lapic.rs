//! The in-kernel local APIC: KVM's register page to the neutral state and back.
//!
//! With 32-bit IDs enabled (see the partition), KVM's page is the architecture's.

use kvm_bindings::kvm_lapic_state;
use vmkit_hypervisor::x86::Msr;
use vmkit_hypervisor::{Feature, HypervisorError, Result};
use vmkit_irqchip::{LapicPage, LapicState};

use super::KvmVcpu;
use super::state::refused;
use crate::error::host;
use crate::hypervisor::APIC_HZ;

/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6E0;
/// IA32_APIC_BASE bit 10: x2APIC mode.
const X2APIC: u64 = 1 << 10;

// Register offsets (Intel SDM vol. 3A table 11-1).
const ID: usize = 0x20;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3E0;

impl KvmVcpu {
    pub(super) fn lapic(&self) -> Result<LapicState> {
        let page = self.fd.get_lapic().map_err(host("read the local APIC"))?;
        let sregs = self.fd.get_sregs().map_err(host("read system registers"))?;
        let tsc_deadline =
            if self.model.has(Feature::TscDeadline) { self.read_msr(TSC_DEADLINE)? } else { 0 };
        Ok(LapicState {
            apic_base: sregs.apic_base,
            registers: LapicPage::from_bytes(&page.regs.map(i8::cast_unsigned)),
            tsc_deadline,
            timer_remaining: None,
            pending_errors: 0,
            lint: [false; 2],
            extint: false,
        })
    }

    /// The APIC's base has been set before.
    pub(super) fn set_lapic(&self, from: &LapicState) -> Result<()> {
        let mut registers = from.registers;
        if let Some(ns) = from.timer_remaining {
            registers.set(CURRENT_COUNT, current_count(ns, &registers));
        }
        let page = kvm_lapic_state { regs: registers.to_bytes().map(u8::cast_signed) };
        self.fd.set_lapic(&page).map_err(|error| refused("local APIC", &error))?;
        if self.model.has(Feature::TscDeadline) {
            self.write_msr(Msr { index: TSC_DEADLINE, value: from.tsc_deadline })?;
        }
        Ok(())
    }

    pub(super) fn check_lapic(&self, state: &LapicState) -> Result<()> {
        let id = state.registers.get(ID);
        let id = if state.apic_base & X2APIC != 0 { id } else { id >> 24 };
        // A guest may change its xAPIC ID; nobody does, and KVM would send interrupts astray.
        if id != self.index {
            return Err(HypervisorError::state(format!(
                "a local APIC of ID {id:#x} for vCPU {}",
                self.index
            )));
        }
        Ok(())
    }
}

/// The current-count register when the timer has `ns` to go.
fn current_count(ns: u64, registers: &LapicPage) -> u32 {
    let initial = registers.get(INITIAL_COUNT);
    // Mode 10b counts by the TSC deadline, not by this register.
    if initial == 0 || registers.get(LVT_TIMER) >> 17 & 3 == 2 {
        return 0;
    }
    let ticks =
        u128::from(ns) * u128::from(APIC_HZ) / 1_000_000_000 / u128::from(divisor(registers));
    // Not zero: that would be a timer that has expired.
    u32::try_from(ticks).unwrap_or(initial).clamp(1, initial)
}

/// The timer's divisor (Intel SDM vol. 3A figure 11-10).
fn divisor(registers: &LapicPage) -> u32 {
    let bits = registers.get(DIVIDE);
    1 << (((bits & 3 | bits >> 1 & 4) + 1) & 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divisor_is_spread_over_bits_0_1_and_3() {
        let with = |bits| {
            let mut page = LapicPage::new();
            page.set(DIVIDE, bits);
            divisor(&page)
        };
        assert_eq!([0, 1, 2, 3, 8, 9, 10, 11].map(with), [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn time_left_becomes_a_count_that_is_not_expired() {
        let mut page = LapicPage::new();
        page.set(DIVIDE, 0b1011);
        page.set(INITIAL_COUNT, 1_000_000);
        assert_eq!(current_count(250_000, &page), 250_000);
        assert_eq!(current_count(0, &page), 1);
        assert_eq!(current_count(u64::MAX, &page), 1_000_000);
        page.set(LVT_TIMER, 2 << 17);
        assert_eq!(current_count(250_000, &page), 0);
    }
}
