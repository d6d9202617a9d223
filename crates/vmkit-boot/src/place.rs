//! Where things lie in guest RAM: each range is given out once, and only where there is RAM.
//!
//! The first MiB follows a PC: interrupt vectors and BIOS data up to 0x500, loader structures below
//! the EBDA at 0x9FC00, and firmware tables from 0xE0000.

use std::ops::Range;

use vmkit_memory::{
    Bytes, GuestAddress, GuestBuffers, GuestMemory, MMIO_HOLE_START, PAGE_SIZE, Permissions,
};

use crate::image::View;
use crate::{BootContext, BootError};

/// First address after the real-mode vectors and BIOS data.
pub(crate) const LOW_START: u64 = 0x1000;
/// The extended BIOS data area: the last KiB of the first 640.
pub(crate) const EBDA_START: u64 = 0x9_FC00;
/// End of conventional memory, start of the VGA window.
pub(crate) const EBDA_END: u64 = 0xA_0000;
/// The BIOS area that kernels search for firmware tables.
pub(crate) const FIRMWARE: Range<u64> = 0xE_0000..0x10_0000;
/// 1 MiB.
pub(crate) const HIGH_START: u64 = 0x10_0000;
/// Most bytes that are read from a file at once.
const CHUNK: u64 = 16 << 20;
const ZEROS: &[u8] = &[0; PAGE_SIZE as usize];

/// One guest's use of RAM while it is loaded.
pub(crate) struct Placement<'a> {
    pub(crate) ctx: &'a BootContext<'a>,
    image: &'a str,
    taken: Vec<Range<u64>>,
}

impl<'a> Placement<'a> {
    /// An empty machine; errors will name `image`.
    pub(crate) fn new(ctx: &'a BootContext<'a>, image: &'a str) -> Self {
        Self { ctx, image, taken: Vec::new() }
    }

    /// End of RAM below the 32-bit MMIO hole.
    pub(crate) fn low_ram_end(&self) -> u64 {
        low_ram_end(self.ctx)
    }

    /// Takes `len` bytes at `start`.
    pub(crate) fn reserve(
        &mut self,
        what: &'static str,
        start: u64,
        len: u64,
    ) -> Result<(), BootError> {
        if len == 0 {
            return Ok(());
        }
        let refuse =
            |reason| BootError::Placement { image: self.image.into(), what, start, len, reason };
        let end = start.checked_add(len).ok_or_else(|| refuse("wraps around"))?;
        let ranges = self.ctx.layout.ranges();
        if !ranges.iter().any(|r| r.start.0 <= start && end - r.start.0 <= r.len) {
            let has = self.ctx.layout.bytes();
            return Err(if start < MMIO_HOLE_START && end <= MMIO_HOLE_START {
                BootError::NotEnoughRam { image: self.image.into(), what, needs: end, has }
            } else {
                refuse("is not in RAM")
            });
        }
        if !self.is_free(&(start..end)) {
            return Err(refuse("overlaps something else that is loaded"));
        }
        self.taken.push(start..end);
        Ok(())
    }

    /// True if nothing has taken a byte of `range`.
    pub(crate) fn is_free(&self, range: &Range<u64>) -> bool {
        !self.taken.iter().any(|r| r.start < range.end && range.start < r.end)
    }

    /// Takes the highest free `len` bytes within `within` (of RAM below the hole), aligned to
    /// `align`, a power of two.
    pub(crate) fn highest(
        &mut self,
        what: &'static str,
        within: Range<u64>,
        len: u64,
        align: u64,
    ) -> Result<u64, BootError> {
        let mut ceiling = within.end.min(self.low_ram_end());
        loop {
            let start = ceiling.checked_sub(len).map(|start| start & !(align - 1));
            let Some(start) = start.filter(|start| *start >= within.start) else {
                // RAM goes up to the limit or the hole already: more of it is elsewhere.
                if within.end.min(MMIO_HOLE_START) <= self.low_ram_end() {
                    return Err(BootError::Placement {
                        image: self.image.into(),
                        what,
                        start: within.start,
                        len,
                        reason: "does not fit below the highest address it may have",
                    });
                }
                let missing = within.start.saturating_add(len);
                return Err(BootError::NotEnoughRam {
                    image: self.image.into(),
                    what,
                    needs: self.taken.iter().map(|r| r.end).max().unwrap_or(0).max(missing) + len,
                    has: self.ctx.layout.bytes(),
                });
            };
            // Each turn moves below one taken range, so there are at most as many turns.
            match self.taken.iter().find(|r| r.start < start + len && start < r.end) {
                Some(other) => ceiling = other.start,
                None => {
                    self.taken.push(start..start + len);
                    return Ok(start);
                }
            }
        }
    }

    /// Takes the lowest free `len` bytes from `floor` on (of RAM below the hole), aligned to
    /// `align`, a power of two.
    pub(crate) fn lowest(
        &mut self,
        what: &'static str,
        floor: u64,
        len: u64,
        align: u64,
    ) -> Result<u64, BootError> {
        let mut start = floor.next_multiple_of(align);
        // Each turn moves past one taken range, so there are at most as many turns.
        while let Some(other) = self.taken.iter().find(|r| r.start < start + len && start < r.end) {
            start = other.end.next_multiple_of(align);
        }
        self.reserve(what, start, len).map(|()| start)
    }

    /// Takes `len` bytes of conventional memory, or above 1 MiB if there is no room.
    pub(crate) fn low(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
    ) -> Result<u64, BootError> {
        self.highest(what, LOW_START..EBDA_START, len, align)
            .or_else(|_| self.highest(what, HIGH_START..u64::from(u32::MAX), len, align))
    }

    /// Writes `bytes` at `start`, which must have been taken.
    pub(crate) fn write(&self, start: u64, bytes: &[u8]) -> Result<(), BootError> {
        write(self.ctx, start, bytes)
    }

    /// Writes `len` bytes of `image` from `offset` on, then zeros up to `size`, at `start`, which must
    /// have been taken.
    pub(crate) fn copy(
        &self,
        start: u64,
        image: View<'_>,
        offset: u64,
        len: u64,
        size: u64,
    ) -> Result<(), BootError> {
        let what = "what is to be loaded";
        match image.file() {
            None => write(self.ctx, start, &image.get(what, offset, len)?)?,
            Some(file) => {
                image.check(what, offset, len)?;
                let mut done = 0;
                while done < len {
                    let piece = (len - done).min(CHUNK) as usize;
                    let buffers = self.buffers(start + done, piece)?;
                    done += image.read_into(file, offset + done, &buffers)?;
                }
            }
        }
        // Memory of a new machine is zero.
        let mut at = if self.ctx.reused { len } else { size };
        while at < size {
            let chunk = &ZEROS[..(size - at).min(PAGE_SIZE) as usize];
            write(self.ctx, start + at, chunk)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// Guest memory from `at` on: `len` bytes, or less if it is in too many pieces.
    fn buffers(&self, at: u64, len: usize) -> Result<GuestBuffers<'_>, BootError> {
        let memory_error = |source| BootError::Memory { address: at, source };
        let mut buffers = GuestBuffers::new();
        let slices = self.ctx.ram.get_slices(GuestAddress(at), len, Permissions::Write);
        for slice in slices.map_err(memory_error)? {
            if !buffers.push(slice.map_err(memory_error)?) {
                break;
            }
        }
        Ok(buffers)
    }

    /// [`low`](Self::low), then [`write`](Self::write).
    pub(crate) fn put_low(
        &mut self,
        what: &'static str,
        bytes: &[u8],
        align: u64,
    ) -> Result<u64, BootError> {
        let start = self.low(what, bytes.len() as u64, align)?;
        self.write(start, bytes)?;
        Ok(start)
    }
}

/// End of RAM below the 32-bit MMIO hole.
pub(crate) fn low_ram_end(ctx: &BootContext<'_>) -> u64 {
    ctx.layout.ranges().iter().find(|r| r.start.0 == 0).map_or(0, |r| r.len)
}

/// Writes `bytes` at `start`. Pages that are zero already stay untouched, so that they cost the
/// host nothing.
pub(crate) fn write(ctx: &BootContext<'_>, start: u64, bytes: &[u8]) -> Result<(), BootError> {
    let put = |at: u64, bytes: &[u8]| {
        let memory_error = |source| BootError::Memory { address: at, source };
        ctx.ram.write_slice(bytes, GuestAddress(at)).map_err(memory_error)
    };
    if ctx.reused {
        return put(start, bytes);
    }
    // Runs of pages with something in them, split where the guest's pages are.
    let mut run: Option<Range<usize>> = None;
    let mut at = 0;
    while at < bytes.len() {
        let page_left = PAGE_SIZE - (start + at as u64) % PAGE_SIZE;
        let end = bytes.len().min(at + page_left as usize);
        let zero = bytes[at..end] == ZEROS[..end - at];
        match (&mut run, zero) {
            (Some(run), false) => run.end = end,
            (None, false) => run = Some(at..end),
            (Some(done), true) => {
                put(start + done.start as u64, &bytes[done.clone()])?;
                run = None;
            }
            (None, true) => {}
        }
        at = end;
    }
    run.map_or(Ok(()), |done| put(start + done.start as u64, &bytes[done]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmkit_memory::{Backing, RamLayout};

    use super::*;

    #[test]
    fn nothing_is_given_out_twice_or_outside_ram() {
        let layout = RamLayout::pc(2 << 20).unwrap();
        let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
        let ctx = BootContext::new(&ram, &layout);
        let mut place = Placement::new(&ctx, "k");
        place.reserve("a", 0x10_0000, 0x1000).unwrap();
        assert!(matches!(place.reserve("b", 0x10_0FFF, 1), Err(BootError::Placement { .. })));
        let error = place.reserve("c", 0x1F_F000, 0x1001).unwrap_err();
        assert!(matches!(error, BootError::NotEnoughRam { needs: 0x20_0001, .. }));
        assert!(place.reserve("d", u64::MAX, 2).is_err());
        assert_eq!(place.highest("e", 0..u64::MAX, 0x1800, 0x1000).unwrap(), 0x1F_E000);
        assert_eq!(place.highest("f", 0..u64::MAX, 0x800, 0x800).unwrap(), 0x1F_F800);
        assert_eq!(place.low("g", 0x400, 16).unwrap(), 0x9_F800);
        assert!(place.highest("h", 0x10_0000..0x10_2000, 0x2000, 0x1000).is_err());
    }

    proptest! {
        #[test]
        fn a_write_leaves_exactly_its_bytes(
            start in 0_u64..0x3000,
            pages in prop::collection::vec(prop::option::of(any::<u8>()), 1..6),
            tail in 0_usize..4096,
            reused: bool,
        ) {
            let layout = RamLayout::pc(64 << 10).unwrap();
            let ram = vmkit_memory::allocate(&layout, Backing::Anonymous).unwrap();
            let mut ctx = BootContext::new(&ram, &layout);
            ctx.reused = reused;
            let mut bytes: Vec<u8> =
                pages.iter().flat_map(|fill| [fill.unwrap_or(0); 4096]).collect();
            bytes.truncate(bytes.len() - tail);
            write(&ctx, start, &bytes).unwrap();
            let mut back = vec![0; bytes.len()];
            ram.read_slice(&mut back, GuestAddress(start)).unwrap();
            prop_assert_eq!(back, bytes);
        }
    }
}
