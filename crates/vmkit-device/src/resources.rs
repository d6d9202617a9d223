//! What a device needs of the machine, and what it is given.

use std::collections::HashMap;
use std::sync::Arc;

use thiserror::Error;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator, RangeInclusive};
use vmkit_memory::{GuestAddress, GuestRam};

use crate::{Clock, Doorbells, EndSignal, InterruptSink, IrqLine, IrqWire};

/// Ports or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoSpace {
    /// The 64 Ki I/O ports.
    Pio,
    /// Guest-physical addresses.
    Mmio,
}

/// A range a device wants to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoNeed {
    /// Ports or memory.
    pub space: IoSpace,
    /// Where it must be, or anywhere.
    pub at: Option<u64>,
    /// Length, in ports or bytes.
    pub len: u64,
    /// Alignment of a range that may be anywhere: a power of two.
    pub align: u64,
}

impl IoNeed {
    /// `len` ports at `port`.
    pub fn ports(port: u16, len: u16) -> Self {
        Self { space: IoSpace::Pio, at: Some(port.into()), len: len.into(), align: 1 }
    }

    /// `len` bytes of MMIO anywhere in the 32-bit hole, aligned to `len`'s next power of two.
    pub fn mmio(len: u64) -> Self {
        Self { space: IoSpace::Mmio, at: None, len, align: len.next_power_of_two() }
    }
}

/// An interrupt input a device wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqNeed {
    /// This one, shared with whoever else asks for it.
    Fixed(u32),
    /// Any free one.
    Any,
}

/// All a device needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Ranges, numbered in this order as regions.
    pub io: Vec<IoNeed>,
    /// Interrupt inputs, in this order.
    pub irqs: Vec<IrqNeed>,
}

/// What a device lives on.
#[derive(Clone)]
#[non_exhaustive]
pub struct Resources {
    /// First port or address of each region, in the order of [`Needs::io`].
    pub io: Vec<u64>,
    /// A wire per input, in the order of [`Needs::irqs`].
    pub irqs: Vec<IrqWire>,
    /// First address of each file of [`DeviceBuilder::memory`](crate::DeviceBuilder::memory).
    pub placed: Vec<GuestAddress>,
    /// Guest memory: RAM, and what devices brought.
    pub memory: GuestRam,
    /// Guest time.
    pub clock: Arc<dyn Clock>,
    /// The way to end the machine.
    pub end: EndSignal,
    /// Where message-signalled interrupts go.
    pub interrupts: Arc<dyn InterruptSink>,
    /// In-kernel doorbells, if the backend has them.
    pub doorbells: Option<Arc<dyn Doorbells>>,
}

impl std::fmt::Debug for Resources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resources")
            .field("io", &self.io)
            .field("irqs", &self.irqs)
            .field("placed", &self.placed)
            .field("end", &self.end)
            .field("doorbells", &self.doorbells.is_some())
            .finish_non_exhaustive()
    }
}

impl Resources {
    /// Resources with no regions, wires or doorbells.
    pub fn new(
        memory: GuestRam,
        clock: Arc<dyn Clock>,
        end: EndSignal,
        interrupts: Arc<dyn InterruptSink>,
    ) -> Self {
        Self {
            io: Vec::new(),
            irqs: Vec::new(),
            placed: Vec::new(),
            memory,
            clock,
            end,
            interrupts,
            doorbells: None,
        }
    }

    /// A line on input `index`, in the order of [`Needs::irqs`]; none if it was not asked for.
    pub fn line(&self, index: usize) -> Option<IrqLine> {
        self.irqs.get(index).map(IrqWire::line)
    }
}

/// Why a device's needs cannot be met.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResourceError {
    /// The range is taken, or there is no room for it.
    #[error("{device}: no room for {len:#x} {space:?} at {at:x?}")]
    Range {
        /// The device.
        device: String,
        /// Ports or memory.
        space: IoSpace,
        /// Where it wanted to be.
        at: Option<u64>,
        /// How much it wanted.
        len: u64,
    },
    /// The processor has no addresses for memory that the device brings.
    #[error("{device}: no addresses for {len:#x} bytes of memory above RAM")]
    Memory {
        /// The device.
        device: String,
        /// How much it brings.
        len: u64,
    },
    /// No interrupt input is free, or it does not exist.
    #[error("{device}: no interrupt input {gsi:?} to be had")]
    Irq {
        /// The device.
        device: String,
        /// The one it wanted, if it mattered.
        gsi: Option<u32>,
    },
}

/// Hands out ports, MMIO and interrupt inputs so that no two devices get the same range.
pub struct ResourceAllocator {
    pio: AddressAllocator,
    mmio: AddressAllocator,
    free_irqs: IdAllocator,
    wires: HashMap<u32, IrqWire>,
    sink: Arc<dyn InterruptSink>,
}

impl std::fmt::Debug for ResourceAllocator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResourceAllocator")
            .field("wires", &self.wires.keys())
            .finish_non_exhaustive()
    }
}

/// First MMIO address handed to devices that may be anywhere: the 32-bit hole, below the IOAPIC.
const MMIO_FIRST: u64 = 0xD000_0000;
const MMIO_LAST: u64 = 0xFEBF_FFFF;
/// Inputs for devices that may have any: those a PC leaves free for PCI, then the IOAPIC's upper
/// eight.
const IRQ_FIRST: u32 = 16;
const IRQ_LAST: u32 = 23;

impl ResourceAllocator {
    /// An allocator over a PC's ports, 32-bit MMIO hole and 24 interrupt inputs.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        #[allow(clippy::expect_used, reason = "constants, checked by every test that allocates")]
        let (pio, mmio, free_irqs) = (
            AddressAllocator::new(0, 0x1_0000).expect("the port space is a valid range"),
            AddressAllocator::new(MMIO_FIRST, MMIO_LAST - MMIO_FIRST + 1)
                .expect("the MMIO hole is a valid range"),
            IdAllocator::new(IRQ_FIRST, IRQ_LAST).expect("the inputs are a valid range"),
        );
        Self { pio, mmio, free_irqs, wires: HashMap::new(), sink }
    }

    /// The one wire to input `gsi`.
    pub fn wire(&mut self, gsi: u32) -> IrqWire {
        let sink = &self.sink;
        self.wires.entry(gsi).or_insert_with(|| IrqWire::new(sink.clone(), gsi)).clone()
    }

    /// Meets `needs`, writing regions and wires into `resources`.
    ///
    /// # Errors
    /// [`ResourceError`], after which some of the device's ranges may stay reserved.
    pub fn assign(
        &mut self,
        device: &str,
        needs: &Needs,
        resources: &mut Resources,
    ) -> Result<(), ResourceError> {
        for need in &needs.io {
            let range = self.range(need).ok_or_else(|| ResourceError::Range {
                device: device.into(),
                space: need.space,
                at: need.at,
                len: need.len,
            })?;
            resources.io.push(range.start());
        }
        for need in &needs.irqs {
            let gsi = match *need {
                IrqNeed::Fixed(gsi) if gsi <= IRQ_LAST => Some(gsi),
                IrqNeed::Fixed(_) => None,
                IrqNeed::Any => self.free_irqs.allocate_id().ok(),
            };
            let gsi = gsi.ok_or_else(|| ResourceError::Irq {
                device: device.into(),
                gsi: match *need {
                    IrqNeed::Fixed(gsi) => Some(gsi),
                    IrqNeed::Any => None,
                },
            })?;
            resources.irqs.push(self.wire(gsi));
        }
        Ok(())
    }

    fn range(&mut self, need: &IoNeed) -> Option<RangeInclusive> {
        let (allocator, inside) = match need.space {
            IoSpace::Pio => (&mut self.pio, true),
            IoSpace::Mmio => {
                let outside = need.at.is_some_and(|at| !(MMIO_FIRST..=MMIO_LAST).contains(&at));
                (&mut self.mmio, !outside)
            }
        };
        match need.at {
            // A fixed address outside the hole (a chip's traditional place) is the bus's to check.
            Some(at) if !inside => RangeInclusive::new(at, at.checked_add(need.len - 1)?).ok(),
            Some(at) => allocator.allocate(need.len, 1, AllocPolicy::ExactMatch(at)).ok(),
            None => allocator.allocate(need.len, need.align, AllocPolicy::FirstMatch).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use vmkit_memory::{Backing, RamLayout};

    use super::*;
    use crate::{EventFd, ManualClock, Msi};

    struct Nowhere;
    impl InterruptSink for Nowhere {
        fn set_level(&self, _: u32, _: bool) {}
        fn signal_msi(&self, _: Msi) {}
        fn attach_irqfd(&self, _: &EventFd, _: u32) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn resources() -> Resources {
        let memory =
            vmkit_memory::allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
        Resources::new(
            memory,
            Arc::new(ManualClock::default()),
            EndSignal::default(),
            Arc::new(Nowhere),
        )
    }

    #[test]
    fn fixed_ranges_conflict_and_free_ones_do_not() {
        let mut allocator = ResourceAllocator::new(Arc::new(Nowhere));
        let serial = Needs { io: vec![IoNeed::ports(0x3F8, 8)], irqs: vec![IrqNeed::Fixed(4)] };
        allocator.assign("serial0", &serial, &mut resources()).unwrap();
        assert!(matches!(
            allocator.assign("serial1", &serial, &mut resources()),
            Err(ResourceError::Range { space: IoSpace::Pio, at: Some(0x3F8), .. })
        ));
        let virtio = Needs { io: vec![IoNeed::mmio(0x200)], irqs: vec![IrqNeed::Any] };
        let (mut a, mut b) = (resources(), resources());
        allocator.assign("blk0", &virtio, &mut a).unwrap();
        allocator.assign("net0", &virtio, &mut b).unwrap();
        assert_ne!(a.io[0], b.io[0]);
        assert_ne!(a.irqs[0].gsi(), b.irqs[0].gsi());
    }
}
