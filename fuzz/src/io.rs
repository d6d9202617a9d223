//! Answers to a guest's accesses, out of an input.

use vmkit_hypervisor::{IoFlow, VcpuIo};

/// Answers reads with an input's bytes over and over, and stops the run after so many accesses.
pub struct Answers<'a> {
    bytes: std::iter::Cycle<std::slice::Iter<'a, u8>>,
    left: u32,
}

impl<'a> Answers<'a> {
    /// Answers with `bytes` (or ones, if there are none) and stops at the `limit`th access.
    pub fn new(bytes: &'a [u8], limit: u32) -> Self {
        Self { bytes: bytes.iter().cycle(), left: limit }
    }

    fn answer(&mut self, data: &mut [u8]) -> IoFlow {
        for byte in data {
            *byte = self.bytes.next().copied().unwrap_or(0xFF);
        }
        self.count()
    }

    fn count(&mut self) -> IoFlow {
        self.left = self.left.saturating_sub(1);
        if self.left == 0 { IoFlow::Stop } else { IoFlow::Continue }
    }
}

impl VcpuIo for Answers<'_> {
    fn pio_read(&mut self, _: u16, data: &mut [u8]) -> IoFlow {
        self.answer(data)
    }
    fn pio_write(&mut self, _: u16, _: &[u8]) -> IoFlow {
        self.count()
    }
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoFlow {
        self.answer(data)
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoFlow {
        self.count()
    }
}
