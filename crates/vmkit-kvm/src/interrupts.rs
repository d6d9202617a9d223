//! Interrupts into the controllers, in the kernel or split.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_msi;
use vmkit_device::MsiRoute;
use vmkit_hypervisor::{EventFd, InterruptControllers, InterruptSink, Msi};

use crate::error::io_error;
use crate::partition::Shared;
use crate::routing;

/// Inputs of the IOAPIC.
pub(crate) const GSIS: u32 = 24;

/// The interrupt controllers of a partition.
pub(crate) struct KvmInterrupts(pub(crate) Arc<Shared>);

impl InterruptSink for KvmInterrupts {
    fn set_level(&self, gsi: u32, high: bool) {
        if let Some(split) = &self.0.split {
            return split.set_level(gsi, high);
        }
        if self.0.controllers == InterruptControllers::None || gsi >= GSIS {
            return;
        }
        if let Err(error) = self.0.vm.set_irq_line(gsi, high) {
            log::error!("interrupt input {gsi} could not be driven: {error}");
        }
    }

    fn signal_msi(&self, msi: Msi) {
        let Some(message) = kvm_message(msi) else { return };
        if self.0.controllers == InterruptControllers::None {
            return;
        }
        // Zero means that the guest blocked it; that is the guest's business.
        if let Err(error) = self.0.vm.signal_msi(message) {
            // The address and data are the guest's, and so may be nonsense: not worth more.
            log::debug!("MSI {:#x}/{:#x} not delivered: {error}", msi.address, msi.data);
        }
    }

    fn attach_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        if let Some(split) = &self.0.split {
            return split.attach_irqfd(fd, gsi);
        }
        if self.0.controllers != InterruptControllers::Full || gsi >= GSIS {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.0.vm.register_irqfd(fd, gsi).map_err(io_error)
    }

    fn route_msi(&self, fd: &EventFd) -> io::Result<Box<dyn MsiRoute>> {
        if self.0.controllers == InterruptControllers::None {
            return Err(io::ErrorKind::Unsupported.into());
        }
        routing::route_msi(&self.0, fd)
    }
}

/// The message in KVM's form, with destination bits 31:8 in `address_hi`; `None` if it is a write to
/// somewhere else than the local APICs.
pub(crate) fn kvm_message(msi: Msi) -> Option<kvm_msi> {
    if msi.address >> 20 != 0xFEE {
        return None;
    }
    let address = msi.address as u32;
    Some(kvm_msi {
        // Bits 11:5 are bits 14:8 of an extended destination.
        address_lo: address & !0xFE0,
        address_hi: (address >> 5 & 0x7F) << 8,
        data: msi.data,
        ..kvm_msi::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_elsewhere_is_no_message() {
        assert!(kvm_message(Msi { address: 0xFED0_0000, data: 0x41 }).is_none());
        assert!(kvm_message(Msi { address: 0x1_FEE0_0000, data: 0x41 }).is_none());
    }

    #[test]
    fn extended_destination_bits_move_to_the_high_word() {
        let found = kvm_message(Msi { address: 0xFEE2_C024, data: 0x41 }).unwrap();
        assert_eq!((found.address_lo, found.address_hi), (0xFEE2_C004, 0x100));
    }
}
