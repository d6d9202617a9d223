//! What can go wrong in a backend.

use std::io;

use thiserror::Error;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, HypervisorError>;

/// An instruction that a backend could not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedInstruction {
    /// Its linear address (RIP plus the code segment's base).
    pub address: u64,
    /// Its first bytes.
    pub bytes: [u8; 15],
    /// How many of `bytes` could be read.
    pub len: u8,
}

impl std::fmt::Display for FailedInstruction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} [", self.address)?;
        for (i, byte) in self.bytes.iter().take(self.len.into()).enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { " " })?;
        }
        f.write_str("]")
    }
}

/// Why a backend is not usable on a host.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// Its device is missing, or may not be opened: the source tells which.
    #[error("{path}: {source}")]
    Device {
        /// The device.
        path: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Its interface is another one.
    #[error("API version {found}, not {wanted}")]
    Version {
        /// The host's.
        found: i32,
        /// The one that the backend knows.
        wanted: i32,
    },
    /// It has not all that the backend needs.
    #[error("this KVM has no {0}")]
    Lacks(&'static str),
}

/// Why a backend refused or failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HypervisorError {
    /// The backend is not usable on this host.
    #[error("{backend} is not usable here: {reason}")]
    Unavailable {
        /// The backend.
        backend: &'static str,
        /// Why.
        #[source]
        reason: Unavailable,
    },
    /// The host refused an operation.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The CPU model lists features that the host cannot give.
    #[error("the host cannot run CPU model {model}: it lacks {}", missing.join(", "))]
    CpuModel {
        /// The model's name.
        model: String,
        /// What is missing.
        missing: Vec<String>,
    },
    /// A mapping overlaps another one, is not page-aligned, or is unknown.
    #[error("guest-physical mapping at {start:#x} of {len:#x} bytes: {reason}")]
    Mapping {
        /// First guest-physical address.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The vCPU index is taken or out of range.
    #[error("vCPU {0}: the index is taken or past the partition's limit")]
    VcpuIndex(u32),
    /// A state that the processor cannot be in, or that this backend cannot take.
    #[error("vCPU state: {reason}")]
    State {
        /// What is wrong with it.
        reason: String,
        /// What the host said, if it was the one to refuse.
        source: Option<io::Error>,
    },
    /// The guest executed an instruction that its CPU model lists and this backend lacks.
    #[error("unimplemented instruction at {0}")]
    Unimplemented(FailedInstruction),
    /// The backend could not go on (KVM's internal error or failed entry).
    #[error("the backend failed: {reason} (instruction at {at})")]
    Failed {
        /// What the backend said.
        reason: String,
        /// Where the guest was.
        at: FailedInstruction,
        /// What the host said, if it refused.
        source: Option<io::Error>,
    },
    /// The operation does not exist on this backend.
    #[error("{0} is not supported by this backend")]
    Unsupported(&'static str),
}

impl HypervisorError {
    /// A [`State`](Self::State) that the backend itself refuses.
    pub fn state(reason: impl Into<String>) -> Self {
        Self::State { reason: reason.into(), source: None }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn what_the_host_said_is_at_the_end_of_the_chain() {
        let source = || io::Error::from(io::ErrorKind::PermissionDenied);
        let at = FailedInstruction { address: 0, bytes: [0; 15], len: 0 };
        let errors = [
            HypervisorError::Unavailable {
                backend: "kvm",
                reason: Unavailable::Device { path: "/dev/kvm", source: source() },
            },
            HypervisorError::State { reason: "bad".into(), source: Some(source()) },
            HypervisorError::Failed { reason: "bad".into(), at, source: Some(source()) },
        ];
        for error in &errors {
            let mut last: &dyn Error = error;
            while let Some(next) = last.source() {
                last = next;
            }
            let last = last.downcast_ref::<io::Error>();
            assert_eq!(last.map(io::Error::kind), Some(io::ErrorKind::PermissionDenied), "{error}");
        }
    }
}
