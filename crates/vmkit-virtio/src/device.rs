//! What a virtio device is, apart from how a guest reaches it.

use std::io;
use std::sync::Arc;

use vmkit_device::{Clock, DeviceError, Saved, Section};
use vmkit_memory::{FileMemory, GuestAddress, GuestRam};

use crate::{ConfigChange, Event, Fault, Poller, Progress, QueueSet, Queues};

/// Device types (virtio 1.2 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Persistent memory.
    Pmem = 27,
}

impl DeviceKind {
    /// Its number.
    pub fn id(self) -> u32 {
        self as u32
    }
}

/// Answers a read of a configuration space that is `config`; what is beyond reads as zeros.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = config.get(offset..).unwrap_or_default();
    for (n, to) in data.iter_mut().enumerate() {
        *to = rest.get(n).copied().unwrap_or(0);
    }
}

/// What a device is given when its driver is ready.
#[non_exhaustive]
pub struct Activation {
    /// The negotiated features.
    pub features: u64,
    /// Guest memory.
    pub memory: GuestRam,
    /// The way to announce a change of the configuration space.
    pub config: ConfigChange,
    /// Guest time.
    pub clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Activation").field("features", &self.features).finish_non_exhaustive()
    }
}

impl Activation {
    pub(crate) fn new(
        features: u64,
        memory: GuestRam,
        config: ConfigChange,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { features, memory, config, clock }
    }

    /// True if all of `features` were negotiated.
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }
}

/// Queues that one worker serves.
pub struct LaneSpec {
    /// Their numbers. Those the driver did not set up are left out.
    pub queues: Vec<u16>,
    /// Who serves them.
    pub worker: Box<dyn Worker>,
}

impl std::fmt::Debug for LaneSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaneSpec").field("queues", &self.queues).finish_non_exhaustive()
    }
}

/// A virtio device: its kind, features, configuration space, and workers.
///
/// ```text
///            ┌──────────── reset ────────────┐
///            ▼                               │
///  quiet ── activate ──► active: its workers process queues and events
///    │                       │  ▲
///    │                 pause │  │ start        save, load: only while quiet or paused
///    │                       ▼  │
///    └── load ───────────► paused ── reset ──► quiet
/// ```
///
/// The transport calls [`activate`](Self::activate) when the driver sets `DRIVER_OK`, drops the
/// workers and then calls [`reset`](Self::reset) when the driver or the machine resets the device,
/// at whatever moment; a worker is never dropped while it processes. All methods but the workers'
/// may be called from any vCPU thread, also while workers work, and must not wait for them.
pub trait VirtioDevice: Send + Sync {
    /// The device's name, unique within the machine.
    fn name(&self) -> &str;
    /// What it is.
    fn kind(&self) -> DeviceKind;
    /// The feature bits of its kind that it offers (bits 0 to 23 and 50 to 63). The transport adds
    /// its own.
    fn features(&self) -> u64;
    /// True if a driver may accept just these of the offered features: some need others.
    fn accepts(&self, _features: u64) -> bool {
        true
    }
    /// Most entries of each queue: powers of two, up to 32768; at most 64 queues.
    fn queues(&self) -> Vec<u16>;
    /// Files that the guest is to see as memory.
    fn memory(&self) -> Vec<Arc<FileMemory>> {
        Vec::new()
    }
    /// Where each of [`memory`](Self::memory) is. Called once, when the device is built into a machine,
    /// also if it brings no memory.
    fn placed(&self, _at: &[GuestAddress]) {}
    /// Reads from the configuration space. What is not there reads as zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes to the configuration space. What cannot be written is left alone.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// The driver is ready: workers for the queues, please.
    ///
    /// # Errors
    /// [`DeviceError`] if the host refuses something. The driver then sees a broken device.
    fn activate(&self, activation: Activation) -> Result<Vec<LaneSpec>, DeviceError>;
    /// Back to the state of power-on. Its workers are gone.
    fn reset(&self);
    /// Its state, apart from what the transport saves: status, features, queues. Called while no
    /// worker works.
    fn save(&self) -> Saved;
    /// Takes on saved state, before workers are made from it.
    ///
    /// # Errors
    /// [`DeviceError::State`] if the sections do not fit; the device is then as it was.
    fn load(&self, sections: &[Section]) -> Result<(), DeviceError>;
}

/// Works on some queues of an active device. It is called from one thread at a time.
pub trait Worker: Send {
    /// Registers the host descriptors it waits for, and keeps the poller if there will be more.
    ///
    /// # Errors
    /// What the host said.
    fn register(&mut self, _poller: &Poller) -> io::Result<()> {
        Ok(())
    }

    /// Works on the available buffers of queue `index`, at most about as many as the queue has
    /// entries. The lane interrupts the driver afterwards.
    ///
    /// # Errors
    /// [`Fault`] if the driver broke the rules: the device is then marked broken.
    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault>;

    /// A registered descriptor has an event. Answers which queues can now be worked on.
    ///
    /// # Errors
    /// As [`process`](Self::process).
    fn event(&mut self, _queues: &mut Queues, _event: Event) -> Result<QueueSet, Fault> {
        Ok(QueueSet::EMPTY)
    }

    /// Queues whose buffers carry something out of the machine that would be lost with it. Each is
    /// [`process`](Self::process)ed once more when the lane comes to rest, before
    /// [`quiesce`](Self::quiesce).
    fn outgoing(&self) -> QueueSet {
        QueueSet::EMPTY
    }

    /// The machine is about to stand still, or a queue or the worker to go: finishes what is in flight.
    /// When this returns, guest memory is left alone until the next call.
    ///
    /// # Errors
    /// As [`process`](Self::process).
    fn quiesce(&mut self, _queues: &mut Queues) -> Result<(), Fault> {
        Ok(())
    }
}
