//! The backend itself: what this KVM offers, and partitions.

use std::sync::Arc;

use kvm_bindings::KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
use kvm_ioctls::{Cap, Kvm};
use vmkit_hypervisor::{
    Capabilities, CpuModel, Feature, FeatureSet, Hypervisor, HypervisorError, Partition,
    PartitionSpec, Result, Unavailable,
};

use crate::KickSignal;
use crate::cpuid::Supported;
use crate::error::io_error;
use crate::partition::KvmPartition;
use crate::ring;

/// The version of the interface; it has not changed since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Frequency of the in-kernel local APIC's timer.
pub(crate) const APIC_HZ: u32 = 1_000_000_000;
/// Local APIC IDs of 8 bits, less the broadcast.
const MAX_VCPUS: u32 = 255;
/// Without it a kick could be lost, and a pending access could not be completed.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "user memory"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID tables"),
    (Cap::VcpuEvents, "vCPU events"),
    (Cap::Debugregs, "debug registers"),
];

/// What is true of this host's KVM; shared by all partitions.
pub(crate) struct Host {
    pub(crate) supported: Supported,
    pub(crate) features: FeatureSet,
    pub(crate) physical_bits: u8,
    /// Bytes of KVM's XSAVE area.
    pub(crate) xsave_bytes: usize,
    pub(crate) has_xsave2: bool,
    pub(crate) slots: usize,
    pub(crate) scales_tsc: bool,
    /// KVM can be told to keep to CPUID in what it offers a guest of itself.
    pub(crate) enforces_paravirtual: bool,
}

impl Host {
    fn read(kvm: &Kvm) -> Result<Self> {
        let supported = Supported::read(kvm)?;
        let xsave2 = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            features: supported.features(kvm),
            physical_bits: supported.physical_bits(),
            supported,
            xsave_bytes: xsave2.max(4096),
            has_xsave2: xsave2 > 0,
            slots: kvm.get_nr_memslots(),
            scales_tsc: kvm.check_extension(Cap::TscControl),
            enforces_paravirtual: kvm
                .check_extension_raw(u64::from(KVM_CAP_ENFORCE_PV_FEATURE_CPUID))
                > 0,
        })
    }

    /// The kvmclock bits that a guest with `model` is offered.
    pub(crate) fn kvmclock_for(&self, model: &CpuModel) -> u32 {
        if model.has(Feature::Hypervisor) { self.supported.kvmclock() } else { 0 }
    }
}

/// KVM.
///
/// ```no_run
/// use vmkit_hypervisor::Hypervisor;
///
/// let kvm = vmkit_kvm::KvmHypervisor::open()?;
/// println!("{} vCPUs at most", kvm.capabilities().max_vcpus);
/// # Ok::<(), vmkit_hypervisor::HypervisorError>(())
/// ```
pub struct KvmHypervisor {
    kvm: Kvm,
    pub(crate) host: Arc<Host>,
    capabilities: Capabilities,
    signal: KickSignal,
}

impl std::fmt::Debug for KvmHypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmHypervisor")
            .field("capabilities", &self.capabilities)
            .field("signal", &self.signal)
            .finish_non_exhaustive()
    }
}

impl KvmHypervisor {
    /// Opens `/dev/kvm`, with the default [`KickSignal`].
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`] if it is missing, may not be opened, or lacks something this
    /// backend needs.
    pub fn open() -> Result<Self> {
        Self::with_signal(KickSignal::default())
    }

    /// Opens `/dev/kvm`; runs will be ended by `signal`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn with_signal(signal: KickSignal) -> Result<Self> {
        let unavailable = |reason| HypervisorError::Unavailable { backend: "kvm", reason };
        let kvm = Kvm::new().map_err(|error| {
            unavailable(Unavailable::Device { path: "/dev/kvm", source: io_error(error) })
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(unavailable(Unavailable::Version { found: version, wanted: API_VERSION }));
        }
        for (capability, name) in REQUIRED {
            if !kvm.check_extension(*capability) {
                return Err(unavailable(Unavailable::Lacks(name)));
            }
        }
        let host = Host::read(&kvm)?;
        let mut capabilities = Capabilities::named("kvm");
        capabilities.max_vcpus =
            u32::try_from(kvm.get_max_vcpus()).unwrap_or(1).clamp(1, MAX_VCPUS);
        capabilities.features = host.features;
        capabilities.physical_bits = host.physical_bits;
        capabilities.doorbells = kvm.check_extension(Cap::Ioeventfd);
        capabilities.scales_tsc = host.scales_tsc;
        capabilities.dirty_ring = ring::capability(&kvm).is_some();
        Ok(Self { kvm, host: Arc::new(host), capabilities, signal })
    }
}

impl Hypervisor for KvmHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create(&self, spec: &PartitionSpec) -> Result<Arc<dyn Partition>> {
        if spec.vcpus == 0 || spec.vcpus > self.capabilities.max_vcpus {
            return Err(HypervisorError::VcpuIndex(spec.vcpus));
        }
        spec.check()?;
        let doorbells = self.capabilities.doorbells;
        let partition = KvmPartition::create(&self.kvm, &self.host, spec, self.signal, doorbells)?;
        Ok(Arc::new(partition))
    }
}
