//! x86-64 processor state as plain data, in small parts.

mod registers;
mod segments;
mod state;

pub use registers::{ControlRegisters, DebugRegisters, GeneralRegisters};
pub use segments::{DescriptorTable, Segment, SegmentAttributes, Segments};
pub use state::{
    Events, Exception, Interrupt, MpState, Msr, Pending, StateSet, VcpuState, XsaveArea,
};

bitflags::bitflags! {
    /// Control register 0 (Intel SDM vol. 3A §2.5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr0: u64 {
        /// Protected mode.
        const PE = 1;
        /// WAIT faults with TS.
        const MP = 1 << 1;
        /// No x87: its instructions fault.
        const EM = 1 << 2;
        /// Task switched: x87 and SSE instructions fault once.
        const TS = 1 << 3;
        /// Always one.
        const ET = 1 << 4;
        /// x87 errors raise #MF.
        const NE = 1 << 5;
        /// The supervisor honours read-only pages.
        const WP = 1 << 16;
        /// Alignment checks may be on.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Caches off.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
    }

    /// Control register 4 (Intel SDM vol. 3A §2.5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr4: u64 {
        /// Virtual-8086 extensions.
        const VME = 1;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// RDTSC is privileged.
        const TSD = 1 << 2;
        /// Debugging extensions: DR4 and DR5 fault.
        const DE = 1 << 3;
        /// 4 MiB pages.
        const PSE = 1 << 4;
        /// Physical-address extension.
        const PAE = 1 << 5;
        /// Machine checks.
        const MCE = 1 << 6;
        /// Global pages.
        const PGE = 1 << 7;
        /// RDPMC for all.
        const PCE = 1 << 8;
        /// FXSAVE and SSE enabled.
        const OSFXSR = 1 << 9;
        /// SSE exceptions raise #XM.
        const OSXMMEXCPT = 1 << 10;
        /// SGDT, SIDT, SLDT, SMSW and STR are privileged.
        const UMIP = 1 << 11;
        /// Five-level paging.
        const LA57 = 1 << 12;
        /// RDFSBASE and kin enabled.
        const FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        const PCIDE = 1 << 17;
        /// XSAVE enabled.
        const OSXSAVE = 1 << 18;
        /// No supervisor execution of user pages.
        const SMEP = 1 << 20;
        /// No supervisor access to user pages.
        const SMAP = 1 << 21;
        /// Protection keys for user pages.
        const PKE = 1 << 22;
    }

    /// Extended-feature-enable register (Intel SDM vol. 3A §2.2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Efer: u64 {
        /// SYSCALL enabled.
        const SCE = 1;
        /// Long mode enabled.
        const LME = 1 << 8;
        /// Long mode active.
        const LMA = 1 << 10;
        /// No-execute pages enabled.
        const NXE = 1 << 11;
    }
}
