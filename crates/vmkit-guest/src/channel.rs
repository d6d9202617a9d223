//! The host's view of one command or file: what the guest has said of it, and the bytes that nobody
//! has read yet.
//!
//! What the guest says is checked against what it may say at this point. At most [`WINDOW`] bytes
//! per stream are kept.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{GuestError, Lost, ProtocolError};
use crate::protocol::{Exit, Failure, Flow, Stream, ToHost, WINDOW, flags};

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A command with these of [`flags`].
    Command(u8),
    Read,
    Write,
}

/// The guest's first word of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    Started { process: u32 },
    Opened { mode: u32, size: u64 },
}

/// Bytes from the guest.
#[derive(Default)]
pub(crate) struct Pipe {
    data: VecDeque<u8>,
    /// Bytes that the guest may send.
    room: u32,
    /// Bytes that were read, which the guest has not been told.
    taken: u32,
    ended: bool,
    /// Nobody reads it any more.
    abandoned: bool,
}

impl Pipe {
    fn new(asked: bool) -> Self {
        let room = if asked { WINDOW } else { 0 };
        Self { room, ended: !asked, ..Self::default() }
    }
}

pub(crate) struct State {
    pub(crate) begun: Option<Begun>,
    pub(crate) failure: Option<Failure>,
    pub(crate) exit: Option<Exit>,
    pub(crate) stored: bool,
    /// Bytes that the guest has room for; none if it takes no more.
    pub(crate) input: Option<u32>,
    outputs: [Pipe; 2],
    lost: Option<Lost>,
}

pub(crate) struct Channel {
    id: u32,
    purpose: Purpose,
    state: Mutex<State>,
    changed: Condvar,
}

impl Channel {
    pub(crate) fn new(id: u32, purpose: Purpose) -> Self {
        let (input, output, error) = match purpose {
            Purpose::Command(asked) if asked & flags::TERMINAL != 0 => (true, true, false),
            Purpose::Command(asked) => {
                (asked & flags::INPUT != 0, asked & flags::OUTPUT != 0, asked & flags::ERROR != 0)
            }
            Purpose::Read => (false, true, false),
            Purpose::Write => (true, false, false),
        };
        let state = State {
            begun: None,
            failure: None,
            exit: None,
            stored: false,
            input: input.then_some(WINDOW),
            outputs: [Pipe::new(output), Pipe::new(error)],
            lost: None,
        };
        Self { id, purpose, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message of the guest. True if it was the last of this channel.
    pub(crate) fn receive(&self, message: &ToHost<'_>) -> Result<bool, ProtocolError> {
        let mut state = self.lock();
        state.receive(self.id, self.purpose, message)?;
        let closed = state.is_closed(self.purpose);
        if closed {
            state.input = None;
        }
        drop(state);
        self.changed.notify_all();
        Ok(closed)
    }

    /// The connection is gone.
    pub(crate) fn lose(&self, lost: Lost) {
        let mut state = self.lock();
        state.lost.get_or_insert(lost);
        state.input = None;
        drop(state);
        self.changed.notify_all();
    }

    /// Undoes [`State::take_room`]: the bytes could not be sent. Others may wait for the room.
    pub(crate) fn keep_room(&self, count: usize) {
        if let Some(room) = &mut self.lock().input {
            *room += count as u32;
        }
        self.changed.notify_all();
    }

    /// Waits for bytes of `stream` and takes them: none once there will be no more.
    pub(crate) fn read(
        &self,
        stream: Stream,
        into: &mut [u8],
        timeout: Option<Duration>,
    ) -> Result<usize, GuestError> {
        let (count, drained) = self.wait(timeout, |state| {
            let count = state.read(stream, into)?;
            Some((count, count > 0 && state.is_drained(stream)))
        })?;
        if drained {
            self.changed.notify_all();
        }
        Ok(count)
    }

    /// Takes bytes of `stream` as [`read`](Self::read) does, without waiting.
    pub(crate) fn read_at_once(&self, stream: Stream, into: &mut [u8]) -> Option<usize> {
        self.read(stream, into, Some(Duration::ZERO)).ok()
    }

    /// Nobody reads `stream` any more. True if the guest should be told.
    pub(crate) fn abandon(&self, stream: Stream) -> bool {
        let tell = self.lock().abandon(stream);
        self.changed.notify_all();
        tell
    }

    /// Waits until `find` finds something, but not longer than `timeout`. What `find` changes in a way
    /// that others wait for has to be told to them.
    pub(crate) fn wait<T>(
        &self,
        timeout: Option<Duration>,
        mut find: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, GuestError> {
        let limit = timeout.unwrap_or(Duration::MAX);
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.lock();
        loop {
            if let Some(found) = find(&mut state) {
                return Ok(found);
            }
            if let Some(lost) = state.lost {
                return Err(lost.into());
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(GuestError::TimedOut(limit));
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl State {
    fn receive(
        &mut self,
        id: u32,
        purpose: Purpose,
        message: &ToHost<'_>,
    ) -> Result<(), ProtocolError> {
        let begun = self.begun.is_some();
        let command = matches!(purpose, Purpose::Command(_));
        match *message {
            ToHost::Started(process) if command && !begun => {
                self.begun = Some(Begun::Started { process });
            }
            ToHost::Opened { mode, size } if purpose == Purpose::Read && !begun => {
                self.begun = Some(Begun::Opened { mode, size });
            }
            // A command that runs can only exit.
            ToHost::Failed(failure) if !(command && begun) => self.failure = Some(failure),
            ToHost::Exited(exit) if command && begun && self.exit.is_none() => {
                self.exit = Some(exit);
                self.input = None;
            }
            ToHost::Stored if purpose == Purpose::Write => self.stored = true,
            ToHost::Flow(Stream::Input, Flow::Credit(bytes)) => {
                if let Some(room) = &mut self.input {
                    let sum = room.checked_add(bytes).filter(|&sum| sum <= WINDOW);
                    *room = sum.ok_or(ProtocolError::Window(id))?;
                }
            }
            ToHost::Flow(Stream::Input, Flow::Close) if command && begun => self.input = None,
            ToHost::Flow(stream, flow) if begun => {
                let pipe = self.pipe(stream).filter(|pipe| !pipe.ended);
                let pipe = pipe.ok_or(ProtocolError::OutOfPlace(id))?;
                match flow {
                    Flow::Data(bytes) => pipe.push(bytes).ok_or(ProtocolError::Window(id))?,
                    Flow::End => pipe.ended = true,
                    _ => return Err(ProtocolError::OutOfPlace(id)),
                }
            }
            _ => return Err(ProtocolError::OutOfPlace(id)),
        }
        Ok(())
    }

    fn pipe(&mut self, stream: Stream) -> Option<&mut Pipe> {
        let [output, error] = &mut self.outputs;
        match stream {
            Stream::Input => None,
            Stream::Output => Some(output),
            Stream::Error => Some(error),
        }
    }

    /// True if the guest has said its last word of this channel.
    fn is_closed(&self, purpose: Purpose) -> bool {
        let silent = self.outputs.iter().all(|pipe| pipe.ended);
        self.failure.is_some()
            || match purpose {
                Purpose::Command(_) => self.exit.is_some() && silent,
                Purpose::Read => self.begun.is_some() && silent,
                Purpose::Write => self.stored,
            }
    }

    /// Takes bytes of `stream`: none if there are none yet, zero if there will be no more.
    fn read(&mut self, stream: Stream, into: &mut [u8]) -> Option<usize> {
        let failed = self.failure.is_some();
        let pipe = self.pipe(stream)?;
        if pipe.data.is_empty() {
            return (pipe.ended || failed || into.is_empty()).then_some(0);
        }
        let (front, _) = pipe.data.as_slices();
        let count = front.len().min(into.len());
        into.iter_mut().zip(front).for_each(|(to, from)| *to = *from);
        pipe.data.drain(..count);
        pipe.taken += count as u32;
        Some(count)
    }

    /// Bytes that are kept for readers.
    #[cfg(feature = "testing")]
    pub(crate) fn kept(&self) -> usize {
        self.outputs.iter().map(|pipe| pipe.data.len()).sum()
    }

    /// True if a read of `stream` would not wait.
    pub(crate) fn has_word(&self, stream: Stream) -> bool {
        let [output, error] = &self.outputs;
        let pipe = if stream == Stream::Error { error } else { output };
        !pipe.data.is_empty() || pipe.ended || self.failure.is_some()
    }

    /// True if `stream` has said all and it was read.
    pub(crate) fn is_drained(&mut self, stream: Stream) -> bool {
        self.pipe(stream).is_none_or(|pipe| pipe.ended && pipe.data.is_empty())
    }

    /// Room of `stream` that the guest should be told of: the caller does.
    pub(crate) fn take_credit(&mut self, stream: Stream) -> Option<u32> {
        let pipe = self.pipe(stream)?;
        if pipe.ended || pipe.taken < WINDOW / 2 {
            return None;
        }
        let credit = std::mem::take(&mut pipe.taken);
        pipe.room += credit;
        Some(credit)
    }

    /// Undoes [`take_credit`](Self::take_credit): the guest could not be told.
    pub(crate) fn keep_credit(&mut self, stream: Stream, credit: u32) {
        if let Some(pipe) = self.pipe(stream) {
            pipe.taken += credit;
            pipe.room = pipe.room.saturating_sub(credit);
        }
    }

    fn abandon(&mut self, stream: Stream) -> bool {
        let Some(pipe) = self.pipe(stream) else { return false };
        pipe.data = VecDeque::new();
        pipe.abandoned = true;
        !pipe.ended
    }

    /// Takes the right to send up to `most` bytes: none if there is no room yet, zero if there
    /// will be none.
    pub(crate) fn take_room(&mut self, most: usize) -> Option<usize> {
        match &mut self.input {
            None => Some(0),
            Some(0) => None,
            Some(room) => {
                let count = most.min(*room as usize);
                *room -= count as u32;
                Some(count)
            }
        }
    }
}

impl Pipe {
    /// Keeps bytes of the guest; none if it had no right to send so many.
    fn push(&mut self, bytes: &[u8]) -> Option<()> {
        self.room = self.room.checked_sub(u32::try_from(bytes.len()).ok()?)?;
        if !self.abandoned {
            self.data.extend(bytes);
        }
        Some(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A command that has written and ended, and somebody who waits for the last of it to be read.
    fn wakes_who_waits_for_the_last_byte(take: impl FnOnce(&Channel)) {
        let channel = Channel::new(1, Purpose::Command(flags::OUTPUT));
        let word = |flow| ToHost::Flow(Stream::Output, flow);
        for message in [
            ToHost::Started(42),
            word(Flow::Data(b"last")),
            ToHost::Exited(Exit::Code(0)),
            word(Flow::End),
        ] {
            channel.receive(&message).unwrap();
        }
        let (looked, looks) = mpsc::channel();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                // Only a waiter that nobody wakes waits so long.
                channel.wait(Some(Duration::from_secs(20)), |state| {
                    let _ = looked.send(());
                    state.is_drained(Stream::Output).then_some(())
                })
            });
            // It has the lock until it waits.
            looks.recv().unwrap();
            take(&channel);
            looks.recv_timeout(Duration::from_secs(10)).unwrap();
            waiter.join().unwrap().unwrap();
        });
    }

    #[test]
    fn reading_the_last_bytes_wakes_who_waits_for_that() {
        wakes_who_waits_for_the_last_byte(|channel| {
            let mut bytes = [0; 8];
            assert_eq!(channel.read(Stream::Output, &mut bytes, None).unwrap(), 4);
        });
    }

    #[test]
    fn leaving_the_last_bytes_wakes_who_waits_for_that() {
        wakes_who_waits_for_the_last_byte(|channel| {
            assert!(!channel.abandon(Stream::Output), "the guest knows");
        });
    }
}
