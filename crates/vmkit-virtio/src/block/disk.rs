//! Where a block device's bytes are. Knows nothing of virtio; ranges are checked by the caller.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::sync::{PoisonError, RwLock};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use vmkit_memory::GuestBuffers;

use crate::lock::FileLock;

/// A place for a disk's bytes. Called from several threads at once, one per queue.
///
/// Offsets and lengths are in bytes, multiples of 512, and inside of the disk.
pub trait Disk: Send + Sync {
    /// Size in bytes, which does not change. What is beyond the last whole sector is not used.
    fn bytes(&self) -> u64;
    /// Fills all of `into` from `offset` on.
    ///
    /// # Errors
    /// What the host said; the guest is told of an I/O error.
    fn read(&self, offset: u64, into: &mut GuestBuffers<'_>) -> io::Result<()>;
    /// Writes all of `from` at `offset`. It need not be durable before [`flush`](Self::flush).
    ///
    /// # Errors
    /// What the host said; the guest is told of an I/O error.
    fn write(&self, offset: u64, from: &mut GuestBuffers<'_>) -> io::Result<()>;
    /// Makes all that was written durable.
    ///
    /// # Errors
    /// What the host said; the guest is told of an I/O error.
    fn flush(&self) -> io::Result<()>;
    /// True if [`discard`](Self::discard) frees anything. The driver is offered it only then.
    fn can_discard(&self) -> bool {
        false
    }
    /// The guest no longer needs these bytes.
    ///
    /// # Errors
    /// What the host said; the guest is told of an I/O error.
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    /// Makes these bytes zeros, which may free their place if `may_unmap`.
    ///
    /// # Errors
    /// What the host said; the guest is told of an I/O error.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
    /// The machine rests: what a disk keeps in this process's memory goes to where others would
    /// look for it. It need not be durable.
    ///
    /// # Errors
    /// What the host said; it is logged, and a machine is not saved while it lasts.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A raw image in a file or on a block device, read and written at positions.
pub(super) struct FileDisk {
    file: File,
    bytes: u64,
    _lock: Option<FileLock>,
}

impl FileDisk {
    pub(super) fn new(mut file: File, lock: Option<FileLock>) -> io::Result<Self> {
        // Unlike its metadata, the end of a file is also known for a block device.
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, bytes, _lock: lock })
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        const ZEROS: [u8; 4096] = [0; 4096];
        while len > 0 {
            let count = len.min(ZEROS.len() as u64);
            self.file.write_all_at(ZEROS.get(..count as usize).unwrap_or_default(), offset)?;
            offset += count;
            len -= count;
        }
        Ok(())
    }
}

impl Disk for FileDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, mut offset: u64, into: &mut GuestBuffers<'_>) -> io::Result<()> {
        while into.bytes() > 0 {
            let count = into.read_from(self.file.as_fd(), Some(offset))?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into.advance(count);
            offset += count as u64;
        }
        Ok(())
    }

    fn write(&self, mut offset: u64, from: &mut GuestBuffers<'_>) -> io::Result<()> {
        while from.bytes() > 0 {
            let count = from.write_to(self.file.as_fd(), Some(offset))?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            from.advance(count);
            offset += count as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| fallocate(&self.file, mode, offset, len)) {
            // A discard is a hint; a file system that has no holes keeps the bytes.
            Err(error) if cannot(error) => Ok(()),
            other => Ok(other?),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        for mode in if may_unmap { [hole, zero] } else { [zero, zero] } {
            match retry_on_intr(|| fallocate(&self.file, mode, offset, len)) {
                Err(error) if cannot(error) => {}
                other => return Ok(other?),
            }
        }
        self.write_zero_bytes(offset, len)
    }
}

/// True if the host cannot do that to a range, and another way must do: a block device of larger blocks
/// answers so for parts of one.
fn cannot(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::INVAL)
}

/// A disk in memory.
pub(super) struct MemoryDisk {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryDisk {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }

    fn change(&self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        change(
            range(offset, len).and_then(|r| bytes.get_mut(r)).ok_or(io::ErrorKind::InvalidInput)?,
        );
        Ok(())
    }
}

fn range(offset: u64, len: u64) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    Some(start..start.checked_add(usize::try_from(len).ok()?)?)
}

impl Disk for MemoryDisk {
    fn bytes(&self) -> u64 {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read(&self, offset: u64, into: &mut GuestBuffers<'_>) -> io::Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let part = range(offset, into.bytes() as u64).and_then(|r| bytes.get(r));
        let mut part = part.ok_or(io::ErrorKind::InvalidInput)?;
        for slice in into.slices() {
            let (now, later) = part.split_at_checked(slice.len()).unwrap_or((part, &[]));
            slice.copy_from(now);
            part = later;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &mut GuestBuffers<'_>) -> io::Result<()> {
        self.change(offset, from.bytes() as u64, |mut part| {
            for slice in from.slices() {
                let (now, later) = part.split_at_mut(slice.len().min(part.len()));
                slice.copy_to(now);
                part = later;
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.change(offset, len, |part| part.fill(0))
    }
}
