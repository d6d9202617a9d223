//! Instructions that are fetched from where no memory is.

use std::sync::Arc;

use vmkit_device::ManualClock;
use vmkit_hypervisor::{CpuModel, Hypervisor, IoFlow, PartitionSpec, VcpuIo, VmExit};
use vmkit_soft::SoftHypervisor;

/// A device whose every read is another one, as a counter's or a queue's is.
struct Restless {
    reads: u64,
}

impl VcpuIo for Restless {
    fn pio_read(&mut self, _: u16, _: &mut [u8]) -> IoFlow {
        IoFlow::Continue
    }
    fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        self.reads += 1;
        assert!(self.reads < 10_000, "one fetch reads without end");
        // The opcode of NOP, and operands that change.
        data.fill(0x90);
        if let Some(last) = data.last_mut() {
            *last = 0x90 | self.reads as u8 & 7;
        }
        if self.reads < 50 { IoFlow::Continue } else { IoFlow::Stop }
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        IoFlow::Continue
    }
}

#[test]
fn code_in_a_device_that_never_answers_twice_alike_does_not_hold_its_vcpu() {
    let soft = SoftHypervisor::new();
    let spec = PartitionSpec::new(1, Arc::new(ManualClock::default()));
    let partition = soft.create(&spec).unwrap();
    let model = CpuModel::with_features("test", soft.capabilities().features);
    // It begins at the reset vector, and no memory is there.
    let mut vcpu = partition.create_vcpu(0, &model).unwrap();
    assert_eq!(vcpu.run(&mut Restless { reads: 0 }).unwrap(), VmExit::Stopped);
}
