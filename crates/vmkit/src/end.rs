//! Why a machine ended.

use std::fmt;

use vmkit_device::GuestEnd;

/// Why a machine ended. What went wrong on the host's side is a
/// [`VmError`](crate::VmError) instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum End {
    /// The guest powered the machine off.
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest left with this exit code, through a debug-exit port.
    ExitCode(u32),
    /// The guest's kernel panicked and said so, through a panic notifier.
    GuestPanicked,
    /// A vCPU met a fault while it delivered a double fault, and shut down (Intel SDM vol. 3A §6.15,
    /// interrupt 8).
    TripleFault {
        /// The vCPU.
        vcpu: u32,
        /// Its instruction pointer; that of the faulting instruction where the backend kept it.
        rip: u64,
    },
    /// Every vCPU is in HLT with interrupts off, or waits for a start-up IPI that nobody can send:
    /// the guest can never run again.
    Halted,
    /// The host stopped it.
    Stopped,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("powered off"),
            Self::Reset => f.write_str("asked for a reset"),
            Self::ExitCode(code) => write!(f, "left with exit code {code}"),
            Self::GuestPanicked => f.write_str("its kernel panicked"),
            Self::TripleFault { vcpu, rip } => write!(f, "triple fault on vCPU {vcpu} at {rip:#x}"),
            Self::Halted => f.write_str("halted with interrupts off"),
            Self::Stopped => f.write_str("stopped by the host"),
        }
    }
}

impl From<GuestEnd> for End {
    fn from(end: GuestEnd) -> Self {
        match end {
            GuestEnd::PowerOff => Self::PoweredOff,
            GuestEnd::Reset => Self::Reset,
            GuestEnd::ExitCode(code) => Self::ExitCode(code),
            // The contract may grow an end this build has no name for: the guest asked to stop.
            GuestEnd::Panicked | _ => Self::GuestPanicked,
        }
    }
}
