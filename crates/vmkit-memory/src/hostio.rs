//! Host I/O straight to and from guest memory, without a copy in between, and pages given back to
//! the host.
//!
//! What crosses here is bytes between descriptors and pages; nothing here looks at their contents.

#![allow(unsafe_code, reason = "vectored I/O on pointers into guest memory, madvise, fallocate")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use arrayvec::ArrayVec;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileSlice};

use crate::region::is_ram;
use crate::{GuestRam, MemoryRegion, PAGE_SIZE, WriteTracker};

/// A piece of guest memory, contiguous on the host.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, WriteTracker>>;

/// The `len` bytes at `at`, for a device to write; none if they are not all in one region, or may not
/// be written.
#[inline]
pub fn slice_to_write(ram: &GuestRam, at: GuestAddress, len: usize) -> Option<GuestSlice<'_>> {
    let (region, start) = ram.to_region_addr(at)?;
    if is_read_only(region) {
        return None;
    }
    region.get_slice(start, len).ok()
}

/// False if any of the `len` bytes at `at` is in memory that devices only read: a file whose guest's writes
/// go [`Aside`](crate::FileWrites::Aside). Each page that a device wrote there would be a copy of the
/// host's beyond the memory that the machine was given. Bytes that are not there are not looked at.
#[inline]
pub fn may_write(ram: &GuestRam, at: GuestAddress, len: usize) -> bool {
    let last = at.0.saturating_add((len as u64).saturating_sub(1));
    match ram.find_region(at) {
        Some(region) if region.last_addr().0 >= last => !is_read_only(region),
        // It spans regions, or is not all there.
        _ => ram.iter().all(|region| {
            !is_read_only(region) || region.last_addr() < at || region.start_addr().0 > last
        }),
    }
}

#[inline]
fn is_read_only(region: &MemoryRegion) -> bool {
    let mapping: &MmapRegion<WriteTracker> = region;
    mapping.bitmap().is_read_only()
}

/// Pieces of guest memory for one vectored call.
///
/// Reads and writes go between a descriptor and the pieces in order; what a read fills is reported
/// to the write tracker.
#[derive(Default)]
pub struct GuestBuffers<'a> {
    slices: ArrayVec<GuestSlice<'a>, { GuestBuffers::MAX }>,
    bytes: usize,
}

impl std::fmt::Debug for GuestBuffers<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestBuffers")
            .field("pieces", &self.slices.len())
            .field("bytes", &self.bytes)
            .finish()
    }
}

impl<'a> GuestBuffers<'a> {
    /// Most pieces one call takes.
    pub const MAX: usize = 64;

    /// No pieces.
    #[inline]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a piece at the end; false if there is no room for it.
    #[must_use]
    #[inline]
    pub fn push(&mut self, slice: GuestSlice<'a>) -> bool {
        let len = slice.len();
        let fits = self.slices.try_push(slice).is_ok();
        self.bytes += if fits { len } else { 0 };
        fits
    }

    /// Forgets all pieces.
    #[inline]
    pub fn clear(&mut self) {
        self.slices.clear();
        self.bytes = 0;
    }

    /// Bytes in all pieces.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// True if another piece would not fit.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.slices.is_full()
    }

    /// The pieces, in order.
    #[inline]
    pub fn slices(&self) -> &[GuestSlice<'a>] {
        &self.slices
    }

    /// Drops the first `count` bytes.
    pub fn advance(&mut self, mut count: usize) {
        self.bytes = self.bytes.saturating_sub(count);
        while let Some(first) = self.slices.first_mut() {
            if count < first.len() {
                if let Ok(rest) = first.offset(count) {
                    *first = rest;
                }
                return;
            }
            count -= first.len();
            self.slices.remove(0);
        }
    }

    /// Reads from `fd`, at `offset` or at its own position, into the pieces. Returns the bytes
    /// read, which may be fewer than asked for.
    ///
    /// # Errors
    /// What the host said; an interrupted call is repeated.
    pub fn read_from(&self, fd: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let offset = offset.map(host_offset).transpose()?;
        let read = self.call(|iov, count| match offset {
            // SAFETY: `iov` points to `count` entries, each a piece of guest memory that `self`
            // borrows; that memory is mapped, writable, and only ever accessed as volatile.
            Some(offset) => unsafe { libc::preadv(fd.as_raw_fd(), iov, count, offset) },
            // SAFETY: as above.
            None => unsafe { libc::readv(fd.as_raw_fd(), iov, count) },
        })?;
        let mut left = read;
        for slice in &self.slices {
            let filled = left.min(slice.len());
            slice.bitmap().mark_dirty(0, filled);
            left -= filled;
        }
        Ok(read)
    }

    /// Writes the pieces to `fd`, at `offset` or at its own position. Returns the bytes written,
    /// which may be fewer than all.
    ///
    /// # Errors
    /// What the host said; an interrupted call is repeated.
    pub fn write_to(&self, fd: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let offset = offset.map(host_offset).transpose()?;
        self.call(|iov, count| match offset {
            // SAFETY: `iov` points to `count` entries, each a piece of guest memory that `self`
            // borrows; the kernel only reads it.
            Some(offset) => unsafe { libc::pwritev(fd.as_raw_fd(), iov, count, offset) },
            // SAFETY: as above.
            None => unsafe { libc::writev(fd.as_raw_fd(), iov, count) },
        })
    }

    /// Sends the pieces on a connected stream socket, without waiting and without a signal if the
    /// other side is gone. Returns the bytes sent, which may be fewer than all.
    ///
    /// # Errors
    /// What the host said; an interrupted call is repeated.
    pub fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.call(|iov, count| {
            // SAFETY: an all-zero message header is a valid one, without address and control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = iov.cast_mut();
            message.msg_iovlen = count as _;
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            // SAFETY: `message` holds `count` entries, each a piece of guest memory that `self`
            // borrows; the kernel only reads them.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) }
        })
    }

    fn call(
        &self,
        mut transfer: impl FnMut(*const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let iov: ArrayVec<libc::iovec, { GuestBuffers::MAX }> = self
            .slices
            .iter()
            .map(|s| libc::iovec { iov_base: s.ptr_guard_mut().as_ptr().cast(), iov_len: s.len() })
            .collect();
        loop {
            let done = transfer(iov.as_ptr(), iov.len() as libc::c_int);
            if let Ok(done) = usize::try_from(done) {
                return Ok(done);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

fn host_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Gives the whole pages within `len` bytes at `at` back to the host: they read as zeros from then
/// on, until they are written again. Returns the bytes given back. What is not RAM is passed over, files
/// ([`FileMemory`](crate::FileMemory)) among it.
///
/// # Errors
/// What the host said. Pages before the one that failed are gone.
pub fn discard(ram: &GuestRam, at: GuestAddress, len: u64) -> io::Result<u64> {
    let end = at.0.saturating_add(len);
    let mut given = 0;
    for region in ram.iter() {
        let (first, last) = (region.start_addr().0, region.last_addr().0);
        let Some(start) = at.0.max(first).checked_next_multiple_of(PAGE_SIZE) else { continue };
        let stop = end.min(last.saturating_add(1)) / PAGE_SIZE * PAGE_SIZE;
        if start < stop && region.file_offset().is_none_or(|file| is_ram(file.file())) {
            discard_in(region, start - first, stop - start)?;
            given += stop - start;
        }
    }
    Ok(given)
}

/// `offset` and `len` are whole pages inside `region`.
fn discard_in(region: &MemoryRegion, offset: u64, len: u64) -> io::Result<()> {
    let slice = region
        .get_slice(vm_memory::MemoryRegionAddress(offset), len as usize)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let result = match region.file_offset() {
        Some(file) => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let at = host_offset(file.start() + offset)?;
            // SAFETY: the call has no memory argument; the file is the region's own.
            unsafe { libc::fallocate(file.file().as_raw_fd(), mode, at, len as libc::off_t) }
        }
        None => {
            let start = slice.ptr_guard_mut().as_ptr().cast();
            // SAFETY: the range lies inside the region's private anonymous mapping, which stays
            // mapped; its memory is only accessed as volatile, so that it may change to zeros.
            unsafe { libc::madvise(start, len as usize, libc::MADV_DONTNEED) }
        }
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    slice.bitmap().mark_dirty(0, len as usize);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::os::fd::AsFd;

    use vm_memory::{Bytes, GuestMemory, Permissions};

    use super::*;
    use crate::{Backing, DirtyBitmap, RamLayout, allocate};

    fn ram(backing: Backing) -> GuestRam {
        allocate(&RamLayout::pc(1 << 20).unwrap(), backing).unwrap()
    }

    fn buffers<'a>(ram: &'a GuestRam, pieces: &[(u64, usize)]) -> GuestBuffers<'a> {
        let mut buffers = GuestBuffers::new();
        for &(at, len) in pieces {
            let range = GuestAddress(at);
            let slices = GuestMemory::get_slices(ram, range, len, Permissions::ReadWrite);
            for slice in slices.unwrap() {
                assert!(buffers.push(slice.unwrap()));
            }
        }
        buffers
    }

    #[test]
    fn bytes_go_from_a_file_to_pieces_of_memory_and_back() {
        let ram = ram(Backing::Memfd);
        let mut file = tempfile();
        ram.write_slice(b"onetwothree", GuestAddress(0x100)).unwrap();
        let out = buffers(&ram, &[(0x103, 3), (0x100, 3), (0x106, 5)]);
        assert_eq!(out.write_to(file.as_fd(), Some(2)).unwrap(), 11);
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "\0\0twoonethree");

        let region = ram.find_region(GuestAddress(0)).unwrap();
        let tracker = (**region).bitmap();
        tracker.set_tracking(true);
        let into = buffers(&ram, &[(0x2FFF, 2), (0x5000, 100)]);
        assert_eq!(into.read_from(file.as_fd(), Some(2)).unwrap(), 11);
        let mut found = [0; 9];
        ram.read_slice(&mut found, GuestAddress(0x5000)).unwrap();
        assert_eq!(&found, b"oonethree");
        let mut dirty = DirtyBitmap::for_bytes(1 << 20);
        tracker.take_dirty(&mut dirty);
        assert_eq!(dirty.pages().collect::<Vec<_>>(), [2, 3, 5]);
    }

    #[test]
    fn sending_to_nobody_is_an_error_and_no_signal() {
        let ram = ram(Backing::Anonymous);
        ram.write_slice(b"onetwo", GuestAddress(0x100)).unwrap();
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let out = buffers(&ram, &[(0x103, 3), (0x100, 3)]);
        assert_eq!(out.send(ours.as_fd()).unwrap(), 6);
        let mut text = [0; 6];
        theirs.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"twoone");
        drop(theirs);
        assert_eq!(out.send(ours.as_fd()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn advancing_drops_what_is_done() {
        let ram = ram(Backing::Anonymous);
        let mut pieces = buffers(&ram, &[(0, 4), (0x10, 4), (0x20, 4)]);
        pieces.advance(5);
        assert_eq!((pieces.bytes(), pieces.slices().len(), pieces.slices()[0].len()), (7, 2, 3));
        pieces.advance(100);
        assert_eq!((pieces.bytes(), pieces.slices().len()), (0, 0));
    }

    #[test]
    fn an_offset_past_what_the_host_can_say_is_an_error() {
        let ram = ram(Backing::Anonymous);
        let file = tempfile();
        assert!(buffers(&ram, &[(0, 1)]).read_from(file.as_fd(), Some(u64::MAX)).is_err());
    }

    #[test]
    fn discarded_pages_read_as_zeros_and_others_stay() {
        for backing in [Backing::Memfd, Backing::Anonymous] {
            let ram = ram(backing);
            for page in 0..4_u64 {
                ram.write_obj(0x55_u8, GuestAddress(page * 4096 + 7)).unwrap();
            }
            // Parts of the first and the last page are not whole pages.
            assert_eq!(discard(&ram, GuestAddress(1), 3 * 4096).unwrap(), 2 * 4096);
            let left: Vec<u8> =
                (0..4_u64).map(|p| ram.read_obj(GuestAddress(p * 4096 + 7)).unwrap()).collect();
            assert_eq!(left, [0x55, 0, 0, 0x55], "{backing:?}");
            assert_eq!(discard(&ram, GuestAddress(u64::MAX - 5), u64::MAX).unwrap(), 0);
        }
    }

    fn tempfile() -> File {
        let path = std::env::temp_dir().join(format!(
            "vmkit-memory-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
