//! The setup header of a bzImage (Linux documentation, `arch/x86/boot.rst`).

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use crate::BootError;
use crate::image::View;

/// Offsets into the image.
const HEADER: u64 = 0x1F1;
const BOOT_FLAG: u64 = 0x1FE;
const JUMP_LEN: u64 = 0x201;
const MAGIC: u64 = 0x202;
/// Bytes that show whether an image is a bzImage.
const HEAD: u64 = MAGIC + 4;

const SECTOR: u64 = 512;
const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
/// Where a kernel that cannot be moved wants to be.
const DEFAULT_LOAD: u64 = 0x10_0000;
/// The code's 64-bit entry, from its start.
pub(super) const ENTRY_64: u64 = 0x200;

/// What a bzImage's first kilobyte says of the rest. Fields that the image's protocol version does
/// not have are at the values the protocol gives for their absence.
#[derive(Clone, Debug)]
pub(super) struct SetupHeader {
    /// The header, to be copied to the kernel.
    pub(super) raw: setup_header,
    /// Offset and length of the protected-mode code in the image.
    pub(super) code: (u64, u64),
    /// Offset and length of the compressed kernel in the image, if the header says.
    pub(super) payload: Option<(u64, u64)>,
    /// Longest command line, in bytes.
    pub(super) cmdline_max: usize,
    /// Highest address of an initrd's last byte.
    pub(super) initrd_max: u64,
    /// Where the protected-mode code is to be loaded.
    pub(super) load: u64,
    /// Bytes of RAM from `load` that the kernel needs before it can allocate.
    pub(super) init_size: u64,
    /// The protected-mode code has the 64-bit entry.
    pub(super) has_entry_64: bool,
}

/// True if `bytes` start as a bzImage does.
pub(crate) fn is_bzimage(bytes: &[u8]) -> bool {
    let at = |offset: u64, len: usize| bytes.get(offset as usize..offset as usize + len);
    at(BOOT_FLAG, 2) == Some(b"\x55\xAA") && at(MAGIC, 4) == Some(b"HdrS")
}

/// True if the image starts as a bzImage does.
pub(super) fn starts_as_bzimage(view: View<'_>) -> bool {
    let head = view.get("the setup header", 0, view.len().min(HEAD));
    head.is_ok_and(|head| is_bzimage(&head))
}

impl SetupHeader {
    pub(super) fn parse(view: View<'_>) -> Result<Self, BootError> {
        let what = "the setup header";
        if view.u16(what, BOOT_FLAG)? != 0xAA55 {
            return Err(view.format("bzImage", BOOT_FLAG, "no boot signature"));
        }
        if *view.get(what, MAGIC, 4)? != *b"HdrS" {
            return Err(view.format("bzImage", MAGIC, "no setup header magic"));
        }
        let mut raw = setup_header::default();
        let end = MAGIC + u64::from(view.u8(what, JUMP_LEN)?);
        let len = end.saturating_sub(HEADER).min(size_of::<setup_header>() as u64);
        let bytes = view.get(what, HEADER, len)?;
        raw.as_mut_slice()[..bytes.len()].copy_from_slice(&bytes);

        let version = raw.version;
        if version < 0x0202 {
            return Err(view.unsupported(format!(
                "boot protocol {}.{:02}; 2.02 is the oldest with a command line pointer",
                version >> 8,
                version & 0xFF
            )));
        }
        if raw.loadflags & LOADED_HIGH == 0 {
            return Err(view.unsupported("a zImage, which is loaded below 1 MiB"));
        }
        // Zero stands for four, for images older than the field.
        let sectors = if raw.setup_sects == 0 { 4 } else { u64::from(raw.setup_sects) };
        let start = (sectors + 1) * SECTOR;
        let code_len = u64::from(raw.syssize) * 16;
        // The count is rounded up, the file need not be.
        let code_len =
            code_len.min(view.len().saturating_sub(start).max(code_len.saturating_sub(15)));
        view.check("the protected-mode code", start, code_len)?;

        let load = if version >= 0x020A { raw.pref_address } else { DEFAULT_LOAD };
        if !(DEFAULT_LOAD..1 << 32).contains(&load) {
            return Err(view.malformed(0x258, "the preferred load address is not above 1 MiB"));
        }
        Ok(Self {
            raw,
            code: (start, code_len),
            payload: Self::payload(view, &raw, start, code_len)?,
            cmdline_max: if version >= 0x0206 { raw.cmdline_size as usize } else { 255 },
            initrd_max: u64::from(if version >= 0x0203 {
                raw.initrd_addr_max
            } else {
                0x37FF_FFFF
            }),
            load,
            init_size: if version >= 0x020A { raw.init_size.into() } else { 0 }.max(code_len),
            has_entry_64: version >= 0x020C && raw.xloadflags & KERNEL_64 != 0,
        })
    }

    fn payload(
        view: View<'_>,
        raw: &setup_header,
        code: u64,
        code_len: u64,
    ) -> Result<Option<(u64, u64)>, BootError> {
        let (offset, len) = (u64::from(raw.payload_offset), u64::from(raw.payload_length));
        if raw.version < 0x0208 || len == 0 {
            return Ok(None);
        }
        if offset + len > code_len {
            return Err(view.malformed(0x248, "the payload is longer than the code that holds it"));
        }
        view.check("the compressed kernel", code + offset, len)?;
        Ok(Some((code + offset, len)))
    }
}
