//! Partitions: memory mappings, interrupt controllers, vCPUs.

use std::sync::Arc;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use vmkit_device::memory::{DirtyBitmap, GuestAddress, MemoryRegion};
use vmkit_device::{Doorbells, InterruptSink};
use vmkit_irqchip::{IoapicState, PicState, PitState};

use crate::{CpuModel, Result, Vcpu};

bitflags! {
    /// What the guest may do with a mapping. It may always read and execute.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MapAccess: u8 {
        /// It may write. Without this, writes arrive at [`VcpuIo::mmio_write`](crate::VcpuIo).
        const WRITE = 1;
        /// The backend records which pages the guest writes.
        const TRACK_DIRTY = 2;
    }
}

/// Names one mapping of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MapId(pub u32);

/// State of a partition beside its memory and vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionState {
    /// The 8259 pair.
    pub pic: PicState,
    /// The IOAPIC.
    pub ioapic: IoapicState,
    /// The 8254.
    pub pit: PitState,
    /// Guest time in nanoseconds when the state was taken (kvmclock follows it where offered).
    pub clock_ns: u64,
}

/// A guest-physical address space with processors and interrupt controllers.
pub trait Partition: Send + Sync {
    /// Shows `region` to the guest at `at` (page-aligned). The partition keeps the region alive until
    /// [`unmap`](Self::unmap). May be called while vCPUs run.
    ///
    /// # Errors
    /// [`HypervisorError::Mapping`](crate::HypervisorError::Mapping) if it overlaps another mapping or
    /// is misaligned.
    fn map(&self, at: GuestAddress, region: Arc<MemoryRegion>, access: MapAccess) -> Result<MapId>;
    /// Takes a mapping away. When this returns, no vCPU reaches it any more.
    ///
    /// # Errors
    /// [`HypervisorError::Mapping`](crate::HypervisorError::Mapping) if `id` is unknown.
    fn unmap(&self, id: MapId) -> Result<()>;
    /// Merges into `into` the pages of mapping `id` that the guest wrote since the last call (or since
    /// tracking began), and forgets them. Writes by devices are in the region's own tracker.
    ///
    /// # Errors
    /// If `id` is unknown or the mapping does not track.
    fn take_dirty(&self, id: MapId, into: &mut DirtyBitmap) -> Result<()>;
    /// Makes vCPU `index` (its APIC ID), in the state after reset: vCPU 0 runs, others wait for SIPI.
    ///
    /// # Errors
    /// [`HypervisorError::CpuModel`](crate::HypervisorError::CpuModel) naming what the host lacks.
    fn create_vcpu(&self, index: u32, model: &CpuModel) -> Result<Box<dyn Vcpu>>;
    /// Where interrupts go.
    fn interrupts(&self) -> Arc<dyn InterruptSink>;
    /// In-kernel doorbells, if the backend has them.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>>;
    /// The guest's TSC frequency in kHz.
    fn tsc_khz(&self) -> u32;
    /// Saves interrupt controllers, timers and clock. No vCPU may be running.
    ///
    /// # Errors
    /// What the host said.
    fn save(&self) -> Result<PartitionState>;
    /// Loads what [`save`](Self::save) saved. The state is untrusted.
    ///
    /// # Errors
    /// [`HypervisorError::State`](crate::HypervisorError::State) if it is impossible.
    fn load(&self, from: &PartitionState) -> Result<()>;
}
