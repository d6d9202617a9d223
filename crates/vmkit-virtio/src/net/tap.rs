//! A tap interface of the host: one frame per read and write, perhaps after a header that says what is left to
//! do on it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;

use rustix::io::{Errno, ioctl_fionbio, readv, writev};
use vmkit_memory::{TapOffloads, open_tap, set_tap_offloads};

use super::offload::WIRE;
use super::{DriverOffloads, NetBackend, Offload};
use crate::{Event, Interest, Poller};

pub(super) struct TapBackend {
    tap: OwnedFd,
    /// Frames have headers.
    headers: bool,
}

impl TapBackend {
    /// The interface of that name, with headers.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        Ok(Self { tap: open_tap(name)?, headers: true })
    }

    /// An interface without headers.
    pub(super) fn plain(tap: OwnedFd) -> io::Result<Self> {
        ioctl_fionbio(&tap, true)?;
        Ok(Self { tap, headers: false })
    }
}

/// The MTU of the host's interface `name`, if it is not the usual one.
pub(super) fn unusual_mtu(name: &str) -> Option<u16> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/mtu")).ok()?;
    text.trim().parse().ok().filter(|mtu| *mtu != 1500)
}

impl NetBackend for TapBackend {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.tap, 0, Interest::READ | Interest::WRITE)
    }

    fn event(&mut self, _: Event) {}

    fn carries_offloads(&self) -> bool {
        self.headers
    }

    fn agreed(&mut self, takes: DriverOffloads) {
        let DriverOffloads { checksum, tcp4, tcp6 } = takes;
        if self.headers
            && let Err(error) = set_tap_offloads(&self.tap, TapOffloads { checksum, tcp4, tcp6 })
        {
            // The host then does all of it itself.
            log::debug!("a tap interface leaves nothing to do: {error}");
        }
    }

    fn send(&mut self, frame: &[u8], offload: &Offload) -> io::Result<()> {
        let header = offload.to_bytes(0);
        let both = [IoSlice::new(&header), IoSlice::new(frame)];
        let parts = both.get(usize::from(!self.headers)..).unwrap_or_default();
        loop {
            match writev(&self.tap, parts) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(()),
            }
        }
    }

    fn flush(&mut self) {}

    fn receive(&mut self, into: &mut [u8]) -> io::Result<(usize, Offload)> {
        loop {
            let mut header = [0; WIRE];
            let mut both = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut *into)];
            let parts = both.get_mut(usize::from(!self.headers)..).unwrap_or_default();
            let count = match readv(&self.tap, parts) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            if !self.headers {
                return Ok((count, Offload::default()));
            }
            // What nobody agreed to does not come; if it did, it would be dropped.
            if let (Some(len), Some(offload)) = (count.checked_sub(WIRE), Offload::parse(&header)) {
                return Ok((len, offload));
            }
        }
    }
}
