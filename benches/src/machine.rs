//! One vCPU through vmkit, in real mode, with callbacks that only count.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "benchmarks fail by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmkit_device::memory::{GuestAddress, GuestMemoryBackend};
use vmkit_device::{Doorbell, EventFd, InterruptSink, MonotonicClock};
use vmkit_hypervisor::x86::Segment;
use vmkit_hypervisor::{
    CpuModel, Hypervisor, IoFlow, MapAccess, Partition, PartitionSpec, StateSet, Vcpu, VcpuIo,
    VcpuState, VmExit,
};

use crate::guests::{self, BELL, GSI, RINGS, START};
use crate::rounds::rounds;

/// Counts accesses and stops after so many.
struct Count(u64);

impl Count {
    fn one(&mut self) -> IoFlow {
        self.0 -= 1;
        if self.0 == 0 { IoFlow::Stop } else { IoFlow::Continue }
    }
}

impl VcpuIo for Count {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        self.one()
    }
    fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
        self.one()
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        data.fill(0);
        self.one()
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        self.one()
    }
}

/// A machine with one vCPU.
pub struct Machine {
    partition: Arc<dyn Partition>,
    vcpu: Box<dyn Vcpu>,
    state: VcpuState,
    interrupts: Arc<dyn InterruptSink>,
    fd: Option<EventFd>,
}

impl Machine {
    /// On `hypervisor`, about to execute `guest`.
    pub fn new(hypervisor: &dyn Hypervisor, guest: &[u8]) -> Self {
        let spec = PartitionSpec::new(1, Arc::new(MonotonicClock::new()));
        let partition = hypervisor.create(&spec).unwrap();
        for region in guests::ram(guest).iter() {
            let region = vmkit_memory::MemoryRegion::with_arc(region.get_mmap(), GuestAddress(0));
            partition.map(GuestAddress(0), Arc::new(region.unwrap()), MapAccess::WRITE).unwrap();
        }
        let model = CpuModel::with_features("bench", hypervisor.capabilities().features);
        let mut vcpu = partition.create_vcpu(0, &model).unwrap();
        let mut state = VcpuState::default();
        state.general.rip = START;
        state.general.gpr[4] = 0x8000;
        state.segments.cs = Segment::real(0);
        vcpu.set(StateSet::GENERAL | StateSet::SEGMENTS, &state).unwrap();
        let interrupts = partition.interrupts();
        Self { partition, vcpu, state, interrupts, fd: None }
    }

    /// A machine whose guest rings a doorbell, if the backend has them.
    pub fn with_doorbell(hypervisor: &dyn Hypervisor) -> Option<Self> {
        let mut machine = Self::new(hypervisor, guests::DOORBELL);
        let fd = EventFd::new(0).unwrap();
        let at = Doorbell::Pio { port: BELL, width: 1, value: None };
        machine.partition.doorbells()?.add(at, &fd).unwrap();
        machine.fd = Some(fd);
        Some(machine)
    }

    /// A halting machine whose input is pulsed by a descriptor, if the backend has that.
    pub fn with_irqfd(hypervisor: &dyn Hypervisor) -> Option<Self> {
        let mut machine = Self::halting(hypervisor);
        let fd = EventFd::new(0).unwrap();
        machine.interrupts.attach_irqfd(&fd, GSI).ok()?;
        machine.fd = Some(fd);
        Some(machine)
    }

    /// A machine whose guest is about to halt and wait for interrupts.
    pub fn halting(hypervisor: &dyn Hypervisor) -> Self {
        let mut machine = Self::new(hypervisor, guests::HALT);
        machine.exits(1);
        machine
    }

    fn run(&mut self, count: u64) {
        assert_eq!(self.vcpu.run(&mut Count(count)).unwrap(), VmExit::Stopped);
    }

    /// The time of `n` exits.
    pub fn exits(&mut self, n: u64) -> Duration {
        let start = Instant::now();
        self.run(n);
        start.elapsed()
    }

    /// The time of `n` writes to the doorbell.
    pub fn doorbells(&mut self, n: u64) -> Duration {
        let rounds = n.div_ceil(RINGS);
        let elapsed = self.exits(rounds);
        elapsed.mul_f64(n as f64 / (rounds * RINGS) as f64)
    }

    /// The time of `n` interrupts, from the line's edge, seen by a vCPU that halts on another thread,
    /// to the handler's first port write.
    pub fn wakes(&mut self, n: u64) -> Duration {
        let sink = self.interrupts.clone();
        rounds(
            n,
            || self.run(1),
            move || {
                sink.set_level(GSI, true);
                sink.set_level(GSI, false);
            },
        )
    }

    /// As [`wakes`](Self::wakes), by a descriptor.
    pub fn irqfds(&mut self, n: u64) -> Duration {
        let fd = self.fd.as_ref().unwrap().try_clone().unwrap();
        rounds(n, || self.run(1), move || fd.write(1).unwrap())
    }

    /// Reads all of the vCPU's state.
    pub fn get(&mut self) {
        self.vcpu.get(StateSet::all(), &mut self.state).unwrap();
    }

    /// Writes all of the vCPU's state, as it was read last.
    pub fn set(&mut self) {
        self.vcpu.set(StateSet::all(), &self.state).unwrap();
    }

    /// Reads the general registers.
    pub fn get_general(&mut self) {
        self.vcpu.get(StateSet::GENERAL, &mut self.state).unwrap();
    }
}
