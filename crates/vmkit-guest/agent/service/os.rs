//! What a service asks of its kernel.

use core::ops::DerefMut;

use crate::protocol::{Exec, Failure, Size};

/// Linux's error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) u16);

/// Interrupted by a signal.
pub(crate) const EINTR: Errno = Errno(4);
/// Not now.
pub(crate) const EAGAIN: Errno = Errno(11);
/// A file is given up.
pub(crate) const ECANCELED: Errno = Errno(125);

/// A process that is about to execute a program.
pub(crate) struct Spawned<Fd> {
    pub(crate) process: u32,
    /// Ends when the program runs; has a step and an error number if it cannot.
    pub(crate) verdict: Fd,
    pub(crate) input: Option<Fd>,
    pub(crate) output: Option<Fd>,
    pub(crate) error: Option<Fd>,
    /// Input and output are a terminal.
    pub(crate) terminal: bool,
}

/// A file that is open for reading.
pub(crate) struct Opened<Fd> {
    pub(crate) fd: Fd,
    pub(crate) mode: u32,
    pub(crate) size: u64,
}

/// Files and processes. No call waits, apart from those that read or write a disk. Strings end with
/// a zero byte.
pub(crate) trait Os {
    /// An open file, closed when dropped.
    type Fd;
    /// Bytes, given back when dropped.
    type Buffer: DerefMut<Target = [u8]>;

    fn buffer(&mut self, len: usize) -> Result<Self::Buffer, Errno>;
    /// Makes a process in a session of its own.
    fn spawn(&mut self, exec: &Exec<'_>) -> Result<Spawned<Self::Fd>, Failure>;
    fn open_to_read(&mut self, path: &[u8]) -> Result<Opened<Self::Fd>, Errno>;
    fn open_to_write(&mut self, path: &[u8], mode: u16) -> Result<Self::Fd, Errno>;
    fn read(&mut self, fd: &Self::Fd, into: &mut [u8]) -> Result<usize, Errno>;
    fn write(&mut self, fd: &Self::Fd, bytes: &[u8]) -> Result<usize, Errno>;
    /// Signals a process that has not been reaped, and its group.
    fn signal(&mut self, process: u32, signal: u8);
    fn resize(&mut self, terminal: &Self::Fd, size: Size);
    /// Types the end-of-file character, if the terminal takes lines.
    fn end_terminal(&mut self, terminal: &Self::Fd);
}
