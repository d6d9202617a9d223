//! What the example programs share: arguments, the terminal, signals, Debian's kernel, and exit
//! statuses. Not part of the library.

#![allow(missing_debug_implementations, reason = "no library for others")]

pub mod agent;
pub mod args;
pub mod console;
pub mod debian;
pub mod devices;
pub mod disk;
pub mod exit;
pub mod image;
pub mod initramfs;
pub mod keyboard;
pub mod logging;
pub mod modules;
pub mod signals;
pub mod terminal;
pub mod timing;

pub use exit::Failure;
