//! What can go wrong on the host's side.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vmkit_boot::BootError;
use vmkit_device::{BusError, DeviceError, ResourceError};
use vmkit_hypervisor::HypervisorError;
use vmkit_memory::MemoryError;

/// Why a machine could not be built or could not go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// The builder was given nothing to boot.
    #[error("nothing to boot: give the builder a guest with `boot`")]
    NothingToBoot,
    /// The number of vCPUs is zero or more than the backend has.
    #[error("{wanted} vCPUs: the {backend} backend offers 1 to {most}")]
    VcpuCount {
        /// What was asked for.
        wanted: u32,
        /// The backend.
        backend: &'static str,
        /// The most it offers.
        most: u32,
    },
    /// A PC's chipset was asked for without interrupt controllers, which its devices and guests need.
    #[error("a PC's chipset has no use without interrupt controllers: make the machine bare")]
    NoInterruptControllers,
    /// The guest's agent was to dial in over a vsock that is no device of the machine.
    #[error(
        "the guest's agent has no way in: give its vsock, after `guest_agent`, to the builder with `device`"
    )]
    AgentWithoutDevice,
    /// Two devices have the same name.
    #[error("two devices are called {0}")]
    DuplicateDevice(String),
    /// Guest memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device could not be built or started.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A device could not restart after a pause, which ended the machine.
    #[error("after a pause: {0}")]
    Restart(#[source] Arc<DeviceError>),
    /// A device needs ports, memory or an interrupt that another one has.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// A device wants a range that another one answers.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The backend refused something outside a run.
    #[error(transparent)]
    Backend(#[from] HypervisorError),
    /// The backend failed while it ran a vCPU. The source has the address and the bytes of the
    /// instruction.
    #[error("vCPU {vcpu}: {source}")]
    Vcpu {
        /// The vCPU.
        vcpu: u32,
        /// What failed.
        source: Arc<HypervisorError>,
    },
    /// A vCPU's thread panicked: a bug in a device, or in vmkit.
    #[error("vCPU {vcpu}: its thread panicked: {message}")]
    VcpuPanicked {
        /// The vCPU.
        vcpu: u32,
        /// What the panic said.
        message: String,
    },
    /// A vCPU's thread could not be started.
    #[error("vCPU {vcpu}: cannot start its thread: {source}")]
    Thread {
        /// The vCPU.
        vcpu: u32,
        /// What the host said.
        source: io::Error,
    },
    /// The machine has no vCPU of that index.
    #[error("the machine has no vCPU {0}")]
    NoSuchVcpu(u32),
}

/// Why a run failed; unlike [`VmError`] it can be told to everybody who waits.
#[derive(Clone, Debug)]
pub(crate) enum RunFailure {
    Backend { vcpu: u32, source: Arc<HypervisorError> },
    Panicked { vcpu: u32, message: String },
    Thread { vcpu: u32, source: Arc<io::Error> },
    Restart(Arc<DeviceError>),
}

impl From<RunFailure> for VmError {
    fn from(failure: RunFailure) -> Self {
        match failure {
            RunFailure::Backend { vcpu, source } => Self::Vcpu { vcpu, source },
            RunFailure::Panicked { vcpu, message } => Self::VcpuPanicked { vcpu, message },
            RunFailure::Thread { vcpu, source } => Self::Thread { vcpu, source: again(&source) },
            RunFailure::Restart(source) => Self::Restart(source),
        }
    }
}

/// The same error once more, for somebody else who waits.
fn again(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn a_failed_restart_names_its_source() {
        let reason = DeviceError::Config { device: "mine".into(), reason: "worn out".into() };
        let error = VmError::from(RunFailure::Restart(Arc::new(reason)));
        assert_eq!(error.to_string(), "after a pause: mine: worn out");
        assert_eq!(error.source().unwrap().to_string(), "mine: worn out");
    }

    #[test]
    fn everybody_who_waits_is_told_what_the_host_said() {
        // EAGAIN has the kind of EWOULDBLOCK, which alone tells less.
        for source in [io::Error::from_raw_os_error(11), io::Error::other("no more")] {
            let words = source.to_string();
            let failure = RunFailure::Thread { vcpu: 3, source: Arc::new(source) };
            for _ in 0..2 {
                let error = VmError::from(failure.clone());
                assert_eq!(error.source().unwrap().to_string(), words);
            }
        }
    }
}
