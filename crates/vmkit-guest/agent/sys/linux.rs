//! The service's [`Os`] on Linux.

use super::call::{call, number};
use super::file::{self, Fd, flag};
use super::memory::Mapping;
use super::process::{self, Environment};
use super::spawn::spawn;
use crate::protocol::{Exec, Failure, Size};
use crate::service::{Errno, Opened, Os, Spawned};

// Parts of a mode (Linux, include/uapi/linux/stat.h).
const TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// Files and processes of this Linux.
pub(crate) struct Linux {
    /// What commands inherit.
    environment: Environment,
}

impl Linux {
    pub(crate) fn new(environment: Environment) -> Self {
        Self { environment }
    }
}

impl Os for Linux {
    type Fd = Fd;
    type Buffer = Mapping;

    fn buffer(&mut self, len: usize) -> Result<Mapping, Errno> {
        Mapping::new(len)
    }

    fn spawn(&mut self, exec: &Exec<'_>) -> Result<Spawned<Fd>, Failure> {
        spawn(exec, self.environment)
    }

    fn open_to_read(&mut self, path: &[u8]) -> Result<Opened<Fd>, Errno> {
        const EISDIR: Errno = Errno(21);
        let fd = file::open(path, flag::READ | flag::NONBLOCK, 0)?;
        let (mode, size) = file::mode_and_size(&fd)?;
        if mode & TYPE == DIRECTORY {
            return Err(EISDIR);
        }
        Ok(Opened { fd, mode, size })
    }

    fn open_to_write(&mut self, path: &[u8], mode: u16) -> Result<Fd, Errno> {
        let flags = flag::WRITE | flag::CREATE | flag::TRUNCATE | flag::NONBLOCK;
        let fd = file::open(path, flags, mode)?;
        if file::mode_and_size(&fd)?.0 & TYPE == REGULAR {
            // A file that was there, and what this process's mask took away.
            file::set_mode(&fd, mode)?;
        }
        Ok(fd)
    }

    fn read(&mut self, fd: &Fd, into: &mut [u8]) -> Result<usize, Errno> {
        file::read(fd, into)
    }

    fn write(&mut self, fd: &Fd, bytes: &[u8]) -> Result<usize, Errno> {
        file::write(fd, bytes)
    }

    fn signal(&mut self, process: u32, signal: u8) {
        process::signal(process, signal);
    }

    fn resize(&mut self, terminal: &Fd, size: Size) {
        set_size(terminal, size);
    }

    fn end_terminal(&mut self, terminal: &Fd) {
        const GET: usize = 0x5401;
        const CANONICAL: u32 = 2;
        /// Where the end-of-file character is among those of `struct termios`.
        const END_OF_FILE: usize = 17 + 4;
        let mut termios = [0_u8; 60];
        let at = termios.as_mut_ptr() as usize;
        // SAFETY: the kernel writes `struct termios`, 36 bytes.
        let got = unsafe { call(number::IOCTL, [terminal.number(), GET, at]) };
        let [.., l0, l1, l2, l3] = *termios.first_chunk::<16>().unwrap_or(&[0; 16]);
        if got.is_ok() && u32::from_le_bytes([l0, l1, l2, l3]) & CANONICAL != 0 {
            let character = termios.get(END_OF_FILE..=END_OF_FILE).unwrap_or(&[]);
            // A terminal whose queue is full has a reader that is not waiting for this.
            let _ = file::write(terminal, character);
        }
    }
}

/// Tells a terminal its size.
pub(super) fn set_size(terminal: &Fd, size: Size) {
    const SET: usize = 0x5414;
    let size = [size.rows, size.columns, 0, 0];
    // SAFETY: the kernel reads `struct winsize`, four numbers.
    let _ = unsafe { call(number::IOCTL, [terminal.number(), SET, size.as_ptr() as usize]) };
}
