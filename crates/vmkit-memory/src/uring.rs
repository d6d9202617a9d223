//! Reads and writes between a file and guest memory, many at once, through io_uring.
//!
//! Knows files, places in guest memory and the order of nothing: what was begun first may end last.

#![allow(unsafe_code, reason = "the kernel is given pointers into guest memory")]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::squeue::Entry as Submission;
use io_uring::{IoUring, opcode, types};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use crate::{GuestRam, may_write};

/// Most pieces of memory in one operation of the kernel's (`UIO_MAXIOV`).
const MOST_PIECES: usize = 1024;
/// How often an operation that the kernel gave up without doing it is begun again.
const MOST_RETRIES: u8 = 16;
/// The registered file.
const FILE: types::Fixed = types::Fixed(0);

/// A file's operations in flight.
///
/// An operation is begun on an [`Entry`], handed to the kernel by [`submit`](Self::submit), and told of
/// by [`completed`](Self::completed) once it is whole: what the kernel does in parts is continued
/// there. When there may be something to take, the descriptor ([`AsRawFd`]) is readable.
///
/// Guest memory stays mapped while an operation uses it: dropping the ring waits for all.
pub struct FileRing {
    ring: ManuallyDrop<IoUring>,
    memory: ManuallyDrop<GuestRam>,
    slots: ManuallyDrop<Vec<Slot>>,
    /// Numbers of the slots that are not in use.
    free: Vec<u16>,
    /// Operations the kernel has or is about to be given.
    queued: usize,
    /// Those it is about to be given.
    unsubmitted: usize,
    _file: File,
}

impl std::fmt::Debug for FileRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileRing")
            .field("entries", &self.slots.len())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Sync,
}

/// One operation.
struct Slot {
    kind: Kind,
    /// Where in the file the rest begins.
    offset: u64,
    /// Host addresses of the memory, of which those from `next` on are left.
    pieces: Vec<libc::iovec>,
    next: usize,
    left: u64,
    /// Guest addresses of the memory, to be reported to the write tracker.
    places: Vec<(GuestAddress, u32)>,
    retries: u8,
}

// SAFETY: the pointers of `pieces` lead into guest memory, which may be used from any thread; nothing
// here dereferences them.
unsafe impl Send for Slot {}

impl FileRing {
    /// A ring of `file`'s for up to `entries` operations (1 to 4096) on `memory`.
    ///
    /// # Errors
    /// What the host said: `PermissionDenied` or `Unsupported` where it has no io_uring for us.
    pub fn new(file: File, memory: GuestRam, entries: u16) -> io::Result<Self> {
        let entries = entries.clamp(1, 4096);
        let ring = IoUring::new(entries.into())?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let slot = |_| Slot {
            kind: Kind::Sync,
            offset: 0,
            pieces: Vec::new(),
            next: 0,
            left: 0,
            places: Vec::new(),
            retries: 0,
        };
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            memory: ManuallyDrop::new(memory),
            slots: ManuallyDrop::new((0..entries).map(slot).collect()),
            free: (0..entries).rev().collect(),
            queued: 0,
            unsubmitted: 0,
            _file: file,
        })
    }

    /// Operations that were begun and not yet told of.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Room for one more operation; none if there are as many in flight as there are entries.
    pub fn entry(&mut self) -> Option<Entry<'_>> {
        let number = *self.free.last()?;
        Some(Entry { ring: self, number })
    }

    /// Gives the kernel what was begun.
    ///
    /// # Errors
    /// What the host said. The operations are given again by the next call.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted > 0 {
            let taken = match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                other => other?,
            };
            self.unsubmitted = self.unsubmitted.saturating_sub(taken);
        }
        Ok(())
    }

    /// Waits until the kernel is done with at least one part of an operation, if it has any.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        if self.queued > 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// An operation that is over: the number of its entry, and whether it succeeded as a whole. After
    /// the last, call [`submit`](Self::submit): the rest of operations done in part is begun here too.
    pub fn completed(&mut self) -> Option<(u16, io::Result<()>)> {
        loop {
            let done = self.ring.completion().next()?;
            self.queued = self.queued.saturating_sub(1);
            let number = done.user_data() as u16;
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { continue };
            let result = match slot.advance(done.result(), &self.memory) {
                Some(result) => result,
                None => match self.push(number) {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
            };
            self.free.push(number);
            return Some((number, result));
        }
    }

    /// Queues what is left of operation `number`.
    fn push(&mut self, number: u16) -> io::Result<()> {
        let Some(slot) = self.slots.get(usize::from(number)) else { return Ok(()) };
        let submission = slot.submission().user_data(number.into());
        // SAFETY: the submission points to the slot's pieces, and these into guest memory. Both stay
        // where they are and alive until its completion is taken: a slot in use is only changed
        // by `completed`, after the kernel is done with it, and `drop` waits for the kernel or
        // keeps both for ever. The memory is mapped and only ever accessed as volatile.
        let pushed = unsafe { self.ring.submission().push(&submission) };
        // There is room for as many as there are slots, and each is queued at most once.
        pushed.map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        self.queued += 1;
        self.unsubmitted += 1;
        Ok(())
    }
}

impl Slot {
    fn submission(&self) -> Submission {
        let pieces = self.pieces.get(self.next..).unwrap_or_default();
        let (first, count) = (pieces.as_ptr(), pieces.len().min(MOST_PIECES) as u32);
        match (self.kind, pieces) {
            // One piece spares the kernel the list.
            (Kind::Read, [one]) => {
                let len = one.iov_len.try_into().unwrap_or(u32::MAX);
                opcode::Read::new(FILE, one.iov_base.cast(), len).offset(self.offset).build()
            }
            (Kind::Write, [one]) => {
                let len = one.iov_len.try_into().unwrap_or(u32::MAX);
                opcode::Write::new(FILE, one.iov_base.cast(), len).offset(self.offset).build()
            }
            (Kind::Read, _) => opcode::Readv::new(FILE, first, count).offset(self.offset).build(),
            (Kind::Write, _) => opcode::Writev::new(FILE, first, count).offset(self.offset).build(),
            (Kind::Sync, _) => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    /// The kernel says `result` of what it was given; none if the operation must go on.
    fn advance(&mut self, result: i32, memory: &GuestRam) -> Option<io::Result<()>> {
        let Ok(mut count) = u64::try_from(result) else {
            let error = io::Error::from_raw_os_error(result.saturating_neg());
            let again = [libc::EINTR, libc::EAGAIN, libc::ECANCELED].contains(&-result);
            if again && self.retries < MOST_RETRIES {
                // Also what a thread had in flight when it ended is given up without being done.
                self.retries += 1;
                return None;
            }
            self.tell(memory);
            return Some(Err(error));
        };
        self.left = self.left.saturating_sub(count);
        self.offset = self.offset.saturating_add(count);
        if self.left == 0 {
            self.tell(memory);
            return Some(Ok(()));
        }
        if count == 0 {
            self.tell(memory);
            let kind = match self.kind {
                Kind::Read => io::ErrorKind::UnexpectedEof,
                Kind::Write | Kind::Sync => io::ErrorKind::WriteZero,
            };
            return Some(Err(kind.into()));
        }
        while let Some(piece) = self.pieces.get_mut(self.next) {
            if count < piece.iov_len as u64 {
                piece.iov_base = piece.iov_base.wrapping_byte_add(count as usize);
                piece.iov_len -= count as usize;
                break;
            }
            count -= piece.iov_len as u64;
            self.next += 1;
        }
        None
    }

    /// Reports what a read filled, or may have filled, to the write tracker.
    fn tell(&self, memory: &GuestRam) {
        for &(at, len) in self.places.iter().filter(|_| self.kind == Kind::Read) {
            let slices = GuestMemory::get_slices(memory, at, len as usize, Permissions::Write);
            for slice in slices.into_iter().flatten().flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
}

/// Room for one operation. It has a number, below the ring's entries, until it is told of.
#[derive(Debug)]
pub struct Entry<'a> {
    ring: &'a mut FileRing,
    number: u16,
}

impl Entry<'_> {
    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Begins to read from `offset` of the file on into `pieces` of memory, one after the other.
    ///
    /// # Errors
    /// [`GuestMemoryError`] if a piece is not all in memory, or [may not be written](crate::may_write);
    /// nothing was begun then.
    pub fn read(
        self,
        offset: u64,
        pieces: impl Iterator<Item = (GuestAddress, u32)>,
    ) -> Result<(), GuestMemoryError> {
        self.begin(Kind::Read, offset, pieces)
    }

    /// Begins to write `pieces` of memory, one after the other, to the file from `offset` on.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(
        self,
        offset: u64,
        pieces: impl Iterator<Item = (GuestAddress, u32)>,
    ) -> Result<(), GuestMemoryError> {
        self.begin(Kind::Write, offset, pieces)
    }

    /// Begins to make durable what the file was told to write: all of which [`FileRing::completed`] has
    /// told, perhaps more.
    ///
    /// # Errors
    /// None there is now; as [`read`](Self::read).
    pub fn sync(self) -> Result<(), GuestMemoryError> {
        self.begin(Kind::Sync, 0, std::iter::empty())
    }

    fn begin(
        self,
        kind: Kind,
        offset: u64,
        pieces: impl Iterator<Item = (GuestAddress, u32)>,
    ) -> Result<(), GuestMemoryError> {
        let Self { ring, number } = self;
        let Some(slot) = ring.slots.get_mut(usize::from(number)) else { return Ok(()) };
        (slot.kind, slot.offset, slot.next, slot.left, slot.retries) = (kind, offset, 0, 0, 0);
        slot.pieces.clear();
        slot.places.clear();
        let access = if kind == Kind::Read { Permissions::Write } else { Permissions::Read };
        for (at, len) in pieces.filter(|(_, len)| *len > 0) {
            if kind == Kind::Read && !may_write(&ring.memory, at, len as usize) {
                return Err(GuestMemoryError::InvalidGuestAddress(at));
            }
            for slice in GuestMemory::get_slices(&*ring.memory, at, len as usize, access)? {
                let slice = slice?;
                slot.pieces.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            slot.places.push((at, len));
            slot.left += u64::from(len);
        }
        if ring.push(number).is_ok() {
            ring.free.pop();
            return Ok(());
        }
        // Never so: see `push`.
        Err(GuestMemoryError::HostAddressNotAvailable)
    }
}

impl AsRawFd for FileRing {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for FileRing {
    fn drop(&mut self) {
        while self.queued > 0 {
            let waited = self.ring.submit_and_wait(1);
            if let Err(error) = waited
                && error.kind() != io::ErrorKind::Interrupted
            {
                // The kernel may go on using the memory, so that it must stay, and what leads to it.
                log::error!("cannot wait for I/O on guest memory, which stays allocated: {error}");
                return;
            }
            self.queued = self.queued.saturating_sub(self.ring.completion().count());
        }
        // SAFETY: the three are dropped only here, and not used afterwards. The kernel has nothing
        // left that points into them.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.slots);
            ManuallyDrop::drop(&mut self.memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::{Backing, DirtyBitmap, FileMemory, FileWrites, RamLayout, allocate};

    /// A ring on a file whose byte at each offset is the offset's page, or none where the host has no
    /// io_uring.
    fn ring(pages: u64, entries: u16) -> Option<(FileRing, File, GuestRam)> {
        let name = format!("vmkit-uring-{}-{:?}", std::process::id(), std::thread::current().id());
        let path = std::env::temp_dir().join(name);
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        for page in 0..pages {
            file.write_all_at(&[page as u8 + 1; 4096], page * 4096).unwrap();
        }
        let ram = allocate(&RamLayout::pc(8 << 20).unwrap(), Backing::Memfd).unwrap();
        match FileRing::new(file.try_clone().unwrap(), ram.clone(), entries) {
            Ok(ring) => Some((ring, file, ram)),
            Err(error) => {
                eprintln!("ignored: io_uring: {error}");
                None
            }
        }
    }

    fn pieces(all: &[(u64, u32)]) -> impl Iterator<Item = (GuestAddress, u32)> {
        all.iter().map(|&(at, len)| (GuestAddress(at), len))
    }

    fn finish(ring: &mut FileRing) -> Vec<(u16, io::Result<()>)> {
        let mut all = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            all.extend(std::iter::from_fn(|| ring.completed()));
            ring.submit().unwrap();
        }
        all
    }

    #[test]
    fn many_operations_are_in_flight_and_each_is_told_once() {
        let Some((mut ring, file, ram)) = ring(16, 8) else { return };
        for page in 0..8_u64 {
            let entry = ring.entry().unwrap();
            let number = u64::from(entry.number());
            let at = 0x10_0000 + number * 0x2000;
            entry.read(number * 8192, pieces(&[(at, 1), (at + 1, 8190), (at + 8191, 1)])).unwrap();
            assert_eq!(ring.in_flight() as u64, page + 1);
        }
        assert!(ring.entry().is_none());
        ring.submit().unwrap();
        let mut done = finish(&mut ring);
        done.sort_by_key(|(number, _)| *number);
        assert!(done.iter().all(|(_, result)| result.is_ok()));
        assert_eq!(done.iter().map(|d| d.0).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        for page in 0..16_u64 {
            let byte: u8 = ram.read_obj(GuestAddress(0x10_0000 + page * 4096 + 4095)).unwrap();
            assert_eq!(u64::from(byte), page + 1);
        }
        let region = ram.find_region(GuestAddress(0)).unwrap();
        let tracker = (**region).bitmap();
        tracker.set_tracking(true);
        ring.entry().unwrap().write(0, pieces(&[(0x10_2000, 4096)])).unwrap();
        ring.entry().unwrap().sync().unwrap();
        ring.entry().unwrap().read(4096, pieces(&[(0x20_0FFF, 2)])).unwrap();
        assert!(finish(&mut ring).iter().all(|(_, result)| result.is_ok()));
        let mut byte = [0];
        file.read_exact_at(&mut byte, 7).unwrap();
        assert_eq!(byte, [3]);
        let mut dirty = DirtyBitmap::for_bytes(8 << 20);
        tracker.take_dirty(&mut dirty);
        assert_eq!(dirty.pages().collect::<Vec<_>>(), [0x200, 0x201], "only reads change memory");
    }

    #[test]
    fn more_pieces_than_the_kernel_takes_at_once_are_one_operation() {
        let Some((mut ring, _file, ram)) = ring(4, 1) else { return };
        let all: Vec<(u64, u32)> = (0..5000).map(|n| (0x10_0000 + n * 16, 3)).collect();
        ring.entry().unwrap().read(1, pieces(&all)).unwrap();
        assert!(matches!(finish(&mut ring)[..], [(0, Ok(()))]));
        for n in [0_u64, 1365, 4999] {
            let byte: u8 = ram.read_obj(GuestAddress(0x10_0002 + n * 16)).unwrap();
            assert_eq!(u64::from(byte), (n * 3 + 3) / 4096 + 1);
        }
    }

    #[test]
    fn a_file_that_ends_early_and_memory_that_is_not_there_are_errors() {
        let Some((mut ring, _file, _ram)) = ring(1, 2) else { return };
        ring.entry().unwrap().read(2048, pieces(&[(0, 4096)])).unwrap();
        let done = finish(&mut ring);
        assert_eq!(done[0].1.as_ref().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        for at in [8 << 20, (8 << 20) - 1, u64::MAX] {
            assert!(ring.entry().unwrap().read(0, pieces(&[(0, 8), (at, 2)])).is_err());
        }
        assert_eq!(ring.in_flight(), 0);
        ring.entry().unwrap().read(u64::MAX, pieces(&[(0, 8)])).unwrap();
        ring.entry().unwrap().read(0, pieces(&[])).unwrap();
        finish(&mut ring);
    }

    #[test]
    fn memory_that_devices_only_read_is_written_to_the_file_and_not_read_into() {
        let Some((_, file, ram)) = ring(1, 2) else { return };
        let (high, own) = (GuestAddress(8 << 20), file.try_clone().unwrap());
        let aside = FileMemory::new(own, FileWrites::Aside).unwrap().region(high).unwrap();
        let ram = ram.insert_region(aside.into()).unwrap();
        let mut ring = FileRing::new(file, ram, 2).unwrap();
        for at in [high.0, high.0 - 4] {
            assert!(ring.entry().unwrap().read(0, pieces(&[(0, 8), (at, 8)])).is_err());
        }
        assert_eq!(ring.in_flight(), 0);
        ring.entry().unwrap().write(2048, pieces(&[(high.0, 8)])).unwrap();
        assert!(finish(&mut ring)[0].1.is_ok());
    }

    #[test]
    fn a_ring_dropped_with_operations_in_flight_waits_for_them() {
        let Some((mut ring, _file, ram)) = ring(64, 64) else { return };
        for n in 0..64_u64 {
            ring.entry().unwrap().read(n * 4096, pieces(&[(n * 4096, 4096)])).unwrap();
        }
        ring.submit().unwrap();
        drop(ring);
        for n in 0..64_u64 {
            let byte: u8 = ram.read_obj(GuestAddress(n * 4096 + 1)).unwrap();
            assert_eq!(u64::from(byte), n + 1);
        }
    }

    #[test]
    fn what_was_begun_on_a_thread_that_ended_is_still_done() {
        let Some((mut ring, _file, ram)) = ring(64, 64) else { return };
        let mut ring = std::thread::spawn(move || {
            for n in 0..64_u64 {
                ring.entry().unwrap().read(n * 4096, pieces(&[(n * 4096, 4096)])).unwrap();
            }
            ring.submit().unwrap();
            ring
        })
        .join()
        .unwrap();
        assert!(finish(&mut ring).iter().all(|(_, result)| result.is_ok()));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(63 * 4096)).unwrap(), 64);
    }
}
