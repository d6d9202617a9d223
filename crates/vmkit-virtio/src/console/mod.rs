//! The console device (virtio 1.2 §5.3): a console, and named ports beside it.
//!
//! What goes over the queues is in [`worker`].

mod port;
#[cfg(test)]
mod tests;
mod worker;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmkit_device::{DeviceError, Saved, Section, SectionFormat};

use self::port::{Port, owed};
use self::worker::{ControlWorker, PortWorker};
use crate::transport::mmio::mmio_by_default;
use crate::{Activation, ConfigChange, DeviceKind, LaneSpec, VirtioDevice, Wake};

pub use self::port::PortInput;

const QUEUE_SIZE: u16 = 64;
/// Most ports, the console included: two queues each, and two for control, out of 64.
const MOST_PORTS: usize = 31;

const FORMAT: SectionFormat = SectionFormat { kind: "virtio-console", version: 1 };

/// Feature bits (§5.3.3).
mod feature {
    pub const SIZE: u64 = 1 << 0;
    pub const MULTIPORT: u64 = 1 << 1;
}

/// Queues of the control channel, between those of port 0 and port 1 (§5.3.2).
const CONTROL_TO_DRIVER: u16 = 2;
const CONTROL_TO_DEVICE: u16 = 3;

/// The queue to the driver of port `index`; the one to the device follows.
fn first_queue(index: usize) -> u16 {
    if index == 0 { 0 } else { (2 * index + 2) as u16 }
}

/// A console, and named ports beside it.
///
/// ```
/// use vmkit_virtio::{Console, Mmio};
///
/// let mut console = Console::new(std::io::stdout())?.size(80, 25);
/// let keyboard = console.input();
/// let agent = console.port("org.example.agent", std::io::sink())?;
/// keyboard.send(b"ls\n");
/// let device = Mmio::new(console);
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
pub struct Console {
    name: String,
    ports: Vec<Arc<Port>>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ports: Vec<_> = self.ports.iter().map(|port| &port.name).collect();
        f.debug_struct("Console")
            .field("name", &self.name)
            .field("ports", &ports)
            .finish_non_exhaustive()
    }
}

mmio_by_default!(Console);

/// What workers, configuration space and handles share.
struct Shared {
    size: Mutex<Option<(u16, u16)>>,
    change: Mutex<Option<ConfigChange>>,
    /// The driver knows of the control channel.
    ready: AtomicBool,
    /// Wakes the control channel.
    control: Wake,
}

/// Saved state, format version 1.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ConsoleState {
    size: Option<(u16, u16)>,
    ready: bool,
    ports: Vec<port::PortState>,
}

impl Shared {
    fn size_now(&self) -> Option<(u16, u16)> {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn host(source: std::io::Error) -> DeviceError {
    DeviceError::Host { device: "console0".into(), what: "make an eventfd".into(), source }
}

impl Console {
    /// A console whose output goes to `output`, on the device's own thread: a slow output slows
    /// the guest down.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if the host has no eventfd left.
    pub fn new(output: impl Write + Send + 'static) -> Result<Self, DeviceError> {
        let shared = Shared {
            size: Mutex::default(),
            change: Mutex::default(),
            ready: AtomicBool::new(false),
            control: Wake::new().map_err(host)?,
        };
        let console = Port::new(String::new(), true, Box::new(output)).map_err(host)?;
        let ports = vec![Arc::new(console)];
        Ok(Self { name: "console0".into(), ports, shared: Arc::new(shared) })
    }

    /// Gives the device another name than `console0`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The console's size in characters, unknown if not said.
    #[must_use]
    pub fn size(self, columns: u16, rows: u16) -> Self {
        self.set_size(Some((columns, rows)));
        self
    }

    fn set_size(&self, size: Option<(u16, u16)>) {
        *self.shared.size.lock().unwrap_or_else(PoisonError::into_inner) = size;
    }

    /// The way to type on the console.
    pub fn input(&self) -> PortInput {
        PortInput::new(self.ports.first().cloned())
    }

    /// A handle that changes the console's size while the machine runs.
    pub fn resizer(&self) -> ConsoleSize {
        ConsoleSize { shared: self.shared.clone(), console: self.ports.first().cloned() }
    }

    /// Adds a port that the guest finds by `name` (in Linux `/dev/virtio-ports/NAME`).
    ///
    /// # Errors
    /// [`DeviceError::Config`] if there are too many or the name is empty or longer than 255 bytes.
    pub fn port(
        &mut self,
        name: &str,
        output: impl Write + Send + 'static,
    ) -> Result<PortInput, DeviceError> {
        if self.ports.len() == MOST_PORTS || name.is_empty() || name.len() > 255 {
            let reason = format!("port {name:?}: want up to 30, with names of 1 to 255 bytes");
            return Err(DeviceError::Config { device: self.name.clone(), reason });
        }
        let port = Arc::new(Port::new(name.into(), false, Box::new(output)).map_err(host)?);
        self.ports.push(port.clone());
        Ok(PortInput::new(Some(port)))
    }
}

/// Changes a console's size. Clones change the same.
#[derive(Clone)]
pub struct ConsoleSize {
    shared: Arc<Shared>,
    console: Option<Arc<Port>>,
}

impl std::fmt::Debug for ConsoleSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsoleSize").finish_non_exhaustive()
    }
}

impl ConsoleSize {
    /// The console is now this large. Heeded only if the console had a size when it was built.
    pub fn set(&self, columns: u16, rows: u16) {
        let shared = &self.shared;
        let mut size = shared.size.lock().unwrap_or_else(PoisonError::into_inner);
        if size.replace((columns, rows)).is_none() {
            *size = None;
            return;
        }
        drop(size);
        if shared.ready.load(Ordering::Acquire)
            && let Some(console) = &self.console
        {
            console.owed.fetch_or(owed::SIZE, Ordering::AcqRel);
            shared.control.wake();
        }
        if let Some(change) = &*shared.change.lock().unwrap_or_else(PoisonError::into_inner) {
            change.announce();
        }
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        let size = self.shared.size_now().map_or(0, |_| feature::SIZE);
        size | if self.ports.len() > 1 { feature::MULTIPORT } else { 0 }
    }

    fn queues(&self) -> Vec<u16> {
        let pairs = if self.ports.len() > 1 { self.ports.len() + 1 } else { 1 };
        vec![QUEUE_SIZE; 2 * pairs]
    }

    /// Columns, rows, number of ports (§5.3.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.shared.size_now().unwrap_or_default();
        let mut config = [0; 12];
        let fields = [columns.to_le_bytes(), rows.to_le_bytes(), [self.ports.len() as u8, 0]];
        config.iter_mut().zip(fields.iter().flatten()).for_each(|(to, from)| *to = *from);
        crate::device::read_config_bytes(&config, offset, data);
    }

    fn write_config(&self, _: u64, _: &[u8]) {}

    fn activate(&self, activation: Activation) -> Result<Vec<LaneSpec>, DeviceError> {
        let multiport = activation.has(feature::MULTIPORT);
        *self.shared.change.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(activation.config.clone());
        let mut lanes = Vec::new();
        let ports = if multiport { self.ports.len() } else { 1 };
        for (index, port) in self.ports.iter().enumerate().take(ports) {
            let first = first_queue(index);
            let worker = Box::new(PortWorker::new(port.clone(), first));
            lanes.push(LaneSpec { queues: vec![first, first + 1], worker });
        }
        if multiport {
            let queues = vec![CONTROL_TO_DRIVER, CONTROL_TO_DEVICE];
            let worker = Box::new(ControlWorker::new(self.ports.clone(), self.shared.clone()));
            lanes.push(LaneSpec { queues, worker });
        }
        Ok(lanes)
    }

    fn reset(&self) {
        *self.shared.change.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.ready.store(false, Ordering::Release);
        self.ports.iter().for_each(|port| port.reset());
    }

    fn save(&self) -> Saved {
        FORMAT.save(&ConsoleState {
            size: self.shared.size_now(),
            ready: self.shared.ready.load(Ordering::Acquire),
            ports: self.ports.iter().map(|port| port.save()).collect(),
        })
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state: ConsoleState = FORMAT.load(&self.name, sections)?;
        let same = state.ports.len() == self.ports.len()
            && state.size.is_some() == self.shared.size_now().is_some()
            && self.ports.iter().zip(&state.ports).all(|(port, saved)| port.fits(saved));
        if !same {
            return Err(FORMAT.malformed(&self.name, "it was saved with other ports"));
        }
        self.set_size(state.size);
        self.shared.ready.store(state.ready, Ordering::Release);
        self.ports.iter().zip(state.ports).for_each(|(port, saved)| port.load(saved));
        Ok(())
    }
}
