//! A vCPU's way to the devices, and what is counted on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmkit_device::{BusView, IoFlow, IoSpace};
use vmkit_hypervisor::VcpuIo;

/// What a vCPU did so far. Read with [`RunningVm::vcpu_stats`](crate::RunningVm::vcpu_stats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VcpuStats {
    /// Guest instructions executed, where the backend counts them; as of the last time the vCPU
    /// came out of its run (exact after a pause and after the end).
    pub instructions: Option<u64>,
    /// Times the vCPU's run returned.
    pub exits: u64,
    /// Port accesses that reached the bus, each of 1, 2 or 4 bytes.
    pub pio: u64,
    /// Memory-mapped accesses that reached the bus.
    pub mmio: u64,
    /// Of both, the ones that no device answered.
    pub unclaimed: u64,
}

/// One vCPU's counters. Only its thread writes them, so an addition needs no locked instruction.
#[derive(Default)]
pub(crate) struct Counters {
    instructions: AtomicU64,
    counted: AtomicBool,
    exits: AtomicU64,
    pio: AtomicU64,
    mmio: AtomicU64,
    unclaimed: Arc<AtomicU64>,
}

fn add_one(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn exit(&self, instructions: Option<u64>) {
        add_one(&self.exits);
        if let Some(instructions) = instructions {
            self.instructions.store(instructions, Ordering::Relaxed);
            self.counted.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self) -> VcpuStats {
        let counted = self.counted.load(Ordering::Relaxed);
        VcpuStats {
            instructions: counted.then(|| self.instructions.load(Ordering::Relaxed)),
            exits: self.exits.load(Ordering::Relaxed),
            pio: self.pio.load(Ordering::Relaxed),
            mmio: self.mmio.load(Ordering::Relaxed),
            unclaimed: self.unclaimed.load(Ordering::Relaxed),
        }
    }
}

/// The world outside one vCPU: the machine's bus.
pub(crate) struct BusIo {
    view: BusView,
    counters: Arc<Counters>,
}

impl BusIo {
    pub(crate) fn new(view: BusView, counters: Arc<Counters>) -> Self {
        let view = view.counting_in(counters.unclaimed.clone());
        Self { view, counters }
    }
}

impl VcpuIo for BusIo {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> IoFlow {
        add_one(&self.counters.pio);
        self.view.read(IoSpace::Pio, port.into(), data);
        IoFlow::Continue
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> IoFlow {
        add_one(&self.counters.pio);
        self.view.write(IoSpace::Pio, port.into(), data)
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8]) -> IoFlow {
        add_one(&self.counters.mmio);
        self.view.read(IoSpace::Mmio, address, data);
        IoFlow::Continue
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) -> IoFlow {
        add_one(&self.counters.mmio);
        self.view.write(IoSpace::Mmio, address, data)
    }
}
