//! The register file, by memory (xAPIC) and by MSR (x2APIC).
//!
//! Registers have one number in both: the byte offset divided by 16 is the MSR minus 0x800
//! (Intel SDM vol. 3A table 11-1 and table 11-6).

use super::base::{APIC_BASE_MSR, TSC_DEADLINE_MSR};
use super::timer::{DIVIDE_BITS, Mode};
use super::{
    ERROR_REGISTER, ERROR_SEND_VECTOR, FIRST_VECTOR, LVT_LINT0, LVT_MASKED, LVT_REMOTE_IRR,
    LVT_TIMER, LapicAction, LocalApic, SVR_ENABLED, SVR_SUPPRESS_EOI,
};
use crate::error::ApicFault;
use crate::message::{ApicMessage, BROADCAST, DeliveryMode, Ipi, Shorthand};
use crate::route::ApicMode;

pub(super) const ID: usize = 0x02;
pub(super) const VERSION: usize = 0x03;
pub(super) const TPR: usize = 0x08;
const APR: usize = 0x09;
pub(super) const PPR: usize = 0x0a;
const EOI: usize = 0x0b;
const RRD: usize = 0x0c;
pub(super) const LDR: usize = 0x0d;
pub(super) const DFR: usize = 0x0e;
pub(super) const SVR: usize = 0x0f;
pub(super) const ISR: usize = 0x10;
pub(super) const TMR: usize = 0x18;
pub(super) const IRR: usize = 0x20;
pub(super) const ESR: usize = 0x28;
pub(super) const ICR_LOW: usize = 0x30;
pub(super) const ICR_HIGH: usize = 0x31;
pub(super) const LVT: usize = 0x32;
const LVT_END: usize = 0x37;
pub(super) const INITIAL_COUNT: usize = 0x38;
pub(super) const CURRENT_COUNT: usize = 0x39;
pub(super) const DIVIDE: usize = 0x3e;
const SELF_IPI: usize = 0x3f;

const X2APIC_MSRS: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;

/// Delivery status, and remote IRR of the LINT entries: read-only, ignored when written.
const LVT_READ_ONLY: u32 = 1 << 12 | LVT_REMOTE_IRR;

/// ICR bits that neither exist nor (as delivery status, bit 12) are ignored.
const ICR_RESERVED: u64 = 0xfff0_0000 | 0x3_0000 | 1 << 13;
const ICR_BUSY: u64 = 1 << 12;

/// A register that does not exist, or not for this direction.
#[derive(Debug)]
enum Refused {
    Reserved,
    Direction,
}

impl LocalApic {
    /// Reads from the register page at `offset`, in xAPIC mode. Bytes outside the 32-bit
    /// registers read as 0, as does a read that leaves its register.
    pub fn read_mmio(&mut self, offset: u64, data: &mut [u8], now: u64) {
        data.fill(0);
        let (index, at) = ((offset >> 4) as usize & 0xff, (offset & 0xf) as usize);
        if at + data.len() > 4 || offset > 0xfff || self.mode() != ApicMode::Xapic {
            return;
        }
        match self.read(index, now) {
            Ok(value) => data.copy_from_slice(&value.to_le_bytes()[at..at + data.len()]),
            Err(Refused::Reserved) => self.error(ERROR_REGISTER),
            Err(Refused::Direction) => {}
        }
    }

    /// Writes to the register page at `offset`, in xAPIC mode. Anything but an aligned 32-bit
    /// access is dropped: what it does is undefined (Intel SDM vol. 3A §11.4.1).
    pub fn write_mmio(&mut self, offset: u64, data: &[u8], now: u64) -> LapicAction {
        let &[a, b, c, d] = data else {
            return LapicAction::None;
        };
        if offset & 0xf != 0 || offset > 0xfff || self.mode() != ApicMode::Xapic {
            return LapicAction::None;
        }
        let value = u32::from_le_bytes([a, b, c, d]);
        match self.write(offset as usize >> 4, value, now) {
            Ok(action) => action,
            Err(Refused::Reserved) => {
                self.error(ERROR_REGISTER);
                LapicAction::None
            }
            Err(Refused::Direction) => LapicAction::None,
        }
    }

    /// Whether [`read_msr`](Self::read_msr) and [`write_msr`](Self::write_msr) know `msr`:
    /// IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC range.
    #[must_use]
    pub fn has_msr(msr: u32) -> bool {
        msr == APIC_BASE_MSR || msr == TSC_DEADLINE_MSR || X2APIC_MSRS.contains(&msr)
    }

    /// Reads an MSR.
    ///
    /// # Errors
    /// [`ApicFault`] if it does not exist, now or at all, or cannot be read.
    pub fn read_msr(&mut self, msr: u32, now: u64) -> Result<u64, ApicFault> {
        match msr {
            APIC_BASE_MSR => return Ok(self.base),
            TSC_DEADLINE_MSR if self.config.tsc_deadline => {
                self.settle(now);
                return Ok(self.timer.deadline());
            }
            _ => {}
        }
        match self.x2apic_register(msr)? {
            ICR_LOW => Ok(self.icr),
            ICR_HIGH | DFR | APR | RRD => Err(ApicFault),
            index => self.read(index, now).map(u64::from).map_err(|_| ApicFault),
        }
    }

    /// Writes an MSR.
    ///
    /// # Errors
    /// [`ApicFault`] if it does not exist, now or at all, cannot be written, or a reserved bit is
    /// set. Nothing has changed then.
    pub fn write_msr(&mut self, msr: u32, value: u64, now: u64) -> Result<LapicAction, ApicFault> {
        match msr {
            APIC_BASE_MSR => {
                self.set_apic_base(value, now)?;
                return Ok(LapicAction::None);
            }
            TSC_DEADLINE_MSR if self.config.tsc_deadline => {
                self.settle(now);
                self.timer.set_deadline(value, self.tsc, now);
                self.settle(now);
                return Ok(LapicAction::None);
            }
            _ => {}
        }
        let index = self.x2apic_register(msr)?;
        if index == ICR_LOW {
            if value & ICR_RESERVED != 0 {
                return Err(ApicFault);
            }
            self.icr = value & !ICR_BUSY;
            return Ok(self.send((value >> 32) as u32));
        }
        let value = u32::try_from(value).map_err(|_| ApicFault)?;
        let allowed = match index {
            TPR | SELF_IPI => 0xff,
            EOI | ESR => 0,
            SVR => self.svr_bits(),
            LVT..=LVT_END => self.lvt_bits(index - LVT) | LVT_READ_ONLY,
            INITIAL_COUNT => u32::MAX,
            DIVIDE => DIVIDE_BITS,
            _ => return Err(ApicFault),
        };
        if value & !allowed != 0 || index == LVT && value >> 17 & 3 == 3 {
            return Err(ApicFault);
        }
        self.write(index, value, now).map_err(|_| ApicFault)
    }

    fn x2apic_register(&self, msr: u32) -> Result<usize, ApicFault> {
        if self.mode() != ApicMode::X2apic || !X2APIC_MSRS.contains(&msr) {
            return Err(ApicFault);
        }
        Ok((msr & 0xff) as usize)
    }

    fn read(&mut self, index: usize, now: u64) -> Result<u32, Refused> {
        Ok(match index {
            ID => self.id_register(),
            VERSION => self.version_register(),
            TPR => u32::from(self.tpr),
            // Not implemented since the Pentium 4.
            APR | RRD => 0,
            PPR => u32::from(self.ppr),
            LDR => self.ldr_register(),
            DFR => self.dfr,
            SVR => self.svr,
            ISR..TMR => self.isr.register(index - ISR),
            TMR..IRR => self.tmr.register(index - TMR),
            IRR..ESR => {
                self.settle(now);
                self.irr.register(index - IRR)
            }
            ESR => self.esr,
            ICR_LOW => self.icr as u32,
            ICR_HIGH => (self.icr >> 32) as u32,
            LVT..=LVT_END => self.lvt[index - LVT],
            INITIAL_COUNT => self.timer.initial(),
            CURRENT_COUNT => {
                self.settle(now);
                self.timer.current(now)
            }
            DIVIDE => self.timer.divide(),
            EOI => return Err(Refused::Direction),
            SELF_IPI if self.mode() == ApicMode::X2apic => return Err(Refused::Direction),
            _ => return Err(Refused::Reserved),
        })
    }

    fn write(&mut self, index: usize, value: u32, now: u64) -> Result<LapicAction, Refused> {
        match index {
            // The ID could be written on early processors only.
            ID | VERSION | APR | PPR | RRD | ISR..ESR | CURRENT_COUNT => {
                return Err(Refused::Direction);
            }
            TPR => self.set_tpr(value as u8),
            EOI => {
                return Ok(self.eoi().map_or(LapicAction::None, LapicAction::Eoi));
            }
            LDR => self.ldr = value & 0xff00_0000,
            DFR => self.dfr = value | 0x0fff_ffff,
            SVR => self.set_svr(value, now),
            ESR => {
                self.esr = u32::from(self.pending_errors);
                self.pending_errors = 0;
            }
            ICR_LOW => {
                let low = u64::from(value) & !ICR_RESERVED & !ICR_BUSY;
                self.icr = self.icr & !0xffff_ffff | low;
                let dest = (self.icr >> 56) as u32;
                return Ok(self.send(if dest == 0xff { BROADCAST } else { dest }));
            }
            ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            LVT..=LVT_END => self.set_lvt(index - LVT, value, now),
            INITIAL_COUNT => {
                self.settle(now);
                self.timer.set_initial(value, now);
                self.update_wake();
            }
            DIVIDE => {
                self.settle(now);
                self.timer.set_divide(value, now);
                self.update_wake();
            }
            SELF_IPI if self.mode() == ApicMode::X2apic => self.send_self(value as u8),
            _ => return Err(Refused::Reserved),
        }
        Ok(LapicAction::None)
    }

    pub(super) fn id_register(&self) -> u32 {
        match self.mode() {
            ApicMode::X2apic => self.config.id,
            _ => self.config.id << 24,
        }
    }

    /// Version 0x14, six LVT entries.
    pub(super) fn version_register(&self) -> u32 {
        0x0005_0014 | u32::from(self.config.directed_eoi) << 24
    }

    pub(super) fn ldr_register(&self) -> u32 {
        match self.mode() {
            ApicMode::X2apic => self.config.id >> 4 << 16 | 1 << (self.config.id & 0xf),
            _ => self.ldr,
        }
    }

    /// Bits of the SVR that can be set: vector, enable, focus checking, EOI suppression.
    pub(super) fn svr_bits(&self) -> u32 {
        0x3ff | if self.config.directed_eoi { SVR_SUPPRESS_EOI } else { 0 }
    }

    /// Bits of a local vector table entry that can be set.
    pub(super) fn lvt_bits(&self, entry: usize) -> u32 {
        match entry {
            0 if self.config.tsc_deadline => 0x7_00ff,
            0 => 0x3_00ff,
            1 | 2 => 0x1_07ff,
            3 | 4 => 0x1_a7ff,
            _ => 0x1_00ff,
        }
    }

    fn set_svr(&mut self, value: u32, now: u64) {
        self.settle(now);
        self.svr = value & self.svr_bits();
        if !self.is_software_enabled() {
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
        }
        self.update_wake();
    }

    fn set_lvt(&mut self, entry: usize, value: u32, now: u64) {
        self.settle(now);
        let remote_irr = self.lvt[entry] & LVT_REMOTE_IRR;
        let mut value = value & self.lvt_bits(entry) | remote_irr;
        if self.svr & SVR_ENABLED == 0 {
            value |= LVT_MASKED;
        }
        if entry == LVT_TIMER {
            value = without_reserved_mode(value);
            self.timer.set_mode(timer_mode(value));
        }
        self.lvt[entry] = value;
        if entry == LVT_LINT0 {
            if value & super::LVT_LEVEL == 0 {
                self.lvt[entry] &= !LVT_REMOTE_IRR;
            }
            self.serve_lint0_level();
        }
        self.update_wake();
    }

    /// Sends what the ICR says (Intel SDM vol. 3A §11.6.1).
    fn send(&mut self, dest: u32) -> LapicAction {
        let icr = self.icr as u32;
        let vector = icr as u8;
        let mode = match icr >> 8 & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            // INIT level de-assert has had no effect since the Pentium 4.
            5 if icr & (1 << 15 | 1 << 14) == 1 << 15 => return LapicAction::None,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::Sipi,
            _ => return LapicAction::None,
        };
        if mode.is_vectored() && vector < FIRST_VECTOR {
            self.error(ERROR_SEND_VECTOR);
            return LapicAction::None;
        }
        // Table 11-3: valid combinations.
        let shorthand = match icr >> 18 & 3 {
            0 => Shorthand::None,
            1 => {
                if mode == DeliveryMode::Fixed {
                    self.send_self(vector);
                }
                return LapicAction::None;
            }
            2 if mode == DeliveryMode::Fixed => Shorthand::All,
            2 => return LapicAction::None,
            _ => Shorthand::AllButSelf,
        };
        let logical = icr & 1 << 11 != 0;
        let message = ApicMessage { dest, logical, mode, vector, level: false };
        LapicAction::Ipi(Ipi { shorthand, message })
    }

    fn send_self(&mut self, vector: u8) {
        if vector < FIRST_VECTOR {
            self.error(ERROR_SEND_VECTOR);
        } else if self.is_software_enabled() {
            self.request(vector, false);
        }
    }
}

/// A timer entry, with the reserved mode 3 taken for TSC-deadline.
pub(super) fn without_reserved_mode(lvt: u32) -> u32 {
    if lvt & 1 << 18 != 0 { lvt & !(1 << 17) } else { lvt }
}

pub(super) fn timer_mode(lvt: u32) -> Mode {
    match lvt >> 17 & 3 {
        0 => Mode::OneShot,
        1 => Mode::Periodic,
        _ => Mode::TscDeadline,
    }
}
