//! A machine of one virtio device and a driver for it, in this process and without a processor:
//! for tests, fuzz targets and benchmarks. The driver does what it is told, also when it is wrong.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_debug_implementations,
    missing_docs,
    reason = "only tests use it"
)]

pub mod fuzz;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmkit_device::{
    Device, DeviceBuilder, Doorbells, EndSignal, EventFd, InterruptSink, ManualClock, Msi,
    ResourceAllocator, Resources, Saved, Section,
};
use vmkit_memory::{Backing, Bytes, GuestAddress, GuestRam, RamLayout, allocate};

use vmkit_pci::{PciFunctionBuilder, PciHost};

use crate::{FaultCounter, Mmio, Pci};

pub const ACKNOWLEDGE_DRIVER: u32 = 3;
pub const FEATURES_OK: u32 = 8;
pub const DRIVER_OK: u32 = 4;
pub const NEEDS_RESET: u32 = 64;
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_TABLE: u16 = 4;

/// Records interrupts.
#[derive(Default)]
pub struct Wires {
    high: AtomicBool,
    rises: AtomicU64,
    messages: Mutex<Vec<Msi>>,
}

impl Wires {
    pub fn high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }
    pub fn rises(&self) -> u64 {
        self.rises.load(Ordering::SeqCst)
    }
    pub fn messages(&self) -> Vec<Msi> {
        self.messages.lock().unwrap().clone()
    }
}

impl InterruptSink for Wires {
    fn set_level(&self, _: u32, high: bool) {
        self.high.store(high, Ordering::SeqCst);
        self.rises.fetch_add(high.into(), Ordering::SeqCst);
    }
    fn signal_msi(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
    fn attach_irqfd(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Gives `builder` a machine and starts it. Memory is `ram`.
pub fn bring_up(
    builder: impl DeviceBuilder + 'static,
    ram: &GuestRam,
    wires: &Arc<Wires>,
    clock: &Arc<ManualClock>,
    doorbells: Option<Arc<dyn Doorbells>>,
) -> Arc<dyn Device> {
    let clock = clock.clone();
    let mut resources = Resources::new(ram.clone(), clock, EndSignal::default(), wires.clone());
    resources.doorbells = doorbells;
    let needs = builder.needs();
    let name = builder.name();
    ResourceAllocator::new(wires.clone()).assign(&name, &needs, &mut resources).unwrap();
    let high = GuestAddress(1 << 32);
    resources.placed = builder.memory().iter().map(|_| high).collect();
    let device = Box::new(builder).build(resources).unwrap();
    assert_eq!(device.name(), name);
    device.start().unwrap();
    device
}

/// A device on the MMIO transport and its memory.
pub struct Rig {
    pub device: Arc<dyn Device>,
    pub ram: GuestRam,
    pub wires: Arc<Wires>,
    pub clock: Arc<ManualClock>,
    pub faults: FaultCounter,
    next_page: Arc<AtomicU64>,
}

/// Bytes of a rig's memory, unless said otherwise. Miri pays for each.
pub const RAM: u64 = if cfg!(miri) { 3 << 20 } else { 16 << 20 };
/// First byte that [`Rig::pages`] never hands out: tests use the memory from here on freely.
pub const FREE: u64 = RAM / 2;

impl Rig {
    pub fn new(builder: Mmio) -> Self {
        Self::with_ram(builder, RAM)
    }

    pub fn with_ram(builder: Mmio, bytes: u64) -> Self {
        Self::with(builder, bytes, None)
    }

    pub fn with_doorbells(builder: Mmio, doorbells: Arc<dyn Doorbells>) -> Self {
        Self::with(builder, RAM, Some(doorbells))
    }

    fn with(builder: Mmio, bytes: u64, doorbells: Option<Arc<dyn Doorbells>>) -> Self {
        let ram = allocate(&RamLayout::pc(bytes).unwrap(), Backing::Memfd).unwrap();
        let (wires, faults) = (Arc::new(Wires::default()), builder.faults());
        let clock = Arc::new(ManualClock::default());
        let device = bring_up(builder, &ram, &wires, &clock, doorbells);
        Self { device, ram, wires, clock, faults, next_page: Arc::new(AtomicU64::new(1)) }
    }

    /// The same device and memory.
    pub fn share(&self) -> Self {
        Self {
            device: self.device.clone(),
            ram: self.ram.clone(),
            wires: self.wires.clone(),
            clock: self.clock.clone(),
            faults: self.faults.clone(),
            next_page: self.next_page.clone(),
        }
    }

    pub fn reg(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set_reg(&self, offset: u64, value: u32) {
        let _ = self.device.write(0, offset, &value.to_le_bytes());
    }

    pub fn status(&self) -> u32 {
        self.reg(0x70)
    }

    pub fn is_broken(&self) -> bool {
        self.status() & NEEDS_RESET != 0
    }

    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read(0, 0x100 + offset, &mut data);
        data
    }

    /// `count` fresh pages of memory.
    pub fn pages(&self, count: u64) -> u64 {
        let at = self.next_page.fetch_add(count, Ordering::Relaxed) * 4096;
        assert!(at + count * 4096 <= FREE);
        at
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub fn device_features(&self) -> u64 {
        self.set_reg(0x14, 0);
        let low = self.reg(0x10);
        self.set_reg(0x14, 1);
        u64::from(self.reg(0x10)) << 32 | u64::from(low)
    }

    /// Resets the device and accepts of `wanted` what it offers.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        let features = self.propose(wanted);
        assert_ne!(self.status() & FEATURES_OK, 0);
        features
    }

    /// The same, though the device may refuse features that need others.
    pub fn propose(&self, wanted: u64) -> u64 {
        self.set_reg(0x70, 0);
        self.set_reg(0x70, ACKNOWLEDGE_DRIVER);
        let features = self.device_features() & (wanted | VERSION_1);
        self.accept(features);
        features
    }

    pub fn accept(&self, features: u64) {
        self.set_reg(0x24, 0);
        self.set_reg(0x20, features as u32);
        self.set_reg(0x24, 1);
        self.set_reg(0x20, (features >> 32) as u32);
        self.set_reg(0x70, ACKNOWLEDGE_DRIVER | FEATURES_OK);
    }

    /// Sets up queue `index` in fresh memory.
    pub fn queue(&self, index: u16, size: u16) -> Ring {
        let desc = self.pages(u64::from(size).div_ceil(256));
        let avail = self.pages(u64::from(size).div_ceil(2000));
        let used = self.pages(u64::from(size).div_ceil(500));
        Ring::at(self, index, size, desc, avail, used)
    }

    /// Writes a queue's registers.
    pub fn place(&self, index: u16, size: u32, desc: u64, avail: u64, used: u64) {
        self.set_reg(0x30, index.into());
        self.set_reg(0x38, size);
        for (register, address) in [(0x80, desc), (0x90, avail), (0xA0, used)] {
            self.set_reg(register, address as u32);
            self.set_reg(register + 4, (address >> 32) as u32);
        }
        self.set_reg(0x44, 1);
    }

    pub fn driver_ok(&self) {
        self.set_reg(0x70, ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK);
    }

    pub fn notify(&self, queue: u16) {
        self.set_reg(0x50, queue.into());
    }

    /// Negotiates `features`, sets up all queues with `size` entries and starts the device.
    pub fn activate(&self, features: u64, size: u16) -> Vec<Ring> {
        self.negotiate(features);
        let mut rings = Vec::new();
        for index in 0.. {
            self.set_reg(0x30, index);
            let most = self.reg(0x34) as u16;
            if most == 0 {
                break;
            }
            rings.push(self.queue(index as u16, size.min(most)));
        }
        self.driver_ok();
        rings
    }

    pub fn sections(&self) -> Vec<Section> {
        match self.device.save() {
            Saved::Sections(sections) => sections,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until `condition` holds.
    pub fn wait(&self, what: &str, condition: impl FnMut() -> bool) {
        wait(what, condition);
    }

    /// Checks that damaged sections leave the device as it was, whatever is damaged.
    pub fn check_damaged_state(&self) {
        self.device.pause();
        let saved = self.sections();
        let mut damaged = vec![Vec::new()];
        for (index, section) in saved.iter().enumerate() {
            for cut in 0..section.bytes.len() {
                let bytes = section.bytes[..cut].to_vec();
                let mut sections = saved.clone();
                sections[index] = Section { bytes, ..section.clone() };
                damaged.push(sections);
            }
            let mut sections = saved.clone();
            sections[index].version += 1;
            damaged.push(sections.clone());
            sections[index].kind = "other".into();
            damaged.push(sections);
        }
        damaged.push([saved.as_slice(), &saved[..1]].concat());
        for sections in damaged {
            assert!(self.device.load(&sections).is_err(), "{sections:?}");
            assert_eq!(self.sections(), saved);
        }
        self.device.load(&saved).unwrap();
        assert_eq!(self.sections(), saved);
        self.device.start().unwrap();
    }
}

/// A device on the PCI transport, as device 1 of a bus, and its memory.
pub struct PciRig {
    pub device: Arc<dyn Device>,
    pub ram: GuestRam,
    pub wires: Arc<Wires>,
    pub faults: FaultCounter,
    /// Where BAR 0 is in the bus's window.
    pub bar: u64,
}

/// Regions of a bus: ports, enhanced configuration space, window for BARs.
pub const ECAM: usize = 1;
pub const WINDOW: usize = 2;
/// Where the window begins.
pub const WINDOW_BASE: u64 = 0xC100_0000;

impl PciRig {
    pub fn new(function: Pci) -> Self {
        Self::with_doorbells(function, None)
    }

    pub fn with_doorbells(function: Pci, doorbells: Option<Arc<dyn Doorbells>>) -> Self {
        let ram = allocate(&RamLayout::pc(RAM).unwrap(), Backing::Memfd).unwrap();
        let (wires, faults) = (Arc::new(Wires::default()), function.faults());
        assert!(function.name().len() > 1);
        let host = PciHost::new().function(function);
        let clock = Arc::new(ManualClock::default());
        let device = bring_up(host, &ram, &wires, &clock, doorbells);
        let mut rig = Self { device, ram, wires, faults, bar: 0 };
        rig.bar = u64::from(rig.config_space(0x10)) - WINDOW_BASE;
        rig.set_config_space(4, 6);
        rig
    }

    pub fn config_space(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(ECAM, (1 << 15) + at, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set_config_space(&self, at: u64, value: u32) {
        let _ = self.device.write(ECAM, (1 << 15) + at, &value.to_le_bytes());
    }

    /// Reads `N` bytes of BAR 0.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read(WINDOW, self.bar + at, &mut data);
        data
    }

    /// Writes the low `width` bytes of `value` into BAR 0.
    pub fn write(&self, at: u64, width: usize, value: u64) {
        let _ = self.device.write(WINDOW, self.bar + at, &value.to_le_bytes()[..width]);
    }

    /// Accepts of `wanted` what the device offers, and sets up queue 0 at fixed places.
    pub fn activate(&self, wanted: u64, size: u16) -> Ring {
        self.write(20, 1, 0);
        self.write(20, 1, ACKNOWLEDGE_DRIVER.into());
        for word in 0..2 {
            self.write(0, 4, word);
            let offered = u32::from_le_bytes(self.read(4));
            let features = (wanted | VERSION_1) >> (32 * word) & u64::from(offered);
            self.write(8, 4, word);
            self.write(12, 4, features);
        }
        self.write(20, 1, (ACKNOWLEDGE_DRIVER | FEATURES_OK).into());
        self.write(22, 2, 0);
        self.write(24, 2, size.into());
        for (at, address) in [(32, 0x1000), (40, 0x2000), (48, 0x3000)] {
            self.write(at, 4, address);
            self.write(at + 4, 4, 0);
        }
        self.ram.write_slice(&[0; 0x3000], GuestAddress(0x1000)).unwrap();
        self.write(28, 2, 1);
        self.write(20, 1, (ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK).into());
        Ring::placed(&self.ram, 0, size, 0x1000, 0x2000, 0x3000)
    }

    pub fn status(&self) -> u32 {
        let [status] = self.read(20);
        status.into()
    }

    pub fn notify(&self, queue: u16) {
        self.write(0x3000 + u64::from(queue) * 4, 2, queue.into());
    }
}

/// Waits until `condition` holds.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "no {what} after 20 seconds");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// The driver's side of a split virtqueue.
pub struct Ring {
    pub index: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub next_desc: u16,
    pub avail_idx: u16,
    pub used_idx: u16,
    ram: GuestRam,
}

impl Ring {
    /// Sets up queue `index` at these places.
    pub fn at(rig: &Rig, index: u16, size: u16, desc: u64, avail: u64, used: u64) -> Self {
        rig.place(index, size.into(), desc, avail, used);
        rig.write(avail, &[0; 4]);
        rig.write(used, &[0; 4]);
        Self::placed(&rig.ram, index, size, desc, avail, used)
    }

    /// A queue that is set up at these places.
    pub fn placed(ram: &GuestRam, index: u16, size: u16, desc: u64, avail: u64, used: u64) -> Self {
        let ram = ram.clone();
        Self { index, size, desc, avail, used, next_desc: 0, avail_idx: 0, used_idx: 0, ram }
    }

    fn put<T: vmkit_memory::ByteValued>(&self, value: T, at: u64) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        self.ram.load(GuestAddress(at), Ordering::SeqCst).unwrap()
    }

    /// Writes entry `index` of the table at `table`.
    pub fn descriptor_in(
        &self,
        table: u64,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = table + u64::from(index) * 16;
        self.put(addr, at);
        self.put(len, at + 8);
        self.put(flags, at + 12);
        self.put(next, at + 14);
    }

    pub fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_in(self.desc, index, addr, len, flags, next);
    }

    /// Makes the chain at descriptor `head` available.
    pub fn offer(&mut self, head: u16) {
        self.put(head, self.avail + 4 + u64::from(self.avail_idx % self.size) * 2);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    pub fn set_avail_idx(&self, value: u16) {
        self.ram.store(value, GuestAddress(self.avail + 2), Ordering::SeqCst).unwrap();
    }

    pub fn set_avail_flags(&self, value: u16) {
        self.put(value, self.avail);
    }

    pub fn set_used_event(&self, value: u16) {
        self.put(value, self.avail + 4 + u64::from(self.size) * 2);
    }

    pub fn avail_event(&self) -> u16 {
        self.load(self.used + 4 + u64::from(self.size) * 8)
    }

    /// Entries of the used ring that the device has filled so far.
    pub fn used_index(&self) -> u16 {
        self.load(self.used + 2)
    }

    pub fn used_flags(&self) -> u16 {
        self.load(self.used)
    }

    /// Makes a chain of the buffers and makes it available; returns its head.
    pub fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let head = self.next_desc;
        let count = readable.len() + writable.len();
        let buffers = readable.iter().map(|b| (b, 0)).chain(writable.iter().map(|b| (b, WRITE)));
        for (n, (&(addr, len), flags)) in buffers.enumerate() {
            let last = n + 1 == count;
            let next = (self.next_desc + 1) % self.size;
            let flags = if last { flags } else { flags | NEXT };
            self.descriptor(self.next_desc, addr, len, flags, next);
            self.next_desc = next;
        }
        self.offer(head);
        head
    }

    /// The next used buffer, if there is one: its head and how much was written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.load(self.used + 2) == self.used_idx {
            return None;
        }
        let at = self.used + 4 + u64::from(self.used_idx % self.size) * 8;
        self.used_idx = self.used_idx.wrapping_add(1);
        let id: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
        Some((id as u16, self.ram.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for the next used buffer.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let mut found = None;
        wait("used buffer", || {
            found = self.used();
            found.is_some()
        });
        found.unwrap()
    }
}

/// A queue of a device by itself, and the driver's side of it, for tests of a worker.
#[cfg(test)]
pub(crate) fn lone_queue(ram: &GuestRam, index: u16, size: u16) -> (crate::VirtQueue, Ring) {
    struct Nobody;
    impl crate::Interrupt for Nobody {
        fn queue(&self, _: u16) {}
        fn config(&self) {}
        fn reset(&self) {}
    }
    let (desc, avail, used) = (0x1000, 0x2000, 0x3000);
    let state = virtio_queue::QueueState {
        max_size: size,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: false,
        size,
        ready: true,
        desc_table: desc,
        avail_ring: avail,
        used_ring: used,
    };
    let queue = crate::VirtQueue::new(index, state, ram.clone(), Arc::new(Nobody)).unwrap();
    (queue, Ring::placed(ram, index, size, desc, avail, used))
}
