//! Bytes of an input stream that its reader has not taken yet.

use core::ops::DerefMut;

use crate::protocol::WINDOW;

/// Bytes of a ring's buffer: what the host may have under way.
pub(crate) const SIZE: usize = WINDOW as usize;

/// A queue of bytes in a buffer that never grows.
pub(crate) struct Ring<B> {
    buffer: B,
    head: usize,
    len: usize,
}

impl<B: DerefMut<Target = [u8]>> Ring<B> {
    pub(crate) fn new(buffer: B) -> Self {
        Self { buffer, head: 0, len: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes all of `bytes`, or nothing and says false.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        let size = self.buffer.len();
        if bytes.len() > size - self.len {
            return false;
        }
        let tail = (self.head + self.len) % size.max(1);
        let (first, second) = bytes.split_at(bytes.len().min(size - tail));
        for (at, piece) in [(tail, first), (0, second)] {
            if let Some(place) = self.buffer.get_mut(at..at + piece.len()) {
                place.copy_from_slice(piece);
            }
        }
        self.len += bytes.len();
        true
    }

    /// The bytes at the front that lie together.
    pub(crate) fn front(&self) -> &[u8] {
        let end = (self.head + self.len).min(self.buffer.len());
        self.buffer.get(self.head..end).unwrap_or(&[])
    }

    /// The first `count` bytes are no longer wanted.
    pub(crate) fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.head = (self.head + count) % self.buffer.len().max(1);
        self.len -= count;
    }
}
