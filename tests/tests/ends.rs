//! Every way a machine can end, on every backend of this host.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmkit::device::{
    Announcement, Device, DeviceBuilder, DeviceError, IoFlow, IoNeed, Needs, Resources, Saved,
    Section,
};
use vmkit::{Backend, Capture, End, Serial, Vm, VmError};
use vmkit_tests::guests::{self, halt, long_mode, out8, out16, real_mode, spin};
use vmkit_tests::{PATIENCE, backends, bare, end_of};

#[test]
fn the_debug_port_gives_an_exit_code() {
    for backend in backends() {
        let vm = bare(backend, real_mode(|code| out8(code, 0xF4, 3))).build().unwrap();
        assert_eq!(vm.run().unwrap(), End::ExitCode(7), "{backend}, real mode");
        let vm = bare(backend, long_mode(|code| out8(code, 0xF4, 0x10))).build().unwrap();
        assert_eq!(vm.run().unwrap(), End::ExitCode(0x21), "{backend}, long mode");
    }
}

#[test]
fn nothing_runs_after_the_write_that_ended_the_machine() {
    for backend in backends() {
        let guest = long_mode(|code| {
            out8(code, 0xF4, 0);
            code.mov(iced_x86::code_asm::dword_ptr(guests::COUNTER), 1).unwrap();
            spin(code);
        });
        let vm = bare(backend, guest).build().unwrap();
        let memory = vm.memory();
        assert_eq!(vm.run().unwrap(), End::ExitCode(1), "{backend}");
        use vmkit::memory::{Bytes, GuestAddress};
        let after: u32 = memory.read_obj(GuestAddress(guests::COUNTER)).unwrap();
        assert_eq!(after, 0, "{backend}");
    }
}

fn pc(backend: vmkit::BackendKind, guest: vmkit::boot::Flat) -> Vm {
    Vm::builder().memory(4 << 20).backend(Backend::from(backend)).boot(guest).build().unwrap()
}

#[test]
fn acpi_s5_powers_off() {
    for backend in backends() {
        let guest = long_mode(|code| {
            out16(code, 0x604, 0x2000);
            spin(code);
        });
        assert_eq!(pc(backend, guest).run().unwrap(), End::PoweredOff, "{backend}");
    }
}

#[test]
fn the_reset_register_and_the_keyboard_controller_reset() {
    for backend in backends() {
        for (port, value) in [(0xCF9, 6), (0x64, 0xFE)] {
            let guest = long_mode(|code| {
                out8(code, port, value);
                spin(code);
            });
            assert_eq!(pc(backend, guest).run().unwrap(), End::Reset, "{backend} {port:#x}");
        }
    }
}

#[test]
fn pvpanic_is_a_guest_panic() {
    for backend in backends() {
        let guest = long_mode(|code| {
            out8(code, 0x505, 1);
            spin(code);
        });
        assert_eq!(pc(backend, guest).run().unwrap(), End::GuestPanicked, "{backend}");
    }
}

#[test]
fn a_fault_without_a_handler_is_a_triple_fault() {
    for backend in backends() {
        let vm = bare(backend, long_mode(guests::triple_fault)).build().unwrap();
        let end = vm.run().unwrap();
        assert!(matches!(end, End::TripleFault { vcpu: 0, .. }), "{backend}: {end}");
    }
}

#[test]
fn hlt_with_interrupts_off_is_the_end() {
    for backend in backends() {
        let vm = bare(backend, long_mode(halt)).build().unwrap().start().unwrap();
        assert_eq!(end_of(&vm), End::Halted, "{backend}");
    }
}

#[test]
fn processors_that_were_never_started_do_not_keep_a_dead_machine_alive() {
    for backend in backends() {
        let vm = bare(backend, long_mode(halt)).vcpus(2).build().unwrap().start().unwrap();
        assert_eq!(end_of(&vm), End::Halted, "{backend}");
    }
}

#[test]
fn the_serial_port_says_what_the_guest_wrote() {
    for backend in backends() {
        let console = Capture::with_limit(100);
        let guest = long_mode(|code| {
            guests::say(code, "hello\n");
            out8(code, 0xF4, 0);
        });
        let vm =
            bare(backend, guest).device(Serial::com1().output(console.clone())).build().unwrap();
        assert_eq!(vm.run().unwrap(), End::ExitCode(1), "{backend}");
        assert_eq!(console.text(), "hello\n", "{backend}");
    }
}

#[test]
fn a_port_nobody_answers_reads_as_ones() {
    for backend in backends() {
        let guest = long_mode(|code| {
            guests::read_port_to_memory(code, 0x1234);
            out8(code, 0xF4, 0);
        });
        let vm = bare(backend, guest).build().unwrap();
        let memory = vm.memory();
        let vm = vm.start().unwrap();
        assert_eq!(end_of(&vm), End::ExitCode(1), "{backend}");
        use vmkit::memory::{Bytes, GuestAddress};
        let read: u32 = memory.read_obj(GuestAddress(guests::COUNTER)).unwrap();
        assert_eq!(read, u32::MAX, "{backend}");
        let stats = vm.vcpu_stats()[0];
        assert_eq!((stats.pio, stats.unclaimed), (2, 1), "{backend}");
    }
}

/// A device that panics when it is written, and starts only once.
#[derive(Default)]
struct Mine {
    started: AtomicBool,
}

impl DeviceBuilder for Mine {
    fn name(&self) -> String {
        "mine".into()
    }
    fn needs(&self) -> Needs {
        Needs { io: vec![IoNeed::ports(0x99, 1)], irqs: vec![] }
    }
    fn build(self: Box<Self>, _: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        Ok(Arc::new(*self))
    }
}

impl Device for Mine {
    fn name(&self) -> &str {
        "mine"
    }
    fn announce(&self) -> Vec<Announcement> {
        Vec::new()
    }
    fn read(&self, _: usize, _: u64, _: &mut [u8]) {}
    fn write(&self, _: usize, _: u64, data: &[u8]) -> IoFlow {
        panic!("written with {}", data[0]);
    }
    fn start(&self) -> Result<(), DeviceError> {
        if self.started.swap(true, Ordering::SeqCst) {
            let source = std::io::ErrorKind::WouldBlock.into();
            return Err(DeviceError::Host { device: "mine".into(), what: "again".into(), source });
        }
        Ok(())
    }
    fn pause(&self) {}
    fn reset(&self) {}
    fn save(&self) -> Saved {
        Saved::Stateless
    }
    fn load(&self, _: &[Section]) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn a_panic_in_a_device_is_an_error_and_not_a_hang() {
    for backend in backends() {
        let guest = long_mode(|code| {
            out8(code, 0x99, 5);
            spin(code);
        });
        let error =
            bare(backend, guest).device(Mine::default()).build().unwrap().run().unwrap_err();
        assert!(
            matches!(&error, VmError::VcpuPanicked { vcpu: 0, message } if message == "written with 5"),
            "{backend}: {error}"
        );
    }
}

#[test]
fn a_panic_of_who_watches_the_console_is_an_error_and_not_an_abort() {
    for backend in backends() {
        let guest = long_mode(|code| {
            guests::say(code, "hello\n");
            spin(code);
        });
        let watched = Serial::com1().on_output(|_| panic!("watched"));
        let error = bare(backend, guest).device(watched).build().unwrap().run().unwrap_err();
        assert!(
            matches!(&error, VmError::VcpuPanicked { vcpu: 0, message } if message == "watched"),
            "{backend}: {error}"
        );
    }
}

#[test]
fn a_device_that_cannot_restart_ends_the_machine_with_an_error() {
    for backend in backends() {
        for dropped in [false, true] {
            let vm = bare(backend, long_mode(spin)).vcpus(2).device(Mine::default());
            let vm = vm.build().unwrap().start().unwrap();
            let paused = vm.pause();
            if dropped {
                drop(paused);
            } else {
                let error = paused.resume().unwrap_err();
                assert!(matches!(error, VmError::Restart(_)), "{backend}: {error}");
            }
            let error = vm.wait_timeout(PATIENCE).unwrap_err();
            assert_eq!(error.to_string(), "after a pause: mine: again: operation would block");
        }
    }
}

#[test]
fn impossible_machines_are_named_errors() {
    use vmkit::Backend::Software;
    let builder = || Vm::builder().memory(2 << 20).backend(Software);
    let guest = || long_mode(halt);
    assert!(matches!(builder().build(), Err(VmError::NothingToBoot)));
    assert!(matches!(
        builder().boot(guest()).vcpus(0).build(),
        Err(VmError::VcpuCount { wanted: 0, .. })
    ));
    assert!(matches!(builder().boot(guest()).memory(4095).build(), Err(VmError::Memory(_))));
    assert!(matches!(
        builder().boot(guest()).device(Mine::default()).device(Mine::default()).build(),
        Err(VmError::DuplicateDevice(name)) if name == "mine"
    ));
    assert!(matches!(
        builder().boot(guest()).device(Serial::com1()).device(Serial::at("x", 0x3F8, 4)).build(),
        Err(VmError::Resources(_))
    ));
    assert!(matches!(builder().boot(guest()).memory(16 << 10).build(), Err(VmError::Boot(_))));
}
