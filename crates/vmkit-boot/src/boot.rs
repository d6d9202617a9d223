//! The contract between a machine and what it boots.

use vmkit_device::Announcement;
use vmkit_hypervisor::x86::{StateSet, VcpuState};
use vmkit_memory::{GuestRam, RamLayout};

use crate::BootError;

/// The machine a guest is loaded into.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct BootContext<'a> {
    /// Guest RAM.
    pub ram: &'a GuestRam,
    /// Where that RAM lies.
    pub layout: &'a RamLayout,
    /// Number of vCPUs; their APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u32,
    /// What the devices want the firmware tables to say.
    pub announcements: &'a [Announcement],
    /// True if RAM may hold something other than zeros: see [`reused_ram`](Self::reused_ram).
    pub reused: bool,
}

impl std::fmt::Debug for BootContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BootContext")
            .field("layout", self.layout)
            .field("vcpus", &self.vcpus)
            .field("announcements", &self.announcements)
            .field("reused", &self.reused)
            .finish_non_exhaustive()
    }
}

impl<'a> BootContext<'a> {
    /// A machine of one vCPU without devices, whose RAM is all zeros.
    pub fn new(ram: &'a GuestRam, layout: &'a RamLayout) -> Self {
        Self { ram, layout, vcpus: 1, announcements: &[], reused: false }
    }

    /// With this many vCPUs.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// With these devices.
    pub fn announcements(mut self, announcements: &'a [Announcement]) -> Self {
        self.announcements = announcements;
        self
    }

    /// RAM has been used before. Loaders then write the zero pages of an image too, which they
    /// otherwise leave alone so that a kernel's empty pages cost the host nothing.
    pub fn reused_ram(mut self) -> Self {
        self.reused = true;
        self
    }
}

/// The state of the boot vCPU at its first instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The parts of `state` that are to be set; the others stay as reset left them.
    pub set: StateSet,
    /// The state.
    pub state: VcpuState,
}

/// Something a machine can boot.
pub trait Boot: Send {
    /// Writes the guest and its tables into RAM and says how the boot vCPU starts. The other vCPUs
    /// wait for a start-up IPI.
    ///
    /// # Errors
    /// [`BootError`]; RAM then holds an undefined part of the guest.
    fn load(&self, ctx: &BootContext<'_>) -> Result<Entry, BootError>;
}

/// The processor mode a guest starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuMode {
    /// Real mode, as after a PC BIOS.
    Real16,
    /// Protected mode with flat 4 GiB segments, without paging.
    Protected32,
    /// Long mode with flat segments and the first 4 GiB identity-mapped.
    Long64,
}
