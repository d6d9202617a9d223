//! Tells image formats apart.

use crate::elf::{self, Class, Elf};
use crate::image::View;
use crate::{linux, multiboot};

/// What an image is, by its own headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageKind {
    /// A Linux bzImage: [`Linux`](crate::Linux).
    BzImage,
    /// A kernel with a multiboot 1 header: [`Multiboot`](crate::Multiboot).
    Multiboot,
    /// An ELF kernel with a PVH entry: [`Linux`](crate::Linux).
    PvhElf,
    /// A Linux ELF kernel without a PVH entry: [`Linux`](crate::Linux).
    LinuxElf,
    /// Another 64-bit ELF executable: [`Elf`](crate::Elf).
    Elf64,
    /// Another 32-bit ELF executable: [`Elf`](crate::Elf).
    Elf32,
    /// None of these: [`Flat`](crate::Flat), if anything.
    Flat,
}

/// Tells what the image `bytes` is. An ELF file too damaged to parse counts by its class, so that
/// loading it gives the error.
pub fn detect(bytes: &[u8]) -> ImageKind {
    if linux::is_bzimage(bytes) {
        return ImageKind::BzImage;
    }
    if multiboot::is_multiboot(bytes) {
        return ImageKind::Multiboot;
    }
    if !bytes.starts_with(elf::MAGIC) {
        return ImageKind::Flat;
    }
    match Elf::parse(View::of("image", bytes)) {
        Ok(elf) if elf.pvh_entry.is_some() => ImageKind::PvhElf,
        Ok(elf) if elf.upper_half() && holds(bytes, b"Linux version ") => ImageKind::LinuxElf,
        Ok(Elf { class: Class::Elf32, .. }) => ImageKind::Elf32,
        Err(_) if bytes.get(4) == Some(&1) => ImageKind::Elf32,
        _ => ImageKind::Elf64,
    }
}

fn holds(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testimage::{bzimage, elf};

    #[test]
    fn every_kind_is_told_apart() {
        let piece: &[u8] = b"Linux version 6";
        let upper = 0xFFFF_FFFF_8000_0000;
        let multiboot = [0x1BAD_B002_u32, 0, 0xE452_4FFE].map(u32::to_le_bytes).concat();
        let image = |wide, offset, pvh| elf(wide, 0x10_0000, offset, &[(0x10_0000, piece, 0)], pvh);
        for (bytes, kind) in [
            (bzimage(b"12345"), ImageKind::BzImage),
            (elf(false, 0x10_0000, 0, &[(0x10_0000, &multiboot, 0)], None), ImageKind::Multiboot),
            (image(true, upper, Some(1)), ImageKind::PvhElf),
            (image(true, upper, None), ImageKind::LinuxElf),
            (image(true, 0, None), ImageKind::Elf64),
            (image(false, 0, None), ImageKind::Elf32),
            (b"\x7fELF\x01".to_vec(), ImageKind::Elf32),
            (b"\x7fELF".to_vec(), ImageKind::Elf64),
            (vec![0xF4], ImageKind::Flat),
            (vec![], ImageKind::Flat),
        ] {
            assert_eq!(detect(&bytes), kind);
        }
    }
}
