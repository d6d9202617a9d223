//! Interrupts as a device sees them: a wire to pull, a vector to fire.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt: the memory write a device would make (Intel SDM vol. 3A §11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// Address: `0xFEEx_xxxx`, with the destination in bits 19:12.
    pub address: u64,
    /// Data: vector in bits 7:0, delivery mode in bits 10:8.
    pub data: u32,
}

/// Where interrupts go: a partition's interrupt controllers. Callable from any thread.
pub trait InterruptSink: Send + Sync {
    /// Drives the input `gsi` of the PIC (0..16) and IOAPIC (0..24) high or low.
    fn set_level(&self, gsi: u32, high: bool);
    /// Delivers one message-signalled interrupt.
    fn signal_msi(&self, msi: Msi);
    /// Has writes to `fd` pulse `gsi` without leaving the kernel, if the backend can.
    ///
    /// # Errors
    /// `Unsupported` where the backend has no such thing: the caller then pulls the wire itself.
    fn attach_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()>;
    /// Has writes to `fd` send a message without leaving the kernel, if the backend can, until the
    /// route is dropped. It has no message at first.
    ///
    /// # Errors
    /// `Unsupported` where the backend has no such thing, which is the default: the caller then
    /// signals the message itself.
    fn route_msi(&self, fd: &EventFd) -> io::Result<Box<dyn MsiRoute>> {
        let _ = fd;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A message that an eventfd sends.
pub trait MsiRoute: Send + Sync {
    /// Sets or clears the message.
    ///
    /// # Errors
    /// What the kernel said; the message is then as it was.
    fn program(&self, message: Option<Msi>) -> io::Result<()>;
}

/// A doorbell's place: a write of any value there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Doorbell {
    /// A port.
    Pio {
        /// The port.
        port: u16,
        /// Access width in bytes; 0 for any.
        width: u8,
        /// The value that rings it, or any.
        value: Option<u32>,
    },
    /// A guest-physical address.
    Mmio {
        /// The address.
        address: u64,
        /// Access width in bytes; 0 for any.
        width: u8,
        /// The value that rings it, or any.
        value: Option<u32>,
    },
}

/// Doorbells that wake a host thread without leaving the kernel (ioeventfd).
pub trait Doorbells: Send + Sync {
    /// Rings `fd` on each matching write until [`remove`](Self::remove).
    ///
    /// # Errors
    /// What the kernel said.
    fn add(&self, at: Doorbell, fd: &EventFd) -> io::Result<()>;
    /// Undoes [`add`](Self::add).
    ///
    /// # Errors
    /// What the kernel said.
    fn remove(&self, at: Doorbell, fd: &EventFd) -> io::Result<()>;
}

/// One input of the interrupt controllers, shared by any number of [`IrqLine`]s: it is high while at
/// least one of them is.
#[derive(Clone)]
pub struct IrqWire {
    inner: Arc<Wire>,
}

impl std::fmt::Debug for IrqWire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IrqWire").field("gsi", &self.gsi()).finish_non_exhaustive()
    }
}

struct Wire {
    sink: Arc<dyn InterruptSink>,
    gsi: u32,
    high: Mutex<u32>,
}

impl IrqWire {
    /// The wire to input `gsi` of `sink`. Make one per input and share it.
    pub fn new(sink: Arc<dyn InterruptSink>, gsi: u32) -> Self {
        Self { inner: Arc::new(Wire { sink, gsi, high: Mutex::new(0) }) }
    }

    /// A new line on this wire, low.
    pub fn line(&self) -> IrqLine {
        IrqLine { wire: self.inner.clone(), high: AtomicBool::new(false) }
    }

    /// The input's number, for firmware tables.
    pub fn gsi(&self) -> u32 {
        self.inner.gsi
    }
}

/// A device's end of an interrupt wire. Low at first; dropped, it goes low.
pub struct IrqLine {
    wire: Arc<Wire>,
    high: AtomicBool,
}

impl std::fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IrqLine")
            .field("gsi", &self.wire.gsi)
            .field("high", &self.high)
            .finish_non_exhaustive()
    }
}

impl IrqLine {
    /// Drives the line. Driving it as it is already does nothing.
    pub fn set(&self, high: bool) {
        let mut count = self.wire.high.lock().unwrap_or_else(PoisonError::into_inner);
        if self.high.swap(high, Ordering::AcqRel) == high {
            return;
        }
        let before = *count;
        *count = if high { before + 1 } else { before.saturating_sub(1) };
        if (before == 0) != (*count == 0) {
            self.wire.sink.set_level(self.wire.gsi, high);
        }
    }

    /// High and low again: an edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The level this line drives.
    pub fn level(&self) -> bool {
        self.high.load(Ordering::Acquire)
    }

    /// Takes on a level from saved state: the controller's own saved state already knows it, so no
    /// edge is made.
    pub fn restore(&self, high: bool) {
        let mut count = self.wire.high.lock().unwrap_or_else(PoisonError::into_inner);
        if self.high.swap(high, Ordering::AcqRel) != high {
            *count = if high { *count + 1 } else { count.saturating_sub(1) };
        }
    }

    /// The input's number, for firmware tables and irqfd.
    pub fn gsi(&self) -> u32 {
        self.wire.gsi
    }

    /// Has writes to `fd` pulse this input without leaving the kernel, if the backend can.
    ///
    /// # Errors
    /// `Unsupported` where the backend cannot.
    pub fn attach_irqfd(&self, fd: &EventFd) -> io::Result<()> {
        self.wire.sink.attach_irqfd(fd, self.wire.gsi)
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// A message-signalled vector: fires whatever message the guest last programmed.
#[derive(Clone)]
pub struct MsiVector {
    sink: Arc<dyn InterruptSink>,
    message: Arc<Mutex<Option<Msi>>>,
}

impl std::fmt::Debug for MsiVector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MsiVector").field("message", &self.message).finish_non_exhaustive()
    }
}

impl MsiVector {
    /// A vector with no message: firing it does nothing.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Self { sink, message: Arc::default() }
    }

    /// Sets or clears the message.
    pub fn program(&self, message: Option<Msi>) {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = message;
    }

    /// Sends the message, if one is programmed.
    pub fn fire(&self) {
        let message = *self.message.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(message) = message {
            self.sink.signal_msi(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u32, bool)>>);
    impl InterruptSink for Log {
        fn set_level(&self, gsi: u32, high: bool) {
            self.0.lock().unwrap().push((gsi, high));
        }
        fn signal_msi(&self, _: Msi) {}
        fn attach_irqfd(&self, _: &EventFd, _: u32) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn a_shared_wire_is_high_while_any_line_is() {
        let log = Arc::new(Log::default());
        let wire = IrqWire::new(log.clone(), 5);
        let (a, b) = (wire.line(), wire.line());
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(*log.0.lock().unwrap(), [(5, true)]);
        drop(b);
        assert_eq!(*log.0.lock().unwrap(), [(5, true), (5, false)]);
    }

    #[test]
    fn restoring_a_level_makes_no_edge() {
        let log = Arc::new(Log::default());
        let line = IrqWire::new(log.clone(), 4).line();
        line.restore(true);
        line.set(true);
        assert!(log.0.lock().unwrap().is_empty());
        line.set(false);
        assert_eq!(*log.0.lock().unwrap(), [(4, false)]);
    }
}
