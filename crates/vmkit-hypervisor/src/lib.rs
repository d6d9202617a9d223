//! The hypervisor contract of vmkit.
//!
//! A [`Hypervisor`] makes [`Partition`]s, a partition holds memory mappings and [`Vcpu`]s, and a vCPU
//! runs until something needs the world outside: data accesses are callbacks ([`VcpuIo`]), control
//! exits are return values ([`VmExit`]). Both backends (KVM and software) implement these traits,
//! and neither a device nor the embedder can tell which one is underneath but by speed.
//!
//! The x86 state types ([`x86`]) are plain neutral data: a state taken from one backend continues on
//! the other.

mod backend;
#[cfg(feature = "conformance")]
pub mod conformance;
mod cpu_model;
mod error;
mod exit;
mod partition;
mod vcpu;
pub mod x86;

pub use backend::{
    Capabilities, DirtyLog, Hypervisor, InterruptControllers, PartitionSpec, TscSpec,
};
pub use cpu_model::{
    CpuModel, CpuidContext, CpuidEntry, CpuidRegister, CpuidResult, Feature, FeatureSet, Vendor,
};
pub use error::{FailedInstruction, HypervisorError, Result, Unavailable};
pub use exit::{VcpuIo, VmExit};
pub use partition::{MapAccess, MapId, Partition, PartitionState};
pub use vcpu::{Kick, Kickable, Vcpu};
pub use vmkit_device::{
    Clock, Doorbell, Doorbells, EventFd, InterruptSink, IoFlow, Msi, memory as guest_memory,
};
pub use vmkit_irqchip::{IoapicState, LapicState, PicState, PitState};
pub use x86::{StateSet, VcpuState};
