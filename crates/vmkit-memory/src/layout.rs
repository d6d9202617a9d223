//! Where RAM lies on a PC: below the 32-bit MMIO hole, then from 4 GiB up.

use vm_memory::GuestAddress;

use crate::{MemoryError, PAGE_SIZE};

/// First address of the 32-bit MMIO hole (3 GiB): RAM that would reach past it continues at
/// [`HIGH_RAM_START`].
pub const MMIO_HOLE_START: u64 = 0xC000_0000;
/// First address above the hole (4 GiB).
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// One contiguous range of RAM, in bytes of guest-physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub start: GuestAddress,
    /// Length in bytes, a multiple of 4 KiB.
    pub len: u64,
}

/// The RAM ranges of a machine, ascending and disjoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Vec<RamRange>,
}

impl RamLayout {
    /// A PC's layout for `bytes` of RAM: from 0 up to the MMIO hole, the rest from 4 GiB.
    ///
    /// # Errors
    /// [`MemoryError::Size`] if `bytes` is zero, not a multiple of 4 KiB, or past 2^46.
    pub fn pc(bytes: u64) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || bytes > 1 << 46 {
            return Err(MemoryError::Size(bytes));
        }
        let low = bytes.min(MMIO_HOLE_START);
        let mut ranges = vec![RamRange { start: GuestAddress(0), len: low }];
        if bytes > low {
            ranges.push(RamRange { start: GuestAddress(HIGH_RAM_START), len: bytes - low });
        }
        Ok(Self { ranges })
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Total bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_past_three_gib_continues_at_four() {
        let layout = RamLayout::pc(5 << 30).unwrap();
        assert_eq!(layout.bytes(), 5 << 30);
        assert_eq!(layout.ranges()[1], RamRange { start: GuestAddress(4 << 30), len: 2 << 30 });
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(RamLayout::pc(0).is_err());
        assert!(RamLayout::pc(4097).is_err());
        assert!(RamLayout::pc(!4095).is_err());
    }
}
