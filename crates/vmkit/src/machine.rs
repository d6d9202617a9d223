//! What a machine is made of, and the order in which its parts start and stop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmkit_chipset::PowerButton;
use vmkit_device::{Bus, Device, DeviceError, MonotonicClock, thread_builder};
use vmkit_guest::Guest;
use vmkit_hypervisor::{Capabilities, CpuModel, MapId, Partition};
use vmkit_memory::{GuestRam, MemoryRegion, RamLayout};

use crate::control::Control;
use crate::error::RunFailure;
use crate::io::VcpuStats;
use crate::timeline::Recorder;
use crate::vcpu_thread::{self, Slot};
use crate::{End, VmError};

/// How often to look for vCPUs that can never run again, where their runs do not return.
const DEAD_WATCH: Duration = Duration::from_millis(500);

/// A built machine. Fields are dropped in this order: processors before the devices they reach,
/// devices before the partition they signal.
pub(crate) struct Machine {
    pub(crate) slots: Vec<Slot>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(crate) partition: Arc<dyn Partition>,
    pub(crate) clock: Arc<MonotonicClock>,
    pub(crate) agent: Guest,
    pub(crate) memory: GuestRam,
    /// What is written to is tracked there.
    pub(crate) tracked: Vec<Tracked>,
    pub(crate) layout: RamLayout,
    pub(crate) control: Arc<Control>,
    pub(crate) power_button: Option<PowerButton>,
    pub(crate) capabilities: Capabilities,
    pub(crate) model: CpuModel,
    pub(crate) timeline: Recorder,
    pub(crate) threads: Mutex<Threads>,
}

/// A part of memory whose written pages are tracked.
pub(crate) struct Tracked {
    pub(crate) region: Arc<MemoryRegion>,
    pub(crate) map: MapId,
}

/// The threads of a machine and whether its devices work. Held while either changes.
#[derive(Default)]
pub(crate) struct Threads {
    /// To be waited for at the end: one per vCPU, and the watch.
    own: Vec<JoinHandle<()>>,
    devices_run: bool,
    pauses: u32,
}

impl Threads {
    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        self.own.push(thread_builder(name).spawn(body)?);
        Ok(())
    }
}

impl Machine {
    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts devices, then vCPUs. On failure everything that was started is stopped again.
    pub(crate) fn start(self: &Arc<Self>) -> Result<(), VmError> {
        let mut threads = self.threads();
        self.start_devices(&mut threads)?;
        for index in 0..self.slots.len() {
            self.control.enter();
            let machine = self.clone();
            let body = move || vcpu_thread::run(&machine, index);
            if let Err(source) = threads.spawn(format!("vcpu{index}"), body) {
                self.control.leave();
                return Err(self.failed_start(threads, index as u32, source));
            }
        }
        // A vCPU that halted for good may be kept inside its run: by KVM always, and elsewhere
        // while another vCPU might still wake it.
        if !self.capabilities.reports_dead_halt || self.slots.len() > 1 {
            let control = self.control.clone();
            let body = move || control.kick_every(DEAD_WATCH);
            if let Err(source) = threads.spawn("dead-halt-watch".into(), body) {
                return Err(self.failed_start(threads, 0, source));
            }
        }
        Ok(())
    }

    /// Stops what had been started before `vcpu`'s thread could not be.
    fn failed_start(
        &self,
        threads: MutexGuard<'_, Threads>,
        vcpu: u32,
        source: std::io::Error,
    ) -> VmError {
        drop(threads);
        let failure = RunFailure::Thread { vcpu, source: Arc::new(source) };
        self.control.finish(Err(failure.clone()));
        self.settle();
        failure.into()
    }

    /// Devices run before guest time does, so that none misses a moment of it.
    fn start_devices(&self, threads: &mut Threads) -> Result<(), DeviceError> {
        for (count, device) in self.devices.iter().enumerate() {
            if let Err(error) = device.start() {
                self.devices.iter().take(count).rev().for_each(|d| d.pause());
                return Err(error);
            }
        }
        threads.devices_run = true;
        self.clock.resume();
        Ok(())
    }

    fn stop_devices(&self, threads: &mut Threads) {
        if std::mem::take(&mut threads.devices_run) {
            self.clock.pause();
            self.devices.iter().rev().for_each(|device| device.pause());
        }
    }

    /// Lets vCPUs go that wait inside an access.
    fn release(&self) {
        self.devices.iter().for_each(|device| device.stop_waiting());
    }

    /// Waits until the machine has ended and every vCPU thread has left, or until `deadline`.
    pub(crate) fn wait_end(&self, deadline: Option<Instant>) -> Option<Result<End, VmError>> {
        self.control.wait_ending(deadline)?;
        self.release();
        self.control.wait_end(deadline)
    }

    /// Waits until every vCPU thread has left, which they do once the machine has ended, and stops
    /// the devices. A second call changes nothing.
    pub(crate) fn settle(&self) {
        let _ = self.wait_end(None);
        let mut threads = self.threads();
        for thread in threads.own.drain(..) {
            // A device may drop the machine on a vCPU's own thread, which cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                // Its panics are caught and told as the machine's failure.
                let _ = thread.join();
            }
        }
        self.timeline.set_ended(Instant::now());
        self.stop_devices(&mut threads);
    }

    /// Brings vCPUs, devices and the machine's clock to a stand.
    pub(crate) fn pause(&self) {
        self.control.pause(|| self.release());
        let mut threads = self.threads();
        threads.pauses += 1;
        self.stop_devices(&mut threads);
    }

    /// Undoes one [`pause`](Self::pause). Ends the machine if a device cannot restart: a device is
    /// not accessed while it does not run, and the guest would wait for it without a word.
    pub(crate) fn resume(&self) -> Result<(), VmError> {
        let mut threads = self.threads();
        threads.pauses = threads.pauses.saturating_sub(1);
        let started = if threads.pauses == 0 && self.control.outcome().is_none() {
            self.tell_of_pause();
            self.start_devices(&mut threads).map_err(|error| RunFailure::Restart(Arc::new(error)))
        } else {
            Ok(())
        };
        drop(threads);
        if let Err(failure) = &started {
            self.control.finish(Err(failure.clone()));
        }
        self.control.resume();
        Ok(started?)
    }

    /// Has vCPUs whose clocks a pause does not stop tell the guest of it.
    fn tell_of_pause(&self) {
        for (index, slot) in self.slots.iter().enumerate() {
            if let Err(error) = slot.lock().after_pause() {
                log::warn!("vCPU {index} goes on without a word of the pause: {error}");
            }
        }
    }

    pub(crate) fn stats(&self) -> Vec<VcpuStats> {
        self.slots.iter().map(|slot| slot.counters.read()).collect()
    }

    /// All vCPUs' instructions, if the backend counts them.
    pub(crate) fn instructions(&self) -> Option<u64> {
        self.stats().iter().map(|s| s.instructions).try_fold(0_u64, |sum, n| Some(sum + n?))
    }
}
