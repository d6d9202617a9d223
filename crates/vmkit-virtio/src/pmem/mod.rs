//! Persistent memory (virtio 1.2 §5.19): a file of the host that the guest sees as memory.
//!
//! The guest needs no copy of it: its file system reads and maps the host's page cache (Linux: a mount
//! with `-o dax`), which all machines that use the file share. Only to make writes durable does it ask the
//! device.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vmkit_device::{DeviceError, Saved, Section, SectionFormat};
use vmkit_memory::{FileMemory, FileWrites, GuestAddress, MemoryError};

use crate::fault::Rarely;
use crate::lock::FileLock;
use crate::transport::mmio::mmio_by_default;
use crate::{
    Activation, Chain, DeviceKind, Fault, LaneSpec, Progress, Queues, VirtioDevice, Worker,
};

const QUEUE_SIZE: u16 = 64;
/// What Linux maps persistent memory in.
const BLOCK: u64 = 2 << 20;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (§5.19.6).
const FLUSH: u32 = 0;
/// `ret` of a response (§5.19.6).
const OK: u32 = 0;
const FAILED: u32 = 1;

const FORMAT: SectionFormat = SectionFormat { kind: "virtio-pmem", version: 1 };

/// A file as persistent memory.
///
/// The file's size is a multiple of 2 MiB, and must stay as it is: who cuts it short meanwhile ends this
/// process with SIGBUS, and so does an I/O error of the file's disk, as for everyone who maps files.
///
/// ```no_run
/// use vmkit_virtio::Pmem;
///
/// let root = Pmem::read_only_file("/images/root.ext4")?; // in the guest: mount -o ro,dax /dev/pmem0 /root
/// # Ok::<(), vmkit_device::DeviceError>(())
/// ```
pub struct Pmem {
    name: String,
    memory: Arc<FileMemory>,
    start: OnceLock<GuestAddress>,
    /// Outlives resets, so that a guest cannot fill the log by them.
    errors: Arc<Rarely>,
    _lock: FileLock,
}

impl std::fmt::Debug for Pmem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pmem")
            .field("name", &self.name)
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

mmio_by_default!(Pmem);

/// What a driver remembers, format version 1: a machine goes on only with memory like that it was saved
/// with, at the same place.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PmemState {
    start: u64,
    bytes: u64,
    read_only: bool,
}

impl Pmem {
    /// The file at `path`, for reading and writing. No one else may use it meanwhile (an advisory lock
    /// sees to that). All of it gets room on its disk now, because there is no way to tell a guest later
    /// that there is none.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if it cannot be opened, is in use or gets no room, [`DeviceError::Config`]
    /// if its size is no multiple of 2 MiB.
    pub fn file(path: impl AsRef<Path>) -> Result<Self, DeviceError> {
        Self::open(path.as_ref(), FileWrites::Through)
    }

    /// The file at `path`, for reading; writes of the guest are ignored, and a device that it tells to write
    /// there refuses and is broken until a reset. Others may read it too, and all who do share its pages.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if it cannot be opened or is being written, [`DeviceError::Config`] if its
    /// size is no multiple of 2 MiB.
    pub fn read_only_file(path: impl AsRef<Path>) -> Result<Self, DeviceError> {
        Self::open(path.as_ref(), FileWrites::Aside)
    }

    fn open(path: &Path, writes: FileWrites) -> Result<Self, DeviceError> {
        let host = |what, source| DeviceError::Host {
            device: "pmem0".into(),
            what: format!("{what} {}", path.display()),
            source,
        };
        let (file, lock) = FileLock::open(path, writes == FileWrites::Through)
            .map_err(|(what, source)| host(what, source))?;
        let same = file.try_clone().map_err(|source| host("open", source))?;
        let wrong = |bytes| DeviceError::Config {
            device: "pmem0".into(),
            reason: format!("{} of {bytes} bytes: want a multiple of 2 MiB", path.display()),
        };
        let memory = FileMemory::new(file, writes).map_err(|error| match error {
            MemoryError::Size(bytes) => wrong(bytes),
            other => host("find the size of", io::Error::other(other)),
        })?;
        if !memory.bytes().is_multiple_of(BLOCK) {
            return Err(wrong(memory.bytes()));
        }
        if writes == FileWrites::Through {
            reserve(&same, memory.bytes()).map_err(|source| host("find room for", source))?;
        }
        let (memory, start) = (Arc::new(memory), OnceLock::new());
        let errors = Arc::default();
        Ok(Self { name: "pmem0".into(), memory, start, errors, _lock: lock })
    }

    /// Gives the device another name than `pmem0`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    fn state(&self) -> PmemState {
        PmemState {
            start: self.start.get().map_or(0, |start| start.0),
            bytes: self.memory.bytes(),
            read_only: self.memory.writes() == FileWrites::Aside,
        }
    }
}

/// Gives all of `file` room on its disk, so that no write to it finds none. Where the file system cannot
/// do that, it is left as it is.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

impl VirtioDevice for Pmem {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn memory(&self) -> Vec<Arc<FileMemory>> {
        vec![self.memory.clone()]
    }

    fn placed(&self, at: &[GuestAddress]) {
        if let Some(start) = at.first() {
            let _ = self.start.set(*start);
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let config = [state.start.to_le_bytes(), state.bytes.to_le_bytes()];
        crate::device::read_config_bytes(config.as_flattened(), offset, data);
    }

    fn write_config(&self, _: u64, _: &[u8]) {}

    fn activate(&self, _: Activation) -> Result<Vec<LaneSpec>, DeviceError> {
        let worker = PmemWorker {
            name: self.name.clone(),
            memory: self.memory.clone(),
            chain: Chain::new(),
            errors: self.errors.clone(),
        };
        Ok(vec![LaneSpec { queues: vec![0], worker: Box::new(worker) }])
    }

    fn reset(&self) {}

    fn save(&self) -> Saved {
        FORMAT.save(&self.state())
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let saved: PmemState = FORMAT.load(&self.name, sections)?;
        let here = self.state();
        if saved != here {
            let reason = format!("saved with other memory: {saved:?}, here {here:?}");
            return Err(FORMAT.malformed(&self.name, reason));
        }
        Ok(())
    }
}

/// Requests of one turn. Each may write all that the guest has changed, and a lane heeds a stop only
/// between turns.
const A_TURN: u16 = 4;

struct PmemWorker {
    name: String,
    memory: Arc<FileMemory>,
    chain: Chain,
    errors: Arc<Rarely>,
}

impl PmemWorker {
    fn flush(&self) -> u32 {
        if self.memory.writes() == FileWrites::Aside {
            return OK;
        }
        match self.memory.sync() {
            Ok(()) => OK,
            Err(error) => {
                let name = &self.name;
                self.errors.log(|n| log::error!("{name}: writes not durable ({n}): {error}"));
                FAILED
            }
        }
    }
}

impl Worker for PmemWorker {
    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        let Some(queue) = queues.get(index) else { return Ok(Progress::Drained) };
        for _ in 0..A_TURN.min(queue.size()) {
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let mut kind = [0; 4];
            self.chain.reader(queue.memory()).read_exact(&mut kind)?;
            let result = if u32::from_le_bytes(kind) == FLUSH { self.flush() } else { FAILED };
            let mut writer = self.chain.writer(queue.memory());
            writer.write_all(&result.to_le_bytes())?;
            let written = writer.written();
            queue.complete(self.chain.head(), written)?;
        }
        Ok(Progress::More)
    }
}
