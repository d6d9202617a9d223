//! The debug-exit port: how a test kernel ends its machine with an exit code.
//!
//! Compatible with QEMU's `isa-debug-exit`: writing `v` ends the machine with `(v << 1) | 1`, so
//! that no value means success by accident.

use std::sync::Arc;

use vmkit_device::{
    Device, DeviceBuilder, DeviceError, EndSignal, GuestEnd, IoFlow, IoNeed, Needs, Resources,
};

use crate::stateless::{Ports, Stateless};

/// A port that ends the machine when it is written.
///
/// The run ends inside the write: the guest executes nothing after it. Reads give zero.
///
/// ```
/// use vmkit_chipset::DebugExit;
/// use vmkit_device::{DeviceBuilder, IoNeed};
///
/// // A guest's `outb(0x10, 0xF4)` ends the machine with exit code 0x21.
/// let exit = DebugExit::at(0xF4);
/// assert_eq!(exit.needs().io, [IoNeed::ports(0xF4, 4)]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DebugExit {
    port: u16,
    width: u16,
}

impl DebugExit {
    /// At `port` and the three that follow it, for writes of 1, 2 or 4 bytes. Kernels expect 0xF4
    /// or 0x501.
    pub fn at(port: u16) -> Self {
        Self { port, width: 4 }
    }

    /// Takes only `width` ports, where its neighbours are in use; at most 4, at least 1.
    pub fn width(mut self, width: u16) -> Self {
        self.width = width.clamp(1, 4);
        self
    }
}

impl Default for DebugExit {
    fn default() -> Self {
        Self::at(0xF4)
    }
}

impl DeviceBuilder for DebugExit {
    fn name(&self) -> String {
        "debug-exit".into()
    }

    fn needs(&self) -> Needs {
        Needs { io: vec![IoNeed::ports(self.port, self.width)], irqs: Vec::new() }
    }

    fn build(self: Box<Self>, resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        Ok(Arc::new(Stateless { name: "debug-exit", ports: Exit(resources.end) }))
    }
}

struct Exit(EndSignal);

impl Ports for Exit {
    fn read(&self, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, data: &[u8]) -> IoFlow {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        self.0.raise(GuestEnd::ExitCode((u32::from_le_bytes(value) << 1) | 1));
        IoFlow::Stop
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Rig, abuses};

    #[test]
    fn a_write_of_any_width_ends_the_machine_with_its_code() {
        for (width, value, code) in
            [(1, 0x10, 0x21), (1, 0, 1), (2, 0x1234, 0x2469), (4, 0x8000_0001, 3)]
        {
            let rig = Rig::new(DebugExit::at(0xF4));
            assert_eq!(rig.inl(0xF4, width), 0);
            assert_eq!(rig.ended(), None);
            assert_eq!(rig.outl(0xF4, width, value), IoFlow::Stop);
            assert_eq!(rig.ended(), Some(GuestEnd::ExitCode(code)));
        }
    }

    #[test]
    fn its_width_stays_a_width_of_ports() {
        for (asked, got) in [(0, 1), (2, 2), (9, 4)] {
            let needs = DebugExit::at(0x501).width(asked).needs();
            assert_eq!(needs.io, [IoNeed::ports(0x501, got)]);
        }
    }

    proptest! {
        #[test]
        fn no_access_harms_the_device(accesses in abuses()) {
            let rig = Rig::new(DebugExit::default());
            rig.abuse(&accesses);
            rig.check_saved_state(&Rig::new(DebugExit::default()));
        }
    }
}
