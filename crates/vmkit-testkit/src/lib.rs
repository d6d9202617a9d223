//! Guest programs, guest images and helpers for the tests of vmkit.

pub mod alloc;
pub mod footprint;
pub mod oracle;
