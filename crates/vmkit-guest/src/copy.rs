//! Files of the guest.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use crate::channel::{Channel, Purpose};
use crate::connection::Connection;
use crate::protocol::{Flow, MAX_PIECE, Stream, ToAgent};
use crate::{Guest, GuestError};

/// Bytes of a file that [`Guest::read`] returns at most.
const MOST: usize = 64 << 20;

/// A file that is under way.
struct Transfer<'a> {
    guest: &'a Guest,
    name: String,
    connection: Arc<Connection>,
    channel: Arc<Channel>,
}

impl<'a> Transfer<'a> {
    fn new(
        guest: &'a Guest,
        name: &OsStr,
        purpose: Purpose,
        message: &ToAgent<'_>,
    ) -> Result<Self, GuestError> {
        let connection = guest.connection()?;
        let channel = connection.open(purpose, message, guest.limit())?;
        Ok(Self { guest, name: name.to_string_lossy().into(), connection, channel })
    }

    fn flow(&self, stream: Stream, flow: Flow<'_>) -> Result<(), GuestError> {
        let message = ToAgent::Flow(stream, flow);
        self.connection.send(self.channel.id(), &message, self.guest.limit())
    }

    fn failed(&self) -> Result<(), GuestError> {
        let failure = self.channel.lock().failure;
        failure.map_or(Ok(()), |failure| Err(GuestError::refused(&self.name, failure)))
    }

    /// Waits for the guest's next bytes; none at the end.
    fn next(&self, into: &mut [u8]) -> Result<usize, GuestError> {
        let credit = self.channel.lock().take_credit(Stream::Output);
        if let Some(credit) = credit {
            self.flow(Stream::Output, Flow::Credit(credit))?;
        }
        let limit = Some(self.guest.limit());
        let count = self.channel.read(Stream::Output, into, limit)?;
        if count == 0 {
            self.failed()?;
        }
        Ok(count)
    }

    fn push(&self, mut bytes: &[u8]) -> Result<(), GuestError> {
        while !bytes.is_empty() {
            let limit = Some(self.guest.limit());
            let most = bytes.len().min(MAX_PIECE);
            let count = self.channel.wait(limit, |state| state.take_room(most))?;
            self.failed()?;
            let (piece, rest) = bytes.split_at_checked(count).unwrap_or((bytes, &[]));
            if piece.is_empty() {
                return Err(GuestError::Disconnected);
            }
            self.flow(Stream::Input, Flow::Data(piece))?;
            bytes = rest;
        }
        Ok(())
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        let writing = self.channel.lock().input.is_some();
        let reading = self.channel.abandon(Stream::Output);
        let stream = match (writing, reading) {
            (true, _) => Stream::Input,
            (false, true) => Stream::Output,
            _ => return,
        };
        self.connection.send_at_once(self.channel.id(), &ToAgent::Flow(stream, Flow::Close));
    }
}

fn zero_terminated(path: &OsStr) -> Result<Vec<u8>, GuestError> {
    let bytes = path.as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(GuestError::InvalidString(path.to_string_lossy().into()));
    }
    Ok([bytes, &[0]].concat())
}

impl Guest {
    /// Copies what `from` holds to the file `path` of the guest, which is made or overwritten and
    /// gets the permission bits `mode`. Returns the number of bytes. If it fails, a part of them
    /// may be there.
    ///
    /// # Errors
    /// [`GuestError::Refused`] if the guest cannot write it, [`GuestError::Host`] if `from` fails.
    pub fn copy_in(
        &self,
        mut from: impl Read,
        path: impl AsRef<OsStr>,
        mode: u32,
    ) -> Result<u64, GuestError> {
        let path = path.as_ref();
        let bytes = zero_terminated(path)?;
        let mode = (mode & 0o7777) as u16;
        let message = ToAgent::Write { mode, path: &bytes };
        let transfer = Transfer::new(self, path, Purpose::Write, &message)?;
        let mut piece = vec![0; MAX_PIECE];
        let mut total = 0;
        loop {
            let count = from.read(&mut piece)?;
            let Some(bytes) = piece.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
            transfer.push(bytes)?;
            total += count as u64;
        }
        transfer.flow(Stream::Input, Flow::End)?;
        transfer.channel.wait(Some(self.limit()), |state| {
            (state.stored || state.failure.is_some()).then_some(())
        })?;
        transfer.failed()?;
        Ok(total)
    }

    /// Copies the file `path` of the guest to `to`. Returns the number of bytes. A guest can make a
    /// file as long as it likes: `to` should have an opinion on that.
    ///
    /// # Errors
    /// [`GuestError::Refused`] if the guest cannot read it, [`GuestError::Host`] if `to` fails.
    pub fn copy_out(&self, path: impl AsRef<OsStr>, mut to: impl Write) -> Result<u64, GuestError> {
        let path = path.as_ref();
        let bytes = zero_terminated(path)?;
        let transfer = Transfer::new(self, path, Purpose::Read, &ToAgent::Read(&bytes))?;
        let mut piece = vec![0; MAX_PIECE];
        let mut total = 0;
        loop {
            let count = transfer.next(&mut piece)?;
            let Some(bytes) = piece.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
            to.write_all(bytes)?;
            total += count as u64;
        }
        Ok(total)
    }

    /// The contents of the file `path` of the guest, at most 64 MiB.
    ///
    /// # Errors
    /// [`GuestError::TooMuch`] if it is longer, else as [`copy_out`](Self::copy_out).
    pub fn read(&self, path: impl AsRef<OsStr>) -> Result<Vec<u8>, GuestError> {
        let path = path.as_ref();
        let mut bytes = Bounded(Vec::new());
        match self.copy_out(path, &mut bytes) {
            Err(GuestError::Host(error)) if error.kind() == std::io::ErrorKind::FileTooLarge => {
                Err(GuestError::TooMuch { what: path.to_string_lossy().into(), limit: MOST })
            }
            outcome => outcome.map(|_| bytes.0),
        }
    }

    /// Makes or overwrites the file `path` of the guest, for everybody to read and the agent's user
    /// to write.
    ///
    /// # Errors
    /// As [`copy_in`](Self::copy_in).
    pub fn write(
        &self,
        path: impl AsRef<OsStr>,
        bytes: impl AsRef<[u8]>,
    ) -> Result<(), GuestError> {
        self.copy_in(bytes.as_ref(), path, 0o644).map(drop)
    }
}

/// Bytes that refuse to become too many.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > MOST - self.0.len() {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
