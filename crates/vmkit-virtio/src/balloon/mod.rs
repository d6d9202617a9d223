//! The memory balloon (virtio 1.2 §5.5): pages that a guest does not use go back to the host.
//!
//! Three ways: the embedder asks for an amount and the guest gives up that many pages; the guest
//! reports free pages by itself; or, asked for a hint, tells all free pages once (before a snapshot,
//! so that they need not be saved). The last is offered only if the embedder wants it, see
//! [`Balloon::hints`]. What the queues carry is in [`worker`].

#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmkit_device::{DeviceError, Saved, Section, SectionFormat};

use self::worker::BalloonWorker;
use crate::transport::mmio::mmio_by_default;
use crate::{Activation, ConfigChange, DeviceKind, LaneSpec, VirtioDevice};

const QUEUE_SIZE: u16 = 128;
/// Bytes of a balloon page, whatever the guest's own pages are (§5.5.6).
const PAGE: u64 = 4096;

const FORMAT: SectionFormat = SectionFormat { kind: "virtio-balloon", version: 1 };

/// Feature bits (§5.5.3). All but the statistics' and the poison's.
mod feature {
    pub const MUST_TELL_HOST: u64 = 1 << 0;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    pub const REPORTING: u64 = 1 << 5;
}

/// `free_page_hint_cmd_id`: no hint is wanted (§5.5.6.6).
const HINT_STOP: u32 = 0;
/// The hints of a round are used up; the driver may have its pages back.
const HINT_DONE: u32 = 1;
/// First number of a round.
const HINT_FIRST: u32 = 2;

/// A memory balloon.
///
/// ```
/// use vmkit_virtio::{Balloon, Mmio};
///
/// let balloon = Balloon::new();
/// let handle = balloon.handle();
/// let device = Mmio::new(balloon);
/// // While the machine runs: ask for 64 MiB, and see how much the guest has given.
/// handle.set_target(64 << 20);
/// assert_eq!(handle.actual(), 0);
/// ```
pub struct Balloon {
    name: String,
    hints: bool,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balloon").field("name", &self.name).finish_non_exhaustive()
    }
}

mmio_by_default!(Balloon);

#[derive(Default)]
struct Shared {
    /// Pages the embedder wants back.
    target: AtomicU32,
    /// Pages the driver says it gave.
    actual: AtomicU32,
    /// The round of hints that is wanted, or one of the reserved numbers.
    hint: AtomicU32,
    /// Last round.
    round: AtomicU32,
    /// The driver has told all of the round.
    hinted: AtomicBool,
    /// Bytes that went back to the host.
    given: AtomicU64,
    change: Mutex<Option<ConfigChange>>,
    /// A round has ended because the machine was loaded, and its driver does not know.
    ended: AtomicBool,
    /// Held while a hinted page is given back, and while a round ends: none is given back after
    /// (§5.5.6.6.2).
    giving: Mutex<()>,
}

/// Saved state, format version 1.
#[derive(Debug, Serialize, Deserialize)]
struct BalloonState {
    target: u32,
    actual: u32,
    hint: u32,
    round: u32,
}

impl Shared {
    /// Tells the driver of the end of a round that a loaded machine was in.
    fn announce_end(&self) {
        if self.ended.load(Ordering::Relaxed) && self.ended.swap(false, Ordering::AcqRel) {
            self.announce();
        }
    }

    fn giving(&self) -> MutexGuard<'_, ()> {
        self.giving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self) {
        if let Some(change) = &*self.change.lock().unwrap_or_else(PoisonError::into_inner) {
            change.announce();
        }
    }
}

impl Default for Balloon {
    fn default() -> Self {
        Self::new()
    }
}

impl Balloon {
    /// An empty balloon.
    pub fn new() -> Self {
        Self { name: "balloon0".into(), hints: false, shared: Arc::default() }
    }

    /// Gives the device another name than `balloon0`.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Offers hints too ([`BalloonHandle::ask_for_hints`]). **Only for guests that leave a hinted page
    /// alone until [`end_hints`](BalloonHandle::end_hints): others lose data.**
    ///
    /// The page is given back as it is told, and reads as zeros from then on. A driver may use it
    /// again before that without a word to the device (virtio 1.2 §5.5.6.6.1), and then what it wrote
    /// is gone; Linux does so when it is short of memory. What the guest reports by itself has no such
    /// hazard, because a driver leaves those pages alone until the device has answered.
    #[must_use]
    pub fn hints(mut self) -> Self {
        self.hints = true;
        self
    }

    /// The embedder's hold on it.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle { shared: self.shared.clone() }
    }
}

/// Squeezes and watches a balloon. Clones hold the same.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for BalloonHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BalloonHandle")
            .field("target", &self.target())
            .field("actual", &self.actual())
            .finish_non_exhaustive()
    }
}

impl BalloonHandle {
    /// Asks the guest to give up `bytes` of its memory in all; less than it has given already lets
    /// it have the difference back. Rounded down to 4 KiB; at most 16 TiB.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.shared.target.store(pages, Ordering::Release);
        self.shared.announce();
    }

    /// What was asked for last, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target.load(Ordering::Acquire)) * PAGE
    }

    /// What the guest says it has given up, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::Acquire)) * PAGE
    }

    /// Bytes that went back to the host so far, in all three ways. What the guest used again counts
    /// again when it is given back again.
    pub fn given(&self) -> u64 {
        self.shared.given.load(Ordering::Acquire)
    }

    /// Asks the guest to tell which pages are free; they go back to the host as they are told. Without
    /// [`Balloon::hints`], and with a guest that does not know them, nothing happens. When a machine is
    /// loaded, a round that it was in has ended.
    pub fn ask_for_hints(&self) {
        let round = self.shared.round.load(Ordering::Acquire);
        let round = round.checked_add(1).unwrap_or(HINT_FIRST).max(HINT_FIRST);
        self.shared.round.store(round, Ordering::Release);
        self.shared.hinted.store(false, Ordering::Release);
        self.shared.hint.store(round, Ordering::Release);
        self.shared.announce();
    }

    /// True once the guest has told all of its free pages since
    /// [`ask_for_hints`](Self::ask_for_hints).
    pub fn hinted(&self) -> bool {
        self.shared.hinted.load(Ordering::Acquire)
    }

    /// Lets the guest use its free pages again. Pages that it tells later are left alone.
    pub fn end_hints(&self) {
        let giving = self.shared.giving();
        self.shared.hint.store(HINT_DONE, Ordering::Release);
        drop(giving);
        self.shared.announce();
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        let hints = if self.hints { feature::FREE_PAGE_HINT } else { 0 };
        feature::MUST_TELL_HOST | feature::DEFLATE_ON_OOM | feature::REPORTING | hints
    }

    /// Inflate, deflate, hints, reports. Drivers number only the queues whose features they
    /// accepted, so the last two shift down if an earlier one is missing.
    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 4]
    }

    /// `num_pages`, `actual`, `free_page_hint_cmd_id` (§5.5.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = &self.shared;
        let fields = [&shared.target, &shared.actual, &shared.hint];
        let fields = fields.map(|field| field.load(Ordering::Acquire).to_le_bytes());
        crate::device::read_config_bytes(fields.as_flattened(), offset, data);
    }

    /// Only `actual` is the driver's to write, in one piece.
    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.shared.actual.store(u32::from_le_bytes(actual), Ordering::Release);
        }
    }

    fn activate(&self, activation: Activation) -> Result<Vec<LaneSpec>, DeviceError> {
        let hints = activation.has(feature::FREE_PAGE_HINT).then_some(2);
        let reports =
            activation.has(feature::REPORTING).then_some(if hints.is_some() { 3 } else { 2 });
        *self.shared.change.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(activation.config.clone());
        let worker = BalloonWorker::new(self.name.clone(), self.shared.clone(), hints, reports);
        Ok(vec![LaneSpec { queues: vec![0, 1, 2, 3], worker: Box::new(worker) }])
    }

    fn reset(&self) {
        let shared = &self.shared;
        *shared.change.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // A new driver starts with an empty balloon; what the embedder wants, it still wants.
        shared.actual.store(0, Ordering::Release);
        shared.hint.store(HINT_STOP, Ordering::Release);
        shared.ended.store(false, Ordering::Release);
    }

    fn save(&self) -> Saved {
        let shared = &self.shared;
        FORMAT.save(&BalloonState {
            target: shared.target.load(Ordering::Acquire),
            actual: shared.actual.load(Ordering::Acquire),
            hint: shared.hint.load(Ordering::Acquire),
            round: shared.round.load(Ordering::Acquire),
        })
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state: BalloonState = FORMAT.load(&self.name, sections)?;
        let shared = &self.shared;
        shared.target.store(state.target, Ordering::Release);
        shared.actual.store(state.actual, Ordering::Release);
        // Which pages of a round have been told is not saved: the driver has them back.
        let within = state.hint >= HINT_FIRST;
        shared.hint.store(if within { HINT_DONE } else { state.hint }, Ordering::Release);
        shared.hinted.store(false, Ordering::Release);
        shared.ended.store(within, Ordering::Release);
        shared.round.store(state.round, Ordering::Release);
        Ok(())
    }
}
