//! Virtio for vmkit: devices, a module each, and the transports that show them to a guest.
//!
//! A device ([`VirtioDevice`]) knows its configuration space and what a request means; a transport
//! ([`Mmio`], [`Pci`]) knows registers, negotiation and interrupts; between them a [`Worker`] is
//! handed queues. Who runs the worker is the embedder's choice ([`WorkModel`]).
//!
//! Everything the guest writes is hostile: it is read once, checked, then used. A driver that breaks
//! the rules gets its device marked broken ([`Fault`]), which a reset heals; it never panics the
//! host, never keeps it busy without end, never makes it grow.
//!
//! Section numbers are those of the Virtual I/O Device (VIRTIO) Version 1.2 specification.

mod balloon;
mod block;
mod chain;
mod console;
mod device;
mod fault;
mod interrupt;
mod lane;
mod limit;
mod lock;
mod net;
mod pmem;
mod poll;
mod queue;
mod ring;
mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transport;
mod vsock;
mod work;

pub use balloon::{Balloon, BalloonHandle};
#[cfg(feature = "qcow2")]
pub use block::Qcow2;
pub use block::{Block, Disk, Engine};
pub use chain::{Chain, Reader, Segment, Writer};
pub use console::{Console, ConsoleSize, PortInput};
pub use device::{Activation, DeviceKind, LaneSpec, VirtioDevice, Worker};
pub use fault::{Fault, FaultCounter};
pub use interrupt::{ConfigChange, Interrupt};
pub use limit::RateLimit;
pub use net::{
    DriverOffloads, MAX_FRAME, MIN_FRAME, Net, NetBackend, NetCounters, Offload, Segmentation,
    Switch,
};
pub use pmem::Pmem;
pub use poll::{Event, Interest, Poller, QueueSet, Wake};
pub use queue::{Progress, Queues, VirtQueue};
pub use rng::Rng;
pub use transport::mmio::Mmio;
pub use transport::pci::Pci;
pub use vsock::{Vsock, VsockConnector, VsockListener};
pub use work::{EventLoop, WorkModel};
