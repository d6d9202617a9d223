//! The boot vCPU's state at a guest's first instruction.

use vmkit_hypervisor::x86::{
    Cr0, Cr4, DescriptorTable, Efer, Segment, SegmentAttributes, StateSet, VcpuState,
};
use vmkit_memory::PAGE_SIZE;

use crate::place::Placement;
use crate::{BootError, CpuMode, Entry};

/// Code and data selectors that Linux asks for (`__BOOT_CS` and `__BOOT_DS`), good for any guest.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// State set at entry.
const SET: StateSet = StateSet::GENERAL.union(StateSet::SEGMENTS).union(StateSet::CONTROL);

/// A vCPU at `rip` in `mode`, interrupts off, all other general registers zero. The descriptor
/// table and, for long mode, page tables go into low memory.
pub(crate) fn entry(
    place: &mut Placement<'_>,
    mode: CpuMode,
    rip: u64,
) -> Result<Entry, BootError> {
    let mut state = VcpuState::default();
    state.general.rip = rip;
    match mode {
        CpuMode::Real16 => real(&mut state, rip),
        CpuMode::Protected32 => {
            protected(&mut state, Segment::code32(CODE), put_gdt(place, Segment::code32(CODE))?);
            state.control.cr0 = (Cr0::PE | Cr0::ET).bits();
        }
        CpuMode::Long64 => {
            protected(&mut state, Segment::code64(CODE), put_gdt(place, Segment::code64(CODE))?);
            state.control.cr0 = (Cr0::PE | Cr0::ET | Cr0::NE | Cr0::PG).bits();
            state.control.cr3 = put_page_tables(place)?;
            state.control.cr4 = Cr4::PAE.bits();
            state.control.efer = (Efer::LME | Efer::LMA).bits();
        }
    }
    Ok(Entry { set: SET, state })
}

/// Real mode, `rip` being an address in the first MiB: segment 0 below 64 KiB, as a BIOS enters a
/// boot sector.
fn real(state: &mut VcpuState, rip: u64) {
    state.control.cr0 = Cr0::ET.bits();
    state.segments.cs = Segment {
        attributes: SegmentAttributes(0x9B),
        ..Segment::real(((rip >> 4) & 0xF000) as u16)
    };
    state.general.rip = rip & 0xFFFF;
    state.segments.idt = DescriptorTable { base: 0, limit: 0x3FF };
}

fn protected(state: &mut VcpuState, code: Segment, gdt: DescriptorTable) {
    let data = Segment::data(DATA);
    let segments = &mut state.segments;
    segments.cs = code;
    (segments.ds, segments.es, segments.ss) = (data, data, data);
    (segments.fs, segments.gs) = (data, data);
    segments.tr = task();
    segments.ldt =
        Segment { attributes: SegmentAttributes::UNUSABLE, limit: 0xFFFF, ..Segment::default() };
    segments.gdt = gdt;
    // No interrupt table: an exception before the guest has its own ends in a triple fault.
    segments.idt = DescriptorTable { base: 0, limit: 0 };
}

/// A busy task segment, which VMX wants of any guest (Intel SDM vol. 3C §27.3.1.2).
fn task() -> Segment {
    Segment { selector: TASK, base: 0, limit: 0x67, attributes: SegmentAttributes(0x8B) }
}

fn put_gdt(place: &mut Placement<'_>, code: Segment) -> Result<DescriptorTable, BootError> {
    // Null, unused, code, data, task (two entries in long mode).
    let table = [0, 0, descriptor(&code), descriptor(&Segment::data(DATA)), descriptor(&task()), 0];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let base = place.put_low("the descriptor table", &bytes, 16)?;
    Ok(DescriptorTable { base, limit: bytes.len() as u16 - 1 })
}

/// The descriptor of which `segment` is the loaded form (Intel SDM vol. 3A §3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let attributes = u64::from(segment.attributes.0);
    let limit =
        u64::from(if segment.attributes.granular() { segment.limit >> 12 } else { segment.limit });
    limit & 0xFFFF
        | (segment.base & 0xFF_FFFF) << 16
        | (attributes & 0xF0FF) << 40
        | (limit >> 16 & 0xF) << 48
        | (segment.base >> 24 & 0xFF) << 56
}

/// Identity-maps the first 4 GiB in pages of 2 MiB (Intel SDM vol. 3A §4.5.4); returns CR3.
fn put_page_tables(place: &mut Placement<'_>) -> Result<u64, BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const TABLE: usize = PAGE_SIZE as usize / 8;
    const DIRECTORIES: usize = 4;
    let base = place.low("the page tables", PAGE_SIZE * (2 + DIRECTORIES as u64), PAGE_SIZE)?;
    let table = |number: usize| base + PAGE_SIZE * number as u64;
    let mut entries = vec![0_u64; TABLE * (2 + DIRECTORIES)];
    entries[0] = table(1) | PRESENT_WRITABLE;
    for directory in 0..DIRECTORIES {
        entries[TABLE + directory] = table(2 + directory) | PRESENT_WRITABLE;
    }
    for (page, entry) in entries[2 * TABLE..].iter_mut().enumerate() {
        *entry = (page as u64) << 21 | LARGE | PRESENT_WRITABLE;
    }
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    place.write(base, &bytes)?;
    Ok(base)
}

#[cfg(test)]
mod tests {
    use vmkit_memory::{Backing, Bytes, GuestAddress, RamLayout};

    use super::*;
    use crate::BootContext;

    #[test]
    fn flat_descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&Segment::code32(8)), 0x00CF_9B00_0000_FFFF);
        assert_eq!(descriptor(&Segment::code64(8)), 0x00AF_9B00_0000_FFFF);
        assert_eq!(descriptor(&Segment::data(8)), 0x00CF_9300_0000_FFFF);
    }

    #[test]
    fn long_mode_maps_every_address_below_four_gib_to_itself() {
        let layout = RamLayout::pc(1 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let ctx = BootContext::new(&ram, &layout);
        let mut place = Placement::new(&ctx, "k");
        let entry = entry(&mut place, CpuMode::Long64, 0x1234_5678).unwrap();
        let read = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        let walk = |linear: u64| {
            let pml4e = read(entry.state.control.cr3 + 8 * (linear >> 39 & 511));
            let pdpte = read((pml4e & !0xFFF) + 8 * (linear >> 30 & 511));
            let pde = read((pdpte & !0xFFF) + 8 * (linear >> 21 & 511));
            assert_eq!([pml4e & 0x83, pdpte & 0x83, pde & 0x83], [3, 3, 0x83]);
            (pde & !0x1F_FFFF) + (linear & 0x1F_FFFF)
        };
        for linear in [0, 0x10_0000, 0x1234_5678, 0xC000_0000, 0xFEE0_0020, 0xFFFF_FFFF] {
            assert_eq!(walk(linear), linear);
        }
        let gdt = entry.state.segments.gdt;
        assert_eq!(read(gdt.base + u64::from(CODE)), 0x00AF_9B00_0000_FFFF);
        assert_eq!(entry.state.general.rflags & 1 << 9, 0);
    }

    #[test]
    fn real_mode_entry_has_segment_zero_where_it_can() {
        for (rip, selector, ip) in [(0x7C00, 0, 0x7C00), (0xF_FFF0, 0xF000, 0xFFF0)] {
            let mut state = VcpuState::default();
            real(&mut state, rip);
            assert_eq!((state.segments.cs.selector, state.general.rip), (selector, ip));
            assert_eq!(state.segments.cs.base + state.general.rip, rip);
        }
    }
}
