//! A machine that stands still: the only road to its state.

use vmkit_device::Saved;
use vmkit_hypervisor::{PartitionState, StateSet, VcpuState};
use vmkit_memory::{DirtyBitmap, GuestAddress, GuestMemoryRegion, GuestRam, MmapRegion};

use crate::VmError;
use crate::machine::Machine;
use crate::vcpu_thread::Slot;

/// A guard that keeps a machine paused. Dropping it lets the machine go on, as
/// [`resume`](Self::resume) does.
#[must_use = "the machine goes on when the guard is dropped"]
pub struct Paused<'a> {
    machine: &'a Machine,
    resumed: bool,
}

impl std::fmt::Debug for Paused<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paused").finish_non_exhaustive()
    }
}

impl<'a> Paused<'a> {
    pub(crate) fn new(machine: &'a Machine) -> Self {
        machine.pause();
        Self { machine, resumed: false }
    }

    /// Lets the machine go on.
    ///
    /// # Errors
    /// [`VmError::Restart`] if a device cannot restart, which ends the machine:
    /// [`RunningVm::wait`](crate::RunningVm::wait) says the same.
    pub fn resume(mut self) -> Result<(), VmError> {
        self.resumed = true;
        self.machine.resume()
    }

    fn slot(&self, vcpu: u32) -> Result<&'a Slot, VmError> {
        self.machine.slots.get(vcpu as usize).ok_or(VmError::NoSuchVcpu(vcpu))
    }

    /// The whole state of a vCPU.
    ///
    /// # Errors
    /// [`VmError::NoSuchVcpu`], or [`VmError::Backend`] with what the host said.
    pub fn vcpu_state(&self, vcpu: u32) -> Result<VcpuState, VmError> {
        let mut state = VcpuState::default();
        self.slot(vcpu)?.lock().get(StateSet::all(), &mut state)?;
        Ok(state)
    }

    /// Sets the parts `what` of a vCPU's state.
    ///
    /// # Errors
    /// [`VmError::NoSuchVcpu`], or [`VmError::Backend`] for a state the processor cannot be in.
    pub fn set_vcpu_state(
        &self,
        vcpu: u32,
        what: StateSet,
        state: &VcpuState,
    ) -> Result<(), VmError> {
        Ok(self.slot(vcpu)?.lock().set(what, state)?)
    }

    /// The interrupt controllers' state, the timers' and the clock's.
    ///
    /// # Errors
    /// [`VmError::Backend`] with what the host said.
    pub fn partition_state(&self) -> Result<PartitionState, VmError> {
        Ok(self.machine.partition.save()?)
    }

    /// What each device has to say of its state, by device name, in the order of their making.
    pub fn device_sections(&self) -> Vec<(String, Saved)> {
        self.machine.devices.iter().map(|d| (d.name().to_owned(), d.save())).collect()
    }

    /// The pages that the guest and its devices wrote since the last call, or since the machine was
    /// built: a bitmap for each region that can be written, with where it begins, in the order of their
    /// addresses. Empty if the machine was not built with
    /// [`VmBuilder::dirty_log`](crate::VmBuilder::dirty_log).
    ///
    /// # Errors
    /// [`VmError::Backend`] with what the host said; pages taken until then are lost.
    pub fn take_dirty(&self) -> Result<Vec<(GuestAddress, DirtyBitmap)>, VmError> {
        let mut all = Vec::new();
        for tracked in &self.machine.tracked {
            let mut pages = DirtyBitmap::for_bytes(tracked.region.len());
            self.machine.partition.take_dirty(tracked.map, &mut pages)?;
            // Devices', and the loader's.
            MmapRegion::bitmap(&tracked.region).take_dirty(&mut pages);
            all.push((tracked.region.start_addr(), pages));
        }
        Ok(all)
    }

    /// Guest memory, which nothing writes while the guard lives.
    pub fn memory(&self) -> &GuestRam {
        &self.machine.memory
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if !self.resumed
            && let Err(error) = self.machine.resume()
        {
            // Whoever waits for the machine is told so too.
            log::error!("{error}");
        }
    }
}
