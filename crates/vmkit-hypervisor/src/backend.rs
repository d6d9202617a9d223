//! Backends and what they make.

use std::sync::Arc;

use vmkit_device::Clock;

use crate::{FeatureSet, HypervisorError, Partition, Result};

/// What a backend offers on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The backend's name: `"kvm"` or `"software"`.
    pub name: &'static str,
    /// Most vCPUs in one partition.
    pub max_vcpus: u32,
    /// CPU features it can give a guest.
    pub features: FeatureSet,
    /// Widest guest-physical address in bits.
    pub physical_bits: u8,
    /// True if writes can ring an eventfd without an exit.
    pub doorbells: bool,
    /// True if it counts guest instructions exactly.
    pub counts_instructions: bool,
    /// True if it reports a HLT that nothing can end as
    /// [`VmExit::HaltedForGood`](crate::VmExit::HaltedForGood).
    pub reports_dead_halt: bool,
    /// True if the guest's TSC frequency can be chosen freely.
    pub scales_tsc: bool,
    /// True if it has what [`DirtyLog::Ring`] asks for.
    pub dirty_ring: bool,
}

impl Capabilities {
    /// Capabilities of a backend called `name`, all absent.
    pub fn named(name: &'static str) -> Self {
        Self {
            name,
            max_vcpus: 1,
            features: FeatureSet::empty(),
            physical_bits: 36,
            doorbells: false,
            counts_instructions: false,
            reports_dead_halt: false,
            scales_tsc: false,
            dirty_ring: false,
        }
    }
}

/// Which interrupt controllers a partition holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum InterruptControllers {
    /// PIC pair, IOAPIC, PIT and a local APIC per vCPU: a PC's.
    #[default]
    Full,
    /// A local APIC per vCPU in the kernel, PIC pair, IOAPIC and PIT in this process. A backend that
    /// has all of them in this process anyway takes it for [`Full`](Self::Full).
    Split,
    /// None: for guests of one vCPU that poll and never halt. Nothing could start another vCPU.
    None,
}

/// The guest's time-stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TscSpec {
    /// Whatever runs without scaling: the host's frequency on KVM, 1 GHz in software.
    #[default]
    Native,
    /// This frequency in kHz.
    Khz(u32),
}

/// How a backend keeps track of the pages that a guest writes. What
/// [`Partition::take_dirty`](crate::Partition::take_dirty) tells is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirtyLog {
    /// A bit for each page: taking the log costs by the size of the mapping.
    #[default]
    Bitmap,
    /// A list of each vCPU, where the backend has that, else as [`Bitmap`](Self::Bitmap): taking the log
    /// costs by what was written, and a guest that writes much leaves the guest now and then to have
    /// its list emptied.
    Ring,
}

/// What a partition is to be.
#[derive(Clone)]
#[non_exhaustive]
pub struct PartitionSpec {
    /// Most vCPUs it will hold.
    pub vcpus: u32,
    /// Its interrupt controllers.
    pub interrupt_controllers: InterruptControllers,
    /// Its TSC.
    pub tsc: TscSpec,
    /// How it tracks written pages.
    pub dirty_log: DirtyLog,
    /// Guest time, which timers and the TSC follow where the backend keeps them itself (all in software,
    /// the PIT of split controllers).
    pub clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for PartitionSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PartitionSpec")
            .field("vcpus", &self.vcpus)
            .field("interrupt_controllers", &self.interrupt_controllers)
            .field("tsc", &self.tsc)
            .field("dirty_log", &self.dirty_log)
            .finish_non_exhaustive()
    }
}

impl PartitionSpec {
    /// A PC with `vcpus` processors whose timers follow `clock`.
    pub fn new(vcpus: u32, clock: Arc<dyn Clock>) -> Self {
        Self {
            vcpus,
            interrupt_controllers: InterruptControllers::default(),
            tsc: TscSpec::default(),
            dirty_log: DirtyLog::default(),
            clock,
        }
    }

    /// For backends: is it what any of them could make?
    ///
    /// # Errors
    /// [`HypervisorError::Unsupported`] for several vCPUs without interrupt controllers.
    pub fn check(&self) -> Result<()> {
        if self.vcpus > 1 && self.interrupt_controllers == InterruptControllers::None {
            return Err(HypervisorError::Unsupported(
                "more than one vCPU without interrupt controllers",
            ));
        }
        Ok(())
    }
}

/// A backend.
pub trait Hypervisor: Send + Sync {
    /// What it offers here.
    fn capabilities(&self) -> &Capabilities;
    /// Makes an empty partition: no memory, no vCPUs.
    ///
    /// # Errors
    /// [`HypervisorError`](crate::HypervisorError) if the host refuses, or the spec asks for more
    /// than [`capabilities`](Self::capabilities) say.
    fn create(&self, spec: &PartitionSpec) -> Result<Arc<dyn Partition>>;
}
