//! What a device needs of the machine, and what it is given.

use std::collections::HashMap;
use std::sync::Arc;

use thiserror::Error;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vmkit_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRam};

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
        // What is longer than every power of two finds no room whatever its alignment.
        let align = len.checked_next_power_of_two().unwrap_or(1);
        Self { space: IoSpace::Mmio, at: None, len, align }
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
    /// The device cannot have the range.
    #[error("{device}: {}: {reason}", wanted(.space, .at, .len))]
    #[non_exhaustive]
    Range {
        /// The device.
        device: String,
        /// Ports or memory.
        space: IoSpace,
        /// Where it wanted to be.
        at: Option<u64>,
        /// How much it wanted.
        len: u64,
        /// Why not.
        reason: RangeReason,
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
    #[error("{device}: {}", no_input(.gsi))]
    Irq {
        /// The device.
        device: String,
        /// The one it wanted, if it mattered.
        gsi: Option<u32>,
    },
}

/// Why a device cannot have a range.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RangeReason {
    /// It has no length.
    #[error("it is empty")]
    Empty,
    /// It ends behind the last port or address.
    #[error("it leaves its address space")]
    Leaves,
    /// Another device has part of it, or there is no room for it.
    #[error("it is taken, or there is no room for it")]
    Taken,
    /// Accesses to part of it never reach a device.
    #[error("no access to all of it would reach the device: {0} is there")]
    Unreachable(&'static str),
}

/// A range as an error tells it.
fn wanted(space: &IoSpace, at: &Option<u64>, len: &u64) -> String {
    let what = match space {
        IoSpace::Pio => "ports",
        IoSpace::Mmio => "bytes of MMIO",
    };
    let place = at.map(|at| format!(" at {at:#x}")).unwrap_or_default();
    format!("{len:#x} {what}{place}")
}

/// Why there is no interrupt input for a device.
fn no_input(gsi: &Option<u32>) -> String {
    match gsi {
        Some(gsi) => format!("there is no interrupt input {gsi}: the last is {IRQ_LAST}"),
        None => {
            let inputs = IRQ_LAST - IRQ_FIRST + 1;
            format!("no interrupt input is left of the {inputs} that any device may have")
        }
    }
}

/// Ports or addresses where no device is reached.
#[derive(Clone, Copy)]
struct Reserved {
    space: IoSpace,
    start: u64,
    last: u64,
    what: &'static str,
}

/// Hands out ports, MMIO and interrupt inputs so that no two devices get the same range.
pub struct ResourceAllocator {
    pio: AddressAllocator,
    mmio: AddressAllocator,
    free_irqs: IdAllocator,
    wires: HashMap<u32, IrqWire>,
    sink: Arc<dyn InterruptSink>,
    reserved: Vec<Reserved>,
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
        Self { pio, mmio, free_irqs, wires: HashMap::new(), sink, reserved: Vec::new() }
    }

    /// Says that no access from `start` to `last` reaches a device, because `what` answers it: devices
    /// that ask for part of that are refused from now on.
    pub fn reserve(&mut self, space: IoSpace, start: u64, last: u64, what: &'static str) {
        self.reserved.push(Reserved { space, start, last, what });
    }

    /// The one wire to input `gsi`.
    pub fn wire(&mut self, gsi: u32) -> IrqWire {
        let sink = &self.sink;
        self.wires.entry(gsi).or_insert_with(|| IrqWire::new(sink.clone(), gsi)).clone()
    }

    /// Meets `needs`, writing regions and wires into `resources`. A range that begins at a given address
    /// must not touch `resources.memory`, or what was [`reserve`](Self::reserve)d.
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
            let start = self.range(need, &resources.memory).map_err(|reason| {
                let IoNeed { space, at, len, .. } = *need;
                ResourceError::Range { device: device.into(), space, at, len, reason }
            })?;
            resources.io.push(start);
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

    /// Where the range begins.
    fn range(&mut self, need: &IoNeed, memory: &GuestRam) -> Result<u64, RangeReason> {
        let behind = need.len.checked_sub(1).ok_or(RangeReason::Empty)?;
        let allocator = match need.space {
            IoSpace::Pio => &mut self.pio,
            IoSpace::Mmio => &mut self.mmio,
        };
        let taken = |_| RangeReason::Taken;
        let Some(at) = need.at else {
            let range = allocator.allocate(need.len, need.align, AllocPolicy::FirstMatch);
            return range.map_err(taken).map(|range| range.start());
        };
        let last = at.checked_add(behind).ok_or(RangeReason::Leaves)?;
        if need.space == IoSpace::Pio && last > 0xFFFF {
            return Err(RangeReason::Leaves);
        }
        let meets = |start: u64, end: u64| at <= end && start <= last;
        let here = |r: &&Reserved| r.space == need.space && meets(r.start, r.last);
        if let Some(reserved) = self.reserved.iter().find(here) {
            return Err(RangeReason::Unreachable(reserved.what));
        }
        let is_memory = memory.iter().any(|r| meets(r.start_addr().0, r.last_addr().0));
        if need.space == IoSpace::Mmio && is_memory {
            return Err(RangeReason::Unreachable("guest memory"));
        }
        // A fixed address outside the hole (a chip's traditional place) is the bus's to check.
        if need.space == IoSpace::Pio || (MMIO_FIRST..=MMIO_LAST).contains(&at) {
            allocator.allocate(need.len, 1, AllocPolicy::ExactMatch(at)).map_err(taken)?;
        }
        Ok(at)
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

    #[test]
    fn a_range_where_no_access_reaches_a_device_is_refused() {
        let mut allocator = ResourceAllocator::new(Arc::new(Nowhere));
        allocator.reserve(IoSpace::Pio, 0x40, 0x43, "the timer");
        let mut refused = |need: IoNeed| {
            let needs = Needs { io: vec![need], irqs: vec![] };
            match allocator.assign("mine", &needs, &mut resources()) {
                Err(ResourceError::Range { reason, .. }) => Some(reason),
                other => other.map(|()| None).unwrap(),
            }
        };
        let mmio = |at, len| IoNeed { space: IoSpace::Mmio, at: Some(at), len, align: 1 };
        let ram = Some(RangeReason::Unreachable("guest memory"));
        assert_eq!(refused(mmio(0xA_0000, 0x1000)), ram);
        assert_eq!(refused(mmio(0xF_FFFF, 2)), ram);
        assert_eq!(refused(mmio(0x10_0000, 2)), None);
        let timer = Some(RangeReason::Unreachable("the timer"));
        assert_eq!(refused(IoNeed::ports(0x43, 1)), timer);
        assert_eq!(refused(IoNeed::ports(0x3F, 9)), timer);
        assert_eq!(refused(IoNeed::ports(0x44, 1)), None);
        assert_eq!(refused(mmio(0xFFF0_0040, 1)), None);
    }

    #[test]
    fn a_range_that_is_none_is_refused() {
        let mut allocator = ResourceAllocator::new(Arc::new(Nowhere));
        let fixed = |space, at, len| IoNeed { space, at: Some(at), len, align: 1 };
        use IoSpace::Mmio;
        for (need, why) in [
            (fixed(Mmio, 0xFFF0_0000, 0), RangeReason::Empty),
            (fixed(Mmio, 0xD000_0000, 0), RangeReason::Empty),
            (IoNeed::ports(0x500, 0), RangeReason::Empty),
            (IoNeed::mmio(0), RangeReason::Empty),
            (IoNeed::mmio(u64::MAX), RangeReason::Taken),
            (IoNeed::mmio(1 << 63), RangeReason::Taken),
            (fixed(Mmio, u64::MAX, 2), RangeReason::Leaves),
            (fixed(Mmio, 0xD000_0000, u64::MAX), RangeReason::Leaves),
            (IoNeed::ports(0xFFFF, 2), RangeReason::Leaves),
        ] {
            let needs = Needs { io: vec![need], irqs: vec![] };
            let error = allocator.assign("mine", &needs, &mut resources()).unwrap_err();
            let is = matches!(error, ResourceError::Range { reason, .. } if reason == why);
            assert!(is, "{need:?}: {error}");
        }
    }

    #[test]
    fn what_is_refused_is_told_with_the_device_and_the_range() {
        let mut allocator = ResourceAllocator::new(Arc::new(Nowhere));
        allocator.reserve(IoSpace::Pio, 0x40, 0x43, "the timer");
        let mut told = |needs: Needs| {
            allocator.assign("mine", &needs, &mut resources()).unwrap_err().to_string()
        };
        assert_eq!(
            told(Needs { io: vec![IoNeed::ports(0x42, 4)], irqs: vec![] }),
            "mine: 0x4 ports at 0x42: no access to all of it would reach the device: the timer is there"
        );
        assert_eq!(
            told(Needs { io: vec![IoNeed::mmio(1 << 40)], irqs: vec![] }),
            "mine: 0x10000000000 bytes of MMIO: it is taken, or there is no room for it"
        );
    }

    #[test]
    fn interrupt_inputs_that_are_not_to_be_had_are_told_as_such() {
        let mut allocator = ResourceAllocator::new(Arc::new(Nowhere));
        let mut told = |need| {
            let needs = Needs { io: vec![], irqs: vec![need] };
            let assigned = allocator.assign("mine", &needs, &mut resources());
            assigned.map_err(|error| error.to_string())
        };
        for _ in 0..8 {
            told(IrqNeed::Any).unwrap();
        }
        assert_eq!(
            told(IrqNeed::Any).unwrap_err(),
            "mine: no interrupt input is left of the 8 that any device may have"
        );
        assert_eq!(
            told(IrqNeed::Fixed(24)).unwrap_err(),
            "mine: there is no interrupt input 24: the last is 23"
        );
    }
}
