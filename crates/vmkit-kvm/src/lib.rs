//! The KVM backend of vmkit: ioctls, and conversions between KVM's structures and the neutral state
//! of vmkit-hypervisor. Nothing else: no devices, no threads, no guest image.
//!
//! [`KvmHypervisor`] makes partitions whose memory slots own the regions they show, whose interrupt
//! controllers live in the kernel (or, split, in this process), and whose vCPUs run on whichever
//! thread calls `run`. An exit costs one ioctl and a call through [`VcpuIo`]; it allocates nothing
//! and takes no lock.
//!
//! The one effect on the process is a signal handler that does nothing, for the one signal that ends
//! a run: see [`KickSignal`].
//!
//! A `/dev/kvm` that opens is no promise: [`probe`] runs a small guest to learn whether this one can
//! run 64-bit kernels, [`can_run_simple_guests`] whether it can run anything.
//!
//! [`VcpuIo`]: vmkit_hypervisor::VcpuIo

mod convert;
mod cpuid;
mod doorbells;
mod error;
mod hypervisor;
mod interrupts;
mod kick;
mod memory;
mod partition;
mod probe;
mod ring;
mod routing;
mod split;
mod vcpu;

pub use cpuid::{best_available, host_model};
pub use hypervisor::KvmHypervisor;
pub use kick::KickSignal;
pub use probe::{ProbeFailure, ProbeStep, can_run_simple_guests, probe};
