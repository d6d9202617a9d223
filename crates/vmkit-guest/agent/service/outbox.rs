//! Bytes on their way to the host.

use core::ops::DerefMut;

use crate::protocol::{HEADER, MAX_PIECE, Stream, ToHost, data_header};

/// Bytes of an outbox.
pub(crate) const SIZE: usize = 256 << 10;
/// Room that data leaves to other messages.
const RESERVE: usize = 4 << 10;
/// More than any message without data.
const LONGEST: usize = 64;
/// With less room than this, data waits.
const WORTHWHILE: usize = 4 << 10;

/// A queue of frames in a buffer that never grows.
pub(crate) struct Outbox<B> {
    buffer: B,
    start: usize,
    end: usize,
}

impl<B: DerefMut<Target = [u8]>> Outbox<B> {
    pub(crate) fn new(buffer: B) -> Self {
        Self { buffer, start: 0, end: 0 }
    }

    pub(crate) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or(&[])
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.start = self.end.min(self.start + count);
        if self.start == self.end {
            self.clear();
        }
    }

    fn room(&self) -> usize {
        self.buffer.len() - (self.end - self.start)
    }

    pub(crate) fn has_room_for_an_answer(&self) -> bool {
        self.room() >= LONGEST
    }

    pub(crate) fn has_room_for_data(&self) -> bool {
        self.room() >= RESERVE + HEADER + WORTHWHILE
    }

    /// All room behind the frames, in one piece.
    fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.buffer.get_mut(self.end..).unwrap_or(&mut [])
    }

    /// Appends a message without data. There must be room for an answer.
    pub(crate) fn push(&mut self, channel: u32, message: &ToHost<'_>) {
        if self.buffer.len() - self.end < LONGEST {
            self.space();
        }
        let space = self.buffer.get_mut(self.end..).unwrap_or(&mut []);
        self.end += message.encode(channel, space).unwrap_or(0);
    }

    /// Appends at most `most` bytes of a stream, which `read` puts where it is shown. Returns what
    /// `read` does, or nothing if there is no room.
    pub(crate) fn push_data<E>(
        &mut self,
        channel: u32,
        stream: Stream,
        most: usize,
        read: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Option<Result<usize, E>> {
        if !self.has_room_for_data() {
            return None;
        }
        let most = most.min(MAX_PIECE).min(self.room() - RESERVE - HEADER);
        if self.buffer.len() - self.end < most + HEADER {
            self.space();
        }
        let end = self.end;
        let (head, body) = self.buffer.get_mut(end..)?.split_at_mut_checked(HEADER)?;
        let body = body.get_mut(..most)?;
        let count = match read(body) {
            Ok(count) => count.min(most),
            Err(error) => return Some(Err(error)),
        };
        if count > 0 {
            head.copy_from_slice(&data_header(stream, channel, u16::try_from(count).ok()?));
            self.end = end + HEADER + count;
        }
        Some(Ok(count))
    }
}
