//! The instruction oracle: one unprivileged instruction on the host's processor and on a vCPU, from
//! the same state, and everything compared.
//!
//! [`forms`] lists the encodings, [`generate`] makes concrete [`Case`]s of them, [`native`] runs a
//! case on the host, [`guest`] runs it on a backend's vCPU, [`compare`] says what differs and must
//! not, [`run()`] ties them together. A case is made from a seed and a number alone, so that any
//! report can be reproduced.
//!
//! The host is the authority: nothing here knows what an instruction does, apart from short tables
//! of what the manuals leave undefined.

mod case;
pub mod compare;
pub mod forms;
pub mod generate;
pub mod guest;
pub mod host;
pub mod layout;
mod minimise;
pub mod native;
mod rng;
pub mod run;

pub use case::{Case, Ending, Fpu, MemoryDiff, Outcome, Selectors};
pub use rng::Rng;
pub use run::{Mismatch, Options, OracleError, Report, Subject, run};
