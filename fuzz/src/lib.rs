//! What the fuzz targets share: devices on a machine without processors, a vCPU's callbacks that
//! answer from an input, and a watchdog that ends runs.

mod io;
mod machine;
mod watchdog;

pub use io::Answers;
pub use machine::{Access, Machine, Paused};
pub use watchdog::watched;
