//! The whole state of a vCPU, and the names of its parts.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use vmkit_irqchip::LapicState;

use super::{ControlRegisters, DebugRegisters, GeneralRegisters, Segments};

bitflags! {
    /// Parts of a vCPU's state.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct StateSet: u32 {
        /// [`GeneralRegisters`].
        const GENERAL = 1;
        /// [`Segments`].
        const SEGMENTS = 1 << 1;
        /// [`ControlRegisters`].
        const CONTROL = 1 << 2;
        /// [`DebugRegisters`].
        const DEBUG = 1 << 3;
        /// x87, SSE and extended state.
        const XSAVE = 1 << 4;
        /// Model-specific registers.
        const MSRS = 1 << 5;
        /// Pending and injected events.
        const EVENTS = 1 << 6;
        /// The local APIC.
        const LAPIC = 1 << 7;
        /// Running, halted, or waiting for SIPI.
        const MP = 1 << 8;
        /// The time-stamp counter.
        const TSC = 1 << 9;
    }
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// What a vCPU is doing (multiprocessor state).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MpState {
    /// Executing instructions.
    #[default]
    Runnable,
    /// In HLT.
    Halted,
    /// After INIT, waiting for a start-up IPI.
    WaitForSipi,
}

/// An exception that is to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error_code: Option<u32>,
}

/// An interrupt on its way to the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupt {
    /// Vector.
    pub vector: u8,
    /// True for an INT n instruction.
    pub software: bool,
}

/// What is to be delivered before the next instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Pending {
    /// Nothing.
    #[default]
    None,
    /// An exception.
    Exception(Exception),
    /// An interrupt that the local APIC or PIC has already handed over.
    Interrupt(Interrupt),
}

/// Events in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// To be delivered before the next instruction.
    pub pending: Pending,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// An NMI handler runs: NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// The instruction before was STI or MOV SS: interrupts wait for one more instruction.
    pub interrupt_shadow: bool,
}

/// x87, SSE and extended state, in XSAVE's standard (non-compacted) format
/// (Intel SDM vol. 1 §13.4).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct XsaveArea(pub Vec<u8>);

impl std::fmt::Debug for XsaveArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "XsaveArea({} bytes)", self.0.len())
    }
}

impl Default for XsaveArea {
    /// The initial state: FCW 0x37F, MXCSR 0x1F80, everything else zero.
    fn default() -> Self {
        let mut bytes = vec![0; 576];
        bytes[..2].copy_from_slice(&0x37F_u16.to_le_bytes());
        bytes[24..28].copy_from_slice(&0x1F80_u32.to_le_bytes());
        Self(bytes)
    }
}

/// All of a vCPU's state. [`Default`] is the state after reset of the boot processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub general: GeneralRegisters,
    /// Segment and table registers.
    pub segments: Segments,
    /// Control registers.
    pub control: ControlRegisters,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// x87, SSE and extended state.
    pub xsave: XsaveArea,
    /// Model-specific registers that the CPU model lists, ascending by index; FS, GS and kernel GS
    /// base among them where no other part holds them.
    pub msrs: Vec<Msr>,
    /// Events in flight.
    pub events: Events,
    /// Local APIC, if the partition has one.
    pub lapic: Option<LapicState>,
    /// Multiprocessor state.
    pub mp: MpState,
    /// Time-stamp counter, as the guest would read it.
    pub tsc: u64,
}
