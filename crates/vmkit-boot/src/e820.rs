//! The memory map a PC's firmware hands to a kernel (ACPI 6.5 §15).

use vmkit_device::Announcement;
use vmkit_memory::{HIGH_RAM_START, MMIO_HOLE_START};

use crate::BootContext;
use crate::place::{EBDA_END, EBDA_START, FIRMWARE, HIGH_START};

/// What a range of the map is for; the values are those of the address-range types of ACPI 6.5 §15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u32)]
pub enum RangeKind {
    /// RAM that the guest may use.
    Usable = 1,
    /// Anything else.
    Reserved = 2,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is for.
    pub kind: RangeKind,
}

/// The memory map of a machine: ascending, disjoint, at most a handful of ranges.
pub fn memory_map(ctx: &BootContext<'_>) -> Vec<MapRange> {
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MapRange { start, len: end - start, kind });
        }
    };
    let mut ecams: Vec<(u64, u64)> = ctx.announcements.iter().filter_map(ecam).collect();
    ecams.sort_unstable();
    let ram_in = |from: u64, to: u64| {
        let ranges = ctx.layout.ranges().iter();
        ranges.map(move |r| (r.start.0.max(from), (r.start.0.saturating_add(r.len)).min(to)))
    };
    for (start, end) in ram_in(0, EBDA_START) {
        add(start, end, RangeKind::Usable);
    }
    for (start, end) in ram_in(EBDA_START, EBDA_END) {
        add(start, end, RangeKind::Reserved);
    }
    for (start, end) in ram_in(FIRMWARE.start, FIRMWARE.end) {
        add(start, end, RangeKind::Reserved);
    }
    for (start, end) in ram_in(HIGH_START, HIGH_RAM_START) {
        add(start, end, RangeKind::Usable);
    }
    // A kernel trusts a PCI configuration window only if the map reserves it.
    for (start, end) in ecams.iter().filter(|e| e.0 >= MMIO_HOLE_START && e.1 <= HIGH_RAM_START) {
        add(*start, *end, RangeKind::Reserved);
    }
    for (start, end) in ram_in(HIGH_RAM_START, u64::MAX) {
        add(start, end, RangeKind::Usable);
    }
    map
}

fn ecam(announcement: &Announcement) -> Option<(u64, u64)> {
    match *announcement {
        Announcement::PciHost { ecam, buses, .. } => {
            Some((ecam, ecam.saturating_add(u64::from(buses) << 20)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use vmkit_memory::{Backing, RamLayout};

    use super::*;

    fn map_of(bytes: u64) -> Vec<MapRange> {
        let layout = RamLayout::pc(bytes).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let pci = [Announcement::PciHost {
            ecam: 0xE000_0000,
            buses: 16,
            mmio32: (0xD000_0000, 0x1000_0000),
            mmio64: (1 << 40, 1 << 40),
            io: (0x1000, 0x8000),
            intx: [16, 17, 18, 19],
        }];
        memory_map(&BootContext::new(&ram, &layout).announcements(&pci))
    }

    #[test]
    fn a_large_machine_has_holes_for_bios_and_mmio() {
        use RangeKind::{Reserved, Usable};
        let ranges: Vec<_> =
            map_of(4 << 30).iter().map(|r| (r.start, r.start + r.len, r.kind)).collect();
        assert_eq!(
            ranges,
            [
                (0, 0x9_FC00, Usable),
                (0x9_FC00, 0xA_0000, Reserved),
                (0xE_0000, 0x10_0000, Reserved),
                (0x10_0000, 0xC000_0000, Usable),
                (0xE000_0000, 0xE100_0000, Reserved),
                (0x1_0000_0000, 0x1_4000_0000, Usable),
            ]
        );
    }

    #[test]
    fn a_machine_below_one_mib_has_no_range_past_its_ram() {
        let map = map_of(64 << 10);
        assert_eq!(map[0], MapRange { start: 0, len: 64 << 10, kind: RangeKind::Usable });
        assert_eq!(map.len(), 2, "only RAM and the PCI window: {map:x?}");
    }
}
