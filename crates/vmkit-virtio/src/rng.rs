//! The entropy device (virtio 1.2 §5.4): fills the driver's buffers with random bytes.
//!
//! Bytes come from the host kernel unless the embedder gives another source, as a machine that must
//! run the same every time has to.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmkit_device::{DeviceError, Saved, Section, SectionFormat};

use crate::fault::Rarely;
use crate::transport::mmio::mmio_by_default;
use crate::{
    Activation, Chain, DeviceKind, Fault, LaneSpec, Progress, Queues, VirtioDevice, Worker,
};

const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request. A driver gets fewer than it asked for (§5.4.6.1 allows that).
const MOST: u64 = 64 << 10;

type Source = dyn FnMut(&mut [u8]) -> io::Result<()> + Send;

/// An entropy device.
///
/// ```
/// use vmkit_virtio::{Mmio, Rng};
///
/// let device = Mmio::new(Rng::new());
/// let repeatable = Mmio::new(Rng::from_source(|bytes| bytes.fill(7)));
/// ```
pub struct Rng {
    name: String,
    source: Arc<Mutex<Source>>,
    /// Outlives resets, so that a guest cannot fill the log by them.
    errors: Arc<Rarely>,
}

impl std::fmt::Debug for Rng {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rng").field("name", &self.name).finish_non_exhaustive()
    }
}

mmio_by_default!(Rng);

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl Rng {
    /// One that passes on the host's random bytes.
    pub fn new() -> Self {
        Self::filled_by(host_bytes)
    }

    /// One that passes on what `source` fills in.
    pub fn from_source(mut source: impl FnMut(&mut [u8]) + Send + 'static) -> Self {
        Self::filled_by(move |bytes| {
            source(bytes);
            Ok(())
        })
    }

    /// One that passes on what `source` fills in, which may fail: the guest is then given nothing, and
    /// finds the device broken until it resets it.
    fn filled_by(source: impl FnMut(&mut [u8]) -> io::Result<()> + Send + 'static) -> Self {
        Self { name: "rng0".into(), source: Arc::new(Mutex::new(source)), errors: Arc::default() }
    }

    /// Gives the device another name than `rng0`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }
}

/// Fills `bytes` from the host kernel.
fn host_bytes(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            // Every kernel since 3.17 has it.
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn write_config(&self, _: u64, _: &[u8]) {}

    fn activate(&self, _: Activation) -> Result<Vec<LaneSpec>, DeviceError> {
        let worker = RngWorker {
            name: self.name.clone(),
            source: self.source.clone(),
            chain: Chain::new(),
            errors: self.errors.clone(),
        };
        Ok(vec![LaneSpec { queues: vec![0], worker: Box::new(worker) }])
    }

    fn reset(&self) {}

    fn save(&self) -> Saved {
        Saved::Stateless
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        SectionFormat::none(&self.name, sections)
    }
}

struct RngWorker {
    name: String,
    source: Arc<Mutex<Source>>,
    chain: Chain,
    errors: Arc<Rarely>,
}

impl Worker for RngWorker {
    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        let Some(queue) = queues.get(index) else { return Ok(Progress::Drained) };
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let mut writer = self.chain.writer(queue.memory());
            let mut left = writer.remaining().min(MOST);
            let mut bytes = [0; 256];
            while left > 0 {
                let count = left.min(bytes.len() as u64);
                let part = bytes.get_mut(..count as usize).unwrap_or_default();
                if let Err(error) = source(part) {
                    // Predictable bytes must not pass as random ones.
                    let name = &self.name;
                    self.errors.log(|n| log::error!("{name}: no random bytes ({n}): {error}"));
                    return Err(Fault::Host("the host has no random bytes"));
                }
                writer.write_all(part)?;
                left -= count;
            }
            let written = writer.written();
            queue.complete(self.chain.head(), written)?;
        }
        Ok(Progress::More)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FREE, Rig};
    use crate::{Mmio, WorkModel};

    #[test]
    fn buffers_are_filled_from_the_source_up_to_a_limit() {
        let rng = Rng::from_source(|bytes| bytes.fill(0xA5));
        let rig = Rig::new(Mmio::new(rng).work(WorkModel::Inline));
        let mut ring = rig.activate(0, 8).remove(0);
        ring.add(&[], &[(FREE, 100), (FREE + 0x1000, 300)]);
        ring.add(&[], &[(FREE + 0x2000, 1 << 20)]);
        ring.add(&[(FREE, 10)], &[]);
        rig.notify(0);
        assert_eq!(ring.used().unwrap(), (0, 400));
        assert_eq!(ring.used().unwrap(), (2, 64 << 10));
        assert_eq!(ring.used().unwrap(), (3, 0));
        assert_eq!(rig.bytes(FREE + 0x1000 + 299, 2), [0xA5, 0]);
        assert!(!rig.is_broken());
    }

    #[test]
    #[cfg_attr(miri, ignore = "random bytes of the host")]
    fn the_hosts_bytes_differ_from_request_to_request() {
        let rig = Rig::new(Mmio::new(Rng::new()));
        let mut ring = rig.activate(0, 8).remove(0);
        ring.add(&[], &[(FREE, 32)]);
        ring.add(&[], &[(FREE + 32, 32)]);
        rig.notify(0);
        assert_eq!((ring.wait_used().1, ring.wait_used().1), (32, 32));
        assert_ne!(rig.bytes(FREE, 32), rig.bytes(FREE + 32, 32));
    }

    #[test]
    fn a_source_that_fails_gives_nothing_that_could_pass_for_random() {
        let mut given = 0;
        let rng = Rng::filled_by(move |bytes| {
            bytes.fill(7);
            given += bytes.len();
            if given > 256 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
        });
        let rig = Rig::new(Mmio::new(rng).work(WorkModel::Inline));
        let mut ring = rig.activate(0, 8).remove(0);
        ring.add(&[], &[(FREE, 300)]);
        rig.notify(0);
        assert_eq!((ring.used(), rig.is_broken()), (None, true));
        assert_eq!(rig.bytes(FREE + 256, 44), [0; 44]);
    }

    #[test]
    fn asking_for_bytes_outside_of_memory_breaks_the_device_until_it_is_reset() {
        let rig = Rig::new(Mmio::new(Rng::new()).work(WorkModel::Inline));
        let mut ring = rig.activate(0, 8).remove(0);
        ring.add(&[], &[(u64::MAX - 10, 32)]);
        rig.notify(0);
        assert!(rig.is_broken());
        assert_eq!((ring.used(), rig.faults.count(), rig.reg(0x60)), (None, 1, 2));
        let mut ring = rig.activate(0, 8).remove(0);
        ring.add(&[], &[(FREE, 32)]);
        rig.notify(0);
        assert_eq!(ring.used(), Some((0, 32)));
    }
}
