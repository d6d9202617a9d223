//! A partition: the memory map, the interrupt controllers all vCPUs share, and the roads between
//! vCPUs.
//!
//! Locks are taken in this order and none is held across a callback: chips, then a local APIC. A
//! vCPU's own state is never locked; others reach it through its inbox ([`crate::shared`]).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use std::{io, thread};

use vmkit_device::memory::{DirtyBitmap, GuestAddress, MemoryRegion, WriteWatch};
use vmkit_device::{Clock, Doorbells, EventFd, InterruptSink, Msi};
use vmkit_hypervisor::{
    CpuModel, HypervisorError, InterruptControllers, MapAccess, MapId, Partition, PartitionSpec,
    PartitionState, Result, TscSpec, Vcpu,
};
use vmkit_irqchip::{
    ApicMessage, Board, CpuEvent, LapicAction, LapicConfig, LocalApic, Pit, TscClock,
    msi_to_message, route, route_ipi,
};
use vmkit_memory::{GuestMemoryRegion, MmapRegion, PAGE_SIZE};

use crate::mem::{MemoryMap, Slot};
use crate::shared::{Message, VcpuShared};
use crate::vcpu::SoftVcpu;

/// Input frequency of the local APICs' timers in Hz, which CPUID leaf 15h tells.
pub(crate) const APIC_HZ: u32 = 1_000_000_000;
/// TSC frequency in kHz unless the embedder chooses another.
const DEFAULT_TSC_KHZ: u32 = 1_000_000;
/// Most vCPUs of a partition.
pub(crate) const MAX_VCPUS: u32 = 64;

/// Counters of vCPUs that are about to watch a page: more than one, so that vCPUs which decode from
/// different pages do not wait for each other.
const WATCHING: usize = 64;

/// What vCPUs and embedder share.
pub(crate) struct PartitionInner {
    clock: Arc<dyn Clock>,
    tsc_khz: u32,
    /// The partition has a PC's interrupt controllers.
    pub has_chips: bool,
    limit: u32,
    map: RwLock<Arc<MemoryMap>>,
    next_map: AtomicU32,
    vcpus: RwLock<Vec<Arc<VcpuShared>>>,
    chips: Mutex<Board>,
    split: Mutex<()>,
    /// vCPUs that are about to watch a page, by the page's number: while there is one, a watched page may
    /// not be in force everywhere.
    watching: [AtomicU32; WATCHING],
    /// The controllers were loaded and no vCPU has run since.
    resample: AtomicBool,
    /// vCPUs that nothing inside the partition can wake.
    dead: AtomicU32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PartitionInner {
    pub fn new(spec: &PartitionSpec) -> Self {
        Self {
            clock: spec.clock.clone(),
            tsc_khz: match spec.tsc {
                TscSpec::Khz(khz) => khz.max(1),
                _ => DEFAULT_TSC_KHZ,
            },
            has_chips: spec.interrupt_controllers != InterruptControllers::None,
            limit: spec.vcpus,
            map: RwLock::default(),
            next_map: AtomicU32::new(0),
            vcpus: RwLock::default(),
            chips: Mutex::new(Board::new()),
            split: Mutex::new(()),
            watching: [const { AtomicU32::new(0) }; WATCHING],
            resample: AtomicBool::new(false),
            dead: AtomicU32::new(0),
        }
    }

    /// Guest time in nanoseconds.
    pub fn clock_ns(&self) -> u64 {
        self.clock.now().as_nanos() as u64
    }

    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// vCPUs the partition may have, which is what CPUID tells.
    pub fn vcpu_limit(&self) -> u32 {
        self.limit
    }

    pub fn chips(&self) -> MutexGuard<'_, Board> {
        lock(&self.chips)
    }

    /// Held for an access that no host instruction makes atomic.
    pub fn split_lock(&self) -> MutexGuard<'_, ()> {
        lock(&self.split)
    }

    pub fn memory_map(&self) -> Arc<MemoryMap> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn vcpus(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<VcpuShared>>> {
        self.vcpus.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `message` into the inbox of every vCPU but `from`.
    pub fn post_others(&self, message: Message, from: u32) {
        for (index, vcpu) in self.vcpus().iter().enumerate() {
            if index as u32 != from {
                vcpu.post(message);
            }
        }
    }

    pub fn post(&self, message: Message, to: u32) {
        if let Some(vcpu) = self.vcpus().get(to as usize) {
            vcpu.post(message);
        }
    }

    /// How many vCPUs are between setting their watch on a page (or on another that shares the counter)
    /// and knowing that all vCPUs heed it.
    pub fn watching(&self, page: u64) -> &AtomicU32 {
        &self.watching[(page / PAGE_SIZE) as usize % WATCHING]
    }

    /// True when every vCPU but `from` has seen its inbox, or will before it executes again.
    pub fn others_settled(&self, from: u32) -> bool {
        self.vcpus().iter().enumerate().all(|(i, v)| i as u32 == from || v.settled())
    }

    /// Waits until every vCPU has seen its inbox, or will before it executes again.
    fn settle(&self) {
        while !self.others_settled(u32::MAX) {
            thread::sleep(Duration::from_micros(20));
        }
    }

    /// Counts vCPUs that nothing inside can wake; true if that is all of them now.
    pub fn set_dead(&self, dead: bool) -> bool {
        let count = if dead {
            self.dead.fetch_add(1, Ordering::SeqCst) + 1
        } else {
            self.dead.fetch_sub(1, Ordering::SeqCst) - 1
        };
        count as usize >= self.vcpus().len()
    }

    /// Hands a message to the local APICs it is for; whether there was one to take it.
    pub fn deliver(&self, message: &ApicMessage) -> bool {
        let vcpus = self.vcpus();
        let addresses = vcpus.iter().map(|v| v.apic().address());
        let priority = |i: usize| vcpus.get(i).map_or(0, |v| v.apic().processor_priority());
        route(message, addresses, priority, |i| hand_over(&vcpus, i, message)) != 0
    }

    /// Does what a local APIC's register write asks for.
    pub fn handle_apic_action(&self, index: u32, action: LapicAction) {
        match action {
            LapicAction::None => {}
            LapicAction::Eoi(vector) => self.end_of_interrupt(vector),
            LapicAction::Ipi(ipi) => {
                let vcpus = self.vcpus();
                let addresses = vcpus.iter().map(|v| v.apic().address());
                let priority = |i: usize| vcpus.get(i).map_or(0, |v| v.apic().processor_priority());
                route_ipi(&ipi, index as usize, addresses, priority, |i| {
                    hand_over(&vcpus, i, &ipi.message);
                });
            }
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        let mut chips = self.chips();
        if chips.ioapic.awaits_eoi(vector) {
            chips.ioapic.eoi(vector, &mut |message| self.deliver(&message));
        }
    }

    /// A vCPU enters its run. By now the local APICs are loaded, too, if the controllers were: what
    /// these were in the midst of sending goes out.
    pub fn running(&self) {
        if self.resample.load(Ordering::SeqCst) && self.resample.swap(false, Ordering::SeqCst) {
            self.chips().ioapic.resample(&mut |message| self.deliver(&message));
        }
    }

    /// Tells vCPU 0, to which the 8259 pair is wired, to look at it.
    fn notify_first(&self) {
        if let Some(first) = self.vcpus().first() {
            first.notify();
        }
    }

    fn drive(&self, gsi: u32, high: bool) {
        let mut chips = self.chips();
        chips.set_level(gsi, high, &mut |message| self.deliver(&message));
        if chips.pic.output() {
            self.notify_first();
        }
    }

    /// Advances the PIT and says when it wants to be called again.
    pub fn advance_pit(&self, now: u64) -> Option<u64> {
        let mut chips = self.chips();
        let before = chips.pic.output();
        let next = chips.advance(now, &mut |message| self.deliver(&message));
        if !before && chips.pic.output() {
            self.notify_first();
        }
        next
    }

    /// A port of the PIC or PIT: reads it.
    pub fn read_chip_port(&self, port: u16) -> Option<u8> {
        (self.has_chips && Board::has_port(port))
            .then(|| self.chips().read_port(port, self.clock_ns()))
    }

    /// A port of the PIC or PIT: writes it; false if it is another's.
    pub fn write_chip_port(&self, port: u16, value: u8) -> bool {
        if !self.has_chips || !Board::has_port(port) {
            return false;
        }
        let mut chips = self.chips();
        chips.write_port(port, value, self.clock_ns());
        // The first vCPU takes the PIC's interrupts and watches the PIT's deadline.
        if chips.pic.output() || Pit::PORTS.contains(&port) {
            self.notify_first();
        }
        true
    }

    pub fn read_ioapic(&self, offset: u64, data: &mut [u8]) {
        self.chips().ioapic.read(offset, data);
    }

    pub fn write_ioapic(&self, offset: u64, data: &[u8]) {
        self.chips().ioapic.write(offset, data, &mut |message| self.deliver(&message));
    }
}

fn hand_over(vcpus: &[Arc<VcpuShared>], index: usize, message: &ApicMessage) {
    let Some(vcpu) = vcpus.get(index) else { return };
    let event = vcpu.apic().accept(message);
    match event {
        Some(CpuEvent::Nmi) => vcpu.nmi.store(true, Ordering::SeqCst),
        Some(CpuEvent::Init) => vcpu.post_init(),
        Some(CpuEvent::Sipi(vector)) => vcpu.post_sipi(vector),
        Some(CpuEvent::Smi) | None => {}
    }
    vcpu.notify();
}

/// Tells vCPUs of writes by devices to lines that hold decoded code. A region has one, wherever it is
/// mapped in the course of time.
struct CodeWatch {
    partition: std::sync::Weak<PartitionInner>,
    /// The region's host address.
    host: usize,
}

impl WriteWatch for CodeWatch {
    fn written(&self, offset: u64, len: u64) {
        let Some(partition) = self.partition.upgrade() else { return };
        let map = partition.memory_map();
        for slot in map.at_host(self.host) {
            let (first, last) = (slot.start + offset, slot.start + offset + len.max(1) - 1);
            for page in first / PAGE_SIZE..=last / PAGE_SIZE {
                let base = page * PAGE_SIZE;
                let from = first.max(base);
                let to = last.min(base + PAGE_SIZE - 1);
                let lines = vmkit_memory::WriteTracker::lines_of(from, to);
                slot.tracker.unwatch_lines(slot.page(base), lines);
                partition.post_others(Message::Invalidate { page: base, lines }, u32::MAX);
            }
        }
    }
}

/// The software backend's partition.
pub(crate) struct SoftPartition {
    pub inner: Arc<PartitionInner>,
}

impl SoftPartition {
    fn change_map(
        &self,
        change: impl FnOnce(&MemoryMap) -> std::result::Result<MemoryMap, HypervisorError>,
    ) -> Result<()> {
        {
            let mut map = self.inner.map.write().unwrap_or_else(PoisonError::into_inner);
            *map = Arc::new(change(&map)?);
        }
        self.inner.post_others(Message::MapChanged, u32::MAX);
        self.inner.settle();
        Ok(())
    }
}

impl Partition for SoftPartition {
    fn map(&self, at: GuestAddress, region: Arc<MemoryRegion>, access: MapAccess) -> Result<MapId> {
        let len = region.len();
        let bad = |reason| HypervisorError::Mapping { start: at.0, len, reason };
        if !at.0.is_multiple_of(PAGE_SIZE) || len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(bad("start and length must be multiples of 4096"));
        }
        if at.0.checked_add(len).is_none_or(|end| end > 1 << 52) {
            return Err(bad("the range leaves the physical address space"));
        }
        let id = self.inner.next_map.fetch_add(1, Ordering::Relaxed);
        let host = region.as_ptr() as usize;
        let watch = CodeWatch { partition: Arc::downgrade(&self.inner), host };
        MmapRegion::bitmap(&region).set_watch(Arc::new(watch));
        let (write, track) =
            (access.contains(MapAccess::WRITE), access.contains(MapAccess::TRACK_DIRTY));
        let slot = Slot::new(id, at.0, region, write, track);
        self.change_map(|map| map.with(slot).ok_or_else(|| bad("it overlaps another mapping")))?;
        Ok(MapId(id))
    }

    fn unmap(&self, id: MapId) -> Result<()> {
        self.change_map(|map| {
            map.without(id.0).ok_or(HypervisorError::Mapping {
                start: 0,
                len: 0,
                reason: "no such mapping",
            })
        })
    }

    fn take_dirty(&self, id: MapId, into: &mut DirtyBitmap) -> Result<()> {
        let unknown = |reason| HypervisorError::Mapping { start: 0, len: 0, reason };
        let map = self.inner.memory_map();
        let slot = map.by_id(id.0).ok_or_else(|| unknown("no such mapping"))?;
        if !slot.take_dirty(into) {
            return Err(unknown("the mapping does not track writes"));
        }
        // What was cached for writing would not be marked again. A write that slipped in between is
        // caught by a second look.
        self.inner.post_others(Message::FlushWrites, u32::MAX);
        self.inner.settle();
        slot.take_dirty(into);
        Ok(())
    }

    fn create_vcpu(&self, index: u32, model: &CpuModel) -> Result<Box<dyn Vcpu>> {
        let missing = model.missing(&crate::features());
        if !missing.is_empty() {
            return Err(HypervisorError::CpuModel {
                model: model.name.clone(),
                missing: missing.iter().map(ToString::to_string).collect(),
            });
        }
        let mut vcpus = self.inner.vcpus.write().unwrap_or_else(PoisonError::into_inner);
        if index as usize != vcpus.len() || index >= self.inner.limit {
            return Err(HypervisorError::VcpuIndex(index));
        }
        use vmkit_hypervisor::Feature;
        let mut config = LapicConfig::new(index);
        config.timer_hz = u64::from(APIC_HZ);
        config.tsc = TscClock { hz: u64::from(self.inner.tsc_khz) * 1000, offset: 0 };
        config.physical_bits = model.physical_bits;
        config.x2apic = model.has(Feature::X2apic);
        config.tsc_deadline = model.has(Feature::TscDeadline);
        let shared = Arc::new(VcpuShared::new(LocalApic::new(config)));
        let vcpu = SoftVcpu::new(index, model, self.inner.clone(), shared.clone());
        vcpus.push(shared);
        Ok(Box::new(vcpu))
    }

    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::new(Sink(self.inner.clone()))
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }

    fn tsc_khz(&self) -> u32 {
        self.inner.tsc_khz
    }

    fn save(&self) -> Result<PartitionState> {
        let clock_ns = self.inner.clock_ns();
        let mut chips = self.inner.chips();
        Ok(PartitionState {
            pic: chips.pic.save(),
            ioapic: chips.ioapic.save(),
            pit: chips.pit.save(clock_ns),
            clock_ns,
        })
    }

    fn load(&self, from: &PartitionState) -> Result<()> {
        let now = self.inner.clock_ns();
        let mut chips = self.inner.chips();
        chips
            .load(&from.pic, &from.ioapic, &from.pit, now)
            .map_err(|error| HypervisorError::state(error.to_string()))?;
        self.inner.resample.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// Interrupts from devices.
struct Sink(Arc<PartitionInner>);

impl InterruptSink for Sink {
    fn set_level(&self, gsi: u32, high: bool) {
        self.0.drive(gsi, high);
    }

    fn signal_msi(&self, msi: Msi) {
        if let Some(message) = msi_to_message(msi) {
            self.0.deliver(&message);
        }
    }

    fn attach_irqfd(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use vmkit_device::ManualClock;
    use vmkit_device::memory::{Backing, region_at};
    use vmkit_hypervisor::Hypervisor;

    use super::*;
    use crate::cpu::Cpu;

    #[test]
    fn a_watch_that_may_not_be_in_force_yet_is_not_relied_on() {
        let spec = PartitionSpec::new(2, Arc::new(ManualClock::default()));
        let partition = SoftPartition { inner: Arc::new(PartitionInner::new(&spec)) };
        let region = region_at(GuestAddress(0), 1 << 20, Backing::Anonymous).unwrap();
        partition.map(GuestAddress(0), Arc::new(region), MapAccess::WRITE).unwrap();
        let features = crate::SoftHypervisor::new().capabilities().features;
        let model = CpuModel::with_features("test", features);
        let _vcpus = [0, 1].map(|index| partition.create_vcpu(index, &model).unwrap());
        let inner = &partition.inner;
        let shared: Vec<_> = inner.vcpus().clone();
        let mut cpu = Cpu::new(0, &model, inner.clone(), shared[0].clone());
        let told = [Message::CodePage { page: 0x5000, from: 0 }];

        cpu.watch(0x5000, 1);
        assert_eq!(shared[1].take_messages(), told);
        cpu.watch(0x5040, 1);
        assert_eq!(shared[1].take_messages(), []);
        // As while another vCPU has set its watch and waits for the rest to heed it.
        inner.watching(0x5000).fetch_add(1, Ordering::SeqCst);
        cpu.watch(0x5080, 1);
        assert_eq!(shared[1].take_messages(), told);
    }
}
