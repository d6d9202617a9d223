//! What a driver can do wrong, counted and told without flooding the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

/// A driver's breach of the rules. Whoever meets one gives it up to the lane, which marks the device
/// broken (virtio 1.2 §2.1.2, `DEVICE_NEEDS_RESET`).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Fault {
    /// A ring's own fields make no sense.
    #[error("queue {queue}: {source}")]
    Ring {
        /// The queue.
        queue: u16,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// A descriptor chain is malformed.
    #[error("queue {queue}: chain at descriptor {head} {what}")]
    Chain {
        /// The queue.
        queue: u16,
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A buffer is not all in guest memory, or is to be written and lies in memory that devices only read.
    #[error(
        "a buffer of {len:#x} bytes at {at:#x} is not in guest memory that a device may use so"
    )]
    Memory {
        /// Guest-physical address.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A chain's buffers are too short for what they must hold.
    #[error("a buffer ends {missing} bytes too early")]
    Short {
        /// How much is missing.
        missing: u64,
    },
    /// A request that no driver may make.
    #[error("{0}")]
    Request(&'static str),
    /// No fault of the driver's: the host fails the device, which cannot go on.
    #[error("{0}")]
    Host(&'static str),
}

impl Fault {
    pub(crate) fn ring(queue: u16) -> impl Fn(virtio_queue::Error) -> Self {
        move |source| Self::Ring { queue, source }
    }
}

/// How often a driver broke the rules. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct FaultCounter {
    count: Arc<AtomicU64>,
}

impl FaultCounter {
    /// How often so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts one, and logs it if it is the first, second, fourth, eighth… of this device: a guest
    /// can fill a log with no more than 64 lines.
    pub(crate) fn note(&self, device: &str, fault: &dyn std::fmt::Display) {
        let count = self.count.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if count.is_power_of_two() {
            log::warn!("{device}: driver fault {count}: {fault}");
        }
    }
}

/// Lets the first, second, fourth, eighth… of a kind of message through.
#[derive(Debug, Default)]
pub(crate) struct Rarely {
    count: AtomicU64,
}

impl Rarely {
    /// Counts one, and calls `log` with the count if it is to be told.
    pub(crate) fn log(&self, log: impl FnOnce(u64)) {
        let count = self.count.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if count.is_power_of_two() {
            log(count);
        }
    }
}
