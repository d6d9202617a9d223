//! The socket device (virtio 1.2 §5.10): stream connections between guest and host, without a
//! network.
//!
//! [`packet`] is the wire format, [`connection`] one stream and its credit, [`table`] all of them
//! and who may speak next, [`host`] the host's side, [`worker`] the queues.

mod connection;
mod host;
mod packet;
mod table;
#[cfg(test)]
mod tests;
mod worker;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmkit_device::{DeviceError, Saved, Section, SectionFormat};
use vmkit_memory::GuestAddress;

use self::host::Host;
use self::worker::VsockWorker;
use crate::transport::mmio::mmio_by_default;
use crate::{Activation, DeviceKind, FaultCounter, LaneSpec, VirtioDevice};

pub use self::host::{VsockConnector, VsockListener};

const QUEUE_SIZE: u16 = 256;
/// Queue to the driver.
const RX: u16 = 0;
/// Queue to the device.
const TX: u16 = 1;
/// Queue of events.
const EVENT: u16 = 2;

/// The host's address (§5.10.4).
const HOST_CID: u64 = 2;

const FORMAT: SectionFormat = SectionFormat { kind: "virtio-vsock", version: 1 };

/// A socket device.
///
/// Guest programs reach the host at address 2. The embedder listens and connects in its own process
/// ([`listen`](Self::listen), [`connector`](Self::connector)), or lets other programs do it
/// through Unix sockets ([`sockets`](Self::sockets)).
///
/// ```
/// use vmkit_virtio::{Mmio, Vsock};
///
/// let mut vsock = Vsock::new(3)?;
/// let agent = vsock.listen(1024);
/// let device = Mmio::new(vsock);
/// // Once the machine runs: `let stream = agent.accept()?;`
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
pub struct Vsock {
    name: String,
    cid: u32,
    host: Arc<Mutex<Host>>,
    connector: VsockConnector,
    /// Connections of before a restore are gone, and the driver must be told.
    restored: Arc<AtomicBool>,
    misuse: FaultCounter,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock")
            .field("name", &self.name)
            .field("cid", &self.cid)
            .field("misuse", &self.misuse)
            .finish_non_exhaustive()
    }
}

mmio_by_default!(Vsock);

/// Saved state, format version 1. Connections end with the host's sockets.
#[derive(Debug, Serialize, Deserialize)]
struct VsockState {
    cid: u32,
    /// The driver has yet to be told that its connections are gone.
    restored: bool,
}

impl Vsock {
    /// A guest with the address `cid`, which is 3 or more.
    ///
    /// # Errors
    /// [`DeviceError::Config`] if the address is one of the reserved ones, [`DeviceError::Host`] if
    /// the host has no eventfd left.
    pub fn new(cid: u32) -> Result<Self, DeviceError> {
        if cid < 3 || cid == u32::MAX {
            let reason = format!("guest address {cid} is reserved");
            return Err(DeviceError::Config { device: "vsock0".into(), reason });
        }
        let (connector, requests) = VsockConnector::new().map_err(|source| DeviceError::Host {
            device: "vsock0".into(),
            what: "make an eventfd".into(),
            source,
        })?;
        Ok(Self {
            name: "vsock0".into(),
            cid,
            host: Arc::new(Mutex::new(Host::new(requests, connector.wake()))),
            connector,
            restored: Arc::default(),
            misuse: FaultCounter::default(),
        })
    }

    /// Gives the device another name than `vsock0`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    fn host(&self) -> std::sync::MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets other programs of the host take part, as Firecracker does. A program that connects to
    /// `path` and writes `CONNECT 52\n` reaches port 52 of the guest once it reads `OK …\n`. A guest
    /// program that connects to port 52 reaches who listens at `path` with `_52` appended.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if nobody can listen at `path`, for example because it exists.
    pub fn sockets(self, path: impl AsRef<Path>) -> Result<Self, DeviceError> {
        let path = path.as_ref();
        let error = |source| DeviceError::Host {
            device: self.name.clone(),
            what: format!("listen at {}", path.display()),
            source,
        };
        let listener = UnixListener::bind(path).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        self.host().listen_at(listener, path);
        Ok(self)
    }

    /// Accepts what guest programs connect to at `port`, in this process.
    pub fn listen(&mut self, port: u32) -> VsockListener {
        let (sender, receiver) = mpsc::sync_channel(host::MOST_WAITING);
        self.host().listen_in_process(port, sender);
        VsockListener::new(receiver)
    }

    /// The way to connect to guest programs from this process.
    pub fn connector(&self) -> VsockConnector {
        self.connector.clone()
    }

    /// Counts packets that no driver should send. They end their connection, not the device.
    pub fn misuse(&self) -> FaultCounter {
        self.misuse.clone()
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    /// The guest's address (§5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn write_config(&self, _: u64, _: &[u8]) {}

    fn placed(&self, _: &[GuestAddress]) {
        self.connector.plug();
    }

    fn activate(&self, _: Activation) -> Result<Vec<LaneSpec>, DeviceError> {
        let worker = VsockWorker::new(
            self.name.clone(),
            self.cid.into(),
            self.host.clone(),
            self.restored.clone(),
            self.misuse.clone(),
        )
        .map_err(|source| DeviceError::Host {
            device: self.name.clone(),
            what: "make an eventfd".into(),
            source,
        })?;
        Ok(vec![LaneSpec { queues: vec![RX, TX, EVENT], worker: Box::new(worker) }])
    }

    fn reset(&self) {
        self.restored.store(false, Ordering::Release);
    }

    fn save(&self) -> Saved {
        FORMAT.save(&VsockState { cid: self.cid, restored: self.restored.load(Ordering::Acquire) })
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state: VsockState = FORMAT.load(&self.name, sections)?;
        if state.cid != self.cid {
            let reason = format!("saved with address {}, here {}", state.cid, self.cid);
            return Err(FORMAT.malformed(&self.name, reason));
        }
        self.restored.store(true, Ordering::Release);
        Ok(())
    }
}
