//! Somebody who dialled, until the first message says whether it is an agent.
//!
//! It is heard in short rounds and never waited for longer than a round, so that one who dials and stays
//! silent holds up nobody.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::error::{GuestError, ProtocolError};
use crate::protocol::{HEADER, ToHost, VERSION, split_frame};

/// A stream whose other end has not said hello yet.
pub(crate) struct Dialler {
    stream: UnixStream,
    heard: Vec<u8>,
    since: Instant,
}

impl Dialler {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, heard: Vec::new(), since: Instant::now() }
    }

    /// How long ago it dialled.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Listens for at most `limit`, which is not zero. True once the hello of an agent was heard.
    pub(crate) fn hear(&mut self, limit: Duration) -> Result<bool, GuestError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some((frame, _)) = split_frame(&self.heard) {
                return match ToHost::parse(&frame).map_err(ProtocolError::from)? {
                    ToHost::Hello(version) if version < VERSION => {
                        Err(ProtocolError::Version(version).into())
                    }
                    ToHost::Hello(_) if frame.channel == 0 => Ok(true),
                    _ => Err(ProtocolError::OutOfPlace(frame.channel).into()),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut piece = vec![0; self.missing()];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(GuestError::Disconnected),
                Ok(count) => self.heard.extend(piece.iter().take(count)),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                    kind => return Err(GuestError::Stream(kind)),
                },
            }
        }
    }

    /// Bytes to read next. Nothing behind the frame is taken: first its head, then the rest.
    fn missing(&self) -> usize {
        let whole = match self.heard.as_slice() {
            &[_, _, l0, l1, _, _, _, _, ..] => HEADER + usize::from(u16::from_le_bytes([l0, l1])),
            _ => HEADER,
        };
        whole - self.heard.len()
    }

    /// The stream, behind the hello.
    pub(crate) fn into_stream(self) -> io::Result<UnixStream> {
        self.stream.set_read_timeout(None)?;
        Ok(self.stream)
    }
}
