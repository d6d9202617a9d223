//! When things happened in a machine's life.

use std::sync::OnceLock;
use std::time::Instant;

/// Moments of a machine's life, by the host's monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeline {
    /// [`VmBuilder::build`](crate::VmBuilder::build) was called.
    pub build_began: Instant,
    /// Memory, partition and devices were there; the guest's image was about to be loaded.
    pub load_began: Instant,
    /// The guest's image was in memory.
    pub loaded: Instant,
    /// The machine was ready to start.
    pub built: Instant,
    /// vCPU 0 was about to execute its first instruction.
    pub first_instruction: Option<Instant>,
    /// Every vCPU had left the guest for good.
    pub ended: Option<Instant>,
}

/// The recorder of a [`Timeline`].
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) build_began: Instant,
    pub(crate) load_began: Instant,
    pub(crate) loaded: Instant,
    pub(crate) built: Instant,
    first_instruction: OnceLock<Instant>,
    ended: OnceLock<Instant>,
}

impl Recorder {
    /// A recorder of a build that begins now.
    pub(crate) fn begin() -> Self {
        let now = Instant::now();
        Self {
            build_began: now,
            load_began: now,
            loaded: now,
            built: now,
            first_instruction: OnceLock::new(),
            ended: OnceLock::new(),
        }
    }

    pub(crate) fn set_first_instruction(&self, at: Instant) {
        let _ = self.first_instruction.set(at);
    }

    pub(crate) fn set_ended(&self, at: Instant) {
        let _ = self.ended.set(at);
    }

    pub(crate) fn read(&self) -> Timeline {
        Timeline {
            build_began: self.build_began,
            load_began: self.load_began,
            loaded: self.loaded,
            built: self.built,
            first_instruction: self.first_instruction.get().copied(),
            ended: self.ended.get().copied(),
        }
    }
}
