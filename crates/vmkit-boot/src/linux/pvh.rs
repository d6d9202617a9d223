//! The PVH boot protocol (Xen documentation, `misc/pvh.pandoc`): a 32-bit entry with a start-info
//! structure in EBX.

use linux_loader::loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::Guest;
use crate::place::Placement;
use crate::{BootError, e820};

/// Version 1 added the memory map.
const VERSION: u32 = 1;

/// Writes the start-info structure and what it points to; returns its address.
pub(super) fn put(place: &mut Placement<'_>, guest: &Guest) -> Result<u64, BootError> {
    let map: Vec<u8> = e820::memory_map(place.ctx)
        .iter()
        .flat_map(|range| {
            let entry = hvm_memmap_table_entry {
                addr: range.start,
                size: range.len,
                type_: range.kind as u32,
                reserved: 0,
            };
            entry.as_slice().to_vec()
        })
        .collect();
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        cmdline_paddr: guest.cmdline,
        rsdp_paddr: guest.rsdp,
        memmap_paddr: place.put_low("the memory map", &map, 8)?,
        memmap_entries: e820::memory_map(place.ctx).len() as u32,
        ..hvm_start_info::default()
    };
    if let Some((paddr, size)) = guest.initrd {
        let module = hvm_modlist_entry { paddr, size, ..hvm_modlist_entry::default() };
        info.nr_modules = 1;
        info.modlist_paddr = place.put_low("the module list", module.as_slice(), 8)?;
    }
    place.put_low("the start info", info.as_slice(), 8)
}
