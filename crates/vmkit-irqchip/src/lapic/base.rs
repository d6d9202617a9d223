//! IA32_APIC_BASE: whether the local APIC is there, where, and in which mode.

use super::LocalApic;
use crate::error::ApicFault;
use crate::route::ApicMode;

/// IA32_APIC_BASE.
pub const APIC_BASE_MSR: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE_MSR: u32 = 0x6e0;

pub(super) const BSP: u64 = 1 << 8;
pub(super) const EXTD: u64 = 1 << 10;
pub(super) const ENABLE: u64 = 1 << 11;
const DEFAULT_ADDRESS: u64 = 0xfee0_0000;

pub(super) fn reset_value(bsp: bool) -> u64 {
    DEFAULT_ADDRESS | ENABLE | if bsp { BSP } else { 0 }
}

/// The mode that bits 11 and 10 select; `None` for the invalid combination.
pub(super) fn mode_of(base: u64) -> Option<ApicMode> {
    match (base & ENABLE != 0, base & EXTD != 0) {
        (false, false) => Some(ApicMode::Disabled),
        (true, false) => Some(ApicMode::Xapic),
        (true, true) => Some(ApicMode::X2apic),
        (false, true) => None,
    }
}

impl LocalApic {
    /// Whether the local APIC is on, and how. When it is off, CPUID.01H:EDX bit 9 reads 0.
    #[inline]
    #[must_use]
    pub fn mode(&self) -> ApicMode {
        mode_of(self.base).unwrap_or(ApicMode::Disabled)
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn apic_base(&self) -> u64 {
        self.base
    }

    /// Where the register page is, in xAPIC mode.
    #[must_use]
    pub fn mmio_base(&self) -> Option<u64> {
        (self.mode() == ApicMode::Xapic).then_some(self.base & !0xfff)
    }

    /// Bits of IA32_APIC_BASE that exist here.
    pub(super) fn base_bits(&self) -> u64 {
        let width = u32::from(self.config.physical_bits.clamp(32, 52));
        let address = ((1 << width) - 1) & !0xfff;
        address | ENABLE | BSP | if self.config.x2apic { EXTD } else { 0 }
    }

    /// Writes IA32_APIC_BASE. Legal transitions are those of Intel SDM vol. 3A §11.12.5:
    /// off to xAPIC, xAPIC to x2APIC, and either to off. Being off loses all state, as a reset
    /// does; the step to x2APIC mode keeps it.
    ///
    /// # Errors
    /// [`ApicFault`] for a reserved bit or another transition.
    pub fn set_apic_base(&mut self, value: u64, now: u64) -> Result<(), ApicFault> {
        if value & !self.base_bits() != 0 {
            return Err(ApicFault);
        }
        let new = mode_of(value).ok_or(ApicFault)?;
        match (self.mode(), new) {
            (ApicMode::Disabled, ApicMode::X2apic) | (ApicMode::X2apic, ApicMode::Xapic) => {
                return Err(ApicFault);
            }
            (ApicMode::Disabled, _) | (_, ApicMode::Disabled) => self.init(),
            _ => self.settle(now),
        }
        self.base = value;
        Ok(())
    }
}
