//! pvpanic: how a guest kernel tells its host that it panicked (QEMU `docs/specs/pvpanic`).

use std::sync::Arc;

use vmkit_device::{
    Announcement, Device, DeviceBuilder, DeviceError, EndSignal, GuestEnd, IoFlow, IoNeed, Needs,
    Resources,
};

use crate::stateless::{Ports, Stateless};

/// Event bit: the kernel panicked and the host is to deal with it.
const PANICKED: u8 = 1 << 0;
/// Event bit: the kernel panicked and goes on in a crash kernel of its own.
const CRASH_LOADED: u8 = 1 << 1;

/// The panic notifier. A guest that panics ends the machine with
/// [`GuestEnd::Panicked`]; one that has a crash kernel to run is only noted in the log.
///
/// ```
/// use vmkit_chipset::PvPanic;
/// use vmkit_device::{DeviceBuilder, IoNeed};
///
/// assert_eq!(PvPanic::new().needs().io, [IoNeed::ports(0x505, 1)]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PvPanic {
    port: u16,
}

impl PvPanic {
    /// At its usual port, 0x505.
    pub fn new() -> Self {
        Self::at(0x505)
    }

    /// At `port`. Guests learn it from ACPI.
    pub fn at(port: u16) -> Self {
        Self { port }
    }
}

impl Default for PvPanic {
    fn default() -> Self {
        Self::new()
    }
}

impl DeviceBuilder for PvPanic {
    fn name(&self) -> String {
        "pvpanic".into()
    }

    fn needs(&self) -> Needs {
        Needs { io: vec![IoNeed::ports(self.port, 1)], irqs: Vec::new() }
    }

    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        let ports = Notifier { port: self.port, end: resources.end };
        Ok(Arc::new(Stateless { name: "pvpanic", ports }))
    }
}

struct Notifier {
    port: u16,
    end: EndSignal,
}

impl Ports for Notifier {
    fn announce(&self) -> Vec<Announcement> {
        vec![Announcement::PvPanic { port: self.port }]
    }

    fn read(&self, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, data: &[u8]) -> IoFlow {
        let events = data.first().copied().unwrap_or_default();
        if events & PANICKED != 0 {
            self.end.raise(GuestEnd::Panicked);
            return IoFlow::Stop;
        }
        if events & CRASH_LOADED != 0 {
            // Debug level: a guest may write this as often as it likes.
            log::debug!("the guest panicked and runs its crash kernel");
        }
        IoFlow::Continue
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Rig, abuses};

    #[test]
    fn a_panic_ends_the_machine_and_a_crash_kernel_does_not() {
        let rig = Rig::new(PvPanic::new());
        assert_eq!(rig.inb(0x505), 3);
        assert_eq!(rig.outb(0x505, CRASH_LOADED), IoFlow::Continue);
        assert_eq!(rig.outb(0x505, 0xFC), IoFlow::Continue, "events it does not offer");
        assert_eq!(rig.ended(), None);
        assert_eq!(rig.outb(0x505, PANICKED), IoFlow::Stop);
        assert_eq!(rig.ended(), Some(GuestEnd::Panicked));
    }

    #[test]
    fn firmware_tables_say_where_it_is() {
        let rig = Rig::new(PvPanic::at(0x510));
        assert_eq!(rig.device.announce(), [Announcement::PvPanic { port: 0x510 }]);
    }

    proptest! {
        #[test]
        fn no_access_harms_the_device(accesses in abuses()) {
            let rig = Rig::new(PvPanic::new());
            rig.abuse(&accesses);
            rig.check_saved_state(&Rig::new(PvPanic::new()));
        }
    }
}
