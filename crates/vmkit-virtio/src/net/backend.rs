//! What a network card is plugged into.

use std::io;

use super::Offload;
use crate::{Event, Poller};

/// Bytes of the longest frame that is carried: 64 KiB of payload and an Ethernet header with a tag.
pub const MAX_FRAME: usize = 65_535 + 18;
/// Bytes of the shortest: an Ethernet header.
pub const MIN_FRAME: usize = 14;

/// What a driver agreed to do on the frames it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverOffloads {
    /// It finishes checksums.
    pub checksum: bool,
    /// It takes TCP over IPv4 that is still to be cut.
    pub tcp4: bool,
    /// It takes TCP over IPv6 that is still to be cut.
    pub tcp6: bool,
}

/// A network. Called from one thread at a time, the worker's, which never waits for it.
pub trait NetBackend: Send {
    /// Registers what the worker must wait for, under numbers below 2^31. Called again when a driver
    /// comes back.
    ///
    /// # Errors
    /// What the host said.
    fn register(&mut self, poller: &Poller) -> io::Result<()>;
    /// A registered descriptor has an event.
    fn event(&mut self, event: Event);
    /// True if frames may be sent, and may come, with work left to do on them.
    fn carries_offloads(&self) -> bool;
    /// A driver begins, which agreed to `takes`. What comes with more left to do on it is still taken:
    /// the device does it.
    fn agreed(&mut self, _takes: DriverOffloads) {}
    /// Sends one frame of [`MIN_FRAME`] to [`MAX_FRAME`] bytes, with `offload` left to do on it if
    /// [`carries_offloads`](Self::carries_offloads).
    ///
    /// # Errors
    /// `WouldBlock` if it must wait for an event: the frame is then offered again. Any other error
    /// drops the frame.
    fn send(&mut self, frame: &[u8], offload: &Offload) -> io::Result<()>;
    /// Called after a batch of [`send`](Self::send)s.
    fn flush(&mut self);
    /// Receives one frame into `into`, which has room for [`MAX_FRAME`] bytes; returns its length
    /// and what is left to do on it.
    ///
    /// # Errors
    /// `WouldBlock` if there is none: an event will tell of the next.
    fn receive(&mut self, into: &mut [u8]) -> io::Result<(usize, Offload)>;
}
