//! Machines give threads and descriptors back. A process of its own and one test, so that the counts are
//! its own.

#![allow(clippy::unwrap_used, reason = "a test")]

use vmkit::{BackendKind, End};
use vmkit_testkit::footprint::Footprint;
use vmkit_tests::guests::{halt, long_mode, out8, real_mode, spin};
use vmkit_tests::{backends, bare};

#[test]
fn machines_leave_no_thread_and_no_descriptor() {
    for backend in backends() {
        // What the first machine allocates once per process does not count.
        drop(bare(backend, long_mode(spin)).build().unwrap().start().unwrap());
        let before = Footprint::now().unwrap();
        let check = |what: &str| {
            let after = before.settled().unwrap();
            assert_eq!(after.handles(), before.handles(), "{backend}: {what}");
        };
        check("the first one");

        let vm = bare(backend, long_mode(spin)).vcpus(2).build().unwrap().start().unwrap();
        assert!(Footprint::now().unwrap().threads >= before.threads + 2, "{backend}");
        drop(vm);
        check("running");
        drop(bare(backend, long_mode(halt)).build().unwrap());
        check("never started");
        let vm = bare(backend, long_mode(spin)).build().unwrap().start().unwrap();
        drop(vm.pause());
        drop(vm);
        check("paused before");

        assert!(bare(backend, long_mode(spin)).memory(16 << 10).build().is_err());
        let port = vmkit::Serial::at("serial0", 0xF4, 4);
        assert!(bare(backend, long_mode(spin)).device(port).build().is_err());
        check("not built");

        (0..100).for_each(|_| run_to_its_end(backend));
        check("a hundred, one after the other");
    }
}

fn run_to_its_end(backend: BackendKind) {
    let vm = bare(backend, real_mode(|code| out8(code, 0xF4, 3))).build().unwrap();
    assert_eq!(vm.run().unwrap(), End::ExitCode(7), "{backend}");
}
