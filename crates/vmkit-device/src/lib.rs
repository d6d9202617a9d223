//! The device contract of vmkit.
//!
//! A device is a value that states its needs ([`DeviceBuilder::needs`]) and becomes alive when it
//! is given [`Resources`]: port and MMIO ranges, interrupt wires, guest memory and a clock. It never
//! sees a hypervisor, a vCPU, or an interrupt number.
//!
//! A [`Device`] is shared by all vCPU threads, so its methods take `&self`. What the guest writes is
//! hostile: a device may count it, log it or mark itself broken, but never panics, loops without
//! bound or allocates without bound.

mod announce;
mod bus;
mod clock;
mod device;
mod end;
mod format;
mod interrupt;
mod resources;
mod thread;

pub use announce::Announcement;
pub use bus::{Bus, BusError, BusRange, BusView};
pub use clock::{Clock, ManualClock, MonotonicClock};
pub use device::{Device, DeviceBuilder, DeviceError, IoFlow, Saved};
pub use end::{EndSignal, GuestEnd};
pub use format::SectionFormat;
pub use interrupt::{
    Doorbell, Doorbells, InterruptSink, IrqLine, IrqWire, Msi, MsiRoute, MsiVector,
};
pub use resources::{
    IoNeed, IoSpace, IrqNeed, Needs, RangeReason, ResourceAllocator, ResourceError, Resources,
};
pub use thread::thread_builder;
pub use vmkit_memory as memory;
pub use vmkit_snapshot::{Section, SnapshotError};
pub use vmm_sys_util::eventfd::EventFd;
