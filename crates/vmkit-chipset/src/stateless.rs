//! Devices that only answer accesses: no state a guest could tell, no thread, nothing to reset.

use vmkit_device::{Announcement, Device, DeviceError, IoFlow, Saved, Section, SnapshotError};

/// What such a device does.
pub(crate) trait Ports: Send + Sync {
    fn announce(&self) -> Vec<Announcement> {
        Vec::new()
    }
    fn read(&self, data: &mut [u8]);
    fn write(&self, data: &[u8]) -> IoFlow;
}

/// The rest of a [`Device`] around it.
pub(crate) struct Stateless<P> {
    pub name: &'static str,
    pub ports: P,
}

impl<P: Ports> Device for Stateless<P> {
    fn name(&self) -> &str {
        self.name
    }

    fn announce(&self) -> Vec<Announcement> {
        self.ports.announce()
    }

    fn read(&self, _region: usize, _offset: u64, data: &mut [u8]) {
        self.ports.read(data);
    }

    fn write(&self, _region: usize, _offset: u64, data: &[u8]) -> IoFlow {
        self.ports.write(data)
    }

    fn start(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn pause(&self) {}

    fn reset(&self) {}

    fn save(&self) -> Saved {
        Saved::Stateless
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        load_nothing(self.name, sections)
    }
}

/// Loads a device that has no state: any section is one too many.
pub(crate) fn load_nothing(device: &str, sections: &[Section]) -> Result<(), DeviceError> {
    match sections.first() {
        None => Ok(()),
        Some(section) => {
            let source = SnapshotError::Kind {
                name: section.name.clone(),
                found: section.kind.clone(),
                want: "none".into(),
            };
            Err(DeviceError::State { device: device.into(), source })
        }
    }
}
