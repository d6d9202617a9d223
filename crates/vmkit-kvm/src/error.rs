//! From what the kernel says to what this backend's callers are told.

use std::io;

use vmkit_hypervisor::HypervisorError;
use vmm_sys_util::errno;

/// The error for a refused ioctl; `what` names the attempt.
pub(crate) fn host(what: &'static str) -> impl Fn(errno::Error) -> HypervisorError {
    move |error| HypervisorError::Host { what, source: io_error(error) }
}

/// The error for a refused raw ioctl: the calling thread's `errno`.
pub(crate) fn last_os(what: &'static str) -> HypervisorError {
    HypervisorError::Host { what, source: io::Error::last_os_error() }
}

/// An errno as the standard library's error.
pub(crate) fn io_error(error: errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
