//! A flat binary: bytes at an address, without a header.

use std::path::Path;

use crate::image::Image;
use crate::place::Placement;
use crate::{Boot, BootContext, BootError, CpuMode, Entry, cpu, firmware};

/// Bytes of stack a flat guest starts with.
const STACK: u64 = 4096;
/// One past the highest address of a real-mode stack, whose segment is 0.
const REAL_STACK_END: u64 = 0x1_0000;

/// A flat binary at an address.
///
/// It starts with interrupts off, a stack of 4 KiB, all other general registers zero, and no
/// interrupt table. Firmware tables are written where the binary leaves room for them.
///
/// ```
/// use vmkit_boot::{CpuMode, Flat};
/// // out 0xf4, al; hlt
/// let guest = Flat::at(0x7C00, vec![0xE6, 0xF4, 0xF4]).mode(CpuMode::Real16);
/// ```
pub struct Flat {
    image: Image,
    at: u64,
    entry: u64,
    mode: CpuMode,
}

impl std::fmt::Debug for Flat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flat")
            .field("image", &self.image.name)
            .field("at", &self.at)
            .field("entry", &self.entry)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl Flat {
    /// `bytes` at guest-physical `at`, entered at their first byte in long mode.
    pub fn at(at: u64, bytes: Vec<u8>) -> Self {
        Self { image: Image::new("flat image", bytes), at, entry: at, mode: CpuMode::Long64 }
    }

    /// The file at `path`, as [`at`](Self::at).
    ///
    /// # Errors
    /// [`BootError::Read`] or [`BootError::TooLarge`].
    pub fn open(at: u64, path: impl AsRef<Path>) -> Result<Self, BootError> {
        let image = Image::open(path.as_ref())?;
        Ok(Self { image, at, entry: at, mode: CpuMode::Long64 })
    }

    /// Starts at guest-physical `entry` instead.
    pub fn entry(mut self, entry: u64) -> Self {
        self.entry = entry;
        self
    }

    /// Starts in `mode`. Real mode wants an entry in the first MiB.
    pub fn mode(mut self, mode: CpuMode) -> Self {
        self.mode = mode;
        self
    }
}

impl Boot for Flat {
    fn load(&self, ctx: &BootContext<'_>) -> Result<Entry, BootError> {
        let limit: u64 = match self.mode {
            CpuMode::Real16 => 1 << 20,
            CpuMode::Protected32 | CpuMode::Long64 => 1 << 32,
        };
        if self.entry >= limit {
            return Err(self.image.view().unsupported(format!(
                "entry {:#x} cannot be reached in {:?} mode",
                self.entry, self.mode
            )));
        }
        let mut place = Placement::new(ctx, &self.image.name);
        let len = self.image.view().len();
        place.reserve("the image", self.at, len)?;
        firmware::write_if_free(&mut place)?;
        place.copy(self.at, self.image.view(), 0, len, len)?;
        let stack = match self.mode {
            CpuMode::Real16 => place.highest("the stack", 0x500..REAL_STACK_END, STACK, 16)?,
            _ => place.low("the stack", STACK, 16)?,
        };
        let mut entry = cpu::entry(&mut place, self.mode, self.entry)?;
        entry.state.general.set_rsp(stack + STACK);
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use vmkit_memory::{Backing, Bytes, GuestAddress, RamLayout};

    use super::*;

    #[test]
    fn bytes_entry_and_stack_are_where_they_were_asked_for() {
        let layout = RamLayout::pc(1 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let ctx = BootContext::new(&ram, &layout);
        for mode in [CpuMode::Real16, CpuMode::Protected32, CpuMode::Long64] {
            let entry =
                Flat::at(0x7C00, vec![1, 2, 3]).entry(0x7C01).mode(mode).load(&ctx).unwrap();
            assert_eq!(entry.state.general.rip, 0x7C01);
            assert_eq!(ram.read_obj::<[u8; 3]>(GuestAddress(0x7C00)).unwrap(), [1, 2, 3]);
            let rsp = entry.state.general.rsp();
            assert!((0x1500..=0x9_FC00).contains(&rsp), "{rsp:#x}");
        }
    }

    #[test]
    fn what_cannot_be_reached_or_held_is_refused() {
        let layout = RamLayout::pc(1 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let ctx = BootContext::new(&ram, &layout);
        let far = Flat::at(0x7C00, vec![0]).entry(1 << 32);
        assert!(matches!(far.load(&ctx), Err(BootError::Unsupported { .. })));
        let real = Flat::at(0x7C00, vec![0]).entry(1 << 20).mode(CpuMode::Real16);
        assert!(matches!(real.load(&ctx), Err(BootError::Unsupported { .. })));
        let long = Flat::at(0xF_0000, vec![0; 0x1_0001]);
        assert!(matches!(long.load(&ctx), Err(BootError::NotEnoughRam { needs: 0x10_0001, .. })));
        let wrapping = Flat::at(u64::MAX, vec![0; 2]).entry(0);
        assert!(wrapping.load(&ctx).is_err());
    }
}
