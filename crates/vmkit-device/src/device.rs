//! What a device is.

use std::sync::Arc;

use thiserror::Error;
use vmkit_memory::FileMemory;

use crate::{Announcement, Needs, Resources, Section, SnapshotError};

/// What a vCPU does after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum IoFlow {
    /// It goes on.
    Continue,
    /// It completes the access and stops before the next instruction.
    Stop,
}

/// What a device has to say when the machine is saved. There is no default: each device decides.
#[derive(Debug)]
pub enum Saved {
    /// It has no state that a guest could tell.
    Stateless,
    /// Its state. Section names are relative to the device and unique within it.
    Sections(Vec<Section>),
    /// It cannot be saved, for this reason.
    Cannot(&'static str),
}

/// Why a device could not be built, started, paused or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A host resource failed.
    #[error("{device}: {what}: {source}")]
    Host {
        /// The device's name.
        device: String,
        /// What was attempted.
        what: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// The configuration makes no sense.
    #[error("{device}: {reason}")]
    Config {
        /// The device's name.
        device: String,
        /// What is wrong.
        reason: String,
    },
    /// A saved section does not fit.
    #[error("{device}: {source}")]
    State {
        /// The device's name.
        device: String,
        /// What is wrong with it.
        source: SnapshotError,
    },
}

/// A device before it lives: configuration, and what it needs of the machine.
pub trait DeviceBuilder: Send {
    /// The device's name, unique within the machine: `"serial0"`, `"rtc"`.
    fn name(&self) -> String;
    /// Ports, MMIO and interrupts it needs. Regions and lines are numbered in this order from 0.
    fn needs(&self) -> Needs;
    /// Files that the guest is to see as memory. Each gets a place of its own, above RAM
    /// ([`Resources::placed`]); those whose writes go aside cannot be written by the guest.
    fn memory(&self) -> Vec<Arc<FileMemory>> {
        Vec::new()
    }
    /// Brings the device to life with exactly what [`needs`](Self::needs) asked for.
    ///
    /// # Errors
    /// [`DeviceError`] if its configuration is bad or the host refuses it something.
    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError>;
}

/// A living device.
///
/// Life: built (not running) → [`start`](Self::start) → running ⇄ [`pause`](Self::pause) →
/// [`start`](Self::start)…; [`reset`](Self::reset) at any moment; [`save`](Self::save) and
/// [`load`](Self::load) only while not running. Accesses arrive only while running, from any vCPU
/// thread.
pub trait Device: Send + Sync {
    /// The device's name, as its builder gave it.
    fn name(&self) -> &str;
    /// What firmware tables should say of it.
    fn announce(&self) -> Vec<Announcement>;
    /// Reads `data.len()` (1, 2, 4 or 8) bytes at `offset` of region `region`; the access lies
    /// inside the region. What no register answers reads as ones.
    fn read(&self, region: usize, offset: u64, data: &mut [u8]);
    /// Writes `data` (1, 2, 4 or 8 bytes) at `offset` of region `region`; the access lies inside
    /// the region.
    fn write(&self, region: usize, offset: u64, data: &[u8]) -> IoFlow;
    /// Starts or restarts work in the background.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if a thread or descriptor cannot be had.
    fn start(&self) -> Result<(), DeviceError>;
    /// The machine is about to be paused or is ending, and its vCPUs are wanted out of the guest. An
    /// access that waits for the host (a console's write for its reader) completes now, and those that
    /// still come do not wait, until the next [`start`](Self::start). Called from any thread, while
    /// accesses may be inside, and perhaps several times. A device whose accesses never wait does
    /// nothing.
    fn stop_waiting(&self) {}
    /// Ends work in the background; when this returns, guest memory and wires are left alone. No access
    /// is inside.
    fn pause(&self);
    /// Back to the state of power-on.
    fn reset(&self);
    /// Its state, in neutral types.
    fn save(&self) -> Saved;
    /// Takes on saved state. The sections are untrusted.
    ///
    /// # Errors
    /// [`DeviceError::State`] if a section is missing, unknown or malformed; the device is then
    /// as it was.
    fn load(&self, sections: &[Section]) -> Result<(), DeviceError>;
}
