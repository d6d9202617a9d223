//! What the CPU model does not list is not there, also of what KVM brings of its own.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{CODE, Machine, Recorder, kvm};
use kvm_bindings::{KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_PMU_CAPABILITY};
use vmkit_hypervisor::x86::GeneralRegisters;
use vmkit_hypervisor::{StateSet, VcpuState, VmExit};

// The handler of #GP: counts in R15, and goes on behind the instruction, which is two bytes long.
guest_program!(skip: "add rsp, 8", "inc r15", "add qword ptr [rsp], 2", "iretq");

// Reads and writes KVM's own MSRs past the clock's.
guest_program!(own_msrs:
    "xor r15d, r15d",
    "mov ecx, 0x4B564D02",
    "2:",
    "rdmsr",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "inc ecx",
    "cmp ecx, 0x4B564D09",
    "jne 2b",
    "out 0xF4, al",
);

// Sets an event to count: AMD's register, and Intel's.
guest_program!(counters:
    "mov ecx, 0xC0010000",
    "mov eax, 0x4300C0",
    "xor edx, edx",
    "wrmsr",
    "xor eax, eax",
    "rdmsr",
    "mov ebx, eax",
    "mov ecx, 0x186",
    "mov eax, 0x4300C0",
    "wrmsr",
    "xor eax, eax",
    "rdmsr",
    "or ebx, eax",
    "out 0xF4, al",
);

/// True if KVM has what it needs for a test.
fn offers(capability: u32) -> bool {
    let kvm = kvm_ioctls::Kvm::new().unwrap();
    let offers = kvm.check_extension_raw(capability.into()) > 0;
    if !offers {
        eprintln!("SKIPPED: this KVM has no capability {capability}");
    }
    offers
}

fn registers_after(program: &[u8]) -> Option<GeneralRegisters> {
    let (machine, mut vcpu) = Machine::with_program(kvm()?, program);
    machine.gate(13, CODE + 0x1000);
    machine.write(CODE + 0x1000, skip());
    assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
    let mut state = VcpuState::default();
    vcpu.get(StateSet::GENERAL, &mut state).unwrap();
    Some(state.general)
}

#[test]
fn what_kvm_has_of_its_own_is_not_there_but_for_the_clock() {
    if kvm().is_some() && offers(KVM_CAP_ENFORCE_PV_FEATURE_CPUID) {
        let after = registers_after(own_msrs()).unwrap();
        assert_eq!(after.gpr[15], 2 * 7, "general protection faults");
    }
}

#[test]
fn there_are_no_performance_counters() {
    if kvm().is_some() && offers(KVM_CAP_PMU_CAPABILITY) {
        let after = registers_after(counters()).unwrap();
        assert_eq!(after.rbx(), 0, "an event to count was taken");
    }
}
