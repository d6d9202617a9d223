//! The loop of the program: wait until something is ready, then let the service have it.

use crate::protocol::{HEADER, MAX_CHANNELS, MAX_PAYLOAD, split_frame};
use crate::service::{EAGAIN, EINTR, Errno, Os, Service, Token, Violation, Want};
use crate::sys::{self, Environment, Fd, Linux, POLL_READ, POLL_WRITE, PollFd, SignalFd};

/// Waits between two attempts to reach the host, in milliseconds: the first, and the longest.
const PATIENCE: (u32, u32) = (2, 200);
/// Most files to wait for: the connection, ended children, and an input and two outputs each.
const MOST_FILES: usize = 2 + 3 * MAX_CHANNELS;
/// Bytes that came from the host and make no whole frame yet, and as many again to be read.
const INBOX: usize = 2 * (HEADER + MAX_PAYLOAD);

/// Serves one connection until it ends.
pub(crate) fn serve_one(environment: Environment, fd: &Fd) -> Result<(), Errno> {
    let mut program = Program::new(environment)?;
    program.serve(fd);
    Ok(())
}

/// Dials until the host answers, serves the connection, and dials again.
pub(crate) fn serve_for_ever(environment: Environment, cid: u32, port: u32) -> Result<(), Errno> {
    let mut program = Program::new(environment)?;
    let mut patience = PATIENCE.0;
    loop {
        if let Ok(fd) = sys::dial(cid, port)
            && program.serve(&fd)
        {
            patience = PATIENCE.0;
        }
        program.reap();
        sys::sleep_ms(patience);
        patience = PATIENCE.1.min(patience * 2);
    }
}

struct Program {
    service: Service<Linux>,
    children: SignalFd,
    inbox: <Linux as Os>::Buffer,
    /// Bytes of the inbox that are filled.
    filled: usize,
    /// This is process 1, to which others leave their children.
    is_first: bool,
}

impl Program {
    fn new(environment: Environment) -> Result<Self, Errno> {
        let children = sys::take_signals()?;
        let mut linux = Linux::new(environment);
        let inbox = linux.buffer(INBOX)?;
        let service = Service::new(linux)?;
        Ok(Self { service, children, inbox, filled: 0, is_first: sys::own_process() == 1 })
    }

    /// Serves a connection until it ends. True if the host had said anything.
    fn serve(&mut self, fd: &Fd) -> bool {
        self.filled = 0;
        self.service.greet();
        let mut heard = false;
        while self.digest().is_ok() {
            if !self.service.speak(|bytes| sys::send(fd, bytes)) {
                break;
            }
            // What had to wait for room goes first.
            if self.service.may_receive() && split_frame(self.unread()).is_some() {
                continue;
            }
            match self.wait(fd) {
                Ok(count) => heard |= count > 0,
                Err(Violation) => break,
            }
        }
        self.service.hang_up();
        heard
    }

    fn unread(&self) -> &[u8] {
        self.inbox.get(..self.filled).unwrap_or(&[])
    }

    /// Hands in the frames that are whole, as long as there is room for answers.
    fn digest(&mut self) -> Result<(), Violation> {
        let bytes = self.inbox.get(..self.filled).unwrap_or(&[]);
        let mut rest = bytes;
        while self.service.may_receive()
            && let Some((frame, behind)) = split_frame(rest)
        {
            self.service.receive(&frame)?;
            rest = behind;
        }
        let used = bytes.len() - rest.len();
        self.inbox.copy_within(used..self.filled, 0);
        self.filled -= used;
        Ok(())
    }

    /// Waits for something and handles it. Returns how many bytes came from the host.
    fn wait(&mut self, fd: &Fd) -> Result<usize, Violation> {
        let mut files = [PollFd::NONE; MOST_FILES];
        let mut tokens = [None::<Token>; MOST_FILES];
        let listening = self.service.may_receive();
        let speaking = !self.service.output().is_empty();
        let events = if listening { POLL_READ } else { 0 } | if speaking { POLL_WRITE } else { 0 };
        let own = [PollFd::new(fd, events), PollFd::new(self.children.fd(), POLL_READ)];
        let mut places = files.iter_mut().zip(&mut tokens);
        for (file, (place, _)) in own.into_iter().zip(&mut places) {
            *place = file;
        }
        let mut count = own.len();
        self.service.interests(|token, fd, want| {
            let events = if want == Want::Read { POLL_READ } else { POLL_WRITE };
            if let Some((file, slot)) = places.next() {
                (*file, *slot) = (PollFd::new(fd, events), Some(token));
                count += 1;
            }
        });
        let files = files.get_mut(..count).unwrap_or(&mut []);
        sys::poll(files);
        let ready = |index: usize| files.get(index).is_some_and(PollFd::is_ready);
        if ready(1) {
            self.reap();
        }
        let ready_tokens = files.iter().zip(tokens).filter(|(file, _)| file.is_ready());
        for token in ready_tokens.filter_map(|(_, token)| token) {
            self.service.ready(token);
        }
        if ready(0) { self.receive(fd) } else { Ok(0) }
    }

    /// Receives what there is.
    fn receive(&mut self, fd: &Fd) -> Result<usize, Violation> {
        let room = self.inbox.get_mut(self.filled..).unwrap_or(&mut []);
        if room.is_empty() {
            return Ok(0);
        }
        match sys::receive(fd, room) {
            Err(EAGAIN | EINTR) => Ok(0),
            Ok(0) | Err(_) => Err(Violation),
            Ok(count) => {
                self.filled += count;
                Ok(count)
            }
        }
    }

    /// Collects children that have ended: all of them as process 1, else only the service's.
    fn reap(&mut self) {
        self.children.clear();
        if self.is_first {
            while let Some((process, exit)) = sys::reap_any() {
                self.service.reaped(process, exit);
            }
            return;
        }
        let mut ended = [None; MAX_CHANNELS];
        let processes = self.service.processes();
        for (slot, process) in ended.iter_mut().zip(processes) {
            *slot = sys::reap_process(process).map(|exit| (process, exit));
        }
        for (process, exit) in ended.into_iter().flatten() {
            self.service.reaped(process, exit);
        }
    }
}
