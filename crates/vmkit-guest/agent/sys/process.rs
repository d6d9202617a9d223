//! Signals, children, and what this process was started with.

use core::ffi::{CStr, c_char};

use super::call::{call, number};
use super::file::{self, Fd, flag};
use crate::protocol::Exit;
use crate::service::Errno;

const CHILD: u32 = 17;
const PIPE: u32 = 13;

/// Bytes of the kernel's signal set.
pub(super) const SET: usize = 8;

/// The arguments or the environment that the kernel left on the stack.
#[derive(Clone, Copy)]
pub(crate) struct Environment(*const *const c_char);

impl Environment {
    /// # Safety
    /// `table` is an array of C strings that ends with a null pointer, and both last for ever.
    #[cfg_attr(test, expect(dead_code, reason = "for the program's entry"))]
    pub(crate) unsafe fn new(table: *const *const c_char) -> Self {
        Self(table)
    }

    /// No strings.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        struct Table([*const c_char; 1]);
        // SAFETY: the null pointer in it is never followed.
        unsafe impl Sync for Table {}
        static NOTHING: Table = Table([core::ptr::null()]);
        Self(NOTHING.0.as_ptr())
    }

    /// Each string with its zero byte.
    pub(crate) fn strings(self) -> impl Iterator<Item = &'static [u8]> + Clone {
        (0_usize..).map_while(move |index| {
            // SAFETY: whoever made this promises strings up to a null pointer, which ends the walk.
            let string = unsafe { *self.0.wrapping_add(index) };
            // SAFETY: not null, so a string that lasts for ever.
            (!string.is_null()).then(|| unsafe { CStr::from_ptr(string) }.to_bytes_with_nul())
        })
    }
}

/// This process's number.
pub(crate) fn own_process() -> u32 {
    // SAFETY: the call touches no memory.
    unsafe { call(number::GETPID, []) }.map_or(0, |process| process as u32)
}

/// Tells of children that ended.
pub(crate) struct SignalFd(Fd);

impl SignalFd {
    pub(crate) fn fd(&self) -> &Fd {
        &self.0
    }

    /// Forgets what was told.
    pub(crate) fn clear(&self) {
        let mut told = [0; 128 * 4];
        let _ = file::read(&self.0, &mut told);
    }
}

/// Gives signals their first meaning, for whoever started this process may have had some ignored;
/// holds back those of broken pipes; and has those of children come as data.
pub(crate) fn take_signals() -> Result<SignalFd, Errno> {
    /// `struct sigaction` of the kernel: handler, flags, restorer, mask.
    const DEFAULT: [usize; 4] = [0; 4];
    for signal in 1..=64_usize {
        // Two of them cannot be changed, and need not.
        // SAFETY: the kernel reads the structure, which names no handler.
        let _ = unsafe { call(number::RT_SIGACTION, [signal, DEFAULT.as_ptr() as usize, 0, SET]) };
    }
    let bit = |signal: u32| 1_u64 << (signal - 1);
    set_mask(bit(CHILD) | bit(PIPE))?;
    let children = bit(CHILD);
    let flags = flag::CLOEXEC | flag::NONBLOCK;
    let at = &raw const children as usize;
    // SAFETY: the kernel reads one set.
    let made = unsafe { call(number::SIGNALFD4, [usize::MAX, at, SET, flags]) };
    Fd::from_call(made).map(SignalFd)
}

/// Holds back the signals of `mask` and no others.
pub(super) fn set_mask(mask: u64) -> Result<(), Errno> {
    const SET_MASK: usize = 2;
    let at = &raw const mask as usize;
    // SAFETY: the kernel reads one set and is given nowhere to write.
    unsafe { call(number::RT_SIGPROCMASK, [SET_MASK, at, 0, SET]) }.map(drop)
}

/// Reaps child `process` if it has ended.
pub(crate) fn reap_process(process: u32) -> Option<Exit> {
    reap(process as usize).map(|(_, exit)| exit)
}

/// Reaps any child that has ended.
pub(crate) fn reap_any() -> Option<(u32, Exit)> {
    reap(usize::MAX)
}

fn reap(which: usize) -> Option<(u32, Exit)> {
    const NO_HANG: usize = 1;
    let mut status = 0_u32;
    let at = &raw mut status as usize;
    // SAFETY: the kernel writes one number, and nothing about resources.
    let process = unsafe { call(number::WAIT4, [which, at, NO_HANG, 0]) }.ok()?;
    let exit = match status & 0x7F {
        0 => Exit::Code((status >> 8) as u8),
        signal => Exit::Signal(signal as u8),
    };
    (process != 0).then_some((process as u32, exit))
}

/// Signals a child that has not been reaped, and its group.
pub(super) fn signal(process: u32, signal: u8) {
    let process = process as usize;
    // SAFETY: the call touches no memory.
    let group = unsafe { call(number::KILL, [process.wrapping_neg(), signal.into()]) };
    if group.is_err() {
        // It has not come to lead its group yet.
        // SAFETY: as above.
        let _ = unsafe { call(number::KILL, [process, signal.into()]) };
    }
}
