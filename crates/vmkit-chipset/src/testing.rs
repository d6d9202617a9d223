//! A machine of one device, for unit tests: it meets a builder's needs and shows what comes out.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmkit_device::memory::{Backing, RamLayout, allocate};
use vmkit_device::{
    Device, DeviceBuilder, EndSignal, EventFd, GuestEnd, InterruptSink, IoFlow, ManualClock, Msi,
    ResourceAllocator, Resources, Saved, Section,
};

use crate::access::lock;

/// Records every change of level.
#[derive(Default)]
pub(crate) struct Wires(Mutex<Vec<(u32, bool)>>);

impl InterruptSink for Wires {
    fn set_level(&self, gsi: u32, high: bool) {
        lock(&self.0).push((gsi, high));
    }
    fn signal_msi(&self, _: Msi) {}
    fn attach_irqfd(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

pub(crate) struct Rig {
    pub device: Arc<dyn Device>,
    pub clock: Arc<ManualClock>,
    pub wires: Arc<Wires>,
    end: EndSignal,
    regions: Vec<(u16, u16)>,
}

impl Rig {
    /// Builds and starts `builder`'s device, with the wall clock at 2024-02-29 23:59:58 UTC.
    pub(crate) fn new(builder: impl DeviceBuilder + 'static) -> Self {
        Self::with_memory(builder, 1 << 20)
    }

    pub(crate) fn with_memory(builder: impl DeviceBuilder + 'static, memory: u64) -> Self {
        let wires = Arc::new(Wires::default());
        let clock = Arc::new(ManualClock::at_epoch(Duration::from_secs(1_709_251_198)));
        let end = EndSignal::default();
        let memory = allocate(&RamLayout::pc(memory).unwrap(), Backing::Anonymous).unwrap();
        let mut resources = Resources::new(memory, clock.clone(), end.clone(), wires.clone());
        let needs = builder.needs();
        ResourceAllocator::new(wires.clone())
            .assign(&builder.name(), &needs, &mut resources)
            .unwrap();
        let regions = needs.io.iter().zip(&resources.io);
        let regions = regions.map(|(need, &at)| (at as u16, need.len as u16)).collect();
        let name = builder.name();
        let device = Box::new(builder).build(resources).unwrap();
        assert_eq!(device.name(), name);
        device.start().unwrap();
        Self { device, clock, wires, end, regions }
    }

    fn find(&self, port: u16, len: usize) -> (usize, u64) {
        let region = self
            .regions
            .iter()
            .position(|&(at, size)| port >= at && usize::from(port - at) + len <= usize::from(size))
            .unwrap_or_else(|| panic!("no region holds {len} bytes at {port:#x}"));
        (region, u64::from(port - self.regions[region].0))
    }

    pub(crate) fn inb(&self, port: u16) -> u8 {
        self.inl(port, 1) as u8
    }

    /// Reads `width` bytes.
    pub(crate) fn inl(&self, port: u16, width: usize) -> u32 {
        let (region, offset) = self.find(port, width);
        let mut data = [0; 4];
        self.device.read(region, offset, &mut data[..width]);
        u32::from_le_bytes(data)
    }

    pub(crate) fn outb(&self, port: u16, value: u8) -> IoFlow {
        self.outl(port, 1, value.into())
    }

    /// Writes the low `width` bytes of `value`.
    pub(crate) fn outl(&self, port: u16, width: usize, value: u32) -> IoFlow {
        let (region, offset) = self.find(port, width);
        self.device.write(region, offset, &value.to_le_bytes()[..width])
    }

    /// The level of input `gsi`.
    pub(crate) fn level(&self, gsi: u32) -> bool {
        lock(&self.wires.0).iter().rev().find(|&&(g, _)| g == gsi).is_some_and(|&(_, high)| high)
    }

    /// How often input `gsi` went high.
    pub(crate) fn rises(&self, gsi: u32) -> usize {
        lock(&self.wires.0).iter().filter(|&&wire| wire == (gsi, true)).count()
    }

    /// How the guest ended its machine, if it did.
    pub(crate) fn ended(&self) -> Option<GuestEnd> {
        self.end.raised()
    }

    pub(crate) fn sections(&self) -> Vec<Section> {
        match self.device.save() {
            Saved::Sections(sections) => sections,
            Saved::Stateless => Vec::new(),
            Saved::Cannot(reason) => panic!("cannot save: {reason}"),
        }
    }

    /// Does what a hostile guest would, within and beyond what a bus lets through.
    pub(crate) fn abuse(&self, accesses: &[Abuse]) {
        for access in accesses {
            let width = access.width.min(8);
            if access.write {
                let _ = self.device.write(
                    access.region,
                    access.offset,
                    &access.value.to_le_bytes()[..width],
                );
            } else {
                let mut data = [0; 8];
                self.device.read(access.region, access.offset, &mut data[..width]);
            }
            self.clock.advance(Duration::from_nanos(access.pause));
        }
    }

    /// Checks that what is saved loads into `other` and saves the same, and that damaged sections
    /// leave `other` as it was.
    pub(crate) fn check_saved_state(&self, other: &Rig) {
        let saved = self.sections();
        let before = other.sections();
        let alien = Section { name: "x".into(), kind: "x".into(), version: 1, bytes: vec![0] };
        let mut damaged = vec![[saved.as_slice(), &[alien]].concat()];
        if let [section] = saved.as_slice() {
            damaged.push(Vec::new());
            for cut in 0..section.bytes.len() {
                let bytes = section.bytes[..cut].to_vec();
                damaged.push(vec![Section { bytes, ..section.clone() }]);
            }
            damaged.push(vec![Section { version: section.version + 1, ..section.clone() }]);
            damaged.push(vec![Section { kind: "other".into(), ..section.clone() }]);
        }
        for sections in damaged {
            assert!(other.device.load(&sections).is_err(), "{sections:?}");
            assert_eq!(other.sections(), before);
        }
        other.device.load(&saved).unwrap();
        assert_eq!(other.sections(), saved);
    }
}

/// One access of a hostile guest, and how long it then waits, in nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Abuse {
    write: bool,
    region: usize,
    offset: u64,
    width: usize,
    value: u64,
    pause: u64,
}

/// Hostile accesses: mostly to real registers, sometimes far outside of them.
pub(crate) fn abuses() -> impl proptest::strategy::Strategy<Value = Vec<Abuse>> {
    use proptest::prelude::*;
    let offset = prop_oneof![8 => 0_u64..16, 1 => any::<u64>()];
    let value = prop_oneof![0_u64..256, any::<u64>()];
    let pause = prop_oneof![4 => 0_u64..2_000_000_000, 1 => 0_u64..1 << 50];
    let region = prop_oneof![8 => 0_usize..6, 1 => any::<usize>()];
    let width = 0_usize..=8;
    let access = (any::<bool>(), region, offset, width, value, pause).prop_map(
        |(write, region, offset, width, value, pause)| Abuse {
            write,
            region,
            offset,
            width,
            value,
            pause,
        },
    );
    prop::collection::vec(access, 0..100)
}
