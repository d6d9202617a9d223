//! What a PCI function is.

use std::sync::Arc;

use vmkit_device::memory::FileMemory;
use vmkit_device::{DeviceError, Resources, Saved, Section};

use crate::{Description, Intx, Msix};

/// What a function lives on.
#[derive(Debug)]
pub struct FunctionResources {
    /// Memory, the places of its own, clock, interrupt sink, doorbells and the way to end the machine; no
    /// regions and no wires.
    pub common: Resources,
    /// Its interrupt pin.
    pub intx: Arc<Intx>,
    /// Its vectors, if it described any.
    pub msix: Option<Arc<Msix>>,
}

/// A function before it lives.
pub trait PciFunctionBuilder: Send {
    /// Its name, unique on the bus.
    fn name(&self) -> String;
    /// What it is like.
    fn describe(&self) -> Description;
    /// Files that the guest is to see as memory, as those of
    /// [`DeviceBuilder::memory`](vmkit_device::DeviceBuilder::memory).
    fn memory(&self) -> Vec<Arc<FileMemory>> {
        Vec::new()
    }
    /// Brings it to life.
    ///
    /// # Errors
    /// [`DeviceError`] if its configuration is bad or the host refuses it something.
    fn build(
        self: Box<Self>,
        resources: FunctionResources,
    ) -> Result<Arc<dyn PciFunction>, DeviceError>;
}

/// A living function. Its life is that of a [`Device`](vmkit_device::Device).
pub trait PciFunction: Send + Sync {
    /// Its name.
    fn name(&self) -> &str;
    /// Reads at `offset` of BAR `bar`; the access lies inside of it. MSI-X is already taken care of.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);
    /// Writes at `offset` of BAR `bar`; the access lies inside of it.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);
    /// BAR `bar` is now at this guest-physical address, or is not answered. Called only on changes.
    fn bar_moved(&self, bar: usize, address: Option<u64>);
    /// Starts or restarts work in the background.
    ///
    /// # Errors
    /// [`DeviceError::Host`] if a thread or descriptor cannot be had.
    fn start(&self) -> Result<(), DeviceError>;
    /// Ends work in the background.
    fn pause(&self);
    /// Back to the state of power-on.
    fn reset(&self);
    /// Its state, apart from configuration space, vectors and pin.
    fn save(&self) -> Saved;
    /// Takes on saved state.
    ///
    /// # Errors
    /// [`DeviceError::State`] if a section does not fit; the function is then as it was.
    fn load(&self, sections: &[Section]) -> Result<(), DeviceError>;
}
