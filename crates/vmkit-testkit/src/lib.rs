//! Guest programs, guest images and helpers for the tests of vmkit.

#![allow(missing_debug_implementations, reason = "only tests use it")]

pub mod alloc;
pub mod footprint;
pub mod oracle;
