//! Split interrupt controllers: the local APICs are KVM's, the rest of a PC's board is here.
//!
//! vmkit-irqchip's [`Board`] answers the guest's accesses inside `run`, on the thread of the vCPU that
//! makes them. What the IOAPIC sends goes to KVM as messages; the EOIs that it waits for come back as
//! exits, which KVM makes for those vectors only that [`Routes`] names. The 8259 pair's INTR wire leads
//! to vCPU 0, whose run loop takes what is on it. The 8254 counts by the partition's clock; a thread
//! wakes up for its interrupts, and only while a vCPU is inside `run`.
//!
//! Locks are taken in this order: the board, then the routes or a vCPU's kick.

mod chips;
mod message;
mod worker;

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmkit_device::Clock;
use vmkit_hypervisor::{EventFd, HypervisorError, PartitionState, Result};
use vmkit_irqchip::Board;

use self::chips::{Chips, State};
use self::worker::Worker;
use crate::interrupts::GSIS;
use crate::kick::KickTarget;
use crate::routing::Routes;

pub(crate) use self::message::kvm_messages;

/// The board of a partition, and its thread if it needed one. Dropped, it ends the thread and waits
/// for it.
pub(crate) struct Split(Arc<Chips>);

/// A vCPU inside `run`.
pub(crate) struct InGuest(Arc<Chips>);

impl Drop for InGuest {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Split {
    /// A board after reset, for a VM whose local APICs are in the kernel.
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        clock: &Arc<dyn Clock>,
    ) -> Result<Self> {
        let chips = Chips::new(vm.clone(), routes.clone(), clock.clone())
            .map_err(|source| HypervisorError::Host { what: "make the PIT's timer", source })?;
        Ok(Self(Arc::new(chips)))
    }

    /// Wires the 8259 pair's output to a vCPU. The first call counts.
    pub(crate) fn wire_intr(&self, to: &Arc<KickTarget>) {
        self.0.wire_intr(to.clone());
    }

    /// A vCPU enters `run`, and leaves it when the guard is dropped.
    pub(crate) fn enter(&self) -> InGuest {
        let mut state = self.0.lock();
        self.0.enter(&mut state);
        self.start_if_needed(&mut state);
        InGuest(self.0.clone())
    }

    /// Answers a port access of the guest; false if it is another's. As on the software backend,
    /// accesses of more than a byte are.
    pub(crate) fn port_access(&self, port: u16, write: bool, data: &mut [u8]) -> bool {
        let [byte] = data else { return false };
        if !Board::has_port(port) {
            return false;
        }
        let now = self.0.now();
        if write {
            let value = *byte;
            let mut state = self.0.lock();
            self.0.work_on(&mut state, |board, _| board.write_port(port, value, now));
            self.start_if_needed(&mut state);
        } else {
            // Reading can change the 8259 pair: it polls.
            *byte = self.0.work(|board, _| board.read_port(port, now));
        }
        true
    }

    /// Answers an access of the guest to the IOAPIC; false if it is another's.
    pub(crate) fn mmio_access(&self, address: u64, write: bool, data: &mut [u8]) -> bool {
        let Some(offset) = Board::ioapic_offset(address) else { return false };
        if write {
            let mut state = self.0.lock();
            self.0.redirect(&mut state, |board| board.ioapic.write(offset, data, &mut |_| false));
            self.0.work_on(&mut state, |board, sink| board.ioapic.resample(sink));
        } else {
            self.0.lock().board.ioapic.read(offset, data);
        }
        true
    }

    /// A local APIC has ended the service of `vector`.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        self.0.work(|board, sink| board.ioapic.eoi(vector, sink));
    }

    /// Drives an input.
    pub(crate) fn set_level(&self, gsi: u32, high: bool) {
        self.0.work(|board, sink| board.set_level(gsi, high, sink));
    }

    /// The 8259 pair's output.
    pub(crate) fn intr(&self) -> bool {
        self.0.intr()
    }

    /// The 8259 pair's acknowledge cycle: the vector, if there is an interrupt.
    pub(crate) fn acknowledge(&self) -> Option<u8> {
        self.0.work(|board, _| board.pic.output().then(|| board.pic.acknowledge()))
    }

    /// Has writes to `fd` pulse input `gsi`.
    pub(crate) fn attach_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        if gsi >= GSIS {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let fd = fd.try_clone()?;
        let mut state = self.0.lock();
        self.start(&mut state)?;
        self.0.inputs.watch(&fd, gsi)?;
        state.irqfds.push(fd);
        Ok(())
    }

    /// Whether a pin waits for an EOI.
    pub(crate) fn awaits_eoi(&self) -> bool {
        self.0.lock().board.ioapic.awaits_any_eoi()
    }

    /// What was written to irqfds has arrived when this returns. State is about to be taken: of the
    /// board, or of a local APIC.
    pub(crate) fn drain_irqfds(&self) {
        self.0.drain_irqfds(&mut self.0.lock());
    }

    /// Saves the board.
    pub(crate) fn save(&self, into: &mut PartitionState) {
        let now = self.0.now();
        let mut state = self.0.lock();
        self.0.drain_irqfds(&mut state);
        into.pic = state.board.pic.save();
        into.ioapic = state.board.ioapic.save();
        into.pit = state.board.pit.save(now);
    }

    /// Takes over a saved board.
    pub(crate) fn load(&self, from: &PartitionState) -> Result<()> {
        let now = self.0.now();
        let mut state = self.0.lock();
        self.0
            .redirect(&mut state, |board| board.load(&from.pic, &from.ioapic, &from.pit, now))
            .map_err(|error| HypervisorError::state(error.to_string()))?;
        state.resample = true;
        self.start_if_needed(&mut state);
        Ok(())
    }

    /// Starts the thread if the 8254 is to interrupt.
    fn start_if_needed(&self, state: &mut State) {
        if state.board.pit.next_deadline().is_some()
            && let Err(error) = self.start(state)
        {
            log::error!("the PIT does not interrupt, there is no thread for it: {error}");
        }
    }

    fn start(&self, state: &mut State) -> io::Result<()> {
        if state.worker.is_none() {
            state.worker = Some(Worker::start(self.0.clone())?);
        }
        Ok(())
    }
}

impl Drop for Split {
    fn drop(&mut self) {
        let worker = self.0.lock().worker.take();
        if let Some(worker) = worker {
            worker.stop(&self.0.inputs);
        }
    }
}
