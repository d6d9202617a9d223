//! An exit allocates nothing. A process of its own, for its allocator counts.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod common;

use common::{Machine, STOP, kvm};
use vmkit_hypervisor::{IoFlow, VcpuIo, VmExit};
use vmkit_testkit::alloc::{Counting, counted};

#[global_allocator]
static COUNTING: Counting = Counting;

guest_program!(accesses:
    "mov edi, 0x10000000",
    "mov esi, 0x90000",
    "mov edx, 0x3F8",
    "2:",
    "out 0x10, al",
    "in eax, 0x11",
    "mov [rdi], rax",
    "mov ebx, [rdi + 8]",
    "mov ecx, 4",
    "rep outsb",
    "sub esi, 4",
    "out 0xF4, al",
    "jmp 2b",
);

#[derive(Default)]
struct Count(u64);

impl VcpuIo for Count {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        self.0 += 1;
        data.fill(0);
        IoFlow::Continue
    }
    fn pio_write(&mut self, port: u16, _: &[u8]) -> IoFlow {
        self.0 += 1;
        if port == STOP { IoFlow::Stop } else { IoFlow::Continue }
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        self.0 += 1;
        data.fill(0);
        IoFlow::Continue
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        self.0 += 1;
        IoFlow::Continue
    }
}

#[test]
fn runs_and_exits_allocate_nothing() {
    let Some(kvm) = kvm() else { return };
    let (_machine, mut vcpu) = Machine::with_program(kvm, accesses());
    let kick = vcpu.kick();
    let mut io = Count::default();
    assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
    let accesses = io.0;
    let ((), made) = counted(|| {
        for _ in 0..1000 {
            assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Stopped);
            kick.kick();
            assert_eq!(vcpu.run(&mut io).unwrap(), VmExit::Kicked);
        }
    });
    assert_eq!(io.0 - accesses, 9 * 1000);
    assert_eq!(made.allocations, 0);
}
