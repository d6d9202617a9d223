//! Files of the host that a guest sees as memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress};

use crate::{MemoryError, MemoryRegion, PAGE_SIZE, WriteTracker};

/// Where writes to a file that is mapped go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileWrites {
    /// Into the file, where every other user of it sees them.
    Through,
    /// Into pages of this mapping's own, gone when it is. The file stays as it is. As each such page is
    /// the host's to find, nothing that a guest chooses may write there: see
    /// [`may_write`](crate::may_write).
    Aside,
}

/// A file to be shown to a guest as memory: its pages are the host's page cache, which all who map the
/// file share.
///
/// The file must keep its size: to touch what was cut off, or what its disk cannot give, ends this process
/// with SIGBUS, as it does for everyone who maps files.
#[derive(Debug)]
pub struct FileMemory {
    file: File,
    bytes: u64,
    writes: FileWrites,
}

impl FileMemory {
    /// All of `file`, which is open for reading, and for writing too if they go
    /// [`Through`](FileWrites::Through).
    ///
    /// # Errors
    /// [`MemoryError::File`] if its size cannot be found, [`MemoryError::Size`] if that is no multiple of
    /// 4 KiB.
    pub fn new(mut file: File, writes: FileWrites) -> Result<Self, MemoryError> {
        // Unlike its metadata, the end of a file is also known for a block device.
        let bytes = file.seek(SeekFrom::End(0)).map_err(MemoryError::File)?;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size(bytes));
        }
        Ok(Self { file, bytes, writes })
    }

    /// Its size, a multiple of 4 KiB.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where writes go.
    pub fn writes(&self) -> FileWrites {
        self.writes
    }

    /// Makes what was written durable, also what a guest wrote to its memory.
    ///
    /// # Errors
    /// What the host said.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Maps the file for the guest to see at `start`.
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the host refuses, [`MemoryError::Overlap`] if the range wraps.
    pub fn region(&self, start: GuestAddress) -> Result<MemoryRegion, MemoryError> {
        let refused = |source| MemoryError::Map { start: start.0, len: self.bytes, source };
        let file = self.file.try_clone().map_err(refused)?;
        let (sharing, tracker) = match self.writes {
            FileWrites::Through => (libc::MAP_SHARED, WriteTracker::new(self.bytes)),
            FileWrites::Aside => (libc::MAP_PRIVATE, WriteTracker::read_only(self.bytes)),
        };
        let len = usize::try_from(self.bytes).map_err(|error| refused(io::Error::other(error)))?;
        let mapping = MmapRegionBuilder::new_with_bitmap(len, tracker)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, 0))
            .build()
            .map_err(|error| refused(io::Error::other(error)))?;
        MemoryRegion::new(mapping, start).ok_or(MemoryError::Overlap(start.0))
    }
}

#[cfg(test)]
#[cfg(not(miri))] // which has no files to map
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, MemoryRegionAddress};

    use super::*;
    use crate::{GuestRam, discard};

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file
    }

    #[test]
    fn writes_go_through_or_aside() {
        let same = |file: &File| file.try_clone().unwrap();
        let file = file(2 * PAGE_SIZE);
        let through = FileMemory::new(same(&file), FileWrites::Through).unwrap();
        let aside = FileMemory::new(same(&file), FileWrites::Aside).unwrap();
        let (shared, own) =
            (through.region(GuestAddress(0)).unwrap(), aside.region(GuestAddress(0)).unwrap());
        own.write_obj(*b"other", MemoryRegionAddress(0)).unwrap();
        shared.write_obj(*b"there", MemoryRegionAddress(PAGE_SIZE)).unwrap();
        through.sync().unwrap();
        let mut there = [[0; 5]; 2];
        file.read_exact_at(&mut there[0], 0).unwrap();
        file.read_exact_at(&mut there[1], PAGE_SIZE).unwrap();
        assert_eq!(there, [*b"first", *b"there"]);
        // A page of which there is no copy is the file's.
        assert_eq!(own.read_obj::<[u8; 5]>(MemoryRegionAddress(PAGE_SIZE)).unwrap(), *b"there");
    }

    #[test]
    fn a_files_pages_are_not_given_back() {
        for writes in [FileWrites::Through, FileWrites::Aside] {
            let file = file(PAGE_SIZE);
            let memory = FileMemory::new(file.try_clone().unwrap(), writes).unwrap();
            let region = memory.region(GuestAddress(0)).unwrap();
            let ram = GuestRam::from_regions(vec![region]).unwrap();
            assert_eq!(discard(&ram, GuestAddress(0), PAGE_SIZE).unwrap(), 0);
            let mut first = [0; 5];
            file.read_exact_at(&mut first, 0).unwrap();
            assert_eq!(first, *b"first");
        }
    }

    #[test]
    fn sizes_are_whole_pages() {
        for bytes in [5, PAGE_SIZE + 1] {
            let error = FileMemory::new(file(bytes), FileWrites::Aside).unwrap_err();
            assert!(matches!(error, MemoryError::Size(n) if n == bytes), "{error}");
        }
        let none = FileMemory::new(tempfile::tempfile().unwrap(), FileWrites::Aside);
        assert!(matches!(none.unwrap_err(), MemoryError::Size(0)));
    }
}
