use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmkit_device::memory::{Backing, RamLayout, allocate};
use vmkit_device::{
    Bus, BusRange, BusView, Device, DeviceBuilder, DeviceError, EndSignal, EventFd, GuestEnd,
    InterruptSink, IoFlow, IoSpace, ManualClock, Msi, ResourceAllocator, Resources, Saved, Section,
};

use crate::*;

#[derive(Default)]
struct Sink {
    levels: Mutex<Vec<(u32, bool)>>,
    messages: Mutex<Vec<Msi>>,
}

impl InterruptSink for Sink {
    fn set_level(&self, gsi: u32, high: bool) {
        self.levels.lock().unwrap().push((gsi, high));
    }
    fn signal_msi(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
    fn attach_irqfd(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Sink {
    fn level(&self, gsi: u32) -> bool {
        self.levels.lock().unwrap().iter().rev().find(|l| l.0 == gsi).is_some_and(|l| l.1)
    }
    fn data(&self) -> Vec<u32> {
        self.messages.lock().unwrap().iter().map(|m| m.data).collect()
    }
}

/// A function with a register file in BAR 0 and vectors in BAR 2.
struct Toy {
    name: &'static str,
    bytes: Mutex<Vec<u8>>,
    moves: Mutex<Vec<(usize, Option<u64>)>>,
    resources: Mutex<Option<FunctionResources>>,
}

struct Plug(Arc<Toy>);

impl PciFunctionBuilder for Plug {
    fn name(&self) -> String {
        self.0.name.into()
    }
    fn describe(&self) -> Description {
        Description {
            identity: Identity {
                vendor: 0x1AF4,
                device: 0x1042,
                class: 0x01_8000,
                revision: 1,
                ..Identity::default()
            },
            bars: [Some(0x4000), None, Some(0x1000), None, None, None],
            capabilities: vec![
                Capability::fixed(9, vec![16, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                Capability {
                    id: 9,
                    bytes: vec![0; 18],
                    writable: [&[0, 0, 0xFF, 0, 0, 0][..], &[0xFF; 12]].concat(),
                    window: true,
                },
            ],
            msix: Some(MsixPlace { vectors: 3, bar: 2, table: 0, pending: 0x800 }),
            pin: true,
        }
    }
    fn build(self: Box<Self>, r: FunctionResources) -> Result<Arc<dyn PciFunction>, DeviceError> {
        *self.0.resources.lock().unwrap() = Some(r);
        Ok(self.0)
    }
}

impl PciFunction for Toy {
    fn name(&self) -> &str {
        self.name
    }
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(bar as u8);
        if bar == 0 {
            let at = offset as usize;
            data.copy_from_slice(&self.bytes.lock().unwrap()[at..at + data.len()]);
        }
    }
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar == 0 {
            let at = offset as usize;
            self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        }
    }
    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        self.moves.lock().unwrap().push((bar, address));
    }
    fn start(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn pause(&self) {}
    fn reset(&self) {
        self.bytes.lock().unwrap().fill(0);
    }
    fn save(&self) -> Saved {
        let first = self.bytes.lock().unwrap()[0];
        Saved::Sections(vec![Section::encode("toy", "toy", 1, &first).unwrap()])
    }
    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let error = |source| DeviceError::State { device: self.name.into(), source };
        let [section] = sections else {
            let found = format!("{} sections", sections.len());
            let source =
                vmkit_device::SnapshotError::Kind { name: "toy".into(), found, want: "toy".into() };
            return Err(error(source));
        };
        self.bytes.lock().unwrap()[0] = section.decode("toy", 1).map_err(error)?;
        Ok(())
    }
}

struct Machine {
    toys: Vec<Arc<Toy>>,
    sink: Arc<Sink>,
    end: EndSignal,
    device: Arc<dyn Device>,
    view: BusView,
    gsis: Vec<u32>,
}

fn machine(names: &[&'static str]) -> Machine {
    let toys: Vec<_> = names
        .iter()
        .map(|&name| {
            Arc::new(Toy {
                name,
                bytes: Mutex::new(vec![0; 0x4000]),
                moves: Mutex::default(),
                resources: Mutex::default(),
            })
        })
        .collect();
    let host = toys.iter().fold(PciHost::new(), |host, toy| host.function(Plug(toy.clone())));
    let (sink, end) = (Arc::new(Sink::default()), EndSignal::default());
    let memory = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
    let clock = Arc::new(ManualClock::default());
    let mut resources = Resources::new(memory, clock, end.clone(), sink.clone());
    let needs = host.needs();
    ResourceAllocator::new(sink.clone()).assign("pci-host", &needs, &mut resources).unwrap();
    let (starts, gsis) = (resources.io.clone(), resources.irqs.iter().map(|w| w.gsi()).collect());
    let device = Box::new(host).build(resources).unwrap();
    let bus = Arc::new(Bus::new());
    for (region, (need, start)) in needs.io.iter().zip(starts).enumerate() {
        let range = BusRange { space: need.space, start, len: need.len };
        bus.insert(range, device.clone(), region).unwrap();
    }
    device.start().unwrap();
    Machine { toys, sink, end, device, view: bus.view(), gsis }
}

impl Machine {
    fn select(&mut self, device: u32, register: u32) {
        let address = 1 << 31 | device << 11 | register & 0xFC;
        let _ = self.view.write(IoSpace::Pio, 0xCF8, &address.to_le_bytes());
    }

    fn config(&mut self, device: u32, register: u32) -> u32 {
        self.select(device, register);
        let mut data = [0; 4];
        self.view.read(IoSpace::Pio, 0xCFC, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&mut self, device: u32, register: u32, value: u32) {
        self.select(device, register);
        let _ = self.view.write(IoSpace::Pio, 0xCFC, &value.to_le_bytes());
    }

    fn read(&mut self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.view.read(IoSpace::Mmio, at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, at: u64, value: u32) {
        let _ = self.view.write(IoSpace::Mmio, at, &value.to_le_bytes());
    }

    fn capability(&mut self, device: u32, id: u32, nth: usize) -> u32 {
        let mut at = self.config(device, 0x34) & 0xFF;
        let mut found = Vec::new();
        while at != 0 {
            let head = self.config(device, at);
            if head & 0xFF == id {
                found.push(at);
            }
            at = head >> 8 & 0xFF;
        }
        found[nth]
    }

    fn sections(&self) -> Vec<Section> {
        match self.device.save() {
            Saved::Sections(sections) => sections,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_bus_is_found_by_ports_and_by_ecam() {
    let mut m = machine(&["one", "two"]);
    assert_eq!(m.config(0, 8) >> 16, 0x0600);
    assert_eq!((m.config(1, 0), m.config(2, 0)), (0x1042_1AF4, 0x1042_1AF4));
    assert_eq!(m.config(1, 8), 0x0180_0001);
    assert_eq!((m.config(3, 0), m.config(31, 0)), (u32::MAX, u32::MAX));
    assert_eq!(m.read(0xC000_0000 + (1 << 15)), 0x1042_1AF4);
    assert_eq!(m.read(0xC000_0000 + (1 << 15) + (1 << 12)), u32::MAX, "function 1");
    assert_eq!(m.read(0xC000_0000 + (1 << 15) + 0x100), u32::MAX, "extended space");
    let mut half = [0; 2];
    m.select(1, 0);
    m.view.read(IoSpace::Pio, 0xCFE, &mut half);
    assert_eq!(half, [0x42, 0x10]);
    // Disabled, the data port answers nothing.
    let _ = m.view.write(IoSpace::Pio, 0xCF8, &0x800_u32.to_le_bytes());
    let mut data = [0; 4];
    m.view.read(IoSpace::Pio, 0xCFC, &mut data);
    assert_eq!(data, [0xFF; 4]);
}

#[test]
fn the_reset_register_lives_inside_of_the_address_port() {
    let mut m = machine(&[]);
    assert_eq!(m.view.write(IoSpace::Pio, 0xCF9, &[0x02]), IoFlow::Continue);
    assert_eq!(m.end.raised(), None);
    assert_eq!(m.view.write(IoSpace::Pio, 0xCF9, &[0x06]), IoFlow::Stop);
    assert_eq!(m.end.raised(), Some(GuestEnd::Reset));
}

#[test]
fn the_bridges_own_space_is_read_only() {
    let mut m = machine(&["a"]);
    let before: Vec<_> = (0..64).map(|n| m.config(0, 4 * n)).collect();
    (0..64).for_each(|n| m.set_config(0, 4 * n, u32::MAX));
    let after: Vec<_> = (0..64).map(|n| m.config(0, 4 * n)).collect();
    assert_eq!(after, before);
}

#[test]
fn the_interrupt_line_is_unknown_until_software_writes_it() {
    let mut m = machine(&["a"]);
    assert_eq!(m.config(1, 0x3C) & 0xFFFF, 0x1FF);
    m.set_config(1, 0x3C, 11);
    assert_eq!(m.config(1, 0x3C) & 0xFFFF, 0x10B);
    m.device.reset();
    assert_eq!(m.config(1, 0x3C) & 0xFFFF, 0x1FF);
    assert_eq!(m.config(0, 0x3C), 0, "the bridge has no pin");
}

#[test]
fn bars_are_sized_placed_and_moved() {
    let mut m = machine(&["one"]);
    let (bar0, bar2) = (m.config(1, 0x10), m.config(1, 0x18));
    assert!(bar0 >= 0xC100_0000 && bar0.is_multiple_of(0x4000) && bar2.is_multiple_of(0x1000));
    assert_eq!(m.config(1, 0x14), 0);
    assert_eq!(m.read(bar0.into()), u32::MAX, "not yet enabled");
    m.set_config(1, 0x04, 2);
    m.write(u64::from(bar0) + 8, 0x1234_5678);
    assert_eq!(m.read(u64::from(bar0) + 8), 0x1234_5678);
    m.set_config(1, 0x10, u32::MAX);
    assert_eq!(m.config(1, 0x10), 0xFFFF_C000);
    let moved = 0xC800_0000;
    m.set_config(1, 0x10, moved);
    assert_eq!(m.read(u64::from(moved) + 8), 0x1234_5678);
    assert_eq!(m.read(u64::from(bar0) + 8), u32::MAX);
    let moves = m.toys[0].moves.lock().unwrap().clone();
    assert_eq!(
        moves,
        [(0, Some(bar0.into())), (2, Some(bar2.into())), (0, None), (0, Some(moved.into()))]
    );
    // Outside of the window, where RAM and others are, nothing is decoded.
    for outside in [0x10_0000, 0xC0F0_0000, 0xD000_0000, 0xFEC0_0000] {
        m.set_config(1, 0x18, outside);
        let unclaimed = m.view.unclaimed();
        assert_eq!((m.read(outside.into()), m.view.unclaimed()), (u32::MAX, unclaimed + 1));
    }
    assert_eq!(m.toys[0].moves.lock().unwrap().last(), Some(&(2, None)));
    // An access across the end is nobody's.
    let mut data = [0; 8];
    m.view.read(IoSpace::Mmio, u64::from(moved) + 0x3FFC, &mut data);
    assert_eq!(data, [0xFF; 8]);
}

#[test]
fn overlapping_bars_are_answered_by_the_first_only() {
    let mut m = machine(&["one", "two"]);
    m.set_config(1, 0x04, 2);
    m.set_config(2, 0x04, 2);
    let (one, two) = (m.config(1, 0x10), m.config(2, 0x10));
    m.write(one.into(), 1);
    m.write(two.into(), 2);
    m.set_config(2, 0x10, one);
    assert_eq!((m.read(one.into()), m.read(two.into())), (1, u32::MAX));
    m.set_config(1, 0x04, 0);
    assert_eq!(m.read(one.into()), 2);
}

#[test]
fn vectors_send_wait_while_masked_and_out_of_range_ones_do_nothing() {
    let mut m = machine(&["one"]);
    m.set_config(1, 0x04, 2);
    let table = u64::from(m.config(1, 0x18));
    let control = m.capability(1, 0x11, 0);
    assert_eq!(m.config(1, control) >> 16, 2);
    let msix = m.toys[0].resources.lock().unwrap().as_ref().unwrap().msix.clone().unwrap();
    msix.fire(0);
    assert_eq!(m.read(table + 0x800), 0, "nothing is pending while disabled");
    for vector in 0..3_u32 {
        m.write(table + u64::from(vector) * 16, 0xFEE0_0000);
        m.write(table + u64::from(vector) * 16 + 8, 0x40 + vector);
    }
    m.set_config(1, control, 0x8000 << 16);
    assert!(msix.enabled());
    msix.fire(1);
    assert_eq!((m.sink.data(), m.read(table + 0x800)), (vec![], 2), "masked at first");
    m.write(table + 16 + 12, 0);
    assert_eq!((m.sink.data(), m.read(table + 0x800)), (vec![0x41], 0));
    m.write(table + 12, 0);
    m.set_config(1, control, 0xC000 << 16);
    msix.fire(0);
    msix.fire(1);
    msix.fire(1);
    assert_eq!((m.sink.data().len(), m.read(table + 0x800)), (1, 3));
    m.set_config(1, control, 0x8000 << 16);
    assert_eq!(m.sink.data(), [0x41, 0x40, 0x41]);
    for vector in [3, 4, 2047, u16::MAX] {
        msix.fire(vector);
    }
    // Beyond the table, and in pieces that no entry has.
    m.write(table + 3 * 16, 7);
    m.write(table + 0x7FC, 7);
    let _ = m.view.write(IoSpace::Mmio, table, &[0xFF]);
    let _ = m.view.write(IoSpace::Mmio, table + 2, &[0xFF; 4]);
    m.write(table + 0x800, u32::MAX);
    assert_eq!((m.read(table), m.read(table + 0x800)), (0xFEE0_0000, 0));
    assert_eq!(m.sink.data().len(), 3);
}

#[test]
fn the_pin_is_level_triggered_and_can_be_disabled() {
    let mut m = machine(&["one", "two"]);
    let pin = |n: usize| m.toys[n].resources.lock().unwrap().as_ref().unwrap().intx.clone();
    let (one, two) = (pin(0), pin(1));
    one.set(true);
    assert!(m.sink.level(m.gsis[1]) && !m.sink.level(m.gsis[2]));
    two.set(true);
    assert!(m.sink.level(m.gsis[2]));
    assert_eq!(m.config(1, 4) >> 16 & 8, 8);
    m.set_config(1, 4, 1 << 10);
    assert!(!m.sink.level(m.gsis[1]));
    assert_eq!(m.config(1, 4) >> 16 & 8, 8, "the status shows it nevertheless");
    m.set_config(1, 4, 0);
    assert!(m.sink.level(m.gsis[1]));
    one.set(false);
    assert!(!m.sink.level(m.gsis[1]));
}

#[test]
fn the_window_reaches_bars_and_nothing_else() {
    let mut m = machine(&["one"]);
    let window = m.capability(1, 9, 1);
    let mut reach = |bar: u32, offset: u32, len: u32| {
        m.set_config(1, window + 4, bar);
        m.set_config(1, window + 8, offset);
        m.set_config(1, window + 12, len);
        m.set_config(1, window + 16, 0xA5A5_A5A5);
        m.config(1, window + 16)
    };
    assert_eq!(reach(0, 0x10, 4), 0xA5A5_A5A5);
    assert_eq!(reach(0, 0x3FFC, 4), 0xA5A5_A5A5);
    for (bar, offset, len) in [
        (0, 0x4000, 4),
        (0, u32::MAX, 1),
        (1, 0, 4),
        (6, 0, 4),
        (255, 0, 4),
        (0, 2, 4),
        (0, 0, 3),
        (0, 0, u32::MAX),
    ] {
        reach(bar, offset, len);
    }
    let bytes = m.toys[0].bytes.lock().unwrap();
    assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 8);
}

#[test]
fn state_comes_back_and_wrong_state_changes_nothing() {
    let mut m = machine(&["one", "two"]);
    m.set_config(1, 0x04, 6);
    m.set_config(1, 0x10, 0xC800_0000);
    m.write(0xC800_0000, 77);
    let table = u64::from(m.config(1, 0x18));
    m.write(table + 8, 0x55);
    m.select(2, 4);
    let saved = m.sections();
    assert_eq!(saved.len(), 3);
    assert!(saved.iter().any(|s| s.name == "one/toy"));
    let mut other = machine(&["one", "two"]);
    let fresh = other.sections();
    let mut damaged = vec![Vec::new(), saved[..2].to_vec(), [&saved[..], &saved[..1]].concat()];
    for index in 0..saved.len() {
        for cut in 0..saved[index].bytes.len() {
            let mut sections = saved.clone();
            sections[index].bytes.truncate(cut);
            damaged.push(sections);
        }
        let mut sections = saved.clone();
        sections[index].name = "three/toy".into();
        damaged.push(sections);
    }
    for sections in damaged {
        assert!(other.device.load(&sections).is_err());
        assert_eq!(other.sections(), fresh);
    }
    other.device.load(&saved).unwrap();
    assert_eq!(other.sections(), saved);
    assert_eq!((other.read(0xC800_0000) as u8, other.read(table + 8)), (77, 0x55));
    assert!(machine(&["one"]).device.load(&saved).is_err());
    other.device.reset();
    assert_eq!(other.sections(), fresh);
}

#[test]
fn names_twice_are_refused() {
    let toys = ["one", "one"].map(|name| {
        Plug(Arc::new(Toy {
            name,
            bytes: Mutex::default(),
            moves: Mutex::default(),
            resources: Mutex::default(),
        }))
    });
    let host = toys.into_iter().fold(PciHost::new(), PciHost::function);
    let sink = Arc::new(Sink::default());
    let memory = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
    let mut resources = Resources::new(
        memory,
        Arc::new(ManualClock::default()),
        EndSignal::default(),
        sink.clone(),
    );
    ResourceAllocator::new(sink).assign("pci-host", &host.needs(), &mut resources).unwrap();
    assert!(matches!(Box::new(host).build(resources), Err(DeviceError::Config { .. })));
}

proptest! {
    /// Whatever a guest writes where, nothing panics, and the identity stays.
    #[test]
    fn any_accesses_are_survived(
        accesses in prop::collection::vec(
            (any::<bool>(), 0_usize..3, any::<u64>(), 0_u32..4, any::<u64>()), 0..200)
    ) {
        let mut m = machine(&["one"]);
        let lens = [8_u64, 1 << 20, 0x0F00_0000];
        for (write, region, at, width, value) in accesses {
            let width = 1 << width;
            let near = [at % lens[region], 0x8000 + at % 0x110, at % 0x6000][region];
            let offset = near.min(lens[region] - width);
            if write {
                let _ = m.device.write(region, offset, &value.to_le_bytes()[..width as usize]);
            } else {
                m.device.read(region, offset, &mut [0; 8][..width as usize]);
            }
        }
        prop_assert_eq!(m.config(1, 0), 0x1042_1AF4);
        let saved = m.sections();
        machine(&["one"]).device.load(&saved).unwrap();
    }
}
