//! A stock Debian kernel on every backend that can run one. A kernel that cannot be had is said so on
//! standard error, and the test then proves nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::time::{Duration, Instant};

use vmkit::boot::{Linux, extract_vmlinux};
use vmkit::{End, Vm};
use vmkit_examples::debian::Flavour;
use vmkit_examples::initramfs::{self, Job};
use vmkit_tests::linux::{
    BOOT_PATIENCE as PATIENCE, Files, WORDS, alone, full_backends as backends, start,
};

/// Kernel and busybox, or none if they are not to be had here.
fn files(flavour: Flavour) -> Option<(std::path::PathBuf, Vec<u8>)> {
    Files::find(flavour).map(|files| (files.kernel, files.busybox))
}

fn linux(kernel: Linux, busybox: &[u8], command: &str) -> Linux {
    let initrd = initramfs::build(busybox, &Job::Run(command.into()));
    kernel.initrd_bytes(initrd).cmdline(WORDS)
}

#[test]
fn the_cloud_kernel_runs_a_command_and_powers_off() {
    let _alone = alone();
    let Some((kernel, busybox)) = files(Flavour::Cloud) else { return };
    for backend in backends() {
        let guest = linux(Linux::bzimage(&kernel).unwrap(), &busybox, "uname -sm; exit 7");
        let guest = start(Vm::builder().backend(backend.clone()).boot(guest));
        assert_eq!(guest.status(), Some(7), "{backend:?}");
        assert!(guest.text.text().contains("Linux x86_64\n"), "{backend:?}");
        guest.assert_healthy();
    }
}

#[test]
fn the_full_kernel_runs_a_command_and_powers_off() {
    let _alone = alone();
    let Some((kernel, busybox)) = files(Flavour::Full) else { return };
    for backend in backends() {
        let guest = linux(Linux::bzimage(&kernel).unwrap(), &busybox, "exit 3");
        let guest = start(Vm::builder().backend(backend.clone()).boot(guest));
        assert_eq!(guest.status(), Some(3), "{backend:?}");
        guest.assert_healthy();
    }
}

#[test]
fn the_extracted_vmlinux_boots_too() {
    let _alone = alone();
    let Some((kernel, busybox)) = files(Flavour::Cloud) else { return };
    let vmlinux = extract_vmlinux(&std::fs::read(kernel).unwrap()).unwrap();
    for backend in backends() {
        let guest = linux(Linux::from_bytes(vmlinux.clone()).unwrap(), &busybox, "exit 5");
        let guest = start(Vm::builder().backend(backend.clone()).boot(guest));
        assert_eq!(guest.status(), Some(5), "{backend:?}");
    }
}

#[test]
fn two_seconds_in_the_guest_are_two_seconds_here() {
    let _alone = alone();
    let Some((kernel, busybox)) = files(Flavour::Cloud) else { return };
    for backend in backends() {
        let command = "for n in 1 2 3; do echo before $n; sleep 2; echo after $n; done";
        let guest = linux(Linux::bzimage(&kernel).unwrap(), &busybox, command);
        let guest = start(Vm::builder().backend(backend.clone()).boot(guest));
        let took = [1, 2, 3].map(|n| {
            guest.wait_for(&format!("before {n}\n"));
            let before = Instant::now();
            guest.wait_for(&format!("after {n}\n"));
            before.elapsed().as_secs_f64()
        });
        // A host that was elsewhere for a moment spoils one of them; a clock that is wrong spoils all.
        let right = took.iter().any(|took| (1.9..=2.1).contains(took));
        assert!(right, "{backend:?}: sleep 2 took {took:?} s");
        assert_eq!(guest.status(), Some(0), "{backend:?}");
        guest.assert_healthy();
    }
}

#[test]
fn a_pause_does_not_upset_the_kernel() {
    let _alone = alone();
    let Some((kernel, busybox)) = files(Flavour::Cloud) else { return };
    for backend in backends() {
        let command = "echo ready; sleep 1; dmesg | tail -n 5; exit 9";
        let guest = linux(Linux::bzimage(&kernel).unwrap(), &busybox, command);
        let guest = start(Vm::builder().backend(backend.clone()).boot(guest));
        assert!(guest.text.wait_for("ready\n", PATIENCE), "{backend:?}");
        let paused = guest.vm.pause();
        std::thread::sleep(Duration::from_secs(1));
        paused.resume().unwrap();
        assert_eq!(guest.status(), Some(9), "{backend:?}");
        guest.assert_healthy();
    }
}

#[test]
fn a_kernel_without_a_root_panics_and_asks_for_a_reset() {
    let _alone = alone();
    let Some((kernel, _)) = files(Flavour::Cloud) else { return };
    for backend in backends() {
        let guest = Linux::bzimage(&kernel).unwrap();
        let guest = guest.cmdline(WORDS);
        let guest = start(Vm::builder().backend(backend.clone()).boot(guest));
        let end = guest.vm.wait_timeout(PATIENCE).unwrap();
        assert_eq!(end, Some(End::Reset), "{backend:?}");
        assert!(guest.text.text().contains("Kernel panic - not syncing"), "{backend:?}");
    }
}
