//! PC platform devices of vmkit: serial ports, RTC, i8042, ACPI power, debug exit, panic notifier.
//!
//! Each is a value that a machine's builder takes ([`vmkit_device::DeviceBuilder`]); what the host
//! does with it (type, read its output, press a button) goes through handles that the value gives
//! out before. No device here sees a hypervisor, and none trusts a guest.

mod access;
mod debug_exit;
mod debug_port;
mod i8042;
mod output;
mod pm;
mod pvpanic;
mod rtc;
mod serial;
mod stateless;
#[cfg(test)]
mod testing;

pub use debug_exit::DebugExit;
pub use debug_port::{DebugPort, PostPort};
pub use i8042::I8042;
pub use output::{Capture, OutputProbe, SerialOutput};
pub use pm::{AcpiPm, PowerButton};
pub use pvpanic::PvPanic;
pub use rtc::Rtc;
pub use serial::{Serial, SerialInput};

use vmkit_device::{DeviceBuilder, DeviceError, IrqLine, Resources};

/// What software expects of every PC: clock, keyboard controller, ACPI power management, POST port.
/// No console, and none of the devices through which a guest ends its machine with a code.
///
/// ```
/// use vmkit_chipset::{DebugExit, Serial, standard_pc};
/// use vmkit_device::DeviceBuilder;
///
/// let mut devices = standard_pc();
/// devices.push(Box::new(Serial::stdio()));
/// devices.push(Box::new(DebugExit::at(0xF4)));
/// let names: Vec<String> = devices.iter().map(|device| device.name()).collect();
/// assert_eq!(names, ["rtc", "i8042", "acpi-pm", "post", "serial0", "debug-exit"]);
/// ```
///
/// Push [`AcpiPm`] yourself instead if you want its power button or another reset port.
pub fn standard_pc() -> Vec<Box<dyn DeviceBuilder>> {
    vec![
        Box::new(Rtc::new()),
        Box::new(I8042::new()),
        Box::new(AcpiPm::new()),
        Box::new(PostPort::new()),
    ]
}

/// The line `index` that `device` asked for.
fn required_line(
    device: &str,
    resources: &Resources,
    index: usize,
) -> Result<IrqLine, DeviceError> {
    resources.line(index).ok_or_else(|| DeviceError::Config {
        device: device.into(),
        reason: format!("interrupt line {index} is missing from its resources"),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmkit_device::memory::{Backing, RamLayout, allocate};
    use vmkit_device::{
        Bus, BusRange, EndSignal, GuestEnd, IoFlow, IoSpace, ManualClock, ResourceAllocator,
    };

    use super::*;
    use crate::testing::Wires;

    #[test]
    fn all_devices_of_this_crate_fit_on_one_bus() {
        let wires = Arc::new(Wires::default());
        let end = EndSignal::default();
        let memory = allocate(&RamLayout::pc(1 << 20).unwrap(), Backing::Anonymous).unwrap();
        let clock = Arc::new(ManualClock::default());
        let base = Resources::new(memory, clock, end.clone(), wires.clone());
        let mut allocator = ResourceAllocator::new(wires);
        let bus = Arc::new(Bus::new());
        let mut devices = standard_pc();
        for serial in [Serial::com1(), Serial::com2(), Serial::com3(), Serial::com4()] {
            devices.push(Box::new(serial));
        }
        devices.push(Box::new(DebugExit::default()));
        devices.push(Box::new(PvPanic::new()));
        devices.push(Box::new(DebugPort::new()));
        for builder in devices {
            let (needs, mut resources) = (builder.needs(), base.clone());
            allocator.assign(&builder.name(), &needs, &mut resources).unwrap();
            let ranges = resources.io.clone();
            let device = builder.build(resources).unwrap();
            device.start().unwrap();
            for (region, (need, &start)) in needs.io.iter().zip(&ranges).enumerate() {
                let range = BusRange { space: need.space, start, len: need.len };
                bus.insert(range, device.clone(), region).unwrap();
            }
        }
        let mut view = bus.view();
        let mut byte = [0];
        view.read(IoSpace::Pio, 0xE9, &mut byte);
        assert_eq!(byte, [0xE9]);
        assert_eq!(view.write(IoSpace::Pio, 0x3F8, b"x"), IoFlow::Continue);
        assert_eq!(view.write(IoSpace::Pio, 0xCF9, &[0x06]), IoFlow::Stop);
        assert_eq!((end.raised(), view.unclaimed()), (Some(GuestEnd::Reset), 0));
    }
}
