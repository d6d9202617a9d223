//! What this processor implements, and what of it a CPU model lists.

use iced_x86::{CpuidFeature, DecoderOptions, Instruction};
use vmkit_hypervisor::{CpuModel, Feature, FeatureSet};

use crate::cpu::Cpu;

/// The features this processor implements on this host.
pub fn features() -> FeatureSet {
    use Feature as F;
    FeatureSet::of(&[
        F::Fpu,
        F::De,
        F::Pse,
        F::Tsc,
        F::Msr,
        F::Pae,
        F::Cx8,
        F::Apic,
        F::Sep,
        F::Mtrr,
        F::Pge,
        F::Mca,
        F::Mce,
        F::Cmov,
        F::Pat,
        F::Pse36,
        F::Clflush,
        F::Mmx,
        F::Fxsr,
        F::Sse,
        F::Sse2,
        F::Hypervisor,
        F::Syscall,
        F::Nx,
        F::LongMode,
        F::ConstantTsc,
        F::Arat,
        F::Cx16,
        F::X2apic,
        F::Popcnt,
        F::TscDeadline,
        F::LahfLm,
        F::Gbpages,
        F::Rdtscp,
        F::TscAdjust,
        F::Prefetchw,
        F::Erms,
        F::Fsrm,
        F::Smep,
        F::Smap,
        F::Fsgsbase,
        F::Movbe,
        F::Bmi1,
        F::Bmi2,
        F::Lzcnt,
        F::Adx,
        F::Clflushopt,
        F::Clwb,
        F::Umip,
        F::Rdpid,
        F::Xsave,
        F::Xsaveopt,
        F::Xsavec,
        F::Xgetbv1,
        F::SpecCtrl,
        F::ArchCapabilities,
        F::Vme,
        F::Invpcid,
    ])
    .union(crate::sse::host_features())
}

/// How to decode what older processors read differently: F3 0F BC and F3 0F BD are BSF and BSR where
/// TZCNT and LZCNT are not listed, WBNOINVD is WBINVD.
pub(crate) fn decoder_options(model: &CpuModel) -> u32 {
    let mut options = DecoderOptions::NO_WBNOINVD;
    if !model.has(Feature::Bmi1) {
        options |= DecoderOptions::NO_MPFX_0FBC;
    }
    if !model.has(Feature::Lzcnt) {
        options |= DecoderOptions::NO_MPFX_0FBD;
    }
    options
}

/// Which of iced's features `model` lists, by number.
pub(crate) fn listed(model: &CpuModel) -> Box<[bool; 256]> {
    let mut table = Box::new([false; 256]);
    for feature in CpuidFeature::values() {
        if let Some(slot) = table.get_mut(feature as usize) {
            *slot = lists(model, feature);
        }
    }
    table
}

fn lists(model: &CpuModel, feature: CpuidFeature) -> bool {
    use CpuidFeature as C;
    use Feature as F;
    let needs = match feature {
        C::INTEL8086 | C::INTEL8086_ONLY | C::INTEL186 | C::INTEL286 | C::INTEL386 => return true,
        C::INTEL486 | C::X64 | C::CPUID | C::SMM | C::PAUSE | C::MULTIBYTENOP | C::RDPMC => {
            return true;
        }
        // Hints and reserved NOPs: they do nothing where they are not listed.
        C::CET_IBT | C::CET_SS | C::CLDEMOTE | C::HLE => return true,
        C::FPU | C::FPU287 | C::FPU387 => F::Fpu,
        C::CMOV => F::Cmov,
        C::CX8 => F::Cx8,
        C::CMPXCHG16B => F::Cx16,
        C::MMX => F::Mmx,
        C::SSE => F::Sse,
        C::SSE2 => F::Sse2,
        C::SSE3 => F::Sse3,
        C::SSSE3 => F::Ssse3,
        C::SSE4_1 => F::Sse4_1,
        C::SSE4_2 => F::Sse4_2,
        C::POPCNT => F::Popcnt,
        C::FXSR => F::Fxsr,
        C::SEP => F::Sep,
        C::SYSCALL => F::Syscall,
        C::MSR => F::Msr,
        C::TSC => F::Tsc,
        C::RDTSCP => F::Rdtscp,
        C::MOVBE => F::Movbe,
        C::BMI1 => F::Bmi1,
        C::BMI2 => F::Bmi2,
        C::LZCNT => F::Lzcnt,
        C::ADX => F::Adx,
        C::AES => F::Aes,
        C::PCLMULQDQ => F::Pclmulqdq,
        C::AVX => F::Avx,
        C::AVX2 => F::Avx2,
        C::FMA => F::Fma,
        C::F16C => F::F16c,
        C::SHA => F::Sha,
        C::GFNI => F::Gfni,
        C::XSAVE => F::Xsave,
        C::XSAVEOPT => F::Xsaveopt,
        C::XSAVEC => F::Xsavec,
        C::XSAVES => F::Xsaves,
        C::CLFSH => F::Clflush,
        C::CLFLUSHOPT => F::Clflushopt,
        C::CLWB => F::Clwb,
        C::PREFETCHW => F::Prefetchw,
        C::FSGSBASE => F::Fsgsbase,
        C::SMAP => F::Smap,
        C::INVPCID => F::Invpcid,
        C::RDPID => F::Rdpid,
        C::RDRAND => F::Rdrand,
        C::RDSEED => F::Rdseed,
        C::MONITOR => F::Monitor,
        _ => return false,
    };
    model.has(needs)
}

impl Cpu {
    /// True if the model lists all that `insn` needs.
    pub fn lists(&self, insn: &Instruction) -> bool {
        insn.cpuid_features().iter().all(|&f| self.listed.get(f as usize).copied().unwrap_or(false))
    }
}
