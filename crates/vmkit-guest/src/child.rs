//! A command that runs in the guest, and its streams.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Output};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::channel::{Begun, Channel};
use crate::connection::Connection;
use crate::error::Lost;
use crate::outgoing::Outgoing;
use crate::protocol::{Exit, Flow, MAX_PIECE, Size, Stream, ToAgent, flags};
use crate::{GuestError, Stdio};

/// Linux's SIGKILL.
const KILL: i32 = 9;

/// The time until `deadline`; for ever if there is none.
fn left(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

/// `limit` from now.
fn deadline(limit: Option<Duration>) -> Option<Instant> {
    limit.and_then(|limit| Instant::now().checked_add(limit))
}

/// One end of a channel's stream.
struct End {
    /// Kept open for whoever holds this end; none for a thread that carries bytes.
    connection: Option<Arc<Connection>>,
    outgoing: Arc<Outgoing>,
    channel: Arc<Channel>,
    stream: Stream,
    /// How long to wait for the guest to take what is sent.
    patience: Duration,
    /// How long to wait for bytes or for room; for ever if none.
    limit: Option<Duration>,
}

impl End {
    /// Sends what is said of this stream, and waits for the guest no longer than `limit`.
    fn flow(&self, flow: Flow<'_>, limit: Option<Duration>) -> Result<(), GuestError> {
        let patience = limit.map_or(self.patience, |limit| limit.min(self.patience));
        self.outgoing.send(self.channel.id(), &ToAgent::Flow(self.stream, flow), patience)
    }

    fn flow_at_once(&self, flow: Flow<'_>) {
        self.outgoing.send_at_once(self.channel.id(), &ToAgent::Flow(self.stream, flow));
    }

    fn read(&self, into: &mut [u8], deadline: Option<Instant>) -> Result<usize, GuestError> {
        let credit = self.channel.lock().take_credit(self.stream);
        if let Some(credit) = credit
            && let Err(error) = self.flow(Flow::Credit(credit), left(deadline))
        {
            // What came before can still be read.
            self.channel.lock().keep_credit(self.stream, credit);
            return self.channel.read_at_once(self.stream, into).ok_or(error);
        }
        self.channel.read(self.stream, into, left(deadline))
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, GuestError> {
        let most = bytes.len().min(MAX_PIECE);
        if most == 0 {
            return Ok(0);
        }
        let count = self.channel.wait(self.limit, |state| state.take_room(most))?;
        if let Some(piece) = bytes.get(..count).filter(|piece| !piece.is_empty()) {
            self.flow(Flow::Data(piece), None).inspect_err(|_| {
                // The guest never had the bytes, and will not give the room back.
                self.channel.keep_room(count);
            })?;
        }
        Ok(count)
    }
}

macro_rules! reader {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Dropping it closes the pipe in the guest: who writes to it gets SIGPIPE.
        pub struct $name(End);

        impl $name {
            /// How long a read may wait for bytes; for ever if none, or if not said.
            pub fn set_timeout(&mut self, limit: Option<Duration>) {
                self.0.limit = limit;
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_tuple(stringify!($name)).field(&self.0.channel.id()).finish()
            }
        }

        impl Read for $name {
            fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                self.0.read(into, deadline(self.0.limit)).map_err(GuestError::into_io)
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                if self.0.channel.abandon(self.0.stream) {
                    self.0.flow_at_once(Flow::Close);
                }
            }
        }
    };
}

reader! {
    /// What a command writes to its standard output, or to its terminal.
    ChildStdout
}
reader! {
    /// What a command writes to its standard error.
    ChildStderr
}

/// What a command reads. Dropping it ends the command's input.
pub struct ChildStdin(End);

impl ChildStdin {
    /// How long a write may wait for the command to read; for ever if none, or if not said.
    pub fn set_timeout(&mut self, limit: Option<Duration>) {
        self.0.limit = limit;
    }
}

impl std::fmt::Debug for ChildStdin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ChildStdin").field(&self.0.channel.id()).finish()
    }
}

impl Write for ChildStdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Ok(0) if !bytes.is_empty() => Err(io::ErrorKind::BrokenPipe.into()),
            Ok(count) => Ok(count),
            Err(error) => Err(error.into_io()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ChildStdin {
    fn drop(&mut self) {
        if self.0.channel.lock().input.is_some() {
            self.0.flow_at_once(Flow::End);
        }
    }
}

/// A command that runs in the guest. Dropping it leaves the command running, without its streams, as
/// long as somebody holds the [`Guest`](crate::Guest) or an end of a stream.
pub struct Child {
    connection: Arc<Connection>,
    channel: Arc<Channel>,
    name: String,
    patience: Duration,
    forwards: Vec<(Stream, Forward)>,
    /// What the command reads, if it is [`Stdio::Piped`].
    pub stdin: Option<ChildStdin>,
    /// What the command writes, if it is [`Stdio::Piped`].
    pub stdout: Option<ChildStdout>,
    /// What the command complains of, if it is [`Stdio::Piped`].
    pub stderr: Option<ChildStderr>,
}

impl std::fmt::Debug for Child {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Child").field("program", &self.name).finish_non_exhaustive()
    }
}

impl Child {
    pub(crate) fn new(
        connection: Arc<Connection>,
        channel: Arc<Channel>,
        name: String,
        asked: u8,
        patience: Duration,
    ) -> Self {
        let terminal = asked & flags::TERMINAL != 0;
        let has = |flag| asked & flag != 0;
        let end = |stream| End {
            connection: Some(connection.clone()),
            outgoing: connection.outgoing(),
            channel: channel.clone(),
            stream,
            patience,
            limit: None,
        };
        let stdin = (terminal || has(flags::INPUT)).then(|| ChildStdin(end(Stream::Input)));
        let stdout = (terminal || has(flags::OUTPUT)).then(|| ChildStdout(end(Stream::Output)));
        let stderr = has(flags::ERROR).then(|| ChildStderr(end(Stream::Error)));
        Self { connection, channel, name, patience, forwards: Vec::new(), stdin, stdout, stderr }
    }

    /// Waits until the guest has said whether the command runs.
    pub(crate) fn wait_started(self) -> Result<Self, GuestError> {
        let word = self
            .channel
            .wait(Some(self.patience), |state| state.failure.map(Err).or(state.begun.map(Ok)));
        match word {
            Ok(Ok(_)) => Ok(self),
            Ok(Err(failure)) => Err(GuestError::refused(&self.name, failure)),
            Err(error) => {
                // It may yet come to it.
                self.give_up();
                Err(error)
            }
        }
    }

    /// The command's process number in the guest.
    pub fn id(&self) -> u32 {
        match self.channel.lock().begun {
            Some(Begun::Started { process }) => process,
            _ => 0,
        }
    }

    /// Sends a signal of Linux to the command's process group. Nothing happens if it has ended.
    ///
    /// # Errors
    /// [`GuestError::InvalidString`] if there is no such signal, and those of the connection.
    pub fn signal(&self, signal: i32) -> Result<(), GuestError> {
        let number = u8::try_from(signal).ok().filter(|number| (1..=64).contains(number));
        let number = number.ok_or_else(|| GuestError::InvalidString(format!("signal {signal}")))?;
        if self.channel.lock().exit.is_some() {
            return Ok(());
        }
        self.connection.send(self.channel.id(), &ToAgent::Signal(number), self.patience)
    }

    /// Kills the command and its process group.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn kill(&self) -> Result<(), GuestError> {
        self.signal(KILL)
    }

    /// Kills the command without waiting for the guest to hear it. Nobody waits for its streams or its
    /// end any more: a guest that does not even die would make them wait for ever.
    pub(crate) fn give_up(&self) {
        if self.channel.lock().exit.is_none() {
            self.connection.send_at_once(self.channel.id(), &ToAgent::Signal(KILL as u8));
        }
        self.channel.lose(Lost::Ended);
    }

    /// Gives the command's terminal another size.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), GuestError> {
        let size = Size { rows, columns };
        self.connection.send(self.channel.id(), &ToAgent::Resize(size), self.patience)
    }

    /// Ends the command's input and waits until it ends. What it had [inherited](Stdio::Inherit) has
    /// been written to its end then.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn wait(&mut self) -> Result<ExitStatus, GuestError> {
        drop(self.stdin.take());
        self.finish(None)
    }

    /// Waits until the command ends, but not longer than `limit`: none if it still runs then.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn wait_timeout(&mut self, limit: Duration) -> Result<Option<ExitStatus>, GuestError> {
        match self.exit(Some(limit)) {
            Ok(status) => Ok(Some(status)),
            Err(GuestError::TimedOut(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How the command ended, if it has.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, GuestError> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Ends the command's input, collects what it writes to its piped streams, and waits for its end.
    /// At most 64 MiB of each stream.
    ///
    /// # Errors
    /// [`GuestError::TooMuch`], and those of the connection.
    pub fn wait_with_output(self) -> Result<Output, GuestError> {
        self.collect(None, crate::command::MOST_OUTPUT)
    }

    fn exit(&self, limit: Option<Duration>) -> Result<ExitStatus, GuestError> {
        let exit = self.channel.wait(limit, |state| state.exit)?;
        Ok(ExitStatus::from_raw(match exit {
            Exit::Code(code) => i32::from(code) << 8,
            Exit::Signal(signal) => signal.into(),
        }))
    }

    /// Waits for the end and for what is forwarded to be written. Kills what takes too long.
    pub(crate) fn finish(&mut self, limit: Option<Duration>) -> Result<ExitStatus, GuestError> {
        let deadline = deadline(limit);
        let ended = self.exit(limit).and_then(|status| {
            self.channel.wait(left(deadline), |state| {
                let mut streams = self.forwards.iter().map(|(stream, _)| *stream);
                streams.all(|stream| state.is_drained(stream)).then_some(status)
            })
        });
        if ended.is_err() {
            self.give_up();
            return ended;
        }
        // Whoever reads from the host's end may take longer than the command.
        let mut forwards = std::mem::take(&mut self.forwards).into_iter();
        if !forwards.all(|(_, forward)| forward.join(deadline)) {
            self.give_up();
            return Err(GuestError::TimedOut(limit.unwrap_or(Duration::MAX)));
        }
        ended
    }

    /// Reads both outputs to their end, and waits for that of the command.
    pub(crate) fn collect(
        mut self,
        limit: Option<Duration>,
        most: usize,
    ) -> Result<Output, GuestError> {
        drop(self.stdin.take());
        let deadline = deadline(limit);
        let mut collected = [Vec::new(), Vec::new()];
        let outcome = self.collect_into(&mut collected, deadline, most);
        if outcome.is_err() {
            self.give_up();
        }
        let status = outcome.and_then(|()| self.finish(left(deadline)));
        let status = status.map_err(|error| match (error, limit) {
            (GuestError::TimedOut(_), Some(limit)) => GuestError::TimedOut(limit),
            (error, _) => error,
        })?;
        let [stdout, stderr] = collected;
        Ok(Output { status, stdout, stderr })
    }

    fn collect_into(
        &mut self,
        collected: &mut [Vec<u8>; 2],
        deadline: Option<Instant>,
        most: usize,
    ) -> Result<(), GuestError> {
        let ends = [self.stdout.as_ref().map(|s| &s.0), self.stderr.as_ref().map(|s| &s.0)];
        let mut piece = vec![0; MAX_PIECE];
        let mut open: Vec<_> = ends.into_iter().zip(collected).collect();
        open.retain(|(end, _)| end.is_some());
        while !open.is_empty() {
            // Whichever has something.
            self.channel.wait(left(deadline), |state| {
                let ready = open.iter().flat_map(|(end, _)| *end).any(|e| state.has_word(e.stream));
                ready.then_some(())
            })?;
            for (end, bytes) in &mut open {
                let Some(end) = end else { continue };
                let state = self.channel.lock();
                let ready = state.has_word(end.stream);
                drop(state);
                if ready {
                    let count = end.read(&mut piece, deadline)?;
                    bytes.extend(piece.iter().take(count));
                    if bytes.len() > most {
                        let what = self.name.clone();
                        return Err(GuestError::TooMuch { what, limit: most });
                    }
                }
            }
            open.retain(|(end, _)| {
                end.is_some_and(|end| !self.channel.lock().is_drained(end.stream))
            });
        }
        Ok(())
    }

    /// Has threads carry `input` to the command, and what is [inherited](Stdio::Inherit) from and to
    /// the streams of this process. They do not keep the connection open.
    pub(crate) fn forward(
        &mut self,
        input: Option<Vec<u8>>,
        stdin: bool,
        stdout: Stdio,
        stderr: Stdio,
    ) -> Result<(), GuestError> {
        if let Some(bytes) = input
            && let Some(mut to) = self.stdin.take()
        {
            to.0.connection = None;
            // A command that does not want to read all of it is no failure.
            Forward::start("guest-input", move || drop(to.write_all(&bytes)))?;
        }
        if stdin && let Some(mut to) = self.stdin.take() {
            to.0.connection = None;
            Forward::start("guest-stdin", move || {
                let _ = io::copy(&mut io::stdin(), &mut to);
            })?;
        }
        if stdout == Stdio::Inherit
            && let Some(mut from) = self.stdout.take()
        {
            from.0.connection = None;
            let thread = Forward::start("guest-stdout", move || {
                let _ = forward(&mut from, &mut io::stdout());
            })?;
            self.forwards.push((Stream::Output, thread));
        }
        if stderr == Stdio::Inherit
            && let Some(mut from) = self.stderr.take()
        {
            from.0.connection = None;
            let thread = Forward::start("guest-stderr", move || {
                let _ = forward(&mut from, &mut io::stderr());
            })?;
            self.forwards.push((Stream::Error, thread));
        }
        Ok(())
    }
}

/// Copies what comes as it comes.
fn forward(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut piece = vec![0; MAX_PIECE];
    loop {
        let count = from.read(&mut piece)?;
        let Some(bytes) = piece.get(..count).filter(|bytes| !bytes.is_empty()) else {
            return Ok(());
        };
        to.write_all(bytes)?;
        to.flush()?;
    }
}

/// A thread that carries bytes.
struct Forward {
    thread: JoinHandle<()>,
    /// Disconnected once the thread has done its work.
    done: Receiver<Infallible>,
}

impl Forward {
    fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<Self, GuestError> {
        let (working, done) = mpsc::channel();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let _working = working;
            work();
        })?;
        Ok(Self { thread, done })
    }

    /// Waits for the end of its work. False if it has not come at `deadline`; the thread is then left
    /// to itself.
    fn join(self, deadline: Option<Instant>) -> bool {
        if let Some(left) = left(deadline)
            && self.done.recv_timeout(left) == Err(RecvTimeoutError::Timeout)
        {
            return false;
        }
        // It has nothing to say.
        let _ = self.thread.join();
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::channel::Purpose;
    use crate::hello::Dialler;
    use crate::protocol::{ToHost, WINDOW};

    #[test]
    fn a_read_waits_no_longer_to_give_room_back_than_it_may() {
        let channel = Channel::new(1, Purpose::Command(flags::OUTPUT));
        channel.receive(&ToHost::Started(42)).unwrap();
        let piece = vec![7; WINDOW as usize / 2];
        channel.receive(&ToHost::Flow(Stream::Output, Flow::Data(&piece))).unwrap();
        let outgoing = Outgoing::default();
        let data = ToAgent::Flow(Stream::Input, Flow::Data(&piece[..MAX_PIECE]));
        while outgoing.send(1, &data, Duration::ZERO).is_ok() {}
        let (channel, outgoing) = (Arc::new(channel), Arc::new(outgoing));
        // Longer than anybody waits for a test.
        let patience = Duration::from_secs(24 * 60 * 60);
        let end = End {
            connection: None,
            outgoing,
            channel,
            stream: Stream::Output,
            patience,
            limit: None,
        };
        let soon = || deadline(Some(Duration::from_millis(20)));
        let mut into = vec![0; piece.len()];
        assert_eq!(end.read(&mut into, soon()).unwrap(), piece.len());
        // The room that nobody could be told of costs no bytes.
        end.channel.receive(&ToHost::Flow(Stream::Output, Flow::Data(b"x"))).unwrap();
        assert_eq!(end.read(&mut into, soon()).unwrap(), 1);
        assert!(matches!(end.read(&mut into, soon()), Err(GuestError::TimedOut(_))));
    }

    #[test]
    fn a_host_that_takes_nothing_does_not_make_a_command_outlast_its_limit() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let connection = Arc::new(Connection::new(Dialler::new(ours)).unwrap());
        let channel = Channel::new(1, Purpose::Command(0));
        channel.receive(&ToHost::Started(42)).unwrap();
        channel.receive(&ToHost::Exited(Exit::Code(0))).unwrap();
        let mut child = Child::new(connection, Arc::new(channel), "x".into(), 0, Duration::ZERO);
        let (full, blocked) = mpsc::channel::<()>();
        // Only a test that fails waits so long.
        let write = move || blocked.recv_timeout(Duration::from_secs(20)).unwrap_or_default();
        child.forwards.push((Stream::Output, Forward::start("guest-stdout", write).unwrap()));
        let outcome = child.finish(Some(Duration::from_millis(20)));
        assert!(matches!(outcome, Err(GuestError::TimedOut(_))), "{outcome:?}");
        drop(full);
    }

    #[test]
    fn a_write_that_is_not_taken_in_time_costs_no_room() {
        let channel = Channel::new(1, Purpose::Command(flags::INPUT));
        channel.receive(&ToHost::Started(42)).unwrap();
        let outgoing = Outgoing::default();
        let piece = [7; MAX_PIECE];
        let data = ToAgent::Flow(Stream::Input, Flow::Data(&piece));
        while outgoing.send(2, &data, Duration::ZERO).is_ok() {}
        let (channel, outgoing) = (Arc::new(channel), Arc::new(outgoing));
        let end = End {
            connection: None,
            outgoing: outgoing.clone(),
            channel,
            stream: Stream::Input,
            patience: Duration::ZERO,
            limit: Some(Duration::ZERO),
        };
        // More often than there is room for.
        for _ in 0..=WINDOW as usize / piece.len() {
            assert!(matches!(end.write(&piece), Err(GuestError::TimedOut(_))));
        }
        assert!(outgoing.take(&mut Vec::new()));
        assert_eq!(end.channel.lock().input, Some(WINDOW));
        assert_eq!(end.write(&piece).unwrap(), piece.len());
    }
}
