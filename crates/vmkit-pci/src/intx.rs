//! A function's interrupt pin (PCI 3.0 §2.2.6): level-triggered, shared, and the way of functions
//! whose driver does not use MSI-X.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmkit_device::IrqLine;

/// The pin of one function.
#[derive(Debug)]
pub struct Intx {
    line: IrqLine,
    state: Mutex<Pin>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Pin {
    asserted: bool,
    disabled: bool,
}

impl Intx {
    pub(crate) fn new(line: IrqLine) -> Self {
        Self { line, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Pin> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asserts or deasserts the pin. It stays inside while the command register disables it.
    pub fn set(&self, asserted: bool) {
        let mut pin = self.lock();
        pin.asserted = asserted;
        self.line.set(pin.asserted && !pin.disabled);
    }

    pub(crate) fn disable(&self, disabled: bool) {
        let mut pin = self.lock();
        pin.disabled = disabled;
        self.line.set(pin.asserted && !pin.disabled);
    }

    pub(crate) fn asserted(&self) -> bool {
        self.lock().asserted
    }

    /// Takes on saved state without an edge.
    pub(crate) fn restore(&self, asserted: bool, disabled: bool) {
        let mut pin = self.lock();
        *pin = Pin { asserted, disabled };
        self.line.restore(asserted && !disabled);
    }
}
