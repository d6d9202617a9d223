//! A plain static ELF executable: segments at their physical addresses, no boot protocol.

use std::path::Path;

use crate::elf::{Class, Elf as Parsed};
use crate::image::Image;
use crate::place::Placement;
use crate::{Boot, BootContext, BootError, CpuMode, Entry, cpu, firmware};

/// Bytes of stack the guest starts with.
const STACK: u64 = 16 << 10;

/// A plain static ELF executable. An ELF64 starts in long mode, the first 4 GiB identity-mapped;
/// an ELF32 in 32-bit protected mode without paging. Interrupts are off, there is a stack of
/// 16 KiB, and all other general registers are zero.
pub struct Elf {
    image: Image,
    mode: Option<CpuMode>,
}

impl std::fmt::Debug for Elf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Elf")
            .field("image", &self.image.name)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl Elf {
    /// The file at `path`.
    ///
    /// # Errors
    /// [`BootError`] if it cannot be read or is not an x86 ELF executable.
    pub fn new(path: impl AsRef<Path>) -> Result<Self, BootError> {
        Self::checked(Image::open(path.as_ref())?)
    }

    /// An image in memory.
    ///
    /// # Errors
    /// [`BootError`] if it is not an x86 ELF executable.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, BootError> {
        Self::checked(Image::new("ELF image", bytes))
    }

    /// Starts in `mode` instead of the one the file's class says: many 32-bit files hold 64-bit
    /// code and the other way round. Real mode is refused when the guest is loaded, unless the
    /// entry is in the first MiB.
    pub fn mode(mut self, mode: CpuMode) -> Self {
        self.mode = Some(mode);
        self
    }

    fn checked(image: Image) -> Result<Self, BootError> {
        Parsed::parse(image.view())?;
        Ok(Self { image, mode: None })
    }
}

impl Boot for Elf {
    fn load(&self, ctx: &BootContext<'_>) -> Result<Entry, BootError> {
        let view = self.image.view();
        let elf = Parsed::parse(view)?;
        let mode = self.mode.unwrap_or(match elf.class {
            Class::Elf32 => CpuMode::Protected32,
            Class::Elf64 => CpuMode::Long64,
        });
        let limit: u64 = if mode == CpuMode::Real16 { 1 << 20 } else { 1 << 32 };
        if elf.entry() >= limit {
            let what = format!("entry {:#x} cannot be reached in {mode:?} mode", elf.entry());
            return Err(view.unsupported(what));
        }
        let mut place = Placement::new(ctx, &self.image.name);
        elf.reserve("the image", &mut place)?;
        firmware::write_if_free(&mut place)?;
        elf.write(&place)?;
        let stack = place.low("the stack", STACK, 16)?;
        let mut entry = cpu::entry(&mut place, mode, elf.entry())?;
        entry.state.general.set_rsp(stack + STACK);
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use vmkit_hypervisor::x86::Efer;
    use vmkit_memory::{Backing, Bytes, GuestAddress, RamLayout};

    use super::*;
    use crate::testimage::elf;

    #[test]
    fn the_class_decides_the_mode_unless_told_otherwise() {
        let layout = RamLayout::pc(2 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let ctx = BootContext::new(&ram, &layout);
        for (wide, mode, long) in [
            (true, None, true),
            (false, None, false),
            (false, Some(CpuMode::Long64), true),
            (true, Some(CpuMode::Protected32), false),
        ] {
            let image = elf(wide, 0x10_0004, 0, &[(0x10_0000, b"12345", 3)], None);
            let mut guest = Elf::from_bytes(image).unwrap();
            guest.mode = mode;
            let entry = guest.load(&ctx).unwrap();
            assert_eq!(entry.state.general.rip, 0x10_0004);
            assert_eq!(entry.state.control.efer & Efer::LMA.bits() != 0, long);
            assert_eq!(ram.read_obj::<[u8; 6]>(GuestAddress(0x10_0000)).unwrap(), *b"12345\0");
        }
    }

    #[test]
    fn an_image_over_the_firmware_tables_wins() {
        let layout = RamLayout::pc(2 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let image = elf(false, 0xE_0000, 0, &[(0xE_0000, b"mine", 0)], None);
        Elf::from_bytes(image).unwrap().load(&BootContext::new(&ram, &layout)).unwrap();
        assert_eq!(ram.read_obj::<[u8; 4]>(GuestAddress(0xE_0000)).unwrap(), *b"mine");
    }

    #[test]
    fn segments_that_overlap_or_wrap_are_refused() {
        let layout = RamLayout::pc(2 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let ctx = BootContext::new(&ram, &layout);
        let pieces: [&[crate::testimage::Piece<'_>]; 2] =
            [&[(0x10_0000, b"1234", 0), (0x10_0003, b"5", 0)], &[(1 << 40, b"far", 0)]];
        for pieces in pieces {
            let guest = Elf::from_bytes(elf(true, 0x10_0000, 0, pieces, None)).unwrap();
            assert!(matches!(guest.load(&ctx), Err(BootError::Placement { .. })));
        }
        let wrapping = elf(true, 0, 0, &[(u64::MAX, b"12", 0)], None);
        assert!(matches!(Elf::from_bytes(wrapping), Err(BootError::Malformed { .. })));
    }
}
