//! CPU models against what KVM offers here.

use std::collections::HashMap;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use vmkit_hypervisor::{
    Capabilities, CpuModel, CpuidContext, CpuidEntry, CpuidResult, Feature, FeatureSet, Hypervisor,
    HypervisorError, Result, Vendor,
};

use crate::KvmHypervisor;
use crate::error::host;
use crate::hypervisor::Host;

/// `KVMKVMKVM\0\0\0`, in EBX, ECX, EDX of leaf 0x4000_0000.
const SIGNATURE: [u32; 3] = [0x4B4D_564B, 0x564B_4D56, 0x4D];
/// Leaf of the paravirtual features.
const PARAVIRTUAL: u32 = 0x4000_0001;
/// Features of that leaf that are offered to guests: kvmclock's new MSRs, and that its time is stable
/// from vCPU to vCPU.
const KVMCLOCK: u32 = 1 << 3 | 1 << 24;

/// What KVM offers, as CPUID leaves.
pub(crate) struct Supported(HashMap<(u32, u32), CpuidResult>);

impl Supported {
    pub(crate) fn read(kvm: &Kvm) -> Result<Self> {
        let table = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(host("read the supported CPUID leaves"))?;
        let entries = table.as_slice().iter();
        Ok(Self(
            entries
                .map(|e| {
                    let indexed = e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
                    let result = CpuidResult { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx };
                    ((e.function, if indexed { e.index } else { 0 }), result)
                })
                .collect(),
        ))
    }

    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.0.get(&(leaf, subleaf)).copied().unwrap_or_default()
    }

    /// The features a guest can have.
    pub(crate) fn features(&self, kvm: &Kvm) -> FeatureSet {
        let mut set = FeatureSet::from_cpuid(|leaf, subleaf| self.leaf(leaf, subleaf));
        // A statement about us, not about the processor.
        set = set.with(Feature::Hypervisor);
        // Older KVMs tell of it by a capability only.
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            set = set.with(Feature::TscDeadline);
        }
        set
    }

    /// Guest-physical address bits.
    pub(crate) fn physical_bits(&self) -> u8 {
        match self.leaf(0x8000_0008, 0).eax & 0xFF {
            0 => 36,
            bits => bits as u8,
        }
    }

    /// The bits of kvmclock that KVM offers.
    pub(crate) fn kvmclock(&self) -> u32 {
        self.leaf(PARAVIRTUAL, 0).eax & KVMCLOCK
    }
}

/// Errors with the names of what `model` lists and this host lacks.
pub(crate) fn check(model: &CpuModel, available: &FeatureSet) -> Result<()> {
    let missing = model.missing(available);
    if missing.is_empty() {
        return Ok(());
    }
    Err(HypervisorError::CpuModel {
        model: model.name.clone(),
        missing: missing.iter().map(ToString::to_string).collect(),
    })
}

/// The table for a vCPU: the model's, physical addresses no wider than the host's, and KVM's own
/// leaves if the model tells of a hypervisor.
pub(crate) fn table(model: &CpuModel, context: &CpuidContext, host: &Host) -> Result<CpuId> {
    let mut model = model.clone();
    model.physical_bits = model.physical_bits.min(host.physical_bits);
    let mut entries: Vec<_> = model.cpuid_table(context).iter().map(entry).collect();
    if model.has(Feature::Hypervisor) {
        let [ebx, ecx, edx] = SIGNATURE;
        entries.push(kvm_cpuid_entry2 {
            function: 0x4000_0000,
            eax: PARAVIRTUAL,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        });
        entries.push(kvm_cpuid_entry2 {
            function: PARAVIRTUAL,
            eax: host.kvmclock_for(&model),
            ..kvm_cpuid_entry2::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|_| HypervisorError::state("too many CPUID leaves"))
}

fn entry(from: &CpuidEntry) -> kvm_cpuid_entry2 {
    let CpuidResult { eax, ebx, ecx, edx } = from.result;
    kvm_cpuid_entry2 {
        function: from.leaf,
        index: from.subleaf.unwrap_or(0),
        flags: if from.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    }
}

/// What of `model` a guest can have with `capabilities`: fewer features, narrower addresses.
#[must_use]
pub fn best_available(model: &CpuModel, capabilities: &Capabilities) -> CpuModel {
    let mut best = model.clone();
    best.features = best.features.intersection(capabilities.features);
    best.physical_bits = best.physical_bits.min(capabilities.physical_bits);
    best
}

/// The host's own processor, as far as KVM can give it and vmkit knows its features: vendor, family,
/// model and stepping too, by which kernels choose mitigations of processor bugs. What is not AMD's is
/// taken for Intel's.
///
/// Guests on this model cannot move to other hosts.
#[must_use]
pub fn host_model(kvm: &KvmHypervisor) -> CpuModel {
    let supported = &kvm.host.supported;
    let capabilities = kvm.capabilities();
    let mut model = CpuModel::with_features("host", capabilities.features);
    let id = supported.leaf(0, 0);
    model.vendor = if id.ebx == u32::from_le_bytes(*b"Auth") { Vendor::Amd } else { Vendor::Intel };
    let version = supported.leaf(1, 0).eax;
    let (family, extended) = (version >> 8 & 0xF, version >> 20 & 0xFF);
    model.family = if family == 15 { family + extended } else { family };
    model.model = version >> 4 & 0xF | version >> 12 & 0xF0;
    model.stepping = version & 0xF;
    model.physical_bits = capabilities.physical_bits;
    let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .map(|leaf| supported.leaf(leaf, 0))
        .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
        .flat_map(u32::to_le_bytes)
        .take_while(|byte| *byte != 0)
        .collect();
    if let Ok(brand) = String::from_utf8(brand)
        && !brand.is_empty()
    {
        model.brand = brand;
    }
    model
}
