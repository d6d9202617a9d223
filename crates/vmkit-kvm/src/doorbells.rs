//! Doorbells by ioeventfd.

#![allow(unsafe_code, reason = "kvm-ioctls fixes the width by type; here it is a value")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use vmkit_hypervisor::{Doorbell, Doorbells, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::partition::Shared;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// The doorbells of a partition.
pub(crate) struct KvmDoorbells(pub(crate) Arc<Shared>);

impl KvmDoorbells {
    fn change(&self, at: Doorbell, fd: &EventFd, flags: u32) -> io::Result<()> {
        let (addr, width, value, space) = match at {
            Doorbell::Pio { port, width, value } => {
                (u64::from(port), width, value, 1 << kvm_ioeventfd_flag_nr_pio)
            }
            Doorbell::Mmio { address, width, value } => (address, width, value, 0),
        };
        if !matches!(width, 0 | 1 | 2 | 4 | 8) || width == 0 && value.is_some() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a doorbell of {width} bytes at {addr:#x}"),
            ));
        }
        let matching = if value.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 };
        let request = kvm_ioeventfd {
            datamatch: value.map_or(0, u64::from),
            addr,
            len: u32::from(width),
            fd: fd.as_raw_fd(),
            flags: flags | space | matching,
            ..kvm_ioeventfd::default()
        };
        // SAFETY: the kernel only reads `request`; it takes its own reference to the eventfd.
        if unsafe { ioctl_with_ref(&self.0.vm, KVM_IOEVENTFD(), &request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Doorbells for KvmDoorbells {
    fn add(&self, at: Doorbell, fd: &EventFd) -> io::Result<()> {
        self.change(at, fd, 0)
    }

    fn remove(&self, at: Doorbell, fd: &EventFd) -> io::Result<()> {
        self.change(at, fd, 1 << kvm_ioeventfd_flag_nr_deassign)
    }
}
