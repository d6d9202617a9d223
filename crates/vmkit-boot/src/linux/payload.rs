//! The kernel proper, out of a bzImage.

use super::checksum;
use super::header::SetupHeader;
use crate::BootError;
use crate::decompress::Method;
use crate::elf;
use crate::image::{Image, View};

/// Longest kernel, in bytes; larger ones do not exist, and the field that says so may lie.
const LIMIT: u64 = 1 << 30;
/// Every payload ends in its uncompressed length.
const LENGTH_FIELD: u64 = 4;

/// What is inside a bzImage.
pub(super) enum Payload {
    /// An ELF image, decompressed.
    Elf(Vec<u8>),
    /// Something that only the kernel's own decompressor can undo, for this reason.
    Opaque(String),
}

/// Decompresses the kernel of a bzImage to at most `limit` bytes.
pub(super) fn unpack(
    view: View<'_>,
    header: &SetupHeader,
    limit: u64,
) -> Result<Payload, BootError> {
    let Some((offset, len)) = header.payload else {
        return Ok(Payload::Opaque("the setup header names no payload".into()));
    };
    let payload = view.get("the compressed kernel", offset, len)?;
    let Some(method) = Method::detect(&payload) else {
        let magic = &payload[..payload.len().min(4)];
        return Ok(Payload::Opaque(format!("unknown compression (it starts with {magic:02x?})")));
    };
    let damaged = |reason: String| BootError::Decompress {
        image: view.name.into(),
        method: method.name(),
        offset,
        reason,
    };
    let end = len.checked_sub(LENGTH_FIELD).ok_or_else(|| damaged("it is empty".into()))?;
    let unpacked = u64::from(view.u32("the kernel's length", offset + end)?);
    if unpacked > LIMIT {
        return Err(damaged(format!("it announces {unpacked} bytes, the limit is {LIMIT}")));
    }
    if unpacked > limit {
        return Err(BootError::NotEnoughRam {
            image: view.name.into(),
            what: "the kernel",
            needs: header.load + unpacked,
            has: limit,
        });
    }
    // In gzip that field is part of the stream.
    let stream: &[u8] = if method == Method::Gzip { &payload } else { &payload[..end as usize] };
    let bytes = method.decompress(stream, unpacked).map_err(&damaged)?;
    if !method.has_checksum() && checksum::is_wrong(view, header) {
        return Err(damaged("the checksum at the end of the image is wrong".into()));
    }
    if !bytes.starts_with(elf::MAGIC) {
        return Ok(Payload::Opaque("the payload is not an ELF image".into()));
    }
    Ok(Payload::Elf(bytes))
}

/// The ELF image (`vmlinux`, without debug information) inside the bzImage `bzimage`.
///
/// # Errors
/// [`BootError::Format`] if it is not a bzImage, [`BootError::Decompress`] if it is damaged,
/// [`BootError::Unsupported`] if its compression is unknown.
pub fn extract_vmlinux(bzimage: &[u8]) -> Result<Vec<u8>, BootError> {
    let view = View::of("bzImage", bzimage);
    match unpack(view, &SetupHeader::parse(view)?, LIMIT)? {
        Payload::Elf(bytes) => Ok(bytes),
        Payload::Opaque(reason) => Err(view.unsupported(reason)),
    }
}

/// The unpacked kernel as an image of its own, named after the file it came from.
pub(super) fn named(view: View<'_>, bytes: Vec<u8>) -> Image {
    Image::new(&format!("{} (unpacked)", view.name), bytes)
}
