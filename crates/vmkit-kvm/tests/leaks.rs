//! A thousand machines come and go; nothing of them stays. A process of its own, so that the counts
//! are its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod common;

use common::{Machine, Recorder, kvm};
use vmkit_hypervisor::{InterruptControllers, MapAccess, VmExit};
use vmkit_testkit::footprint::Footprint;

// Has the PIT interrupt, for which split controllers need a thread, and stops.
guest_program!(stop:
    "mov al, 0x34", "out 0x43, al", "mov al, 0xA9", "out 0x40, al", "mov al, 4", "out 0x40, al",
    "out 0xF4, al",
);

#[test]
fn a_thousand_machines_leave_nothing_behind() {
    let Some(kvm) = kvm() else { return };
    let one = |controllers| {
        let machine = Machine::new(kvm, 1, controllers, MapAccess::WRITE);
        let mut vcpu = machine.vcpu(0, stop());
        let kick = vcpu.kick();
        assert_eq!(vcpu.run(&mut Recorder::default()).unwrap(), VmExit::Stopped);
        drop(vcpu);
        drop(machine);
        // A handle that outlives its vCPU holds nothing back.
        kick
    };
    for controllers in [InterruptControllers::Full, InterruptControllers::Split] {
        for _ in 0..20 {
            one(controllers);
        }
        let before = Footprint::now().unwrap();
        let kicks: Vec<_> = (0..1000).map(|_| one(controllers)).collect();
        let after = before.settled().unwrap();
        assert_eq!(after.handles(), before.handles());
        // The allocator may map an arena or two.
        let most = (before.mappings + 4, before.resident_kib + 4096);
        assert!(after.mappings <= most.0 && after.resident_kib <= most.1, "{before:?}, {after:?}");
        drop(kicks);
    }
}
