//! What the agent does, without the kernel it does it with: channels, their streams, and the bytes
//! to be sent to the host.
//!
//! A [`Service`] is told of frames, of files that are ready and of processes that ended, and acts
//! through an [`Os`]. It never waits and keeps a fixed number of channels with a fixed amount of bytes
//! each. What the host says is checked all the same: a mistake of the host must not become
//! something that the guest's own programs could use.

mod channel;
mod os;
mod outbox;
mod ring;

use self::channel::Channel;
use self::outbox::Outbox;
use crate::protocol::{
    Exec, Exit, Failure, Flow, Frame, MAX_CHANNELS, Malformed, Step, Stream, ToAgent, ToHost,
    VERSION,
};

pub(crate) use self::channel::{End, Want};
pub(crate) use self::os::{EAGAIN, EINTR, Errno, Opened, Os, Spawned};

/// The host broke the protocol; the connection must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Violation;

impl From<Malformed> for Violation {
    fn from(_: Malformed) -> Self {
        Self
    }
}

/// Where something is ready: a channel's place, and which of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    place: usize,
    end: End,
}

/// All that is under way for one host.
pub(crate) struct Service<O: Os> {
    os: O,
    channels: [Option<Channel<O>>; MAX_CHANNELS],
    outbox: Outbox<O::Buffer>,
    /// The host has said hello.
    greeted: bool,
    /// Who is asked first, so that nobody is always last.
    turn: usize,
}

impl<O: Os> Service<O> {
    pub(crate) fn new(mut os: O) -> Result<Self, Errno> {
        let outbox = Outbox::new(os.buffer(outbox::SIZE)?);
        let channels = [const { None }; MAX_CHANNELS];
        Ok(Self { os, channels, outbox, greeted: false, turn: 0 })
    }

    /// A connection begins. Nothing is left of the one before.
    pub(crate) fn greet(&mut self) {
        self.hang_up();
        self.outbox.push(0, &ToHost::Hello(VERSION));
    }

    /// A connection is lost: its commands are killed and its files closed.
    pub(crate) fn hang_up(&mut self) {
        self.greeted = false;
        self.outbox.clear();
        for slot in &mut self.channels {
            let gone = slot.as_mut().is_some_and(|channel| channel.abandon(&mut self.os));
            if gone {
                *slot = None;
            }
        }
    }

    /// True if a frame may be handed in: its answer would find room.
    pub(crate) fn may_receive(&self) -> bool {
        self.outbox.has_room_for_an_answer()
    }

    /// What is to be sent to the host.
    pub(crate) fn output(&self) -> &[u8] {
        self.outbox.bytes()
    }

    /// The first `count` bytes of the output have been sent.
    pub(crate) fn sent(&mut self, count: usize) {
        self.outbox.consume(count);
    }

    /// Takes one frame from the host.
    pub(crate) fn receive(&mut self, frame: &Frame<'_>) -> Result<(), Violation> {
        let message = ToAgent::parse(frame)?;
        if !self.greeted {
            self.greeted = matches!(message, ToAgent::Hello(VERSION)) && frame.channel == 0;
            return self.greeted.then_some(()).ok_or(Violation);
        }
        if frame.channel == 0 {
            return Err(Violation);
        }
        let id = frame.channel;
        match message {
            ToAgent::Hello(_) => return Err(Violation),
            ToAgent::Exec(exec) => self.exec(id, &exec)?,
            ToAgent::Read(path) => {
                self.open(id, |os| {
                    let opened = os.open_to_read(path).map_err(failed(Step::Open))?;
                    let answer = ToHost::Opened { mode: opened.mode, size: opened.size };
                    Ok((Channel::reading(id, opened.fd), Some(answer)))
                })?;
            }
            ToAgent::Write { mode, path } => self.open(id, |os| {
                let ring = os.buffer(ring::SIZE).map_err(failed(Step::Channel))?;
                let fd = os.open_to_write(path, mode).map_err(failed(Step::Open))?;
                Ok((Channel::writing(id, fd, ring), None))
            })?,
            // The host may not know yet that a channel is gone; what it says of it is void.
            ToAgent::Flow(stream, flow) => {
                let (os, channel) = match self.find(id) {
                    (os, Some(channel)) => (os, channel),
                    (_, None) => return Ok(()),
                };
                match (stream, flow) {
                    (Stream::Input, Flow::Data(bytes)) => channel.feed(os, bytes)?,
                    (Stream::Input, Flow::End) => channel.end_input(os),
                    (Stream::Input, Flow::Close) => channel.give_up(),
                    (Stream::Output | Stream::Error, Flow::Credit(bytes)) => {
                        channel.credit(stream, bytes)?;
                    }
                    (Stream::Output | Stream::Error, Flow::Close) => channel.close(stream),
                    _ => return Err(Violation),
                }
            }
            ToAgent::Signal(signal) => {
                if let (os, Some(channel)) = self.find(id) {
                    channel.signal(os, signal);
                }
            }
            ToAgent::Resize(size) => {
                if let (os, Some(channel)) = self.find(id) {
                    channel.resize(os, size);
                }
            }
        }
        Ok(())
    }

    fn find(&mut self, id: u32) -> (&mut O, Option<&mut Channel<O>>) {
        let channel = self.channels.iter_mut().flatten().find(|channel| channel.is(id));
        (&mut self.os, channel)
    }

    fn exec(&mut self, id: u32, exec: &Exec<'_>) -> Result<(), Violation> {
        self.open(id, |os| {
            let ring = os.buffer(ring::SIZE).map_err(failed(Step::Channel))?;
            Ok((Channel::command(id, os.spawn(exec)?, ring), None))
        })
    }

    /// Opens a channel, or says why not.
    fn open(
        &mut self,
        id: u32,
        make: impl FnOnce(&mut O) -> Result<(Channel<O>, Option<ToHost<'static>>), Failure>,
    ) -> Result<(), Violation> {
        if self.find(id).1.is_some() {
            return Err(Violation);
        }
        let Some(place) = self.channels.iter_mut().find(|slot| slot.is_none()) else {
            let failure = Failure { step: Step::Channel, errno: EAGAIN.0 };
            self.outbox.push(id, &ToHost::Failed(failure));
            return Ok(());
        };
        match make(&mut self.os) {
            Ok((channel, answer)) => {
                *place = Some(channel);
                if let Some(answer) = answer {
                    self.outbox.push(id, &answer);
                }
            }
            Err(failure) => self.outbox.push(id, &ToHost::Failed(failure)),
        }
        Ok(())
    }

    /// Names every file that the service waits for.
    pub(crate) fn interests(&self, mut each: impl FnMut(Token, &O::Fd, Want)) {
        let room = self.outbox.has_room_for_data();
        for offset in 0..MAX_CHANNELS {
            let place = (self.turn + offset) % MAX_CHANNELS;
            if let Some(Some(channel)) = self.channels.get(place) {
                channel.interests(room, |end, fd, want| each(Token { place, end }, fd, want));
            }
        }
    }

    /// A file is ready.
    pub(crate) fn ready(&mut self, token: Token) {
        if let Some(Some(channel)) = self.channels.get_mut(token.place) {
            channel.ready(&mut self.os, token.end, &mut self.outbox);
        }
    }

    /// Process numbers of all that have not been reaped.
    pub(crate) fn processes(&self) -> impl Iterator<Item = u32> {
        self.channels.iter().flatten().filter_map(Channel::process)
    }

    /// A process has ended. It may be one that the service knows nothing of.
    pub(crate) fn reaped(&mut self, process: u32, exit: Exit) {
        let mut channels = self.channels.iter_mut().flatten();
        if let Some(channel) = channels.find(|channel| channel.process() == Some(process)) {
            channel.reaped(&mut self.os, exit);
        }
    }

    /// Says what is owed to the host and sends as much as `send` takes. False if the connection has
    /// ended. To be called after each round of the above: what is left unsent afterwards is in the
    /// [`output`](Self::output), and nothing is left unsaid if that is empty.
    pub(crate) fn speak(&mut self, mut send: impl FnMut(&[u8]) -> Result<usize, Errno>) -> bool {
        loop {
            self.settle();
            // Something may have stayed unsaid, and no event would tell that there is room for it.
            let full = !self.may_receive();
            while !self.output().is_empty() {
                match send(self.output()) {
                    Ok(count) => self.sent(count),
                    Err(EINTR) => {}
                    Err(EAGAIN) => break,
                    Err(_) => return false,
                }
            }
            if !(full && self.may_receive()) {
                return true;
            }
        }
    }

    /// Says what is owed to the host as far as there is room, and forgets the channels that are
    /// through.
    fn settle(&mut self) {
        self.turn = (self.turn + 1) % MAX_CHANNELS;
        for slot in &mut self.channels {
            let done = slot.as_mut().is_some_and(|channel| channel.settle(&mut self.outbox));
            if done {
                *slot = None;
            }
        }
    }
}

fn failed(step: Step) -> impl Fn(Errno) -> Failure {
    move |errno| Failure { step, errno: errno.0 }
}
