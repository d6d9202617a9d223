//! Guest memory for vmkit: where RAM lies in the guest-physical address space, the host mappings
//! behind it, and who learns of a write.
//!
//! A machine's RAM is a [`GuestRam`]: a set of [`MemoryRegion`]s, each one host mapping that never
//! moves. Every write that goes through vm-memory's accessors (devices, loaders) reaches the
//! region's [`WriteTracker`]; a backend that writes through host pointers (the software processor)
//! reports its own writes there, and KVM's are merged in from its log.
//!
//! This crate knows nothing of processors, devices or hypervisors.

mod file;
mod hostio;
mod layout;
mod region;
mod tap;
mod tracker;
mod uring;

pub use file::{FileMemory, FileWrites};
pub use hostio::{GuestBuffers, GuestSlice, discard, may_write, slice_to_write};
pub use layout::{HIGH_RAM_START, MMIO_HOLE_START, RamLayout, RamRange};
pub use region::{Backing, GuestRam, MemoryError, MemoryRegion, allocate, region_at};
pub use tap::{TapOffloads, open_tap, set_tap_offloads};
pub use tracker::{DirtyBitmap, LINE_SIZE, PAGE_SIZE, WriteTracker, WriteWatch};
pub use uring::{Entry, FileRing};
pub use vm_memory::{
    Address, ByteValued, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend,
    GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress, MmapRegion, Permissions,
    VolatileMemory, VolatileSlice,
};
