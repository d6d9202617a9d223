//! Host mappings behind guest RAM.

#![allow(unsafe_code, reason = "memfd_create and descriptor ownership have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::{PAGE_SIZE, RamLayout, WriteTracker};

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// One host mapping and where the guest sees it.
pub type MemoryRegion = GuestRegionMmap<WriteTracker>;
/// All RAM of a machine. Cloning shares the regions.
pub type GuestRam = GuestMemoryMmap<WriteTracker>;

/// What a region's pages come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// A memfd, mapped shared: other processes can map it too, and it can be cloned privately.
    #[default]
    Memfd,
    /// Anonymous private memory. Linux gives it huge pages by itself, where it is configured to; a
    /// guest then starts sooner and takes memory in larger pieces.
    Anonymous,
}

/// Why guest memory could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The size is zero, not a multiple of 4 KiB, or beyond what a PC can address.
    #[error("guest memory of {0} bytes: want a multiple of 4096 between 4096 and 2^46")]
    Size(u64),
    /// The host refused the memory.
    #[error("cannot map {len} bytes of guest memory at {start:#x}: {source}")]
    Map {
        /// Guest-physical start of the range.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The size of a file that is to be memory cannot be found.
    #[error("cannot find the size of the file: {0}")]
    File(#[source] io::Error),
    /// The ranges overlap or wrap.
    #[error("guest memory ranges overlap or wrap at {0:#x}")]
    Overlap(u64),
}

/// Maps all of `layout`. Pages are allocated by the host when they are first touched.
///
/// # Errors
/// [`MemoryError::Map`] if the host refuses.
pub fn allocate(layout: &RamLayout, backing: Backing) -> Result<GuestRam, MemoryError> {
    let mut regions = Vec::new();
    for range in layout.ranges() {
        regions.push(Arc::new(region_at(range.start, range.len, backing)?));
    }
    GuestRam::from_arc_regions(regions).map_err(|_| MemoryError::Overlap(0))
}

/// Maps one region of `len` bytes for the guest to see at `start`.
///
/// # Errors
/// [`MemoryError::Map`] if the host refuses, [`MemoryError::Overlap`] if the range wraps.
pub fn region_at(
    start: GuestAddress,
    len: u64,
    backing: Backing,
) -> Result<MemoryRegion, MemoryError> {
    let map_error = |source| MemoryError::Map { start: start.0, len, source };
    // Before the place is found: it may need a mapping of its own.
    let tracker = WriteTracker::new(len);
    // Miri has no address space to look for a place in.
    let large = len >= 2 * HUGE_PAGE as u64 && !cfg!(miri);
    let place = match backing {
        Backing::Anonymous if large => Place::find(len as usize, start),
        _ => None,
    };
    let mapping = mapping(len, backing, tracker).map_err(map_error)?;
    drop(place);
    MemoryRegion::new(mapping, start).ok_or(MemoryError::Overlap(start.0))
}

type Mapping = MmapRegion<WriteTracker>;

fn mapping(len: u64, backing: Backing, tracker: WriteTracker) -> io::Result<Mapping> {
    let builder = MmapRegionBuilder::new_with_bitmap(len as usize, tracker)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let builder = match backing {
        // Miri has no files to map.
        Backing::Memfd if !cfg!(miri) => builder
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(memfd(len)?, 0)),
        Backing::Memfd | Backing::Anonymous => {
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        }
    };
    builder.build().map_err(io::Error::other)
}

/// A gap in this process's address space, between two mappings of nothing, where the next large mapping
/// goes: Linux takes the highest gap that is large enough. (Since 6.7 it aligns to huge pages by itself.)
/// Should another thread's mapping come first, alignment is lost and nothing else.
struct Place {
    below: (*mut libc::c_void, usize),
    above: (*mut libc::c_void, usize),
}

impl Place {
    /// A gap of `len` bytes that differs from `start` by whole huge pages. The host can give a guest huge
    /// pages only where both addresses are aligned alike.
    fn find(len: usize, start: GuestAddress) -> Option<Self> {
        // Mappings are of whole pages, and so is what is left of this one on either side of the gap.
        let len = len.checked_next_multiple_of(PAGE_SIZE as usize)?;
        if !start.0.is_multiple_of(PAGE_SIZE) {
            return None;
        }
        let whole = len.checked_add(HUGE_PAGE)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping wherever there is room touches no other.
        let at = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return None;
        }
        let skip = (start.0 as usize).wrapping_sub(at as usize) % HUGE_PAGE;
        let (gap, above) = (at.wrapping_byte_add(skip), at.wrapping_byte_add(skip + len));
        // SAFETY: `skip` is less than a huge page, so the gap is inside the mapping made above, which
        // nothing refers to.
        unsafe { libc::munmap(gap, len) };
        Some(Self { below: (at, skip), above: (above, HUGE_PAGE - skip) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for (at, len) in [self.below, self.above] {
            if len != 0 {
                // SAFETY: these are what `find` left of its own mapping.
                unsafe { libc::munmap(at, len) };
            }
        }
    }
}

fn memfd(len: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a NUL-terminated literal; the call has no other memory argument.
    let fd = unsafe { libc::memfd_create(c"vmkit-guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned to us, is open, and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    // Who else maps it cannot cut off what this process relies on.
    // SAFETY: the call has no memory argument; the file is our own.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SIZE_SEALS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

const SIZE_SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// True for a file that [`region_at`] made: its pages may be given back, for they hold nothing that lasts
/// and nobody else has room to run out of.
pub(crate) fn is_ram(file: &File) -> bool {
    // SAFETY: the call has no memory argument; the descriptor is open as long as the file is.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & SIZE_SEALS == SIZE_SEALS
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_reads_back_what_was_written_on_both_sides_of_the_hole() {
        let ram = allocate(&RamLayout::pc((3 << 30) + (1 << 20)).unwrap(), Backing::Memfd).unwrap();
        ram.write_obj(0x1122_3344_5566_7788_u64, GuestAddress(4 << 30)).unwrap();
        assert_eq!(ram.read_obj::<u16>(GuestAddress((4 << 30) + 6)).unwrap(), 0x1122);
        assert!(ram.write_obj(1_u8, GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn large_anonymous_memory_is_aligned_as_the_guest_sees_it() {
        for start in [0, 4 << 30] {
            // Tests on other threads map memory too, and may come in between.
            let lies_well = (0..20).any(|_| {
                let start = GuestAddress(start);
                let region = region_at(start, 16 << 20, Backing::Anonymous).unwrap();
                (region.as_ptr() as usize).wrapping_sub(start.0 as usize).is_multiple_of(HUGE_PAGE)
            });
            assert!(lies_well, "at {start:#x}");
        }
    }

    #[test]
    fn what_holds_a_place_is_whole_pages_so_that_it_can_be_given_back() {
        let place = Place::find(4 * HUGE_PAGE + 1, GuestAddress(0x3000)).unwrap();
        for (at, len) in [place.below, place.above] {
            assert!((at as usize).is_multiple_of(4096) && len.is_multiple_of(4096));
        }
        assert!(Place::find(4 * HUGE_PAGE, GuestAddress(0x3001)).is_none());
    }

    #[test]
    fn both_backings_start_zeroed() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = allocate(&RamLayout::pc(1 << 20).unwrap(), backing).unwrap();
            assert_eq!(ram.read_obj::<u64>(GuestAddress(0x8000)).unwrap(), 0);
        }
    }
}
