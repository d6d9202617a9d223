//! One stream to an agent, and the threads that keep it moving: one reads, one writes.
//!
//! The reader never waits for anything but the guest, so that no slow consumer holds up others.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::channel::{Channel, Purpose};
use crate::error::{GuestError, Lost, ProtocolError};
use crate::hello::Dialler;
use crate::outgoing::Outgoing;
use crate::protocol::{HEADER, MAX_CHANNELS, MAX_PAYLOAD, ToAgent, ToHost, VERSION, split_frame};

/// Channels that are open, by number.
#[derive(Default)]
pub(crate) struct Channels {
    open: HashMap<u32, Arc<Channel>>,
    last: u32,
    lost: Option<Lost>,
}

impl Channels {
    /// Opens a channel under a number that no open one has.
    pub(crate) fn open(&mut self, purpose: Purpose) -> Result<Arc<Channel>, GuestError> {
        if let Some(lost) = self.lost {
            return Err(lost.into());
        }
        if self.open.len() >= MAX_CHANNELS {
            return Err(GuestError::Busy(MAX_CHANNELS));
        }
        while self.last == 0 || self.open.contains_key(&self.last) {
            self.last = self.last.wrapping_add(1);
        }
        let channel = Arc::new(Channel::new(self.last, purpose));
        self.open.insert(self.last, channel.clone());
        self.last = self.last.wrapping_add(1);
        Ok(channel)
    }

    /// Takes the frames at the beginning of `bytes`. Returns what is left.
    pub(crate) fn receive<'a>(&mut self, mut bytes: &'a [u8]) -> Result<&'a [u8], ProtocolError> {
        while let Some((frame, rest)) = split_frame(bytes) {
            let message = ToHost::parse(&frame)?;
            let id = frame.channel;
            let channel = self.open.get(&id).ok_or(ProtocolError::Channel(id))?;
            if channel.receive(&message)? {
                self.open.remove(&id);
            }
            bytes = rest;
        }
        Ok(bytes)
    }

    /// Tells everybody that nothing will come any more.
    pub(crate) fn lose(&mut self, lost: Lost) {
        self.lost.get_or_insert(lost);
        for (_, channel) in self.open.drain() {
            channel.lose(lost);
        }
    }
}

/// What the threads share with those who use the connection.
struct Shared {
    stream: UnixStream,
    outgoing: Arc<Outgoing>,
    channels: Mutex<Channels>,
}

impl Shared {
    fn channels(&self) -> MutexGuard<'_, Channels> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, lost: Lost) {
        // The first word counts, and the other thread will have one too.
        self.channels().lose(lost);
        self.outgoing.lose(lost);
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The reader's work.
    fn read(&self) -> Lost {
        let mut buffer = vec![0; 2 * (HEADER + MAX_PAYLOAD)];
        let mut filled = 0;
        loop {
            match (&self.stream).read(buffer.get_mut(filled..).unwrap_or(&mut [])) {
                Ok(0) => return Lost::Ended,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Lost::Stream(error.kind()),
            }
            let bytes = buffer.get(..filled).unwrap_or(&[]);
            let left = match self.channels().receive(bytes) {
                Ok(rest) => rest.len(),
                Err(error) => return Lost::Protocol(error),
            };
            buffer.copy_within(filled - left..filled, 0);
            filled = left;
        }
    }

    /// The writer's work.
    fn write(&self) -> Lost {
        let mut frames = Vec::new();
        while self.outgoing.take(&mut frames) {
            if let Err(error) = (&self.stream).write_all(&frames) {
                return match error.kind() {
                    io::ErrorKind::BrokenPipe => Lost::Ended,
                    kind => Lost::Stream(kind),
                };
            }
            frames.clear();
        }
        Lost::Ended
    }
}

/// A connection to an agent. It ends when the last user is gone, and its commands with it.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Connection {
    /// Greets the agent that has said hello.
    pub(crate) fn new(agent: Dialler) -> Result<Self, GuestError> {
        let stream = agent.into_stream()?;
        let shared =
            Arc::new(Shared { stream, outgoing: Arc::default(), channels: Mutex::default() });
        shared.outgoing.send_at_once(0, &ToAgent::Hello(VERSION));
        let mut connection = Self { shared, threads: Vec::new() };
        connection.spawn("guest-reader", Shared::read)?;
        connection.spawn("guest-writer", Shared::write)?;
        Ok(connection)
    }

    fn spawn(&mut self, name: &str, work: fn(&Shared) -> Lost) -> Result<(), GuestError> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let lost = work(&shared);
            if let Lost::Protocol(error) = lost {
                log::warn!("the guest's agent misbehaved: {error}");
            }
            shared.lose(lost);
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Opens a channel with `message`.
    pub(crate) fn open(
        &self,
        purpose: Purpose,
        message: &ToAgent<'_>,
        timeout: Duration,
    ) -> Result<Arc<Channel>, GuestError> {
        let channel = self.shared.channels().open(purpose)?;
        let sent = self.send(channel.id(), message, timeout);
        if let Err(error) = sent {
            self.shared.channels().open.remove(&channel.id());
            return Err(error);
        }
        Ok(channel)
    }

    /// Where to send without keeping the connection open.
    pub(crate) fn outgoing(&self) -> Arc<Outgoing> {
        self.shared.outgoing.clone()
    }

    pub(crate) fn send(
        &self,
        channel: u32,
        message: &ToAgent<'_>,
        timeout: Duration,
    ) -> Result<(), GuestError> {
        self.shared.outgoing.send(channel, message, timeout)
    }

    pub(crate) fn send_at_once(&self, channel: u32, message: &ToAgent<'_>) {
        self.shared.outgoing.send_at_once(channel, message);
    }

    /// True until the connection is lost.
    pub(crate) fn is_alive(&self) -> bool {
        self.shared.channels().lost.is_none()
    }

    /// Ends the connection.
    pub(crate) fn close(&self) {
        self.shared.lose(Lost::Ended);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
        for thread in self.threads.drain(..) {
            // Its panics are bugs that the test suite looks for; there is nobody to tell here.
            let _ = thread.join();
        }
    }
}
