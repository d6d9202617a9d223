//! Memory that is asked of the kernel and given back to it.

use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use core::slice;

use super::call::{call, number};
use crate::service::Errno;

/// Zeroed bytes. The kernel gives pages as they are touched.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    pub(super) fn new(len: usize) -> Result<Self, Errno> {
        const READ_WRITE: usize = 3;
        const PRIVATE_ANONYMOUS: usize = 0x22;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start =
            unsafe { call(number::MMAP, [0, len, READ_WRITE, PRIVATE_ANONYMOUS, usize::MAX, 0]) }?;
        let start = NonNull::new(core::ptr::with_exposed_provenance_mut(start));
        start.map(|start| Self { start, len }).ok_or(Errno(12))
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has `len` initialised bytes, and is ours until it is dropped.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody borrows the bytes any more, and the mapping is exactly these.
        let _ =
            unsafe { call(number::MUNMAP, [self.start.as_ptr().expose_provenance(), self.len]) };
    }
}
