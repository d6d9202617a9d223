//! What the host's processor is.

use std::arch::x86_64::__cpuid_count;

use vmkit_hypervisor::{CpuidResult, FeatureSet, Vendor};

/// The features the host's CPUID lists.
pub fn features() -> FeatureSet {
    let cpuid = |leaf, subleaf| {
        let r = __cpuid_count(leaf, subleaf);
        CpuidResult { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
    };
    let highest = [cpuid(0, 0).eax, cpuid(0x8000_0000, 0).eax];
    FeatureSet::from_cpuid(|leaf, subleaf| {
        let limit = highest[(leaf >> 31) as usize];
        if leaf <= limit { cpuid(leaf, subleaf) } else { CpuidResult::default() }
    })
}

/// Who made the host's processor; every maker but AMD (and Hygon, which makes AMD's) counts as Intel.
pub fn vendor() -> Vendor {
    let r = __cpuid_count(0, 0);
    match [r.ebx, r.edx, r.ecx].map(u32::to_le_bytes).as_flattened() {
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
        _ => Vendor::Intel,
    }
}
