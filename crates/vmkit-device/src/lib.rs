//! The device contract of vmkit.
//!
//! A device is a value that states its needs ([`DeviceBuilder::needs`]) and becomes alive when it
//! is given [`Resources`]: port and MMIO ranges, interrupt wires, guest memory and a clock. It never
//! sees a hypervisor, a vCPU, or an interrupt number.
//!
//! A [`Device`] is shared by all vCPU threads, so its methods take `&self`. What the guest writes is
//! hostile: a device may count it, log it or mark itself broken, but never panics, loops without
//! bound or allocates without bound.
//!
//! # A device of one's own
//!
//! A counter of events: its register at port 0x600 reads as how many came, a write of n lets n come,
//! and its interrupt line is high until the count is read. The example stands in for the machine with
//! a bus and a sink for interrupts; on a real one, the builder goes to `VmBuilder::device`.
//!
//! ```
//! use std::sync::atomic::{AtomicU32, Ordering};
//! use std::sync::{Arc, Mutex};
//!
//! use vmkit_device::*;
//!
//! /// What the embedder configures.
//! struct CounterBuilder;
//!
//! impl DeviceBuilder for CounterBuilder {
//!     fn name(&self) -> String {
//!         "counter".into()
//!     }
//!     fn needs(&self) -> Needs {
//!         // Region 0 and line 0. `IoNeed::mmio(0x1000)` would be a page of MMIO, anywhere.
//!         Needs { io: vec![IoNeed::ports(0x600, 4)], irqs: vec![IrqNeed::Any] }
//!     }
//!     fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
//!         let line = resources.line(0).ok_or_else(|| DeviceError::Config {
//!             device: self.name(),
//!             reason: "it was given no interrupt line".into(),
//!         })?;
//!         Ok(Arc::new(Counter { line, count: AtomicU32::new(0) }))
//!     }
//! }
//!
//! /// What the guest meets, on whichever vCPU.
//! struct Counter {
//!     line: IrqLine,
//!     count: AtomicU32,
//! }
//!
//! /// The format of its saved state.
//! const FORMAT: SectionFormat = SectionFormat { kind: "counter", version: 1 };
//!
//! impl Device for Counter {
//!     fn name(&self) -> &str {
//!         "counter"
//!     }
//!     /// A driver knows its port, without a word in the firmware's tables.
//!     fn announce(&self) -> Vec<Announcement> {
//!         Vec::new()
//!     }
//!     fn read(&self, _region: usize, offset: u64, data: &mut [u8]) {
//!         let register = self.count.load(Ordering::Relaxed).to_le_bytes();
//!         // The guest chooses offset and width. What is no register reads as ones.
//!         for (byte, at) in data.iter_mut().zip(offset as usize..) {
//!             *byte = register.get(at).copied().unwrap_or(0xFF);
//!         }
//!         self.line.set(false);
//!     }
//!     fn write(&self, _region: usize, offset: u64, data: &[u8]) -> IoFlow {
//!         if let (0, &[events]) = (offset, data) {
//!             self.count.fetch_add(events.into(), Ordering::Relaxed);
//!             self.line.set(true);
//!         }
//!         IoFlow::Continue
//!     }
//!     /// It does nothing in the background.
//!     fn start(&self) -> Result<(), DeviceError> {
//!         Ok(())
//!     }
//!     fn pause(&self) {}
//!     fn reset(&self) {
//!         self.count.store(0, Ordering::Relaxed);
//!         self.line.set(false);
//!     }
//!     fn save(&self) -> Saved {
//!         FORMAT.save(&(self.count.load(Ordering::Relaxed), self.line.level()))
//!     }
//!     fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
//!         let (count, level): (u32, bool) = FORMAT.load(self.name(), sections)?;
//!         self.count.store(count, Ordering::Relaxed);
//!         // The interrupt controller's own state knows the level: no edge.
//!         self.line.restore(level);
//!         Ok(())
//!     }
//! }
//!
//! /// Interrupt controllers that only remember.
//! #[derive(Default)]
//! struct Levels(Mutex<Vec<bool>>);
//!
//! impl InterruptSink for Levels {
//!     fn set_level(&self, _gsi: u32, high: bool) {
//!         self.0.lock().unwrap().push(high);
//!     }
//!     fn signal_msi(&self, _: Msi) {}
//!     fn attach_irqfd(&self, _: &EventFd, _: u32) -> std::io::Result<()> {
//!         Err(std::io::ErrorKind::Unsupported.into())
//!     }
//! }
//!
//! // What a machine does with a builder.
//! let layout = memory::RamLayout::pc(1 << 20)?;
//! let ram = memory::allocate(&layout, memory::Backing::Anonymous)?;
//! let levels = Arc::new(Levels::default());
//! let clock = Arc::new(ManualClock::default());
//! let mut resources = Resources::new(ram, clock, EndSignal::default(), levels.clone());
//! let needs = CounterBuilder.needs();
//! ResourceAllocator::new(levels.clone()).assign("counter", &needs, &mut resources)?;
//! let start = resources.io[0];
//! let counter = Box::new(CounterBuilder).build(resources)?;
//! let bus = Arc::new(Bus::new());
//! bus.insert(BusRange { space: IoSpace::Pio, start, len: 4 }, counter.clone(), 0)?;
//!
//! // What a guest does with the device.
//! let mut vcpu = bus.view();
//! assert_eq!(vcpu.write(IoSpace::Pio, 0x600, &[3]), IoFlow::Continue);
//! assert_eq!(*levels.0.lock().unwrap(), [true]);
//! let mut register = [0; 4];
//! vcpu.read(IoSpace::Pio, 0x600, &mut register);
//! assert_eq!(u32::from_le_bytes(register), 3);
//! assert_eq!(*levels.0.lock().unwrap(), [true, false]);
//!
//! // And what a saved state is for.
//! let Saved::Sections(saved) = counter.save() else { panic!("it has a state") };
//! counter.reset();
//! counter.load(&saved)?;
//! vcpu.read(IoSpace::Pio, 0x600, &mut register);
//! assert_eq!(u32::from_le_bytes(register), 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
