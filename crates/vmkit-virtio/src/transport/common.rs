//! What all transports share: negotiation, queue setup, and the device's life (virtio 1.2 §2, §3).
//! It knows nothing of register layouts.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vmkit_device::{Clock, DeviceError, Saved, Section, SectionFormat};
use vmkit_memory::GuestRam;

use crate::interrupt::{Shared, status};
use crate::lane::Lane;
use crate::{
    Activation, ConfigChange, Fault, FaultCounter, Interrupt, Queues, VirtQueue, VirtioDevice,
    Wake, WorkModel, work,
};

/// `VIRTIO_F_INDIRECT_DESC` (virtio 1.2 §6).
const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// Status bits a driver sets.
const DRIVER_BITS: u8 = !status::NEEDS_RESET;

const FORMAT: SectionFormat = SectionFormat { kind: "virtio", version: 1 };

/// What a driver says of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// The driver is done with it.
    pub ready: bool,
    /// Descriptor table, guest-physical.
    pub desc: u64,
    /// Available ring, guest-physical.
    pub avail: u64,
    /// Used ring, guest-physical.
    pub used: u64,
}

/// What a driver writes before it is ready.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

/// Saved state, format version 1.
#[derive(Debug, Serialize, Deserialize)]
struct CoreState {
    status: u8,
    generation: u32,
    registers: Registers,
    /// Next available and next used entry of each queue that was active.
    positions: Vec<Option<(u16, u16)>>,
    /// What the transport adds.
    transport: Vec<u8>,
}

struct Control {
    registers: Registers,
    /// The machine runs.
    running: bool,
    threads: Vec<JoinHandle<()>>,
    /// Lanes that have been started before.
    started: bool,
}

/// A device's transport-independent half.
pub(crate) struct Core {
    device: Arc<dyn VirtioDevice>,
    memory: GuestRam,
    clock: Arc<dyn Clock>,
    work: WorkModel,
    shared: Arc<Shared>,
    limits: Vec<u16>,
    kicks: Vec<Wake>,
    control: Mutex<Control>,
    lanes: ArcSwap<Vec<Arc<Lane>>>,
}

impl Core {
    pub(crate) fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestRam,
        clock: Arc<dyn Clock>,
        work: WorkModel,
        interrupt: Arc<dyn Interrupt>,
        faults: FaultCounter,
    ) -> Result<Self, DeviceError> {
        let name = device.name().to_owned();
        let limits = device.queues();
        let good = |size: &u16| size.is_power_of_two() && *size <= 1 << 15;
        if limits.len() > 64 || !limits.iter().all(good) {
            let reason = format!("queue sizes {limits:?}: want up to 64 powers of two");
            return Err(DeviceError::Config { device: name, reason });
        }
        let kicks = limits.iter().map(|_| Wake::new()).collect::<Result<Vec<_>, _>>();
        let kicks = kicks.map_err(|source| DeviceError::Host {
            device: name.clone(),
            what: "make an eventfd".into(),
            source,
        })?;
        let shared = Arc::new(Shared {
            name,
            interrupt,
            faults,
            status: AtomicU8::new(0),
            generation: AtomicU32::new(0),
        });
        let registers = power_on(&limits);
        let control = Control { registers, running: false, threads: Vec::new(), started: false };
        Ok(Self {
            device,
            memory,
            clock,
            work,
            shared,
            limits,
            kicks,
            control: Mutex::new(control),
            lanes: ArcSwap::default(),
        })
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    pub(crate) fn name(&self) -> &str {
        &self.shared.name
    }

    pub(crate) fn kicks(&self) -> &[Wake] {
        &self.kicks
    }

    pub(crate) fn uses_doorbells(&self) -> bool {
        !self.work.is_inline()
    }

    fn note(&self, what: &'static str) {
        self.shared.faults.note(&self.shared.name, &Fault::Request(what));
    }

    // Negotiation.

    fn offered(&self) -> u64 {
        self.device.features() | INDIRECT_DESC | EVENT_IDX | VERSION_1
    }

    pub(crate) fn select_device_features(&self, word: u32) {
        self.control().registers.device_features_select = word;
    }

    pub(crate) fn device_features_select(&self) -> u32 {
        self.control().registers.device_features_select
    }

    pub(crate) fn device_features(&self) -> u32 {
        word(self.offered(), self.control().registers.device_features_select)
    }

    pub(crate) fn select_driver_features(&self, word: u32) {
        self.control().registers.driver_features_select = word;
    }

    pub(crate) fn driver_features_select(&self) -> u32 {
        self.control().registers.driver_features_select
    }

    pub(crate) fn driver_features(&self) -> u32 {
        let control = self.control();
        word(control.registers.driver_features, control.registers.driver_features_select)
    }

    pub(crate) fn set_driver_features(&self, value: u32) {
        let mut control = self.control();
        if self.shared.has(status::FEATURES_OK) {
            return self.note("features written after FEATURES_OK");
        }
        let features = &mut control.registers.driver_features;
        let low = *features & 0xFFFF_FFFF;
        let high = *features >> 32 << 32;
        match control.registers.driver_features_select {
            0 => control.registers.driver_features = high | u64::from(value),
            1 => control.registers.driver_features = low | u64::from(value) << 32,
            _ => {}
        }
    }

    pub(crate) fn status(&self) -> u8 {
        self.shared.status.load(Ordering::Acquire)
    }

    pub(crate) fn generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Writes the status. Bits stay set until a reset, which writing zero asks for.
    pub(crate) fn set_status(&self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let mut control = self.control();
        let before = self.status();
        let mut new = value & DRIVER_BITS & !before;
        if new & status::FEATURES_OK != 0 {
            let features = control.registers.driver_features;
            let offered = features & !self.offered() == 0 && features & VERSION_1 != 0;
            if !offered || !self.device.accepts(features) {
                // The driver reads the bit back to see that it was refused (§3.1.1).
                new &= !status::FEATURES_OK;
            }
        }
        let negotiated = (before | new) & status::FEATURES_OK != 0;
        if new & status::DRIVER_OK != 0 && !negotiated {
            new &= !status::DRIVER_OK;
            self.note("DRIVER_OK without FEATURES_OK");
        }
        self.shared.status.fetch_or(new, Ordering::AcqRel);
        if new & status::DRIVER_OK != 0 {
            self.activate(&mut control, &[]);
        }
    }

    // Queues.

    pub(crate) fn select_queue(&self, queue: u32) {
        self.control().registers.queue_select = u16::try_from(queue).unwrap_or(u16::MAX);
    }

    pub(crate) fn queue_select(&self) -> u16 {
        self.control().registers.queue_select
    }

    pub(crate) fn queue_count(&self) -> u16 {
        self.limits.len() as u16
    }

    /// Most entries of the selected queue; zero if there is none.
    pub(crate) fn queue_limit(&self) -> u16 {
        self.limits.get(usize::from(self.queue_select())).copied().unwrap_or(0)
    }

    /// The selected queue as the driver set it up so far.
    pub(crate) fn queue(&self) -> QueueSetup {
        let control = self.control();
        let selected = usize::from(control.registers.queue_select);
        control.registers.queues.get(selected).copied().unwrap_or_default()
    }

    /// Lets `change` set up the selected queue, before the driver is ready.
    pub(crate) fn set_queue(&self, change: impl FnOnce(&mut QueueSetup)) {
        let mut control = self.control();
        if self.shared.has(status::DRIVER_OK) {
            return self.note("a queue set up while the device is active");
        }
        let selected = usize::from(control.registers.queue_select);
        if let Some(queue) = control.registers.queues.get_mut(selected) {
            change(queue);
        } else {
            drop(control);
            self.note("a queue set up that does not exist");
        }
    }

    /// Takes the selected queue out of use (virtio 1.2 §4.2.2.2): when this returns, its memory is
    /// left alone. It comes back only with a reset.
    pub(crate) fn stop_queue(&self) {
        let mut control = self.control();
        let index = control.registers.queue_select;
        if let Some(queue) = control.registers.queues.get_mut(usize::from(index)) {
            queue.ready = false;
        }
        for lane in self.lanes.load().iter().filter(|lane| lane.serves(index)) {
            lane.remove(index);
        }
    }

    /// The driver notifies `queue`.
    pub(crate) fn notify(&self, queue: u32) {
        let Some(kick) = self.kicks.get(queue as usize) else {
            return self.note("a notification of a queue that does not exist");
        };
        if self.work.is_inline() {
            let lanes = self.lanes.load();
            lanes.iter().filter(|l| l.serves(queue as u16)).for_each(|l| l.run(queue as u16));
        } else if self.shared.has(status::DRIVER_OK) {
            kick.wake();
        }
    }

    /// Goes on with what inline work left over. Call it whenever the driver comes by.
    pub(crate) fn visit(&self) {
        if self.work.is_inline() {
            let lanes = self.lanes.load();
            lanes.iter().filter(|lane| lane.run_left_over()).for_each(|lane| self.hand_over(lane));
        }
    }

    /// Has a thread go on with what is left over: the driver was asked for no notification, and may
    /// never come by again.
    fn hand_over(&self, lane: &Arc<Lane>) {
        let mut control = self.control();
        if lane.running() {
            match work::spawn(&self.shared.name, lane) {
                Ok(thread) => control.threads.extend(thread),
                Err(error) => log::error!("{}: no thread for its worker: {error}", self.name()),
            }
        }
    }

    // Life.

    /// Makes the device active with the queues the driver set up, from `positions` on. On failure
    /// the device is marked broken.
    fn activate(&self, control: &mut Control, positions: &[Option<(u16, u16)>]) {
        if let Err(error) = self.try_activate(control, positions) {
            self.shared.broken(&error);
        }
    }

    fn rings(
        &self,
        registers: &Registers,
        positions: &[Option<(u16, u16)>],
    ) -> Result<Vec<VirtQueue>, Fault> {
        let mut rings = Vec::new();
        for (index, (setup, &max_size)) in registers.queues.iter().zip(&self.limits).enumerate() {
            if !setup.ready {
                continue;
            }
            let (next_avail, next_used) =
                positions.get(index).copied().flatten().unwrap_or_default();
            let state = QueueState {
                max_size,
                next_avail,
                next_used,
                event_idx_enabled: registers.driver_features & EVENT_IDX != 0,
                size: setup.size,
                ready: true,
                desc_table: setup.desc,
                avail_ring: setup.avail,
                used_ring: setup.used,
            };
            let interrupt = self.shared.interrupt.clone();
            rings.push(VirtQueue::new(index as u16, state, self.memory.clone(), interrupt)?);
        }
        Ok(rings)
    }

    fn try_activate(
        &self,
        control: &mut Control,
        positions: &[Option<(u16, u16)>],
    ) -> Result<(), ActivateError> {
        let mut rings = self.rings(&control.registers, positions)?;
        let config = ConfigChange::new(self.shared.clone());
        let features = control.registers.driver_features;
        let activation = Activation::new(features, self.memory.clone(), config, self.clock.clone());
        let mut lanes = Vec::new();
        for spec in self.device.activate(activation)? {
            let own = |ring: &VirtQueue| spec.queues.contains(&ring.index());
            let (mine, others) = rings.into_iter().partition(own);
            rings = others;
            let lane = Lane::new(spec, Queues::new(mine), &self.kicks, self.shared.clone())
                .map_err(|source| self.host_error("wait for events", source))?;
            lanes.push(Arc::new(lane));
        }
        self.lanes.store(Arc::new(lanes));
        control.started = false;
        if control.running {
            self.start_lanes(control)?;
        }
        Ok(())
    }

    fn host_error(&self, what: &str, source: std::io::Error) -> DeviceError {
        DeviceError::Host { device: self.shared.name.clone(), what: what.into(), source }
    }

    fn start_lanes(&self, control: &mut Control) -> Result<(), DeviceError> {
        let first = !std::mem::replace(&mut control.started, true);
        for lane in self.lanes.load().iter() {
            let thread = self
                .work
                .start(&self.shared.name, lane, first)
                .map_err(|source| self.host_error("start its worker", source))?;
            control.threads.extend(thread);
        }
        Ok(())
    }

    fn halt_lanes(&self, control: &mut Control) {
        self.lanes.load().iter().for_each(|lane| lane.halt());
        for thread in control.threads.drain(..) {
            // A worker's panic has been told on its thread; the device stays as it left it.
            let _ = thread.join();
        }
    }

    pub(crate) fn start(&self) -> Result<(), DeviceError> {
        let mut control = self.control();
        control.running = true;
        if let Err(error) = self.start_lanes(&mut control) {
            control.running = false;
            self.halt_lanes(&mut control);
            return Err(error);
        }
        drop(control);
        if self.work.is_inline() {
            self.lanes.load().iter().for_each(|lane| lane.run_all());
            self.visit();
        }
        Ok(())
    }

    pub(crate) fn pause(&self) {
        let mut control = self.control();
        control.running = false;
        self.halt_lanes(&mut control);
    }

    pub(crate) fn reset(&self) {
        let mut control = self.control();
        self.quiesce(&mut control);
        self.device.reset();
        control.registers = power_on(&self.limits);
        self.shared.status.store(0, Ordering::Release);
        self.shared.interrupt.reset();
    }

    /// Ends all work and drops the workers.
    fn quiesce(&self, control: &mut Control) {
        self.halt_lanes(control);
        self.lanes.store(Arc::default());
    }

    // Saved state.

    /// The device's sections, after the transport's own with `transport` in it.
    pub(crate) fn save(&self, transport: Vec<u8>) -> Saved {
        let control = self.control();
        let mut positions = vec![None; self.limits.len()];
        for lane in self.lanes.load().iter() {
            lane.with_queues(|queues| {
                for queue in queues.iter() {
                    if let Some(position) = positions.get_mut(usize::from(queue.index())) {
                        *position = Some(queue.positions());
                    }
                }
            });
        }
        let state = CoreState {
            status: self.status(),
            generation: self.generation(),
            registers: control.registers.clone(),
            positions,
            transport,
        };
        let mut sections = match FORMAT.save(&state) {
            Saved::Sections(sections) => sections,
            other => return other,
        };
        match self.device.save() {
            Saved::Sections(more) => sections.extend(more),
            Saved::Stateless => {}
            Saved::Cannot(reason) => return Saved::Cannot(reason),
        }
        Saved::Sections(sections)
    }

    /// Takes on saved state. `transport` checks what [`save`](Self::save) was given and answers with
    /// what takes it on; if it refuses, or anything else does, the device is as it was.
    pub(crate) fn load<Apply: FnOnce()>(
        &self,
        sections: &[Section],
        transport: impl FnOnce(&[u8]) -> Result<Apply, String>,
    ) -> Result<(), DeviceError> {
        let (own, others): (Vec<_>, Vec<_>) =
            sections.iter().cloned().partition(|section| section.kind == FORMAT.kind);
        let state: CoreState = FORMAT.load(self.name(), &own)?;
        let refuse = |reason: String| FORMAT.malformed(self.name(), reason);
        self.check(&state).map_err(refuse)?;
        let apply = transport(&state.transport).map_err(refuse)?;
        let mut control = self.control();
        self.device.load(&others)?;
        apply();
        self.quiesce(&mut control);
        control.registers = state.registers;
        self.shared.status.store(state.status, Ordering::Release);
        self.shared.generation.store(state.generation, Ordering::Release);
        if state.status & status::DRIVER_OK != 0 && state.status & status::NEEDS_RESET == 0 {
            self.activate(&mut control, &state.positions);
        }
        Ok(())
    }

    /// Checks that the device can be in `state`.
    fn check(&self, state: &CoreState) -> Result<(), String> {
        let CoreState { registers, positions, .. } = state;
        if registers.queues.len() != self.limits.len() || positions.len() != self.limits.len() {
            return Err(format!("{} queues, want {}", registers.queues.len(), self.limits.len()));
        }
        let ok = state.status & status::FEATURES_OK != 0;
        if ok && registers.driver_features & !self.offered() != 0 {
            return Err(format!("features {:#x} are not offered", registers.driver_features));
        }
        let active = state.status & status::DRIVER_OK != 0;
        if active && !ok {
            return Err("active without negotiation".into());
        }
        if active && state.status & status::NEEDS_RESET == 0 {
            self.rings(registers, positions).map_err(|fault| fault.to_string())?;
        }
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let mut control = self.control();
        self.halt_lanes(&mut control);
    }
}

#[derive(Debug, thiserror::Error)]
enum ActivateError {
    #[error(transparent)]
    Driver(#[from] Fault),
    #[error(transparent)]
    Host(#[from] DeviceError),
}

fn power_on(limits: &[u16]) -> Registers {
    let queue = |&size| QueueSetup { size, ..QueueSetup::default() };
    Registers { queues: limits.iter().map(queue).collect(), ..Registers::default() }
}

fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Sets the low half of an address.
pub(crate) fn set_low(of: &mut u64, value: u32) {
    *of = *of >> 32 << 32 | u64::from(value);
}

/// Sets the high half of an address.
pub(crate) fn set_high(of: &mut u64, value: u32) {
    *of = *of & 0xFFFF_FFFF | u64::from(value) << 32;
}
