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
    Restart(Arc<DeviceError>),
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
    Thread { vcpu: u32, kind: io::ErrorKind },
    Restart(Arc<DeviceError>),
}

impl From<RunFailure> for VmError {
    fn from(failure: RunFailure) -> Self {
        match failure {
            RunFailure::Backend { vcpu, source } => Self::Vcpu { vcpu, source },
            RunFailure::Panicked { vcpu, message } => Self::VcpuPanicked { vcpu, message },
            RunFailure::Thread { vcpu, kind } => Self::Thread { vcpu, source: kind.into() },
            RunFailure::Restart(source) => Self::Restart(source),
        }
    }
}
