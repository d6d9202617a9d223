//! Where the memory lies that devices bring: above RAM, in the order of the devices.

use std::sync::Arc;

use vmkit_device::{DeviceBuilder, ResourceError};
use vmkit_hypervisor::MapAccess;
use vmkit_memory::{FileWrites, GuestAddress, HIGH_RAM_START, MemoryRegion, RamLayout};

use crate::VmError;

/// Places are multiples of this, the largest page with which a guest can map them.
const STEP: u64 = 1 << 30;

/// What devices bring, mapped on the host.
#[derive(Default)]
pub(crate) struct Placement {
    /// What to show the guest, ascending.
    pub(crate) regions: Vec<(Arc<MemoryRegion>, MapAccess)>,
    /// Each device's places, in the order of the devices.
    pub(crate) places: Vec<Vec<GuestAddress>>,
}

impl Placement {
    /// Maps the memory of `devices` above that of `layout`, below `limit`.
    pub(crate) fn of(
        devices: &[Box<dyn DeviceBuilder>],
        layout: &RamLayout,
        limit: u64,
    ) -> Result<Self, VmError> {
        let ram_end = layout.ranges().iter().map(|range| range.start.0 + range.len).max();
        let mut next = ram_end.unwrap_or(0).max(HIGH_RAM_START).next_multiple_of(STEP);
        let mut placement = Self::default();
        for device in devices {
            let mut places = Vec::new();
            for memory in device.memory() {
                let len = memory.bytes();
                let end = next.checked_add(len).filter(|end| *end <= limit);
                let end =
                    end.ok_or_else(|| ResourceError::Memory { device: device.name(), len })?;
                let access = match memory.writes() {
                    FileWrites::Through => MapAccess::WRITE,
                    FileWrites::Aside => MapAccess::empty(),
                };
                let region = Arc::new(memory.region(GuestAddress(next))?);
                placement.regions.push((region, access));
                places.push(GuestAddress(next));
                // `limit` is a power of two of at most 2^52.
                next = end.next_multiple_of(STEP);
            }
            placement.places.push(places);
        }
        Ok(placement)
    }
}

#[cfg(test)]
mod tests {
    use vmkit_virtio::Pmem;

    use super::*;

    fn pmem(bytes: u64, name: &str) -> Box<dyn DeviceBuilder> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        Box::new(Pmem::read_only_file(file.path()).unwrap().named(name))
    }

    #[test]
    fn memory_of_devices_lies_above_ram_in_their_order() {
        let devices = [pmem(2 << 20, "a"), pmem(3 << 30, "b"), pmem(4 << 20, "c")];
        let layout = RamLayout::pc(1 << 30).unwrap();
        let placement = Placement::of(&devices, &layout, 1 << 36).unwrap();
        let places: Vec<u64> = placement.places.concat().iter().map(|at| at.0 >> 30).collect();
        assert_eq!(places, [4, 5, 8]);
        assert!(placement.regions.iter().all(|(_, access)| *access == MapAccess::empty()));
        let high = Placement::of(&devices, &RamLayout::pc(5 << 30).unwrap(), 1 << 36).unwrap();
        assert_eq!(high.places[0], [GuestAddress(6 << 30)]);
    }

    #[test]
    fn what_the_processor_cannot_address_is_refused_by_name() {
        let devices = [pmem(2 << 20, "a"), pmem(4 << 30, "large")];
        let layout = RamLayout::pc(1 << 30).unwrap();
        let error = Placement::of(&devices, &layout, 1 << 33).err().unwrap();
        assert!(
            error.to_string().starts_with("large: no addresses for 0x100000000 bytes"),
            "{error}"
        );
    }
}
