//! virtio over MMIO (virtio 1.2 §4.2): one page of registers and one interrupt.

use std::sync::{Arc, Mutex, PoisonError};

use vmkit_device::{
    Announcement, Device, DeviceBuilder, DeviceError, Doorbell, IoFlow, IoNeed, IrqLine, IrqNeed,
    Needs, Resources, Saved, Section,
};
use vmkit_memory::FileMemory;

use crate::transport::bells::Bells;
use crate::transport::common::{Core, set_high, set_low};
use crate::{FaultCounter, Interrupt, VirtioDevice, WorkModel};

/// Bytes of the register window.
const LEN: u64 = 0x1000;
/// Where the device's configuration space begins.
const CONFIG: u64 = 0x100;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// The version of virtio 1.0 and later.
const VERSION: u32 = 2;
/// "vmkt".
const VENDOR: u32 = 0x746B_6D76;

/// Registers (§4.2.2, table 4.1).
mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00C;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0A0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0A4;
    pub const SHM_LEN_LOW: u64 = 0x0B0;
    pub const SHM_LEN_HIGH: u64 = 0x0B4;
    pub const SHM_BASE_LOW: u64 = 0x0B8;
    pub const SHM_BASE_HIGH: u64 = 0x0BC;
    pub const CONFIG_GENERATION: u64 = 0x0FC;
}

/// `InterruptStatus`: a queue has used buffers.
const USED: u32 = 1;
/// `InterruptStatus`: the configuration changed.
const CHANGED: u32 = 2;

/// Makes a device what a machine's builder takes: the device on the MMIO transport, on a thread of
/// its own.
macro_rules! mmio_by_default {
    ($device:ty) => {
        impl vmkit_device::DeviceBuilder for $device {
            fn name(&self) -> String {
                $crate::VirtioDevice::name(self).into()
            }

            fn needs(&self) -> vmkit_device::Needs {
                $crate::transport::mmio::needs()
            }

            fn memory(&self) -> Vec<std::sync::Arc<vmkit_memory::FileMemory>> {
                $crate::VirtioDevice::memory(self)
            }

            fn build(
                self: Box<Self>,
                resources: vmkit_device::Resources,
            ) -> Result<std::sync::Arc<dyn vmkit_device::Device>, vmkit_device::DeviceError> {
                Box::new($crate::Mmio::new(*self)).build(resources)
            }
        }
    };
}
pub(crate) use mmio_by_default;

/// What the transport needs of a machine.
pub(crate) fn needs() -> Needs {
    Needs { io: vec![IoNeed::mmio(LEN)], irqs: vec![IrqNeed::Any] }
}

/// A virtio device on the MMIO transport.
pub struct Mmio {
    device: Arc<dyn VirtioDevice>,
    work: WorkModel,
    faults: FaultCounter,
}

impl std::fmt::Debug for Mmio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mmio")
            .field("device", &self.device.name())
            .field("work", &self.work)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

impl Mmio {
    /// `device`, on a thread of its own.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        Self {
            device: Arc::new(device),
            work: WorkModel::default(),
            faults: FaultCounter::default(),
        }
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

impl DeviceBuilder for Mmio {
    fn name(&self) -> String {
        self.device.name().into()
    }

    fn needs(&self) -> Needs {
        needs()
    }

    fn memory(&self) -> Vec<Arc<FileMemory>> {
        self.device.memory()
    }

    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        let missing = || DeviceError::Config {
            device: self.device.name().into(),
            reason: "its registers or its interrupt are missing from its resources".into(),
        };
        self.device.placed(&resources.placed);
        let line = resources.line(0).ok_or_else(missing)?;
        let base = resources.io.first().copied().ok_or_else(missing)?;
        let announcement = Announcement::VirtioMmio { base, len: LEN, gsi: line.gsi() };
        let interrupt = Arc::new(LineInterrupt { line, pending: Mutex::new(0) });
        let (memory, clock) = (resources.memory, resources.clock);
        let core =
            Core::new(self.device, memory, clock, self.work, interrupt.clone(), self.faults)?;
        let bells = resources.doorbells.filter(|_| core.uses_doorbells());
        let address = base + register::QUEUE_NOTIFY;
        let bells = bells.map(|bells| {
            Bells::add(bells, &core, |queue| Doorbell::Mmio {
                address,
                width: 4,
                value: Some(queue.into()),
            })
        });
        Ok(Arc::new(MmioDevice { core, interrupt, announcement, _bells: bells }))
    }
}

/// The interrupt line, high while the driver has not acknowledged all of its causes.
struct LineInterrupt {
    line: IrqLine,
    pending: Mutex<u32>,
}

impl LineInterrupt {
    fn change(&self, change: impl FnOnce(u32) -> u32) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        *pending = change(*pending);
        self.line.set(*pending != 0);
    }

    fn pending(&self) -> u32 {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes on saved causes; the interrupt controller's own state knows the level already.
    fn restore(&self, causes: u32) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        *pending = causes;
        self.line.restore(causes != 0);
    }
}

impl Interrupt for LineInterrupt {
    fn queue(&self, _: u16) {
        self.change(|pending| pending | USED);
    }

    fn config(&self) {
        self.change(|pending| pending | CHANGED);
    }

    fn reset(&self) {
        self.change(|_| 0);
    }
}

struct MmioDevice {
    core: Core,
    interrupt: Arc<LineInterrupt>,
    announcement: Announcement,
    _bells: Option<Bells>,
}

impl MmioDevice {
    fn read_register(&self, offset: u64) -> u32 {
        let core = &self.core;
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => core.device().kind().id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => core.device_features(),
            register::QUEUE_NUM_MAX => core.queue_limit().into(),
            register::QUEUE_READY => core.queue().ready.into(),
            register::INTERRUPT_STATUS => self.interrupt.pending(),
            register::STATUS => core.status().into(),
            register::CONFIG_GENERATION => core.generation(),
            // A shared memory region that does not exist has this length and place (§4.2.2).
            register::SHM_LEN_LOW
            | register::SHM_LEN_HIGH
            | register::SHM_BASE_LOW
            | register::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let core = &self.core;
        match offset {
            register::DEVICE_FEATURES_SEL => core.select_device_features(value),
            register::DRIVER_FEATURES => core.set_driver_features(value),
            register::DRIVER_FEATURES_SEL => core.select_driver_features(value),
            register::QUEUE_SEL => core.select_queue(value),
            // What does not fit is no size, and found out when the queue is activated.
            register::QUEUE_NUM => core.set_queue(|q| q.size = u16::try_from(value).unwrap_or(0)),
            register::QUEUE_READY if value & 1 == 0 => core.stop_queue(),
            register::QUEUE_READY => core.set_queue(|q| q.ready = true),
            register::QUEUE_NOTIFY => core.notify(value),
            register::INTERRUPT_ACK => self.interrupt.change(|pending| pending & !value),
            register::STATUS => core.set_status(value as u8),
            register::QUEUE_DESC_LOW => core.set_queue(|q| set_low(&mut q.desc, value)),
            register::QUEUE_DESC_HIGH => core.set_queue(|q| set_high(&mut q.desc, value)),
            register::QUEUE_DRIVER_LOW => core.set_queue(|q| set_low(&mut q.avail, value)),
            register::QUEUE_DRIVER_HIGH => core.set_queue(|q| set_high(&mut q.avail, value)),
            register::QUEUE_DEVICE_LOW => core.set_queue(|q| set_low(&mut q.used, value)),
            register::QUEUE_DEVICE_HIGH => core.set_queue(|q| set_high(&mut q.used, value)),
            _ => {}
        }
    }
}

impl Device for MmioDevice {
    fn name(&self) -> &str {
        self.core.name()
    }

    fn announce(&self) -> Vec<Announcement> {
        vec![self.announcement.clone()]
    }

    /// Registers want 4-byte accesses (§4.2.2.2); others read as zeros.
    fn read(&self, _: usize, offset: u64, data: &mut [u8]) {
        self.core.visit();
        if let Some(offset) = offset.checked_sub(CONFIG) {
            data.fill(0);
            self.core.device().read_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    fn write(&self, _: usize, offset: u64, data: &[u8]) -> IoFlow {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.device().write_config(offset, data);
        } else if let (Ok(value), true) = (data.try_into(), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
        self.core.visit();
        IoFlow::Continue
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
        self.core.save(vec![self.interrupt.pending() as u8])
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        self.core.load(sections, |transport| match transport {
            &[causes] if u32::from(causes) & !(USED | CHANGED) == 0 => {
                Ok(move || self.interrupt.restore(causes.into()))
            }
            _ => Err(format!("transport state {transport:x?} is not that of MMIO")),
        })
    }
}
