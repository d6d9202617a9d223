//! Model-specific registers: which exist is what the CPU model lists; an access to any other, or of a
//! value that a register cannot hold, is #GP(0) (Intel SDM vol. 4).

use iced_x86::Instruction;
use vmkit_hypervisor::{CpuModel, Feature, Vendor};
use vmkit_irqchip::LocalApic;

use super::mtrr::Mtrrs;
use crate::cpu::trap::Trap;
use crate::cpu::{Cpu, FS, GS, RAX, RCX, RDX};
use crate::mem::canonical;

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const APIC_BASE: u32 = 0x1B;
const FEATURE_CONTROL: u32 = 0x3A;
const TSC_ADJUST: u32 = 0x3B;
const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const BIOS_SIGN: u32 = 0x8B;
const PLATFORM_INFO: u32 = 0xCE;
const ARCH_CAPABILITIES: u32 = 0x10A;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17A;
const MISC_ENABLE: u32 = 0x1A0;
const DEBUGCTL: u32 = 0x1D9;
const PAT: u32 = 0x277;
const XSS: u32 = 0xDA0;
const EFER: u32 = 0xC000_0080;
const STAR: u32 = 0xC000_0081;
const LSTAR: u32 = 0xC000_0082;
const CSTAR: u32 = 0xC000_0083;
const FMASK: u32 = 0xC000_0084;
const FS_BASE: u32 = 0xC000_0100;
const GS_BASE: u32 = 0xC000_0101;
const KERNEL_GS_BASE: u32 = 0xC000_0102;
const TSC_AUX: u32 = 0xC000_0103;
const AMD_SYSCFG: u32 = 0xC001_0010;
const AMD_HWCR: u32 = 0xC001_0015;
const AMD_DE_CFG: u32 = 0xC001_1029;

/// What this processor is immune to, as ARCH_CAPABILITIES tells it: RDCL_NO, IBRS_ALL, SKIP_L1DFL,
/// SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO,
/// GDS_NO, RFDS_NO, ITS_NO. Guest code is interpreted: it never runs speculatively.
const IMMUNE: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// IA32_PAT after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Fast strings on.
const MISC_FAST_STRINGS: u64 = 1;
/// No branch trace store, no PEBS: read-only.
const MISC_UNAVAILABLE: u64 = 1 << 11 | 1 << 12;
/// Read-only: those, and performance monitoring.
const MISC_READ_ONLY: u64 = MISC_UNAVAILABLE | 1 << 7;
/// Kept and of no effect beside fast strings: thermal control, SpeedStep, MONITOR, the limit of CPUID,
/// xTPR messages, no execute-disable, no turbo.
const MISC_KEPT: u64 =
    MISC_FAST_STRINGS | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34 | 1 << 38;
/// The microcode revision that BIOS_SIGN tells, in its upper half.
const MICROCODE: u64 = 0x1_0000;
/// DEBUGCTL.LBR and BTF.
const DEBUGCTL_BITS: u64 = 3;

/// The MSRs that live nowhere else.
#[derive(Clone, Debug)]
pub(crate) struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub spec_ctrl: u64,
    pub misc_enable: u64,
    pub debugctl: u64,
    pub pat: u64,
    pub mcg_status: u64,
    pub amd_hwcr: u64,
    pub mtrrs: Mtrrs,
}

impl Msrs {
    /// After power-up.
    pub fn new() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            spec_ctrl: 0,
            misc_enable: MISC_FAST_STRINGS | MISC_UNAVAILABLE,
            debugctl: 0,
            pat: PAT_RESET,
            mcg_status: 0,
            amd_hwcr: 0,
            mtrrs: Mtrrs::default(),
        }
    }
}

/// True if `model` has MSR `index`; those of the local APIC it decides itself.
fn exists(model: &CpuModel, index: u32) -> bool {
    let intel = model.vendor == Vendor::Intel;
    match index {
        TSC => model.has(Feature::Tsc),
        APIC_BASE => model.has(Feature::Apic),
        PLATFORM_ID | FEATURE_CONTROL | PLATFORM_INFO => intel,
        BIOS_SIGN | MISC_ENABLE | DEBUGCTL => true,
        TSC_ADJUST => model.has(Feature::TscAdjust),
        SPEC_CTRL | PRED_CMD => model.has(Feature::SpecCtrl),
        ARCH_CAPABILITIES => model.has(Feature::ArchCapabilities),
        SYSENTER_CS..=SYSENTER_EIP => model.has(Feature::Sep),
        MCG_CAP | MCG_STATUS => model.has(Feature::Mca),
        PAT => model.has(Feature::Pat),
        XSS => model.has(Feature::Xsaves),
        EFER => {
            model.has(Feature::LongMode) || model.has(Feature::Nx) || model.has(Feature::Syscall)
        }
        STAR | LSTAR..=FMASK => model.has(Feature::Syscall) || model.has(Feature::LongMode),
        FS_BASE | GS_BASE | KERNEL_GS_BASE => model.has(Feature::LongMode),
        TSC_AUX => model.has(Feature::Rdtscp) || model.has(Feature::Rdpid),
        AMD_SYSCFG | AMD_HWCR | AMD_DE_CFG => !intel,
        _ if Mtrrs::knows(index) => model.has(Feature::Mtrr),
        _ => false,
    }
}

/// First index and count of the MSRs that are part of a vCPU's state, if the model has them, because no
/// other part holds them.
const SAVED: &[(u32, u32)] = &[
    (TSC_ADJUST, 1),
    (SPEC_CTRL, 1),
    (SYSENTER_CS, 3),
    (MCG_STATUS, 1),
    (MISC_ENABLE, 1),
    (DEBUGCTL, 1),
    (0x200, 16),
    (0x250, 1),
    (0x258, 2),
    (0x268, 8),
    (PAT, 1),
    (0x2FF, 1),
    (XSS, 1),
    (STAR, 4),
    (KERNEL_GS_BASE, 1),
    (TSC_AUX, 1),
    (AMD_HWCR, 1),
];

/// The MSRs of a vCPU's state, ascending.
pub(super) fn saved_msrs(model: &CpuModel) -> impl Iterator<Item = u32> + '_ {
    let all = SAVED.iter().flat_map(|&(first, count)| first..first + count);
    all.filter(|&index| exists(model, index))
}

/// True if every byte names a memory type of the PAT (Intel SDM vol. 3A §12.12.2).
fn pat_valid(value: u64) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// `value` if `fine`.
fn when(fine: bool, value: u64) -> Option<u64> {
    fine.then_some(value)
}

impl Cpu {
    /// Reads an MSR; `None` is #GP(0).
    pub(super) fn read_msr(&mut self, index: u32) -> Option<u64> {
        if LocalApic::has_msr(index) {
            let now = self.partition.clock_ns();
            return self.shared.apic().read_msr(index, now).ok();
        }
        if !exists(&self.model, index) {
            return None;
        }
        let msrs = &self.msrs;
        Some(match index {
            TSC => self.tsc(),
            // Locked, with nothing enabled: no VMX, no SGX.
            FEATURE_CONTROL => 1,
            TSC_ADJUST => msrs.tsc_adjust,
            SPEC_CTRL => msrs.spec_ctrl,
            BIOS_SIGN => MICROCODE << 32,
            // The ratio of the TSC to a bus clock of 100 MHz.
            PLATFORM_INFO => u64::from((self.partition.tsc_khz() / 100_000) & 0xFF) << 8,
            ARCH_CAPABILITIES => IMMUNE,
            SYSENTER_CS => msrs.sysenter_cs,
            SYSENTER_ESP => msrs.sysenter_esp,
            SYSENTER_EIP => msrs.sysenter_eip,
            MCG_STATUS => msrs.mcg_status,
            MISC_ENABLE => msrs.misc_enable,
            DEBUGCTL => msrs.debugctl,
            PAT => msrs.pat,
            EFER => self.control.efer,
            STAR => msrs.star,
            LSTAR => msrs.lstar,
            CSTAR => msrs.cstar,
            FMASK => msrs.fmask,
            FS_BASE => self.segs[FS].base,
            GS_BASE => self.segs[GS].base,
            KERNEL_GS_BASE => msrs.kernel_gs_base,
            TSC_AUX => msrs.tsc_aux,
            AMD_HWCR => msrs.amd_hwcr,
            // LFENCE serialises.
            AMD_DE_CFG => 2,
            // No error-reporting banks; no platform; no supervisor state to save.
            MCG_CAP | PLATFORM_ID | XSS | AMD_SYSCFG => 0,
            // PRED_CMD is a command.
            _ => return msrs.mtrrs.read(index),
        })
    }

    /// Writes an MSR as WRMSR does; `None` is #GP(0), and nothing has changed.
    pub(super) fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        if LocalApic::has_msr(index) {
            return self.write_apic_msr(index, value);
        }
        if !exists(&self.model, index) {
            return None;
        }
        match index {
            TSC => {
                let by = value.wrapping_sub(self.tsc());
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(by);
                self.move_tsc(by);
            }
            TSC_ADJUST => {
                let by = value.wrapping_sub(self.msrs.tsc_adjust);
                self.msrs.tsc_adjust = value;
                self.move_tsc(by);
            }
            FS_BASE => self.set_segment_base(FS, when(canonical(value), value)?),
            GS_BASE => self.set_segment_base(GS, when(canonical(value), value)?),
            EFER => return self.write_efer(value).then_some(()),
            // A microcode loader writes zero, then asks CPUID for the revision.
            BIOS_SIGN => {}
            // IBPB; there is no predictor.
            PRED_CMD => return (value & !1 == 0).then_some(()),
            PLATFORM_ID | FEATURE_CONTROL | PLATFORM_INFO | ARCH_CAPABILITIES | MCG_CAP
            | AMD_SYSCFG | AMD_DE_CFG => return None,
            _ => self.msrs = self.msrs_with(index, value)?,
        }
        Some(())
    }

    /// The plain registers with MSR `index` set to `value`; `None` if it cannot hold that. Touches
    /// nothing else, so that a saved state can be checked with it.
    pub(super) fn msrs_with(&self, index: u32, value: u64) -> Option<Msrs> {
        let mut msrs = self.msrs.clone();
        msrs.set(&self.model, index, value)?;
        Some(msrs)
    }

    fn write_apic_msr(&mut self, index: u32, value: u64) -> Option<()> {
        let now = self.partition.clock_ns();
        let action = self.shared.apic().write_msr(index, value, now).ok()?;
        self.apic_written(action);
        if index == APIC_BASE {
            // The register page may have moved.
            self.flush_all();
        }
        Some(())
    }
}

impl Msrs {
    /// Sets a register that is nothing but its value.
    pub(super) fn set(&mut self, model: &CpuModel, index: u32, value: u64) -> Option<()> {
        if !exists(model, index) {
            return None;
        }
        match index {
            TSC_ADJUST => self.tsc_adjust = value,
            // IBRS, STIBP, SSBD.
            SPEC_CTRL => self.spec_ctrl = when(value & !7 == 0, value)?,
            SYSENTER_CS => self.sysenter_cs = value & 0xFFFF_FFFF,
            SYSENTER_ESP => self.sysenter_esp = when(canonical(value), value)?,
            SYSENTER_EIP => self.sysenter_eip = when(canonical(value), value)?,
            MISC_ENABLE => {
                let fine = value & !(MISC_KEPT | MISC_READ_ONLY) == 0;
                self.misc_enable = when(fine, value & MISC_KEPT)? | MISC_UNAVAILABLE;
            }
            DEBUGCTL => self.debugctl = when(value & !DEBUGCTL_BITS == 0, value)?,
            MCG_STATUS => self.mcg_status = when(value & !7 == 0, value)?,
            AMD_HWCR => self.amd_hwcr = when(value >> 32 == 0, value)?,
            PAT => self.pat = when(pat_valid(value), value)?,
            XSS => return (value == 0).then_some(()),
            STAR => self.star = value,
            LSTAR => self.lstar = when(canonical(value), value)?,
            CSTAR => self.cstar = when(canonical(value), value)?,
            FMASK => self.fmask = when(value >> 32 == 0, value)?,
            KERNEL_GS_BASE => self.kernel_gs_base = when(canonical(value), value)?,
            TSC_AUX => self.tsc_aux = when(value >> 32 == 0, value)?,
            _ => self.mtrrs.write(index, value, model.physical_bits)?,
        }
        Some(())
    }
}

/// RDMSR.
pub(super) fn rdmsr(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    match cpu.read_msr(cpu.regs[RCX] as u32) {
        Some(value) => cpu.set_edx_eax(value),
        None => return Err(cpu.gp0()),
    }
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(cpu: &mut Cpu, _: &Instruction) -> Result<(), Trap> {
    cpu.need_cpl0()?;
    let value = cpu.regs[RDX] << 32 | cpu.regs[RAX] & 0xFFFF_FFFF;
    match cpu.write_msr(cpu.regs[RCX] as u32, value) {
        Some(()) => Ok(()),
        None => Err(cpu.gp0()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_belongs_to_a_listed_feature() {
        let (v1, v2) = (CpuModel::x86_64_v1(), CpuModel::x86_64_v2());
        assert!(!exists(&v1, TSC_AUX) && exists(&v2, TSC_AUX));
        assert!(!exists(&v2, SPEC_CTRL), "the model lists no speculation control");
        assert!(exists(&v1, LSTAR) && !exists(&v1, 0xC001_0015));
    }

    #[test]
    fn values_that_cannot_be_held_are_refused() {
        let model = CpuModel::x86_64_v2();
        let mut msrs = Msrs::new();
        assert!(msrs.set(&model, LSTAR, 1 << 63).is_none());
        assert!(msrs.set(&model, PAT, 2).is_none());
        assert!(msrs.set(&model, PAT, PAT_RESET).is_some());
        assert!(msrs.set(&model, FMASK, 1 << 32).is_none());
    }

    #[test]
    fn the_saved_list_ascends_and_exists() {
        let model = CpuModel::x86_64_v3();
        let list: Vec<u32> = saved_msrs(&model).collect();
        assert!(list.is_sorted() && list.len() > 30);
        assert!(list.iter().all(|&index| exists(&model, index)));
    }

    #[test]
    fn what_can_be_written_is_saved() {
        use vmkit_hypervisor::FeatureSet;
        let rich = CpuModel::with_features("rich", crate::features());
        let features = FeatureSet::of(&[Feature::Syscall, Feature::Rdpid, Feature::Mca]);
        let bare = CpuModel::with_features("bare", features);
        for vendor in [Vendor::Intel, Vendor::Amd] {
            for model in [&rich, &bare] {
                let mut model = model.clone();
                model.vendor = vendor;
                let saved: Vec<u32> = saved_msrs(&model).collect();
                for index in (0..0x2000).chain(0xC000_0000..0xC001_2000) {
                    // What a register that is nothing but its value can take.
                    let mut msrs = Msrs::new();
                    let takes = (0..64).any(|bit| msrs.set(&model, index, 1 << bit).is_some());
                    assert!(!takes || saved.contains(&index), "{index:#x}");
                }
            }
        }
    }
}
