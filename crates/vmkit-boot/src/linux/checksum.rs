//! The CRC-32 that kernel builds put at the end of a bzImage, for payloads that carry no checksum of
//! their own.

use super::header::SetupHeader;
use crate::image::View;

/// Builds from about this version on leave the checksum out.
const LAST_WITH_CHECKSUM: (u32, u32) = (6, 14);
/// What the CRC over an image and its checksum comes to.
const RESIDUE: u32 = 0xFFFF_FFFF;

/// PE header: offset of the offset, then from the "PE" magic on (Microsoft PE format).
const PE_OFFSET: u64 = 0x3C;
const PE_CHECKSUM: u64 = 24 + 64;
const PE_CERTIFICATES_32: u64 = 24 + 96 + 4 * 8;
const PE_CERTIFICATES_64: u64 = 24 + 112 + 4 * 8;
const PE32_PLUS: u16 = 0x20B;

/// True if the image's version says that it has a checksum, and the checksum is wrong.
pub(super) fn is_wrong(view: View<'_>, header: &SetupHeader) -> bool {
    let checked = version(view, header).is_some_and(|version| version <= LAST_WITH_CHECKSUM);
    checked && !is_right(view, header)
}

/// Major and minor version out of the version string that the header points to.
fn version(view: View<'_>, header: &SetupHeader) -> Option<(u32, u32)> {
    let offset = u64::from(header.raw.kernel_version);
    let text = view.get("the version string", 0x200 + offset, 16).ok().filter(|_| offset != 0)?;
    let mut numbers = text
        .split(|byte| !byte.is_ascii_digit())
        .map(|digits| std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()));
    Some((numbers.next()??, numbers.next()??))
}

/// True if the CRC of the image is right. Signing an image for secure boot appends a signature and
/// fills two fields of its PE header in; they count as the zeros they were.
fn is_right(view: View<'_>, header: &SetupHeader) -> bool {
    let end = header.code.0 + header.code.1;
    let mut holes = signature_fields(view);
    holes.sort_unstable();
    let mut crc = crc32fast::Hasher::new();
    let mut at = 0;
    for (start, len) in holes.into_iter().filter(|hole| hole.0 + hole.1 <= end) {
        let Ok(bytes) = view.get("the image", at, start.saturating_sub(at)) else { return false };
        crc.update(&bytes);
        crc.update(&[0; 8][..len as usize]);
        at = start + len;
    }
    match view.get("the image", at, end - at) {
        Ok(bytes) => {
            crc.update(&bytes);
            crc.finalize() == RESIDUE
        }
        Err(_) => false,
    }
}

/// Offsets and lengths of the fields that signing changes; none if there is no PE header.
fn signature_fields(view: View<'_>) -> Vec<(u64, u64)> {
    let fields = || {
        let pe = u64::from(view.u32("the PE offset", PE_OFFSET).ok()?);
        if *view.get("the PE header", pe, 4).ok()? != *b"PE\0\0" {
            return None;
        }
        let certificates = if view.u16("the PE header", pe + 24).ok()? == PE32_PLUS {
            PE_CERTIFICATES_64
        } else {
            PE_CERTIFICATES_32
        };
        Some(vec![(pe + PE_CHECKSUM, 4), (pe + certificates, 8)])
    };
    fields().unwrap_or_default()
}
