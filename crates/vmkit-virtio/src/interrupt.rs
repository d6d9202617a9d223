//! How a device interrupts its driver, whatever the transport.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::FaultCounter;

/// A transport's way to interrupt the driver.
pub trait Interrupt: Send + Sync {
    /// Queue `queue` has used buffers.
    fn queue(&self, queue: u16);
    /// The configuration space or the device status changed.
    fn config(&self);
    /// The device was reset: nothing is pending any more.
    fn reset(&self);
}

/// Device status bits (virtio 1.2 §2.1).
pub(crate) mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// What the transport's registers and the workers share.
pub(crate) struct Shared {
    pub name: String,
    pub interrupt: Arc<dyn Interrupt>,
    pub faults: FaultCounter,
    pub status: AtomicU8,
    pub generation: AtomicU32,
}

impl Shared {
    pub(crate) fn has(&self, bits: u8) -> bool {
        self.status.load(Ordering::Acquire) & bits == bits
    }

    /// Marks the device broken and tells the driver, once per life.
    pub(crate) fn broken(&self, why: &dyn std::fmt::Display) {
        self.faults.note(&self.name, why);
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        if before & status::NEEDS_RESET == 0 && before & status::DRIVER_OK != 0 {
            self.interrupt.config();
        }
    }
}

/// Tells the driver that the device's configuration space changed.
#[derive(Clone)]
pub struct ConfigChange {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for ConfigChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigChange").finish_non_exhaustive()
    }
}

impl ConfigChange {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Call it after the change.
    pub fn announce(&self) {
        self.shared.generation.fetch_add(1, Ordering::AcqRel);
        if self.shared.has(status::DRIVER_OK) {
            self.shared.interrupt.config();
        }
    }
}
