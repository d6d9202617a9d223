//! One virtual processor.

use std::sync::Arc;

use crate::{Result, StateSet, VcpuIo, VcpuState, VmExit};

/// How a backend's kick works.
pub trait Kickable: Send + Sync {
    /// Makes the vCPU's current or next run return [`VmExit::Kicked`].
    fn kick(&self);
}

/// A handle that ends a vCPU's run from any thread. Sticky: a kick that comes before the run makes
/// the next run return at once. One run consumes all kicks that came before it returned.
#[derive(Clone)]
pub struct Kick(Arc<dyn Kickable>);

impl std::fmt::Debug for Kick {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kick").finish_non_exhaustive()
    }
}

impl Kick {
    /// A kick that works through `target`.
    pub fn new(target: Arc<dyn Kickable>) -> Self {
        Self(target)
    }

    /// Kicks.
    pub fn kick(&self) {
        self.0.kick();
    }
}

/// One virtual processor. It runs on whichever thread calls [`run`](Self::run).
pub trait Vcpu: Send {
    /// Runs the guest until a control exit. When it returns, no instruction is half done and
    /// [`get`](Self::get) is exact. HLT waits inside.
    ///
    /// # Errors
    /// [`HypervisorError::Unimplemented`](crate::HypervisorError::Unimplemented) or
    /// [`HypervisorError::Failed`](crate::HypervisorError::Failed), with address and bytes.
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<VmExit>;
    /// A handle to end runs with.
    fn kick(&self) -> Kick;
    /// Reads the parts of the state named by `what` into `out`; the rest of `out` is left alone.
    ///
    /// # Errors
    /// What the host said.
    fn get(&mut self, what: StateSet, out: &mut VcpuState) -> Result<()>;
    /// Sets the parts named by `what`. All of them are checked before any is changed where the
    /// backend can.
    ///
    /// # Errors
    /// [`HypervisorError::State`](crate::HypervisorError::State) for a state the processor cannot be
    /// in.
    fn set(&mut self, what: StateSet, from: &VcpuState) -> Result<()>;
    /// To be called between two runs, when a pause of the machine ends. Where the guest's clocks went
    /// on meanwhile, as KVM's do, a guest that uses kvmclock learns that it had been stopped, so that
    /// its watchdogs do not take the time for their own. Nothing to do where guest time stood still.
    ///
    /// # Errors
    /// What the host said.
    fn after_pause(&mut self) -> Result<()>;
    /// Guest instructions executed so far, where the backend counts them.
    fn instructions(&self) -> Option<u64>;
}
