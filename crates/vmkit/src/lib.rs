//! Virtual machines from Rust code.
//!
//! [`Vm::builder`] describes a machine; [`Vm::run`] runs it to its end, and [`Vm::start`] hands out
//! a [`RunningVm`] that can be paused, looked into and stopped. The guest runs on KVM where KVM can
//! run it and on a software x86-64 processor everywhere else, with the same devices and the same
//! API.
//!
//! ```no_run
//! use vmkit::boot::Linux;
//! use vmkit::{End, Serial, Vm};
//!
//! let vm = Vm::builder()
//!     .memory(512 << 20)
//!     .boot(Linux::bzimage("vmlinuz")?.initrd("initrd.img")?.cmdline("console=ttyS0"))
//!     .device(Serial::stdio())
//!     .build()?;
//! match vm.run()? {
//!     End::PoweredOff => println!("done"),
//!     other => println!("the machine ended: {other}"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A machine is a value: a process may have many of them, and dropping one frees its memory, threads
//! and descriptors. Nothing it does is process-wide but for KVM's one signal
//! ([`KickSignal`](kvm::KickSignal)), which gets a handler that does nothing unless it has one, and which
//! can be [chosen](VmBuilder::backend). What the guest did to end itself is an [`End`]; what went wrong on the host's side
//! is a [`VmError`].
//!
//! This crate has no devices, no loaders and no processor of its own: it puts those of the crates
//! below together, and it has no unsafe code.

mod backend;
mod builder;
mod chipset;
mod control;
mod end;
mod error;
mod io;
mod machine;
mod paused;
mod placement;
mod timeline;
mod vcpu_thread;
mod vm;

pub use backend::{Backend, BackendKind, BackendReport, Readiness, preflight};
pub use builder::VmBuilder;
pub use chipset::Chipset;
pub use end::End;
pub use error::VmError;
pub use io::VcpuStats;
pub use paused::Paused;
pub use timeline::Timeline;
pub use vm::{RunningVm, Vm, VmHandle};

pub use vmkit_boot::Boot;
pub use vmkit_chipset::{Capture, DebugExit, OutputProbe, Serial, SerialInput, SerialOutput};
pub use vmkit_guest::Guest;
pub use vmkit_hypervisor::{CpuModel, DirtyLog, InterruptControllers, StateSet, VcpuState};
pub use vmkit_kvm::{ProbeFailure, ProbeStep};

pub use {
    vmkit_boot as boot, vmkit_chipset as devices, vmkit_device as device, vmkit_guest as guest,
    vmkit_hypervisor as hypervisor, vmkit_kvm as kvm, vmkit_memory as memory, vmkit_pci as pci,
    vmkit_soft as soft, vmkit_virtio as virtio,
};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
