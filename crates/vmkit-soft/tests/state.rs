//! State from a stranger.

use std::sync::Arc;

use vmkit_device::ManualClock;
use vmkit_hypervisor::x86::{StateSet, VcpuState};
use vmkit_hypervisor::{CpuModel, Hypervisor, PartitionSpec};
use vmkit_soft::SoftHypervisor;

#[test]
fn a_refused_local_apic_leaves_the_tsc_alone() {
    let soft = SoftHypervisor::new();
    let spec = PartitionSpec::new(1, Arc::new(ManualClock::default()));
    let partition = soft.create(&spec).unwrap();
    let model = CpuModel::with_features("test", soft.capabilities().features);
    let mut vcpu = partition.create_vcpu(0, &model).unwrap();
    let mut before = VcpuState::default();
    vcpu.get(StateSet::all(), &mut before).unwrap();

    let mut hostile = before.clone();
    hostile.tsc = before.tsc + 1_000_000;
    hostile.lapic.as_mut().unwrap().apic_base = u64::MAX;
    vcpu.set(StateSet::all(), &hostile).unwrap_err();
    let mut after = VcpuState::default();
    vcpu.get(StateSet::all(), &mut after).unwrap();
    assert_eq!(after, before);

    hostile.lapic.clone_from(&before.lapic);
    vcpu.set(StateSet::all(), &hostile).unwrap();
    vcpu.get(StateSet::all(), &mut after).unwrap();
    assert_eq!(after, hostile);
}
