//! Notifications that reach a worker without leaving the kernel.

use std::sync::Arc;

use vmkit_device::{Doorbell, Doorbells};

use crate::Wake;
use crate::transport::common::Core;

/// The doorbells of one device, taken down when dropped.
pub(crate) struct Bells {
    bells: Arc<dyn Doorbells>,
    hung: Vec<(Doorbell, Wake)>,
}

impl Bells {
    /// One bell per queue, where `place` says. A bell the host refuses is done without: the write
    /// then comes to the transport.
    pub(crate) fn add(
        bells: Arc<dyn Doorbells>,
        core: &Core,
        place: impl Fn(u16) -> Doorbell,
    ) -> Self {
        let mut hung = Vec::new();
        for (queue, kick) in (0..).zip(core.kicks()) {
            let at = place(queue);
            match bells.add(at, kick.fd()) {
                Ok(()) => hung.push((at, kick.clone())),
                Err(error) => log::debug!("{}: no doorbell {at:?}: {error}", core.name()),
            }
        }
        Self { bells, hung }
    }
}

impl Drop for Bells {
    fn drop(&mut self) {
        for (at, kick) in &self.hung {
            // The machine may be gone already, and its doorbells with it.
            let _ = self.bells.remove(*at, kick.fd());
        }
    }
}
