//! The 64-bit and 32-bit boot protocols' "zero page" (Linux documentation, `arch/x86/zero-page.rst`).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::Guest;
use crate::place::Placement;
use crate::{BootError, e820};

/// Loader type of a loader without an assigned number.
const UNDEFINED_LOADER: u8 = 0xFF;
const LOADED_HIGH: u8 = 1;
/// Set by the kernel's own decompressor for the kernel; never by a loader.
const KASLR: u8 = 1 << 1;
/// No particular video mode.
const VIDEO_NORMAL: u16 = 0xFFFF;

/// The header of a kernel that brings none.
pub(super) fn synthetic_header() -> setup_header {
    setup_header {
        boot_flag: 0xAA55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020F,
        loadflags: LOADED_HIGH,
        kernel_alignment: 0x20_0000,
        initrd_addr_max: 0x7FFF_FFFF,
        cmdline_size: super::DEFAULT_CMDLINE_MAX as u32,
        ..setup_header::default()
    }
}

/// Writes the zero page of a kernel with `header`; returns its address.
pub(super) fn put(
    place: &mut Placement<'_>,
    header: setup_header,
    guest: &Guest,
) -> Result<u64, BootError> {
    let mut page = boot_params { hdr: header, ..boot_params::default() };
    page.hdr.type_of_loader = UNDEFINED_LOADER;
    page.hdr.loadflags &= !KASLR;
    page.hdr.vid_mode = VIDEO_NORMAL;
    page.hdr.cmd_line_ptr = guest.cmdline as u32;
    page.ext_cmd_line_ptr = (guest.cmdline >> 32) as u32;
    if let Some((start, len)) = guest.initrd {
        page.hdr.ramdisk_image = start as u32;
        page.hdr.ramdisk_size = len as u32;
        page.ext_ramdisk_image = (start >> 32) as u32;
        page.ext_ramdisk_size = (len >> 32) as u32;
    }
    page.acpi_rsdp_addr = guest.rsdp;

    let mut table = page.e820_table;
    let map = e820::memory_map(place.ctx);
    for (entry, range) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind as u32 };
    }
    page.e820_entries = map.len().min(table.len()) as u8;
    page.e820_table = table;
    place.put_low("the zero page", page.as_slice(), 4096)
}
