//! The devices every PC has, which a machine holds unless its builder says otherwise.

use vmkit_chipset::{AcpiPm, PowerButton, PvPanic, standard_pc};
use vmkit_device::{DeviceBuilder, IoSpace};

/// Where the ACPI reset register is on most PCs.
const RESET_PORT: u16 = 0xCF9;
/// Where it is on a machine with a PCI host bridge, whose ports are on both sides of the usual place.
const MOVED_RESET_PORT: u16 = 0x60C;

/// Which devices a machine holds beside the ones its builder was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Chipset {
    /// What a stock kernel looks for: real-time clock, i8042 (whose reset line works), ACPI power
    /// management with a power button and a reset register, the POST port, and pvpanic. A device that
    /// is given to the builder under the name of one of these takes its place.
    #[default]
    Pc,
    /// Nothing.
    Bare,
}

/// The devices of `chipset` that `given` does not replace, and the power button if it is theirs.
pub(crate) fn devices(
    chipset: Chipset,
    given: &[Box<dyn DeviceBuilder>],
) -> (Vec<Box<dyn DeviceBuilder>>, Option<PowerButton>) {
    let Chipset::Pc = chipset else { return (Vec::new(), None) };
    let pm = if takes_port(given, RESET_PORT) {
        AcpiPm::new().reset_port(MOVED_RESET_PORT)
    } else {
        AcpiPm::new()
    };
    let button = pm.power_button();
    let pm_name = pm.name();
    let mut devices = standard_pc();
    // The same, but with a button in our hand.
    devices.retain(|device| device.name() != pm_name);
    devices.push(Box::new(pm));
    devices.push(Box::new(PvPanic::new()));
    devices.retain(|device| given.iter().all(|other| other.name() != device.name()));
    let ours = devices.iter().any(|device| device.name() == pm_name);
    (devices, ours.then_some(button))
}

/// True if a device of `given` answers `port`.
fn takes_port(given: &[Box<dyn DeviceBuilder>], port: u16) -> bool {
    let port = u64::from(port);
    given.iter().flat_map(|device| device.needs().io).any(|need| {
        let from = |at: u64| at <= port && port - at < need.len;
        need.space == IoSpace::Pio && need.at.is_some_and(from)
    })
}

#[cfg(test)]
mod tests {
    use vmkit_pci::PciHost;

    use super::*;

    #[test]
    fn a_host_bridge_moves_the_reset_register_out_of_its_way() {
        let reset_port = |given: &[Box<dyn DeviceBuilder>]| {
            let devices = super::devices(Chipset::Pc, given).0;
            [RESET_PORT, MOVED_RESET_PORT].map(|port| takes_port(&devices, port))
        };
        assert_eq!(reset_port(&[]), [true, false]);
        assert_eq!(reset_port(&[Box::new(PciHost::new())]), [false, true]);
    }

    #[test]
    fn a_device_of_the_same_name_replaces_the_chipsets_own() {
        let given: Vec<Box<dyn DeviceBuilder>> = vec![Box::new(AcpiPm::new())];
        let (devices, button) = super::devices(Chipset::Pc, &given);
        assert!(button.is_none());
        assert_eq!(devices.len(), super::devices(Chipset::Pc, &[]).0.len() - 1);
        assert!(super::devices(Chipset::Bare, &[]).0.is_empty());
    }
}
