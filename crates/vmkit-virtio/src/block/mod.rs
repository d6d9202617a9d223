//! The block device (virtio 1.2 §5.2): configuration and features. What a request means is in
//! [`request`], where the bytes are in [`disk`].

mod disk;
#[cfg(feature = "qcow2")]
mod qcow2;
#[cfg(test)]
mod qcow2_tests;
mod request;
#[cfg(test)]
mod tests;
mod uring;
#[cfg(test)]
mod uring_tests;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmkit_device::{DeviceError, Saved, Section, SectionFormat};
use vmkit_memory::{FileRing, GuestRam};

use self::disk::{FileDisk, MemoryDisk};
use self::request::{BlockWorker, MOST_BYTES, RequestTarget};
use self::uring::RingWorker;
use crate::limit::{Budget, Limiter, RateLimit};
use crate::lock::FileLock;
use crate::transport::mmio::mmio_by_default;
use crate::{Activation, DeviceKind, LaneSpec, VirtioDevice, Worker};

pub use self::disk::Disk;
#[cfg(feature = "qcow2")]
pub use self::qcow2::Qcow2;

/// Bytes of a sector, the unit of all addresses whatever the block size (§5.2.2).
pub(crate) const SECTOR: u64 = 512;
/// Bytes of a serial number.
const SERIAL_LEN: usize = 20;
/// Entries of a queue, unless the embedder says otherwise.
const QUEUE_SIZE: u16 = 256;
/// Most bytes of a segment of a request.
const MOST_SEGMENT: u32 = 1 << 20;
/// Most sectors of one range to discard: 1 GiB.
pub(crate) const MOST_SECTORS: u32 = 1 << 21;
/// Most sectors of one range to zero: 16 MiB, which may have to be written.
pub(crate) const MOST_ZEROES: u32 = 1 << 15;
/// Most ranges of one discard or write-zeroes request.
pub(crate) const MOST_RANGES: u32 = 16;

const FORMAT: SectionFormat = SectionFormat { kind: "virtio-block", version: 1 };

/// Feature bits (§5.2.3).
pub(crate) mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Events of the workers: the rate limit's timer, and io_uring's completions.
const LIMIT: u32 = 0;
const RING: u32 = 1;

/// How a raw image is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Engine {
    /// One request after the other, each a system call.
    #[default]
    Positional,
    /// Through io_uring: up to 256 requests of a queue in flight at once, a system call for as many as
    /// the driver makes available together. Requests may end in another order than they began. Also
    /// with [`WorkModel::Inline`](crate::WorkModel::Inline) a request may end later, on a thread of
    /// the device's.
    IoUring,
}

/// A block device.
///
/// ```
/// use vmkit_virtio::{Block, Mmio};
///
/// let disk = Block::memory(vec![0; 1 << 20])?.serial("scratch").queues(2);
/// let device = Mmio::new(disk);
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
pub struct Block {
    name: String,
    disk: Arc<dyn Disk>,
    /// The file, if the disk is a raw image.
    file: Option<File>,
    engine: Engine,
    budget: Arc<Budget>,
    read_only: bool,
    serial: [u8; SERIAL_LEN],
    queues: u16,
    queue_size: u16,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block")
            .field("name", &self.name)
            .field("engine", &self.engine)
            .field("read_only", &self.read_only)
            .field("queues", &self.queues)
            .field("queue_size", &self.queue_size)
            .finish_non_exhaustive()
    }
}

mmio_by_default!(Block);

/// What a driver remembers of its disk, format version 1: a machine goes on only with a disk like
/// the one it was saved with.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct BlockState {
    bytes: u64,
    read_only: bool,
    serial: [u8; SERIAL_LEN],
}

impl Block {
    /// The raw image at `path`, for reading and writing. No one else may use it meanwhile (an
    /// advisory lock sees to that).
    ///
    /// # Errors
    /// [`DeviceError::Host`] if it cannot be opened or is in use, [`DeviceError::Config`] if it is
    /// smaller than a sector.
    pub fn file(path: impl AsRef<Path>) -> Result<Self, DeviceError> {
        Self::opened(path.as_ref(), true)
    }

    /// The raw image at `path`, for reading. Others may read it too.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn read_only_file(path: impl AsRef<Path>) -> Result<Self, DeviceError> {
        Ok(Self::opened(path.as_ref(), false)?.read_only())
    }

    fn opened(path: &Path, write: bool) -> Result<Self, DeviceError> {
        let (file, lock) = FileLock::open(path, write).map_err(|(what, source)| {
            let what = format!("{what} {}", path.display());
            DeviceError::Host { device: "block0".into(), what, source }
        })?;
        Self::image(file, Some(lock))
    }

    /// The qcow2 image at `path`, for reading and writing, if it has no backing file: [`Qcow2`] opens
    /// those that have one. Needs the crate feature `qcow2`.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    #[cfg(feature = "qcow2")]
    pub fn qcow2(path: impl Into<std::path::PathBuf>) -> Result<Self, DeviceError> {
        Qcow2::at(path).open()
    }

    /// A raw image in a file or block device that the embedder opened. It is not locked.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn raw(file: File) -> Result<Self, DeviceError> {
        Self::image(file, None)
    }

    fn image(file: File, lock: Option<FileLock>) -> Result<Self, DeviceError> {
        let host = |source| DeviceError::Host {
            device: "block0".into(),
            what: "find the size of its image".into(),
            source,
        };
        let same = file.try_clone().map_err(host)?;
        let block = Self::disk(FileDisk::new(file, lock).map_err(host)?)?;
        Ok(Self { file: Some(same), ..block })
    }

    /// A disk in this process's memory, gone when the machine is.
    ///
    /// # Errors
    /// [`DeviceError::Config`] if it is smaller than a sector.
    pub fn memory(bytes: Vec<u8>) -> Result<Self, DeviceError> {
        Self::disk(MemoryDisk::new(bytes))
    }

    /// The embedder's own kind of disk.
    ///
    /// # Errors
    /// [`DeviceError::Config`] if it is smaller than a sector.
    pub fn disk(disk: impl Disk + 'static) -> Result<Self, DeviceError> {
        if disk.bytes() < SECTOR {
            let reason = format!("a disk of {} bytes has no sector", disk.bytes());
            return Err(DeviceError::Config { device: "block0".into(), reason });
        }
        Ok(Self {
            name: "block0".into(),
            disk: Arc::new(disk),
            file: None,
            engine: Engine::Positional,
            budget: Budget::new(RateLimit::new()),
            read_only: false,
            serial: [0; SERIAL_LEN],
            queues: 1,
            queue_size: QUEUE_SIZE,
        })
    }

    /// Chooses how a raw image is read and written.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if the host has no io_uring for this process, [`DeviceError::Config`] if
    /// the disk is not a raw image.
    pub fn engine(mut self, engine: Engine) -> Result<Self, DeviceError> {
        if engine == Engine::IoUring {
            let Some(file) = &self.file else {
                let reason = "only a raw image can be read and written through io_uring".into();
                return Err(DeviceError::Config { device: self.name, reason });
            };
            // The rings of the queues are made when there are queues; this one is to know.
            let ring = file.try_clone().and_then(|file| FileRing::new(file, GuestRam::new(), 1));
            ring.map_err(|source| self.host("use io_uring", source))?;
        }
        self.engine = engine;
        Ok(self)
    }

    fn host(&self, what: &str, source: std::io::Error) -> DeviceError {
        DeviceError::Host { device: self.name.clone(), what: what.into(), source }
    }

    /// Limits the requests of all queues together. The bytes of a request are those of all its
    /// buffers and those it zeroes; what it discards is not written, and no more than an operation. Also with [`WorkModel::Inline`](crate::WorkModel::Inline) a request that had to wait
    /// is done on a thread of the device's.
    #[must_use]
    pub fn limit(mut self, limit: RateLimit) -> Self {
        self.budget = Budget::new(limit);
        self
    }

    /// Gives the device another name than `block0`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Refuses all writes of the guest.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The serial number, by which a guest finds the disk; what is beyond 20 bytes is cut off.
    #[must_use]
    pub fn serial(mut self, serial: &str) -> Self {
        self.serial = [0; SERIAL_LEN];
        self.serial.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        self
    }

    /// How many queues there are, each worked on independently: 1 to 64, best one per vCPU.
    #[must_use]
    pub fn queues(mut self, count: u16) -> Self {
        self.queues = count.clamp(1, 64);
        self
    }

    /// Entries of each queue; rounded up to a power of two between 4 and 32768.
    #[must_use]
    pub fn queue_size(mut self, entries: u16) -> Self {
        self.queue_size = entries.clamp(4, 1 << 15).next_power_of_two();
        self
    }

    fn state(&self) -> BlockState {
        BlockState { bytes: self.disk.bytes(), read_only: self.read_only, serial: self.serial }
    }

    fn worker(&self, queue: u16, given: &Activation) -> Result<Box<dyn Worker>, DeviceError> {
        let limiter = Limiter::new(&self.budget, &given.clock);
        let limiter = limiter.map_err(|source| self.host("make a timer", source))?;
        let target = RequestTarget::new(
            self.name.clone(),
            self.disk.clone(),
            given.features,
            self.read_only,
            self.serial,
        );
        let Some(file) = self.file.as_ref().filter(|_| self.engine == Engine::IoUring) else {
            return Ok(Box::new(BlockWorker::new(queue, target, limiter)));
        };
        let queue = (queue, self.queue_size);
        let worker = file
            .try_clone()
            .and_then(|file| RingWorker::new(queue, target, limiter, file, given.memory.clone()))
            .map_err(|source| self.host("use io_uring", source))?;
        Ok(Box::new(worker))
    }

    /// The configuration space (§5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            config.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0, &(self.disk.bytes() / SECTOR).to_le_bytes());
        // One for the header and one for the status.
        let segments = u32::from(self.queue_size) - 2;
        put(8, &segment_bytes(segments).to_le_bytes());
        put(12, &segments.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Blocks of 2^3 sectors are what page caches and file systems like.
        put(24, &[3]);
        put(26, &8_u16.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &MOST_SECTORS.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &8_u32.to_le_bytes());
        put(48, &MOST_ZEROES.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        put(56, &[self.disk.can_discard().into()]);
        config
    }
}

/// Most bytes of each of a request's `segments`: no more than the request may have, in whole pages.
fn segment_bytes(segments: u32) -> u32 {
    const PAGE: u32 = 4096;
    let most = (MOST_BYTES / u64::from(segments.max(1))).min(MOST_SEGMENT.into()) as u32;
    (most / PAGE * PAGE).max(PAGE)
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let always = feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::FLUSH;
        let several = if self.queues > 1 { feature::MQ } else { 0 };
        let writes = match (self.read_only, self.disk.can_discard()) {
            (true, _) => feature::RO,
            (false, true) => feature::DISCARD | feature::WRITE_ZEROES,
            (false, false) => feature::WRITE_ZEROES,
        };
        always | several | writes
    }

    fn queues(&self) -> Vec<u16> {
        vec![self.queue_size; self.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&self, _: u64, _: &[u8]) {}

    fn activate(&self, activation: Activation) -> Result<Vec<LaneSpec>, DeviceError> {
        let lane = |queue| {
            let worker = self.worker(queue, &activation)?;
            Ok(LaneSpec { queues: vec![queue], worker })
        };
        (0..self.queues).map(lane).collect()
    }

    fn reset(&self) {}

    fn save(&self) -> Saved {
        // Pausing had the disk settle and could only log a failure; a state that relies on an image
        // that is not whole must not be taken for one.
        if let Err(error) = self.disk.settle() {
            log::error!("{}: its image is not whole: {error}", self.name);
            return Saved::Cannot("the host failed to bring the disk's image up to date");
        }
        FORMAT.save(&self.state())
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let saved: BlockState = FORMAT.load(&self.name, sections)?;
        let here = self.state();
        if saved != here {
            let reason = format!("saved with another disk: {saved:?}, here {here:?}");
            return Err(FORMAT.malformed(&self.name, reason));
        }
        Ok(())
    }
}
