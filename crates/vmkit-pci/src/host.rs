//! The host bridge: the ways into configuration space, and which function answers an address.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use vmkit_device::memory::FileMemory;
use vmkit_device::{
    Announcement, Device, DeviceBuilder, DeviceError, EndSignal, GuestEnd, IoFlow, IoNeed, IoSpace,
    IrqNeed, Needs, Resources, Saved, Section,
};

use crate::config::{Config, LEN};
use crate::saved::{HostState, inner, is_own, malformed, outer};
use crate::slot::Slot;
use crate::{Description, FunctionResources, Identity, Intx, Msix, PciFunctionBuilder};

const NAME: &str = "pci-host";

/// Region of the address and data ports (§3.2.2.3.2).
const PORTS: usize = 0;
/// Region of the enhanced configuration space (PCIe 3.0 §7.2.2).
const ECAM: usize = 1;
/// Region of the window for BARs.
const WINDOW: usize = 2;

/// The address port; the data port is 4 further. Byte 1 is the reset register of Intel's chipsets.
const ADDRESS_PORT: u16 = 0xCF8;
const DATA: u64 = 4;
const RESET: u64 = 1;
/// A write of this bit to the reset register resets.
const RESET_PULL: u8 = 1 << 2;
/// The address port's bit that makes the data port answer.
const ENABLE: u32 = 1 << 31;

/// One bus of 32 devices of 8 functions of 4 KiB, from the start of the 32-bit hole.
const ECAM_BASE: u64 = 0xC000_0000;
const ECAM_LEN: u64 = 1 << 20;
/// The window for BARs: up to where devices that are not on PCI begin.
const WINDOW_BASE: u64 = 0xC100_0000;
const WINDOW_LEN: u64 = 0x0F00_0000;

/// Devices on the bus, of which the first is the bridge itself.
const DEVICES: usize = 32;

/// A PCI host bridge with the functions behind it, as one device of a machine.
///
/// Ports 0xCF8 to 0xCFF are its own, among them the reset register at 0xCF9: ACPI's must be
/// elsewhere then (`AcpiPm::reset_port`).
///
/// ```
/// use vmkit_device::DeviceBuilder;
/// use vmkit_pci::PciHost;
///
/// let host = PciHost::new();
/// assert_eq!(host.name(), "pci-host");
/// ```
#[derive(Default)]
pub struct PciHost {
    functions: Vec<Box<dyn PciFunctionBuilder>>,
}

impl std::fmt::Debug for PciHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.functions.iter().map(|function| function.name()).collect();
        f.debug_struct("PciHost").field("functions", &names).finish_non_exhaustive()
    }
}

impl PciHost {
    /// A bridge with nothing behind it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a function, as device 1 and up in the order of these calls; at most 31.
    #[must_use]
    pub fn function(self, function: impl PciFunctionBuilder + 'static) -> Self {
        self.boxed_function(Box::new(function))
    }

    /// Adds a function whose type is not known here.
    #[must_use]
    pub fn boxed_function(mut self, function: Box<dyn PciFunctionBuilder>) -> Self {
        self.functions.push(function);
        self
    }
}

fn config_error(reason: String) -> DeviceError {
    DeviceError::Config { device: NAME.into(), reason }
}

impl DeviceBuilder for PciHost {
    fn name(&self) -> String {
        NAME.into()
    }

    fn needs(&self) -> Needs {
        let mmio = |at, len| IoNeed { space: IoSpace::Mmio, at: Some(at), len, align: 1 };
        Needs {
            io: vec![
                IoNeed::ports(ADDRESS_PORT, 8),
                mmio(ECAM_BASE, ECAM_LEN),
                mmio(WINDOW_BASE, WINDOW_LEN),
            ],
            irqs: vec![IrqNeed::Any; 4],
        }
    }

    fn memory(&self) -> Vec<Arc<FileMemory>> {
        self.functions.iter().flat_map(|function| function.memory()).collect()
    }

    fn build(self: Box<Self>, mut resources: Resources) -> Result<Arc<dyn Device>, DeviceError> {
        if self.functions.len() >= DEVICES {
            return Err(config_error(format!("{} functions, at most 31", self.functions.len())));
        }
        let mut slots: Vec<Slot> = Vec::new();
        let mut next = WINDOW_BASE;
        let mut placed = std::mem::take(&mut resources.placed).into_iter();
        for (number, builder) in (1_u8..).zip(self.functions) {
            if slots.iter().any(|slot| slot.function.name() == builder.name()) {
                return Err(config_error(format!("two functions are named {}", builder.name())));
            }
            resources.placed = placed.by_ref().take(builder.memory().len()).collect();
            slots.push(plug(number, builder, &resources, &mut next)?);
        }
        let mut intx = [0; 4];
        intx.iter_mut().zip(&resources.irqs).for_each(|(gsi, wire)| *gsi = wire.gsi());
        let bridge =
            Identity { vendor: 0x8086, device: 0x0D57, class: 0x06_0000, ..Identity::default() };
        let bridge = Description { identity: bridge, ..Description::default() };
        let host = Host {
            slots,
            bridge: Config::new(&bridge).map_err(config_error)?,
            address: AtomicU32::new(0),
            routes: ArcSwap::default(),
            moves: Mutex::new(()),
            end: resources.end,
            announcement: Announcement::PciHost {
                ecam: ECAM_BASE,
                buses: 1,
                mmio32: (WINDOW_BASE, WINDOW_LEN),
                mmio64: (0, 0),
                io: (0, 0),
                intx,
            },
        };
        Ok(Arc::new(host))
    }
}

/// Brings one function to life, with its BARs placed from `next` on.
fn plug(
    number: u8,
    builder: Box<dyn PciFunctionBuilder>,
    resources: &Resources,
    next: &mut u64,
) -> Result<Slot, DeviceError> {
    let name = builder.name();
    let description = builder.describe();
    let wrong = |reason: String| DeviceError::Config { device: name.clone(), reason };
    let mut config = Config::new(&description).map_err(wrong)?;
    for (index, size) in description.bars.iter().enumerate() {
        let Some(size) = size.map(u64::from) else { continue };
        let at = next.next_multiple_of(size);
        *next = at + size;
        if *next > WINDOW_BASE + WINDOW_LEN {
            return Err(wrong(format!("no room for its BAR {index}")));
        }
        config.set_bar(index, at as u32);
    }
    // Device n's pin A is wired to line n % 4, which is what the firmware tables say.
    let line = resources.line(usize::from(number % 4));
    let line = line.ok_or_else(|| wrong("its interrupt is missing".into()))?;
    let intx = Arc::new(Intx::new(line));
    let sink = resources.interrupts.clone();
    let msix = description.msix.map(|place| Arc::new(Msix::new(place, sink)));
    let mut common = resources.clone();
    common.io.clear();
    common.irqs.clear();
    let own = FunctionResources { common, intx: intx.clone(), msix: msix.clone() };
    let function = builder.build(own)?;
    Ok(Slot::new(number, function, config, description.bars, msix, intx))
}

/// A BAR that is answered.
#[derive(Clone, Copy)]
struct Route {
    start: u64,
    end: u64,
    slot: usize,
    bar: usize,
}

struct Host {
    slots: Vec<Slot>,
    /// The bridge's own space, which is read-only: there is nothing to command, to save or to reset.
    bridge: Config,
    address: AtomicU32,
    /// In ascending order, without overlaps.
    routes: ArcSwap<Vec<Route>>,
    /// Held while the routes are worked out anew.
    moves: Mutex<()>,
    end: EndSignal,
    announcement: Announcement,
}

impl Host {
    /// Works out anew who answers which address of the window. Where two BARs overlap, the lower
    /// slot's answers all of its own, and the other's is not answered.
    fn route(&self) {
        let _one_at_a_time = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        let mut routes: Vec<Route> = Vec::new();
        for (slot, place) in self.slots.iter().enumerate() {
            let mut placed = Vec::new();
            for (bar, range) in place.decoded() {
                let inside = range.start >= WINDOW_BASE && range.end <= WINDOW_BASE + WINDOW_LEN;
                let free = routes.iter().all(|r| range.end <= r.start || r.end <= range.start);
                if inside && free {
                    routes.push(Route { start: range.start, end: range.end, slot, bar });
                    placed.push((bar, range.start));
                }
            }
            place.tell(&placed);
        }
        routes.sort_by_key(|route| route.start);
        self.routes.store(Arc::new(routes));
    }

    fn find(&self, offset: u64, len: usize) -> Option<(&Slot, usize, u64)> {
        let at = WINDOW_BASE.checked_add(offset)?;
        let routes = self.routes.load();
        let index = routes.partition_point(|route| route.start <= at).checked_sub(1)?;
        let route = routes.get(index)?;
        let inside = at.checked_add(len as u64)? <= route.end;
        let slot = self.slots.get(route.slot)?;
        inside.then_some((slot, route.bar, at - route.start))
    }

    /// Reads `at` of the configuration space of a device; what is not there reads as ones.
    fn read_config(&self, bus: u32, device: u32, function: u32, at: usize, data: &mut [u8]) {
        data.fill(0xFF);
        if bus != 0 || function != 0 || at >= LEN {
            return;
        }
        if device == 0 {
            self.bridge.read(at, data);
        } else if let Some(slot) = self.slots.get(device as usize - 1) {
            slot.read_config(at, data);
        }
    }

    fn write_config(&self, bus: u32, device: u32, function: u32, at: usize, data: &[u8]) {
        if bus != 0 || function != 0 || at >= LEN {
            return;
        }
        if let Some(index) = (device as usize).checked_sub(1)
            && let Some(slot) = self.slots.get(index)
            && slot.write_config(at, data)
        {
            self.route();
        }
    }

    /// What the address port points at, if it is enabled: bus, device, function, register.
    fn pointed(&self, offset: u64) -> Option<(u32, u32, u32, usize)> {
        let address = self.address.load(Ordering::Acquire);
        let register = (address & 0xFC) as usize + (offset - DATA) as usize;
        let place = (address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 7);
        (address & ENABLE != 0).then_some((place.0, place.1, place.2, register))
    }

    fn read_ports(&self, offset: u64, data: &mut [u8]) {
        if offset >= DATA {
            data.fill(0xFF);
            if let Some((bus, device, function, at)) = self.pointed(offset) {
                self.read_config(bus, device, function, at, data);
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    fn write_ports(&self, offset: u64, data: &[u8]) -> IoFlow {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                self.address.store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
            }
            (RESET, &[value]) if value & RESET_PULL != 0 => {
                self.end.raise(GuestEnd::Reset);
                return IoFlow::Stop;
            }
            (DATA.., _) => {
                if let Some((bus, device, function, at)) = self.pointed(offset) {
                    self.write_config(bus, device, function, at, data);
                }
            }
            _ => {}
        }
        IoFlow::Continue
    }
}

/// Bus, device, function and register of an ECAM offset.
fn ecam(offset: u64) -> (u32, u32, u32, usize) {
    let place = offset as u32;
    (place >> 20, place >> 15 & 0x1F, place >> 12 & 7, (place & 0xFFF) as usize)
}

impl Device for Host {
    fn name(&self) -> &str {
        NAME
    }

    fn announce(&self) -> Vec<Announcement> {
        vec![self.announcement.clone()]
    }

    fn read(&self, region: usize, offset: u64, data: &mut [u8]) {
        match region {
            PORTS => self.read_ports(offset, data),
            ECAM => {
                let (bus, device, function, at) = ecam(offset);
                self.read_config(bus, device, function, at, data);
            }
            WINDOW => match self.find(offset, data.len()) {
                Some((slot, bar, at)) => slot.read_bar(bar, at, data),
                None => data.fill(0xFF),
            },
            _ => data.fill(0xFF),
        }
    }

    fn write(&self, region: usize, offset: u64, data: &[u8]) -> IoFlow {
        match region {
            PORTS => return self.write_ports(offset, data),
            ECAM => {
                let (bus, device, function, at) = ecam(offset);
                self.write_config(bus, device, function, at, data);
            }
            _ => {
                if let Some((slot, bar, at)) = self.find(offset, data.len()) {
                    slot.write_bar(bar, at, data);
                }
            }
        }
        IoFlow::Continue
    }

    fn start(&self) -> Result<(), DeviceError> {
        for (count, slot) in self.slots.iter().enumerate() {
            if let Err(error) = slot.function.start() {
                self.slots.iter().take(count).rev().for_each(|slot| slot.function.pause());
                return Err(error);
            }
        }
        Ok(())
    }

    fn pause(&self) {
        self.slots.iter().rev().for_each(|slot| slot.function.pause());
    }

    fn reset(&self) {
        self.address.store(0, Ordering::Release);
        self.slots.iter().for_each(Slot::reset);
        self.route();
    }

    fn save(&self) -> Saved {
        let slots = self.slots.iter().map(Slot::save).collect();
        let state = HostState { address: self.address.load(Ordering::Acquire), slots };
        let Ok(own) = state.section() else {
            return Saved::Cannot("its state has no encoding");
        };
        let mut sections = vec![own];
        for slot in &self.slots {
            match slot.function.save() {
                Saved::Stateless => {}
                Saved::Cannot(reason) => return Saved::Cannot(reason),
                Saved::Sections(more) => {
                    let name = slot.function.name();
                    sections.extend(more.into_iter().map(|section| outer(name, section)));
                }
            }
        }
        Saved::Sections(sections)
    }

    fn load(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let state = HostState::find(NAME, sections)?;
        let names = || self.slots.iter().map(|slot| slot.function.name());
        let same = state.slots.len() == self.slots.len()
            && self.slots.iter().zip(&state.slots).all(|(slot, saved)| slot.fits(saved));
        if !same {
            return Err(malformed(NAME, "it was saved with other functions"));
        }
        let known = |s: &Section| is_own(s) || names().any(|name| inner(name, s).is_some());
        if let Some(stranger) = sections.iter().find(|section| !known(section)) {
            return Err(malformed(NAME, format!("section {} is nobody's", stranger.name)));
        }
        // A function may refuse its sections; those before it are put back then.
        let before: Vec<_> = self.slots.iter().map(|slot| slot.function.save()).collect();
        for (count, slot) in self.slots.iter().enumerate() {
            let name = slot.function.name();
            let own: Vec<Section> = sections.iter().filter_map(|s| inner(name, s)).collect();
            if let Err(error) = slot.function.load(&own) {
                for (slot, before) in self.slots.iter().zip(before).take(count) {
                    if let Saved::Sections(before) = before
                        && let Err(error) = slot.function.load(&before)
                    {
                        log::error!("{}: its state is lost: {error}", slot.function.name());
                    }
                }
                return Err(error);
            }
        }
        for (slot, saved) in self.slots.iter().zip(&state.slots) {
            slot.load(saved);
        }
        self.address.store(state.address, Ordering::Release);
        self.route();
        Ok(())
    }
}
