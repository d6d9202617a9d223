//! Descriptors, and reading and writing them.

use super::call::{call, number};
use crate::service::Errno;

/// Flags of open and pipe (Linux, include/uapi/asm-generic/fcntl.h).
pub(super) mod flag {
    pub(crate) const READ: usize = 0;
    pub(crate) const WRITE: usize = 1;
    pub(crate) const READ_WRITE: usize = 2;
    pub(crate) const CREATE: usize = 0o100;
    pub(crate) const NO_TERMINAL: usize = 0o400;
    pub(crate) const TRUNCATE: usize = 0o1000;
    pub(crate) const NONBLOCK: usize = 0o4000;
    pub(crate) const CLOEXEC: usize = 0o2_000_000;
}

/// An open descriptor, closed when dropped.
#[derive(Debug)]
pub(crate) struct Fd(i32);

impl Fd {
    /// Takes over what a call made.
    pub(super) fn from_call(result: Result<usize, Errno>) -> Result<Self, Errno> {
        result.map(|fd| Self(fd as i32))
    }

    pub(super) fn number(&self) -> usize {
        self.0 as usize
    }

    pub(super) fn raw(&self) -> i32 {
        self.0
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: the call touches no memory, and nobody else has this descriptor.
        let _ = unsafe { call(number::CLOSE, [self.number()]) };
    }
}

/// Opens `path`, which ends with a zero byte. The descriptor is not for programs.
pub(super) fn open(path: &[u8], flags: usize, mode: u16) -> Result<Fd, Errno> {
    /// Relative to this process's directory.
    const HERE: usize = -100_isize as usize;
    if path.last() != Some(&0) {
        return Err(Errno(22));
    }
    let flags = flags | flag::CLOEXEC | flag::NO_TERMINAL;
    // SAFETY: the path ends within `path`.
    let result =
        unsafe { call(number::OPENAT, [HERE, path.as_ptr() as usize, flags, mode.into()]) };
    Fd::from_call(result)
}

pub(super) fn read(fd: &Fd, into: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most the length of `into` there.
    unsafe { call(number::READ, [fd.number(), into.as_mut_ptr() as usize, into.len()]) }
}

pub(super) fn write(fd: &Fd, bytes: &[u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel reads at most the length of `bytes` there.
    unsafe { call(number::WRITE, [fd.number(), bytes.as_ptr() as usize, bytes.len()]) }
}

/// A pipe whose ends programs do not inherit: to read, to write.
pub(super) fn pipe() -> Result<(Fd, Fd), Errno> {
    let mut ends = [0_i32; 2];
    // SAFETY: the kernel writes two numbers.
    unsafe { call(number::PIPE2, [ends.as_mut_ptr() as usize, flag::CLOEXEC]) }?;
    let [read, write] = ends;
    Ok((Fd(read), Fd(write)))
}

/// Makes calls on `fd` return at once.
pub(super) fn set_nonblocking(fd: &Fd) -> Result<(), Errno> {
    const SET_FLAGS: usize = 4;
    // SAFETY: the call touches no memory.
    unsafe { call(number::FCNTL, [fd.number(), SET_FLAGS, flag::NONBLOCK]) }.map(drop)
}

/// Another descriptor of the same file, above those of standard input and output.
pub(super) fn duplicate(fd: i32) -> Result<Fd, Errno> {
    const DUPLICATE_CLOEXEC: usize = 1030;
    // SAFETY: the call touches no memory.
    Fd::from_call(unsafe { call(number::FCNTL, [fd as usize, DUPLICATE_CLOEXEC, 3]) })
}

/// Mode and size of an open file.
pub(super) fn mode_and_size(fd: &Fd) -> Result<(u32, u64), Errno> {
    // `struct stat` of x86-64: 144 bytes, of which the mode is word 6 and the size long 6.
    let mut stat = [0_u64; 18];
    // SAFETY: the kernel writes 144 bytes.
    unsafe { call(number::FSTAT, [fd.number(), stat.as_mut_ptr() as usize]) }?;
    let [_, _, _, mode, _, _, size, ..] = stat;
    Ok((mode as u32, size))
}

/// Sets the permission bits of an open file.
pub(super) fn set_mode(fd: &Fd, mode: u16) -> Result<(), Errno> {
    // SAFETY: the call touches no memory.
    unsafe { call(number::FCHMOD, [fd.number(), mode.into()]) }.map(drop)
}

/// Reads the beginning of a file, as much as `into` holds.
pub(crate) fn read_small<'a>(path: &[u8], into: &'a mut [u8]) -> &'a [u8] {
    let read = open(path, flag::READ, 0).and_then(|fd| read(&fd, into));
    into.get(..read.unwrap_or(0)).unwrap_or(&[])
}

/// Sees to it that descriptors 0 to 2 are open, so that no file of ours is among them.
pub(crate) fn occupy_standard_descriptors() {
    while let Ok(fd) = open(b"/dev/null\0", flag::READ_WRITE, 0).or_else(|_| pipe().map(|p| p.0)) {
        if fd.raw() > 2 {
            return;
        }
        core::mem::forget(fd);
    }
}

/// Writes to standard error.
pub(crate) fn complain(text: &str) {
    // Nobody is there to hear of a failure.
    let _ = write(&core::mem::ManuallyDrop::new(Fd(2)), text.as_bytes());
}
