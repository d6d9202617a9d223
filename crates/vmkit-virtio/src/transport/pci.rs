//! virtio over PCI (virtio 1.2 §4.1): structures in a BAR, MSI-X or an interrupt pin.
//!
//! Modern only: there are no legacy registers, and the device ids say so.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmkit_device::{DeviceError, Doorbell, Doorbells, Saved, Section};
use vmkit_memory::FileMemory;
use vmkit_pci::{
    Capability, Description, FunctionResources, Identity, Intx, Msix, MsixPlace, PciFunction,
    PciFunctionBuilder,
};

use crate::transport::bells::Bells;
use crate::transport::common::{Core, set_high, set_low};
use crate::{DeviceKind, FaultCounter, Interrupt, VirtioDevice, WorkModel};

/// The BAR of the structures, and its bytes.
const BAR: usize = 0;
const BAR_LEN: u32 = 0x4000;
/// The BAR of the vectors, and its bytes.
const MSIX_BAR: u8 = 1;
const MSIX_LEN: u32 = 0x1000;
const MSIX_PENDING: u32 = 0x800;

/// Where the structures are in their BAR; each has a page.
const COMMON: u32 = 0x0000;
const COMMON_LEN: u32 = 56;
const ISR: u32 = 0x1000;
const CONFIG: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const PAGE: u32 = 0x1000;
/// Bytes between the queues' notify addresses.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Capability id: vendor-specific.
const VENDOR_SPECIFIC: u8 = 0x09;
/// `cfg_type` (§4.1.4).
mod structure {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const WINDOW: u8 = 5;
}

/// Fields of the common configuration (§4.1.4.3).
mod field {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const DEVICE_STATUS: u64 = 20;
    pub const CONFIG_GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

/// No vector, or one that does not exist (§4.1.5.1.2).
const NO_VECTOR: u16 = 0xFFFF;
/// ISR status (§4.1.4.5): a queue has used buffers, the configuration changed.
const USED: u8 = 1;
const CHANGED: u8 = 2;

/// A virtio device on the PCI transport: a function for a
/// [`PciHost`](vmkit_pci::PciHost).
///
/// ```
/// use vmkit_pci::PciHost;
/// use vmkit_virtio::{Block, Pci, Rng};
///
/// let disk = Block::memory(vec![0; 1 << 20])?;
/// let host = PciHost::new().function(Pci::new(disk)).function(Pci::new(Rng::new()));
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
pub struct Pci {
    device: Arc<dyn VirtioDevice>,
    work: WorkModel,
    faults: FaultCounter,
}

impl std::fmt::Debug for Pci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pci")
            .field("device", &self.device.name())
            .field("work", &self.work)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

impl Pci {
    /// `device`, on a thread of its own.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        let device = Arc::new(device);
        Self { device, work: WorkModel::default(), faults: FaultCounter::default() }
    }

    /// Chooses who does the device's work.
    #[must_use]
    pub fn work(mut self, model: WorkModel) -> Self {
        self.work = model;
        self
    }

    /// Counts what the guest's driver does wrong.
    pub fn faults(&self) -> FaultCounter {
        self.faults.clone()
    }
}

/// Class, sub-class and interface of a device.
fn class(kind: DeviceKind) -> u32 {
    match kind {
        DeviceKind::Net => 0x02_0000,
        DeviceKind::Block => 0x01_8000,
        DeviceKind::Console => 0x07_8000,
        DeviceKind::Balloon | DeviceKind::Pmem => 0x05_8000,
        DeviceKind::Vsock => 0x02_8000,
        DeviceKind::Rng => 0xFF_0000,
    }
}

/// A `virtio_pci_cap` (§4.1.4) after its first two bytes, with more behind it.
fn place(structure: u8, offset: u32, len: u32, more: &[u8]) -> Vec<u8> {
    let size = 16 + more.len() as u8;
    let mut bytes = vec![size, structure, BAR as u8, 0, 0, 0];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(more);
    bytes
}

impl PciFunctionBuilder for Pci {
    fn name(&self) -> String {
        self.device.name().into()
    }

    fn describe(&self) -> Description {
        let kind = self.device.kind();
        let fixed = |bytes| Capability::fixed(VENDOR_SPECIFIC, bytes);
        // The driver chooses bar, offset and length, and accesses the data (§4.1.4.9).
        let window = Capability {
            id: VENDOR_SPECIFIC,
            bytes: place(structure::WINDOW, 0, 0, &[0; 4]),
            writable: [&[0, 0, 0xFF, 0, 0, 0][..], &[0xFF; 12]].concat(),
            window: true,
        };
        let vectors = self.device.queues().len() as u16 + 1;
        Description {
            identity: Identity {
                vendor: 0x1AF4,
                device: 0x1040 + kind.id() as u16,
                revision: 1,
                class: class(kind),
                subsystem_vendor: 0x1AF4,
                // What QEMU's have: drivers for Windows look for all of it.
                subsystem: 0x1100,
            },
            bars: [Some(BAR_LEN), Some(MSIX_LEN), None, None, None, None],
            capabilities: vec![
                fixed(place(structure::COMMON, COMMON, COMMON_LEN, &[])),
                fixed(place(structure::ISR, ISR, 1, &[])),
                fixed(place(structure::DEVICE, CONFIG, PAGE, &[])),
                fixed(place(structure::NOTIFY, NOTIFY, PAGE, &NOTIFY_MULTIPLIER.to_le_bytes())),
                window,
            ],
            msix: Some(MsixPlace { vectors, bar: MSIX_BAR, table: 0, pending: MSIX_PENDING }),
            pin: true,
        }
    }

    fn memory(&self) -> Vec<Arc<FileMemory>> {
        self.device.memory()
    }

    fn build(
        self: Box<Self>,
        resources: FunctionResources,
    ) -> Result<Arc<dyn PciFunction>, DeviceError> {
        let FunctionResources { common, intx, msix } = resources;
        self.device.placed(&common.placed);
        let none = || AtomicU16::new(NO_VECTOR);
        let interrupt = Arc::new(PciInterrupt {
            msix,
            intx,
            isr: Mutex::new(0),
            config_vector: none(),
            queue_vectors: self.device.queues().iter().map(|_| none()).collect(),
        });
        let (memory, clock) = (common.memory, common.clock);
        let core =
            Core::new(self.device, memory, clock, self.work, interrupt.clone(), self.faults)?;
        let doorbells = common.doorbells.filter(|_| core.uses_doorbells());
        Ok(Arc::new(PciTransport { core, interrupt, doorbells, bells: Mutex::new(None) }))
    }
}

/// Vectors where the driver uses them, else the pin.
struct PciInterrupt {
    msix: Option<Arc<Msix>>,
    intx: Arc<Intx>,
    isr: Mutex<u8>,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
}

impl PciInterrupt {
    fn raise(&self, vector: Option<&AtomicU16>, cause: u8) {
        match &self.msix {
            Some(msix) if msix.enabled() => {
                // Firing a vector that is none does nothing.
                msix.fire(vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)));
            }
            _ => self.change(|isr| isr | cause),
        }
    }

    fn change(&self, change: impl FnOnce(u8) -> u8) {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        *isr = change(*isr);
        self.intx.set(*isr != 0);
    }

    /// Reading the ISR status acknowledges (§4.1.4.5.1).
    fn take(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        let causes = std::mem::take(&mut *isr);
        self.intx.set(false);
        causes
    }

    fn vectors(&self) -> impl Iterator<Item = &AtomicU16> {
        std::iter::once(&self.config_vector).chain(self.queue_vectors.iter())
    }

    fn exists(&self, vector: u16) -> bool {
        self.msix.as_ref().is_some_and(|msix| vector < msix.vectors())
    }

    /// Sets a vector; one that does not exist reads back as none (§4.1.5.1.2.1).
    fn choose(&self, place: Option<&AtomicU16>, vector: u16) {
        if let Some(place) = place {
            let vector = if self.exists(vector) { vector } else { NO_VECTOR };
            place.store(vector, Ordering::Release);
        }
    }

    fn queue_vector(&self, queue: u16) -> Option<&AtomicU16> {
        self.queue_vectors.get(usize::from(queue))
    }

    /// ISR status, then each vector.
    fn save(&self) -> Vec<u8> {
        let mut bytes = vec![*self.isr.lock().unwrap_or_else(PoisonError::into_inner)];
        let vectors = self.vectors().map(|vector| vector.load(Ordering::Acquire));
        bytes.extend(vectors.flat_map(u16::to_le_bytes));
        bytes
    }

    /// Checks what [`save`](Self::save) gave and answers with what takes it on. The pin's level is
    /// restored by the bus.
    fn load<'a>(&'a self, saved: &[u8]) -> Result<impl FnOnce() + use<'a>, String> {
        let wrong = || format!("transport state {saved:x?} is not that of this function");
        let (isr, vectors) = saved.split_first().ok_or_else(wrong)?;
        let (vectors, rest) = vectors.as_chunks::<2>();
        let vectors: Vec<u16> = vectors.iter().copied().map(u16::from_le_bytes).collect();
        let known = |&vector: &u16| vector == NO_VECTOR || self.exists(vector);
        let count = self.queue_vectors.len() + 1;
        let fits = isr & !(USED | CHANGED) == 0 && rest.is_empty() && vectors.len() == count;
        if !fits || !vectors.iter().all(known) {
            return Err(wrong());
        }
        let isr = *isr;
        Ok(move || {
            *self.isr.lock().unwrap_or_else(PoisonError::into_inner) = isr;
            for (place, vector) in self.vectors().zip(vectors) {
                place.store(vector, Ordering::Release);
            }
        })
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, queue: u16) {
        self.raise(self.queue_vector(queue), USED);
    }

    fn config(&self) {
        self.raise(Some(&self.config_vector), CHANGED);
    }

    fn reset(&self) {
        self.vectors().for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
        self.change(|_| 0);
    }
}

struct PciTransport {
    core: Core,
    interrupt: Arc<PciInterrupt>,
    doorbells: Option<Arc<dyn Doorbells>>,
    bells: Mutex<Option<Bells>>,
}

impl PciTransport {
    /// Reads a field of the common configuration, as wide as it is.
    fn read_common(&self, offset: u64) -> u32 {
        let (core, interrupt) = (&self.core, &self.interrupt);
        let vector = |place: Option<&AtomicU16>| {
            place.map_or(NO_VECTOR, |place| place.load(Ordering::Acquire)).into()
        };
        match offset {
            field::DEVICE_FEATURE_SELECT => core.device_features_select(),
            field::DEVICE_FEATURE => core.device_features(),
            field::DRIVER_FEATURE_SELECT => core.driver_features_select(),
            field::DRIVER_FEATURE => core.driver_features(),
            field::CONFIG_MSIX_VECTOR => vector(Some(&interrupt.config_vector)),
            field::NUM_QUEUES => core.queue_count().into(),
            field::DEVICE_STATUS => core.status().into(),
            field::CONFIG_GENERATION => core.generation(),
            field::QUEUE_SELECT => core.queue_select().into(),
            // Zero for a queue that does not exist.
            field::QUEUE_SIZE => core.queue().size.into(),
            field::QUEUE_MSIX_VECTOR => vector(interrupt.queue_vector(core.queue_select())),
            field::QUEUE_ENABLE => core.queue().ready.into(),
            field::QUEUE_NOTIFY_OFF => core.queue_select().into(),
            _ => {
                let queue = core.queue();
                let address = match offset & !7 {
                    field::QUEUE_DESC => queue.desc,
                    field::QUEUE_DRIVER => queue.avail,
                    field::QUEUE_DEVICE => queue.used,
                    _ => return 0,
                };
                if offset & 4 == 0 { address as u32 } else { (address >> 32) as u32 }
            }
        }
    }

    fn write_common(&self, offset: u64, value: u32) {
        let (core, interrupt) = (&self.core, &self.interrupt);
        let word = value as u16;
        let set = if offset & 4 == 0 { set_low } else { set_high };
        match offset {
            field::DEVICE_FEATURE_SELECT => core.select_device_features(value),
            field::DRIVER_FEATURE_SELECT => core.select_driver_features(value),
            field::DRIVER_FEATURE => core.set_driver_features(value),
            field::CONFIG_MSIX_VECTOR => interrupt.choose(Some(&interrupt.config_vector), word),
            field::DEVICE_STATUS => core.set_status(value as u8),
            field::QUEUE_SELECT => core.select_queue(value),
            field::QUEUE_SIZE => core.set_queue(|queue| queue.size = word),
            field::QUEUE_MSIX_VECTOR => {
                interrupt.choose(interrupt.queue_vector(core.queue_select()), word);
            }
            // A driver must not write zero (§4.1.4.3.2).
            field::QUEUE_ENABLE if word == 1 => core.set_queue(|queue| queue.ready = true),
            _ => match offset & !7 {
                field::QUEUE_DESC => core.set_queue(|queue| set(&mut queue.desc, value)),
                field::QUEUE_DRIVER => core.set_queue(|queue| set(&mut queue.avail, value)),
                field::QUEUE_DEVICE => core.set_queue(|queue| set(&mut queue.used, value)),
                _ => {}
            },
        }
    }
}

/// The width of the field at `offset` of the common configuration, of which addresses have two
/// halves (§4.1.3.1); none inside of a field.
fn width(offset: u64) -> Option<usize> {
    match offset {
        field::DEVICE_STATUS | field::CONFIG_GENERATION => Some(1),
        16 | 18 | 22..32 if offset.is_multiple_of(2) => Some(2),
        0..16 | 32..56 if offset.is_multiple_of(4) => Some(4),
        _ => None,
    }
}

/// An offset into the BAR as structure and offset in it.
fn split(offset: u64) -> (u32, u64) {
    let page = u64::from(PAGE);
    ((offset / page * page) as u32, offset % page)
}

impl PciFunction for PciTransport {
    fn name(&self) -> &str {
        self.core.name()
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        self.core.visit();
        data.fill(0);
        if bar != BAR {
            return;
        }
        match split(offset) {
            (COMMON, mut at) => {
                // A wide access is made of the fields it covers; a part of a field reads as zeros.
                let mut rest = data;
                while let Some(width) = width(at) {
                    let value = self.read_common(at).to_le_bytes();
                    let Some((now, later)) = rest.split_at_mut_checked(width) else { return };
                    now.copy_from_slice(value.get(..width).unwrap_or_default());
                    (rest, at) = (later, at + width as u64);
                }
            }
            (ISR, 0) => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupt.take();
                }
            }
            (CONFIG, at) => self.core.device().read_config(at, data),
            _ => {}
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        match split(offset) {
            (COMMON, mut at) => {
                let mut rest = data;
                while let Some(width) = width(at) {
                    let Some((now, later)) = rest.split_at_checked(width) else { break };
                    let mut value = [0; 4];
                    value.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
                    self.write_common(at, u32::from_le_bytes(value));
                    (rest, at) = (later, at + width as u64);
                }
            }
            (CONFIG, at) => self.core.device().write_config(at, data),
            (NOTIFY, at) => self.core.notify((at / u64::from(NOTIFY_MULTIPLIER)) as u32),
            _ => {}
        }
        self.core.visit();
    }

    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        let (BAR, Some(doorbells)) = (bar, &self.doorbells) else { return };
        let mut bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        // The old ones first: they could be in the way.
        *bells = None;
        *bells = address.map(|base| {
            Bells::add(doorbells.clone(), &self.core, |queue| Doorbell::Mmio {
                address: base + u64::from(NOTIFY + u32::from(queue) * NOTIFY_MULTIPLIER),
                width: 0,
                value: None,
            })
        });
    }

    fn start(&self) -> Result<(), DeviceError> {
        self.core.start()
    }

    fn pause(&self) {
        self.core.pause();
    }

    fn reset(&self) {
        self.core.reset();
    }

    fn save(&self) -> Saved {
        self.core.save(self.interrupt.save())
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        self.core.load(sections, |transport| self.interrupt.load(transport))
    }
}
