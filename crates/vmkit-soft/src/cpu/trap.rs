//! How an instruction says that it did not complete.

use super::Cpu;

/// The instruction did not complete; what happened is in [`Cpu::trap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Trap;

/// What stopped an instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum TrapKind {
    #[default]
    None,
    /// An exception with its vector and error code.
    Exception { vector: u8, error: Option<u32> },
    /// A non-canonical address: #GP(0), or #SS(0) for a stack access.
    NonCanonical,
    /// The CPU model lists the instruction and this processor lacks it.
    Unimplemented,
}

pub(crate) const DE: u8 = 0;
pub(crate) const DB: u8 = 1;
pub(crate) const BP: u8 = 3;
pub(crate) const OF: u8 = 4;
pub(crate) const BR: u8 = 5;
pub(crate) const UD: u8 = 6;
pub(crate) const NM: u8 = 7;
pub(crate) const DF: u8 = 8;
pub(crate) const TS: u8 = 10;
pub(crate) const NP: u8 = 11;
pub(crate) const SS: u8 = 12;
pub(crate) const GP: u8 = 13;
pub(crate) const PF: u8 = 14;
pub(crate) const MF: u8 = 16;
pub(crate) const AC: u8 = 17;
pub(crate) const XM: u8 = 19;

impl Cpu {
    /// Records an exception without an error code.
    #[cold]
    pub fn raise(&mut self, vector: u8) -> Trap {
        self.trap = TrapKind::Exception { vector, error: None };
        Trap
    }

    /// Records an exception with an error code.
    #[cold]
    pub fn raise_with(&mut self, vector: u8, error: u32) -> Trap {
        self.trap = TrapKind::Exception { vector, error: Some(error) };
        Trap
    }

    /// Records #GP(0).
    #[cold]
    pub fn gp0(&mut self) -> Trap {
        self.raise_with(GP, 0)
    }

    /// Records #UD.
    #[cold]
    pub fn ud(&mut self) -> Trap {
        self.raise(UD)
    }

    /// Records that this processor lacks the instruction.
    #[cold]
    pub fn unimplemented(&mut self) -> Trap {
        self.trap = TrapKind::Unimplemented;
        Trap
    }
}
