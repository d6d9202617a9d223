//! State from a stranger, and state that somebody changes.

use std::sync::Arc;

use vmkit_device::{ManualClock, Msi};
use vmkit_hypervisor::x86::{MpState, StateSet, VcpuState};
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

#[test]
fn an_init_that_came_is_in_the_state_and_not_in_the_one_that_replaces_it() {
    let soft = SoftHypervisor::new();
    let spec = PartitionSpec::new(2, Arc::new(ManualClock::default()));
    let partition = soft.create(&spec).unwrap();
    let model = CpuModel::with_features("test", soft.capabilities().features);
    let _first = partition.create_vcpu(0, &model).unwrap();
    let mut vcpu = partition.create_vcpu(1, &model).unwrap();
    let runs = VcpuState { mp: MpState::Runnable, ..VcpuState::default() };
    let mut state = VcpuState::default();
    // To local APIC 1, delivery mode INIT.
    let init = Msi { address: 0xFEE0_1000, data: 0x4500 };

    vcpu.set(StateSet::MP, &runs).unwrap();
    partition.interrupts().signal_msi(init);
    vcpu.get(StateSet::MP, &mut state).unwrap();
    assert_eq!(state.mp, MpState::WaitForSipi);

    partition.interrupts().signal_msi(init);
    vcpu.set(StateSet::MP, &runs).unwrap();
    vcpu.get(StateSet::MP, &mut state).unwrap();
    assert_eq!(state.mp, MpState::Runnable);
}
