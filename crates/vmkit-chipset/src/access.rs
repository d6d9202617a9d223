//! What every device of an 8-bit bus needs: accesses cut into bytes, and locks that outlive a
//! panicking holder.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Answers a read of any width as a 16-bit PC does for an 8-bit device: one register per byte, in
/// ascending order.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut register: impl FnMut(u64) -> u8) {
    for (byte, index) in data.iter_mut().zip(0..) {
        *byte = register(offset.saturating_add(index));
    }
}

/// The write side of [`read_bytes`].
pub(crate) fn write_bytes(offset: u64, data: &[u8], mut register: impl FnMut(u64, u8)) {
    for (&byte, index) in data.iter().zip(0..) {
        register(offset.saturating_add(index), byte);
    }
}

/// Locks `mutex`. A holder that panicked (an embedder's callback) does not take the device along:
/// each device keeps its registers valid at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers a read from a little-endian register of `bytes`. What lies beyond reads as ones.
pub(crate) fn read_register(bytes: &[u8], offset: u64, data: &mut [u8]) {
    read_bytes(offset, data, |at| {
        usize::try_from(at).ok().and_then(|at| bytes.get(at)).copied().unwrap_or(0xFF)
    });
}
