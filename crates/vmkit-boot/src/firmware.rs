//! The firmware tables of a PC, in the BIOS area: ACPI from 0xE0000, the MP table from 0xF0000, and
//! the two words of BIOS data that old kernels look at.

use std::ops::Range;

use vmkit_memory::PAGE_SIZE;

use crate::place::{EBDA_END, EBDA_START, FIRMWARE, HIGH_START, Placement, low_ram_end, write};
use crate::{BootContext, BootError, acpi, mptable};

const ACPI: Range<u64> = FIRMWARE.start..0xF_0000;
const MP: Range<u64> = 0xF_0000..FIRMWARE.end;
/// More vCPUs than the ACPI tables have room for, and few enough to build tables to find out.
const MAX_VCPUS: u32 = 4096;
/// BIOS data area: segment of the EBDA, and KiB of conventional memory below it.
const BDA_EBDA_SEGMENT: u64 = 0x40E;
const BDA_BASE_MEMORY: u64 = 0x413;

/// Where the tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TablesPlaced {
    /// Guest-physical address of the ACPI root pointer (RSDP).
    pub rsdp: u64,
}

/// Writes the ACPI and MP tables that describe the machine `ctx`. Loaders do this themselves; it
/// is public for other [`Boot`](crate::Boot)s.
///
/// # Errors
/// [`BootError::NotEnoughRam`] if RAM ends below 1 MiB, [`BootError::Tables`] if there are more
/// vCPUs and devices than 64 KiB of tables can describe.
pub fn write_tables(ctx: &BootContext<'_>) -> Result<TablesPlaced, BootError> {
    if low_ram_end(ctx) < HIGH_START {
        return Err(BootError::NotEnoughRam {
            image: "firmware tables".into(),
            what: "the BIOS area",
            needs: HIGH_START,
            has: ctx.layout.bytes(),
        });
    }
    if ctx.vcpus > MAX_VCPUS {
        return Err(BootError::Vcpus { vcpus: ctx.vcpus, max: MAX_VCPUS });
    }
    let tables = acpi::build(ctx, ACPI.start);
    fits("the ACPI tables", &tables, &ACPI)?;
    write(ctx, ACPI.start, &tables)?;
    // Past that many vCPUs a kernel needs x2APIC ids, which only ACPI can tell.
    if let Some(table) = mptable::build(ctx, MP.start) {
        fits("the MP tables", &table, &MP)?;
        write(ctx, MP.start, &table)?;
    }
    write(ctx, BDA_EBDA_SEGMENT, &((EBDA_START >> 4) as u16).to_le_bytes())?;
    write(ctx, BDA_BASE_MEMORY, &((EBDA_START >> 10) as u16).to_le_bytes())?;
    write(ctx, EBDA_START, &[((EBDA_END - EBDA_START) >> 10) as u8])?;
    Ok(TablesPlaced { rsdp: ACPI.start })
}

/// [`write_tables`] unless the image lies there or RAM ends below; a guest without a boot protocol
/// may well do without.
pub(crate) fn write_if_free(place: &mut Placement<'_>) -> Result<(), BootError> {
    let tables = FIRMWARE.start..FIRMWARE.end;
    if place.low_ram_end() < HIGH_START
        || !place.is_free(&tables)
        || !place.is_free(&(EBDA_START..EBDA_END))
        || !place.is_free(&(0..PAGE_SIZE))
    {
        log::info!("no room for firmware tables: the image lies there, or RAM ends below");
        return Ok(());
    }
    write_tables(place.ctx)?;
    Ok(())
}

fn fits(what: &'static str, table: &[u8], room: &Range<u64>) -> Result<(), BootError> {
    let (len, room) = (table.len() as u64, room.end - room.start);
    if len > room { Err(BootError::Tables { what, len, room }) } else { Ok(()) }
}

/// The byte that makes all bytes sum to zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use vmkit_device::Announcement;
    use vmkit_memory::{Backing, Bytes, GuestAddress, RamLayout};

    use super::*;

    #[test]
    fn tables_are_where_kernels_search_for_them() {
        let layout = RamLayout::pc(1 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let placed = write_tables(&BootContext::new(&ram, &layout)).unwrap();
        let read = |at: u64| ram.read_obj::<[u8; 4]>(GuestAddress(at)).unwrap();
        assert_eq!((placed.rsdp % 16, &read(placed.rsdp)), (0, b"RSD "));
        assert_eq!(&read(0xF_0000), b"_MP_");
        assert_eq!(ram.read_obj::<u16>(GuestAddress(0x40E)).unwrap(), 0x9FC0);
        assert_eq!(ram.read_obj::<u16>(GuestAddress(0x413)).unwrap(), 639);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let layout = RamLayout::pc(512 << 10).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let small = write_tables(&BootContext::new(&ram, &layout));
        assert!(matches!(small, Err(BootError::NotEnoughRam { needs: HIGH_START, .. })));

        let layout = RamLayout::pc(1 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let ctx = BootContext::new(&ram, &layout);
        write_tables(&ctx.vcpus(1024)).unwrap();
        assert!(matches!(write_tables(&ctx.vcpus(u32::MAX)), Err(BootError::Vcpus { .. })));
        let many = vec![Announcement::VirtioMmio { base: 0, len: 4096, gsi: 16 }; 2000];
        let error = write_tables(&ctx.announcements(&many)).unwrap_err();
        assert!(matches!(error, BootError::Tables { room: 0x1_0000, .. }), "{error}");
    }
}
