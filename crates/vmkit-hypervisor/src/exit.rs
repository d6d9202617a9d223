//! Why a vCPU's run ends, and whom it asks on the way.

use vmkit_device::IoFlow;

/// A control exit: why [`Vcpu::run`](crate::Vcpu::run) returned. No instruction is half done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmExit {
    /// A kick came. Run again to go on.
    Kicked,
    /// A [`VcpuIo`] callback answered [`IoFlow::Stop`]. The access is complete.
    Stopped,
    /// HLT with interrupts off: only an NMI or INIT could wake this vCPU. KVM waits inside the kernel
    /// instead and does not report this; see [`Capabilities`](crate::Capabilities).
    HaltedForGood,
    /// A triple fault: the processor shut down (Intel SDM vol. 3A §7.15, interrupt 8).
    Shutdown,
}

/// The world outside a vCPU: what answers its port and memory accesses.
///
/// Each call is one access of 1, 2, 4 or 8 bytes, little-endian; string I/O arrives element by
/// element. The interrupt controllers of the partition answer their own addresses first.
pub trait VcpuIo {
    /// The guest reads a port.
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> IoFlow;
    /// The guest writes a port.
    fn pio_write(&mut self, port: u16, data: &[u8]) -> IoFlow;
    /// The guest reads guest-physical memory that nothing is mapped at.
    fn mmio_read(&mut self, address: u64, data: &mut [u8]) -> IoFlow;
    /// The guest writes guest-physical memory that nothing is mapped at, or that is read-only.
    fn mmio_write(&mut self, address: u64, data: &[u8]) -> IoFlow;
}
