//! What can be wrong with a saved state, and the fault a register access can raise.

use thiserror::Error;

/// Why a saved state was refused. The machine that refused it is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IrqchipError {
    /// A field holds a value that the machine can never hold.
    #[error("saved {machine} state is invalid: {field} is {value:#x}")]
    InvalidState {
        /// Which machine: `"pic"`, `"ioapic"`, `"pit"` or `"lapic"`.
        machine: &'static str,
        /// Which field or register.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// The state belongs to a local APIC with another ID.
    #[error("saved local APIC state is of APIC ID {found:#x}, this is {want:#x}")]
    ApicId {
        /// The ID in the state.
        found: u32,
        /// The ID of the machine it was given to.
        want: u32,
    },
}

/// An access to an APIC MSR that raises `#GP(0)` in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("general protection fault: APIC register access")]
pub struct ApicFault;
