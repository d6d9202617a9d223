//! A thousand machines come and go in one process; nothing of them stays. A process of its own, so that
//! the counts are its own.

#![allow(clippy::unwrap_used, reason = "a test")]

use vmkit::{BackendKind, End};
use vmkit_testkit::footprint::Footprint;
use vmkit_tests::{backends, bare, guests};

const MACHINES: usize = 1000;

fn one(backend: BackendKind) {
    let guest = guests::long_mode(|code| guests::out8(code, 0xF4, 3));
    let vm = bare(backend, guest).build().unwrap();
    assert_eq!(vm.run().unwrap(), End::ExitCode(7));
}

#[test]
fn a_thousand_machines_leave_nothing_behind() {
    for backend in backends() {
        // What is made once stays: allocator arenas, the signal handler.
        for _ in 0..20 {
            one(backend);
        }
        let before = Footprint::now().unwrap();
        for _ in 0..MACHINES {
            one(backend);
        }
        let after = before.settled().unwrap();
        assert_eq!(after.handles(), before.handles(), "threads and descriptors on {backend}");
        // An allocator's arena or two, and four KiB for each machine: any mapping that stays behind is more.
        let most = (before.mappings + 8, before.resident_kib + 4096);
        assert!(
            after.mappings <= most.0 && after.resident_kib <= most.1,
            "{before:?}, {after:?} on {backend}"
        );
    }
}
