//! One stream between a guest port and a host socket, and its credit (virtio 1.2 §5.10.6.3).
//!
//! Towards the guest nothing is buffered: bytes go from the socket to the driver's buffers when the
//! guest has credit for them. Towards the host at most [`BUFFER`] bytes wait for a socket that is
//! full, and the guest is told that it may send no more than that.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vmkit_memory::GuestBuffers;

use super::packet::{Header, op, shutdown};
use crate::{Fault, Reader, Writer};

/// Bytes the guest may have under way to one connection.
pub(super) const BUFFER: u32 = 256 << 10;
/// Longest line of a host program that wants to connect.
const MOST_LINE: usize = 32;

/// Host port, guest port.
pub(super) type Key = (u32, u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A host program is still saying where it wants to go.
    Greeting,
    /// The guest has been asked, or is about to be.
    Asking {
        /// The host program waits for `OK`.
        announce: bool,
    },
    /// Bytes flow.
    Open,
    /// The guest has let go, and what it sent before is on its way to the host program.
    Ending,
}

/// What is to be told to the guest, as bits: each is owed once.
pub(super) mod owed {
    pub const REQUEST: u8 = 1;
    pub const RESPONSE: u8 = 2;
    pub const CREDIT_UPDATE: u8 = 4;
    pub const CREDIT_REQUEST: u8 = 8;
    pub const SHUTDOWN: u8 = 16;
    /// The last word: the connection is gone once it has been said.
    pub const RST: u8 = 32;
}

/// What became of data from the guest. All but the first ends the connection.
pub(super) enum Taken {
    /// It is written, or waits for the socket.
    All,
    /// The host program is gone, which a guest cannot know.
    Gone,
    /// It was more than the guest had credit for, or came after it said that none would.
    Misuse,
}

/// What became of a connection's turn to speak.
pub(super) enum Said {
    /// A packet was written; the connection has more to say if `more`.
    Packet { more: bool },
    /// A packet was written, and the connection is gone.
    Last,
    /// There is nothing to say now.
    Nothing,
}

pub(super) struct Connection {
    pub stream: UnixStream,
    pub key: Key,
    pub state: State,
    owed: u8,
    line: Vec<u8>,
    /// The socket may have something to read.
    pub readable: bool,
    /// The socket has no more to read, ever.
    ended: bool,
    /// The guest receives no more.
    deaf: bool,
    /// The guest sends no more.
    mute: bool,
    // What the guest said of its buffer, and what was sent to it.
    peer_buffer: u32,
    peer_forwarded: u32,
    sent: u32,
    asked_for_credit: bool,
    // What came from the guest, and how much of it the socket took.
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    waiting: VecDeque<u8>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, key: Key, state: State) -> Self {
        Self {
            stream,
            key,
            state,
            owed: 0,
            line: Vec::new(),
            readable: true,
            ended: false,
            deaf: false,
            mute: false,
            peer_buffer: 0,
            peer_forwarded: 0,
            sent: 0,
            asked_for_credit: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            waiting: VecDeque::new(),
        }
    }

    pub(super) fn owe(&mut self, what: u8) {
        self.owed |= what;
    }

    /// Takes over what the guest says of its buffer, which every packet does.
    pub(super) fn credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        // Without room the question stands. A guest answers it at once, and tells by itself when a
        // program of its reads: to ask again at each such answer would go on as long as none does.
        if self.room() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// Bytes the guest has room for. Whatever it claims, no more than it said its buffer holds.
    fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(under_way)
    }

    /// Room the guest thinks there is for what it sends.
    fn offered(&self) -> u32 {
        BUFFER.saturating_sub(self.received.wrapping_sub(self.told_forwarded))
    }

    /// True if the connection may have something to say to the guest.
    pub(super) fn wants_to_speak(&self) -> bool {
        if self.owed != 0 {
            return true;
        }
        self.state == State::Open && self.readable && !self.ended && !self.deaf
            // Without credit there is only the question for it.
            && (self.room() > 0 || !self.asked_for_credit)
    }

    /// Reads a greeting from a host program, byte by byte so that nothing behind it is taken.
    /// Returns the port it wants when the line is whole.
    pub(super) fn greeting(&mut self) -> Result<Option<u32>, ()> {
        let mut byte = [0];
        while self.line.len() < MOST_LINE {
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => return parse_greeting(&self.line).map(Some).ok_or(()),
                Ok(1) => self.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return Err(()),
            }
        }
        Err(())
    }

    /// True if the host program is gone and left nothing to be read. One that only said that it sends no
    /// more may still wait for what the guest sends.
    pub(super) fn is_abandoned(&self) -> bool {
        let gone = |error| matches!(error, Errno::PIPE | Errno::CONNRESET);
        send(&self.stream, &[], SendFlags::NOSIGNAL).is_err_and(gone)
            && match recv(&self.stream, &mut [0], RecvFlags::PEEK) {
                Ok((_, count)) => count == 0,
                Err(error) => gone(error),
            }
    }

    /// The guest has not been asked yet.
    pub(super) fn is_unasked(&self) -> bool {
        self.owed & owed::REQUEST != 0
    }

    /// The guest agreed.
    pub(super) fn opened(&mut self) {
        if self.state == (State::Asking { announce: true }) {
            let line = format!("OK {}\n", self.key.0);
            // A fresh socket has room for a line; a program that is gone is found out next.
            let _ = send(&self.stream, line.as_bytes(), SendFlags::NOSIGNAL);
        }
        self.state = State::Open;
    }

    /// Takes `len` bytes of data from the guest.
    pub(super) fn take(&mut self, data: &mut Reader<'_>, len: u32) -> Result<Taken, Fault> {
        let held = self.received.wrapping_sub(self.forwarded);
        if self.state != State::Open || self.mute || len > BUFFER.saturating_sub(held) {
            return Ok(Taken::Misuse);
        }
        self.received = self.received.wrapping_add(len);
        let mut data = data.split(len.into());
        while self.waiting.is_empty() && data.remaining() > 0 {
            let mut buffers = GuestBuffers::new();
            data.clone().buffers(&mut buffers)?;
            match buffers.send(self.stream.as_fd()) {
                Ok(count) => {
                    data.skip(count as u64);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Ok(Taken::Gone),
            }
        }
        if data.remaining() > 0 {
            self.keep(&mut data)?;
        }
        self.offer_room();
        Ok(Taken::All)
    }

    /// Keeps `data` until the socket has room.
    fn keep(&mut self, data: &mut Reader<'_>) -> Result<(), Fault> {
        let mut piece = [0; 4096];
        while data.remaining() > 0 {
            let count = data.read(&mut piece)?;
            self.waiting.extend(piece.get(..count).unwrap_or_default());
        }
        Ok(())
    }

    /// Has the guest told of room once it sees less than half of what there is.
    fn offer_room(&mut self) {
        if self.offered() < BUFFER / 2 && self.forwarded != self.told_forwarded {
            self.owe(owed::CREDIT_UPDATE);
        }
    }

    /// Writes what waited for the socket. False if the host program is gone.
    pub(super) fn flush(&mut self) -> bool {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match send(&self.stream, front, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.waiting.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        self.offer_room();
        self.finish();
        true
    }

    /// The guest will send or receive no more.
    pub(super) fn shut_down(&mut self, flags: u32) {
        self.deaf |= flags & shutdown::RECEIVE != 0;
        self.mute |= flags & shutdown::SEND != 0;
        if self.deaf {
            // A host program that goes on writing is told, and does not wait for ever.
            let _ = self.stream.shutdown(std::net::Shutdown::Read);
        }
        self.finish();
    }

    /// The guest let go of the connection. True if bytes of before are to be written yet: it had said
    /// that it would send no more, so that they are all there were, and the host program may be slow.
    pub(super) fn let_go(&mut self) -> bool {
        if !self.mute || self.is_flushed() {
            return false;
        }
        self.shut_down(shutdown::RECEIVE);
        (self.state, self.owed) = (State::Ending, 0);
        true
    }

    /// True if nothing waits for the socket.
    pub(super) fn is_flushed(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Passes a shutdown on once all data before it is written.
    fn finish(&mut self) {
        if self.mute && self.waiting.is_empty() {
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
            if self.deaf || self.ended {
                self.owe(owed::RST);
            }
        }
    }

    /// The header of a packet of this connection.
    fn header(&mut self, cid: u64, op: u16) -> Header {
        self.told_forwarded = self.forwarded;
        self.owed &= !owed::CREDIT_UPDATE;
        Header {
            src_cid: super::HOST_CID,
            dst_cid: cid,
            src_port: self.key.0,
            dst_port: self.key.1,
            kind: super::packet::STREAM,
            op,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    /// Says the next thing to the guest with address `cid`.
    pub(super) fn speak(&mut self, cid: u64, out: &mut Writer<'_>) -> Result<Said, Fault> {
        const FLAGS: [(u8, u16, u32); 6] = [
            (owed::RST, op::RST, 0),
            (owed::REQUEST, op::REQUEST, 0),
            (owed::RESPONSE, op::RESPONSE, 0),
            (owed::CREDIT_UPDATE, op::CREDIT_UPDATE, 0),
            (owed::CREDIT_REQUEST, op::CREDIT_REQUEST, 0),
            (owed::SHUTDOWN, op::SHUTDOWN, shutdown::SEND),
        ];
        for (owed, op, flags) in FLAGS {
            if self.owed & owed != 0 {
                self.owed &= !owed;
                let header = Header { flags, ..self.header(cid, op) };
                out.write_all(&header.to_bytes())?;
                if op == op::RST {
                    return Ok(Said::Last);
                }
                return Ok(Said::Packet { more: self.wants_to_speak() });
            }
        }
        if !self.wants_to_speak() {
            return Ok(Said::Nothing);
        }
        if self.room() == 0 {
            self.asked_for_credit = true;
            self.owe(owed::CREDIT_REQUEST);
            return self.speak(cid, out);
        }
        self.data(cid, out)
    }

    /// Moves bytes from the socket to the guest.
    fn data(&mut self, cid: u64, out: &mut Writer<'_>) -> Result<Said, Fault> {
        let mut front = out.split(super::packet::HEADER as u64);
        let mut body = out.clone().split(self.room().into());
        let mut buffers = GuestBuffers::new();
        body.buffers(&mut buffers)?;
        if buffers.bytes() == 0 {
            return Err(Fault::Request("a vsock buffer without room for data"));
        }
        let len = match buffers.read_from(self.stream.as_fd(), None) {
            Ok(0) => {
                self.ended = true;
                self.owe(owed::SHUTDOWN);
                self.finish();
                return self.speak_into(cid, front);
            }
            Ok(count) => count as u32,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(Said::Nothing);
            }
            Err(_) => {
                self.owe(owed::RST);
                return self.speak_into(cid, front);
            }
        };
        out.skip(len.into());
        self.sent = self.sent.wrapping_add(len);
        let header = Header { len, ..self.header(cid, op::RW) };
        front.write_all(&header.to_bytes())?;
        Ok(Said::Packet { more: self.wants_to_speak() })
    }

    fn speak_into(&mut self, cid: u64, mut front: Writer<'_>) -> Result<Said, Fault> {
        self.speak(cid, &mut front)
    }
}

/// `CONNECT 52` wants port 52.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?.trim_end_matches('\r').strip_prefix("CONNECT ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_are_exact() {
        assert_eq!(parse_greeting(b"CONNECT 52"), Some(52));
        for bad in
            [&b"CONNECT"[..], b"CONNECT ", b"connect 5", b"CONNECT -1", b"CONNECT 4294967296"]
        {
            assert_eq!(parse_greeting(bad), None);
        }
    }

    #[test]
    fn a_guest_that_lies_about_credit_gets_no_more_than_its_buffer() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(stream, (1, 2), State::Open);
        let say = |buf_alloc, fwd_cnt| Header { buf_alloc, fwd_cnt, ..Header::default() };
        connection.sent = 100;
        connection.credit(&say(1000, 0));
        assert_eq!(connection.room(), 900);
        // More forwarded than was sent.
        connection.credit(&say(1000, 200));
        assert_eq!(connection.room(), 0);
        connection.credit(&say(50, 0));
        assert_eq!(connection.room(), 0);
        connection.sent = 5;
        connection.credit(&say(10, u32::MAX));
        assert_eq!(connection.room(), 4);
    }
}
