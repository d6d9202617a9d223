//! The conformance suite on KVM with split interrupt controllers, and with dirty rings where this KVM
//! has them.

use std::process::ExitCode;
use std::sync::Arc;

use vmkit_hypervisor::{
    Capabilities, DirtyLog, Hypervisor, InterruptControllers, Partition, PartitionSpec, Result,
};
use vmkit_kvm::KvmHypervisor;

#[path = "common/conformance.rs"]
mod conformance;

/// KVM that splits the controllers of every PC and logs writes in rings.
struct SplitKvm {
    kvm: KvmHypervisor,
    capabilities: Capabilities,
}

impl Hypervisor for SplitKvm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create(&self, spec: &PartitionSpec) -> Result<Arc<dyn Partition>> {
        let mut spec = spec.clone();
        if spec.interrupt_controllers == InterruptControllers::Full {
            spec.interrupt_controllers = InterruptControllers::Split;
        }
        spec.dirty_log = DirtyLog::Ring;
        self.kvm.create(&spec)
    }
}

fn main() -> ExitCode {
    conformance::run("kvm, split", |kvm| {
        let mut capabilities = kvm.capabilities().clone();
        capabilities.name = if capabilities.dirty_ring {
            "kvm, split controllers and dirty rings"
        } else {
            "kvm, split controllers"
        };
        SplitKvm { kvm, capabilities }
    })
}
