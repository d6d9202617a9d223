//! The software backend of vmkit: an x86-64 processor and its MMU.
//!
//! It runs unmodified operating systems without any help of the host's kernel. Instructions are
//! decoded once, into blocks of small operations that are cached by guest-physical address (`code`),
//! executed by specialised functions (`exec`, `sse`, `fpu`, `sys`), and reach memory through a
//! software TLB of host addresses (`mem`). Each vCPU runs on the thread that calls it.
//!
//! It needs an x86-64 host: vector and x87 arithmetic are done by the host's own units.

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "vmkit-soft computes vector and x87 arithmetic on the host's own units: x86-64 only"
);

mod code;
mod cpu;
mod exec;
mod features;
mod fpu;
mod io;
mod mem;
mod partition;
mod shared;
mod sse;
mod sys;
#[cfg(test)]
mod testing;
mod vcpu;

use std::sync::Arc;

pub use features::features;
use vmkit_hypervisor::{
    Capabilities, Hypervisor, HypervisorError, Partition, PartitionSpec, Result,
};

/// The software backend.
///
/// ```
/// use vmkit_hypervisor::Hypervisor;
///
/// let soft = vmkit_soft::SoftHypervisor::new();
/// assert!(soft.capabilities().counts_instructions);
/// ```
#[derive(Debug)]
pub struct SoftHypervisor {
    capabilities: Capabilities,
}

impl Default for SoftHypervisor {
    fn default() -> Self {
        Self::new()
    }
}

impl SoftHypervisor {
    /// The backend; it is usable on every x86-64 host.
    pub fn new() -> Self {
        let mut capabilities = Capabilities::named("software");
        capabilities.max_vcpus = partition::MAX_VCPUS;
        capabilities.features = features();
        capabilities.physical_bits = 46;
        capabilities.counts_instructions = true;
        capabilities.reports_dead_halt = true;
        capabilities.scales_tsc = true;
        Self { capabilities }
    }
}

impl Hypervisor for SoftHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create(&self, spec: &PartitionSpec) -> Result<Arc<dyn Partition>> {
        if spec.vcpus == 0 || spec.vcpus > partition::MAX_VCPUS {
            return Err(HypervisorError::VcpuIndex(spec.vcpus));
        }
        spec.check()?;
        let inner = Arc::new(partition::PartitionInner::new(spec));
        Ok(Arc::new(partition::SoftPartition { inner }))
    }
}
