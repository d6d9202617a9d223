//! The network device (virtio 1.2 §5.1): configuration and features. What goes over the queues is in
//! [`worker`], where frames go in [`backend`] and the modules that implement it.

mod backend;
mod checksum;
#[cfg(test)]
mod host_tests;
mod offload;
mod stream;
mod switch;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmkit_device::{DeviceError, Saved, Section, SectionFormat};

use self::stream::StreamBackend;
use self::tap::TapBackend;
use self::worker::{Limits, NetWorker};
use crate::limit::{Budget, Limiter, RateLimit};
use crate::transport::mmio::mmio_by_default;
use crate::{Activation, DeviceKind, LaneSpec, VirtioDevice};

pub use self::backend::{DriverOffloads, MAX_FRAME, MIN_FRAME, NetBackend};
pub use self::offload::{Offload, Segmentation};
pub use self::switch::Switch;
pub use self::worker::NetCounters;

const QUEUE_SIZE: u16 = 256;
/// Queue to the driver.
const RX: u16 = 0;
/// Queue to the device.
const TX: u16 = 1;

const FORMAT: SectionFormat = SectionFormat { kind: "virtio-net", version: 1 };

/// Feature bits (§5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// `status`: the cable is in.
const LINK_UP: u16 = 1;

/// A network card.
///
/// ```
/// use vmkit_virtio::{Net, Switch};
///
/// // Two machines that see each other and nobody else.
/// let switch = Switch::new();
/// let one = Net::switch(&switch)?.mac([2, 0, 0, 0, 0, 1]);
/// let other = Net::switch(&switch)?.mac([2, 0, 0, 0, 0, 2]).mtu(9000);
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
pub struct Net {
    name: String,
    mac: Mutex<[u8; 6]>,
    mtu: Option<u16>,
    backend: Arc<Mutex<Box<dyn NetBackend>>>,
    carries_offloads: bool,
    counters: NetCounters,
    sends: Arc<Budget>,
    receives: Arc<Budget>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("name", &self.name)
            .field("mac", &self.mac)
            .field("mtu", &self.mtu)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

mmio_by_default!(Net);

/// Saved state, format version 1.
#[derive(Debug, Serialize, Deserialize)]
struct NetState {
    mac: [u8; 6],
    mtu: Option<u16>,
}

fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> DeviceError {
    let what = what.into();
    move |source| DeviceError::Host { device: "net0".into(), what, source }
}

impl Net {
    /// A card on the embedder's own kind of network, with a random address.
    pub fn new(backend: impl NetBackend + 'static) -> Self {
        let mut mac = [0; 6];
        // Without random bytes the address is still a valid one, and the embedder may give another.
        let _ = rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty());
        // Locally administered, for one station.
        mac[0] = mac[0] & !1 | 2;
        Self {
            name: "net0".into(),
            mac: Mutex::new(mac),
            mtu: None,
            carries_offloads: backend.carries_offloads(),
            backend: Arc::new(Mutex::new(Box::new(backend))),
            counters: NetCounters::default(),
            sends: Budget::new(RateLimit::new()),
            receives: Budget::new(RateLimit::new()),
        }
    }

    /// A card plugged into a switch of this process.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if the host has no eventfd left.
    pub fn switch(switch: &Switch) -> Result<Self, DeviceError> {
        Ok(Self::new(switch.plug().map_err(host("plug into the switch"))?))
    }

    /// A card on a stream of frames, each after its length in four bytes, most significant first:
    /// what passt and QEMU's stream sockets speak.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if the socket cannot be made non-blocking.
    pub fn stream(socket: UnixStream) -> Result<Self, DeviceError> {
        Ok(Self::new(StreamBackend::new(socket).map_err(host("set up its socket"))?))
    }

    /// A card on the stream socket at `path`, where for example passt listens.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if it cannot be connected to.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, DeviceError> {
        let path = path.as_ref();
        let connect = host(format!("connect to {}", path.display()));
        Self::stream(UnixStream::connect(path).map_err(connect)?)
    }

    /// A card on the host's tap interface `name`, which is made if there is none and the process may
    /// (`CAP_NET_ADMIN`). Checksums and segmentation are left to the host, and to a driver that agrees.
    /// The guest is told the interface's MTU if it is not 1500.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if it cannot be opened.
    pub fn tap(name: &str) -> Result<Self, DeviceError> {
        let tap = TapBackend::open(name).map_err(host(format!("open tap interface {name:?}")))?;
        Ok(Self { mtu: tap::unusual_mtu(name), ..Self::new(tap) })
    }

    /// A card on a tap interface that the embedder opened with `IFF_TAP | IFF_NO_PI` and without
    /// `IFF_VNET_HDR`.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if the descriptor cannot be made non-blocking.
    pub fn tap_fd(tap: OwnedFd) -> Result<Self, DeviceError> {
        Ok(Self::new(TapBackend::plain(tap).map_err(host("set up its tap interface"))?))
    }

    /// Gives the device another name than `net0`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The card's address.
    #[must_use]
    pub fn mac(self, mac: [u8; 6]) -> Self {
        *self.lock_mac() = mac;
        self
    }

    /// Bytes of the longest packet the network carries, 68 to 65535; the guest assumes 1500 if not
    /// said.
    #[must_use]
    pub fn mtu(mut self, bytes: u16) -> Self {
        self.mtu = Some(bytes.max(68));
        self
    }

    /// Limits what the guest sends: frames, and bytes of frames. Also with
    /// [`WorkModel::Inline`](crate::WorkModel::Inline) a frame that had to wait is sent on a thread of
    /// the device's.
    #[must_use]
    pub fn limit_sent(mut self, limit: RateLimit) -> Self {
        self.sends = Budget::new(limit);
        self
    }

    /// Limits what the guest receives: frames, and bytes of frames. A frame that is cut for the guest
    /// counts as the segments it gets. What is beyond waits in the network, as far as that has room,
    /// and comes on a thread of the device's, also with
    /// [`WorkModel::Inline`](crate::WorkModel::Inline).
    #[must_use]
    pub fn limit_received(mut self, limit: RateLimit) -> Self {
        self.receives = Budget::new(limit);
        self
    }

    /// Counts what goes through and what is dropped.
    pub fn counters(&self) -> NetCounters {
        self.counters.clone()
    }

    fn lock_mac(&self) -> MutexGuard<'_, [u8; 6]> {
        self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        let mtu = self.mtu.map_or(0, |_| feature::MTU);
        let offloads = if self.carries_offloads {
            let guest = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6;
            guest | feature::HOST_TSO4 | feature::HOST_TSO6
        } else {
            0
        };
        // A checksum can always be finished here.
        feature::CSUM | feature::MAC | feature::STATUS | feature::MRG_RXBUF | mtu | offloads
    }

    /// Segments have checksums (§5.1.3.1).
    fn accepts(&self, features: u64) -> bool {
        let needs = |some: u64, other: u64| features & some == 0 || features & other != 0;
        needs(feature::GUEST_TSO4 | feature::GUEST_TSO6, feature::GUEST_CSUM)
            && needs(feature::HOST_TSO4 | feature::HOST_TSO6, feature::CSUM)
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    /// MAC, status, pairs of queues, MTU (§5.1.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        let [m0, m1, m2, m3, m4, m5] = *self.lock_mac();
        let [s0, s1] = LINK_UP.to_le_bytes();
        let [t0, t1] = self.mtu.unwrap_or(0).to_le_bytes();
        config.copy_from_slice(&[m0, m1, m2, m3, m4, m5, s0, s1, 1, 0, t0, t1]);
        crate::device::read_config_bytes(&config, offset, data);
    }

    fn write_config(&self, _: u64, _: &[u8]) {}

    fn activate(&self, activation: Activation) -> Result<Vec<LaneSpec>, DeviceError> {
        let limiter = |budget| {
            Limiter::new(budget, &activation.clock).map_err(|source| DeviceError::Host {
                device: self.name.clone(),
                what: "make a timer".into(),
                source,
            })
        };
        let takes = DriverOffloads {
            checksum: activation.has(feature::GUEST_CSUM),
            tcp4: activation.has(feature::GUEST_TSO4),
            tcp6: activation.has(feature::GUEST_TSO6),
        };
        self.backend.lock().unwrap_or_else(PoisonError::into_inner).agreed(takes);
        let limits = Limits { sent: limiter(&self.sends)?, received: limiter(&self.receives)? };
        let (features, counters) = (activation.features, self.counters.clone());
        let mtu = self.mtu.filter(|_| activation.has(feature::MTU));
        let worker = NetWorker::new(self.backend.clone(), features, mtu, counters, limits);
        Ok(vec![LaneSpec { queues: vec![RX, TX], worker: Box::new(worker) }])
    }

    fn reset(&self) {}

    fn save(&self) -> Saved {
        FORMAT.save(&NetState { mac: *self.lock_mac(), mtu: self.mtu })
    }

    /// The address is taken on; what is on its way on the network is not saved, as networks lose
    /// frames anyway.
    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state: NetState = FORMAT.load(&self.name, sections)?;
        if state.mtu != self.mtu {
            let reason = format!("saved with MTU {:?}, here {:?}", state.mtu, self.mtu);
            return Err(FORMAT.malformed(&self.name, reason));
        }
        *self.lock_mac() = state.mac;
        Ok(())
    }
}
