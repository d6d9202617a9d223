//! PCI for vmkit: a host bridge with one bus, configuration space by ports and by ECAM, BARs, MSI-X
//! and INTx.
//!
//! A [`PciHost`] is one device of a machine; the functions behind it ([`PciFunction`]) get their
//! configuration space, the decoding of their BARs and their interrupts from here, and know nothing
//! of ports or addresses. BARs live in one window of guest-physical memory: what a guest places
//! outside of it is not decoded, so it can hide neither RAM nor another device.
//!
//! Section numbers are those of the PCI Local Bus Specification 3.0, and PCIe's of the PCI Express
//! Base Specification 3.0.

mod config;
mod function;
mod host;
mod intx;
mod msix;
mod saved;
mod slot;
#[cfg(test)]
mod tests;

pub use config::{Capability, Description, Identity};
pub use function::{FunctionResources, PciFunction, PciFunctionBuilder};
pub use host::PciHost;
pub use intx::Intx;
pub use msix::{Msix, MsixPlace};
