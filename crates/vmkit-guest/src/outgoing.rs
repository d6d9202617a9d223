//! Frames on their way to the guest.
//!
//! Bounded: who wants to send waits until the guest has taken enough of what was sent before, or
//! until time is up.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{GuestError, Lost};
use crate::protocol::{HEADER, MAX_PAYLOAD, ToAgent};

/// Bytes that wait at most, beside one frame and the words that close channels.
const MOST: usize = 256 << 10;

#[derive(Default)]
pub(crate) struct Outgoing {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    lost: Option<Lost>,
}

impl Outgoing {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `message`, at the latest after `timeout`.
    pub(crate) fn send(
        &self,
        channel: u32,
        message: &ToAgent<'_>,
        timeout: Duration,
    ) -> Result<(), GuestError> {
        let mut queue = self.lock();
        let deadline = Instant::now().checked_add(timeout);
        while queue.lost.is_none() && queue.bytes.len() >= MOST {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.unwrap_or(Duration::MAX);
            if left.is_zero() {
                return Err(GuestError::TimedOut(timeout));
            }
            queue =
                self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match queue.lost {
            Some(lost) => Err(lost.into()),
            None => self.push(queue, channel, message),
        }
    }

    /// Queues `message` without waiting. For words of which each channel has a fixed number.
    pub(crate) fn send_at_once(&self, channel: u32, message: &ToAgent<'_>) {
        let queue = self.lock();
        if queue.lost.is_none() {
            // Short messages are never too long.
            let _ = self.push(queue, channel, message);
        }
    }

    fn push(
        &self,
        mut queue: MutexGuard<'_, Queue>,
        channel: u32,
        message: &ToAgent<'_>,
    ) -> Result<(), GuestError> {
        let start = queue.bytes.len();
        // Exact for data; other long messages are rare.
        let room = match message {
            ToAgent::Flow(_, crate::protocol::Flow::Data(bytes)) => bytes.len(),
            ToAgent::Exec(_) | ToAgent::Read(_) | ToAgent::Write { .. } => MAX_PAYLOAD,
            _ => 16,
        };
        queue.bytes.resize(start + HEADER + room, 0);
        let space = queue.bytes.get_mut(start..).unwrap_or(&mut []);
        let written = message.encode(channel, space);
        queue.bytes.truncate(start + written.unwrap_or(0));
        drop(queue);
        self.changed.notify_all();
        written.map(drop).ok_or_else(|| GuestError::TooLong("a message".into()))
    }

    /// Waits for frames and puts them into `into`, which is empty. False once the connection is
    /// lost.
    pub(crate) fn take(&self, into: &mut Vec<u8>) -> bool {
        let mut queue = self.lock();
        while queue.bytes.is_empty() && queue.lost.is_none() {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.lost.is_some() {
            return false;
        }
        std::mem::swap(&mut queue.bytes, into);
        drop(queue);
        self.changed.notify_all();
        true
    }

    /// Nothing is sent any more.
    pub(crate) fn lose(&self, lost: Lost) {
        let mut queue = self.lock();
        queue.lost.get_or_insert(lost);
        queue.bytes = Vec::new();
        drop(queue);
        self.changed.notify_all();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::protocol::{Flow, MAX_PIECE, Stream};

    #[test]
    fn a_guest_that_takes_nothing_makes_the_host_keep_little() {
        let outgoing = Outgoing::default();
        let piece = vec![0; MAX_PIECE];
        let data = ToAgent::Flow(Stream::Input, Flow::Data(&piece));
        let enough = 4 * MOST / MAX_PIECE;
        let sent = (0..enough).take_while(|_| outgoing.send(1, &data, Duration::ZERO).is_ok());
        assert!(sent.count() >= MOST / (HEADER + MAX_PIECE));
        let refused = outgoing.send(1, &data, Duration::ZERO);
        assert!(matches!(refused, Err(GuestError::TimedOut(_))), "{refused:?}");
        assert!(outgoing.lock().bytes.len() < MOST + HEADER + MAX_PIECE);
        // A word that ends something still finds its place.
        outgoing.send_at_once(1, &ToAgent::Signal(9));
        let mut taken = Vec::new();
        assert!(outgoing.take(&mut taken));
        assert!(taken.ends_with(&[9]));
        assert!(outgoing.send(1, &data, Duration::ZERO).is_ok());
    }
}
