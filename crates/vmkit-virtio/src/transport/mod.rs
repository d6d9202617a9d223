//! Transports: how a guest finds a device, sets up its queues, and is interrupted.

mod bells;
pub(crate) mod common;
pub mod mmio;
pub mod pci;
#[cfg(test)]
mod pci_tests;
#[cfg(test)]
mod tests;
