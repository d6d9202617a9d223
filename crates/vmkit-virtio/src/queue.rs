//! A queue as a worker sees it: chains out, used buffers in, interrupts the driver asked for.
//!
//! What is in the rings is [`ring`](crate::ring)'s.

use std::sync::Arc;

use virtio_queue::QueueState;
use vmkit_memory::GuestRam;

use crate::ring::{Refused, Ring};
use crate::{Chain, Fault, Interrupt};

/// Bytes after which a worker's turn is over, though there be more: a lane heeds a stop only between
/// turns.
pub(crate) const TURN_BYTES: u64 = 16 << 20;

/// What a worker has to say after it worked on a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All available buffers are taken, or those that were taken and put back are too few; a
    /// notification must tell of the next.
    Drained,
    /// Buffers are left because there is nothing to put in, or no room for what is in them. An event
    /// of the worker's own will bring it back.
    Waiting,
    /// There is more to do, but others should have their turn.
    More,
}

/// One active queue.
pub struct VirtQueue {
    index: u16,
    ring: Ring,
    memory: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    completed: bool,
}

impl std::fmt::Debug for VirtQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtQueue")
            .field("index", &self.index)
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

impl VirtQueue {
    /// Checks a queue's setup against guest memory and makes it active.
    pub(crate) fn new(
        index: u16,
        state: QueueState,
        memory: GuestRam,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, Fault> {
        let ring = Ring::new(state, &memory).map_err(Fault::ring(index))?;
        Ok(Self { index, ring, memory, interrupt, completed: false })
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Most chains it holds.
    #[inline]
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Guest memory.
    #[inline]
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// Takes the next available chain into `chain`; false if there is none.
    ///
    /// # Errors
    /// [`Fault`] if the ring or the chain is malformed.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        self.ring.pop(chain, &self.memory).map_err(|refused| match refused {
            Refused::Ring(source) => Fault::Ring { queue: self.index, source },
            Refused::Chain(head, what) => Fault::Chain { queue: self.index, head, what },
        })
    }

    /// True if a chain is available.
    ///
    /// # Errors
    /// [`Fault::Ring`] if the ring cannot be read.
    pub fn has_available(&self) -> Result<bool, Fault> {
        self.ring.has_available().map_err(Fault::ring(self.index))
    }

    /// Puts the chain taken last back, to be taken again.
    pub fn undo_pop(&mut self) {
        self.ring.undo_pop();
    }

    /// Gives the chain `head` back to the driver with `written` bytes written into it.
    ///
    /// # Errors
    /// [`Fault::Ring`] if the ring cannot be written.
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), Fault> {
        self.ring.complete(head, written).map_err(Fault::ring(self.index))?;
        self.completed = true;
        Ok(())
    }

    /// Interrupts the driver if chains were completed since the last time and it wants to know.
    ///
    /// # Errors
    /// [`Fault::Ring`] if the ring cannot be read.
    pub fn signal(&mut self) -> Result<(), Fault> {
        if std::mem::take(&mut self.completed) {
            let wanted = self.ring.wants_interrupt().map_err(Fault::ring(self.index))?;
            if wanted {
                self.interrupt.queue(self.index);
            }
        }
        Ok(())
    }

    /// Asks the driver for notifications; true if buffers came in between.
    pub(crate) fn enable_notification(&mut self) -> Result<bool, Fault> {
        self.ring.enable_notification().map_err(Fault::ring(self.index))
    }

    /// Tells the driver to spare its notifications.
    pub(crate) fn disable_notification(&mut self) -> Result<(), Fault> {
        self.ring.disable_notification().map_err(Fault::ring(self.index))
    }

    /// Next entry of the available ring, next entry of the used ring.
    pub(crate) fn positions(&self) -> (u16, u16) {
        self.ring.positions()
    }
}

/// The active queues of a lane, by number.
#[derive(Debug, Default)]
pub struct Queues {
    queues: Vec<VirtQueue>,
}

impl Queues {
    pub(crate) fn new(queues: Vec<VirtQueue>) -> Self {
        Self { queues }
    }

    /// Queue number `index`, if the driver set it up.
    pub fn get(&mut self, index: u16) -> Option<&mut VirtQueue> {
        self.queues.iter_mut().find(|q| q.index == index)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &VirtQueue> {
        self.queues.iter()
    }

    pub(crate) fn remove(&mut self, index: u16) {
        self.queues.retain(|q| q.index != index);
    }

    pub(crate) fn signal(&mut self) -> Result<(), Fault> {
        self.queues.iter_mut().try_for_each(VirtQueue::signal)
    }
}
