//! What the benchmarks of vmkit run: guest programs, and small machines to run them on, through vmkit
//! and on bare ioctls.

#![allow(missing_debug_implementations, reason = "no library for others")]

pub mod bare;
pub mod guests;
pub mod machine;
pub mod programs;
mod rounds;
