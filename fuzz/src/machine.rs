//! One device, what it needs, and a guest that accesses it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use vmkit_chipset::{
    AcpiPm, DebugExit, DebugPort, I8042, PostPort, PvPanic, Rtc, Serial, SerialOutput,
};
use vmkit_device::{
    Device, DeviceBuilder, EndSignal, EventFd, InterruptSink, ManualClock, Msi, ResourceAllocator,
    Resources, Saved, Section,
};
use vmkit_memory::{Backing, RamLayout};
use vmkit_pci::PciHost;
use vmkit_virtio::testing::fuzz::pmem;
use vmkit_virtio::{Balloon, Block, Console, Mmio, Net, Pci, Rng, Switch, Vsock, WorkModel};

/// Interrupts that go nowhere.
struct Nowhere;

impl InterruptSink for Nowhere {
    fn set_level(&self, _: u32, _: bool) {}
    fn signal_msi(&self, _: Msi) {}
    fn attach_irqfd(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// One access of a guest, and the nanoseconds that pass after it.
#[derive(Arbitrary, Debug)]
pub struct Access {
    write: bool,
    region: u8,
    offset: u64,
    width: u8,
    value: u64,
    pause: u64,
}

/// A device that runs, and what is around it.
pub struct Machine {
    device: Arc<dyn Device>,
    clock: Arc<ManualClock>,
    lengths: Vec<u64>,
}

impl Machine {
    /// Chipset devices that [`chipset`](Self::chipset) knows.
    const CHIPSET: u8 = 8;

    /// A chipset device of kind `kind % 8`.
    pub fn chipset(kind: u8) -> Self {
        match kind % Self::CHIPSET {
            0 => Self::new(serial()),
            1 => Self::new(Rtc::new()),
            2 => Self::new(I8042::new()),
            3 => Self::new(AcpiPm::new()),
            4 => Self::new(DebugExit::default()),
            5 => Self::new(PvPanic::new()),
            6 => Self::new(DebugPort::new().output(SerialOutput::sink())),
            _ => Self::new(PostPort::new()),
        }
    }

    /// Any device, by `kind`: the chipset's, virtio's on MMIO, and a PCI host with virtio behind it.
    pub fn any(kind: u8) -> Self {
        let mmio = Self::CHIPSET;
        match kind % (mmio + 8) {
            n if n < mmio => Self::chipset(n),
            n if n == mmio => Self::new(Mmio::new(disk()).work(WorkModel::Inline)),
            n if n == mmio + 1 => Self::new(Mmio::new(Rng::new()).work(WorkModel::Inline)),
            n if n == mmio + 2 => Self::new(Mmio::new(console()).work(WorkModel::Inline)),
            n if n == mmio + 3 => {
                let net = Net::switch(&Switch::new()).expect("a port of a switch");
                Self::new(Mmio::new(net).work(WorkModel::Inline))
            }
            n if n == mmio + 4 => {
                let vsock = Vsock::new(3).expect("a context ID that is free");
                Self::new(Mmio::new(vsock).work(WorkModel::Inline))
            }
            n if n == mmio + 5 => Self::new(Mmio::new(Balloon::new().hints()).work(WorkModel::Inline)),
            n if n == mmio + 6 => Self::new(Mmio::new(pmem()).work(WorkModel::Inline)),
            _ => Self::new(
                PciHost::new()
                    .function(Pci::new(disk()).work(WorkModel::Inline))
                    .function(Pci::new(Rng::new()).work(WorkModel::Inline)),
            ),
        }
    }

    fn new(builder: impl DeviceBuilder + 'static) -> Self {
        let interrupts = Arc::new(Nowhere);
        let clock = Arc::new(ManualClock::at_epoch(Duration::from_secs(1_709_251_198)));
        let layout = RamLayout::pc(1 << 20).expect("a layout of 1 MiB");
        let memory = vmkit_memory::allocate(&layout, Backing::Anonymous).expect("1 MiB");
        let end = EndSignal::default();
        let mut resources = Resources::new(memory, clock.clone(), end, interrupts.clone());
        let needs = builder.needs();
        ResourceAllocator::new(interrupts)
            .assign(&builder.name(), &needs, &mut resources)
            .expect("room for one device");
        let high = vmkit_memory::GuestAddress(1 << 32);
        resources.placed = builder.memory().iter().map(|_| high).collect();
        let lengths = needs.io.iter().map(|need| need.len).collect();
        let device = Box::new(builder).build(resources).expect("a device that needs nothing else");
        device.start().expect("a device that starts");
        Self { device, clock, lengths }
    }

    /// Does what the guest does; the bus lets only whole accesses within a region through.
    pub fn access(&self, access: &Access) {
        let width = 1_usize << (access.width & 3);
        let region = usize::from(access.region) % self.lengths.len();
        let Some(room) = self.lengths[region].checked_sub(width as u64) else { return };
        let offset = if room == u64::MAX { access.offset } else { access.offset % (room + 1) };
        if access.write {
            let _ = self.device.write(region, offset, &access.value.to_le_bytes()[..width]);
        } else {
            self.device.read(region, offset, &mut [0; 8][..width]);
        }
        self.clock.advance(Duration::from_nanos(access.pause));
    }

    /// Does `work` while the device is paused: it may change by itself at any other time.
    pub fn paused<T>(&self, work: impl FnOnce(&Paused<'_>) -> T) -> T {
        self.device.pause();
        let done = work(&Paused(&*self.device));
        self.device.start().expect("a device that starts again");
        done
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.device.reset();
    }
}

/// A device that holds still.
pub struct Paused<'a>(&'a dyn Device);

impl Paused<'_> {
    /// The device's saved state; none for one that has no state.
    pub fn save(&self) -> Vec<Section> {
        match self.0.save() {
            Saved::Sections(sections) => sections,
            Saved::Stateless | Saved::Cannot(_) => Vec::new(),
        }
    }

    /// Loads `sections`; whether the device took them.
    pub fn load(&self, sections: &[Section]) -> bool {
        self.0.load(sections).is_ok()
    }
}

fn serial() -> Serial {
    let serial = Serial::com1().output(SerialOutput::sink());
    serial.input().push(b"typed before the guest looks");
    serial
}

fn disk() -> Block {
    Block::memory(vec![0; 1 << 16]).expect("a disk of whole sectors")
}

fn console() -> Console {
    let mut console = Console::new(io::sink()).expect("an event descriptor").size(80, 25);
    console.port("port", io::sink()).expect("an event descriptor");
    console
}
