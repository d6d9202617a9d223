//! What a balloon's queues carry (virtio 1.2 §5.5.6).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmkit_memory::{GuestAddress, discard};

use super::{HINT_FIRST, HINT_STOP, PAGE, Shared};
use crate::fault::Rarely;
use crate::queue::TURN_BYTES;
use crate::{Chain, Fault, Progress, Queues, Segment, VirtQueue, Worker};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Page numbers taken from one chain. A driver sends 256 at a time.
const MOST_PAGES: usize = 4096;

pub(super) struct BalloonWorker {
    name: String,
    shared: Arc<Shared>,
    hints: Option<u16>,
    reports: Option<u16>,
    chain: Chain,
    errors: Rarely,
    /// The round whose free pages the driver is telling, or [`HINT_STOP`].
    telling: u32,
}

impl BalloonWorker {
    pub(super) fn new(
        name: String,
        shared: Arc<Shared>,
        hints: Option<u16>,
        reports: Option<u16>,
    ) -> Self {
        let errors = Rarely::default();
        Self { name, shared, hints, reports, chain: Chain::new(), errors, telling: HINT_STOP }
    }

    fn give(&self, queue: &VirtQueue, at: u64, len: u64) {
        match discard(queue.memory(), GuestAddress(at), len) {
            Ok(given) => {
                self.shared.given.fetch_add(given, Ordering::AcqRel);
            }
            Err(error) => {
                let name = &self.name;
                self.errors.log(|n| log::warn!("{name}: pages not given back ({n}): {error}"));
            }
        }
    }

    /// Gives the pages whose numbers are in the chain back, runs of them at once. Numbers that are
    /// no RAM are passed over. Answers how many bytes that are.
    fn inflate(&self, queue: &VirtQueue) -> Result<u64, Fault> {
        let mut reader = self.chain.reader(queue.memory());
        if !reader.remaining().is_multiple_of(4) || reader.remaining() / 4 > MOST_PAGES as u64 {
            return Err(Fault::Request("a balloon request of an impossible length"));
        }
        let bytes = reader.remaining() / 4 * PAGE;
        let mut run: Option<(u64, u64)> = None;
        while reader.remaining() > 0 {
            let at = u64::from(u32::from_le_bytes(reader.read_array()?)) * PAGE;
            run = match run {
                Some((start, len)) if start + len == at => Some((start, len + PAGE)),
                // Drivers often go downwards.
                Some((start, len)) if at + PAGE == start => Some((at, len + PAGE)),
                other => {
                    if let Some((start, len)) = other {
                        self.give(queue, start, len);
                    }
                    Some((at, PAGE))
                }
            };
        }
        if let Some((start, len)) = run {
            self.give(queue, start, len);
        }
        Ok(bytes)
    }

    /// Gives back the buffers themselves: they are free pages. Answers how many bytes that are.
    fn report(&self, queue: &VirtQueue, buffers: &[Segment]) -> u64 {
        let give = |buffer: &Segment| {
            self.give(queue, buffer.addr, buffer.len.into());
            u64::from(buffer.len)
        };
        buffers.iter().map(give).sum()
    }

    /// A readable buffer is the number of a round that begins or the stop of one; writable ones are
    /// free pages of the round (§5.5.6.6).
    fn hint(&mut self, queue: &VirtQueue) -> Result<u64, Fault> {
        let wanted = self.shared.hint.load(Ordering::Acquire);
        if !self.chain.readable().is_empty() {
            let said = u32::from_le_bytes(self.chain.reader(queue.memory()).read_array()?);
            // The end of a round that is wanted no more says nothing of the one that is.
            if said == HINT_STOP && self.telling >= HINT_FIRST && self.telling == wanted {
                self.shared.hinted.store(true, Ordering::Release);
            }
            self.telling = if said == wanted { said } else { HINT_STOP };
        }
        let mut bytes = 0;
        if self.telling >= HINT_FIRST && self.telling == wanted {
            for buffer in self.chain.writable().chunks(1) {
                let giving = self.shared.giving();
                if self.shared.hint.load(Ordering::Acquire) != wanted {
                    break;
                }
                bytes += self.report(queue, buffer);
                drop(giving);
            }
        }
        Ok(bytes)
    }
}

impl Worker for BalloonWorker {
    fn process(&mut self, queues: &mut Queues, index: u16) -> Result<Progress, Fault> {
        self.shared.announce_end();
        let Some(queue) = queues.get(index) else { return Ok(Progress::Waiting) };
        let mut work = 0;
        for _ in 0..queue.size() {
            if work >= TURN_BYTES {
                break;
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            work += match index {
                INFLATE => self.inflate(queue)?,
                // The pages come back by themselves when they are touched.
                DEFLATE => 0,
                _ if Some(index) == self.hints => self.hint(queue)?,
                _ if Some(index) == self.reports => self.report(queue, self.chain.writable()),
                _ => return Err(Fault::Request("a balloon queue that was not agreed on")),
            };
            queue.complete(self.chain.head(), 0)?;
        }
        Ok(Progress::More)
    }
}
