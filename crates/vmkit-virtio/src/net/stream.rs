//! Frames over a stream socket, each after its length in four bytes, most significant first.
//!
//! The other side is the embedder's choice and still not trusted: a length out of bounds ends the
//! connection.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, send, sendmsg};

use super::{MAX_FRAME, NetBackend, Offload};
use crate::{Event, Interest, Poller};

/// Bytes of a length.
const LENGTH: usize = 4;
/// Bytes read at once.
const READ: usize = 128 << 10;

pub(super) struct StreamBackend {
    socket: UnixStream,
    /// Bytes received and not yet handed out: `incoming[start..end]`.
    incoming: Box<[u8]>,
    start: usize,
    end: usize,
    /// What the socket had no room for.
    outgoing: Vec<u8>,
    closed: bool,
}

impl StreamBackend {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            incoming: vec![0; READ].into(),
            start: 0,
            end: 0,
            outgoing: Vec::with_capacity(LENGTH + MAX_FRAME),
            closed: false,
        })
    }

    fn close(&mut self, why: &str) {
        if !std::mem::replace(&mut self.closed, true) {
            log::warn!("network stream: {why}");
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Writes what is left of earlier frames.
    fn drain(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            // Unlike write, this raises no signal when the other side is gone.
            match send(&self.socket, &self.outgoing, SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads more, after making room at the end.
    fn fill(&mut self) -> io::Result<()> {
        self.incoming.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            let room = self.incoming.get_mut(self.end..).unwrap_or_default();
            match self.socket.read(room) {
                Ok(0) => {
                    self.close("the other side is gone");
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(count) => {
                    self.end += count;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl NetBackend for StreamBackend {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.socket, 0, Interest::READ | Interest::WRITE)
    }

    fn event(&mut self, _: Event) {}

    fn carries_offloads(&self) -> bool {
        false
    }

    fn send(&mut self, frame: &[u8], _: &Offload) -> io::Result<()> {
        if self.closed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.drain()?;
        let length = (frame.len() as u32).to_be_bytes();
        let parts = [io::IoSlice::new(&length), io::IoSlice::new(frame)];
        let written = loop {
            let mut control = SendAncillaryBuffer::default();
            match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        // The rest of a frame that was begun must follow before any other.
        let whole = length.iter().chain(frame);
        self.outgoing.extend(whole.skip(written));
        Ok(())
    }

    fn flush(&mut self) {
        // What is left waits for room, which an event tells.
        let _ = self.drain();
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<(usize, Offload)> {
        loop {
            if self.closed {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let waiting = self.incoming.get(self.start..self.end).unwrap_or_default();
            if let Some((length, rest)) = waiting.split_first_chunk::<LENGTH>() {
                let len = u32::from_be_bytes(*length) as usize;
                if len > MAX_FRAME {
                    self.close("a frame longer than any");
                    continue;
                }
                if let (Some(frame), Some(into)) = (rest.get(..len), into.get_mut(..len)) {
                    into.copy_from_slice(frame);
                    self.start += LENGTH + len;
                    return Ok((len, Offload::default()));
                }
            }
            self.fill()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn frames_cross_in_pieces_and_backpressure_is_told() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut backend = StreamBackend::new(ours).unwrap();
        let mut into = vec![0; MAX_FRAME];
        let blocked =
            |r: io::Result<(usize, Offload)>| r.unwrap_err().kind() == io::ErrorKind::WouldBlock;
        theirs.write_all(&[0, 0, 0, 20, 1, 2, 3]).unwrap();
        assert!(blocked(backend.receive(&mut into)));
        theirs.write_all(&[7; 17]).unwrap();
        theirs.write_all(&[0, 0, 0, 14]).unwrap();
        theirs.write_all(&[8; 14]).unwrap();
        assert_eq!(backend.receive(&mut into).unwrap().0, 20);
        assert_eq!((into[0], into[19]), (1, 7));
        assert_eq!(backend.receive(&mut into).unwrap().0, 14);

        let mut sent = 0_usize;
        let frame: Vec<u8> = (0..9000).map(|n| n as u8).collect();
        loop {
            match backend.send(&frame, &Offload::default()) {
                Ok(()) => sent += 1,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        let mut found = Vec::new();
        theirs.set_nonblocking(true).unwrap();
        while found.len() < sent * 9004 {
            let _ = (&theirs).take(1 << 16).read_to_end(&mut found);
            backend.flush();
        }
        for whole in found.chunks(9004) {
            assert_eq!((&whole[..4], &whole[4..]), (&9000_u32.to_be_bytes()[..], &frame[..]));
        }
    }

    #[test]
    fn a_length_out_of_bounds_ends_the_connection() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut backend = StreamBackend::new(ours).unwrap();
        theirs.write_all(&[0xFF; 64]).unwrap();
        let mut into = vec![0; MAX_FRAME];
        assert!(backend.receive(&mut into).is_err());
        assert_eq!(
            backend.send(&[0; 60], &Offload::default()).unwrap_err().kind(),
            io::ErrorKind::NotConnected
        );
    }
}
