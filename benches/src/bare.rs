//! The same guests on bare kvm-ioctls: the floor.

#![allow(unsafe_code, reason = "hands memory to KVM without vmkit")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "benchmarks fail by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmkit_device::EventFd;
use vmkit_memory::{GuestAddress, GuestMemoryBackend, GuestRam};

use crate::guests::{self, BELL, GSI, RINGS};
use crate::rounds::rounds;

/// Registers of system calls, PAT, and the TSC: what any monitor saves.
const MSRS: [u32; 11] = [
    0x10,
    0x174,
    0x175,
    0x176,
    0x277,
    0xC000_0081,
    0xC000_0082,
    0xC000_0083,
    0xC000_0084,
    0xC000_0102,
    0xC000_0103,
];

/// A virtual machine with nothing around it.
pub struct Bare {
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    fd: Option<EventFd>,
    state: Option<State>,
    _ram: GuestRam,
}

/// A vCPU's state as KVM tells it.
struct State {
    mp: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    xsave: kvm_xsave,
    msrs: Msrs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl Bare {
    /// About to execute `guest`.
    pub fn new(guest: &[u8]) -> Self {
        Self::with_memory(guests::ram(guest), guests::RAM)
    }

    /// About to execute what `ram`, of `len` bytes at address 0, holds at the start address.
    pub fn with_memory(ram: GuestRam, len: u64) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xFFFB_D000).unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let host = ram.get_host_address(GuestAddress(0)).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: len,
            userspace_addr: host as u64,
            flags: 0,
        };
        // SAFETY: the mapping is that long and outlives the VM, which is dropped before `_ram`.
        unsafe { vm.set_user_memory_region(region).unwrap() };
        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (guests::START, 0x8000, 2);
        vcpu.set_regs(&regs).unwrap();
        Self { vcpu, vm: Arc::new(vm), fd: None, state: None, _ram: ram }
    }

    /// The guest rings a doorbell.
    pub fn with_doorbell() -> Self {
        let mut bare = Self::new(guests::DOORBELL);
        let fd = EventFd::new(0).unwrap();
        bare.vm.register_ioevent(&fd, &IoEventAddress::Pio(BELL.into()), NoDatamatch).unwrap();
        bare.fd = Some(fd);
        bare
    }

    /// The guest is about to halt.
    pub fn halting() -> Self {
        let mut bare = Self::new(guests::HALT);
        bare.exits(1);
        bare
    }

    /// The guest is about to halt; a descriptor pulses its input.
    pub fn with_irqfd() -> Self {
        let mut bare = Self::halting();
        let fd = EventFd::new(0).unwrap();
        bare.vm.register_irqfd(&fd, GSI).unwrap();
        bare.fd = Some(fd);
        bare
    }

    /// The time of `n` exits.
    pub fn exits(&mut self, n: u64) -> Duration {
        let start = Instant::now();
        for _ in 0..n {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0),
                VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
                other => unreachable!("{other:?}"),
            }
        }
        start.elapsed()
    }

    /// The time of `n` writes to the doorbell.
    pub fn doorbells(&mut self, n: u64) -> Duration {
        let rounds = n.div_ceil(RINGS);
        let elapsed = self.exits(rounds);
        elapsed.mul_f64(n as f64 / (rounds * RINGS) as f64)
    }

    /// The time of `n` interrupts, from KVM_IRQ_LINE to the handler's port write.
    pub fn wakes(&mut self, n: u64) -> Duration {
        let vm = self.vm.clone();
        let pulse = move || {
            vm.set_irq_line(GSI, true).unwrap();
            vm.set_irq_line(GSI, false).unwrap();
        };
        rounds(n, || _ = self.exits(1), pulse)
    }

    /// The time of `n` interrupts, from a write to the descriptor to the handler's port write.
    pub fn irqfds(&mut self, n: u64) -> Duration {
        let fd = self.fd.as_ref().unwrap().try_clone().unwrap();
        rounds(n, || _ = self.exits(1), move || fd.write(1).unwrap())
    }

    /// Reads all of the vCPU's state.
    pub fn get(&mut self) {
        let entry = |index| kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let mut msrs = Msrs::from_entries(&MSRS.map(entry)).unwrap();
        let mp = self.vcpu.get_mp_state().unwrap();
        assert_eq!(self.vcpu.get_msrs(&mut msrs).unwrap(), MSRS.len());
        self.state = Some(State {
            mp,
            regs: self.vcpu.get_regs().unwrap(),
            sregs: self.vcpu.get_sregs().unwrap(),
            xcrs: self.vcpu.get_xcrs().unwrap(),
            debug: self.vcpu.get_debug_regs().unwrap(),
            xsave: self.vcpu.get_xsave().unwrap(),
            msrs,
            lapic: self.vcpu.get_lapic().unwrap(),
            events: self.vcpu.get_vcpu_events().unwrap(),
        });
    }

    /// Writes all of the vCPU's state, as it was read last.
    pub fn set(&mut self) {
        let state = self.state.as_ref().unwrap();
        self.vcpu.set_regs(&state.regs).unwrap();
        self.vcpu.set_sregs(&state.sregs).unwrap();
        self.vcpu.set_xcrs(&state.xcrs).unwrap();
        // SAFETY: no component is larger than the plain area unless a process asks for it.
        unsafe { self.vcpu.set_xsave(&state.xsave) }.unwrap();
        self.vcpu.set_debug_regs(&state.debug).unwrap();
        assert_eq!(self.vcpu.set_msrs(&state.msrs).unwrap(), MSRS.len());
        self.vcpu.set_lapic(&state.lapic).unwrap();
        self.vcpu.set_mp_state(state.mp).unwrap();
        self.vcpu.set_vcpu_events(&state.events).unwrap();
    }

    /// Reads the general registers.
    pub fn get_general(&mut self) {
        std::hint::black_box(self.vcpu.get_regs().unwrap());
    }
}
