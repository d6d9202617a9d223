//! Model-specific registers: which ones belong to a vCPU's state, and their transfer.
//!
//! A register is part of the state if the CPU model implies it and no other part of the state holds
//! it: FS and GS base are in the segments, EFER in the control registers, the APIC's in the LAPIC.

use kvm_bindings::{Msrs, kvm_msr_entry};
use vmkit_hypervisor::x86::Msr;
use vmkit_hypervisor::{CpuModel, Feature, HypervisorError, Result, Vendor};

use super::KvmVcpu;
use crate::error::host;

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// IA32_MISC_ENABLE and its bit 0.
const MISC_ENABLE: u32 = 0x1A0;
const FAST_STRINGS: u64 = 1;

/// When a register belongs to the state.
enum When {
    Always,
    /// The model lists one of the features.
    Has(&'static [Feature]),
    /// The model is of this vendor.
    Of(Vendor),
    /// The guest is offered kvmclock. Left out of a saved state while zero, that is unused, so that
    /// such a state also loads where there is no KVM.
    KvmClock,
}

/// First index, count, and when.
const REGISTERS: &[(u32, u32, When)] = &[
    (0x3B, 1, When::Has(&[Feature::TscAdjust])),
    (0x48, 1, When::Has(&[Feature::SpecCtrl])),
    // SYSENTER_CS, _ESP, _EIP.
    (0x174, 3, When::Has(&[Feature::Sep])),
    // MCG_STATUS.
    (0x17A, 1, When::Has(&[Feature::Mca])),
    (MISC_ENABLE, 1, When::Always),
    // DEBUGCTL.
    (0x1D9, 1, When::Always),
    // Memory types: variable ranges, fixed ranges, default.
    (0x200, 16, When::Has(&[Feature::Mtrr])),
    (0x250, 1, When::Has(&[Feature::Mtrr])),
    (0x258, 2, When::Has(&[Feature::Mtrr])),
    (0x268, 8, When::Has(&[Feature::Mtrr])),
    (0x277, 1, When::Has(&[Feature::Pat])),
    (0x2FF, 1, When::Has(&[Feature::Mtrr])),
    // XSS.
    (0xDA0, 1, When::Has(&[Feature::Xsaves])),
    // Wall clock and system time.
    (0x4B56_4D00, 2, When::KvmClock),
    // STAR, LSTAR, CSTAR, FMASK.
    (0xC000_0081, 4, When::Has(&[Feature::LongMode, Feature::Syscall])),
    // KERNEL_GS_BASE.
    (0xC000_0102, 1, When::Has(&[Feature::LongMode])),
    // TSC_AUX.
    (0xC000_0103, 1, When::Has(&[Feature::Rdtscp, Feature::Rdpid])),
    // AMD's HWCR.
    (0xC001_0015, 1, When::Of(Vendor::Amd)),
];

fn is_kvmclock(index: u32) -> bool {
    index & !0xFF == 0x4B56_4D00
}

fn candidates(model: &CpuModel, kvmclock: bool) -> Vec<u32> {
    let belongs = |when: &When| match when {
        When::Always => true,
        When::Has(features) => features.iter().any(|&feature| model.has(feature)),
        When::Of(vendor) => model.vendor == *vendor,
        When::KvmClock => kvmclock,
    };
    let chosen = REGISTERS.iter().filter(|(_, _, when)| belongs(when));
    chosen.flat_map(|(first, count, _)| *first..first + count).collect()
}

impl KvmVcpu {
    /// The registers of this vCPU's state, ascending. The first time, those that this KVM does not
    /// know are dropped.
    fn list(&mut self) -> Result<&[u32]> {
        if self.msrs.is_none() {
            let kvmclock = self.partition.host.kvmclock_for(&self.model) != 0;
            let mut list = candidates(&self.model, kvmclock);
            let mut known = 0;
            while known < list.len() {
                let mut batch = entries(list.iter().skip(known).map(|i| (*i, 0)))?;
                known += self.fd.get_msrs(&mut batch).map_err(host("read MSRs"))?;
                if known < list.len() {
                    log::debug!("KVM does not know MSR {:#x}: not part of the state", list[known]);
                    list.remove(known);
                }
            }
            self.msrs = Some(list);
        }
        Ok(self.msrs.as_deref().unwrap_or_default())
    }

    pub(super) fn msrs(&mut self, out: &mut Vec<Msr>) -> Result<()> {
        let mut batch = entries(self.list()?.iter().map(|index| (*index, 0)))?;
        let read = self.fd.get_msrs(&mut batch).map_err(host("read MSRs"))?;
        if let Some(stuck) = batch.as_slice().get(read) {
            return Err(HypervisorError::state(format!("KVM cannot read MSR {:#x}", stuck.index)));
        }
        out.clear();
        for entry in batch.as_slice() {
            if entry.data != 0 || !is_kvmclock(entry.index) {
                out.push(Msr { index: entry.index, value: entry.data });
            }
        }
        Ok(())
    }

    pub(super) fn set_msrs(&mut self, from: &[Msr]) -> Result<()> {
        let list = self.list()?;
        if let Some(alien) = from.iter().find(|msr| !list.contains(&msr.index)) {
            return Err(HypervisorError::state(format!(
                "MSR {:#x} is not part of the CPU model on this host",
                alien.index
            )));
        }
        // What the state leaves out because it is zero is zero.
        let absent = list
            .iter()
            .filter(|index| is_kvmclock(**index) && !from.iter().any(|msr| msr.index == **index));
        let absent = absent.map(|index| (*index, 0));
        let mut batch = entries(from.iter().map(|msr| (msr.index, msr.value)).chain(absent))?;
        self.write_batch(&mut batch)
    }

    fn write_batch(&self, batch: &mut Msrs) -> Result<()> {
        let written = self.fd.set_msrs(batch).map_err(host("write MSRs"))?;
        match batch.as_slice().get(written) {
            None => Ok(()),
            Some(entry) => Err(HypervisorError::state(format!(
                "KVM refuses {:#x} for MSR {:#x}",
                entry.data, entry.index
            ))),
        }
    }

    pub(super) fn read_msr(&self, index: u32) -> Result<u64> {
        let mut batch = entries(std::iter::once((index, 0)))?;
        let read = self.fd.get_msrs(&mut batch).map_err(host("read an MSR"))?;
        match batch.as_slice() {
            [entry] if read == 1 => Ok(entry.data),
            _ => Err(HypervisorError::state(format!("KVM cannot read MSR {index:#x}"))),
        }
    }

    pub(super) fn write_msr(&self, msr: Msr) -> Result<()> {
        self.write_batch(&mut entries(std::iter::once((msr.index, msr.value)))?)
    }

    /// A processor comes out of reset with them on (Intel SDM vol. 4 §2.1, IA32_MISC_ENABLE); KVM's does
    /// not, and Linux then avoids REP MOVS and REP STOS.
    pub(super) fn turn_fast_strings_on(&self) -> Result<()> {
        let value = self.read_msr(MISC_ENABLE)? | FAST_STRINGS;
        self.write_msr(Msr { index: MISC_ENABLE, value })
    }

    pub(super) fn tsc(&self) -> Result<u64> {
        self.read_msr(TSC)
    }

    pub(super) fn set_tsc(&self, value: u64) -> Result<()> {
        self.write_msr(Msr { index: TSC, value })
    }
}

fn entries(of: impl Iterator<Item = (u32, u64)>) -> Result<Msrs> {
    let entries: Vec<_> =
        of.map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| HypervisorError::state("too many MSRs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_follows_the_model_and_ascends() {
        let v1 = candidates(&CpuModel::x86_64_v1(), false);
        assert!(v1.is_sorted());
        assert!(v1.contains(&0xC000_0082) && v1.contains(&0x277));
        assert!(!v1.contains(&0xC000_0103), "TSC_AUX needs RDTSCP");
        assert!(!v1.contains(&0x4B56_4D01));
        assert!(candidates(&CpuModel::x86_64_v2(), true).contains(&0xC000_0103));
    }

    #[test]
    fn what_other_parts_of_the_state_hold_is_not_listed() {
        let all = candidates(&CpuModel::x86_64_v3(), true);
        // TSC, APIC base, TSC deadline, EFER, FS base, GS base.
        for index in [0x10, 0x1B, 0x6E0, 0xC000_0080, 0xC000_0100, 0xC000_0101] {
            assert!(!all.contains(&index), "{index:#x}");
        }
    }
}
