//! A built machine, and one that runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmkit_chipset::PowerButton;
use vmkit_guest::Guest;
use vmkit_hypervisor::{Capabilities, CpuModel};
use vmkit_memory::{GuestRam, RamLayout};

use crate::control::Control;
use crate::io::VcpuStats;
use crate::machine::Machine;
use crate::{End, Paused, Timeline, VmBuilder, VmError};

/// A virtual machine that has been built and not started.
///
/// A process may have any number of machines, and dropping one frees its memory, threads and
/// descriptors.
pub struct Vm {
    machine: Arc<Machine>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        describe(&self.machine, "Vm", f)
    }
}

fn describe(machine: &Machine, what: &str, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    f.debug_struct(what)
        .field("backend", &machine.capabilities.name)
        .field("vcpus", &machine.slots.len())
        .field("memory", &machine.layout.bytes())
        .finish_non_exhaustive()
}

impl Vm {
    /// Describes a new machine.
    pub fn builder() -> VmBuilder {
        VmBuilder::new()
    }

    pub(crate) fn new(machine: Machine) -> Self {
        Self { machine: Arc::new(machine) }
    }

    /// Runs the machine until it ends. To pause, kick or stop it meanwhile, take a
    /// [`handle`](Self::handle) before, or [`start`](Self::start) it instead.
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`RunningVm::wait`].
    pub fn run(self) -> Result<End, VmError> {
        self.start()?.wait()
    }

    /// Starts the machine: one thread per vCPU, named `vcpu0` and so on, and those of the devices.
    ///
    /// # Errors
    /// [`VmError::Device`] if a device cannot start, [`VmError::Thread`] if the host refuses a
    /// thread. Nothing runs then.
    pub fn start(self) -> Result<RunningVm, VmError> {
        self.machine.start()?;
        Ok(RunningVm { machine: self.machine })
    }

    /// A handle that ends or kicks the machine from any thread.
    pub fn handle(&self) -> VmHandle {
        VmHandle::new(&self.machine)
    }

    /// Guest memory, RAM and what devices brought. The clone shares the machine's memory and outlives the machine.
    pub fn memory(&self) -> GuestRam {
        self.machine.memory.clone()
    }

    /// Where guest memory lies.
    pub fn layout(&self) -> &RamLayout {
        &self.machine.layout
    }

    /// What the backend that was chosen offers; its name among it.
    pub fn capabilities(&self) -> &Capabilities {
        &self.machine.capabilities
    }

    /// The CPU model the guest sees.
    pub fn cpu_model(&self) -> &CpuModel {
        &self.machine.model
    }

    /// When the machine was built.
    pub fn timeline(&self) -> Timeline {
        self.machine.timeline.read()
    }
}

/// A machine that has been started. Dropping it stops it and waits for its threads.
///
/// A host that does not read what the guest writes to a console may hold up the guest, but holds up a
/// pause, the end and the drop no longer than the console's output says
/// ([`SerialOutput::writer`](crate::SerialOutput::writer)).
///
/// All methods take `&self`: share it between threads by reference or in an [`Arc`]. None of them
/// may be called from a device's callback, which runs on a vCPU's thread and would wait for itself;
/// a [`VmHandle`] may be used there.
pub struct RunningVm {
    machine: Arc<Machine>,
}

impl std::fmt::Debug for RunningVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        describe(&self.machine, "RunningVm", f)
    }
}

impl RunningVm {
    /// Waits until the machine ends and says why. When this returns, no vCPU or device thread runs,
    /// but for one that is inside the writer of a console whose reader does not read. Later calls
    /// answer the same at once.
    ///
    /// # Errors
    /// [`VmError::Vcpu`] if the backend failed, [`VmError::VcpuPanicked`] if a device or vmkit did,
    /// [`VmError::Restart`] if a device could not restart after a pause.
    pub fn wait(&self) -> Result<End, VmError> {
        self.machine.settle();
        self.machine.control.wait_end(None).unwrap_or(Ok(End::Stopped))
    }

    /// Like [`wait`](Self::wait), for at most `timeout`: none if the machine still runs then.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<End>, VmError> {
        match self.machine.wait_end(Instant::now().checked_add(timeout)) {
            None => Ok(None),
            Some(outcome) => {
                self.machine.settle();
                outcome.map(Some)
            }
        }
    }

    /// Stops the machine between two guest instructions and waits for its threads. Answers
    /// [`End::Stopped`], or how the machine had ended before.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn stop(&self) -> Result<End, VmError> {
        self.machine.control.finish(Ok(End::Stopped));
        self.wait()
    }

    /// Brings the machine to a stand between two guest instructions: vCPUs, devices and their clock. It
    /// goes on when the guard is resumed or dropped. Pauses may overlap; the last one to end counts.
    /// A machine that has ended can be paused, to look at its state.
    ///
    /// On the software processor all of guest time stands still. On KVM the clocks that the kernel keeps
    /// run on: TSC, kvmclock, the local APICs' timers, and the PIT where it is in the kernel. A guest that
    /// uses kvmclock, as Linux does, is told that it had been stopped, and its watchdogs heed that.
    pub fn pause(&self) -> Paused<'_> {
        Paused::new(&self.machine)
    }

    /// Makes every vCPU come out of the guest once, which brings [`vcpu_stats`](Self::vcpu_stats)
    /// up to date.
    pub fn kick(&self) {
        self.machine.control.kick_all();
    }

    /// How the machine ended, if it has.
    pub fn ended(&self) -> Option<Result<End, VmError>> {
        self.machine.control.outcome().map(|outcome| outcome.map_err(VmError::from))
    }

    /// A handle that ends or kicks the machine from any thread.
    pub fn handle(&self) -> VmHandle {
        VmHandle::new(&self.machine)
    }

    /// Commands and files of the guest, through the agent that
    /// [`VmBuilder::guest_agent`] made the machine listen for. This does not wait: the first thing
    /// that is asked of the guest waits until its agent has dialled in.
    pub fn guest(&self) -> Guest {
        self.machine.agent.clone()
    }

    /// Guest memory. The guest may be writing to it.
    pub fn memory(&self) -> GuestRam {
        self.machine.memory.clone()
    }

    /// Where guest memory lies.
    pub fn layout(&self) -> &RamLayout {
        &self.machine.layout
    }

    /// What the backend that was chosen offers; its name among it.
    pub fn capabilities(&self) -> &Capabilities {
        &self.machine.capabilities
    }

    /// The CPU model the guest sees.
    pub fn cpu_model(&self) -> &CpuModel {
        &self.machine.model
    }

    /// Instructions that all vCPUs executed, where the backend counts them; as of each vCPU's last
    /// exit.
    pub fn instructions(&self) -> Option<u64> {
        self.machine.instructions()
    }

    /// What each vCPU did so far.
    pub fn vcpu_stats(&self) -> Vec<VcpuStats> {
        self.machine.stats()
    }

    /// When things happened.
    pub fn timeline(&self) -> Timeline {
        self.machine.timeline.read()
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        self.machine.control.finish(Ok(End::Stopped));
        self.machine.settle();
    }
}

/// A handle on a machine that can be cloned, sent to any thread, and kept past the machine's end.
#[derive(Clone)]
pub struct VmHandle {
    control: Arc<Control>,
    power_button: Option<PowerButton>,
}

impl std::fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmHandle").field("ended", &self.has_ended()).finish_non_exhaustive()
    }
}

impl VmHandle {
    fn new(machine: &Machine) -> Self {
        Self { control: machine.control.clone(), power_button: machine.power_button.clone() }
    }

    /// Presses the power button of the machine's own chipset: the guest is asked to shut down. True
    /// if it listens; a press that comes too early is kept.
    pub fn press_power_button(&self) -> bool {
        self.power_button.as_ref().is_some_and(PowerButton::press)
    }

    /// Asks the machine to stop, and does not wait for it. It ends with [`End::Stopped`] unless it
    /// had ended before.
    pub fn stop(&self) {
        self.control.finish(Ok(End::Stopped));
    }

    /// Makes every vCPU come out of the guest once.
    pub fn kick(&self) {
        self.control.kick_all();
    }

    /// True once the machine is ending or has ended.
    pub fn has_ended(&self) -> bool {
        self.control.outcome().is_some()
    }
}
