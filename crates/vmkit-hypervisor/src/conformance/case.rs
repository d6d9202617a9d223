//! What a case is, what it may need, and how it fails.

use thiserror::Error;
use vmkit_device::memory::GuestMemoryError;

use crate::{Capabilities, Feature, Hypervisor, HypervisorError};

/// Something that not every backend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// Room for this many vCPUs.
    Vcpus(u32),
    /// A CPU feature.
    Feature(Feature),
    /// [`Capabilities::reports_dead_halt`].
    DeadHalt,
    /// [`Capabilities::counts_instructions`].
    InstructionCount,
    /// [`Capabilities::scales_tsc`].
    TscScaling,
    /// [`Capabilities::doorbells`].
    Doorbells,
    /// A counter of allocations: see [`count_allocations_by`](super::runner::count_allocations_by).
    AllocationCounter,
}

impl Need {
    /// True if a backend with `capabilities` has it.
    pub fn is_met(self, capabilities: &Capabilities) -> bool {
        match self {
            Self::Vcpus(count) => capabilities.max_vcpus >= count,
            Self::Feature(feature) => capabilities.features.contains(feature),
            Self::DeadHalt => capabilities.reports_dead_halt,
            Self::InstructionCount => capabilities.counts_instructions,
            Self::TscScaling => capabilities.scales_tsc,
            Self::Doorbells => capabilities.doorbells,
            Self::AllocationCounter => super::runner::allocations().is_some(),
        }
    }
}

impl std::fmt::Display for Need {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vcpus(count) => write!(f, "{count} vCPUs"),
            Self::Feature(feature) => write!(f, "{feature}"),
            Self::DeadHalt => f.write_str("reports of a HLT for good"),
            Self::InstructionCount => f.write_str("an instruction count"),
            Self::TscScaling => f.write_str("a TSC of any frequency"),
            Self::Doorbells => f.write_str("doorbells"),
            Self::AllocationCounter => f.write_str("a counting allocator"),
        }
    }
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Theme and behaviour: `"io::port_widths"`.
    pub name: &'static str,
    /// Where the behaviour is written down.
    pub cites: &'static str,
    /// What a backend needs for it.
    pub needs: &'static [Need],
    /// Runs it.
    pub run: fn(&dyn Hypervisor) -> Result<(), Failure>,
}

/// Why a case failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Failure {
    /// Something was not as it must be.
    #[error("{0}")]
    Wrong(String),
    /// The guest did not come to an end and was stopped.
    #[error("the guest hung; it was at {rip:#x}")]
    Hung {
        /// Its instruction pointer.
        rip: u64,
    },
    /// The backend refused or failed.
    #[error("{0}")]
    Backend(#[from] HypervisorError),
    /// The case's program cannot be assembled.
    #[error("the guest program: {0}")]
    Program(#[from] iced_x86::IcedError),
    /// The case reached outside its memory.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The host has no memory for the case.
    #[error("{0}")]
    NoMemory(#[from] vmkit_device::memory::MemoryError),
    /// The host has no thread for the case.
    #[error("the host: {0}")]
    Host(#[from] std::io::Error),
}

/// Fails the case unless a condition holds.
macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !bool::from($holds) {
            return Err($crate::conformance::Failure::Wrong(format!($($message)+)));
        }
    };
}
pub(super) use ensure;

/// Fails the case unless it got what it wants.
macro_rules! ensure_eq {
    ($got:expr, $want:expr, $($what:tt)+) => {
        match (&$got, &$want) {
            (got, want) => if *got != *want {
                return Err($crate::conformance::Failure::Wrong(format!(
                    "{}: expected {:x?}, got {:x?}", format_args!($($what)+), want, got
                )));
            }
        }
    };
}
pub(super) use ensure_eq;

/// The table of a theme's cases: name, citation, needs.
macro_rules! cases {
    ($theme:literal: $($name:ident $cites:literal $([$($need:expr),+])?;)+) => {
        pub(super) const CASES: &[$crate::conformance::Case] = &[$(
            $crate::conformance::Case {
                name: concat!($theme, "::", stringify!($name)),
                cites: $cites,
                needs: &[$($($need),+)?],
                run: $name,
            },
        )+];
    };
}
pub(super) use cases;
