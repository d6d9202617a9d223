//! Entry points for fuzz targets: each side of the protocol with a peer that says anything.
//!
//! Nothing here reaches a file or a process of the host.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use arbitrary::Arbitrary;

use crate::channel::{Channel, Purpose};
use crate::connection::Channels;
use crate::protocol::{
    Exec, Exit, Failure, MAX_CHANNELS, MAX_PIECE, Size, Step, Stream, ToAgent, ToHost, WINDOW,
    split_frame,
};
use crate::service::{EAGAIN, Errno, Opened, Os, Service, Spawned, Token};

/// What a host does while its guest says anything.
#[derive(Clone, Debug, Arbitrary)]
pub enum HostAct {
    /// The guest says these bytes, however they are framed.
    Hear(Vec<u8>),
    /// The guest says a frame: kind, stream, channel, payload.
    Frame(u8, u8, u8, Vec<u8>),
    /// A command with these flags is started.
    Exec(u8),
    /// A file is read.
    Read,
    /// A file is written.
    Write,
    /// A reader of the channel takes so many bytes of standard output, or of standard error.
    Take(u8, bool, u16),
    /// A writer of the channel wants to send so many bytes.
    Send(u8, u16),
    /// The reader of standard output, or of standard error, goes away.
    Drop(u8, bool),
}

/// Bytes of a frame as `Frame` describes it.
fn frame(kind: u8, stream: u8, channel: u8, payload: &[u8]) -> Vec<u8> {
    let payload = payload.get(..payload.len().min(u16::MAX.into())).unwrap_or(&[]);
    let [l0, l1] = (payload.len() as u16).to_le_bytes();
    [&[kind, stream, l0, l1, channel, 0, 0, 0], payload].concat()
}

fn output(error: bool) -> Stream {
    if error { Stream::Error } else { Stream::Output }
}

/// A host and a guest that may say anything.
///
/// # Panics
/// If the host keeps more than it may.
pub fn hostile_guest(acts: &[HostAct]) {
    let mut channels = Channels::default();
    let mut handles: Vec<Arc<Channel>> = Vec::new();
    let mut heard: Vec<u8> = Vec::new();
    for act in acts {
        let handle = |index: &u8| handles.get(usize::from(*index) % handles.len().max(1));
        match act {
            HostAct::Hear(bytes) => heard.extend(bytes),
            HostAct::Frame(kind, stream, channel, payload) => {
                heard.extend(frame(*kind, *stream, *channel, payload));
            }
            HostAct::Exec(_) | HostAct::Read | HostAct::Write => {
                let purpose = match act {
                    HostAct::Exec(flags) => Purpose::Command(*flags),
                    HostAct::Read => Purpose::Read,
                    _ => Purpose::Write,
                };
                handles.extend(channels.open(purpose).ok());
            }
            HostAct::Take(index, error, len) => {
                if let Some(channel) = handle(index) {
                    let mut bytes = vec![0; (*len).into()];
                    let taken = channel.read_at_once(output(*error), &mut bytes);
                    assert!(taken.unwrap_or(0) <= bytes.len());
                    if let Some(credit) = channel.lock().take_credit(output(*error)) {
                        assert!(credit <= WINDOW, "more room than there is");
                    }
                }
            }
            HostAct::Send(index, len) => {
                if let Some(channel) = handle(index) {
                    let count = channel.lock().take_room((*len).into());
                    assert!(count.unwrap_or(0) <= usize::from(*len));
                }
            }
            HostAct::Drop(index, error) => {
                if let Some(channel) = handle(index) {
                    channel.abandon(output(*error));
                }
            }
        }
        match channels.receive(&heard) {
            Ok(rest) => heard = rest.to_vec(),
            Err(_) => break,
        }
        assert!(handles.iter().map(|c| c.lock().kept()).all(|kept| kept <= 2 * WINDOW as usize));
    }
    channels.lose(crate::error::Lost::Ended);
    for channel in handles {
        let never = Some(std::time::Duration::ZERO);
        assert!(channel.wait(never, |state| state.take_room(1)).is_ok(), "a writer waits for ever");
    }
}

/// What an agent meets while its host says anything.
#[derive(Clone, Debug, Arbitrary)]
pub enum AgentAct {
    /// The host says these bytes, however they are framed.
    Hear(Vec<u8>),
    /// The host says a frame: kind, stream, channel, payload.
    Frame(u8, u8, u8, Vec<u8>),
    /// The host starts a command with these flags on a channel.
    Exec(u8, u8),
    /// The host opens a file on a channel, to write it if true.
    Open(u8, bool),
    /// What the next reads and writes of files come to: a number of bytes, or an error.
    Files(Vec<Result<u16, u8>>),
    /// One of the files that are waited for is ready.
    Ready(u8),
    /// One of the processes has ended.
    Reap(u8),
    /// The host takes so many bytes.
    Sent(u16),
    /// The connection is lost, and another is made.
    Again,
}

/// What a [`Mock`] has open, and what is to happen next.
#[derive(Default)]
struct World {
    files: usize,
    buffers: usize,
    processes: u32,
    script: VecDeque<Result<u16, u8>>,
}

/// Files and processes that are not there.
struct Mock(Rc<RefCell<World>>);

struct MockFile(Rc<RefCell<World>>);

impl MockFile {
    fn new(world: &Rc<RefCell<World>>) -> Self {
        world.borrow_mut().files += 1;
        Self(world.clone())
    }
}

impl Drop for MockFile {
    fn drop(&mut self) {
        self.0.borrow_mut().files -= 1;
    }
}

struct MockBuffer(Vec<u8>, Rc<RefCell<World>>);

impl std::ops::Deref for MockBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::DerefMut for MockBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for MockBuffer {
    fn drop(&mut self) {
        self.1.borrow_mut().buffers -= 1;
    }
}

impl Mock {
    /// The next outcome of a call that could move at most `most` bytes.
    fn next(&self, most: usize) -> Result<usize, Errno> {
        match self.0.borrow_mut().script.pop_front() {
            None => Err(EAGAIN),
            Some(Ok(count)) => Ok(usize::from(count).min(most)),
            Some(Err(error)) => Err(Errno(u16::from(error).max(1))),
        }
    }
}

impl Os for Mock {
    type Fd = MockFile;
    type Buffer = MockBuffer;

    fn buffer(&mut self, len: usize) -> Result<MockBuffer, Errno> {
        self.0.borrow_mut().buffers += 1;
        Ok(MockBuffer(vec![0; len], self.0.clone()))
    }

    fn spawn(&mut self, exec: &Exec<'_>) -> Result<Spawned<MockFile>, Failure> {
        let strings = 1 + exec.arguments().count() + exec.environment().count();
        let lengths = exec.directory().len()
            + exec.arguments().chain(exec.environment()).map(<[u8]>::len).sum::<usize>();
        assert_eq!(lengths, exec.strings.len(), "{strings} strings");
        if let Err(errno) = self.next(1) {
            return Err(Failure { step: Step::Fork, errno: errno.0 });
        }
        let file = |flag| exec.has(flag).then(|| MockFile::new(&self.0));
        let terminal = exec.has(crate::protocol::flags::TERMINAL);
        let [input, output, error] = if terminal {
            [Some(MockFile::new(&self.0)), Some(MockFile::new(&self.0)), None]
        } else {
            use crate::protocol::flags::{ERROR, INPUT, OUTPUT};
            [file(INPUT), file(OUTPUT), file(ERROR)]
        };
        let verdict = MockFile::new(&self.0);
        self.0.borrow_mut().processes += 1;
        let process = self.0.borrow().processes;
        Ok(Spawned { process, verdict, input, output, error, terminal })
    }

    fn open_to_read(&mut self, path: &[u8]) -> Result<Opened<MockFile>, Errno> {
        assert_eq!(path.iter().position(|&byte| byte == 0), Some(path.len() - 1));
        self.next(1).map(|_| Opened { fd: MockFile::new(&self.0), mode: 0, size: 0 })
    }

    fn open_to_write(&mut self, path: &[u8], mode: u16) -> Result<MockFile, Errno> {
        assert!(path.len() > 1 && mode <= 0o7777);
        self.next(1).map(|_| MockFile::new(&self.0))
    }

    fn read(&mut self, _: &MockFile, into: &mut [u8]) -> Result<usize, Errno> {
        assert!(!into.is_empty() && into.len() <= MAX_PIECE, "a read of {} bytes", into.len());
        self.next(into.len())
    }

    fn write(&mut self, _: &MockFile, bytes: &[u8]) -> Result<usize, Errno> {
        assert!(!bytes.is_empty(), "a write of nothing");
        // A kernel takes at least one byte, or says why not.
        self.next(bytes.len()).map(|count| count.max(1))
    }

    fn signal(&mut self, process: u32, signal: u8) {
        assert!((1..=64).contains(&signal) && process > 0 && process <= self.0.borrow().processes);
    }

    fn resize(&mut self, _: &MockFile, _: Size) {}

    fn end_terminal(&mut self, _: &MockFile) {}
}

/// An agent and a host that may say anything.
///
/// # Panics
/// If the agent says what a host could not understand, or keeps more than it may.
pub fn hostile_host(acts: &[AgentAct]) {
    let world = Rc::new(RefCell::new(World::default()));
    let Ok(mut service) = Service::new(Mock(world.clone())) else { return };
    let hello = |service: &mut Service<Mock>| {
        service.greet();
        let mut bytes = [0; 32];
        let len = ToAgent::Hello(crate::protocol::VERSION).encode(0, &mut bytes).unwrap_or(0);
        let greeted = hear(service, bytes.get(..len).unwrap_or(&[]));
        assert!(greeted.is_some_and(<[u8]>::is_empty), "a hello is refused");
    };
    hello(&mut service);
    let mut heard: Vec<u8> = Vec::new();
    let mut lost = false;
    for act in acts {
        match act {
            AgentAct::Hear(bytes) => heard.extend(bytes),
            AgentAct::Frame(kind, stream, channel, payload) => {
                heard.extend(frame(*kind, *stream, *channel, payload));
            }
            AgentAct::Exec(flags, channel) => {
                let payload = [&[*flags, 1, 0, 1, 0, 2, 0, 1, 0], &b"/\0a\0b\0C=d\0"[..]].concat();
                heard.extend(frame(32, 0, *channel, &payload));
            }
            AgentAct::Open(channel, write) => {
                let (kind, payload) =
                    if *write { (34, &b"\xa4\x01/x\0"[..]) } else { (33, &b"/x\0"[..]) };
                heard.extend(frame(kind, 0, *channel, payload));
            }
            AgentAct::Files(outcomes) => {
                let mut world = world.borrow_mut();
                world.script.clear();
                world.script.extend(outcomes);
            }
            AgentAct::Ready(index) => {
                let mut tokens: Vec<Token> = Vec::new();
                service.interests(|token, _, _| tokens.push(token));
                if let Some(token) = tokens.get(usize::from(*index) % tokens.len().max(1)) {
                    service.ready(*token);
                }
            }
            AgentAct::Reap(index) => {
                let processes: Vec<u32> = service.processes().collect();
                if let Some(&process) = processes.get(usize::from(*index) % processes.len().max(1))
                {
                    service.reaped(process, Exit::Code(*index));
                    assert!(service.processes().all(|other| other != process));
                }
            }
            AgentAct::Sent(count) => service.sent(usize::from(*count).min(service.output().len())),
            AgentAct::Again => lost = true,
        }
        match hear(&mut service, &heard) {
            Some(rest) => heard = rest.to_vec(),
            None => lost = true,
        }
        service.speak(|_| Err(EAGAIN));
        if std::mem::take(&mut lost) {
            service.hang_up();
            assert_eq!(world.borrow().files, 0, "files are left open");
            hello(&mut service);
            heard.clear();
        }
        let world = world.borrow();
        assert!(world.files <= 4 * MAX_CHANNELS && world.buffers <= 1 + MAX_CHANNELS);
    }
    // Whatever was cut off in front, frames end where the output does.
    service.hang_up();
    let processes: Vec<u32> = service.processes().collect();
    processes.into_iter().for_each(|process| service.reaped(process, Exit::Signal(9)));
    service.speak(|_| Err(EAGAIN));
    assert_eq!(world.borrow().buffers, 1, "channels are left open");
}

/// Hands in whole frames. Returns what is left; none if the host broke the protocol.
fn hear<'a>(service: &mut Service<Mock>, mut bytes: &'a [u8]) -> Option<&'a [u8]> {
    while service.may_receive()
        && let Some((frame, rest)) = split_frame(bytes)
    {
        service.receive(&frame).ok()?;
        bytes = rest;
    }
    Some(bytes)
}

/// Bytes that claim to be frames, read by both sides: what is understood is written the same.
///
/// # Panics
/// If it is not.
pub fn frames(mut bytes: &[u8]) {
    let mut again = vec![0; 8 + usize::from(u16::MAX)];
    while let Some((frame, rest)) = split_frame(bytes) {
        let whole = bytes.get(..bytes.len() - rest.len()).unwrap_or(&[]);
        let written = [
            ToAgent::parse(&frame).ok().map(|message| message.encode(frame.channel, &mut again)),
            ToHost::parse(&frame).ok().map(|message| message.encode(frame.channel, &mut again)),
        ];
        for len in written.into_iter().flatten() {
            let len = len.unwrap_or(0);
            // A hello may be longer than this version's; others have no stream to speak of.
            let same = again.get(4..len) == whole.get(4..len) && len <= whole.len();
            assert!(same, "{frame:?}");
        }
        bytes = rest;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::protocol::VERSION;

    fn tell(service: &mut Service<Mock>, channel: u32, message: &ToAgent<'_>) {
        let mut bytes = [0; 64];
        let len = message.encode(channel, &mut bytes).unwrap();
        assert_eq!(hear(service, &bytes[..len]), Some(&[][..]));
    }

    /// What the agent says to a host that takes all of it.
    fn speak(service: &mut Service<Mock>) -> Vec<u8> {
        let mut said = Vec::new();
        assert!(service.speak(|bytes| {
            said.extend(bytes);
            Ok(bytes.len())
        }));
        said
    }

    #[test]
    fn what_there_was_no_room_to_say_is_said_once_there_is() {
        let world = Rc::new(RefCell::new(World::default()));
        let mut service = Service::new(Mock(world.clone())).unwrap();
        service.greet();
        tell(&mut service, 0, &ToAgent::Hello(VERSION));
        // A command without streams, which runs.
        world.borrow_mut().script.extend([Ok(1), Ok(0)]);
        let exec = Exec {
            flags: 0,
            size: Size::default(),
            arguments: 1,
            environment: 0,
            strings: b"/\0a\0",
        };
        tell(&mut service, 1, &ToAgent::Exec(exec));
        let mut tokens = Vec::new();
        service.interests(|token, _, _| tokens.push(token));
        service.ready(tokens[0]);
        speak(&mut service);

        // The host takes nothing until there is room for no more answers. The command ends.
        while service.may_receive() {
            world.borrow_mut().script.push_back(Err(2));
            tell(&mut service, 2, &ToAgent::Read(b"/x\0"));
        }
        service.reaped(1, Exit::Code(3));
        assert!(service.speak(|_| Err(EAGAIN)));

        // The host takes all at once, and hears of the end without another event.
        let said = speak(&mut service);
        let mut rest = &said[..];
        let mut ends = Vec::new();
        while let Some((frame, behind)) = split_frame(rest) {
            if frame.channel == 1 {
                ends.push(ToHost::parse(&frame).unwrap());
            }
            rest = behind;
        }
        assert_eq!(ends, [ToHost::Exited(Exit::Code(3))]);
        assert!(service.output().is_empty());
    }
}
