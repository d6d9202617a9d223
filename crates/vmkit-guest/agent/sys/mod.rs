//! The Linux that the agent runs on: its system calls, x86-64, without a C library.
//!
//! The only unsafe code of the agent is here. Every function outside [`call`] is safe to call: it
//! hands the kernel borrowed memory of the length it says, and owns the descriptors it makes.
#![allow(unsafe_code, reason = "system calls")]

mod call;
mod file;
mod linux;
mod memory;
mod process;
mod socket;
mod spawn;
mod wait;

pub(crate) use self::call::exit;
pub(crate) use self::file::{Fd, complain, occupy_standard_descriptors, read_small};
pub(crate) use self::linux::Linux;
pub(crate) use self::process::{
    Environment, SignalFd, own_process, reap_any, reap_process, take_signals,
};
pub(crate) use self::socket::{adopt, dial, receive, send};
pub(crate) use self::wait::{POLL_READ, POLL_WRITE, PollFd, poll, sleep_ms};
